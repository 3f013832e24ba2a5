"""Checkpoints of a folder: written by a thread while training goes on, the last two kept."""

import io
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .files import replacing
from .safe import read_tensors, scan

LAST, PREVIOUS = "checkpoint.pt", "checkpoint-before.pt"


class Saver:
    """Writes states to `checkpoint.pt`, each whole and flushed to the disk before it takes the name
    of the last, which stays as `checkpoint-before.pt`.

    Writing takes longer than a short epoch may lose, so it goes on beside the training. What became
    of it the next `save` or `flush` says: OSError where it failed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any], then: Callable[[], None]) -> None:
        """Take a copy of the state, and have it written; then call `then`, which may write more."""
        self.flush()
        copied = io.BytesIO()
        torch.save(_dense(state), copied)
        self._pending = self._writer.submit(self._write, copied, then)

    def flush(self) -> None:
        """Wait until what was to be saved is."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, copied: io.BytesIO, then: Callable[[], None]) -> None:
        with replacing(self.folder / LAST, self.folder / PREVIOUS) as temporary:
            content = copied.getvalue()  # no view, which a failure would keep alive
            temporary.write_bytes(content)
            # By the reader's rules, before it takes the place of one that can be read.
            found = scan(temporary, "checkpoint", content)
            if found.problem or found.unsafe:
                raise OSError(f"its checkpoint would be refused: {found.problem or found.unsafe}")
        then()


def _dense(value: Any) -> Any:
    """The same tree with tensors that hold just their own numbers: a view stores all that it is a
    part of, and one that repeats numbers is refused by the reader."""
    if isinstance(value, torch.Tensor):
        own = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        return value if own else value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_dense(item) for item in value)
    return value


def read(folder: Path) -> tuple[Path, Any] | None:
    """The last checkpoint in a folder, and its path; where that is damaged, the one before, and it
    is removed, so that it does not take that one's place.

    None where there is none; InputError where none can be read.
    """
    paths = [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]
    damaged = None
    for path in paths:
        try:
            state = read_tensors(path, "checkpoint")
        except InputError as error:
            if path == paths[-1]:
                raise
            print(f"note: {error}; the one before it, {PREVIOUS}, is used", file=sys.stderr)
            damaged = path
        else:
            if damaged:
                damaged.unlink()
            return path, state
    return None
