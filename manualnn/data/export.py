"""A data set written as the files of an exercise that hands out CSV.

Shapes: N examples, D features.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import write_csv, writing
from ..workspace import generator
from .sources import Dataset

EXPORT_STREAM = 0xE4B0


def export_csv(
    dataset: Dataset, folder: Path | str, seed: int = 0, test: float | None = 0.2
) -> dict[str, int]:
    """Write all examples of a data set, in one random order that depends on `seed` alone.

    `train.csv` has a label and the features in each line, `test.csv`, the share `test` of all,
    only features, and `test_labels.csv` their labels. With `test` None the test file has the test
    examples of the data set. Returns the number of examples in each file. Raises InputError where
    one of them exists, would be empty or cannot be written, or where there are no test examples.
    """
    folder = Path(folder)
    parts = [part for part in (dataset.train, dataset.test) if part is not None]
    images = [part.images for part in parts if isinstance(part.images, Tensor)]
    if len(images) < len(parts):
        raise InputError(
            f"{dataset.where}: a shard folder may be larger than memory, and is not written as CSV"
        )
    features = torch.cat([part.flatten(1) for part in images])
    labels = torch.cat([part.labels for part in parts])
    order = torch.randperm(len(labels), generator=generator(seed, EXPORT_STREAM), device="cpu")
    if test is not None:
        held_out, chosen = order.tensor_split([round(test * len(order))])
    elif len(parts) == 2:
        is_test = order >= len(parts[0].labels)
        held_out, chosen = order[is_test], order[~is_test]
    else:
        raise InputError(f"{dataset.name}: has no training and test part to keep apart")
    names = [f"pixel{i + 1}" for i in range(features.shape[1])]
    tables = {
        "train.csv": (["label", *names], _rows(chosen, labels[:, None], features), len(chosen)),
        "test.csv": (names, _rows(held_out, features), len(held_out)),
        "test_labels.csv": (["label"], _rows(held_out, labels[:, None]), len(held_out)),
    }
    for name in tables:
        if (folder / name).exists():
            raise InputError(f"{folder / name} exists; remove it or choose another --out")
    if empty := [name for name, (_, _, count) in tables.items() if not count]:
        raise InputError(f"--test {test:g} of {len(order)} examples leaves {empty[0]} empty")
    with writing(f"--out {folder}"):
        for name, (header, rows, _) in tables.items():
            write_csv(folder / name, header, rows)
    return {name: count for name, (_, _, count) in tables.items()}


def _rows(index: Tensor, *columns: Tensor) -> Iterator[list[Any]]:
    """The rows `index` of tables side by side, some at a time."""
    for part in index.split(1000):
        for cells in zip(*(table[part].tolist() for table in columns), strict=True):
            yield [value for cell in cells for value in cell]
