"""A data set of any size as a shard folder: it is read some examples at a time.

Shapes: N examples, M columns.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, hint
from .columns import Asked, Columns, are_bytes, side_of
from .csv_set import Place, asked_of, class_labels, columns_of, csv_files, label_place, take
from .idx import IdxFile, as_images, read_idx
from .shards import SHARD_BYTES, ShardWriter
from .sources import NAMES, check_labels, check_part, locate, name_classes
from .table import Layout, read_blocks

BYTES = 2**23  # of examples at a time
NUMBERS = 2**20  # of a table at a time: their lines take many times as much
PARTS = ("train", "test")


class _OtherTypeError(Exception):
    """Examples that were taken for bytes are none."""


def convert(
    name: str, where: Place, folder: Path | str, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Write the data set `name`, found as `load` finds it, to a new shard folder; the number of
    examples of each part. Raises InputError, and then leaves nothing.

    Numbers that are no bytes become float32; those of a table that are not images remain (M - 1,).
    """
    folder = Path(folder)
    if name == "shards":
        raise InputError(f"{where or name} is a shard folder already: train with --data")
    if name not in NAMES:
        raise InputError(f"data set {name!r} cannot be converted; {hint(name, NAMES[:-1])}")
    if name != "csv":
        assert not isinstance(where, Mapping)
        return _convert_idx(name, where, folder, shard_bytes)
    files = csv_files(where, PARTS, ("test",))
    try:
        return _convert_csv(files, asked_of(where), torch.uint8, folder, shard_bytes)
    except _OtherTypeError:
        return _convert_csv(files, asked_of(where), torch.float32, folder, shard_bytes)


def _convert_idx(
    name: str, place: Path | str | None, folder: Path, shard_bytes: int
) -> dict[str, int]:
    files, where, md5 = locate(name, place, PARTS, ("test",))
    images, labels, shapes = {}, {}, {}
    for part in (part for part in PARTS if (part, "images") in files):
        path = files[part, "labels"]
        images[part] = IdxFile(files[part, "images"], md5.get((part, "images")))
        labels[part] = read_idx(path, md5.get((part, "labels")))
        shape = check_part(images[part].shape, images[part].path, labels[part], path)
        shapes[part] = shape[1:]
    if len(set(shapes.values())) > 1:
        raise InputError(f"{where}: train and test examples differ in shape: {shapes}")
    names = name_classes(name, labels, bool(md5))
    assert names is not None
    for part, own in labels.items():
        check_labels(own, len(names), str(files[part, "labels"]))
    dtype = (
        torch.uint8 if {file.dtype.str for file in images.values()} == {"|u1"} else torch.float32
    )
    title = Path(where).name if name == "idx" else name
    with ShardWriter(folder, title, shapes["train"], dtype, names, shard_bytes) as writer:
        for part, file in images.items():
            start = 0
            for block in file.blocks(BYTES):
                block = as_images(block)
                values = block.to(dtype)
                if not values.to(block.dtype).equal(block):
                    raise InputError(f"{file.path}: holds values that are no float32 numbers")
                end = start + len(block)
                writer.add(part, values.reshape(-1, *shapes[part]), labels[part][start:end])
                start = end
    return {part: len(own) for part, own in labels.items()}


def _convert_csv(
    files: dict[str, Path], asked: Asked, dtype: torch.dtype, folder: Path, shard_bytes: int
) -> dict[str, int]:
    """Into examples of `dtype`. Raises _OtherTypeError where they are no bytes, but should be. What
    is left out of `files` is taken out of them, so that it is noted once."""
    tables: dict[str, tuple[Layout, Columns, Iterator[Tensor]]] = {}
    train: tuple[Layout, Columns] | None = None
    for part, path in list(files.items()):
        layout, blocks = read_blocks(path, NUMBERS, asked)
        first = next(blocks)
        columns = columns_of(part, path, layout, first, asked, train)
        if columns.label is None:
            del files[part]  # there is nothing to measure on them
        else:
            tables[part] = layout, columns, itertools.chain([first], blocks)
        train = train or (layout, columns)
    assert train is not None
    width = len(train[1].features)
    side = side_of(width) if dtype == torch.uint8 else 0
    shape = (1, side, side) if side else (width,)
    counts, classes = dict[str, int](), 0
    title = files["train"].name.partition(".")[0]
    title = files["train"].absolute().parent.name if title == "train" else title
    with ShardWriter(folder, title, shape, dtype, None, shard_bytes) as writer:
        for part, (layout, columns, blocks) in tables.items():
            path, found = files[part], list[Tensor]()
            where = label_place(path, layout, columns)
            for block in blocks:
                found.append(block[:, columns.label].clone())
                labels = found[-1].long()
                if not (labels == found[-1]).all() or (labels < 0).any():
                    class_labels(torch.cat(found), path, where, part == "train")  # raises
                features = take(block, columns)
                if dtype == torch.uint8 and not (are_bytes(features) if side else _is_uint8(block)):
                    raise _OtherTypeError
                writer.add(part, features.to(dtype).reshape(-1, *shape), labels)
            own = class_labels(torch.cat(found), path, where, part == "train")
            classes = classes or int(own.max()) + 1
            check_labels(own, classes, str(path), where)
            counts[part] = len(own)
            said = f"{len(own):,} examples of {width} features, label column {columns.name}"
            print(f"read {path}: {said}, {int(own.max()) + 1} classes", file=sys.stderr)
    return counts


def _is_uint8(block: Tensor) -> bool:
    return block.dtype == torch.uint8
