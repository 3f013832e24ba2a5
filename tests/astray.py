"""manualnn's command line in which one process of a group goes astray: python -m tests.astray WAY
ARGUMENTS, by torchrun.

data: rank 1 sees other labels. disk: rank 0 has no space for its second checkpoint. hang: rank 1
stops answering. error: rank 1 meets an error that nobody foresaw. stop: rank 1 alone is asked to
stop, in the second epoch.
"""

import errno
import os
import signal
import sys
import time

from manualnn import checkpoint, experiment, steps
from manualnn.cli import main

RANK = os.environ["RANK"]


def at_step(number: int, action) -> None:
    """Do something before a step."""
    step = steps.Steps._step

    def changed(self, index, count):
        if count == number:
            action()
        return step(self, index, count)

    steps.Steps._step = changed


def fail() -> None:
    raise ZeroDivisionError("which nobody foresaw")


def other_labels() -> None:
    read = experiment._read

    def changed(*arguments):
        dataset, prepared = read(*arguments)
        dataset.train.labels[7] = 0
        return dataset, prepared

    experiment._read = changed


def full_disk() -> None:
    write = checkpoint.Saver._write
    written = []

    def changed(self, *arguments):
        written.append(arguments)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *arguments)

    checkpoint.Saver._write = changed


WAYS = {
    "data1": other_labels,
    "disk0": full_disk,
    "hang1": lambda: at_step(5, lambda: time.sleep(600)),
    "error1": lambda: at_step(5, fail),
    "stop1": lambda: at_step(30, lambda: os.kill(os.getpid(), signal.SIGTERM)),
}

if __name__ == "__main__":
    WAYS.get(sys.argv.pop(1) + RANK, lambda: None)()
    main()
