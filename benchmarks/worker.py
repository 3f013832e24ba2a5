"""One peer on one work in a process of its own: an epoch for every line of input.

    python -m benchmarks.worker PEER WORK [DEVICE]

A line is the number of steps (0: the whole epoch); the answer is JSON with the seconds of it. At
the end of input follow the test accuracies and the peak memory in MiB.
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
    for epoch, line in enumerate(sys.stdin, 1):
        order = orders(work, epoch)
        order = order[: int(line) or len(order)]
        if epoch == 1 and peer == "JAX":
            made.train(order)  # compiles for this number of steps
        begin = time.perf_counter()
        made.train(order)
        wait()
        say(seconds=(time.perf_counter() - begin) * work.steps / len(order))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cuda = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else None
    say(accuracies=made.accuracies(), peak=peak, cuda_peak=cuda)


if __name__ == "__main__":
    main(*sys.argv[1:])
