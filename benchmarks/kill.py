"""Kill a training process at random moments, go on with it, and compare with an unbroken run.

    python -m benchmarks.kill [--kills 50] [--seed 0]

Each work is trained once without a break. Then processes that train it with `--resume` are ended by
SIGKILL, a random time after they began to train, until there were so many kills, and at last one
comes to its end; where one does so before, another run begins. After every kill the folder must
hold a run that can be gone on with, and in the end the same weights to the bit and the same history
but for `seconds`.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.safe import read_tensors

COMMON = ["data.train_samples=3000", "data.valid=500", "train.checkpoint_every_steps=25"]
WORKS = {
    "mlp": [
        "mnist-mlp",
        *('train.optimizer.name="adam"', "train.optimizer.learning_rate=0.002"),
        "train.early_stopping.patience=1000",
        'model.layers=[["linear", 64], ["relu"], ["dropout", 0.2], ["linear", 10]]',
        "train.epochs=250",
    ],
    "cnn": [
        "mnist-mlp",
        "train.batch_size=100",
        'model.layers=[["conv2d", 8, 3], ["max_pool2d", 2], ["relu"], ["linear", 10]]',
        "train.epochs=50",
    ],
    "population": [
        "mnist-mlp",
        *("train.seeds=[0, 1, 2]", "train.l2=[0, 1e-4, 1e-3]"),
        'model.layers=[["linear", 32], ["tanh"], ["linear", 10]]',
        "train.epochs=150",
    ],
}


@dataclass
class Outcome:
    """What became of a work: kills, those while a file was being written, and what was wrong."""

    kills: int = 0
    writing: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def command(work: str, out: Path, *more: str) -> list[str]:
    config, *sets = WORKS[work]
    options = [part for value in (*COMMON, *sets) for part in ("--set", value)]
    train = ["train", config, "--device", "cpu", "--quiet", "--resume", "--out", str(out)]
    return [sys.executable, "-m", "manualnn", *train, *options, *more]


def run(work: str, kills: int, draw: random.Random, folder: Path, *more: str) -> Outcome:
    """Train `work` without a break, then with at least `kills` kills; files go to `folder`."""
    outcome, whole = Outcome(), folder / "whole"
    subprocess.run(command(work, whole, *more), check=True, capture_output=True)
    while outcome.kills < kills:
        outcome.runs += 1
        out = folder / f"broken-{outcome.runs}"
        while outcome.kills < kills and not _trained(work, out, draw, outcome, more):
            outcome.faults += faults_in(out)
        subprocess.run(command(work, out, *more), check=True, capture_output=True)
        outcome.faults += differences(out, whole)
    return outcome


def _trained(work: str, out: Path, draw: random.Random, outcome: Outcome, more: tuple) -> bool:
    """Whether a process came to its end before it was killed."""
    before = stamp(out)
    process = subprocess.Popen(
        command(work, out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and stamp(out) == before and not writes(out):
        time.sleep(0.002)  # it imports, and reads its data
    deadline = time.monotonic() + draw.uniform(0, 1.5)
    at_writing = draw.random() < 0.3
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
        if at_writing and time.monotonic() > deadline - 0.5 and writes(out):
            break
    process.kill()
    err = process.communicate()[1].decode()
    if process.returncode == -9:
        outcome.kills += 1
        outcome.writing += writes(out)
        return False
    if process.returncode:
        outcome.faults.append(f"{out.name}: exit code {process.returncode}: {err[-300:]}")
    return True


def writes(out: Path) -> bool:
    """Whether there is a file that is not whole."""
    return any(out.glob(".writing-*"))


def stamp(out: Path) -> int:
    path = out / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def faults_in(out: Path) -> list[str]:
    """What cannot be read in the folder of a killed process."""
    faults = []
    for path in (out / "checkpoint.pt", out / "checkpoint-before.pt"):
        try:
            if path.exists():
                read_tensors(path, "checkpoint")
        except InputError as error:
            faults.append(str(error))
    try:
        if (out / "config.toml").exists():
            load_config(out / "config.toml")
        elif (out / "checkpoint.pt").exists():
            faults.append(f"{out.name}: a checkpoint without config.toml")
    except InputError as error:
        faults.append(str(error))
    if (out / "history.csv").exists():
        rows = _history(out)
        if any(len(row) != len(rows[0]) or None in row.values() for row in rows):
            faults.append(f"{out.name}: history.csv is not whole")
    return faults


def _history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def differences(out: Path, whole: Path) -> list[str]:
    faults = []
    for path in (*whole.glob("weights.pkl"), *whole.glob("weights/*.pkl")):
        ours, theirs = torch.load(out / path.relative_to(whole)), torch.load(path)
        if any(not ours[key].equal(theirs[key]) for key in theirs if key != "meta"):
            faults.append(f"{out.name}: {path.relative_to(whole)} differs")
    if _history(out) != _history(whole):
        faults.append(f"{out.name}: history.csv differs")
    left = {path.name for path in out.rglob("*")} - {path.name for path in whole.rglob("*")}
    return faults + [f"{out.name}: {name} is left over" for name in left]


def kill_all(
    works: Iterable[str], kills: int, seed: int, run: Callable[..., Outcome], done: str
) -> None:
    """`run` each work with its share of the kills, say what was `done`, and exit 1 where there are
    faults."""
    works, draw, failed = list(works), random.Random(seed), False
    for work in works:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            outcome = run(work, -(-kills // len(works)), draw, Path(folder))
        print(
            f"{work}: {outcome.kills} {done} ({outcome.writing} while a file was written),"
            f" {outcome.runs} runs to the end, {len(outcome.faults)} faults,"
            f" {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        for fault in outcome.faults:
            print(f"  {fault}")
        failed |= bool(outcome.faults)
    sys.exit(failed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of all works together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    kill_all(WORKS, options.kills, options.seed, run, "kills")


if __name__ == "__main__":
    main()
