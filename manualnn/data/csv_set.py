"""A data set in CSV files: one example per line, its label first; test examples may have none.

Shapes: N examples, D features.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .table import LABELS, place_of_label, read_table

Place = Path | str | Mapping[str, str] | None
NAMES = ("{}.csv", "{}.csv.gz")
PIXELS = (64, 256, 784, 1024)  # of usual images


def csv_files(place: Place, parts: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Path]:
    """The file of each part: `place` names them, or is a folder of train.csv and test.csv."""
    if place is None:
        raise InputError(
            "data set 'csv' needs files: give --data FILE or FOLDER, or set data.train"
        )
    if isinstance(place, Mapping):
        files = {part: Path(place[part]).expanduser() for part in parts if part in place}
        if lacking := [part for part in parts if part not in files and part not in optional]:
            raise InputError(f"data set 'csv' has no {lacking[0]} file: set data.{lacking[0]}")
        return files
    folder = Path(place).expanduser()
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


def read_csv(files: Mapping[str, Path]) -> dict[str, tuple[Tensor, Tensor]]:
    """(features, labels (N,) int64) of each part that has labels.

    Features are (N, D), or images (N, 1, side, side) where they are bytes in every part and D is a
    square of at least 64. A test file of one column less than the training file holds features only
    and is left out, with a note. Raises InputError with the file, and the line and column where
    there is one.
    """
    tables = {part: read_table(path) for part, path in files.items()}
    expected = tables["train"][0].shape[1] if "train" in tables else 0
    read = {}
    for part, (table, header) in tables.items():
        if has_labels(part, files, table, header, expected):
            read[part] = table[:, 1:], class_labels(table[:, 0], files[part], part == "train")
    side = side_of(next(iter(tables.values()))[0].shape[1] - 1)
    if not side or not all(are_bytes(features) for features, _ in read.values()):
        return read
    return {
        part: (features.to(torch.uint8).reshape(-1, 1, side, side), labels)
        for part, (features, labels) in read.items()
    }


def has_labels(
    part: str, files: Mapping[str, Path], table: Tensor, header: list[str] | None, expected: int
) -> bool:
    """Whether the table of a part, or its first lines, has a label before the features; `expected`
    are the columns of the training file, 0 where there is none. A test file without labels is
    left out, with a note. Raises InputError where the columns do not fit."""
    path, columns = files[part], table.shape[1]
    if part == "test" and columns == expected - 1:
        said = "holds no labels: its examples are left out, and nothing is measured on them"
        print(f"note: {path}: {said}", file=sys.stderr)
        return False
    if expected and columns != expected:
        raise InputError(
            f"{path}: has {columns} columns, but {files['train']} has {expected}: a label and"
            f" {expected - 1} features"
        )
    if part == "test" and expected and are_features(table, header):
        raise InputError(
            f"{path}: has {columns} features, but {files['train']} a label and {expected - 1}"
        )
    # 783 features are unusual where 784 pixels are not; other tables have what width they like.
    if columns < 2 or are_features(table, header):
        raise InputError(
            f"{path}: has {columns} columns, as features without a label; labels are needed, in"
            " the first column; `predict` needs none"
        )
    return True


def are_features(table: Tensor, header: list[str] | None) -> bool:
    """Whether a table has as many bytes in a line as an image pixels, and none called a label."""
    named = header is not None and header[0].lower() in LABELS
    return not named and table.dtype == torch.uint8 and table.shape[1] in PIXELS


def class_labels(column: Tensor, path: Path, train: bool) -> Tensor:
    """Classes from a column; of training examples so many that they can be classes."""
    labels = column.long()
    most = max(10, len(column) // 2) if train else 2**31
    wrong = ((labels != column) | (labels < 0) | (labels >= most)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        value = float(column[first])
        why = (
            "is no whole number from 0"
            if value != int(value) or value < 0
            else (f"is too large for {len(column)} examples; is the first column a label?")
        )
        raise InputError(f"{path}: {place_of_label(path, first)}: label {value:g} {why}")
    if train and (lowest := int(labels.min())):
        print(
            f"note: {path}: labels begin at {lowest}, so that classes below it have no examples",
            file=sys.stderr,
        )
    return labels


def are_bytes(features: Tensor) -> bool:
    """Whether all are whole numbers from 0 to 255."""
    if features.dtype == torch.uint8:
        return True
    return bool(((features >= 0) & (features <= 255) & (features == features.floor())).all())


def side_of(count: int) -> int:
    """The side of a square image of `count` pixels; 0 where it is none."""
    side = math.isqrt(count)
    return side if side * side == count and side >= 8 else 0
