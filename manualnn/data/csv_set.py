"""A data set in CSV files: one example per line, with its label; test examples may have none.

Shapes: N examples, M columns, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, note
from ..files import user_path
from .columns import (
    Asked,
    Columns,
    are_bytes,
    find_columns,
    find_like,
    has_label_name,
    side_of,
    without_index,
)
from .table import Layout, open_table, place

# Of a CSV data set a folder, or a mapping: the file of each part, or "dir", a folder; and where
# the user says them "label" and "header", as `Asked` has them.
Place = Path | str | Mapping[str, str] | None
NAMES = ("{}.csv", "{}.csv.gz")
PIXELS = (64, 256, 784, 1024)  # of usual images


def asked_of(place: Place) -> Asked:
    """The user's word on the columns."""
    given = place if isinstance(place, Mapping) else {}
    return Asked(**{key: given[key] for key in ("label", "header", "trained") if key in given})


def csv_files(place: Place, parts: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Path]:
    """The file of each part: `place` names them, or is a folder of train.csv and test.csv."""
    if isinstance(place, Mapping) and not {"train", "test"} & place.keys():
        place = place.get("dir")
    if place is None:
        raise InputError(
            "data set 'csv' needs files: give --data FILE or FOLDER, or set data.train"
        )
    if isinstance(place, Mapping):
        files = {part: user_path(place[part]) for part in parts if part in place}
        if lacking := [part for part in parts if part not in files and part not in optional]:
            raise InputError(
                f"data set 'csv' has no {lacking[0]} file: give one with --data, or as"
                f" data.{lacking[0]} of the config"
            )
        return files
    folder = user_path(place)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    files = {}
    for part in parts:
        found = [path for name in NAMES if (path := folder / name.format(part)).is_file()]
        if found:
            files[part] = found[0]
        elif part not in optional:
            raise InputError(f"{folder} lacks {part}.csv (plain or .gz)")
    return files


@dataclass(frozen=True)
class Part:
    """The examples of a CSV file: features (N, D), or images (N, 1, side, side); labels (N,)."""

    path: Path
    layout: Layout
    columns: Columns
    features: Tensor
    labels: Tensor

    @property
    def label(self) -> str:
        """The label's column as --label takes it: its name, else its number."""
        assert self.columns.label is not None
        header = self.layout.header
        return header[self.columns.label] if header else str(self.columns.label + 1)

    @property
    def place(self) -> Callable[[int], str]:
        """As `label_place`."""
        return label_place(self.path, self.layout, self.columns)


def label_place(path: Path, layout: Layout, columns: Columns) -> Callable[[int], str]:
    """The line and column in the file of an example's label, as a function of the example."""
    assert columns.label is not None
    return partial(place, path, layout, columns.label)


def read_csv(files: Mapping[str, Path], asked: Asked) -> dict[str, Part]:
    """The examples of each part that has labels.

    Features are (N, D), or images (N, 1, side, side) where they are bytes in every part and D is a
    square of at least 64. A test file without labels beside a training file is left out, with a
    note. Raises InputError with the file, and the line and column where there is one, and where it
    is in doubt which column is the label.
    """
    read: dict[str, Part] = {}
    train: tuple[Layout, Columns] | None = None
    for part, path in files.items():
        table = open_table(path, asked)
        columns = columns_of(part, path, table.layout, table.values, asked, train)
        if part == "train":
            train = table.layout, columns
        if columns.label is None:
            continue
        column, where = table.values[:, columns.label], label_place(path, table.layout, columns)
        labels = class_labels(column, path, where, part == "train")
        read[part] = Part(path, table.layout, columns, take(table.values, columns), labels)
    side = side_of(next(iter(read.values())).features.shape[1]) if read else 0
    if not side or not all(are_bytes(part.features) for part in read.values()):
        return read
    return {
        name: replace(part, features=part.features.to(torch.uint8).reshape(-1, 1, side, side))
        for name, part in read.items()
    }


def take(values: Tensor, columns: Columns) -> Tensor:
    """The features (N, D) of a table; a view where they lie beside each other."""
    first, count = columns.features[0], len(columns.features)
    if columns.features == tuple(range(first, first + count)):
        return values[:, first : first + count]
    return values[:, list(columns.features)]


def columns_of(
    part: str,
    path: Path,
    layout: Layout,
    values: Tensor,
    asked: Asked,
    train: tuple[Layout, Columns] | None,
) -> Columns:
    """The columns of the table of a part; `values` are its examples or the first of them, `train`
    is known of the training table. A test file beside it may have no label, which is noted. Raises
    InputError where the columns do not fit or are in doubt."""
    header, count = layout.header, values.shape[1]
    if train is None:
        # 783 features are unusual where 784 pixels are not; other tables have what width they like.
        if count < 2 or (asked.label == "auto" and are_features(values, header)):
            raise InputError(
                f"{path}: has {count} columns, as features without a label; labels are needed:"
                " in the first column, or where --label says; `predict` needs none"
            )
        columns = find_columns(path, header, values, asked)
        if not columns.features:
            raise InputError(f"{path}: holds a label and no features")
        _note_index(path, header, columns.index)
        return columns
    of, known = train
    total = of.columns
    if count == total and asked.label == "auto" and are_features(values, header):
        raise InputError(f"{path}: has {count} features, but the training file {total - 1}")
    found = find_like(header, values, known, of.header, total)
    if found is None:
        raise InputError(
            f"{path}: has {count} columns, but the training file has {total}: a label and"
            f" {len(known.features)} features"
        )
    if found.label is None:
        said = "holds no labels: its examples are left out, and nothing is measured on them"
        note(f"{path}: {said}")
    return found


def read_features(path: Path, asked: Asked, width: int) -> Tensor:
    """The features (N, width) of a CSV file, with a note on a label or an index that it has, too.

    Raises InputError where it has another number of columns, or where the label is in doubt.
    """
    table = open_table(path, asked)
    values, header = table.values, table.header
    if values.shape[1] == width and asked.label == "auto":
        return values
    index, rest = without_index(header, values)
    if len(rest) == width and asked.label == "auto":
        columns = Columns(None, tuple(rest), index=index)
    elif len(rest) == width + 1:
        columns = find_columns(path, header, values, asked)
        note(f"{path}: column {columns.name} is the label; it is ignored")
    else:
        raise InputError(
            f"{path}: has {values.shape[1]} columns, but the network takes {width}, or {width + 1}"
            " with a label"
        )
    _note_index(path, header, columns.index)
    return take(values, columns)


def read_labels(path: Path, asked: Asked) -> Tensor:
    """The classes (N,) in a CSV file: its only column but for an index, the one called label or the
    like, or the one that is asked for. Raises InputError where this is in doubt."""
    table = open_table(path, asked)
    values, header = table.values, table.header
    _, rest = without_index(header, values)
    if len(rest) == 1 and asked.label == "auto":
        return values[:, rest[0]]
    named = header is not None and has_label_name(header[i] for i in rest)
    if asked.label == "auto" and (are_features(values, header) or (header and not named)):
        raise InputError(
            f"{path}: which of its {values.shape[1]} columns is it? call one label, or give --label"
        )
    label = find_columns(path, header, values, asked).label
    assert label is not None
    return values[:, label]


def _note_index(path: Path, header: list[str] | None, index: int | None) -> None:
    if index is not None:
        called = f" ({header[index]!r})" if header else ""
        note(f"{path}: column {index + 1}{called} counts the examples; it is left out")


def are_features(values: Tensor, header: list[str] | None) -> bool:
    """Whether a table has as many bytes in a line as an image pixels, and none called a label."""
    named = header is not None and has_label_name(header)
    return not named and values.dtype == torch.uint8 and values.shape[1] in PIXELS


def class_labels(column: Tensor, path: Path, place: Callable[[int], str], train: bool) -> Tensor:
    """Classes from a column, whose examples `place` finds in the file; of training examples so many
    that they can be classes."""
    labels = column.long()
    most = max(10, len(column) // 2) if train else 2**31
    wrong = ((labels != column) | (labels < 0) | (labels >= most)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        value = float(column[first])
        why = (
            "is no whole number from 0"
            if value != int(value) or value < 0
            else f"is too large for {len(column)} examples"
        )
        raise InputError(
            f"{path}: {place(first)}: label {value:g} {why}; is another column the label? give"
            " --label NAME, last or its number"
        )
    if train and (lowest := int(labels.min())):
        note(f"{path}: labels begin at {lowest}, so that classes below it have no examples")
    return labels
