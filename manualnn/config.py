"""Experiments as data: frozen dataclasses from strict TOML and back. No torch here.

An unknown key, a wrong type or a value out of range is an InputError that names the file, the line
where it can be found, the key, and the nearest valid one.
"""

import math
import re
import tomllib
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from .errors import InputError, hint
from .files import find_shipped

DEFAULT = "mnist-mlp"
FLAGS = {"data.name": "--data", "data.dir": "--data-dir"}  # others are called as their key ends
Column = float | tuple[float, ...]  # a number, or one per replica


def _range(default: Any, **limits: float) -> Any:
    """A field whose value must be `at_least`, `above`, `at_most` or `below` a limit."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Data:
    """`valid` is a count, or a fraction where it is a float; `seed` is that of the split."""

    name: Literal["mnist", "fashion-mnist", "kmnist", "idx"] = "mnist"
    dir: str | None = None
    class_names: tuple[str, ...] | None = None
    train_samples: int = _range(0, at_least=0)
    valid: int | float = _range(0, at_least=0)
    stratify: bool = False
    seed: int = _range(0, at_least=0)
    normalize: Literal["none", "unit", "standard", "feature"] = "standard"


@dataclass(frozen=True)
class Model:
    """`layers` as `["linear", 128]`, `["linear", "classes"]`, `["dropout", 0.1]`, `["relu"]`."""

    layers: tuple[tuple[Any, ...], ...] = (("linear", "classes"),)
    init: Literal["he", "xavier"] = "he"


@dataclass(frozen=True)
class Optimizer:
    """Keys of another optimizer are kept, unused; `adamw` decouples `train.l2` from the loss."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Column = _range(0.01, at_least=0)
    momentum: Column = _range(0.0, at_least=0)
    nesterov: bool = False
    beta1: float = _range(0.9, at_least=0, below=1)
    beta2: float = _range(0.999, at_least=0, below=1)
    epsilon: float = _range(1e-8, above=0)


@dataclass(frozen=True)
class Schedule:
    """Evaluated per step; see `manualnn.optimizers.schedule` for each formula."""

    name: Literal["constant", "step", "linear", "cosine", "one_cycle"] = "constant"
    warmup_steps: int = _range(0, at_least=0)
    step_epochs: int = _range(10, at_least=1)
    gamma: float = _range(0.1, at_least=0)
    initial_fraction: float = _range(0.04, at_least=0)
    final_fraction: float = _range(0.0, at_least=0)
    peak: float = _range(0.3, at_least=0, at_most=1)


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` epochs without a better `monitor` (0: never); keep the best weights."""

    patience: int = _range(0, at_least=0)
    monitor: Literal["valid_loss", "valid_accuracy"] = "valid_loss"


@dataclass(frozen=True)
class Train:
    """`seeds` makes one replica each and wins over `seed`, which then governs what they share."""

    epochs: int = _range(10, at_least=1)
    batch_size: int = _range(64, at_least=1)
    drop_last: bool = False
    shuffle: bool = True
    shared_batches: bool = False
    loss: Literal["cross_entropy", "squared_error", "softmax_squared_error", "logistic"] = (
        "cross_entropy"
    )
    label_smoothing: float = _range(0.0, at_least=0, below=1)
    l1: Column = _range(0.0, at_least=0)
    l2: Column = _range(0.0, at_least=0)
    seed: int = _range(0, at_least=0)
    seeds: tuple[int, ...] | None = _range(None, at_least=0)
    precision: Literal["fp32", "fp64"] = "fp32"
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    early_stopping: EarlyStopping = EarlyStopping()


@dataclass(frozen=True)
class Replica:
    """One network of a run: its label and its values of the column hyperparameters."""

    label: str
    seed: int
    learning_rate: float
    momentum: float
    l1: float
    l2: float


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on, besides the files of its data set. `name` is the file's."""

    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    name: str = "run"

    def replicas(self) -> list[Replica]:
        """The networks that train together: lists are zipped with each other and with the seeds."""
        train, optimizer = self.train, self.train.optimizer
        columns: dict[str, Column] = {
            "learning_rate": optimizer.learning_rate,
            "momentum": optimizer.momentum,
            "l1": train.l1,
            "l2": train.l2,
        }
        listed = {key: value for key, value in columns.items() if isinstance(value, tuple)}
        for i, layer in enumerate(self.model.layers):
            if layer[0] == "dropout" and len(layer) == 2 and isinstance(layer[1], list):
                listed[f"dropout[{i}]"] = tuple(layer[1])
        lengths = {key: len(values) for key, values in listed.items()}
        if train.seeds is not None:
            lengths["seeds"] = len(train.seeds)
        if len(set(lengths.values())) > 1:
            raise InputError(
                f"{self.name}: lists of different lengths for one population: {lengths}"
            )
        count = next(iter(lengths.values()), 1)
        seeds = train.seeds or (train.seed,) * count

        def value(key: str, i: int) -> float:
            column = columns[key]
            return column[i] if isinstance(column, tuple) else column

        replicas = [
            Replica(
                ", ".join(f"{key} {values[i]}" for key, values in listed.items()) or self.name,
                seeds[i],
                *(value(key, i) for key in columns),
            )
            for i in range(count)
        ]
        if len(set(replicas)) < count:
            raise InputError(f"{self.name}: two networks of the population have the same settings")
        return replicas

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in the TOML file; keys that are not set are left out."""
        return _plain({key: value for key, value in asdict(self).items() if key != "name"})

    def to_toml(self) -> str:
        """The resolved config as TOML, which reproduces it."""
        return tomli_w.dumps(self.to_dict(), multiline_strings=False)


def load_config(
    name: str | Path = DEFAULT, sets: list[str] | None = None, flags: dict[str, Any] | None = None
) -> Config:
    """The config in a file or shipped under a bare name, changed by `sets`, then `flags`.

    `sets` are "key=value"; `flags` maps a dotted key to a value, None where it was not given.
    Raises InputError.
    """
    path = find_shipped(name, "configs", ".toml", "config")
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    origins = {key: f"{path}:{line}" for key, line in _lines(text).items()}
    for assignment in sets or []:
        key, found, raw = assignment.partition("=")
        if not found:
            raise InputError(f"--set {assignment}: write key=value, as in train.epochs=5")
        try:
            value = tomllib.loads(f"value = {raw}")["value"]
        except tomllib.TOMLDecodeError:
            value = raw.strip()  # what is not TOML is a string
        _put(tree, key.strip(), value, f"--set {assignment}")
        origins[key.strip()] = "--set"
    for key, value in (flags or {}).items():
        if value is not None:
            _put(tree, key, value, key)
            origins[key] = FLAGS.get(key, "--" + key.rpartition(".")[2])
    # A run folder's config.toml is called as its folder is.
    name = path.absolute().parent.name if path.name == "config.toml" else path.stem
    return parse_config(tree, name, origins, str(path))


def parse_config(
    tree: dict[str, Any],
    name: str = "run",
    origins: dict[str, str] | None = None,
    default_origin: str = "config",
) -> Config:
    """A Config from nested plain values. `origins` says where a dotted key was set."""
    config = _build(Config, tree, "", origins or {}, default_origin, skip=("name",))
    config = Config(config.data, config.model, config.train, name)
    config.replicas()  # raises where the lists do not fit together
    early = config.train.early_stopping
    if early.patience and not config.data.valid:
        raise InputError(
            f"{default_origin}: train.early_stopping.patience = {early.patience} needs a validation"
            " split: set data.valid"
        )
    return config


def _build(
    cls: type, tree: Any, prefix: str, origins: dict[str, str], default: str, skip: tuple = ()
) -> Any:
    """An instance of dataclass `cls` from a mapping."""
    at = origins.get(prefix.rstrip("."), default)
    if not isinstance(tree, dict):
        raise InputError(f"{at}: {prefix.rstrip('.')} must be a table, not {tree!r}")
    hints = get_type_hints(cls)
    valid = {f.name: f for f in fields(cls) if f.name not in skip}
    values = {}
    for key, value in tree.items():
        where = f"{origins.get(prefix + key, default)}: {prefix}{key}"
        if key not in valid:
            raise InputError(f"{where}: unknown key; {hint(key, valid)}")
        if is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{prefix}{key}.", origins, default)
            continue
        values[key] = _convert(value, hints[key], where)
        _check(values[key], valid[key].metadata, where)
    return cls(**values)


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as type `kind`, or an InputError at `where`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} = {value!r}: unknown; {hint(str(value), arguments)}")
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            if _fits(value, option):
                return _convert(value, option, where)
    elif _fits(value, kind):
        if origin is tuple:
            if arguments == (tuple[Any, ...], ...) and not all(
                isinstance(item, list | tuple) and item and isinstance(item[0], str)
                for item in value
            ):
                raise InputError(f'{where}: each layer is a list that starts with a name: ["relu"]')
            return tuple(
                tuple(item)
                if get_origin(arguments[0]) is tuple
                else _convert(item, arguments[0], where)
                for item in value
            )
        return float(value) if kind is float else value
    raise InputError(f"{where} = {value!r}: must be {_describe(kind)}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and len(value) > 0
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return "a list of layers" if item == tuple[Any, ...] else f"a list, each {_describe(item)}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(k) for k in get_args(kind) if k is not types.NoneType)
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names[kind]


def _check(value: Any, limits: Any, where: str) -> None:
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    tests = {
        "at_least": lambda v, limit: v >= limit,
        "above": lambda v, limit: v > limit,
        "at_most": lambda v, limit: v <= limit,
        "below": lambda v, limit: v < limit,
    }
    for item in value if isinstance(value, tuple) else (value,):
        for name, limit in limits.items():
            if item is not None and not tests[name](item, limit):
                raise InputError(f"{where} = {item!r}: must be {words[name]} {limit:g}")


def _put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set dotted `key` in nested tables."""
    *tables, last = key.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise InputError(f"{where}: {table} is not a table")
    tree[last] = value


def _lines(text: str) -> dict[str, int]:
    """The line of each plain `[table]` and `key = ` of a TOML text, by dotted key."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[([\w.-]+)\]", line):
            table = match[1] + "."
            lines.setdefault(match[1], number)
        elif match := re.match(r"\s*([\w.-]+)\s*=", line):
            lines.setdefault(table + match[1], number)
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
