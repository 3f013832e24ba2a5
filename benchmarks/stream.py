"""Training from a shard folder against training in memory: throughput, memory, shuffle.

    python -m benchmarks.stream --samples 8000000 [--data DIR] [--in-memory 400000] [--rounds 2]

Without --data a folder of that many samples is made from MNIST, in --work, and removed. Each side
trains the default network for an epoch in a process of its own, in alternating order; the side in
memory with as many samples as are asked for, several epochs. Rates count all of an epoch: drawing
its order, too, and waiting for the first window. --shuffle prints what the shuffle is like, alone.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from manualnn.config import load_config
from manualnn.data import ShardWriter, load, open_shards, prepare
from manualnn.data.stream import Plan, quality
from manualnn.network import Network
from manualnn.training import Progress, Training

from .results import machine, table, write_section


def make(folder: Path, samples: int, block: int = 20_000) -> None:
    """MNIST again and again, each time with other noise in the lowest bits."""
    mnist = load("mnist")
    draw = torch.Generator().manual_seed(0)
    with ShardWriter(folder, "mnist again", (1, 28, 28), class_names=mnist.class_names) as writer:
        for start in range(0, samples, block):
            index = torch.arange(start, min(start + block, samples)) % len(mnist.train.labels)
            noise = torch.randint(0, 4, (len(index), 1, 28, 28), dtype=torch.uint8, generator=draw)
            writer.add("train", mnist.train.images[index] ^ noise, mnist.train.labels[index])
        writer.add("test", mnist.test.images, mnist.test.labels)


def status(name: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def train(folder: Path, samples: int, epochs: int, memory_mb: int, streamed: bool) -> dict:
    """Samples per second of each epoch, and the resident memory at each second of them, in MB."""
    base = status("VmRSS")
    [population] = load_config("mnist-mlp", [f"train.epochs={epochs}"]).populations()
    shards = open_shards(folder, ("train",))
    rows = shards.images["train"].first(samples)
    images = rows if streamed else rows[:]
    labels = shards.labels["train"][:samples]
    data = prepare((images, labels), None, memory_mb=memory_mb)
    del images
    network = Network(population.layers(), data.shape, 10)
    settings = population.config.train
    training = Training(network, data, settings, list(population.replicas), "he")
    rates, resident, last = [], [], 0.0
    begin = end = time.perf_counter()
    for event in training.run():
        now = time.perf_counter()
        if isinstance(event, Progress):
            end = now
            if now - last >= 1:
                resident.append(round(status("VmRSS")))
                last = now
        elif isinstance(event, list):
            rates.append(len(data.train) / (end - begin))
            begin = time.perf_counter()
    figures = {"rates": rates, "loss": training.records[-1].train_loss, "resident": resident}
    return figures | {"base": base, "peak": status("VmHWM")}


def child(*arguments: object) -> dict:
    """`train` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.stream", "--child", *map(str, arguments)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output)


def shuffle(samples: int, memory_mb: int, epochs: int = 3) -> str:
    """What the order is like for MNIST's shape and a file that is sorted by its labels."""
    labels = torch.arange(samples) * 10 // samples
    rows = []
    for name, memory in ((f"{memory_mb} MB", memory_mb << 20), ("full shuffle", 2**60)):
        plan = Plan(samples, 784, memory)
        found = [quality(plan.order(torch.Generator().manual_seed(e))[0], labels)
                 for e in range(epochs)]  # fmt: skip
        mean = [statistics.fmean(values) for values in zip(*found, strict=True)]
        rows.append((name, len(plan.windows(None)), plan.window, 1 << plan.shift,
                     f"{mean[0]:+.4f}", f"{mean[1]:.3f}"))  # fmt: skip
    heads = ("", "windows", "blocks of one", "rows of a block", "correlation of place and turn",
             "chi-square of a batch's labels, per degree")  # fmt: skip
    return table(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--in-memory", type=int, default=400_000)
    parser.add_argument("--memory-mb", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--write", action="store_true", help="a section of benchmarks/RESULTS.md")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        folder, *numbers = options.child
        print(json.dumps(train(Path(folder), *map(int, numbers))))
        return
    lines = [shuffle(options.samples, options.memory_mb)]
    print(lines[0], flush=True)
    if options.shuffle:
        return
    made = Path(tempfile.mkdtemp(dir=options.work)) if options.data is None else None
    try:
        folder = options.data or made / "shards"
        if made:
            make(folder, options.samples)
        samples = min(options.samples, len(open_shards(folder, ("train",)).images["train"]))
        few = min(samples, options.in_memory)
        sides = {"stream": (samples, 1, options.memory_mb, 1), "memory": (few, 3, 0, 0)}
        runs: dict[str, list[dict]] = {name: [] for name in sides}
        for number in range(options.rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                runs[name].append(child(folder, *sides[name]))
                print(name, runs[name][-1], flush=True)
        rates = {name: statistics.median(rate for run in found for rate in run["rates"])
                 for name, found in runs.items()}  # fmt: skip
        rows = []
        for name, (count, *_) in sides.items():
            resident = [run["resident"][len(run["resident"]) // 2 :] for run in runs[name]]
            late = [value for values in resident for value in values]
            rows.append((name, f"{count:,}", f"{rates[name]:,.0f}",
                         f"{rates[name] / rates['memory']:.3f}",
                         f"{max(run['peak'] for run in runs[name]):,.0f}",
                         f"{min(late):,} to {max(late):,}" if late else "-"))  # fmt: skip
        heads = ("", "samples", "samples/s", "ratio", "peak MB", "MB in the second half")
        lines.append(table(heads, rows))
        print(lines[-1])
        if options.write:
            write_section("Larger than memory", "\n\n".join([f"{machine()}.", *lines]))
    finally:
        if made:
            shutil.rmtree(made)


if __name__ == "__main__":
    main()
