"""The idx format of MNIST: two zero bytes, a type, how many dimensions, big-endian sizes, values.

A `.gz` file is decoded once: its contents are kept in the user's cache under the md5 of the packed
file, and taken from there only while they match the checksum that the packed file ends with.
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import cache_folder, replacing
from .limits import file_size, most_bytes

GZIP = b"\x1f\x8b"
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
LARGEST = 2**36  # bytes; what a header may ask for before anything is read
HEADER, DIMENSIONS = 4 + 4 * 255, 8
EXPANSION = 1100  # deflate makes at most 1032 bytes of one (zlib, "Technical Details")


def read_idx(path: Path | str, md5: str | None = None) -> Tensor:
    """The array in an idx file, plain or `.gz`, in its own type.

    `md5` is that of the file as it lies on disk. Raises InputError when the file is missing,
    truncated, no idx file, or has another md5.
    """
    path = Path(path)
    try:
        size = file_size(path)
        with path.open("rb") as file:
            start = np.frombuffer(file.read(HEADER), np.uint8)
        if start[:2].tobytes() != GZIP and not md5:
            _check_length(*_size(start, path), size, path)  # before a file of any size is read
        packed = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    zipped = packed[:2].tobytes() == GZIP
    digest = hashlib.md5(packed.data, usedforsecurity=False).hexdigest() if md5 or zipped else ""
    if md5 and digest != md5:
        raise _damaged(path, digest, md5)
    return _parse(_unpack(packed, digest, path) if zipped else packed, path)


def as_images(values: Tensor) -> Tensor:
    """Examples of an idx file: (N, H, W) as (N, 1, H, W), (N, H, W, C) with the channels last as
    (N, C, H, W), others as they are."""
    if values.dim() == 3:
        return values.unsqueeze(1)
    return values.permute(0, 3, 1, 2).contiguous() if has_channels_last(values.shape) else values


def has_channels_last(shape: Sequence[int]) -> bool:
    """Whether images (N, ...) have their 1, 3 or 4 channels as the last dimension: (N, H, W, C)."""
    return len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)


def _unpack(packed: np.ndarray, digest: str, path: Path) -> np.ndarray:
    """The contents of a gzip file, from the cache where it holds them intact."""
    cached = cache_folder() / "decoded" / f"{digest}.idx"
    # RFC 1952: the last 8 bytes are the CRC-32 and the length of the contents.
    checksum, length = struct.unpack("<II", packed[-8:].tobytes().rjust(8, b"\0"))
    with suppress(OSError):
        if cached.stat().st_size == length:
            contents = np.fromfile(cached, np.uint8)
            if zlib.crc32(contents.data) == checksum:
                return contents
    try:
        with gzip.open(path) as file:
            header = file.read(HEADER)
            size = _size(np.frombuffer(header, np.uint8), path)[2]
            if size > EXPANSION * len(packed):
                raise InputError(
                    f"{path}: truncated or damaged gzip file (its header asks for {size} bytes,"
                    f" more than {len(packed)} can be unpacked to)"
                )
            # One byte more than the header promises is enough to see that a file is too long.
            body = file.read(max(size + 1 - len(header), 0))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged gzip file ({error})") from None
    contents = np.frombuffer(bytearray(header + body), np.uint8)
    with suppress(OSError):  # a cache that cannot be written is no cache, and no error
        if zlib.crc32(contents.data) == checksum:
            with replacing(cached) as temporary:
                contents.tofile(temporary)
    return contents


class IdxFile:
    """An idx file, plain or `.gz`, that is read some examples at a time: it may be larger than
    memory. Raises InputError as `read_idx` does."""

    def __init__(self, path: Path, md5: str | None = None) -> None:
        self.path = path
        try:
            length = file_size(path)
            with path.open("rb") as file:
                self._zipped = file.read(2) == GZIP
                file.seek(0)
                digest = hashlib.file_digest(file, _md5).hexdigest() if md5 else None
            with self._open() as file:
                header = np.frombuffer(file.read(HEADER), np.uint8)
        except (OSError, EOFError, zlib.error) as error:
            raise self._unreadable(error) from None
        if digest != md5:
            raise _damaged(path, str(digest), str(md5))
        self.dtype, self.shape, size = _size(header, path, whole=False)
        if not self._zipped:
            _check_length(self.dtype, self.shape, size, length, path)

    def blocks(self, most: int) -> Iterator[Tensor]:
        """All examples in order, in the file's type, about `most` bytes at a time."""
        each = self.dtype.itemsize * math.prod(self.shape[1:])
        step = max(1, most // max(each, 1))
        try:
            with self._open() as file:
                file.read(4 + 4 * len(self.shape))
                for start in range(0, self.shape[0], step):
                    count = min(step, self.shape[0] - start)
                    contents = file.read(count * each)
                    if len(contents) < count * each:
                        raise EOFError(f"it ends after {start + len(contents) // each} examples")
                    values = np.frombuffer(contents, self.dtype).reshape(count, *self.shape[1:])
                    yield torch.from_numpy(values.astype(self.dtype.newbyteorder("=")))
                if file.read(1):
                    raise InputError(f"{self.path}: too long for its {_brief(self.shape)} values")
        except (OSError, EOFError, zlib.error) as error:
            raise self._unreadable(error) from None

    def _open(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path) if self._zipped else self.path.open("rb"))

    def _unreadable(self, error: Exception) -> InputError:
        if getattr(self, "_zipped", False):
            return InputError(f"{self.path}: truncated or damaged gzip file ({error})")
        return InputError(
            f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        )


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _damaged(path: Path, digest: str, md5: str) -> InputError:
    return InputError(
        f"{path}: md5 is {digest}, should be {md5}: the file is damaged; delete it and get it again"
    )


def _size(
    contents: np.ndarray, path: Path, whole: bool = True
) -> tuple[np.dtype, tuple[int, ...], int]:
    """The type, shape and total number of bytes that an idx header promises. Raises InputError
    where these are more than can be, and where the `whole` does not fit into memory."""
    magic = contents[:4].tobytes()
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or magic[3] == 0:
        raise InputError(f"{path}: not an idx file: it starts with {magic.hex(' ') or 'nothing'}")
    dimensions = magic[3]
    start = 4 + 4 * dimensions
    if len(contents) < start:
        raise InputError(f"{path}: truncated: its header of {start} bytes ends early")
    shape = struct.unpack(f">{dimensions}I", contents[4:start].tobytes())
    dtype = np.dtype(TYPES[magic[2]])
    asked = math.prod(n or 1 for n in shape) * dtype.itemsize
    if dimensions > DIMENSIONS or asked > (LARGEST if whole else 2**48):
        raise InputError(f"{path}: its header asks for {_brief(shape)} values; not an idx file")
    size = start + math.prod(shape) * dtype.itemsize
    if whole and size > most_bytes():
        raise InputError(f"{path}: needs {size} bytes, more than half of the memory here")
    return dtype, shape, size


def _check_length(
    dtype: np.dtype, shape: tuple[int, ...], size: int, length: int, path: Path
) -> None:
    """Raise InputError unless a file of `length` bytes is what its header promises."""
    if length != size:
        what = "truncated" if length < size else "too long"
        raise InputError(
            f"{path}: {what}: {_brief(shape)} values need {size} bytes"
            + (f", there are {length}" if length < size else "")
        )


def _brief(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[:DIMENSIONS])) + "x..." * (len(shape) > DIMENSIONS)


def _parse(contents: np.ndarray, path: Path) -> Tensor:
    dtype, shape, size = _size(contents, path)
    _check_length(dtype, shape, size, len(contents), path)
    values = contents[4 + 4 * len(shape) :].view(dtype).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("="), copy=False))
