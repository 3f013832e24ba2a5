"""`python -m benchmarks.fuzz --reader idx|csv|toml|pkl --count 100000 --seed 0`: readers on damaged
and absurd files.

A reader returns something sound or raises InputError with one short line. Anything else (another
exception, a warning, no answer within seconds) is a failure; its input is kept in --keep. Input i
of a seed is always the same: `--first i --count 1` replays it.
"""

import argparse
import csv
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from manualnn import config as configs
from manualnn.config import load_config
from manualnn.data import load, read_examples, read_idx, read_table
from manualnn.data.idx import GZIP
from manualnn.errors import InputError
from manualnn.evaluation import predict_file, score_predictions, summarise
from manualnn.network import Network, load_weights, save_weights
from manualnn.safe import scan
from manualnn.steps import threads

SECONDS, LINE = 10, 1000  # that an input may take; characters of a message

Draw = random.Random
NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 784, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
TEXTS = (
    "", "0", "-1", "1e999", "nan", "inf", "-0.0", "1_0", "0x1f", "\u0661", "1e-400", "é", "\u2028",
    "\ud7ff", "label", '"', '""', '"3', "3\x00", "\t5 ", "255", "256", "-1", "1.5", "#", "9" * 400,
    "1e38", "4e38", "true", "NaN", "None", " ", "\x1b[31m", "a" * 3000,
)  # fmt: skip


# Damage to any bytes.
def mutate(data: bytes, draw: Draw) -> bytes:
    """`data` with one to four changes: bits, bytes, numbers, cuts, splices, repetitions."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(content) + 1) if draw.random() < 0.6 else draw.randrange(24)
        at = min(at, len(content))
        kind = draw.randrange(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + 1] = draw.randbytes(draw.choice((1, 1, 2, 9)))
        elif kind == 2:
            number = draw.choice(NUMBERS) % 2**32
            content[at : at + 4] = struct.pack(draw.choice("<>") + "I", number)
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            del content[at : at + draw.choice((1, 2, 8, 60))]
        elif kind == 5:
            start = draw.randrange(len(content) + 1)
            content[at:at] = content[start : start + draw.choice((1, 4, 30))] * draw.choice((1, 3))
        else:
            content[at:at] = draw.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(content)


def repack(data: bytes, draw: Draw) -> bytes:
    """Now and then gzip, whole or damaged, now and then with a header of its own."""
    if draw.random() < 0.75:
        return data
    packed = gzip.compress(data, 1, mtime=0)
    return packed if draw.random() < 0.5 else mutate(packed, draw)


# idx
def make_idx(draw: Draw) -> bytes:
    dims = draw.choice((1, 2, 3, 3, 4)) if draw.random() < 0.9 else draw.randrange(256)
    absurd = draw.random() < 0.2
    shape = [
        draw.choice(NUMBERS) % 2**32 if absurd and draw.random() < 0.5 else draw.randrange(6)
        for _ in range(dims)
    ]
    code = draw.choice((8, 8, 9, 11, 12, 13, 14, draw.randrange(256)))
    size = {8: 1, 9: 1, 11: 2, 12: 4, 13: 4, 14: 8}.get(code, 1) * math.prod(shape)
    body = draw.randbytes(size if size < 5000 else draw.randrange(100))
    if code in (12, 13, 14) and draw.random() < 0.3:
        body = b"\x7f\xf0" * (len(body) // 2)
    data = struct.pack(f">BBBB{dims}I", 0, 0, code, dims, *shape) + body
    return repack(mutate(data, draw) if draw.random() < 0.4 else data, draw)


def labels_idx(draw: Draw) -> bytes:
    code, kind = draw.choice(((8, "B"), (8, "B"), (9, "b"), (12, "i"), (14, "d")))
    count = draw.choice((1, 2, 3, 5))
    most = {"B": 255, "b": 127, "i": 2**31 - 1}.get(kind, 9)
    values = [draw.choice((0, 1, 2, draw.randrange(most), most)) for _ in range(count)]
    data = struct.pack(f">BBBBI{count}{kind}", 0, 0, code, 1, count, *values)
    return data if draw.random() < 0.7 else mutate(data, draw)


def check_idx(folder: Path, data: bytes, draw: Draw) -> bool:
    images, labels = (folder / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    images.write_bytes(data)
    labels.write_bytes(labels_idx(draw))
    found = _one(
        lambda: read_idx(images),
        lambda: read_examples(images),
        lambda: load("idx", folder, ("train",)),
    )
    for tensor in found[:2]:
        assert tensor is None or tensor.numel() * tensor.element_size() <= 2000 * len(data) + 2**20
    if (dataset := found[2]) is not None:
        part, classes = dataset.train, len(dataset.class_names)
        assert len(part.images) == len(part.labels) and part.images.dim() in (2, 4)
        assert 0 <= int(part.labels.min()) <= int(part.labels.max()) < classes
    return found[0] is not None


# CSV
def make_csv(draw: Draw) -> bytes:
    columns, rows = draw.choice((1, 2, 3, 5, 9, 65)), draw.choice((0, 1, 2, 3, 6))
    columns = 785 if draw.random() < 0.01 else columns
    ends = draw.choice(("\n", "\n", "\r\n", "\r", "\n\n", " \n"))
    comma = draw.choice((",", ",", ",", ",", ", ", ";", "\t", " "))
    wild, floats = draw.choice((0, 0, 0.02, 0.3)), draw.random() < 0.3

    def cell() -> str:
        if draw.random() < wild:
            return draw.choice(TEXTS)
        number = f"{draw.gauss(0, 10):.4g}" if floats else str(draw.randrange(256))
        return f'"{number}"' if draw.random() < 0.02 else number

    lines = [
        comma.join([str(draw.randrange(5)), *(cell() for _ in range(columns - 1))])
        for _ in range(rows)
    ]
    if draw.random() < 0.4:
        names = [f"pixel{i}" for i in range(columns)]
        names[draw.randrange(columns)] = draw.choice(("label", "class", "x", "7", ""))
        lines.insert(0, comma.join(names))
    text = ends.join(lines) + (ends if draw.random() < 0.8 else "")
    data = ("\ufeff" * (draw.random() < 0.1) + text).encode("utf-8", "surrogatepass")
    if draw.random() < 0.03:
        data = data.decode("utf-8", "ignore").encode(draw.choice(("utf-16", "latin-1")), "replace")
    return repack(mutate(data, draw) if draw.random() < 0.4 else data, draw)


def reread(data: bytes, header: list[str] | None) -> list[list[float]]:
    """The numbers of a CSV file as the standard library reads them, in no order."""
    text = (gzip.decompress(data) if data[:2] == GZIP else data).decode("utf-8-sig")
    lines = [line for line in io.StringIO(text, newline=None) if not line.isspace()]
    rows = csv.reader(lines[1 if header else 0 :])
    return sorted(
        sorted(torch.tensor([float(cell.strip()) for cell in row]).tolist()) for row in rows
    )


def check_csv(folder: Path, data: bytes, draw: Draw) -> bool:
    path, other = folder / "train.csv", folder / "test.csv"
    path.write_bytes(data)
    other.write_bytes(b"label\n1\n2\n" if draw.random() < 0.5 else data)
    found = _one(
        lambda: read_table(path),
        lambda: load("csv", {"train": str(path)}, ("train",)),
        lambda: score_predictions(other, path),
        lambda: read_examples(path),
    )
    if found[0] is not None:
        table, header = found[0]
        assert table.dim() == 2 and table.numel() and table.isfinite().all()
        assert table.dtype in (torch.uint8, torch.float32)
        assert header is None or len(header) == table.shape[1]
        assert reread(data, header) == sorted(map(sorted, table.float().tolist()))
    if (dataset := found[1]) is not None:
        part, classes = dataset.train, len(dataset.class_names)
        assert len(part.images) == len(part.labels)
        assert 0 <= int(part.labels.min()) <= int(part.labels.max()) < classes
    return found[0] is not None


# TOML
def _keys(kind: Any = configs.Config, prefix: str = "") -> dict[str, Any]:
    """The type of each dotted key of a config."""
    keys = {}
    for name, of in get_type_hints(kind).items():
        if hasattr(of, "__dataclass_fields__"):
            keys |= _keys(of, f"{prefix}{name}.")
        elif prefix:
            keys[f"{prefix}{name}"] = of
    return keys


KEYS = _keys()
WORDS = (
    "mnist", "csv", "idx", "standard", "none", "test", "train", "parity", "he", "sgd", "adam",
    "adamw", "one_cycle", "step", "logistic", "balanced", "fp64", "valid_loss", "classes", "hflip",
    "shift:2", "relu", "", "\n", "é", "x" * 500, "\x1b[0m",
)  # fmt: skip
LAYERS = (
    ["linear", 3], ["linear", "classes"], ["relu"], ["dropout", 0.1], ["dropout", [0.1, 0.2]],
    ["conv2d", 2, 3], ["conv2d", 2, 3, {"padding": 1}], ["max_pool2d", 2], ["flatten"], [], [[]],
    ["dropout", []], ["dropout"], ["dropout", {}], [3], "relu", ["linear"], ["linear", 10**4000],
    [["a"] * 3] * 3,
)  # fmt: skip


def value(draw: Draw, depth: int = 0) -> Any:
    """Something that a key might be given."""
    kind = draw.randrange(10 if depth < 3 else 6)
    if kind < 2:
        return draw.choice((*NUMBERS, -1, -(2**63), 10**400))
    if kind == 2:
        return draw.choice(
            (0.0, 0.1, 0.5, 1.0, 1e-4, -1.0, 1e308, 5e-324, math.inf, -math.inf, math.nan)
        )
    if kind == 3:
        return draw.choice((True, False))
    if kind < 6:
        return draw.choice(WORDS)
    if kind < 8:
        return [value(draw, depth + 1) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
    if kind == 8:
        return [draw.choice(LAYERS) for _ in range(draw.randrange(5))]
    return {draw.choice(("a", "stride", "name", "")): value(draw, depth + 1)}


def written(item: Any) -> str:
    """A value as TOML."""
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, str):
        return json.dumps(item)
    if isinstance(item, list):
        return f"[{', '.join(map(written, item))}]"
    if isinstance(item, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {written(v)}" for k, v in item.items()) + "}"
    return str(item)


SHIPPED = [
    path.read_text(encoding="utf-8") for path in sorted(configs.shipped("configs").glob("*.toml"))
]
NETWORKS = (
    [["linear", 4], ["dropout", 0.1], ["linear", "classes"]], [["linear", "classes"]],
    [["conv2d", 2, 3], ["relu"], ["dropout", [0.1, 0.2]], ["linear", "classes"]],
)  # fmt: skip


def fitting(kind: Any, draw: Draw) -> Any:
    """A value of the type of a key, mostly one that it can have."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return draw.choice(inside)
    if inside == (tuple[Any, ...], ...):
        return draw.choice(NETWORKS)
    if origin is tuple:
        return [fitting(inside[0], draw) for _ in range(draw.choice((1, 2, 2, 3)))]
    if inside:
        return fitting(draw.choice([k for k in inside if k is not NoneType]), draw)
    if kind is bool:
        return draw.choice((True, False))
    if kind is str:
        return draw.choice(("hflip", "shift:2", "a", "b.csv"))
    return draw.choice((0, 1, 2, 10)) if kind is int else draw.choice((0.0, 0.1, 0.5, 1, 0.25))


def assignments(draw: Draw, count: int, wild: float = 0.15) -> list[tuple[str, Any]]:
    pairs = []
    for _ in range(count):
        key = draw.choice(list(KEYS))
        kind = KEYS[key]
        if draw.random() < wild / 3:
            key = draw.choice((key[:-1], key + ".x", "train", "run", "grid", "", "..", "é", "a b"))
        item = value(draw) if draw.random() < wild else fitting(kind, draw)
        if draw.random() < 0.05:
            key, item = "model.layers.0.1", draw.choice((3, [1, 2], "classes"))
        pairs.append((key, item))
    return pairs


def make_toml(draw: Draw) -> bytes:
    kind = draw.random()
    if kind < 0.2:
        return mutate(draw.choice(SHIPPED).encode(), draw)
    lines = [] if kind < 0.9 else draw.choice(SHIPPED).splitlines()
    for key, item in dict(assignments(draw, draw.choice((1, 2, 3, 6)))).items():
        table, _, name = key.rpartition(".")
        lines += [f"[{table}]", f"{name} = {written(item)}"] if draw.random() < 0.1 else []
        lines.insert(0, f"{key} = {written(item)}")
    for _ in range(draw.choice((0, 0, 0, 1, 2, 3))):
        lines.append("[[run]]")
        lines += [f"label = {written(draw.choice(('a', 'b', '', 3)))}"] * (draw.random() < 0.7)
        lines += [
            f"{key} = {written(item)}" for key, item in assignments(draw, draw.choice((1, 2)))
        ]
    if draw.random() < 0.2:
        lines.append("[grid]")
        for key, item in assignments(draw, draw.choice((1, 2, 3))):
            other = fitting(KEYS.get(key, int), draw) if draw.random() < 0.8 else value(draw)
            items = item if isinstance(item, list) and draw.random() < 0.3 else [item, other]
            quoted = json.dumps(key) if draw.random() < 0.8 else key
            lines.append(f"{quoted} = {written(items)}")
    if draw.random() < 0.01:
        key = draw.choice(("x", "train.seed", "train.l2"))
        lines = [f"{key} = " + draw.choice(("[" * 50, "[" * 2000, "9" * 5000, "0x" + "f" * 5000))]
    data = "\n".join(lines).encode()
    return mutate(data, draw) if draw.random() < 0.1 else data


def check_toml(folder: Path, data: bytes, draw: Draw) -> bool:
    path = folder / "fuzz.toml"
    path.write_bytes(data)
    sets = [
        f"{key}={written(item)}" for key, item in assignments(draw, draw.choice((0, 0, 0, 1, 2)))
    ]
    sets += [draw.choice(("", "=", "a", "train.epochs", "train.epochs=", "x=[", "..=1", "=3"))] * (
        draw.random() < 0.05
    )
    grid = [f"{k}={written([v])}" for k, v in assignments(draw, draw.choice((0, 0, 0, 0, 1)))]
    [config] = _one(lambda: load_config(path, sets, None, grid))
    if config is None:
        return False
    text = config.to_toml()
    path.write_text(text, encoding="utf-8")
    again = load_config(path)
    assert again == config or repr(again) == repr(config), (
        "another config comes back from its own TOML"
    )
    assert again.to_toml() == text
    _one(config.populations, config.expand)
    return True


# Weights files
class Weight:
    """Good weights files, and their parts, made once."""

    def __init__(self) -> None:
        self.files, self.contents = [], []
        specs = (
            ([["linear", 3], ["relu"], ["linear", "classes"]], (1, 2, 2), 3),
            ([["conv2d", 2, 2], ["max_pool2d", 2], ["linear", "classes"]], (1, 4, 4), 2),
        )
        with tempfile.TemporaryDirectory() as folder:
            for layers, shape, classes in specs:
                network, path = Network(layers, shape, classes), Path(folder) / "w.pkl"
                network.initialize([0])
                split = {
                    "source": "train",
                    "valid": 0.1,
                    "stratify": False,
                    "seed": 0,
                    "corruption": 0.0,
                }
                meta = {
                    "run": "a", "seed": 0, "dataset": "mnist", "loss": "cross_entropy",
                    "split": split,
                    "normalization": {
                        "kind": "standard", "mean": 0.5, "std": 2.0, "permute_seed": None,
                    },
                    "class_names": [str(k) for k in range(classes)], "manualnn": "1",
                }  # fmt: skip
                save_weights(path, network, meta)
                self.files.append(path.read_bytes())
                self.contents.append(torch.load(path, weights_only=True))
            foreign = {"w1": torch.ones(4, 3), "b1": torch.zeros(3), "w2": torch.ones(3, 2)}
            state = {
                "epoch": 3,
                "training": {"theta": torch.ones(2, 9), "records": [{"loss": 0.5}] * 3},
            }
            for content in (foreign, state):
                torch.save(content, path)
                self.files.append(path.read_bytes())
                self.contents.append(content)


class Called:
    """Pickled as a call of something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


# Opcodes of a pickle and arguments, from which pickles are put together.
PIECES = (
    b"}", b"]", b")", b"(", b"t", b"u", b"s", b"e", b"a", b"R", b"b", b"Q", b".", b"N", b"\x88",
    b"\x85", b"\x86", b"\x87", b"0", b"2", b"\x81", b"\x93", b"\x8f", b"K\x05",
    b"J\xff\xff\xff\xff", b"M\x10\x27", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"G\x7f\xf0" + bytes(6), b"X\x02\x00\x00\x00w1", b"q\x01", b"h\x01",
    b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu", b"q\x00", b"h\x00",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n",
    b"ctorch\ndevice\n", b"ctorch\nfloat32\n", b"cbuiltins\nbytearray\n", b"cos\nsystem\n",
    b"ctorch\nTensor\n", b"c__builtin__\nset\n", b"\x80\x02",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"X\x04\x00\x00\x00meta", b"I99999\n",
    b"r\xff\xff\xff\xff",
)  # fmt: skip


def archive(records: dict[str, bytes], draw: Draw, packed: bool = False) -> bytes:
    """A zip archive with right checksums."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as file:
        warnings.simplefilter("ignore")
        for name, content in records.items():
            file.writestr(zipfile.ZipInfo(f"w/{name}"), content, kind)
            if draw.random() < 0.005:
                file.writestr(zipfile.ZipInfo(f"w/{name}"), content)
    return out.getvalue()


def make_pkl(draw: Draw, made: list[Weight] = []) -> bytes:  # noqa: B006
    good = made or made.append(Weight()) or made
    number = draw.randrange(4)
    data, content = good[0].files[number], good[0].contents[number]
    kind = draw.random()
    if kind < 0.1:
        return mutate(data, draw)
    if kind < 0.55:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
        pickled = records["data.pkl"]
        if kind < 0.3:
            records["data.pkl"] = mutate(pickled, draw)
        elif kind < 0.4:  # opcodes put in somewhere
            at = draw.randrange(len(pickled))
            pieces = b"".join(draw.choices(PIECES, k=draw.choice((1, 2, 5))))
            records["data.pkl"] = pickled[:at] + pieces + pickled[at + draw.choice((0, 1, 3)) :]
        elif kind < 0.5:
            pieces = b"".join(draw.choices(PIECES, k=draw.choice((3, 10, 40))))
            records["data.pkl"] = b"\x80\x02" + pieces + b"."
        else:
            name = draw.choice(list(records))
            if draw.random() < 0.5:
                del records[name]
            else:
                records[name] = mutate(records[name], draw)
        return archive(records, draw, draw.random() < 0.05)
    if kind < 0.62:
        call = draw.choice(
            ((print, ("called",)), (eval, ("1",)), (bytearray, (10**12,)), (set, ([1],)))
        )
        bare = pickle.dumps({"w1": Called(*call), "x": [1.5]}, draw.randrange(6))
        if draw.random() < 0.4:
            bare = mutate(bare, draw)
        return bare if draw.random() < 0.5 else archive({"data.pkl": bare, "version": b"3"}, draw)
    content = dict(content)
    if isinstance(content.get("meta"), dict):
        content["meta"] = meta = json.loads(json.dumps(content["meta"]))
        for _ in range(draw.choice((1, 1, 2, 3))):
            table = draw.choice((meta, meta, meta["normalization"], meta["split"]))
            table = table if isinstance(table, dict) else meta
            key = draw.choice([*table, "train_samples", "classes", "labels", "x"])
            if draw.random() < 0.15:
                table.pop(key, None)
            else:
                table[key] = draw.choice(
                    (value(draw), draw.choice(LAYERS), [draw.choice(LAYERS)] * 3)
                )
            if not isinstance(meta.get("normalization"), dict) or not isinstance(
                meta.get("split"), dict
            ):
                break
    if draw.random() < 0.4:
        key = draw.choice([key for key in content if key != "meta"])
        content[key] = tensor(draw)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantised and sparse tensors
        try:
            torch.save(content, out)
        except (OverflowError, RuntimeError):
            return data
    return out.getvalue()


def tensor(draw: Draw) -> Any:
    """Something in the place of a parameter."""
    shape = [draw.choice((0, 1, 2, 3, 4, 5)) for _ in range(draw.choice((0, 1, 2, 2, 3, 4)))]
    base = torch.zeros(shape)
    return draw.choice(
        (
            lambda: base,
            lambda: base.to(draw.choice((torch.int8, torch.bool, torch.complex64, torch.float16))),
            lambda: base.to(draw.choice((torch.float64, torch.bfloat16, torch.float8_e4m3fn))),
            lambda: torch.zeros(1).expand(draw.choice((5, 10**6)), draw.choice((3, 10**6))),
            lambda: torch.zeros(2, 2).to_sparse(),
            lambda: torch.empty(10**6, 10**6, device="meta"),
            lambda: torch.nn.Parameter(torch.ones(4, 3)),
            lambda: torch.full((4, 3), math.nan),
            lambda: torch.ones(3, 4).t(),
            lambda: torch.zeros(100)[3:15].view(4, 3),
            lambda: value(draw),
        )
    )()


def check_pkl(folder: Path, data: bytes, draw: Draw) -> bool:
    path, table = folder / "weights.pkl", folder / "examples.csv"
    path.write_bytes(data)
    scanned, loaded = _one(lambda: scan(path), lambda: load_weights(path))
    if loaded is None:
        return False
    assert scanned is not None and not scanned.unsafe and not scanned.problem
    network = loaded.network
    assert network.theta.dtype in (torch.float32, torch.float64)
    assert not network.theta.requires_grad and network.theta.shape == (1, network.layout.width)
    assert network.layout.count <= len(data)
    json.dumps(loaded.meta)
    if math.prod(network.shape) < 1000 and draw.random() < 0.3:
        table.write_text(",".join("1" * math.prod(network.shape)) + "\n", encoding="utf-8")
        [found] = _one(lambda: predict_file(path, table))
        assert found is None or found[1].shape == (1, max(2, network.outputs))
        _one(lambda: summarise(path))
    return True


READERS: dict[str, tuple[Callable[[Draw], bytes], Callable[[Path, bytes, Draw], bool]]] = {
    "idx": (make_idx, check_idx),
    "csv": (make_csv, check_csv),
    "toml": (make_toml, check_toml),
    "pkl": (make_pkl, check_pkl),
}
_messages: Counter[str] = Counter()
QUOTED = re.compile(r"\S*/\S*|'[^']*'|[\d.]+|\[.*\]|\(.*\)|\w{30,}")  # what inputs differ in


def _one(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns, None where it says with one line why it does not."""
    found = []
    for call in calls:
        try:
            found.append(call())
        except InputError as error:
            text = str(error)
            assert text.isprintable() and len(text) <= LINE, f"no short line: {text[:300]!r}"
            _messages[QUOTED.sub("", text)] += 1
            found.append(None)
    return found


def _expire(*_: Any) -> None:
    raise TimeoutError(f"no answer in {SECONDS} s")


def attempt(
    reader: str, seed: int, number: int, folder: Path
) -> tuple[bytes, Exception | None, bool]:
    """Input `number` of a seed; what went wrong, if anything; and whether it was accepted."""
    make, check = READERS[reader]
    draw = random.Random(f"{reader} {seed} {number}")
    data = make(draw)
    accepted, error = False, None
    before = signal.signal(signal.SIGALRM, _expire)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            accepted = check(folder, data, draw)
    except Exception as caught:
        error = caught
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return data, error, accepted


def memory() -> int:
    """KiB that this process holds."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


class _Silent(io.TextIOBase):
    """Notes go nowhere; results would be of something executed."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict

    def write(self, text: str) -> int:
        assert not self.strict, f"something printed {text!r}"
        return len(text)


def fuzz(
    reader: str, seed: int, first: int, count: int, keep: Path | None = None
) -> dict[str, Any]:
    """Give a reader `count` inputs; what came of it. Failing inputs are written to `keep`."""
    _messages.clear()
    accepted, failures, at_tenth = 0, [], 0
    slowest, begin = (0.0, -1), time.perf_counter()
    os.environ["MANUALNN_CACHE"] = os.devnull  # nothing is kept: it would be on the disk for ever
    with (
        threads(1),
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(_Silent(True)),
        redirect_stderr(_Silent(False)),
    ):
        for number in range(first, first + count):
            start = time.perf_counter()
            data, error, read = attempt(reader, seed, number, Path(folder))
            slowest = max(slowest, (time.perf_counter() - start, number))
            accepted += read
            if error is not None:
                trace = "".join(traceback.format_exception(error))
                failures.append({"input": number, "error": repr(error)[:300], "trace": trace})
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{reader}-{seed}-{number}").write_bytes(data)
            if number == first + count // 10:
                at_tenth = memory()
    return {
        "reader": reader,
        "seed": seed,
        "inputs": count,
        "accepted": accepted,
        "refused": count - accepted - len(failures),
        "failed": len(failures),
        "messages": len(_messages),
        "seconds": round(time.perf_counter() - begin, 1),
        "slowest": {"seconds": round(slowest[0], 3), "input": slowest[1]},
        "memory_MiB": {"at 10 %": at_tenth // 1024, "at the end": memory() // 1024},
        "failures": failures,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--reader", choices=READERS, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args(arguments)
    result = fuzz(options.reader, options.seed, options.first, options.count, options.keep)
    for failure in result.pop("failures")[:20]:
        print(f"input {failure['input']}: {failure['trace']}")
    print(json.dumps(result, indent=1))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
