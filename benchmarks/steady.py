"""What a step allocates, and the page faults of 1,000 steps, once its buffers are made."""

import resource
import warnings
from itertools import cycle, islice

import torch
from torch.profiler import ProfilerActivity, profile

from manualnn.experiment import build
from manualnn.training import Training

from .results import machine, table, write_section
from .works import find

WORKS = {"MLP (W1)": "W1", "Adam (W3)": "W3", "CNN (W4)": "W4", "16 networks (W6)": "W6"}


def allocations(training: Training, steps: int = 32) -> tuple[float, int]:
    """Bytes allocated per step, and the largest single allocation, in the thread of the caller."""
    batches = list(islice(cycle(list(training.batches(1))), 3 * steps))
    for index in batches[: 2 * steps]:
        training.step(index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            for index in batches[2 * steps :]:
                training.step(index)
    sizes = [
        event.cpu_memory_usage
        for event in found.events()
        if event.name == "[memory]" and event.cpu_memory_usage > 0
    ]
    return sum(sizes) / steps, max(sizes, default=0)


def faults(training: Training, steps: int = 1000) -> float:
    """Minor page faults per step of the process."""
    batches = list(islice(cycle(list(training.batches(1))), steps))
    for index in batches[:100]:
        training.step(index)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for index in batches:
        training.step(index)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps


def main() -> None:
    rows = []
    for name, work in WORKS.items():
        training, _ = build(find(work).config().populations()[0], torch.device("cpu"))
        total, largest = allocations(training)
        steps = 100 if work in ("W4", "W6") else 1000
        rows.append((name, f"{total:.0f}", largest, f"{faults(training, steps):.3f}", steps))
        print(rows[-1], flush=True)
    heads = ("", "bytes allocated per step", "largest at once", "page faults per step", "steps")
    write_section("Steady state", f"{machine()}.\n\n{table(heads, rows)}")
