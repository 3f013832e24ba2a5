"""A data set of any size in a folder: plain .npy files of some megabytes each, and a manifest.

`manifest.json` names the files and is written last, so that a folder without one is no data set:

    {"format": "manualnn-shards", "version": 1, "name": "mnist", "shape": [1, 28, 28],
     "dtype": "uint8", "class_names": ["0", ...],
     "parts": {"train": {"count": 60000, "histogram": [...],
                         "shards": [{"images": "train-00000-images.npy", "count": 60000,
                                     "labels": "train-00000-labels.npy",
                                     "crc32": {"images": 1234, "labels": 5678}}]}, "test": ...}}

The checksums are those of the values, without a file's header; the histogram counts the 256 values
of bytes. Shapes: N samples, n of one shard.
"""

import json
import math
import os
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import InputError
from ..files import TEMPORARY, replacing, writing

MANIFEST, FORMAT, VERSION = "manifest.json", "manualnn-shards", 1
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
PARTS = ("train", "test")
SHARD_BYTES = 2**28
UNFINISHED = f"{TEMPORARY}shards"  # in a folder whose files are not whole
FILE = re.compile(r"(train|test)-\d{5,}-(images|labels)\.npy")


def file_name(part: str, number: int, kind: str) -> str:
    return f"{part}-{number:05}-{kind}.npy"


@dataclass
class _File:
    """An .npy file that grows: its header is written again when its length is known."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    count: int = 0
    crc: int = 0
    handle: BinaryIO = field(init=False)

    def __post_init__(self) -> None:
        self.handle = self.path.open("xb")
        self._header()

    def _header(self) -> None:
        shape = (self.count, *self.shape)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.handle, header)  # with room for a longer count

    def write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, self.dtype).data.cast("B")
        self.handle.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.count += len(values)

    def close(self) -> None:
        """Write the header, and see to it that all is on the disk."""
        self.handle.seek(0)
        self._header()
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()


@dataclass
class _Part:
    """What was written of a part, and the shard that grows."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, _File] = field(default_factory=dict)
    histogram: Tensor = field(
        default_factory=lambda: torch.zeros(256, dtype=torch.int64, device="cpu")
    )
    labels: int = 0  # the largest label and 1


class ShardWriter:
    """Writes a shard folder, in bounded memory:

        with ShardWriter(folder, "mnist", (1, 28, 28), torch.uint8, names) as writer:
            writer.add("train", images, labels)  # any number of times

    The manifest is written when the block ends without an error, and makes the folder a data set;
    after an error nothing is left, and what a killed process left is removed by the next try.
    Without `class_names` the classes are called by their numbers, up to the largest training label.
    Raises InputError: where the folder holds something, is written by another process, or cannot be
    written; where examples do not fit.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.uint8,
        class_names: tuple[str, ...] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.name, self.shape, self.dtype = Path(folder), name, tuple(shape), dtype
        self.class_names = class_names
        if dtype not in DTYPES.values():
            raise InputError(f"{folder}: examples are uint8 or float32, not {dtype}")
        size = math.prod(self.shape) * dtype.itemsize
        self.rows = max(1, shard_bytes // max(size, 1))  # of a shard
        self._parts: dict[str, _Part] = {}

    def __enter__(self) -> Self:
        with writing(f"--out {self.folder}"):
            if self.folder.is_file():
                raise InputError(f"--out {self.folder}: is a file; give a folder, new or empty")
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check()
            self._lock = FileLock(self.folder / UNFINISHED, timeout=0, thread_local=False)
            try:
                self._lock.acquire()
            except Timeout:
                raise InputError(
                    f"--out {self.folder}: another process is writing there; wait, or choose"
                    " another folder"
                ) from None
            except NotImplementedError:  # a file system without locks
                (self.folder / UNFINISHED).touch()
            try:
                self._check()  # again: who wrote here before may have come to the end
            except InputError:
                self._release()
                raise
            self._remove()
        return self

    def _check(self) -> None:
        """Raise InputError where the folder holds what is not left of an unfinished try."""
        names = [path.name for path in self.folder.iterdir()]
        ours = [n for n in names if FILE.fullmatch(n) or n.startswith(TEMPORARY)]
        if names and not (UNFINISHED in names and len(ours) == len(names)):
            raise InputError(f"--out {self.folder} holds {min(names)}; choose another folder")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(f"--out {self.folder}"):
                    self._finish()
        except BaseException:
            kind = InputError
            raise
        finally:
            if kind is not None:
                self._remove()
            self._release()
            if kind is not None and self._made:
                with suppress(OSError):
                    self.folder.rmdir()

    def add(self, part: str, images: Tensor, labels: Tensor) -> None:
        """Append images (n, *shape) of the writer's type and labels (n,), whole numbers from 0, to
        "train" or "test"."""
        if part not in PARTS:
            raise InputError(f"{self.folder}: a part is train or test, not {part!r}")
        if tuple(images.shape[1:]) != self.shape or images.dtype != self.dtype:
            raise InputError(
                f"{self.folder}: {part} examples are {images.dtype} of shape"
                f" {tuple(images.shape[1:])}, not {self.dtype} of {self.shape}"
            )
        if images.is_floating_point() and not images.isfinite().all():
            raise InputError(f"{self.folder}: a {part} example holds a number that is not finite")
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise InputError(
                f"{self.folder}: {len(images)} {part} examples have {labels.dtype} labels of shape"
                f" {tuple(labels.shape)}"
            )
        if not len(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (self.class_names and high >= len(self.class_names)):
            wrong = low if low < 0 else high
            of = f" of {len(self.class_names)} classes" if self.class_names else ""
            raise InputError(f"{self.folder}: label {wrong} of a {part} example is none{of}")
        own = self._parts.setdefault(part, _Part())
        own.labels = max(own.labels, high + 1)
        with writing(f"--out {self.folder}"):
            start = 0
            while start < len(images):
                if not own.files:
                    self._open(part, own)
                count = min(len(images) - start, self.rows - own.files["images"].count)
                piece = images[start : start + count].cpu().contiguous()
                if self.dtype == torch.uint8:
                    own.histogram += piece.flatten().bincount(minlength=256)
                own.files["images"].write(piece.numpy())
                own.files["labels"].write(labels[start : start + count].cpu().numpy())
                if own.files["images"].count == self.rows:
                    self._close(own)
                start += count

    def _open(self, part: str, own: _Part) -> None:
        images = np.dtype(str(self.dtype).removeprefix("torch.")).newbyteorder("<")
        for kind, dtype, shape in (
            ("images", images, self.shape),
            ("labels", np.dtype("<i8"), ()),
        ):
            path = self.folder / file_name(part, len(own.shards), kind)
            own.files[kind] = _File(path, dtype, shape)

    def _close(self, own: _Part) -> None:
        for file in own.files.values():
            file.close()
        shard: dict[str, Any] = {kind: file.path.name for kind, file in own.files.items()}
        shard["count"] = own.files["images"].count
        shard["crc32"] = {kind: file.crc for kind, file in own.files.items()}
        own.shards.append(shard)
        own.files = {}

    def _finish(self) -> None:
        """Close the files and write the manifest."""
        for own in self._parts.values():
            if own.files:
                self._close(own)
        if not self._parts:
            raise InputError(f"--out {self.folder}: there are no examples to write")
        names = self.class_names
        if names is None:
            known = self._parts.get("train") or self._parts["test"]
            names = tuple(map(str, range(known.labels)))
        parts = {}
        for part in (part for part in PARTS if part in self._parts):
            own = self._parts[part]
            if own.labels > len(names):
                raise InputError(
                    f"--out {self.folder}: label {own.labels - 1} of a {part} example is none of"
                    f" the {len(names)} classes of the training examples"
                )
            described = {"count": sum(shard["count"] for shard in own.shards), "shards": own.shards}
            if self.dtype == torch.uint8:
                described["histogram"] = own.histogram.tolist()
            parts[part] = described
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "class_names": list(names),
            "parts": parts,
        }
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _release(self) -> None:
        self._lock.release()
        with suppress(OSError):
            (self.folder / UNFINISHED).unlink()

    def _remove(self) -> None:
        """Remove what was written so far."""
        for own in self._parts.values():
            for file in own.files.values():
                with suppress(OSError):
                    file.handle.close()
        for path in self.folder.iterdir():
            written = FILE.fullmatch(path.name) or path.name.startswith(TEMPORARY)
            if written and path.name != UNFINISHED:
                with suppress(OSError):
                    path.unlink()
