"""Training from a shard folder against training in memory: throughput, memory, shuffle.

    python -m benchmarks.stream --samples 8000000 [--data DIR] [--in-memory 400000] [--rounds 2]

Without --data a folder of that many samples is made from MNIST, in --work, and removed. The default
network is trained on it for an epoch in a process of its own, whose resident memory is looked at
each second. Then, in another process, trainings on it and on --in-memory samples take turns of some
hundred steps: the speed of a machine may change more in a minute than what is to be measured.
--shuffle prints what the shuffle is like, alone.
"""

import argparse
import itertools
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
from manualnn.steps import threads
from manualnn.training import Progress, Training

from .results import machine, table, write_section

STEPS = 400  # of a turn, batches of 128


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


def training(folder: Path, samples: int, memory_mb: int, streamed: bool) -> Training:
    """The default network's, on the first samples of a folder."""
    [population] = load_config("mnist-mlp", ["train.epochs=1"]).populations()
    shards = open_shards(folder, ("train",))
    rows = shards.images["train"].first(samples)
    labels = shards.labels["train"][:samples]
    data = prepare((rows if streamed else rows[:], labels), None, memory_mb=memory_mb)
    network = Network(population.layers(), data.shape, 10)
    return Training(network, data, population.config.train, list(population.replicas), "he")


def epoch(folder: Path, samples: int, memory_mb: int) -> dict:
    """Samples per second of an epoch, and the resident memory at each second of it, in MB."""
    base = status("VmRSS")
    made = training(folder, samples, memory_mb, True)
    resident, last = [], 0.0
    for event in made.run():
        now = time.perf_counter()
        if isinstance(event, Progress) and now - last >= 1:
            resident.append(round(status("VmRSS")))
            last = now
    record = made.records[-1]
    figures = {"rate": samples / record.seconds, "loss": record.train_loss, "resident": resident}
    return figures | {"base": base, "peak": status("VmHWM")}


def alternate(folder: Path, samples: int, memory_mb: int, few: int, rounds: int) -> dict:
    """Seconds of both sides for each round of as many steps, the first two left out."""
    with threads(torch.get_num_threads()):  # those that start here have its settings
        sides = {
            "stream": training(folder, samples, memory_mb, True),
            "memory": training(folder, few, 0, False),
        }
    batches = {name: itertools.cycle(list(side.batches(1))) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name in sorted(sides, reverse=number % 2 == 0):
            some = list(itertools.islice(batches[name], STEPS))
            begin = time.perf_counter()
            sides[name]._steps(some)
            seconds[name].append(time.perf_counter() - begin)
    return {name: found[2:] for name, found in seconds.items()}


def child(work: str, *arguments: object) -> dict:
    """What `work` gives in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.stream", "--child", work, *map(str, arguments)]
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
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--write", action="store_true", help="a section of benchmarks/RESULTS.md")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        work, folder, *numbers = options.child
        measure = {"epoch": epoch, "alternate": alternate}[work]
        print(json.dumps(measure(Path(folder), *map(int, numbers))))
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
        found = child("epoch", folder, samples, options.memory_mb)
        late = found["resident"][len(found["resident"]) // 2 :] or [round(found["peak"])]
        lines.append(
            f"One epoch of {samples:,} samples, {options.memory_mb} MB for images: resident at most"
            f" {found['peak']:,.0f} MB ({found['base']:,.0f} before any data), {min(late):,} to"
            f" {max(late):,} MB in its second half; {found['rate']:,.0f} samples/s."
        )
        print(lines[-1], flush=True)
        turns = child("alternate", folder, samples, options.memory_mb, few, options.rounds)
        rows = []
        for name, count in (("stream", samples), ("memory", few)):
            rates = [STEPS * 128 / seconds for seconds in turns[name]]
            shares = [a / b for a, b in zip(turns["memory"], turns[name], strict=True)]
            rows.append((name, f"{count:,}", f"{statistics.median(rates):,.0f}",
                         f"{min(rates):,.0f} to {max(rates):,.0f}",
                         f"{statistics.median(shares):.3f}",
                         f"{sum(turns['memory']) / sum(turns[name]):.3f}"))  # fmt: skip
        heads = ("", "samples", "samples/s, median", "from, to", "of memory's, median of the turns",
                 "by the sums")  # fmt: skip
        lines.append(table(heads, rows))
        print(lines[-1])
        if options.write:
            write_section("Larger than memory", "\n\n".join([f"{machine()}.", *lines]))
    finally:
        if made:
            shutil.rmtree(made)


if __name__ == "__main__":
    main()
