"""One peer on one work in a process of its own, told by lines of input when to train.

    python -m benchmarks.worker PEER WORK [DEVICE]

A line is a number of steps (0: an epoch); the answer is JSON with the seconds that an epoch of such
steps takes. At the end of input follow the test accuracies and the peak memory in MiB.
"""

import json
import resource
import sys
import time

import torch

from .peers import PEERS, UnfitError
from .works import find, orders


def main(peer: str, name: str, device: str = "cpu") -> None:
    work = find(name)

    def say(**values: object) -> None:
        print(json.dumps(values), flush=True)

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    try:
        made = PEERS[peer](work, device)
        made.train(orders(work, 0)[:3])
        wait()
    except (UnfitError, ImportError) as error:
        say(unfit=str(error) if isinstance(error, UnfitError) else f"{error.name} is not installed")
        return
    say(ready=time.perf_counter() - begin)
    compiled, trained = 0, 0
    for epoch, line in enumerate(sys.stdin, 1):
        order = orders(work, epoch)
        if not getattr(made, "whole", False):
            order = order[: int(line) or len(order)]
        if peer == "JAX" and len(order) != compiled:  # which compiles for each number of steps
            made.train(order)
            compiled = len(order)
            trained += compiled
        begin = time.perf_counter()
        made.train(order)
        wait()
        say(seconds=(time.perf_counter() - begin) * work.steps / len(order))
        trained += len(order)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cuda = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else None
    say(accuracies=made.accuracies(), peak=peak, cuda_peak=cuda, epochs=trained / work.steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
