"""CSV files of numbers: one example per line, a header or none; and idx or CSV told by content.

A file that was read once is kept in the user's cache under the hash of its contents, with a
checksum of the numbers.

Shapes: N examples, M columns.
"""

import csv
import gzip
import hashlib
import itertools
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, note
from ..files import cache_folder, replacing
from .columns import INDEX, Asked, is_header, is_number
from .idx import GZIP, as_images, has_channels_last, read_idx
from .limits import file_size, most_bytes

FLOAT32_MAX = float(np.finfo(np.float32).max)
LONGEST = 2**26  # characters of a line: more is no line of numbers, but memory without end
CACHED = 2**20  # bytes: smaller files are read as fast as their cache
TYPES = (np.uint8, np.float32)  # of numbers in text; the first is read nine times as fast
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error)


def read_examples(path: Path | str) -> Tensor:
    """The examples in an idx file (N, H, W) or a CSV file (N, M), plain or .gz, told by content.

    Raises InputError when it is neither, damaged, or holds what is no finite float32.
    """
    path = Path(path)
    found = idx_examples(path)
    return open_table(path).values if found is None else found


def idx_examples(path: Path | str) -> Tensor | None:
    """The examples in an idx file (N, H, W) or (N, C, H, W), plain or .gz; None where its content
    is not idx, but may be a table.

    Raises InputError when it is damaged, or holds what is no finite float32.
    """
    path = Path(path)
    try:
        file_size(path)
        with path.open("rb") as file:
            start = file.read(2)
        if start == GZIP:
            with gzip.open(path) as packed:
                start = packed.read(2)
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read: {_reason(error)}") from None
    if start != b"\0\0":
        return None
    images = read_idx(path)
    if images.dim() < 2 or not images.numel():
        raise InputError(
            f"{path}: holds no examples of one or more values each: its shape is"
            f" {tuple(images.shape)}"
        )
    if images.is_floating_point():
        wrong = (~(images.abs() <= FLOAT32_MAX)).flatten(1).any(1).nonzero()
        if len(wrong):
            raise InputError(f"{path}: example {int(wrong[0])} holds a value that is not finite")
    return as_images(images) if has_channels_last(images.shape) else images


@dataclass(frozen=True)
class Layout:
    """The first line of a CSV file: the names of its columns (None: it is an example), how many
    columns there are, and whether a column of row names stands before them, which is not read."""

    header: list[str] | None
    columns: int
    row_names: bool = False


@dataclass(frozen=True)
class Table:
    """The numbers of a CSV file, `values` (N, M), in its order of columns; `header` are its M names
    or None."""

    values: Tensor
    layout: Layout

    @property
    def header(self) -> list[str] | None:
        return self.layout.header


def open_table(path: Path | str, asked: Asked = Asked()) -> Table:  # noqa: B008
    """The numbers of a CSV file: uint8 where all are whole numbers from 0 to 255, as pixels are,
    else float32. Raises InputError with the line and the column of what is no finite number, or of
    a line of another length, and where it is in doubt whether the first line is a header."""
    path = Path(path)
    layout = _layout(path, asked)
    return Table(torch.from_numpy(_values(path, layout)), layout)


def read_table(path: Path | str) -> tuple[Tensor, list[str] | None]:
    """The numbers of a CSV file (N, M) and its header, if any, as `open_table` reads them."""
    path = Path(path)
    table = open_table(path)
    return table.values, table.header


def read_blocks(path: Path, most: int, asked: Asked) -> tuple[Layout, Iterator[Tensor]]:
    """What `open_table` reads, some lines at a time, about `most` numbers: of uint8 or of float32,
    as each allows. The file may be larger than memory."""
    layout = _layout(path, asked)
    return layout, _blocks(path, layout, max(1, most // layout.columns))


def place(path: Path, layout: Layout, column: int, example: int) -> str:
    """The line and column in the file of an example's value."""
    lines = itertools.islice(_lines(path), int(layout.header is not None), None)
    number, _ = next(itertools.islice(lines, example, None))
    return f"line {number}, column {column + 1 + layout.row_names}"


def _layout(path: Path, asked: Asked) -> Layout:
    """Told by the first two lines."""
    try:
        lines = [_fields(line) for _, line in itertools.islice(_lines(path), 2)]
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as text: {_reason(error)}") from None
    names, second = lines[0] if lines else [""], lines[1] if len(lines) > 1 else []
    if not is_header(names, second, asked, path):
        return Layout(None, len(names))
    if len(second) == len(names) + 1:  # as R writes a table with row names
        names = ["", *names]
    elif asked.header != "yes" and all(map(is_number, names)):
        note(f"{path}: its first line holds column numbers; it is taken for a header")
    text = len(names) > 1 and names[0].lower() in INDEX and second and not is_number(second[0])
    if text:
        note(f"{path}: column 1 ({names[0]!r}) holds row names; it is left out")
        return Layout(names[1:], len(names) - 1, True)
    return Layout(names, len(names))


def _blocks(path: Path, layout: Layout, rows: int) -> Iterator[Tensor]:
    """The numbers below the header, so many rows at a time; InputError as `_parse` raises it."""
    try:
        lines = _below((line for _, line in _lines(path)), layout)
        found = False
        while some := list(itertools.islice(lines, rows)):
            values = _numbers(some, layout.columns)
            if values is None:
                break
            found = True
            yield torch.from_numpy(values)
        if found and not some:
            return
    except UNREADABLE:
        pass
    raise InputError(f"{path}: {_fault(path, layout)}")


def _numbers(lines: list[str], columns: int) -> np.ndarray | None:
    """Some lines as numbers, of the first type that takes them; None where none does."""
    for dtype in TYPES:
        with suppress(ValueError, Warning):
            values = _load(lines, dtype)
            if values.shape[1] == columns and (dtype is np.uint8 or np.isfinite(values).all()):
                return values
    return None


def _below(lines: Iterator[str], layout: Layout) -> Iterator[str]:
    """The lines of numbers: without the header and without row names."""
    if layout.header is not None:
        next(lines, None)
    return (_ROW_NAME.sub("", line, count=1) for line in lines) if layout.row_names else lines


_ROW_NAME = re.compile(r'\s*("[^"]*"|[^,]*),')


def _values(path: Path, layout: Layout) -> np.ndarray:
    """The numbers below the header, from the cache where they are in it."""
    cached = _cached(path, layout)
    if cached:
        with suppress(OSError, ValueError, EOFError), cached.open("rb") as file:
            values = np.load(file, allow_pickle=False)
            known = values.ndim == 2 and values.dtype in (np.uint8, np.float32)
            if known and file.read() == _checksum(values):
                return values
    values = _parse(path, layout)
    if cached:
        with suppress(OSError), replacing(cached) as temporary, temporary.open("wb") as file:
            np.save(file, values)
            file.write(_checksum(values))
    return values


def _checksum(values: np.ndarray) -> bytes:
    start = zlib.crc32(f"{values.dtype} {values.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(values).data, start).to_bytes(4, "little")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    return getattr(error, "strerror", None) or str(error)


def _cached(path: Path, layout: Layout) -> Path | None:
    """Where the decoded contents of a large file belong."""
    try:
        if path.stat().st_size < CACHED:
            return None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    kind = f"{int(layout.header is not None)}{int(layout.row_names)}"  # what is left out of it
    return cache_folder() / "decoded" / f"{digest}-{kind}.npy"


def _parse(path: Path, layout: Layout) -> np.ndarray:
    """The numbers below the header; InputError with the place of the first that is none."""
    for dtype in TYPES:
        try:
            rows = _rows(path, np.dtype(dtype).itemsize)
            values = _load(_below(rows, layout), dtype)
        except InputError:
            raise
        except (ValueError, Warning, *UNREADABLE):
            continue
        if values.shape[1] != layout.columns:
            continue
        if values.size and (dtype is np.uint8 or np.isfinite(values).all()):
            return values
    raise InputError(f"{path}: {_fault(path, layout)}")


def _load(lines: Iterable[str], dtype: type) -> np.ndarray:
    with warnings.catch_warnings():
        # An integer read through a float, and an empty file, are warnings only.
        warnings.simplefilter("error")
        return np.loadtxt(lines, dtype, delimiter=",", ndmin=2, comments=None, quotechar='"')


def _rows(path: Path, itemsize: int) -> Iterator[str]:
    """The lines that are not blank, as long as their numbers fit into memory: a packed file can be
    a thousand times as large as it looks."""
    cells, most = 0, most_bytes() // itemsize
    for _, line in _lines(path):
        cells += line.count(",") + 1
        if cells > most:
            raise InputError(f"{path}: its numbers take more than half of the memory here")
        yield line


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number in the file."""
    file_size(path)
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    opener = gzip.open if packed else open
    with opener(path, "rt", encoding="utf-8-sig", newline=None) as text:
        for number, line in enumerate(iter(lambda: text.readline(LONGEST), ""), 1):
            if len(line) == LONGEST:
                raise InputError(f"{path}: line {number}: is too long to be a line of numbers")
            if not line.isspace():
                yield number, line


def _fields(line: str) -> list[str]:
    if '"' in line:
        with suppress(csv.Error, StopIteration):
            return [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]
    return [field.strip() for field in line.split(",")]


def _is_finite(text: str) -> bool:
    return is_number(text) and bool(abs(float(text)) <= FLOAT32_MAX)


def _no_number(field: str) -> str:
    if any(_is_finite(part) for part in re.split(r"[;\t ]", field)):
        return "is not one number; separate the columns by commas"
    return "is not a finite number"


def _fault(path: Path, layout: Layout) -> str:
    """The first fault of a file that could not be read as numbers, and its place."""
    before = int(layout.row_names)
    columns = layout.columns + before
    examples = -1 if layout.header is not None else 0
    try:
        for number, line in _lines(path):
            fields = _fields(line)
            short = before and examples < 0 and len(fields) == columns - 1  # R's header
            if len(fields) != columns and not short:
                return f"line {number}: has {len(fields)} columns, the first line has {columns}"
            for column, field in enumerate(fields[before:] if examples >= 0 else (), 1 + before):
                if not _is_finite(field):
                    return f"line {number}, column {column}: {_no_value(field, column, columns)}"
            examples += 1
    except UNREADABLE as error:
        return f"cannot be read as text: {_reason(error)}"
    return "cannot be read as numbers" if examples > 0 else "holds no examples"


def _no_value(field: str, column: int, columns: int) -> str:
    if not field:
        return "a value is missing; fill it in, or leave the line out"
    is_label = field.replace("-", "").replace(" ", "").isalpha() and column in (1, columns)
    hint = "; a label is a whole number from 0" if is_label else ""
    return f"{field[:40]!r} {_no_number(field)}{hint}"
