"""What a file may be, and how much it may ask for, before it is read."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import InputError


def file_size(path: Path) -> int:
    """The bytes of a file. Raises OSError where there is none, and InputError for a device or pipe,
    which may never end."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: cannot be read: a device or pipe, not a file")
    return status.st_size


def most_bytes() -> int:
    """What the numbers in one file may take: half of the memory of this machine, or of the control
    group that this process is in."""
    found = [2**40]
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found) // 2
