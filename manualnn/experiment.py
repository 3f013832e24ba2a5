"""From a config to runs, populations and a folder of results."""

import gc
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from . import checkpoint, distributed, plots
from . import config as configs
from .checkpoint import LAST, PREVIOUS
from .circumstances import circumstances, data_digests, digest
from .config import Config, Population, load_config, parse_config
from .data import Dataset, Prepared, load, load_source, prepare, relabel
from .data.labels import label_names
from .data.prepare import only_class
from .data.sources import check_labels
from .errors import InputError
from .evaluation import choose_device, draw_evaluation, evaluate_weights
from .files import (
    LOCK,
    lock,
    package_version,
    remove_temporary,
    replacing,
    write_csv,
    write_text,
    writing,
)
from .find import RUNS, newest_run
from .network import Network, save_weights
from .results import best_network, chosen_by
from .steps import evenly, threads
from .training import DTYPES, Event, Note, Record, Training, most_at_once

MEASURES = [
    f"{part}_{name}" for part in ("test", "valid", "train") for name in ("accuracy", "loss")
]
Data = tuple[Dataset, Prepared]


def build(
    population: Population, device: torch.device, data: dict[str, Data] | None = None
) -> tuple[Training, Dataset]:
    """Read the data and make the untrained networks of a population. Raises InputError.

    `data` keeps what was read for a population with the same data.
    """
    config, replicas = population.config, list(population.replicas)
    corruption = [(replica.corruption, replica.seed) for replica in replicas]
    if not any(fraction for fraction, _ in corruption):
        corruption = []
    dtype = DTYPES[config.train.precision]
    key = repr((replace(config.data, corruption=0.0), corruption, dtype))
    data = {} if data is None else data
    try:
        if key not in data:
            data.clear()  # one at a time
            with threads(torch.get_num_threads()):  # those that start here have its settings
                data[key] = _read(config.data, corruption, dtype, device)
        dataset, prepared = data[key]
        assert dataset.class_names is not None
        classes = len(dataset.class_names)
        layers = population.layers()
        network = Network(layers, prepared.shape, classes, len(replicas), dtype, device)
        if prepared.test:
            check_labels(
                prepared.test.y,
                network.classes,
                f"data.test_labels = {config.data.test_labels!r} needs a wider last layer, or use"
                " 'parity'",
            )
        training = Training(network, prepared, config.train, replicas, config.model.init)
    except InputError as error:
        name = f"{config.name}, run {config.label!r}" if config.label else config.name
        raise InputError(f"{name}: {error}") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        raise InputError(f"{config.name}: the networks do not fit into memory ({error})") from None
    return training, dataset


def split(
    population: Population, device: torch.device, data: dict[str, Data] | None = None
) -> list[int]:
    """How many of its networks, one after another, are trained at once: what fits into memory."""
    training, _ = build(replace(population, replicas=population.replicas[:1]), device, data)
    samples = len(training.data.train)
    most = most_at_once(training.network, population.config.train, samples)
    count = len(population.replicas)
    return [part.stop - part.start for part in evenly(count, -(-count // most))]


def _read(
    settings: configs.Data,
    corruption: list[tuple[float, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Data:
    """The data set with the labels that are asked for, and its parts as tensors."""
    name, place, names = settings.name, settings.place, settings.class_names
    if settings.source == "train" and not settings.use_test:
        dataset = load(name, place, ("train",), class_names=names)
    else:
        dataset = load_source(settings.source, name, place, names)
    dataset = relabel(dataset, settings.labels, settings.test_labels, settings.seed)
    assert dataset.train is not None and dataset.class_names is not None
    if not corruption and (only := only_class(dataset.train.labels)):
        raise InputError(
            f"{dataset.where}: all {len(dataset.train.labels):,} training labels are {only}: of one"
            " class there is nothing to learn"
        )
    prepared = prepare(
        (dataset.train.images, dataset.train.labels),
        (dataset.test.images, dataset.test.labels) if dataset.test else None,
        valid=settings.valid,
        stratify=settings.stratify,
        seed=settings.seed,
        train_samples=settings.train_samples,
        corruption=corruption,
        classes=len(dataset.class_names),
        normalize=settings.normalize,
        permute_seed=settings.permute_seed,
        augment=settings.augment or (),
        memory_mb=settings.memory_mb,
        dtype=dtype,
        device=device,
    )
    return dataset, prepared


def dry_run(config: Config, device: str = "auto", steps: int = 2) -> list[Training]:
    """Build everything and train `steps` steps of each population; nothing is saved."""
    chosen, data, trainings = choose_device(device), dict[str, Data](), list[Training]()
    for population in config.populations():
        training, _ = build(population, chosen, data)
        for _, index in zip(range(steps), training.batches(1), strict=False):
            training.step(index)
        trainings.append(training)
    return trainings


def _parts(population: Population, sizes: list[int]) -> list[Population]:
    """The population in parts of these sizes."""
    ends = list(accumulate(sizes, initial=0))
    return [replace(population, replicas=population.replicas[a:b]) for a, b in pairwise(ends)]


def join(device: str, config: Config) -> None:
    """Where torchrun started several processes, meet the others; all have the same config.

    Raises InputError, or LostPeerError where one does not come.
    """
    if not distributed.launched():
        return
    distributed.start(choose_device(device))
    distributed.agree(
        {
            "config": digest(config),
            "version of manualnn": package_version(),
            "version of torch": str(torch.__version__),
            "kind of processor": torch.backends.cpu.get_cpu_capability(),
        }
    )


class Run:
    """A config's networks with a folder: iterate `train()`, then read `metrics`.

    `out` is the folder; by default `runs/<config name>`, with a number where that exists. With
    `resume` the newest such folder, or `out`, is continued if it holds a run; a finished one only
    gives its metrics again. Populations are trained one after another; `training` is the current
    one. With `train_plot` the curves and the first layer's weights are drawn after every epoch.

    The folder is locked until training ends. After `stop()` training saves and ends at
    the next event, `stopped` being true.

    Of the processes that torchrun starts each makes the same Run and iterates it, and rank 0 alone
    reads and writes the folder. Where torchrun has started them again, they resume the run.
    """

    def __init__(
        self,
        config: Config,
        out: Path | str | None = None,
        device: str = "auto",
        resume: bool = False,
        train_plot: bool = False,
    ) -> None:
        out = Path(out) if out is not None else None
        self.config, self.train_plot = config, train_plot
        self.metrics: dict[str, Any] | None = None
        self.stopping = self.stopped = False
        self._digest = digest(config)
        join(device, config)
        self.folder, held, self.metrics = distributed.on_main(lambda: self._open(out, resume))
        distributed.take(self.folder)
        if self.metrics:
            return
        self.device = choose_device(device)
        # Of the populations before the current one, and what a checkpoint holds besides its state:
        self.number = 0
        self.runs: list[dict[str, Any]] = []
        self.finished: list[Record] = []
        self.notes: list[dict[str, Any]] = []
        self.seconds, self.samples = 0.0, 0
        self.sizes: list[list[int]] = []  # of each population the numbers of networks at once
        self.data_digests: list[str] = []
        self._digested: tuple[Dataset, dict[str, str]] | None = None
        self._held: FileLock | None = None
        found = distributed.on_main(self._last_checkpoint) if held else None
        state = distributed.together(lambda: self._restore(*found)) if found else None
        self.populations = self.config.populations()
        self._data: dict[str, Data] = {}
        if not self.sizes:  # all must be possible before one is trained
            sizes = [self._alike(split, population) for population in self.populations]
            self.sizes = distributed.gathered(sizes)[0]
        self.populations = list(chain.from_iterable(map(_parts, self.populations, self.sizes)))
        networks = [(r.label, r.seed) for p in self.populations for r in p.replicas]
        self.several = len(networks) > 1
        self.files = _file_names(networks)
        self._saved_step, self.saved = -1, "nothing yet"
        self._begin()
        if state is not None:
            distributed.together(self._check_data)
            distributed.together(lambda: self._resume(state))
            self.saved = self._position()
        self.folder = distributed.on_main(lambda: self._write_config(out, held))

    def _open(self, out: Path | None, resume: bool) -> tuple[Path, bool, dict[str, Any] | None]:
        """The folder, whether it holds this run, and its metrics if that is finished."""
        folder = out or folder_called(self.config.name, resume)
        held = _holds_run(folder)
        if held and not (resume or distributed.took(folder)):
            raise _held_error(folder)
        if not held:
            return folder, held, None
        _check_same(self.config, folder / "config.toml")
        return folder, held, _read_metrics(folder / "metrics.json")

    def _last_checkpoint(self) -> tuple[Path, Any] | None:
        """Lock the folder; its last checkpoint."""
        with writing(f"--out {self.folder}"):
            self._lock()
            return checkpoint.read(self.folder)

    def _write_config(self, out: Path | None, held: bool) -> Path:
        """Lock a folder that does not hold the run yet, and write the config; the folder."""
        made = out is None or not out.exists()
        with writing(f"--out {self.folder}"):
            if not held:
                self._claim(out)
                distributed.take(self.folder)
            try:
                write_text(self.folder / "config.toml", self.config.to_toml())
            except (OSError, InputError):
                self._release()
                with suppress(OSError):
                    (self.folder / LOCK).unlink()
                    if made:
                        self.folder.rmdir()
                raise
        return self.folder

    def _alike(self, work: Callable[..., Any], population: Population) -> Any:
        """What `work` makes of a population, once all processes have read the same data for it."""
        return distributed.together(lambda: work(population, self.device, self._data))

    @property
    def records(self) -> list[Record]:
        """All that was recorded so far."""
        return self.finished + self.training.records

    def train(self) -> Iterator[Training | Event]:
        """Train to the end, saving after every epoch; then write weights, metrics and pictures.

        Yields each population's Training before its events.
        """
        if self.metrics is not None:
            return
        self._saver = checkpoint.Saver(self.folder)
        try:
            with self._keeping():
                try:
                    yield from self._train()
                finally:
                    self._saver.flush()
            if not self.stopped:
                self.metrics = distributed.on_main(self._finish)
        finally:
            self._release()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Say what is kept where a file cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written: {error.strerror or error}; what was saved"
                " before is kept, and --resume goes on from it"
            ) from None

    training: Training

    def _train(self) -> Iterator[Training | Event]:
        """The populations one after another."""
        while True:
            yield self.training
            for event in self.training.run():
                if isinstance(event, Note):
                    self.notes.append(asdict(event))
                elif isinstance(event, list):
                    self._save_epoch()
                elif self._is_due():
                    self._save()
                yield event
                if not isinstance(event, Note) and distributed.most(self.stopping):
                    if self._saved_step != self.training.step_number:
                        self._save()
                    self.stopped = True
                    return
            self._end_population()
            if self.number == len(self.populations):
                return
            self._begin()
            self._save_epoch()

    def _begin(self) -> None:
        if self.__dict__.pop("training", None):  # the memory of the last, before that of the next
            gc.collect()
        self.training, self.dataset = self._alike(build, self.populations[self.number])
        if distributed.world() > 1:
            distributed.agree({"data set": self._data_digest()})
        distributed.spread(self.training.network.theta)

    def stop(self) -> None:
        """Save at the next event of `train()` and end it; may be called by a signal handler."""
        self.stopping = True

    def _is_due(self) -> bool:
        every = self.training.settings.checkpoint_every_steps
        return bool(every) and self.training.step_number % every == 0

    def _save(self, history: bool = False) -> None:
        """Have a checkpoint written, and then the history, if asked for."""
        training = self.training
        self._saved_step = training.step_number
        state = {name: getattr(self, name) for name in _BEFORE} | {"name": self.config.name}
        state |= {"config": self._digest, "training": training.state()}
        state["data"] = self._data_digests()
        if not distributed.is_main():
            return
        state["finished"] = [vars(record) for record in self.finished]
        records, where = self.records if history else None, self._position()

        def then() -> None:
            self.saved = where
            if records is not None:
                # A checkpoint has them, too, and a later one writes them again.
                write_history(self.folder / "history.csv", records, flushed=False)
            if not (self.folder / "config.toml").exists():
                print(f"note: {self.folder} was removed; it is made again", file=sys.stderr)
                self._held = lock(self.folder)
                write_text(self.folder / "config.toml", self.config.to_toml())

        self._saver.save(state, then)

    def _position(self) -> str:
        """How far the training is."""
        epoch, steps = self.training.epoch, self.training.epoch_step
        where = f"epoch {epoch}"
        if steps:
            where += f" and {steps} step{'s' * (steps > 1)} of the next"
        return where + (f" of part {self.number + 1}" if len(self.populations) > 1 else "")

    def _save_epoch(self) -> None:
        """After an epoch: the checkpoint, the history, and pictures that are asked for."""
        self._save(history=True)
        if self.train_plot and distributed.is_main():
            self._draw_curves()
            self._draw_first_layer()

    def _release(self) -> None:
        if self._held:
            self._held.release()

    def _lock(self) -> None:
        """Make the folder this process's own, and clean it of what a killed one left behind."""
        self._held = lock(self.folder)
        for folder in (self.folder, self.folder / "weights"):
            remove_temporary(folder)

    def _claim(self, out: Path | None) -> None:
        """Lock a folder for a new run: `out`, or one of the default name that nobody was faster to
        take."""
        while True:
            try:
                self._lock()
                if _holds_run(self.folder):
                    raise _held_error(self.folder)
                return
            except InputError:
                if out is not None:
                    raise
            self.folder = new_folder(self.config.name)

    def _restore(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Take over what is finished; the state of the training that was going on."""
        self._restored = path
        try:
            if state["config"] != self._digest:
                raise InputError(f"{path}: is of another config than config.toml beside it")
            for name in _BEFORE:
                setattr(self, name, state[name])
            self.finished = [Record(**record) for record in state["finished"]]
            self._data_before = dict(state.get("data", {}))  # older ones have none
            # A network without a label is called after its config, which may be another file now.
            self.config = parse_config(self.config.to_dict(), state["name"])
            return state["training"]
        except (KeyError, TypeError) as error:
            raise self._unfit(error) from None

    def _check_data(self) -> None:
        """Raise InputError where the data are not those that the run was interrupted on."""
        for part, before in self._data_before.items():
            if self._data_digests().get(part) != before:
                where = self.dataset.files.get(part, self.dataset.where)
                raise InputError(
                    f"{where}: the {part} examples have changed since this run was interrupted;"
                    f" bring them back, or start anew with another --out than {self.folder}"
                )

    def _resume(self, state: dict[str, Any]) -> None:
        try:
            self.training.restore(state)
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise self._unfit(error) from None

    def _unfit(self, error: Exception) -> InputError:
        return InputError(
            f"{self._restored}: of another version or config ({type(error).__name__}); remove the"
            " folder"
        )

    def _end_population(self) -> None:
        """Measure the networks that have just ended, and write their weights."""
        training, population = self.training, self.populations[self.number]
        data, network = training.data, training.network
        target = population.config.train.target_accuracy
        measured = {
            part: training.measure(getattr(data, part)) for part in ("test", "valid", "train")
        }
        for r, replica in enumerate(training.replicas):
            figures = {
                f"{part}_{name}": values[r][i]
                for part, values in measured.items()
                for i, name in enumerate(("loss", "accuracy"))
            }
            records = [
                record
                for record in training.records
                if (record.run, record.seed) == (replica.label, replica.seed)
            ]
            row = {
                "run": replica.label,
                "seed": replica.seed,
                **{name: figures[name] for name in MEASURES},
                "epochs": records[-1].epoch,
                "kept_epoch": training.best_epoch[r],
                "parameters": network.layout.count,
                "train_samples": len(data.train),
                "classes": len(self.dataset.class_names or ()),
                "test_classes": int(data.test.y.max()) + 1 if data.test else None,
                "outputs": network.outputs,
                "ended": training.ended[r] or None,
                "diverged": training.diverged[r],
            }
            if target:
                row["epochs_to_target"] = epochs_to(records, target)
            self.runs.append(row)
            if not distributed.is_main():
                continue
            path = self._weights_path(row)
            layers = population.layers(replica)
            save_weights(
                path,
                network,
                {"layers": layers, **weights_meta(training, self.dataset, population, r)},
                r,
            )
        self.note_data()
        self.finished += training.records
        self.seconds += training.seconds
        self.samples += training.epoch_samples * len(training.replicas) * training.epoch
        self.number += 1

    def _data_digests(self) -> dict[str, str]:
        """The current data set's, as `data_digests` gives them, computed once."""
        if self._digested is None or self._digested[0] is not self.dataset:
            self._digested = self.dataset, data_digests(self.dataset)
        return self._digested[1]

    def _data_digest(self) -> str:
        """That of the whole current data set."""
        return list(self._data_digests().values())[-1]

    def note_data(self) -> None:
        """Put the current data set's digest into the list, unless it is there."""
        if (found := self._data_digest()) not in self.data_digests:
            self.data_digests.append(found)

    def _weights_path(self, row: dict[str, Any]) -> Path:
        if not self.several:
            return self.folder / "weights.pkl"
        return self.folder / "weights" / f"{self.files[row['run'], row['seed']]}.pkl"

    def _finish(self) -> dict[str, Any]:
        """Write what a finished run has; its metrics."""
        with self._keeping():
            return self._write_results()

    def _write_results(self) -> dict[str, Any]:
        write_history(self.folder / "history.csv", self.finished)
        best = best_network(self.runs)
        if self.several:
            with replacing(self.folder / "weights.pkl") as temporary:
                temporary.write_bytes(self._weights_path(self.runs[best]).read_bytes())
        self.metrics = _summary(self.runs, best) | {
            "seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds if self.seconds else None,
            "diagnoses": self.notes,
            "started_in": str(Path.cwd()).encode(errors="replace").decode(),
            **circumstances(self.config, self.data_digests, self.device),
        }
        self._draw_curves()
        if self.train_plot:
            self._draw_first_layer()
        measured = [p for p in ("test", "valid") if self.runs[best][f"{p}_accuracy"] is not None]
        part = [*measured, "train"][0]
        evaluated = evaluate_weights(self.folder, split=part, device=str(self.device))
        title = f"{self.runs[best]['run']}, {evaluated.data} set"
        draw_evaluation(
            evaluated.evaluation, evaluated.images, evaluated.class_names, title, self.folder
        )
        write_text(self.folder / "metrics.json", to_json(self.metrics))
        for name in (PREVIOUS, LOCK):  # nobody trains in the folder of a finished run
            with suppress(OSError):
                (self.folder / name).unlink()
        return self.metrics

    def _draw_curves(self) -> None:
        members = self.config.members()
        dropout = any(layer[0] == "dropout" for member in members for layer in member.model.layers)
        name, title = self.dataset.name, self.config.name
        if not title.startswith(f"{name}-"):
            title += f" on {name}"
        if any(member.data.source == "test" for member in members):
            title += " (a split of the test images)"
        metrics = self.metrics or {"test_accuracy": None}
        same = len({run["run"] for run in self.runs}) == 1
        if same and metrics["test_accuracy"] is not None:
            title += f": test accuracy {100 * metrics['test_accuracy']:.2f} %"
            if metrics["n"] > 1:
                title += f" (mean of {metrics['n']})"
        rows = [asdict(record) for record in (self.finished if self.metrics else self.records)]
        label = "train (with dropout)" if dropout else "train"
        plots.save(plots.curves(rows, title, label), self.folder / "curves.png")

    def _draw_first_layer(self) -> None:
        """The weights into each of the first units, as images, of the first network."""
        network, replica = self.training.network, self.training.replicas[0]
        images = network.first_images()
        title = (
            f"{replica.label}, seed {replica.seed}, epoch {self.training.epoch}: weights into"
            f" {len(images[:64])} of {len(images)} units"
        )
        plots.save(plots.weight_grid(images[:64].numpy(), title), self.folder / "first-layer.png")


_SHARED = ("parameters", "train_samples", "classes", "test_classes", "outputs")
_BEFORE = ("number", "runs", "notes", "seconds", "samples", "sizes", "data_digests")
_SPLIT = ("source", "train_samples", "valid", "stratify", "seed", "labels", "test_labels")


def _file_names(networks: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """A file name for each (label, seed), different ones also where letters are left out."""
    names: dict[tuple[str, int], str] = {}
    for label, seed in networks:
        plain = re.sub(r"[^\w.,=+-]", "_", label.replace(" ", "")).lower()
        name = f"{plain.encode()[:100].decode(errors='ignore')}-{seed}"  # names end at 255 bytes
        while name in names.values():
            name += "_"
        names[label, seed] = name
    return names


def epochs_to(records: list[Record], accuracy: float) -> int | None:
    """The first epoch with that accuracy on validation, else test data; None where none has it."""
    for record in records:
        found = record.test_accuracy if record.valid_accuracy is None else record.valid_accuracy
        if found is not None and found >= accuracy:
            return record.epoch
    return None


def weights_meta(
    training: Training, dataset: Dataset, population: Population, r: int
) -> dict[str, Any]:
    """What evaluate and predict need to know about the weights of replica r."""
    replica, data = population.replicas[r], population.config.data
    assert dataset.class_names is not None
    names = label_names(dataset.class_names, data.labels, data.test_labels, replica.corruption)
    return {
        "layers": population.layers(replica),
        "run": replica.label,
        "seed": replica.seed,
        "dataset": dataset.name,
        **({"label_column": dataset.label} if dataset.label else {}),
        "class_names": [*names, *map(str, range(len(names), training.network.classes))],
        "normalization": training.data.normalization.to_meta(),
        "range": training.data.range.to_meta() if training.data.range else None,
        "loss": population.config.train.loss,
        "split": {
            **{key: getattr(data, key) for key in _SPLIT},
            "classes": len(names),
            "corruption": replica.corruption,
            "corruption_seed": replica.seed,
        },
        "manualnn": package_version(),
    }


def train_single(
    config: Config, weights: Path | str | None = None, device: str = "auto"
) -> Training:
    """Train a config of one population, printing each epoch; no folder, no plots.

    The first network's weights are written to `weights`. Raises InputError.
    """
    [population] = config.populations()
    training, dataset = build(population, choose_device(device))
    for event in training.run():
        for record in event if isinstance(event, list) else []:
            line = f"epoch {record.epoch:>3}  loss {record.train_loss:.4f}"
            line += f"  accuracy {100 * record.train_accuracy:.2f} %"
            print(line + f"  {record.seconds:.2f} s", file=sys.stderr)
    if weights is not None:
        save_weights(weights, training.network, weights_meta(training, dataset, population, 0))
    return training


def train(
    config: Config | str | Path = "mnist-mlp",
    out: Path | str | None = None,
    device: str = "auto",
    resume: bool = False,
) -> dict[str, Any]:
    """Train a config, or the path or name of one: its metrics.json, with `out`, the folder.

    Raises InputError for bad input.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    run = Run(config, out or None, device, resume)
    for _ in run.train():
        pass
    assert run.metrics is not None
    return run.metrics | {"out": str(run.folder)}


def write_history(path: Path, records: list[Record], flushed: bool = True) -> None:
    """history.csv: a row per epoch and network; empty where not measured."""
    names = [f.name for f in fields(Record)]
    rows = ([getattr(record, name) for name in names] for record in records)
    write_csv(path, names, rows, flushed)


def to_json(value: Any) -> str:
    """JSON text in which numbers that are not finite are null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _summary(runs: list[dict[str, Any]], best: int) -> dict[str, Any]:
    """One run's figures as they are; several as means and sample standard deviations of those that
    did not diverge, with n, and each in `runs`; `weights` says which one weights.pkl is."""
    counted = [run for run in runs if not run["diverged"]] or runs

    def over(function: Any, name: str, least: int) -> float | None:
        values = [run[name] for run in counted if run[name] is not None]
        defined = len(values) >= least and (least == 1 or all(map(math.isfinite, values)))
        return function(values) if defined else None

    summary: dict[str, Any] = {name: over(statistics.fmean, name, 1) for name in MEASURES}
    summary |= {"epochs": max(run["epochs"] for run in runs), "seed": runs[0]["seed"]}
    summary |= {"n": len(counted), "diverged": sum(run["diverged"] for run in runs)}
    summary["weights"] = {key: runs[best][key] for key in ("run", "seed")}
    if len(runs) > 1:
        summary["weights"]["chosen_by"] = chosen_by(runs)
    summary |= {key: runs[best][key] for key in _SHARED}
    summary["ended"] = runs[0]["ended"] if len(runs) == 1 else None
    if len(runs) > 1:
        summary["seed"] = [run["seed"] for run in runs]
        summary["std"] = {name: over(statistics.stdev, name, 2) for name in MEASURES}
        summary["runs"] = runs
    return summary


def folder_called(name: str, resume: bool) -> Path:
    """The newest run of that name with `resume`, or in a restart that goes on; else a new one."""
    newest = newest_run(name)
    if newest and (resume or distributed.took(newest)):
        return newest
    return new_folder(name)


def new_folder(name: str) -> Path:
    """`runs/NAME`, with a number where that exists."""
    folder, number = RUNS / name, 2
    while folder.exists():
        folder, number = RUNS / f"{name}-{number}", number + 1
    return folder


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.toml", LAST, PREVIOUS))


def _held_error(folder: Path) -> InputError:
    return InputError(f"{folder} already holds a run; give --resume or another --out")


def _check_same(config: Config, path: Path) -> None:
    """Raise InputError with the differing keys unless the folder's config is this one."""
    if not path.exists():
        raise InputError(f"{path} is missing; remove the folder or give another --out")
    before = _flat(load_config(path).to_dict())
    now = _flat(parse_config(config.to_dict(), config.name).to_dict())
    differing = sorted(key for key in before | now if before.get(key) != now.get(key))
    if differing:
        changes = ", ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in differing)
        raise InputError(
            f"{path.parent}: cannot resume with another config: {changes}; give the"
            " options that it began with"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _read_metrics(path: Path) -> dict[str, Any] | None:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metrics, dict) or "test_accuracy" not in metrics:
            raise ValueError("no metrics")
        return metrics
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"note: {path} cannot be read ({error}); it is made again", file=sys.stderr)
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
