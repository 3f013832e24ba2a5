"""What a file may be, and how much it may ask for, before it is read."""

import errno
import os
import stat
from pathlib import Path

from ..errors import InputError
from ..memory import total_memory


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
    """Bytes that the numbers in one file may take: half of what this process may have."""
    return total_memory() // 2
