"""The peers on a GPU, and populations of up to 4096 networks: one call, within ten minutes."""

import time
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from manualnn.experiment import build

from . import accuracy, against_peers
from .results import machine, table, write_section
from .works import WORKS, find

PEERS = ["manualnn", "manualnn tf32", "manualnn bf16", "torch eager", "torch compile, graphs",
         "torch ensemble", "JAX"]  # fmt: skip


def populations(largest: int) -> Iterator[tuple[object, ...]]:
    """Time of an epoch of R networks of W1, from 60 steps, and what that is for each."""
    alone = None
    networks = 1
    while networks <= largest:
        for shared in (True, False):
            work = find(f"W1:networks={networks}:shared={int(shared)}")
            try:
                training, _ = build(work.config().populations()[0], torch.device("cuda"))
                batches = list(training.batches(1))
                for index in batches[:5]:
                    training.step(index)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for index in batches[5:65]:
                    training.step(index)
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                yield networks, shared, "out of memory", "", ""
                continue
            seconds = (time.perf_counter() - begin) / 60 * work.steps
            alone = alone or seconds
            yield (networks, "shared" if shared else "own", f"{seconds:.3f}",
                   f"{seconds / alone:.1f}", f"{networks / seconds:.1f}")  # fmt: skip
            del training
            torch.cuda.empty_cache()
        networks *= 4


def kernels(name: str) -> float:
    """Kernels that a step launches or replays."""
    training, _ = build(find(name).config().populations()[0], torch.device("cuda"))
    batches = list(training.batches(1))
    for index in batches[:5]:
        training.step(index)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for index in batches[5:25]:
            training.step(index)
        torch.cuda.synchronize()
    return len([e for e in found.events() if e.device_type.name == "CUDA"]) / 20


def main(quick: bool) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device; the other benchmarks run on the CPU")
    rows = list(populations(64 if quick else 4096))
    heads = (
        "networks of W1",
        "batches",
        "s per epoch",
        "of one network's",
        "networks per s, epoch",
    )
    text = f"{machine('cuda')}.\n\n{table(heads, rows)}\n\nKernels per step: "
    text += ", ".join(f"{name} {kernels(name):.0f}" for name in ("W1", "W3", "W4", "W6"))
    write_section("Populations on a GPU", text + ".")
    accuracy.main(2 if quick else 5, "cuda", "Time to accuracy on a GPU")
    works = ["W1", "W3"] if quick else list(WORKS)
    against_peers.main(works, 3, 0.5, "cuda", PEERS, "Peers on a GPU")
