"""The examples of a shard folder, read when they are asked for.

Shapes: N samples, n of one shard.
"""

import hashlib
import json
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .limits import file_size, most_bytes
from .shards import DTYPES, FORMAT, MANIFEST, PARTS, VERSION

LARGEST = 2**26  # bytes of a manifest
SPAN = 2**22  # bytes that are read at once where some of them are wanted
GAP = 2**15  # bytes that are read rather than left out


@dataclass(frozen=True)
class Shard:
    """An .npy file of `count` rows that begin at byte `offset`; `crc32` is that of the values."""

    path: Path
    count: int
    offset: int
    crc32: int


@dataclass(frozen=True)
class Rows:
    """Raw examples (N, ...) in files. Slices and tensors of indices read them into memory; `select`
    and `first` only choose. All may be called by several threads.

    `rows` are those chosen of all in the files, None for all of them; `counts` how often each of
    256 bytes is in the files, None where it is unknown.
    """

    files: tuple[Shard, ...]
    example: torch.Size
    dtype: torch.dtype
    count: int
    rows: Tensor | None = None
    counts: Tensor | None = None

    def __len__(self) -> int:
        return self.count if self.rows is None else len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.example))

    @property
    def row_bytes(self) -> int:
        return self.example.numel() * self.dtype.itemsize

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def select(self, index: Tensor) -> "Rows":
        """The rows `index` (n,), not yet read."""
        return replace(self, rows=index if self.rows is None else self.rows[index])

    def left_out(self) -> "Rows":
        """Those that are not chosen."""
        left = torch.full((self.count,), self.rows is not None, device="cpu")
        if self.rows is not None:
            left[self.rows] = False
        return replace(self, rows=left.nonzero().flatten())

    def first(self, count: int) -> "Rows":
        """The first so many, not yet read."""
        if self.rows is None:
            return replace(self, count=count, counts=self.counts if count == self.count else None)
        return replace(self, rows=self.rows[:count])

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Those rows, read. Raises InputError where a file cannot be read."""
        length = len(range(*index.indices(len(self)))) if isinstance(index, slice) else len(index)
        with torch.inference_mode(False):
            out = torch.empty((length, *self.example), dtype=self.dtype, device="cpu")
        self.read(index, out)
        return out

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.split(max(1, SPAN // self.row_bytes)):
            yield from part

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def read(self, index: slice | Tensor, out: Tensor) -> None:
        """Write rows to `out` (n, ...), which lies together in memory."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if self.rows is None and step == 1:
                self.read_ranges([(start, stop, 0)], out)
                return
            index = torch.arange(start, stop, step, device="cpu")
        rows = index if self.rows is None else self.rows[index]
        if not len(rows):
            return
        ascending, order = rows.sort()
        # Spans that are read at once: without large gaps, and of limited length.
        span, gap = max(1, SPAN // self.row_bytes), max(1, GAP // self.row_bytes)
        cut = (ascending.diff() > gap) | ((ascending // span).diff() > 0)
        edges = [0, *(cut.nonzero().flatten() + 1).tolist(), len(rows)]
        ends = zip(edges, edges[1:], ascending[edges[:-1]].tolist(), strict=False)
        for begin, end, low in ends:
            high = int(ascending[end - 1]) + 1
            room = torch.empty((high - low, *self.example), dtype=self.dtype, device="cpu")
            self.read_ranges([(low, high, 0)], room)
            out[order[begin:end]] = room[ascending[begin:end] - low]

    def read_ranges(self, ranges: Iterable[tuple[int, int, int]], out: Tensor) -> None:
        """Write rows of the files, chosen or not, to `out`: of each of the ranges, in ascending
        order, those from the first number to before the second, to `out` from the third on."""
        view, size = out.numpy().reshape(-1).view(np.uint8).data, self.row_bytes
        files, shard, file, first, end = iter(self.files), None, None, 0, 0
        try:
            for start, stop, place in ranges:
                while start < stop:
                    while start >= end:
                        shard, first = next(files), end
                        end += shard.count
                        if file is not None:
                            file.close()
                            file = None
                    assert shard is not None
                    file = file or _open(shard)
                    last = min(stop, end)
                    part = view[place * size : (place + last - start) * size]
                    _read(shard, file, (start - first) * size, part)
                    start, place = last, place + last - start
        finally:
            if file is not None:
                file.close()

    def digest(self) -> str:
        """What says which examples these are: their type, shape and checksums."""
        chosen = "" if self.rows is None else hashlib.sha256(self.rows.numpy().data).hexdigest()
        sums = [(shard.count, shard.crc32) for shard in self.files]
        return f"{self.dtype} {tuple(self.shape)} {sums} {chosen}"


def _open(shard: Shard) -> FileIO:
    try:
        return FileIO(shard.path)
    except OSError as error:
        raise InputError(f"{shard.path}: cannot be read: {error.strerror or error}") from None


def _read(shard: Shard, file: FileIO, offset: int, out: memoryview) -> None:
    """Bytes of a shard's values from `offset`."""
    try:
        file.seek(shard.offset + offset)
        while len(out):
            count = file.readinto(out)
            if not count:
                raise InputError(f"{shard.path}: truncated: it is shorter than it was")
            out = out[count:]
    except OSError as error:
        raise InputError(f"{shard.path}: cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class Shards:
    """An opened shard folder: the examples of each part, and their labels (N,) int64."""

    folder: Path
    name: str
    class_names: tuple[str, ...]
    images: dict[str, Rows]
    labels: dict[str, Tensor]


def open_shards(folder: Path | str, parts: tuple[str, ...] = PARTS) -> Shards:
    """Read the manifest and the labels of those of the `parts` that are there, and see that the
    files are as long as it says. Raises InputError."""
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    images, labels = {}, {}
    for part in (part for part in parts if part in manifest["parts"]):
        rows, images[part] = _open_part(folder, manifest, part)
        if 8 * rows.count > most_bytes():
            raise InputError(f"{folder}: {rows.count} labels take more than half of the memory")
        try:
            found = torch.from_numpy(_labels(rows))
        except MemoryError:
            raise InputError(f"{folder}: {rows.count} labels do not fit into memory") from None
        wrong = ((found < 0) | (found >= len(manifest["class_names"]))).nonzero()
        if len(wrong):
            raise InputError(
                f"{folder}: label {int(found[wrong[0]])} of {part} example {int(wrong[0])} is"
                f" outside the {len(manifest['class_names'])} classes of {MANIFEST}"
            )
        labels[part] = found
    return Shards(folder, manifest["name"], tuple(manifest["class_names"]), images, labels)


def verify_shards(folder: Path | str) -> Iterator[tuple[str, int]]:
    """Read all files of a shard folder against their checksums: after each its name and bytes.

    Raises InputError with the first that is damaged.
    """
    folder = Path(folder)
    open_shards(folder)
    manifest = _read_manifest(folder / MANIFEST)
    for part in manifest["parts"]:
        for rows in _open_part(folder, manifest, part):
            counts = torch.zeros(256, dtype=torch.int64, device="cpu")
            for shard in rows.files:
                crc, size = 0, shard.count * rows.row_bytes
                with _open(shard) as file:
                    for start in range(0, size, SPAN):
                        piece = np.empty(min(SPAN, size - start), np.uint8)
                        _read(shard, file, start, piece.data)
                        crc = zlib.crc32(piece.data, crc)
                        if rows.counts is not None:
                            counts += torch.from_numpy(piece).bincount(minlength=256)
                if crc != shard.crc32:
                    raise InputError(
                        f"{shard.path}: damaged: its checksum is {crc}, {MANIFEST} says"
                        f" {shard.crc32}"
                    )
                yield shard.path.name, size
            if rows.counts is not None and not counts.equal(rows.counts):
                raise InputError(f"{folder / MANIFEST}: the histogram of {part} is not its files'")


def _labels(rows: Rows) -> np.ndarray:
    """All labels of a part, as int64."""
    labels, start = np.empty(len(rows), np.int64), 0
    for shard in rows.files:
        own = np.empty(shard.count, str(rows.dtype).removeprefix("torch."))
        with _open(shard) as file:
            _read(shard, file, 0, own.view(np.uint8).data)
        labels[start : start + shard.count] = own
        start += shard.count
    return labels


def _open_part(folder: Path, manifest: dict[str, Any], part: str) -> tuple[Rows, Rows]:
    """The labels and the examples of a part."""
    described = manifest["parts"][part]
    shape, dtype = tuple(manifest["shape"]), DTYPES[manifest["dtype"]]
    counts = described.get("histogram")
    found = []
    for kind, example in (("labels", ()), ("images", shape)):
        shards, dtypes = [], set()
        for shard in described["shards"]:
            path = folder / shard[kind]
            own, offset = _check_file(path, shard["count"], example)
            if own != dtype if kind == "images" else own.is_floating_point:
                raise InputError(f"{path}: holds {own}, not {kind} of {MANIFEST}'s data set")
            dtypes.add(own)
            shards.append(Shard(path, shard["count"], offset, shard["crc32"][kind]))
        if len(dtypes) > 1:
            raise InputError(
                f"{folder}: {part} labels of different types: {sorted(map(str, dtypes))}"
            )
        rows = Rows(tuple(shards), torch.Size(example), dtypes.pop(), described["count"])
        found.append(rows)
    if counts is not None:
        found[1] = replace(found[1], counts=torch.tensor(counts, device="cpu"))
    return found[0], found[1]


def _check_file(path: Path, count: int, example: tuple[int, ...]) -> tuple[torch.dtype, int]:
    """The type of an .npy file's values, and where they begin; InputError unless it is as long as
    `count` examples."""
    try:
        size = file_size(path)
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("error")  # of a header that looks as if by Python 2
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except Exception as error:  # whatever Python's parser says, which numpy gives the header to
        raise InputError(f"{path}: not an .npy file ({error})") from None
    known = {"<f4": torch.float32, "<i8": torch.int64, "<i4": torch.int32, "<i2": torch.int16}
    known |= {"|u1": torch.uint8, "|i1": torch.int8}
    if dtype.str not in known or fortran:
        raise InputError(f"{path}: holds {dtype.str} values, which are not read here")
    if shape != (count, *example):
        raise InputError(f"{path}: its shape is {shape}, {MANIFEST} says {(count, *example)}")
    needed = offset + dtype.itemsize * math.prod(shape)
    if size != needed:
        what = "truncated" if size < needed else "too long"
        raise InputError(f"{path}: {what}: {needed} bytes are needed, there are {size}")
    return known[dtype.str], offset


def _not_shards(folder: Path) -> str:
    """What a path without a manifest is."""
    if any(folder.glob("*-images.npy")):
        what = f"a shard folder without its {MANIFEST}, interrupted or incomplete"
        return f"{folder} is {what}; make it again"
    what = f"has no {MANIFEST}" if folder.is_dir() else "is not a folder"
    return f"{folder} {what}; give one made by `data convert` or `data generate`"


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose every value is of the type and in the range that is needed."""
    try:
        if file_size(path) > LARGEST:
            raise InputError(f"{path}: is too long to be a manifest")
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_not_shards(path.parent)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: is no manifest of a shard folder")
    if manifest.get("version") != VERSION:
        raise InputError(f"{path}: is of version {manifest.get('version')!r}, not {VERSION}")
    if fault := _fault(manifest):
        raise InputError(f"{path}: {fault}")
    return manifest


def _fault(manifest: dict[str, Any]) -> str:
    """What is wrong with a manifest; empty where nothing is."""
    names, shape, parts = (manifest.get(key) for key in ("class_names", "shape", "parts"))
    if not _is_name(manifest.get("name")):
        return "name is no short text"
    if not isinstance(shape, list) or len(shape) not in (1, 3) or not all(map(_is_count, shape)):
        return "shape is not [C, H, W] or [D]"
    if manifest.get("dtype") not in tuple(DTYPES) or math.prod(shape) > 2**31:
        return "dtype is not uint8 or float32, or an example too large"
    if not isinstance(names, list) or not names or not all(map(_is_name, names)):
        return "class_names is no list of short texts"
    if not isinstance(parts, dict) or not parts or not set(parts) <= set(PARTS):
        return "parts are not train and test"
    used: set[str] = set()
    for part, described in parts.items():
        if not isinstance(described, dict) or not isinstance(described.get("shards"), list):
            return f"{part} has no list of shards"
        total = 0
        for i, shard in enumerate(described["shards"]):
            at = f"shard {i} of {part}"
            if not isinstance(shard, dict) or not _is_count(shard.get("count")):
                return f"{at} has no count"
            files = [shard.get(kind) for kind in ("images", "labels")]
            for file in files:
                if file is None or not _is_file(file) or file in used:
                    return f"{at}: {file!r} is no name of a file of its own in the folder"
                used.add(file)
            sums = shard.get("crc32")
            if not isinstance(sums, dict) or not all(
                type(sums.get(kind)) is int and 0 <= sums[kind] < 2**32
                for kind in ("images", "labels")
            ):
                return f"{at} has no crc32 of its files"
            total += shard["count"]
        if not total or described.get("count") != total or type(described["count"]) is not int:
            return f"the count of {part} is not that of its shards, {total}"
        counts = described.get("histogram")
        if counts is None:
            continue
        if manifest["dtype"] != "uint8" or not isinstance(counts, list) or len(counts) != 256:
            return f"the histogram of {part} is not 256 counts of bytes"
        right = all(type(x) is int and 0 <= x < 2**62 for x in counts)
        if not right or sum(counts) != total * math.prod(shape):
            return f"the histogram of {part} does not count its values"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**48


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200


def _is_file(value: Any) -> bool:
    return (
        _is_name(value)
        and value.isprintable()
        and not set(value) & set("/\\:")
        and value not in (".", "..", MANIFEST)
    )
