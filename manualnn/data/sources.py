"""Where a data set lies: a folder the user names, the bundled MNIST, or a per-user download."""

import hashlib
import os
import re
import socket
import struct
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path

from torch import Tensor

from ..errors import InputError, hint
from ..files import PACKAGE, cache_folder, user_path
from .csv_set import Part, Place, asked_of, csv_files, read_csv
from .idx import as_images, has_channels_last, read_idx
from .limits import most_bytes
from .rows import Rows, open_shards


@dataclass(frozen=True)
class Known:
    """A data set: its folder in torchvision's layout, class names, md5 of the files, and where they
    can be had."""

    folder: str
    classes: tuple[str, ...]
    md5: dict[tuple[str, str], str]
    url: str


def _md5(*values: str) -> dict[tuple[str, str], str]:
    keys = [(part, kind) for part in ("train", "test") for kind in ("images", "labels")]
    return dict(zip(keys, values, strict=True))


FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

# md5 of the packed files, as torchvision.datasets pins them.
DATASETS = {
    "mnist": Known(
        "MNIST",
        tuple("0123456789"),
        _md5(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion-mnist": Known(
        "FashionMNIST",
        FASHION,
        _md5(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    "kmnist": Known(
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        _md5(
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
        "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    ),
}
# md5 of the unpacked label files, of training and of test examples: they tell the sets apart.
LABELS_MD5 = {
    "mnist": ("a25bea736e30d166cdddb491f175f624", "27ae3e4e09519cfbb04c329615203637"),
    "fashion-mnist": ("9018921c3c673c538a1fc5bad174d6f9", "15d484375f8d13e6eb1aabb0c3f46965"),
    "kmnist": ("949e75301f8813e0dc5800dcc320fc52", "9f55f451c0988b028eccdf7d5cc265ab"),
}
NAMES = (*DATASETS, "idx", "csv", "shards")
LARGEST_DOWNLOAD, LONGEST_DOWNLOAD = 2**26, 600.0  # bytes, seconds for a file
TIMEOUT = 10.0  # seconds until a server answers at all


@dataclass(frozen=True)
class Examples:
    """images (N, C, H, W) or (N, D) in their own type, labels (N,) int64. The training images of a
    shard folder stay in its files."""

    images: Tensor | Rows
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """What was loaded; a part that was not asked for, or optional and missing, is None.

    `classes` are known from the training labels or the data set's own list; None if only a foreign
    test part was read.
    """

    name: str
    where: str
    train: Examples | None
    test: Examples | None
    class_names: tuple[str, ...] | None
    read: str = ""  # one line for a reader: examples, features, label column, classes and counts
    label: str = ""  # the label's column of a table, as --label takes it
    files: Mapping[str, str] = field(default_factory=dict)  # of parts that have one of their own


def load(
    name: str,
    data_dir: Place = None,
    parts: tuple[str, ...] = ("train", "test"),
    optional: tuple[str, ...] = (),
    class_names: tuple[str, ...] | None = None,
) -> Dataset:
    """Read the `parts` ("train", "test") of data set `name` and check that they fit together.

    `data_dir`, else `$MANUALNN_DATA`, else what is bundled, else the per-user cache, into which
    they are downloaded; of "csv" a folder or the file of each part; of "shards" a folder. Parts in
    `optional` may be missing in a folder the user named. Raises InputError.
    """
    if name not in NAMES:
        raise InputError(f"unknown data set {name!r}; {hint(name, NAMES)}")
    md5: dict[tuple[str, str], str] = {}
    tables: dict[str, Part] = {}
    found: Files = {}
    if name == "shards":
        return _load_shards(data_dir, parts, optional, class_names)
    if name == "csv":
        labelled = csv_files(data_dir, parts, optional)
        tables = read_csv(labelled, asked_of(data_dir))
        read = {part: Examples(of.features, of.labels) for part, of in tables.items()}
        where = ", ".join(map(str, labelled.values()))
    else:
        assert not isinstance(data_dir, Mapping)
        found, where, md5 = locate(name, data_dir, parts, optional)
        labelled = {part: found[part, "labels"] for part in parts if (part, "labels") in found}
        read = {
            part: _read_part(found[part, "images"], path, part, md5)
            for part, path in labelled.items()
        }
    shapes = {part: tuple(examples.images.shape[1:]) for part, examples in read.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{where}: train and test examples differ in shape: {shapes}")
    if class_names is None:
        labels = {part: examples.labels for part, examples in read.items()}
        class_names = name_classes(name, labels, bool(md5))
    for part, examples in read.items():
        if class_names is not None:
            place = tables[part].place if name == "csv" else None
            check_labels(examples.labels, len(class_names), str(labelled[part]), place)
    called = {part: of.columns.name for part, of in tables.items()}
    files = (
        {part: str(path) for part, path in labelled.items()}
        if name == "csv"
        else {part: str(path) for (part, kind), path in found.items() if kind == "images"}
    )
    said = describe_parts(name, where, read, class_names, called, files if tables else {})
    label = next(iter(tables.values())).label if tables else ""
    return Dataset(
        name, where, read.get("train"), read.get("test"), class_names, said, label, files
    )


def name_classes(name: str, labels: dict[str, Tensor], own: bool) -> tuple[str, ...] | None:
    """The classes of a data set by the labels of its parts; its `own` files have those it knows."""
    known = DATASETS.get(name)
    if known and own:
        return known.classes
    if "train" in labels:
        count = int(labels["train"].max()) + 1
        same = known is not None and len(known.classes) == count
        return known.classes if known and same else tuple(map(str, range(count)))
    fits = known and labels and max(int(y.max()) for y in labels.values()) < len(known.classes)
    return known.classes if known and fits else None


def _load_shards(
    place: Place,
    parts: tuple[str, ...],
    optional: tuple[str, ...],
    class_names: tuple[str, ...] | None,
) -> Dataset:
    """A shard folder; its test examples are read, those to train on are not."""
    if place is None or isinstance(place, Mapping):
        raise InputError("data set 'shards' needs a folder: give --data DIR or set data.dir")
    found = open_shards(user_path(place), parts)
    read: dict[str, Examples] = {}
    for part, rows in found.images.items():
        if part == "test" and rows.numel() * rows.dtype.itemsize > most_bytes():
            raise InputError(
                f"{place}: {len(rows)} test examples take more than half of the memory"
            )
        read[part] = Examples(rows if part == "train" else rows[:], found.labels[part])
    if missing := [part for part in parts if part not in (*read, *optional)]:
        raise InputError(f"{place}: has no {missing[0]} examples")
    names = class_names or found.class_names
    for examples in read.values():
        check_labels(examples.labels, len(names), str(place))
    said = describe_parts("shards", str(place), read, names, {}, {})
    return Dataset("shards", str(place), read.get("train"), read.get("test"), names, said)


def load_source(
    source: str,
    name: str,
    data_dir: Place = None,
    class_names: tuple[str, ...] | None = None,
    optional: tuple[str, ...] = ("test",),
) -> Dataset:
    """The data set to train on: its training part, or with `source` "test" its test part in the
    place of the training part, and no test part left. Raises InputError."""
    if source == "train":
        return load(name, data_dir, optional=optional, class_names=class_names)
    dataset = load(name, data_dir, ("test",), class_names=class_names)
    assert dataset.test is not None
    count = int(dataset.test.labels.max()) + 1
    if count > max(256, len(dataset.test.labels)):
        raise InputError(f"{dataset.where}: label {count - 1} is too large for its examples")
    names = dataset.class_names or tuple(map(str, range(count)))
    return replace(dataset, train=dataset.test, test=None, class_names=names)


def example_shape(name: str, data_dir: Place = None) -> tuple[tuple[int, ...], int]:
    """The shape of one example of a data set, and its number of classes.

    No file is needed for those that are known, unless `data_dir` or `$MANUALNN_DATA` may
    hold another version. Raises InputError.
    """
    if data_dir is None and name in DATASETS:
        needed = [("train", "images"), ("train", "labels")]
        given = os.environ.get("MANUALNN_DATA")
        files = search(user_path(given), name, needed, needed) if given else ""
        if isinstance(files, str) or _other_set(name, files):  # it has none of this set
            return (1, 28, 28), len(DATASETS[name].classes)
    dataset = load(name, data_dir, ("train",))
    assert dataset.train is not None and dataset.class_names is not None
    return tuple(dataset.train.images.shape[1:]), len(dataset.class_names)


def describe_parts(
    name: str,
    where: str,
    parts: Mapping[str, Examples],
    class_names: tuple[str, ...] | None,
    label_columns: Mapping[str, str],
    files: Mapping[str, str],
) -> str:
    """One line for a reader: the examples, features, label column, classes and counts of each part
    that was read. `files` names the file of a part where each has its own."""
    said, shown = [], ""
    for part, examples in parts.items():
        shape = tuple(examples.images.shape[1:])
        size = " x ".join(map(str, shape[1:] if shape[0] == 1 and len(shape) == 3 else shape))
        size = f"{size} pixels" if len(shape) == 3 else f"{size} features"
        label = f", label column {label_columns[part]}" if label_columns.get(part) else ""
        of = f" of {size}{label}" if f"{size}{label}" != shown else ""
        shown = f"{size}{label}"
        counts = examples.labels.bincount(minlength=len(class_names or ())).tolist()
        spread = f"{min(counts):,} to {max(counts):,} each"
        each = " ".join(f"{count:,}" for count in counts) if len(counts) <= 10 else spread
        subject = f"{files[part]}:" if part in files else part
        said.append(
            f"{subject} {len(examples.labels):,} examples{of}, {len(counts)} classes ({each})"
        )
    head = "" if files else f"{where}: " if name in where else f"{name} ({where}): "
    return f"{head}{'; '.join(said)}"


def check_labels(
    labels: Tensor, classes: int, where: str, place: Callable[[int], str] | None = None
) -> None:
    """Raise InputError unless every label is in [0, classes); with the line in a table, where
    `place` says the place of an example's label."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        at = f", {place(first)}" if place else ""
        of = "" if place else f" of example {first}"
        raise InputError(
            f"{where}{at}: label {int(labels[first])}{of} is outside the {classes} classes 0 to"
            f" {classes - 1}"
        )


def _read_part(
    images_path: Path, labels_path: Path, part: str, md5: dict[tuple[str, str], str]
) -> Examples:
    images = read_idx(images_path, md5.get((part, "images")))
    labels = read_idx(labels_path, md5.get((part, "labels")))
    shape = check_part(tuple(images.shape), images_path, labels, labels_path)
    return Examples(as_images(images).view(shape), labels.long())


def check_part(
    shape: tuple[int, ...], images_path: Path, labels: Tensor, labels_path: Path
) -> tuple[int, ...]:
    """The shape that images (N, ...) of an idx file are to have. Raises InputError where they and
    their labels are no data set."""
    if len(shape) == 3:
        shape = (shape[0], 1, *shape[1:])  # one channel
    elif has_channels_last(shape):
        shape = (shape[0], shape[3], *shape[1:3])
    if len(shape) not in (2, 4):
        raise InputError(f"{images_path}: examples of {len(shape) - 1} dimensions; 1 to 3 are read")
    if labels.dim() != 1 or labels.is_floating_point():
        raise InputError(f"{labels_path}: labels must be one integer per example")
    if shape[0] != len(labels):
        raise InputError(
            f"{shape[0]} images in {images_path}, but {len(labels)} labels in {labels_path}"
        )
    if 0 in shape:
        raise InputError(f"{images_path}: holds no data: shape {shape}")
    if (largest := int(labels.max())) >= max(256, len(labels)):  # a class each would be names only
        raise InputError(f"{labels_path}: label {largest} is too large for {len(labels)} examples")
    return shape


Files = dict[tuple[str, str], Path]
IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx\d-\w+?(\.gz)?")


def locate(
    name: str, data_dir: Path | str | None, parts: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[Files, str, dict[tuple[str, str], str]]:
    """The files of the parts, where they lie, and the md5s they must have (none if the user's)."""
    needed = [(part, kind) for part in parts for kind in ("images", "labels")]
    required = [key for key in needed if key[0] not in optional]
    if data_dir is not None:
        files = search(user_path(data_dir), name, needed, required)
        if not isinstance(files, str) and (other := _other_set(name, files)):
            raise InputError(
                f"{data_dir}: holds {other} by its checksums, not {name}: give --data {other}"
            )
        if isinstance(files, str):
            raise InputError(files)
        return files, str(data_dir), {}
    if (environment := os.environ.get("MANUALNN_DATA")) is not None:
        files = search(user_path(environment), name, needed, required)
        if not isinstance(files, str) and (other := _other_set(name, files)):
            files = f"{environment} holds {other}, not {name}"
        if not isinstance(files, str):
            return files, environment, {}
        print(f"note: MANUALNN_DATA: {files}; looking elsewhere", file=sys.stderr)
    if name == "idx":
        raise InputError("data set 'idx' needs a folder: give --data-dir or set MANUALNN_DATA")
    known, folder = DATASETS[name], local_folder(name)
    if name != "mnist":
        missing = [key for key in needed if not (folder / canonical(*key)).is_file()]
        if missing:
            _download(name, missing, folder)
    return {key: folder / canonical(*key) for key in needed}, str(folder), known.md5


def _other_set(name: str, files: Files) -> str | None:
    """The known data set that a user's files are, where they are not those of the known `name`."""
    if name not in DATASETS:
        return None
    found = []
    for part, of_part in (("train", 0), ("test", 1)):
        if (path := files.get((part, "labels"))) is None:
            continue
        labels = read_idx(path)
        header = struct.pack(">4BI", 0, 0, 8, 1, len(labels)) if labels.dim() == 1 else b""
        digest = hashlib.md5(header + labels.numpy().tobytes(), usedforsecurity=False).hexdigest()
        found += [known for known, md5s in LABELS_MD5.items() if md5s[of_part] == digest]
    return next((known for known in found if known != name), None)


def local_folder(name: str) -> Path:
    """Where a known data set lies: in the package, or in the per-user cache."""
    if name == "mnist":
        return PACKAGE / "data" / "mnist"
    return cache_folder() / "datasets" / DATASETS[name].folder / "raw"


def canonical(part: str, kind: str) -> str:
    """The packed file's name at its source."""
    prefix = "train" if part == "train" else "t10k"
    return f"{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"


def search(
    root: Path, name: str, needed: list[tuple[str, str]], required: list[tuple[str, str]]
) -> Files | str:
    """The needed files, in `root` or in torchvision's layout under it, or what is missing. A folder
    that has all of them comes before one that has only those that are required."""
    if not root.is_dir():
        return f"{root} is not a folder"
    layout = root / DATASETS[name].folder / "raw" if name in DATASETS else root
    folders = [root, layout] if layout != root and layout.is_dir() else [root]
    found: Files | str = ""
    for wanted in (needed, required):
        for folder in folders:
            found = files_in(folder, name, needed, wanted)
            if not isinstance(found, str):
                return found
    return found


def files_in(
    folder: Path, name: str, needed: list[tuple[str, str]], required: list[tuple[str, str]]
) -> Files | str:
    """Those of the needed idx files that lie in a folder itself, or which required ones lack."""
    files: Files = {}
    for path in sorted(folder.iterdir()):  # a plain file sorts before its .gz and is preferred
        if (match := IDX_NAME.fullmatch(path.name)) and path.is_file():
            part = "train" if match[1] == "train" else "test"
            files.setdefault((part, match[2]), path)
    half = [key for key in needed if key not in files and (key[0], _other(key[1])) in files]
    missing = [key for key in required if key not in files]
    if missing or half:
        return (
            f"{folder} lacks {' and '.join(canonical(*key) for key in missing or half)}"
            f" (plain or .gz) of {name}{_holding(folder)}"
        )
    return {key: files[key] for key in needed if key in files}


def _holding(folder: Path) -> str:
    """What a folder without the idx files holds, and what to do with that."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    if not names:
        return "; it is empty"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    tables = any(name.endswith((".csv", ".csv.gz")) for name in names)
    how = ": for CSV files give --data FOLDER or FILE" if tables else ""
    return f"; it holds {', '.join(names[:3])}{more}{how}"


def _other(kind: str) -> str:
    return "labels" if kind == "images" else "images"


def _download(name: str, missing: list[tuple[str, str]], folder: Path) -> None:
    """Fetch files; each is moved to `folder` once it is whole."""
    known = DATASETS[name]
    for key in missing:
        file = canonical(*key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                print(f"downloading {name}: {file}", file=sys.stderr)
                _fetch(known.url + file, known.md5[key], Path(temporary) / file)
                (Path(temporary) / file).replace(folder / file)
        except (OSError, HTTPException) as error:
            raise InputError(
                f"{name}: {file} (md5 {known.md5[key]}) is missing and cannot be downloaded"
                f" ({_reason(error)}); put it into {folder} or give --data-dir"
            ) from None


def _fetch(url: str, md5: str, path: Path) -> None:
    """Write what lies at an address to `path`; OSError unless it has the md5."""
    digest, size, end = hashlib.md5(usedforsecurity=False), 0, time.monotonic() + LONGEST_DOWNLOAD
    with _opener().open(url, timeout=TIMEOUT) as answer, path.open("wb") as file:
        while chunk := answer.read(2**16):
            size += len(chunk)
            if size > LARGEST_DOWNLOAD or time.monotonic() > end:
                raise OSError(f"not done after {size:,} bytes")
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != md5:
        raise OSError(f"the md5 of {size:,} bytes is {digest.hexdigest()}")


def _opener() -> urllib.request.OpenerDirector:
    """What opens addresses by https alone, also those it is sent on to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        *(urllib.request.ProxyHandler, urllib.request.HTTPSHandler, urllib.request.UnknownHandler),
        *(urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor),
        urllib.request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    return opener


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError | socket.gaierror | ConnectionError):
        return "no network"
    return " ".join(str(error).split())[:200] or type(error).__name__
