"""The columns of a table: a header or none, an index, the label, the features.

A wrong guess here is a wrong answer later, so a guess is made only where it is certain; elsewhere
an error shows the first line and asks. Shapes: n examples looked at, M columns.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, hint

AUTO = "auto"
HEADERS = (AUTO, "yes", "no")
# Names of a label column, in lower case. The first few say it whatever else is in the table.
CERTAIN = ("label", "labels", "class", "classes", "target", "targets", "prediction", "predictions")
LIKELY = (
    *("y", "outcome", "species", "category", "diagnosis", "survived", "quality", "digit", "type"),
    *("classlabel", "class_label", "class_id", "classid", "label_id", "y_true", "truth", "result"),
)
INDEX = ("", "id", "index", "unnamed: 0", "rownames", "row_names", "row")
MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
BALANCED = 0.98  # a column of which more is one value is hardly a label


@dataclass(frozen=True)
class Asked:
    """The user's word on a table: `label` is "auto", "first", "last", a column's name or its number
    from 1; `header` is "auto", "yes" or "no". `trained` is the column, in the same words, that a
    network was trained with: it settles what the table leaves open."""

    label: str = AUTO
    header: str = AUTO
    trained: str = ""

    def __post_init__(self) -> None:
        if self.header not in HEADERS:
            raise InputError(f"--header {self.header}: use auto, yes or no")


@dataclass(frozen=True)
class Columns:
    """Places of a table's columns, counted from 0: the label (None: there is none), the features,
    and an index of the examples, which is neither. `name` is what a reader calls the label's."""

    label: int | None
    features: tuple[int, ...]
    name: str = ""
    index: int | None = None

    @property
    def order(self) -> list[int]:
        """The label, if there is one, then the features."""
        return [*([] if self.label is None else [self.label]), *self.features]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text  # which Python reads, and numpy does not


def is_header(names: list[str], second: list[str], asked: Asked, path: Path) -> bool:
    """Whether the first line holds names, the second being the next one's fields.

    It does where no field is a number, where a name stands before column numbers, and where the
    fields are column numbers from 0 or repeated values renamed by pandas (0, 0.1, 0.2).
    Raises InputError where this is in doubt.
    """
    if asked.header != AUTO:
        return asked.header == "yes"
    counted = [str(i) for i in range(len(names))]
    if all(name.lower() in MISSING for name in names):
        return False  # an example without values
    if not any(map(is_number, names)):
        return True
    if not is_number(names[0]):
        named = names[0] == "" or names[0].lower() not in MISSING
        from_0 = names[1:] == counted[:-1] and (names[0] != "" or len(names) > 2)
        return named and (from_0 or (names[0] != "" and names[1:] == counted[1:]))
    if not all(map(is_number, names)):
        return False
    if names == second:
        return False
    if _renamed(names) and not _renamed(second):
        return True
    if names == counted and len(names) > 3:
        return True
    from_1 = [str(i + 1) for i in range(len(names))]
    if (names == counted and len(names) == 3) or (names == from_1 and len(names) > 3):
        raise InputError(
            f"{path}: is its first line ({_brief(names)}) a header or an example? give --header yes"
            " or --header no (data.header)"
        )
    return False


def _renamed(names: list[str]) -> bool:
    """Whether the fields are values of which pandas renamed those that were there before: the
    second 0 is 0.1, the third 0.2, the eleventh 0.10."""
    seen: dict[str, int] = {}
    renamed = 0
    for name in names:
        base, _, number = name.rpartition(".")
        if base in seen and number == str(seen[base]):
            seen[base] += 1
            renamed += 1
        elif name in seen:
            return False
        else:
            seen[name] = 1
    return renamed >= 2


def find_columns(path: Path, header: list[str] | None, values: Tensor, asked: Asked) -> Columns:
    """The columns of a table with a label. `values` (n, M) are its examples, or the first of them.
    Raises InputError where it is in doubt."""
    index, rest = without_index(header, values)
    label, certain = _asked_label(path, header, rest, asked), True
    if label is None and header and asked.trained and asked.trained in header:
        label = header.index(asked.trained)
    if label is None:
        label = _named_label(path, header, rest)
    if label is None and asked.trained.isdecimal() and int(asked.trained) - 1 in rest:
        label = int(asked.trained) - 1
    if label is None and rest:
        label, certain = rest[0], False
    if label is None:
        raise InputError(f"{path}: holds no column but an index")
    features = tuple(i for i in rest if i != label)
    columns = Columns(label, features, _called(header, label), index)
    if not certain:
        _check_first(path, header, values, columns)
    return columns


def find_like(
    header: list[str] | None, values: Tensor, train: Columns, names: list[str] | None, total: int
) -> Columns | None:
    """The columns of a test table (n, M), with a label or without, beside a training table of
    `total` columns: by their names where both have the same, else by their places. None where they
    do not fit."""
    label, count = train.label, values.shape[1]
    assert label is not None
    if header and names:
        places = {name: i for i, name in enumerate(header)}
        wanted = [names[i] for i in train.features]
        if (
            len(places) == len(header)
            and len(set(wanted)) == len(wanted)
            and set(wanted) <= {*places}
        ):
            own = places.get(names[label])
            return Columns(own, tuple(places[name] for name in wanted), _called(header, own))
    if count == total:
        return train
    if count == len(train.features):
        return Columns(None, tuple(range(count)))
    if count == total - 1:
        return Columns(None, tuple(i - (i > label) for i in train.features))
    return None


def without_index(header: list[str] | None, values: Tensor) -> tuple[int | None, list[int]]:
    """The column that counts the examples, if there is one, and the other columns."""
    index = _index_column(header, values)
    return index, [i for i in range(values.shape[1]) if i != index]


def _index_column(header: list[str] | None, values: Tensor) -> int | None:
    """The column that counts the examples: unnamed or called an index, of distinct whole numbers in
    any order. Without a header it has to be the first, and 0 to n - 1 or 1 to n."""
    if values.shape[1] < 2:
        return None
    if header is None:
        first = values[:, 0].double()
        lowest = float(first.min())
        counted = torch.arange(len(first), dtype=torch.float64, device="cpu") + lowest
        found = len(first) > 20 and lowest in (0, 1) and first.sort().values.equal(counted)
        return 0 if found else None
    for i, name in enumerate(header):
        if name.lower() in INDEX or re.fullmatch(r"unnamed: \d+", name.lower()):
            column = values[:, i].double()
            if bool((column == column.floor()).all()) and len(column.unique()) == len(column):
                return i
    return None


def has_label_name(names: Iterable[str]) -> bool:
    """Whether one of the names is that of a label."""
    return any(name.lower() in (*CERTAIN, *LIKELY) for name in names)


def _asked_label(path: Path, header: list[str] | None, rest: list[int], asked: Asked) -> int | None:
    """The column that the user calls the label."""
    if asked.label == AUTO:
        return None
    names = header or []
    if asked.label in names:
        return names.index(asked.label)
    if asked.label in ("first", "last"):
        return rest[0 if asked.label == "first" else -1]
    lower = [name.lower() for name in names]
    if lower.count(asked.label.lower()) == 1:
        return lower.index(asked.label.lower())
    if asked.label.isdecimal():
        number, count = int(asked.label), max(len(names), max(rest) + 1)
        if 1 <= number <= count:
            return number - 1
        raise InputError(f"{path}: --label {number}: it has {count} columns, counted from 1")
    found = hint(asked.label, names[:1000]) if names else "it has no header: give first, last or N"
    raise InputError(f"{path}: --label {asked.label}: no such column; {found}")


def _named_label(path: Path, header: list[str] | None, rest: list[int]) -> int | None:
    """The column that its name makes the label."""
    for known in (CERTAIN, LIKELY):
        found = [i for i in rest if header and header[i].lower() in known]
        if known is LIKELY and len(found) == 1 and header and header[found[0]].lower() == "y":
            others = {header[i].lower() for i in rest}
            if "x" in others:  # a point's coordinates
                return None
        if len(found) > 1 and header:
            names = " or ".join(repr(header[i]) for i in found)
            raise _doubt(path, header, f"is the label {names}?")
        if found:
            return found[0]
    return None


def _check_first(path: Path, header: list[str] | None, values: Tensor, columns: Columns) -> None:
    """Raise InputError where the first column may not be the label."""
    first, last = columns.label, columns.features[-1] if columns.features else None
    assert first is not None
    if last is None or len(values) < 2:
        return
    features = values[:, list(columns.features)]
    image = side_of(len(columns.features)) > 0 and are_bytes(features)
    labels_first, labels_last = looks_like_labels(values[:, first]), _is_likely(values, last)
    if image and labels_first and (balanced(values[:, first]) or not labels_last):
        return
    if image and len(values) < 20 and _is_whole(values[:, first]):  # too few to doubt the usual
        return
    shown = header or [f"{v:g}" for v in values[0].tolist()]
    if values[:, first].unique().numel() == 1:
        raise _doubt(path, shown, "its first column is constant; which column is the label?")
    if labels_last:
        raise _doubt(path, shown, "is the label its first column or its last?")
    if header and not labels_first and _is_whole(values[:, first]):
        raise _doubt(path, shown, f"no column is called label, and {header[first]!r} may be none")
    if not image and (count := _one_hot(values, columns)):
        raise InputError(
            f"{path}: its {count[0]} {count[1]} columns look like one-hot labels: write the"
            " class's number as one column in their place, or give --label"
        )


def _is_likely(values: Tensor, column: int) -> bool:
    return looks_like_labels(values[:, column]) and balanced(values[:, column])


def looks_like_labels(column: Tensor) -> bool:
    """Whether a column (n,) holds each of the classes 0 to K - 1 or 1 to K, K of 2 to n / 2."""
    if not _is_whole(column):
        return False
    classes = column.unique()
    count = len(classes)
    lowest, highest = float(classes[0]), float(classes[-1])
    few = 2 <= count <= max(2, len(column) // 2)
    return few and lowest in (0, 1) and highest - lowest + 1 == count


def balanced(column: Tensor) -> bool:
    """Whether no value fills nearly all of a column (n,)."""
    return int(column.unique(return_counts=True)[1].max()) <= BALANCED * len(column)


def _is_whole(column: Tensor) -> bool:
    return bool(((column == column.floor()) & (column >= 0)).all()) if len(column) else False


def _one_hot(values: Tensor, columns: Columns) -> tuple[str, int] | None:
    """Which columns, the "first" or the "last" so many, have a single 1 among zeros in each row."""
    if len(values) < 10:
        return None
    binary = ((values == 0) | (values == 1)).all(0)
    order = sorted(columns.order)
    for end, places in (("first", order), ("last", order[::-1])):
        total = torch.zeros(len(values), device="cpu")
        for count, i in enumerate(places, 1):
            if not binary[i] or not (values[:, i] == 1).any():
                break
            total = total + values[:, i]
            if count > 1 and bool((total == 1).all()):
                return end, count
    return None


def _called(header: list[str] | None, column: int | None) -> str:
    if column is None:
        return "none"
    return f"{column + 1} {header[column]!r}" if header else str(column + 1)


def _doubt(path: Path, shown: list[str], question: str) -> InputError:
    return InputError(
        f"{path}: {question} its first line is {_brief(shown)}: give --label NAME, first, last or a"
        " column's number (data.label)"
    )


def _brief(fields: list[str]) -> str:
    short = fields if len(fields) <= 8 else [*fields[:4], "...", *fields[-3:]]
    return ",".join(field[:20] for field in short)


def side_of(count: int) -> int:
    """The side of a square image of `count` pixels; 0 where it is none."""
    side = math.isqrt(count)
    return side if side * side == count and side >= 8 else 0


def are_bytes(features: Tensor) -> bool:
    """Whether all are whole numbers from 0 to 255."""
    if features.dtype == torch.uint8:
        return True
    return bool(((features >= 0) & (features <= 255) & (features == features.floor())).all())
