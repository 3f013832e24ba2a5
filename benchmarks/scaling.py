"""Time of a step by 1, 2 and 4 processes, a model of it, and what that says of other machines.

    python -m benchmarks.scaling [--rounds 3]

    T(P) = turns (shared (c0 + c1 B / P) + 2 (P - 1) latency + 2 (P - 1) / P bytes / bandwidth)

for P > 1 processes, a batch of B samples and a message of so many bytes: c0 is what each process
does whatever its portion is (the optimizer, the calls), c1 what a sample takes; the rest is a
ring's all_reduce (Patarasuk and Yuan 2009), 2 (P - 1) messages one after another that move the
bytes nearly twice. `shared` says how much slower a process is beside busy others; `turns` is 1 for
as many processes as there are cores, and P / cores for more.

c0 and c1 are fitted to one process on B / 4, B / 2 and B samples, latency and bandwidth to
all_reduce alone by two, `shared` to steps by two; then the step by four is predicted, then it is
measured, and then latency and bandwidth are fitted to four as well. The processes of 1, 2 and 4
take turns, and each has one thread.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from manualnn import distributed
from manualnn.config import parse_config
from manualnn.data import prepare
from manualnn.network import Network
from manualnn.training import Training

from .results import machine, table, write_section

CNN = tuple(
    layer
    for channels in (8, 16, 32)
    for layer in (["conv2d", channels, 3, {"padding": 1}], ["max_pool2d", 2], ["relu"])
)
WORKS = {  # layers before the last, and batch size
    "784-128-64-10, batch 64": ((["linear", 128], ["relu"], ["linear", 64], ["relu"]), 64),
    "784-256-128-10, batch 128": ((["linear", 256], ["relu"], ["linear", 128], ["relu"]), 128),
    "784-1024-512-10, batch 512": ((["linear", 1024], ["relu"], ["linear", 512], ["relu"]), 512),
    "784-256-128-10, batch 2048": ((["linear", 256], ["relu"], ["linear", 128], ["relu"]), 2048),
    "3 convolutions, batch 64": (CNN, 64),
}
MESSAGES = [2**power for power in range(12, 24)]  # bytes
# What the makers and NVIDIA's own tests say of a GPU machine, for the paper exercise alone.
GPUS = {
    "8 GPUs, one machine": {"processes": 8, "latency": 2e-6, "bandwidth": 370e9},
    "128 GPUs, 16 machines": {"processes": 128, "latency": 5e-7, "bandwidth": 45e9},
}
GPU_FLOPS = 30e12  # products in float32 with tf32


def training(layers: tuple, batch_size: int, rows: int) -> Training:
    """A training whose batches have `rows` samples."""
    images = torch.randint(256, (4096, 1, 28, 28), dtype=torch.uint8)
    data = prepare((images, torch.arange(4096) % 10), None)
    optimizer = {"momentum": 0.9, "learning_rate": 1e-3}
    config = parse_config(
        {
            "model": {"layers": [*map(list, layers), ["linear", "classes"]]},
            "train": {"batch_size": rows, "optimizer": optimizer, "epochs": 1000},
        }
    )
    [population] = config.populations()
    network = Network(population.layers(), data.shape, 10)
    return Training(network, data, config.train, list(population.replicas), "he")


def seconds(work: Callable[[], object], at_least: float = 0.5) -> float:
    """Median over some calls, each timed alone; all processes make as many."""
    for _ in range(5):
        work()
    found: list[float] = []
    end = time.perf_counter() + at_least
    while distributed.most(time.perf_counter() < end) or len(found) < 5:
        for _ in range(8):
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


def our_step(layers: tuple, batch_size: int, rows: int) -> tuple[Callable[[], None], int]:
    """A step of manualnn, and the bytes of its message."""
    made = training(layers, batch_size, rows)
    batches = itertools.cycle(i for i in made.batches(1) if i.shape[1] == rows)
    message = made.shards[0]._message
    return lambda: made.step(next(batches)), message.numel() * message.element_size()


def peer_step(layers: tuple, batch_size: int) -> Callable[[], None]:
    """The same by torch.nn, autograd and DistributedDataParallel."""
    sizes = [784, *(layer[1] for layer in layers if layer[0] == "linear"), 10]
    parts = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())][:-1]
    model: nn.Module = nn.Sequential(*parts)
    if distributed.world() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
    x, y = torch.randn(4096, 784), torch.arange(4096) % 10
    index = torch.randperm(4096)[distributed.portion(batch_size)]

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()

    return step


def worker(path: Path) -> None:
    """What each process does; rank 0 writes it down."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    found: dict[str, object] = {}
    for name, (layers, batch_size) in WORKS.items():
        parts = [batch_size] if distributed.world() > 1 else [batch_size // n for n in (4, 2, 1)]
        steps, sizes = zip(*(our_step(layers, batch_size, rows) for rows in parts), strict=True)
        found[name] = [seconds(step) for step in steps]
        found[f"bytes of {name}"] = sizes[0]
        if layers is not CNN:
            found[f"peer {name}"] = seconds(peer_step(layers, batch_size))
    if distributed.world() > 1:
        tensors = [torch.zeros(size // 4) for size in MESSAGES]
        found["messages"] = [
            seconds(partial(distributed.add_up, tensor), 0.15) for tensor in tensors
        ]
    if distributed.is_main():
        path.write_text(json.dumps(found))
    distributed.end()


def measure(processes: int) -> dict:
    """One start of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else [])]
        command += ["-m", "benchmarks.scaling", "--worker", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return json.loads(path.read_text())


@dataclass
class Model:
    """The parameters of T(P); `compute` has (c0, c1) of each work."""

    compute: dict[str, tuple[float, float]]
    shared: float
    latency: float
    bandwidth: float
    cores: int

    def share(self, processes: int) -> float:
        if processes == 1:
            return 1.0
        return self.shared * max(1.0, processes / self.cores)

    def message(self, size: float, processes: int) -> float:
        if processes == 1:
            return 0.0
        rounds = 2 * (processes - 1)
        ring = rounds * self.latency + rounds / processes * size / self.bandwidth
        return max(1.0, processes / self.cores) * ring

    def work(self, name: str, processes: int) -> float:
        """What one process does, with the machine to itself."""
        c0, c1 = self.compute[name]
        return c0 + c1 * WORKS[name][1] / processes

    def step(self, name: str, processes: int, size: float) -> float:
        return self.share(processes) * self.work(name, processes) + self.message(size, processes)


def medians(rounds: list[dict]) -> dict:
    """Of each figure over the rounds."""
    return {key: np.median([found[key] for found in rounds], axis=0).tolist() for key in rounds[0]}


def fit(one: dict, two: dict, cores: int, four: dict | None = None) -> Model:
    compute = {}
    for name, (_, batch_size) in WORKS.items():
        sizes = np.array([batch_size // n for n in (4, 2, 1)], float)
        # Relative errors count: a small portion matters as much as a large one.
        columns = np.stack([np.ones(3), sizes], 1) / np.array(one[name])[:, None]
        c0, c1 = np.linalg.lstsq(columns, np.ones(3), rcond=None)[0]
        compute[name] = (max(0.0, float(c0)), float(c1))
    rows = []
    for processes, found in ((2, two), (4, four)):
        for size, taken in zip(MESSAGES, found["messages"] if found else [], strict=False):
            turns = max(1.0, processes / cores) * 2 * (processes - 1)
            rows.append([turns / taken, turns * size / processes / taken])
    latency, inverse = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    model = Model(compute, 1.0, float(latency), 1 / float(inverse), cores)
    slower = []
    for name in WORKS:
        left = two[name][0] - model.message(two[f"bytes of {name}"], 2)
        slower.append(left / model.work(name, 2))
    model.shared = max(1.0, statistics.median(slower))
    return model


def crossover(parameters: float, processes: int, latency: float, bandwidth: float) -> float:
    """The batch from which on so many GPUs take less time for a step of a network than one:
    6 flops a parameter and sample, which the message must not outweigh."""
    rounds = 2 * (processes - 1)
    message = rounds * latency + rounds / processes * 4 * parameters / bandwidth
    return message * GPU_FLOPS / (6 * parameters * (1 - 1 / processes))


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.worker)
        return
    cores = os.cpu_count() or 1
    rounds: dict[int, list[dict]] = {1: [], 2: [], 4: []}
    for _ in range(options.rounds):
        for processes in (1, 2):
            rounds[processes].append(measure(processes))
    before = fit(medians(rounds[1]), medians(rounds[2]), cores)
    sizes = {name: rounds[2][0][f"bytes of {name}"] for name in WORKS}
    predicted = {name: before.step(name, 4, sizes[name]) for name in WORKS}
    print("predicted before 4 was measured:", predicted, flush=True)
    for _ in range(options.rounds):
        for processes in (1, 2, 4):
            rounds[processes].append(measure(processes))
    one, two, four = (medians(rounds[processes]) for processes in (1, 2, 4))
    after = fit(one, two, cores, four)
    spread = {
        processes: max(
            float(np.ptp([found[name][-1] for found in rounds[processes]]) / of[name][-1])
            for name in WORKS
        )
        for processes, of in ((1, one), (2, two), (4, four))
    }
    lines = []
    for name in WORKS:
        alone, pair, many = one[name][-1], two[name][0], four[name][0]
        lines.append(
            [
                name,
                f"{sizes[name]:,}",
                *map(milliseconds, (alone, pair, many)),
                f"{alone / pair / 2:.2f}, {alone / many / 4:.2f}",
                milliseconds(after.step(name, 2, sizes[name])),
                milliseconds(predicted[name]),
                milliseconds(after.step(name, 4, sizes[name])),
                ", ".join(
                    f"{ours / of[f'peer {name}']:.2f}" if f"peer {name}" in of else "-"
                    for ours, of in ((alone, one), (pair, two), (many, four))
                ),
            ]
        )
    heads = ("work", "bytes of a step's message", "1 process, ms", "2", "4", "efficiency of 2, 4",
             "model: 2", "4, before it was measured", "4, after",
             "as a share of DistributedDataParallel's: 1, 2, 4")  # fmt: skip
    gpus = []
    for width in (128, 256, 512, 1024, 2048, 4096):
        parameters = 784 * width + width * width // 2 + 5 * width
        cells = [f"784-{width}-{width // 2}-10", f"{parameters:,}"]
        for values in GPUS.values():
            cells.append(f"{crossover(parameters, **values):,.0f}")
        gpus.append(cells)
    text = "\n\n".join(
        [
            f"{machine()}. Medians of {options.rounds} to {2 * options.rounds} starts of processes"
            " with one thread each, which take turns; from the fastest to the slowest start"
            f" {', '.join(f'{100 * value:.0f} %' for value in spread.values())} of the median for"
            " 1, 2, 4 processes at most.",
            table(heads, lines),
            f"Fitted before 4 was measured: latency {1e6 * before.latency:.0f} us, bandwidth"
            f" {before.bandwidth / 1e9:.2f} GB/s, each process {before.shared:.2f} times as slow"
            f" beside another; after: {1e6 * after.latency:.0f} us,"
            f" {after.bandwidth / 1e9:.2f} GB/s, {after.shared:.2f}.",
            "The batch of all GPUs together from which on they take less time for a step than one"
            " GPU, by the model with assumed figures (docs/scaling.md):",
            table(("network", "parameters", *GPUS), gpus),
        ]
    )
    print(text)
    write_section("Scaling", text)


if __name__ == "__main__":
    main()
