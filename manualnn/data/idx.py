"""The idx format of MNIST: two zero bytes, a type, how many dimensions, big-endian sizes, values.

A `.gz` file is decoded once: its contents are kept in the user's cache under the md5 of the packed
file, and taken from there only while they match the checksum that the packed file ends with.
"""

import gzip
import hashlib
import math
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import cache_folder, replacing

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
LARGEST = 2**36  # bytes; what a header may ask for before anything is read


def read_idx(path: Path, md5: str | None = None) -> Tensor:
    """The array in an idx file, plain or `.gz`, in its own type.

    `md5` is that of the file as it lies on disk. Raises InputError when the file is missing,
    truncated, no idx file, or has another md5.
    """
    try:
        packed = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    zipped = packed[:2].tobytes() == b"\x1f\x8b"
    digest = hashlib.md5(packed.data, usedforsecurity=False).hexdigest() if md5 or zipped else ""
    if md5 and digest != md5:
        raise InputError(
            f"{path}: md5 is {digest}, should be {md5}: the file is damaged; delete it and get it"
            " again"
        )
    return _parse(_unpack(packed, digest, path) if zipped else packed, path)


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
            header = file.read(4 + 4 * 255)
            size = _size(np.frombuffer(header, np.uint8), path)[2]
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


def _size(contents: np.ndarray, path: Path) -> tuple[np.dtype, tuple[int, ...], int]:
    """The type, shape and total number of bytes that an idx header promises."""
    magic = contents[:4].tobytes()
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or magic[3] == 0:
        raise InputError(f"{path}: not an idx file: it starts with {magic.hex(' ') or 'nothing'}")
    dimensions = magic[3]
    start = 4 + 4 * dimensions
    if len(contents) < start:
        raise InputError(f"{path}: truncated: its header of {start} bytes ends early")
    shape = struct.unpack(f">{dimensions}I", contents[4:start].tobytes())
    dtype = np.dtype(TYPES[magic[2]])
    size = start + math.prod(shape) * dtype.itemsize
    if size > LARGEST:
        raise InputError(f"{path}: its header asks for {size} bytes; not an idx file")
    return dtype, shape, size


def _parse(contents: np.ndarray, path: Path) -> Tensor:
    dtype, shape, size = _size(contents, path)
    if len(contents) != size:
        what = "truncated" if len(contents) < size else "too long"
        raise InputError(
            f"{path}: {what}: {'x'.join(map(str, shape))} values need {size} bytes"
            + (f", there are {len(contents)}" if len(contents) < size else "")
        )
    values = contents[4 + 4 * len(shape) :].view(dtype).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("="), copy=False))
