"""CSV files of numbers: one example per line, a header or none; and idx or CSV told by content.

A file that was read once is kept in the user's cache under the hash of its contents.

Shapes: N examples, M columns.
"""

import gzip
import hashlib
import itertools
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import cache_folder, replacing
from .idx import GZIP, read_idx
from .limits import file_size, most_bytes

FLOAT32_MAX = float(np.finfo(np.float32).max)
LONGEST = 2**26  # characters of a line: more is no line of numbers, but memory without end
CACHED = 2**20  # bytes: smaller files are read as fast as their cache
TYPES = (np.uint8, np.float32)  # of numbers in text; the first is read nine times as fast
# A column of one of these names is moved to the front.
LABELS = ("label", "class", "target", "prediction")
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error)


def read_examples(path: Path) -> Tensor:
    """The examples in an idx file (N, H, W) or a CSV file (N, M), plain or .gz, told by content.

    Raises InputError when it is neither, damaged, or holds what is no finite float32.
    """
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
        return read_table(path)[0]
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
    return images


def read_table(path: Path) -> tuple[Tensor, list[str] | None]:
    """The numbers of a CSV file (N, M), and its header if it has one.

    A header is a first line of names alone, or of a name and column numbers: a typing error in the
    first example must not make it one. A column that the header calls label, class, target or
    prediction comes first, wherever it stands in the file.

    uint8 where all are whole numbers from 0 to 255, as pixels are, else float32. Raises InputError
    with the line and the column of what is no finite number, or of a line of another length.
    """
    _, header = _first_line(path)
    values = torch.from_numpy(_values(path, header))
    if header and (own := _label_column(header)):
        order = [own, *(i for i in range(len(header)) if i != own)]
        return values[:, order], [header[i] for i in order]
    return values, header


def read_blocks(path: Path, most: int) -> tuple[list[str] | None, Iterator[Tensor]]:
    """What `read_table` reads, some lines at a time, about `most` numbers: of uint8 or of float32,
    as each allows. The file may be larger than memory."""
    names, header = _first_line(path)
    own = _label_column(header) if header else 0
    order = [own, *(i for i in range(len(names)) if i != own)]
    blocks = _blocks(path, header, len(names), max(1, most // len(names)))
    if not own:
        return header, blocks
    return [names[i] for i in order], (block[:, order] for block in blocks)


def _first_line(path: Path) -> tuple[list[str], list[str] | None]:
    """The fields of the first line, and the header that they are, if they are one."""
    try:
        _, first = next(_lines(path), (0, ""))
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as text: {_reason(error)}") from None
    names = _fields(first)
    return names, names if _is_header(names) else None


def _blocks(path: Path, header: list[str] | None, columns: int, rows: int) -> Iterator[Tensor]:
    """The numbers below the header, so many rows at a time; InputError as `_parse` raises it."""
    try:
        lines = (line for _, line in _lines(path))
        if header:
            next(lines)
        found = False
        while some := list(itertools.islice(lines, rows)):
            values = _numbers(some, columns)
            if values is None:
                break
            found = True
            yield torch.from_numpy(values)
        if found and not some:
            return
    except UNREADABLE:
        pass
    raise InputError(f"{path}: {_fault(path, header)}")


def _numbers(lines: list[str], columns: int) -> np.ndarray | None:
    """Some lines as numbers, of the first type that takes them; None where none does."""
    for dtype in TYPES:
        with suppress(ValueError, Warning):
            values = _load(lines, dtype)
            if values.shape[1] == columns and (dtype is np.uint8 or np.isfinite(values).all()):
                return values
    return None


def place_of_label(path: Path, example: int) -> str:
    """The line and column in the file of an example's label."""
    lines = _lines(path)
    number, first = next(lines)
    names = _fields(first)
    numbers = [] if _is_header(names) else [number]
    numbers += [number for number, _ in itertools.islice(lines, example + 1)]
    column = _label_column(names) + 1 if _is_header(names) else 1
    return f"line {numbers[example]}, column {column}"


def _label_column(header: list[str]) -> int:
    """Which column holds the labels: that which is called so, else the first."""
    own = [i for i, name in enumerate(header) if name.lower() in LABELS]
    return own[0] if len(own) == 1 else 0


def _values(path: Path, header: list[str] | None) -> np.ndarray:
    """The numbers below the header, from the cache where they are in it."""
    cached = _cached(path)
    if cached:
        with suppress(OSError, ValueError, EOFError):
            values = np.load(cached, allow_pickle=False)
            if values.ndim == 2 and values.dtype in (np.uint8, np.float32):
                return values
    values = _parse(path, header)
    if cached:
        with suppress(OSError), replacing(cached) as temporary:
            np.save(temporary, values)
    return values


def _reason(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    return getattr(error, "strerror", None) or str(error)


def _cached(path: Path) -> Path | None:
    """Where the decoded contents of a large file belong."""
    try:
        if path.stat().st_size < CACHED:
            return None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    return cache_folder() / "decoded" / f"{digest}.npy"


def _parse(path: Path, header: list[str] | None) -> np.ndarray:
    """The numbers below the header; InputError with the place of the first that is none."""
    for dtype in TYPES:
        try:
            rows = _rows(path, np.dtype(dtype).itemsize)
            if header:
                next(rows)
            values = _load(rows, dtype)
        except InputError:
            raise
        except (ValueError, Warning, *UNREADABLE):
            continue
        if header and values.shape[1] != len(header):
            continue
        if values.size and (dtype is np.uint8 or np.isfinite(values).all()):
            return values
    raise InputError(f"{path}: {_fault(path, header)}")


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
    fields = [field.strip() for field in line.split(",")]
    return [f[1:-1] if len(f) > 1 and f[0] == f[-1] == '"' else f for f in fields]


def _is_header(names: list[str]) -> bool:
    if not any(map(_is_number, names)):
        return names != [""]
    counted = [str(i) for i in range(len(names))]
    return not _is_number(names[0]) and names[1:] in (counted[1:], counted[:-1])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text  # which Python reads, and numpy does not


def _is_finite(text: str) -> bool:
    return _is_number(text) and bool(abs(float(text)) <= FLOAT32_MAX)


def _no_number(field: str) -> str:
    if any(_is_finite(part) for part in re.split(r"[;\t ]", field)):
        return "is not one number; separate the columns by commas"
    return "is not a finite number"


def _fault(path: Path, header: list[str] | None) -> str:
    """What is wrong with a file that could not be read, and where."""
    columns = len(header) if header else 0
    examples = -1 if header else 0
    try:
        for number, line in _lines(path):
            fields = _fields(line)
            columns = columns or len(fields)
            if len(fields) != columns:
                return f"line {number}: has {len(fields)} columns, the first line has {columns}"
            for column, field in enumerate(fields if examples >= 0 else (), 1):
                if not _is_finite(field):
                    label = field.isalpha() and column in (1, columns)
                    hint = "; a label is a whole number from 0" if label else ""
                    what = f"{field[:40]!r} {_no_number(field)}{hint}"
                    return f"line {number}, column {column}: {what}"
            examples += 1
    except UNREADABLE as error:
        return f"cannot be read as text: {_reason(error)}"
    return "cannot be read as numbers" if examples > 0 else "holds no examples"
