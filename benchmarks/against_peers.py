"""Seconds per epoch of each work for manualnn and for every peer, in processes that take turns."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from .peers import PEERS
from .results import machine, table, write_section
from .works import find, peak_flops

OURS = "manualnn"


@dataclass
class Worker:
    """A peer on a work, in a process that trains when it is told to."""

    peer: str
    process: subprocess.Popen
    errors: IO[str]
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    unfit: str = ""
    ready: float = 0.0

    @classmethod
    def start(cls, peer: str, work: str, device: str) -> "Worker":
        command = [sys.executable, "-m", "benchmarks.worker", peer, work, device]
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by finish; a pipe may fill up
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        worker = cls(peer, process, errors)
        answer = worker._read()
        worker.unfit, worker.ready = answer.get("unfit", ""), answer.get("ready", 0.0)
        return worker

    def epoch(self, steps: int) -> float:
        """Seconds of an epoch, from so many steps of it; nan where the process has ended."""
        if self.process.stdin is None or self.unfit:
            return float("nan")
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._read()
        self.unfit = self.unfit or answer.get("unfit", "")
        return answer.get("seconds", float("nan"))

    def finish(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
            self.process.stdin = None
        if not self.unfit:
            self.end = self._read()
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return {"unfit": f"failed: {lines[-1][:80] if lines else 'no output'}"}


def measure(
    name: str, peers: Sequence[str], rounds: int, seconds: float, device: str = "cpu"
) -> list[Worker]:
    """All peers on a work: one after another in every round, about `seconds` each time."""
    steps = find(name).steps
    workers = []
    for peer in peers:
        worker = Worker.start(peer, name, device)
        if not worker.unfit:
            few = min(steps, 5)
            worker.epoch(few)
            share = seconds / (worker.epoch(few) or 1e-9)
            worker.steps = 0 if share >= 0.5 else max(few, round(share * steps))
        print(f"  {peer}: {worker.unfit or f'ready after {worker.ready:.1f} s'}", flush=True)
        workers.append(worker)
    for _ in range(rounds):
        for worker in workers:
            if not worker.unfit:
                worker.seconds.append(worker.epoch(worker.steps))
    for worker in workers:
        worker.finish()
    return workers


def summarize(name: str, workers: list[Worker], peak: float) -> tuple[str, dict[str, float]]:
    """A table of a work, and for each peer the ratio of our median to its."""
    work = find(name)
    fit = [w for w in workers if w.seconds and not w.unfit]
    ours = next((w for w in fit if w.peer == OURS), None)
    rows, ratios = [], {}
    for worker in fit:
        median, best = statistics.median(worker.seconds), min(worker.seconds)
        ratio = ""
        if ours:
            pairs = [a / b for a, b in zip(ours.seconds, worker.seconds, strict=True)]
            ratios[worker.peer] = statistics.median(pairs)
            ratio = f"{ratios[worker.peer]:.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
        rate = work.flops() / median / 1e9
        found = worker.end.get("accuracies") or []
        accuracy = f"{100 * sum(found) / len(found):.1f} %" if found else "-"
        epochs = worker.end.get("epochs", 0)
        if found and min(found) < work.floor:
            accuracy += f" after {epochs:.1f} epochs" if epochs < 1 else ", has not learned"
        memory = worker.end.get("cuda_peak") or worker.end.get("peak") or 0
        rows.append(
            (worker.peer, f"{median:.3f} / {best:.3f}", ratio, f"{rate:.0f}",
             f"{100 * rate * 1e9 / peak:.0f} %", f"{memory:.0f}", f"{worker.ready:.1f}", accuracy)
        )  # fmt: skip
    heads = ("", "s per epoch, median / best", "manualnn / this", "GFLOP/s", "of peak", "MiB",
             "s to start", "test accuracy")  # fmt: skip
    missing = [f"{w.peer}: {w.unfit}" for w in workers if w.unfit]
    text = f"**{name}**: {work.title}; {work.samples:,} samples.\n\n{table(heads, rows)}\n"
    return text + (f"\nNot run: {'; '.join(missing)}.\n" if missing else ""), ratios


def main(works: Sequence[str], rounds: int, seconds: float, device: str, peers: Sequence[str],
         section: str) -> None:  # fmt: skip
    peak = peak_flops(torch.get_num_threads(), device)
    text = [f"{machine(device)}; measured peak {peak / 1e9:.0f} GFLOP/s in fp32. {rounds} rounds in"
            f" which the processes take turns, about {seconds:g} s each; ratios are medians of the"
            " rounds' ratios, with their range. Products alone train nothing: they are a limit.\n"
            ]  # fmt: skip
    overview: dict[str, dict[str, float]] = {}
    for name in works:
        print(f"{name}: {find(name).title}", flush=True)
        part, overview[name] = summarize(
            name, measure(name, peers or list(PEERS), rounds, seconds, device), peak
        )
        print(part, flush=True)
        text.append(part)
    names = [p for p in PEERS if any(p in found for found in overview.values()) and p != OURS]
    rows = [
        (peer, *(f"{found[peer]:.2f}" if peer in found else "" for found in overview.values()))
        for peer in names
    ]
    text.insert(1, "manualnn / peer:\n\n" + table(("", *overview), rows) + "\n")
    picture = Path(__file__).parent / f"{section.lower().replace(' ', '-')}.png"
    text.append(f"![{section}]({picture.name})")
    draw(overview, names, picture)
    write_section(section, "\n".join(text))


def draw(overview: dict[str, dict[str, float]], names: list[str], path: Path) -> None:
    """Bars: how many times as long as manualnn each peer takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for i, peer in enumerate(names):
        places = [j + i * width for j, found in enumerate(overview.values()) if peer in found]
        times = [1 / found[peer] for found in overview.values() if peer in found]
        axes.bar(places, times, width, label=peer)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(overview))], list(overview))
    axes.set_ylabel("time / manualnn's (log)")
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)
