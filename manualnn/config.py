"""Experiments as data: frozen dataclasses from strict TOML and back. No torch here.

An unknown key, a wrong type or a value out of range is an InputError that names the file, the line
where it can be found, the key, and the nearest valid one.
"""

import copy
import itertools
import math
import re
import tomllib
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InputError, hint
from .files import find_shipped, shipped, user_path

DEFAULT = "mnist-mlp"
# Other flags are called as their key ends.
FLAGS = {"data.name": "--data", "data.train": "--data", "data.dir": "--data-dir"}
CSV_ONLY = ("train", "test", "label", "header")  # keys of data
TABLES = ("data", "model", "train")
FOLDERS = ("csv", "idx", "shards")  # data sets that are where the user says
RANGE = ("low", "high", "log", "step")
DEEPEST = 50  # dots in a key
PLACES = {"data.dir", "data.train"}
Column = float | tuple[float, ...]  # a number, or one per replica


def _range(default: Any, **limits: float) -> Any:
    """A field whose value must be `at_least`, `above`, `at_most` or `below` a limit."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Data:
    """`valid` is a count, or a fraction where it is a float; `seed` is that of the split.

    `train` and `test` are the files of the data set "csv", in place of a folder `dir`; `label` is
    its label's column ("first", "last", a name or a number from 1; None: told by the table), and
    `header` says whether its first line holds names.
    `source` is the file that is split, `use_test` false leaves the test set alone, `permute_seed`
    fixes one random order of the pixels, `augment` is as in `["hflip", "shift:2"]`. `labels` are
    those given or their parity; `corruption` is the fraction of the training labels that random
    classes replace, `test_labels` what the test set is measured against. `memory_mb` is for the
    training examples of "shards", a folder that may be larger than memory.
    """

    name: Literal["mnist", "fashion-mnist", "kmnist", "idx", "csv", "shards"] = "mnist"
    dir: str | None = None
    train: str | None = None
    test: str | None = None
    label: str | int | None = None
    header: Literal["auto", "yes", "no"] | None = None
    class_names: tuple[str, ...] | None = None
    train_samples: int = _range(0, at_least=0)
    valid: int | float = _range(0, at_least=0)
    stratify: bool = False
    seed: int = _range(0, at_least=0)
    normalize: Literal["none", "unit", "standard", "feature"] = "standard"
    source: Literal["train", "test"] = "train"
    permute_seed: int | None = _range(None, at_least=0)
    use_test: bool = True
    augment: tuple[str, ...] | None = None
    labels: Literal["given", "parity"] = "given"
    corruption: Column = _range(0.0, at_least=0, at_most=1)
    test_labels: Literal["same", "given", "parity", "random"] = "same"
    memory_mb: int = _range(512, at_least=1)

    @property
    def place(self) -> str | dict[str, str] | None:
        """Where the files are: a folder, or the file of each part; and how tables are read."""
        return data_place(self.dir, self.train, self.test, self.label, self.header)

    @property
    def title(self) -> str:
        """What figures call the data: the data set's name, or that of the own folder or file."""
        own = self.train or self.test or self.dir
        name = Path(own).name if own and self.name in FOLDERS else self.name
        return f"a split of {name}'s test images" if self.source == "test" else name


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
    epsilon: float = _range(1e-8, at_least=1e-37)  # what is less is no normal float32


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
    """`seeds` makes one replica each and wins over `seed`, which then governs what they share.

    `class_weights` scale the gradient of a sample by its class; "balanced" gives every class the
    same sum. `precision`: bf16 rounds the factors of large products (on a GPU of all), tf32 those
    of a GPU; weights and sums stay in fp32. `compile` gives the step to torch.compile.
    `target_accuracy` only has the first epoch that reaches it reported. Besides after each epoch a
    checkpoint is written every `checkpoint_every_steps` (0: no more).
    """

    epochs: int = _range(10, at_least=1)
    batch_size: int = _range(64, at_least=1)
    drop_last: bool = False
    shuffle: bool = True
    shared_batches: bool = False
    loss: Literal["cross_entropy", "squared_error", "softmax_squared_error", "logistic"] = (
        "cross_entropy"
    )
    label_smoothing: float = _range(0.0, at_least=0, below=1)
    class_weights: Literal["balanced"] | tuple[float, ...] | None = _range(None, at_least=0)
    l1: Column = _range(0.0, at_least=0)
    l2: Column = _range(0.0, at_least=0)
    seed: int = _range(0, at_least=0)
    seeds: tuple[int, ...] | None = _range(None, at_least=0)
    precision: Literal["fp32", "fp64", "bf16", "tf32"] = "fp32"
    compile: bool = False
    evaluate_every: int = _range(1, at_least=1)
    checkpoint_every_steps: int = _range(0, at_least=0)
    target_accuracy: float = _range(0.0, at_least=0, at_most=1)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    early_stopping: EarlyStopping = EarlyStopping()


@dataclass(frozen=True)
class Range:
    """The values of a key of the grid from `low` to `high`, both included: whole numbers where all
    are, `step` apart where that is given, evenly on a log scale with `log`."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None


Values = tuple[Any, ...] | Range  # of a key of the grid


@dataclass(frozen=True)
class Replica:
    """One network of a run: its label and its values of the column hyperparameters, with the
    probability of each dropout layer in `drop_rates`."""

    label: str
    seed: int
    learning_rate: float
    momentum: float
    l1: float
    l2: float
    corruption: float
    drop_rates: tuple[Any, ...]

    @property
    def plain(self) -> bool:
        """Whether a step needs the gradient for nothing but to subtract a multiple of it."""
        return self.momentum == self.l1 == self.l2 == 0


@dataclass(frozen=True)
class Population:
    """Networks that train together: their settings are `config`'s but for the columns."""

    config: "Config"
    replicas: tuple[Replica, ...]

    def layers(self, *replicas: Replica) -> list[list[Any]]:
        """`model.layers` with the dropout probabilities of `replicas` (of all where none given)."""
        chosen = replicas or self.replicas
        layers = [list(layer) for layer in self.config.model.layers]
        for number, i in enumerate(_dropouts(self.config.model)):
            values = [replica.drop_rates[number] for replica in chosen]
            layers[i][1] = values if any(value != values[0] for value in values) else values[0]
        return layers


@dataclass(frozen=True)
class Config:
    """Everything that an experiment depends on, besides the files of its data set.

    `name` is the file's. `overrides` are the `[[run]]` tables as they were written, `runs` what
    each makes of the rest, with its `label`; without any the config itself is the only run. `grid`
    has the values of each dotted key that a sweep combines, or a range of them that a study draws
    from; nothing else reads it.
    """

    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    name: str = "run"
    label: str = ""
    overrides: tuple[dict[str, Any], ...] = ()
    runs: "tuple[Config, ...]" = ()
    grid: tuple[tuple[str, Values], ...] = ()

    def members(self) -> "tuple[Config, ...]":
        """The runs, each a config without `[[run]]`."""
        return self.runs or (self,)

    def replicas(self) -> list[Replica]:
        """The networks of a single run: lists are zipped with each other and with the seeds."""
        train, optimizer = self.train, self.train.optimizer
        columns: dict[str, Any] = {
            "learning_rate": optimizer.learning_rate,
            "momentum": optimizer.momentum,
            "l1": train.l1,
            "l2": train.l2,
            "corruption": self.data.corruption,
        }
        dropouts = {f"dropout[{i}]": self.model.layers[i][1] for i in _dropouts(self.model)}
        settings = columns | dropouts
        listed = {key: v for key, v in settings.items() if isinstance(v, list | tuple)}
        lengths = {key: len(values) for key, values in listed.items()}
        if train.seeds is not None:
            lengths["seeds"] = len(train.seeds)
        where = f"{self.name}, run {self.label!r}" if self.label else self.name
        if 0 in lengths.values():
            raise InputError(f"{where}: an empty list of dropout probabilities")
        if len(set(lengths.values())) > 1:
            raise InputError(f"{where}: lists of different lengths for one population: {lengths}")
        count = next(iter(lengths.values()), 1)
        seeds = train.seeds or (train.seed,) * count
        replicas = []
        for i in range(count):
            own = settings | {key: values[i] for key, values in listed.items()}
            changed = ", ".join(f"{key} {own[key]}" for key in listed)
            label = ", ".join(filter(None, (self.label, changed))) or self.name
            rates = tuple(own[key] for key in dropouts)
            numbers = {key: own[key] for key in columns}
            replicas.append(Replica(label, seeds[i], **numbers, drop_rates=rates))
        if len(set(map(repr, replicas))) < count:
            raise InputError(f"{where}: two networks of the population have the same settings")
        return replicas

    def populations(self) -> list[Population]:
        """All networks, those that differ in columns alone together, in the order of the runs."""
        groups: dict[str, Population] = {}
        for member in self.members():
            key = repr(without_columns(member))
            before = groups[key].replicas if key in groups else ()
            first = groups[key].config if key in groups else member
            groups[key] = Population(first, (*before, *member.replicas()))
        names = [(r.label, r.seed) for group in groups.values() for r in group.replicas]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{self.name}: two networks are called {twice[0][0]!r}")
        return list(groups.values())

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in the TOML file; keys that are not set are left out."""
        tree: dict[str, Any] = {key: asdict(getattr(self, key)) for key in TABLES}
        tree |= {"run": list(self.overrides)} if self.overrides else {}
        return _plain(tree | ({"grid": dict(self.grid)} if self.grid else {}))

    def expand(self) -> "Config":
        """The config with one run for each combination of the grid's values, in its order; each
        run's label says them. Raises InputError where there is no grid."""
        names, points = self.factors(), self.points()
        labels = [", ".join(f"{names[k]} {word(v)}" for k, v in p.items()) for p in points]
        return self.at(points, labels)

    def points(self) -> list[dict[str, Any]]:
        """The combinations of the grid's values, in its order, each with a value of every key.
        Raises InputError where there is no grid, or a range in it."""
        if not self.grid:
            raise InputError(f"{self.name}: there is no [grid] to sweep over; give --grid KEY=LIST")
        lists = []
        for key, values in self.grid:
            if isinstance(values, Range):
                raise InputError(
                    f"{self.name}: grid.{key} is a range, which has no end of values: give a list,"
                    " or --sampler random or tpe"
                )
            lists.append(values)
        keys = [key for key, _ in self.grid]
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]

    def at(self, points: list[dict[str, Any]], labels: list[str]) -> "Config":
        """The config with one run for each of the points, which give keys of the grid values, under
        its label. Raises InputError."""
        tree = self.to_dict()
        tree.pop("grid", None)
        runs = []
        for point, label in zip(points, labels, strict=True):
            run: dict[str, Any] = {}
            for key, value in point.items():
                _assign(tree, run, key, value, self.name)
            runs.append({"label": label} | run)
        return parse_config(tree | {"run": runs}, self.name)

    def factors(self) -> dict[str, str]:
        """A short name for each key of the grid."""
        short = {}
        for key, _ in self.grid:
            # train.optimizer.name is the optimizer, data.name the data.
            short[key] = key.removesuffix(".name").rpartition(".")[2]
            if match := re.fullmatch(r"model\.layers\.(\d+)\.([01])", key):
                layer = self.model.layers[int(match[1])][0]
                sizes = {"linear": "units", "conv2d": "channels"}
                short[key] = "activation" if match[2] == "0" else sizes.get(layer, layer)
            elif key.startswith("model.layers."):
                short[key] = key.removeprefix("model.")
        many = [name for name in short.values() if list(short.values()).count(name) > 1]
        return {key: key if name in many else name for key, name in short.items()}

    def to_toml(self) -> str:
        """The resolved config as TOML, which reproduces it."""
        import tomli_w  # only where TOML is written: a handed-in copy goes without

        return tomli_w.dumps(self.to_dict(), multiline_strings=False)


def load_config(
    name: str | Path = DEFAULT,
    sets: list[str] | None = None,
    flags: dict[str, Any] | None = None,
    grid: list[str] | None = None,
) -> Config:
    """The config in a file or a run's folder, or shipped under a bare name, changed by `sets`,
    `flags`, then `grid`.

    `sets` are "key=value", `grid` "key=list"; `flags` maps a dotted key to a value, None where it
    was not given. Raises InputError.
    """
    inside = Path(name) / "config.toml"  # of a run's folder
    path = inside if inside.is_file() else find_shipped(name, "configs", ".toml", "config")
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid TOML: nested too deep") from None
    origins = {key: f"{path}:{line}" for key, line in _lines(text).items()}
    if isinstance(tree.get("grid"), dict):
        flat = list(flatten(tree["grid"]))
        if len(dict(flat)) == len(flat):  # else it is refused below, with its line
            tree["grid"] = dict(flat)
    for assignment in sets or []:
        key, value = _assignment("--set", assignment)
        put(tree, key, value, f"--set {assignment}")
        origins[key] = "--set"
    flags = flags or {}
    given = {key for key, value in flags.items() if value is not None}
    # Another data set, or another place of it, takes the place of the file's.
    other, data = flags.get("data.name"), tree.get("data")
    own = data.get("name", "mnist") if isinstance(data, dict) else "mnist"
    moved = other not in (None, own) and {own, other} & set(FOLDERS)
    no_csv = other not in (None, "csv")
    dropped = ["data.train", "data.test"] if given & PLACES or no_csv else []
    dropped += ["data.label", "data.header"] if no_csv else []
    for key in [*dropped, *(["data.dir"] if given & PLACES or moved else [])]:
        put(tree, key, None, key)
    for key, value in flags.items():
        if value is not None:
            put(tree, key, value, key)
            origins[key] = FLAGS.get(key, "--" + key.rpartition(".")[2])
    for assignment in grid or []:
        key, value = _assignment("--grid", assignment)
        table = tree.setdefault("grid", {})
        if isinstance(table, dict):
            table[key] = value
        origins[f"grid.{key}"] = "--grid"
    # A run folder's config.toml is called as its folder is.
    stem = path.absolute().parent.name if path.name == "config.toml" else path.stem
    if other and (prefix := _prefix(stem)) not in ("", other):
        renamed = other + stem.removeprefix(prefix)  # kmnist-cnn on mnist is mnist-cnn
        taken = (shipped("configs") / f"{renamed}.toml").is_file()
        stem = f"{stem}-{other}" if taken else renamed
    return parse_config(tree, stem, origins, str(path))


def _assignment(option: str, text: str) -> tuple[str, Any]:
    """The key and value of KEY=VALUE; a value that is not TOML is a string."""
    key, found, raw = text.partition("=")
    if not found:
        example = "train.l2=[0, 1e-4]" if option == "--grid" else "train.epochs=5"
        raise InputError(f"{option} {text}: write key=value, as in {example}")
    try:
        return key.strip(" \"'"), tomllib.loads(f"value = {raw}")["value"]
    except ValueError:
        return key.strip(" \"'"), raw.strip()
    except RecursionError:
        raise InputError(f"{option} {key}: nested too deep") from None


def data_place(
    folder: str | None,
    train: str | None = None,
    test: str | None = None,
    label: str | int | None = None,
    header: str | None = None,
) -> str | dict[str, str] | None:
    """Where a data set is, as `data.load` takes it: a folder, or a mapping that has the file of
    each part (or the folder as "dir"), and the user's word on a table's label and header."""
    named = {"train": train, "test": test}
    files = {part: path for part, path in named.items() if path is not None}
    asked = {key: str(x) for key, x in (("label", label), ("header", header)) if x is not None}
    if asked and folder is not None:
        files["dir"] = folder
    return files | asked if files or asked else folder


def data_flags(
    value: str | None, data_dir: str | None, label: str | None = None, header: str | None = None
) -> dict[str, str | None]:
    """The keys that `--data NAME|PATH`, `--data-dir`, `--label` and `--header` set: a path is a CSV
    file to train on, or a folder of CSV, idx or shard files. Raises InputError."""
    read = {"data.label": label, "data.header": header}
    return _data_flags(value, data_dir) | {key: x for key, x in read.items() if x is not None}


def data_source(
    value: str | None,
    data_dir: str | None,
    part: str,
    label: str | None = None,
    header: str | None = None,
) -> tuple[str | None, str | dict[str, str] | None]:
    """The data set's name (None: not given) and its place, as `data.load` takes it, that the flags
    of `data_flags` mean for one part. Raises InputError."""
    flags = data_flags(value, data_dir)
    name, file = flags["data.name"], flags.get("data.train")
    if name is not None:
        check_table_flags(name, str(value), label, header)
    files = {part: file} if file else {}
    return name, data_place(flags.get("data.dir"), **files, label=label, header=header)


def check_table_flags(name: str, shown: str, label: str | None, header: str | None) -> None:
    """Raise InputError where --label or --header is given for data that are no CSV files."""
    if name != "csv" and (label or header):
        raise InputError(f"--{'label' if label else 'header'} is for CSV files, not {shown}")


def _data_flags(value: str | None, data_dir: str | None) -> dict[str, str | None]:
    known = get_args(get_type_hints(Data)["name"])
    path = user_path(value or "")
    is_name = value in known and not (value in FOLDERS and data_dir is None and path.is_dir())
    if value is None or is_name or not (path.exists() or path.suffix or "/" in value):
        return {"data.name": value, "data.dir": data_dir}
    if data_dir is not None:
        raise InputError(f"--data {value} is a path; leave out --data-dir")
    if path.is_file():
        return {"data.name": "csv", "data.train": value}
    if not path.is_dir():
        raise InputError(f"--data {value}: neither a data set nor a file or folder")
    name = "csv" if any(path.glob("train.csv*")) or any(path.glob("test.csv*")) else "idx"
    unfinished = name == "idx" and any(path.glob("*-[0-9]*-images.npy"))  # which is said later
    name = "shards" if (path / "manifest.json").is_file() or unfinished else name
    return {"data.name": name, "data.dir": value}


def _prefix(name: str) -> str:
    """The data set that a config's name begins with, if any."""
    known = get_args(get_type_hints(Data)["name"])
    return max((data for data in known if name.startswith(f"{data}-")), key=len, default="")


def parse_config(
    tree: dict[str, Any],
    name: str = "run",
    origins: dict[str, str] | None = None,
    default_origin: str = "config",
) -> Config:
    """A Config from nested plain values. `origins` says where a dotted key was set."""
    origins = origins or {}
    _check_size(tree, "", origins, default_origin)
    base = {key: value for key, value in tree.items() if key not in ("run", "grid")}
    overrides = tree.get("run", [])
    where = origins.get("run", default_origin)
    if not isinstance(overrides, list) or not all(isinstance(table, dict) for table in overrides):
        raise InputError(f"{where}: run must be tables, each headed [[run]]")
    runs: list[Config] = []
    for i, table in enumerate(overrides):
        prefix = f"run.{i}."
        label = table.get("label", f"run {i + 1}")
        at = origins.get(f"{prefix}label", where)
        if not isinstance(label, str) or not label:
            raise InputError(f"{at}: run.label = {label!r}: must be a string")
        if label in [run.label for run in runs]:
            raise InputError(f"{at}: run.label = {label!r}: another run has it")
        changes = {key: value for key, value in table.items() if key != "label"}
        own = {
            key.removeprefix(prefix): at for key, at in origins.items() if key.startswith(prefix)
        }
        merged = _merge(base, changes)
        runs.append(_parse_single(merged, name, origins | own, at, label))
    config = _parse_single(base, name, origins, default_origin, check=not runs)
    grid = _parse_grid(tree.get("grid", {}), config, origins, default_origin)
    if grid and runs:
        raise InputError(f"{where}: [[run]] and [grid] do not go together")
    return replace(config, overrides=tuple(overrides), runs=tuple(runs), grid=grid)


def _check_size(value: Any, key: str, origins: dict[str, str], default: str) -> None:
    """Refuse numbers that TOML does not know, and values nested without end."""
    where = f"{origins.get(key, default)}: {key}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{where}: a whole number of more than 64 bits")
    if key.count(".") > DEEPEST:
        raise InputError(f"{where}: nested too deep")
    inside = value.items() if isinstance(value, dict) else ()
    for name, item in enumerate(value) if isinstance(value, list | tuple) else inside:
        _check_size(item, f"{key}.{name}" if key else str(name), origins, default)


def _parse_grid(
    table: Any, config: Config, origins: dict[str, str], default: str
) -> tuple[tuple[str, Values], ...]:
    """The values of each dotted key; an InputError where the config cannot take one of them."""
    if not isinstance(table, dict):
        raise InputError(f"{origins.get('grid', default)}: grid must be a table, not {table!r}")
    base, grid = config.to_dict(), list[tuple[str, Values]]()
    flat = list(flatten(table))
    for key, values in flat:
        lines = (f"grid.{key}".rsplit(".", up)[0] for up in range(key.count(".") + 1))
        at = next((origins[line] for line in lines if line in origins), default)
        if [other for other, _ in flat].count(key) > 1:
            raise InputError(f"{at}: grid.{key} stands there twice")
        if above := [other for other, _ in flat if key.startswith(f"{other}.")]:
            raise InputError(f"{at}: grid.{key} is a part of grid.{above[0]}; vary one of them")
        where = f"{at}: grid.{key}"
        limits = None
        if isinstance(values, dict):
            limits = _parse_range(values, key, at)
            values = [limits.low, limits.high]
        if not isinstance(values, list) or not values:
            example = "[0, 1e-4] or ['relu', 'tanh'], or a range, as in {low = 1e-3, high = 1.0}"
            raise InputError(f"{where} = {values!r}: must be a list, as in {example}")
        if any(values.count(value) > 1 for value in values):
            raise InputError(f"{where} = {values!r}: a value stands there twice")
        taken = []
        for value in values:
            run: dict[str, Any] = {}
            _assign(base, run, key, value, f"{at}: grid")
            single = _parse_single(
                _merge(base, run), config.name, origins | {key: f"{at}: grid"}, at
            )
            taken.append(_look(single.to_dict(), key))
        grid.append((key, tuple(values) if limits is None else _of_kind(limits, taken, where)))
    # Ranges last, as TOML has its tables.
    return tuple(sorted(grid, key=lambda item: isinstance(item[1], Range)))


def _parse_range(table: dict[str, Any], key: str, at: str) -> Range:
    """A range of the grid from its table; an InputError at `at` where there is none between its
    ends."""
    where = f"{at}: grid.{key}"
    for name in table:
        if name not in RANGE:
            raise InputError(f"{where}.{name}: unknown key; {hint(name, RANGE)}")
    if missing := [name for name in ("low", "high") if name not in table]:
        raise InputError(f"{where}: a range needs {missing[0]}, as in {{low = 1e-3, high = 1.0}}")
    limits: Range = _build(Range, table, f"grid.{key}.", {}, at)
    if not limits.low < limits.high:
        raise InputError(f"{where}: low = {limits.low!r} must be below high = {limits.high!r}")
    if limits.log and limits.low <= 0:
        raise InputError(f"{where}: low = {limits.low!r} must be above 0 where log = true")
    if limits.step is not None:
        if limits.log:
            raise InputError(f"{where}: log and step do not go together")
        if limits.step <= 0:
            raise InputError(f"{where}: step = {limits.step!r} must be above 0")
        low, high, step = (Decimal(str(x)) for x in (limits.low, limits.high, limits.step))
        if (high - low) % step:
            raise InputError(f"{where}: no number of steps of {limits.step!r} leads to high")
    return limits


def _of_kind(limits: Range, taken: list[Any], where: str) -> Range:
    """The range as the config takes its ends: of floats where it made one a float."""
    numbers = [limits.low, limits.high, *([] if limits.step is None else [limits.step])]
    if all(isinstance(number, int) for number in (*numbers, *taken)):
        return limits
    if all(isinstance(number, int | float) for number in taken):
        step = None if limits.step is None else float(limits.step)
        return replace(limits, low=float(limits.low), high=float(limits.high), step=step)
    raise InputError(f"{where}: a range is for a key that takes a number")


def _look(tree: Any, key: str) -> Any:
    """What stands under a dotted key, whose numbers are places in lists."""
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def flatten(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables, but for those that are ranges of a grid."""
    for key, value in table.items():
        if isinstance(value, dict) and not any(name in value for name in RANGE):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _assign(base: dict[str, Any], run: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put a grid's value into a run's changes of `base`. A number in `key` is a place in a list, of
    which the run then has a copy."""
    parts, value = key.split("."), copy.deepcopy(value)
    count = next((i for i, part in enumerate(parts) if i and part.isdecimal()), len(parts))
    *tables, name = parts[:count]
    inside: Any = base
    for table in tables:
        run = run.setdefault(table, {})
        inside = inside.get(table) if isinstance(inside, dict) else None
    if count == len(parts):
        run[name] = value
        return
    old = inside.get(name) if isinstance(inside, dict) else None
    items: Any = run.setdefault(name, copy.deepcopy(old))
    for part in parts[count:-1]:
        items = items[_place(items, part, f"{where}: {key}")]
    items[_place(items, parts[-1], f"{where}: {key}")] = value


def _place(items: Any, name: str, where: str) -> int:
    if not isinstance(items, list) or not name.isdecimal() or int(name) >= len(items):
        size = len(items) if isinstance(items, list) else 0
        raise InputError(f"{where}: {name} is no place in a list of {size}, counted from 0")
    return int(name)


def word(value: Any) -> str:
    """A value for a reader: numbers in their shortest form."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else str(value)


def _parse_single(
    tree: dict[str, Any],
    name: str,
    origins: dict[str, str],
    default: str,
    label: str = "",
    check: bool = True,
) -> Config:
    config = _build(Config, tree, "", origins, default, valid=TABLES)
    config = replace(config, name=name, label=label)
    if check:
        config.replicas()  # raises where the lists do not fit together
        only = [key for key in CSV_ONLY if getattr(config.data, key) is not None]
        if only and config.data.name != "csv":
            raise InputError(
                f"{origins.get(f'data.{only[0]}', default)}: data.{only[0]} is for"
                f" data.name = 'csv', not {config.data.name!r}"
            )
        files = [key for key in only if key in ("train", "test")]
        if files and config.data.dir is not None:
            at = origins.get(f"data.{files[0]}", default)
            raise InputError(f"{at}: data.{files[0]} and data.dir do not go together")
        early = config.train.early_stopping
        if early.patience and not config.data.valid:
            raise InputError(
                f"{default}: train.early_stopping.patience = {early.patience} needs a validation"
                " split: set data.valid"
            )
    return config


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `changes` in place of its own, table by table."""
    merged = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _dropouts(model: Model) -> list[int]:
    """Where in `model.layers` the dropout layers are."""
    return [i for i, layer in enumerate(model.layers) if layer[0] == "dropout" and len(layer) == 2]


def without_columns(member: Config) -> dict[str, Any]:
    """What two runs must share to train as one population: all but the columns and seeds."""
    tree = member.to_dict()
    for i in _dropouts(member.model):
        tree["model"]["layers"][i][1] = 0
    for table, key in (
        (tree["data"], "corruption"),
        *((tree["train"], key) for key in ("l1", "l2", "seeds")),
        *((tree["train"]["optimizer"], key) for key in ("learning_rate", "momentum")),
    ):
        table.pop(key, None)
    if not member.train.shared_batches:
        tree["train"].pop("seed")
    return tree


def _build(
    cls: type, tree: Any, prefix: str, origins: dict[str, str], default: str, valid: Any = None
) -> Any:
    """An instance of dataclass `cls` from a mapping; `valid` limits its keys."""
    at = origins.get(prefix.rstrip("."), default)
    if not isinstance(tree, dict):
        raise InputError(f"{at}: {prefix.rstrip('.')} must be a table, not {tree!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if not valid or f.name in valid}
    values = {}
    for key, value in tree.items():
        where = f"{origins.get(prefix + key, default)}: {prefix}{key}"
        if key not in known:
            raise InputError(f"{where}: unknown key; {hint(key, known)}")
        if is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{prefix}{key}.", origins, default)
            continue
        values[key] = _convert(value, hints[key], where)
        _check(values[key], known[key].metadata, where)
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
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and len(value) > 0
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f'"{name}"' for name in get_args(kind))
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
            if isinstance(item, int | float) and not tests[name](item, limit):
                raise InputError(f"{where} = {item!r}: must be {words[name]} {limit:g}")


def put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set dotted `key` in nested tables, for every run, and take it out of the grid; None removes
    it."""
    *tables, last = key.split(".")
    runs = tree.get("run", [])
    grid = tree.get("grid")
    if isinstance(grid, dict):
        for varied in [k for k in grid if k == key or k.startswith(f"{key}.")]:
            grid.pop(varied)
        if above := [k for k in grid if key.startswith(f"{k}.")]:
            raise InputError(f"{where}: [grid] varies {above[0]}, which {key} is a part of")
    for run in runs if isinstance(runs, list) else []:
        table: Any = run
        for name in tables:
            table = table.get(name, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            table.pop(last, None)
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise InputError(f"{where}: {name} is not a table")
    if value is None:
        tree.pop(last, None)
    else:
        tree[last] = value


def _lines(text: str) -> dict[str, int]:
    """The line of each plain `[table]` and `key = ` of a TOML text, by dotted key; the keys of the
    i-th `[[run]]` as `run.i.key`."""
    lines: dict[str, int] = {}
    table = ""
    runs = 0
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[\[run\]\]", line):
            table = f"run.{runs}."
            lines[table + "label"] = number
            runs += 1
        elif match := re.match(r"\s*\[([\w.-]+)\]", line):
            name = match[1]
            if runs and name.startswith("run."):
                name = f"run.{runs - 1}.{name[4:]}"
            table = name + "."
            lines.setdefault(name, number)
        elif match := re.match(r"\s*\"?([\w.-]+)\"?\s*=", line):
            lines[table + match[1]] = number
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, Range):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
