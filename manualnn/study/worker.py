"""A worker: it asks a study for trials, trains them as populations, and tells what came of them."""

import json
import math
import os
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from ..circumstances import data_digest
from ..config import Config, Population, Range, flatten
from ..errors import InputError
from ..evaluation import choose_device
from ..experiment import Data, build, split
from ..results import mean_and_std
from ..sweep import check, configure, untested
from ..training import Record, Training, of_replicas
from .queue import choice_of, outcome, places, point_of, space
from .results import summarise
from .storage import Heart, Storage, experimental, retry

SETTINGS, TOTAL = "manualnn", "trials"  # attributes of the study
PATIENCE = 5.0  # seconds in which another worker's next step is waited for
PLACES = ("data.dir", "data.train", "data.test")  # which may differ from machine to machine


@dataclass(frozen=True)
class Plan:
    """What a study is to be; None where one that is there already says it, or the default does.

    `trials` is the number of them all, `batch` how many a worker asks for at once, `seconds` the
    time between two signs of life of a worker.
    """

    sampler: str | None = None
    trials: int | None = None
    batch: int = 8
    prune: bool = True
    seconds: int = 30


@dataclass(frozen=True)
class Asked:
    """A trial that this worker has, and the values that it is to train with."""

    place: int
    trial: Trial
    point: dict[str, Any]

    @property
    def label(self) -> str:
        return f"trial {self.place}"


class Worker:
    """One of the processes that share a study. Iterate over `work()`, lines for a reader; after
    `stop()` it puts back what it had and ends, `stopped` being true.

    `config` has the grid. Raises InputError: where the config cannot be part of a sweep, where the
    study cannot be reached, or where it is one of another config, data set or plan.
    """

    def __init__(
        self, config: Config, storage: str | Path, name: str, plan: Plan, device: str = "auto"
    ) -> None:
        self.stopping = self.stopped = False
        self.device, self._data = choose_device(device), dict[str, Data]()
        self.config, self.plan = untested(config), plan
        if not config.grid:
            raise InputError(f"{config.name}: there is no [grid] to sweep over; give --grid")
        ranges = any(isinstance(values, Range) for _, values in config.grid)
        self.sampler = plan.sampler or ("tpe" if ranges else "grid")
        self.space, self._points = space(self.config), list[dict[str, Any]]()
        if self.sampler == "grid":
            self._points = self._combinations()
            if plan.trials not in (None, len(self._points)):
                raise InputError(
                    f"--trials {plan.trials}: the grid has {len(self._points)} combinations, which"
                    " --sampler grid trains all; leave it out, or give --sampler random"
                )
        self._settings = self._describe()
        self._storage = Storage(storage, plan.seconds)
        self._mine: dict[int, Asked] = {}
        self._orphans: dict[int, float] = {}
        self.name, self.where = name, self._storage.name
        try:
            with self._storage.errors():
                self._join()
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Put the trials back at the next step and end; may be called by a signal handler."""
        self.stopping = True

    def close(self) -> None:
        self._storage.close()

    @property
    def trials(self) -> list[list[FrozenTrial]]:
        """The trials of each place, as the study has them now."""
        return places(self.study.get_trials(deepcopy=False))[: self.total]

    @property
    def total(self) -> int:
        with self._storage.errors():
            return int(self.study.user_attrs[TOTAL])

    @property
    def finished(self) -> bool:
        rows = self.trials
        return len(rows) == self.total and all(outcome(row) for row in rows)

    def summarise(self, folder: Path) -> dict[str, Any]:
        """Write what the study leaves into the folder; gives what sweep.json holds."""
        with self._storage.errors():
            return summarise(self.study, self.config, self.total, folder)

    def work(self) -> Generator[str, None, None]:
        """Train until no trial is left to any worker."""
        waiting = False
        with self._storage.errors(), Heart(self._storage.backend, self.plan.seconds) as self._heart:
            try:
                while not (self.stopping or self.finished):
                    if asked := self._ask():
                        waiting = False
                        yield from self._train(asked)
                        continue
                    if not waiting:
                        yield "waiting for the trials of other workers"
                    waiting = True
                    time.sleep(min(1.0, self.plan.seconds / 2))
                self.stopped = self.stopping
            finally:
                self._put_back()

    def _combinations(self) -> list[dict[str, Any]]:
        """The grid's points, those that train as one population next to each other."""
        whole = configure(self.config, self.config.name)
        labels = [r.label for p in whole.populations() for r in p.replicas]
        order = {label: number for number, label in enumerate(labels)}
        pairs = zip(whole.members(), self.config.points(), strict=True)
        return [point for _, point in sorted(pairs, key=lambda pair: order[pair[0].label])]

    def _describe(self) -> dict[str, Any]:
        """What all workers of the study must agree on. Reads the data, so that a worker without
        them takes no trial."""
        first = {
            key: values.low if isinstance(values, Range) else values[0]
            for key, values in self.config.grid
        }
        [population] = check(self.config.at([first], ["first"])).populations()
        alone = replace(population, replicas=population.replicas[:1])
        _, dataset = build(alone, self.device, self._data)
        self.read = dataset.read
        keys = dict(flatten(self.config.to_dict()))
        settings = {
            **{key: value for key, value in keys.items() if key not in PLACES},
            "data": data_digest(dataset),
            "--sampler": self.sampler,
            "--no-prune": not self.plan.prune,
            "--heartbeat": self.plan.seconds,
        }
        return dict(json.loads(json.dumps(settings)))

    def _join(self) -> None:
        """Create the study or enter it, and see that its queue is filled."""
        name, storage = self.name, self._storage.optuna
        created = False
        try:
            self.study = optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            try:
                self.study = optuna.create_study(
                    study_name=name, storage=storage, direction="maximize"
                )
                created = True
            except DuplicatedStudyError:  # another worker was faster
                self.study = optuna.load_study(study_name=name, storage=storage)
        self.study.pruner = self._pruner()
        created = created or self._is_abandoned()
        if created:
            self.study.set_user_attr(TOTAL, self.plan.trials or len(self._points) or 32)
            self.study.set_user_attr(SETTINGS, self._settings)
        self._check()
        if self.plan.trials is not None and self.plan.trials != self.total:
            if self.plan.trials < self.total:
                raise InputError(
                    f"--trials {self.plan.trials}: study {name} has {self.total}; more may be asked"
                    " for, but not fewer"
                )
            self.study.set_user_attr(TOTAL, self.plan.trials)
            created = True
        self._fill(created)

    def _pruner(self) -> BasePruner:
        """The median of the trials that came so far; of no trial in its first epochs."""
        warm_up = 1 + self.config.train.epochs // 10
        return MedianPruner(n_warmup_steps=warm_up) if self.plan.prune else NopPruner()

    def _is_abandoned(self) -> bool:
        """Whether the study has no settings, as its worker died before it wrote any."""
        until = time.monotonic() + PATIENCE
        while SETTINGS not in self.study.user_attrs:
            if self.study.get_trials(deepcopy=False):
                raise InputError(
                    f"--study {self.name}: {self.where} has a study of that name which no sweep"
                    " made; give another name"
                )
            if time.monotonic() > until:
                return True
            time.sleep(0.1)
        return False

    def _check(self) -> None:
        """Raise InputError with the keys in which the study is not what this worker does."""
        theirs, own = self.study.user_attrs[SETTINGS], self._settings
        others = []
        for key in sorted(theirs | own):
            if key == "data" and theirs.get(key) != own[key]:
                others.append("the examples of its data set are others than those here")
            elif theirs.get(key) != own.get(key):
                none = "not in the grid" if key.startswith("grid.") else "not set"
                had, has = (repr(x[key]) if key in x else none for x in (theirs, own))
                others.append(f"{key} was {had}, now {has}")
        if others:
            raise InputError(
                f"--study {self.name}: {self.where} has it with other settings:"
                f" {'; '.join(others)}; give the options that it began with, or another --study"
            )

    def _fill(self, at_once: bool) -> None:
        """Put trials into the queue until there are as many as the study is to have. Who did not
        create it only does so where nobody else does any more."""
        had, since = -1, time.monotonic()
        while (count := len(self.trials)) < self.total:
            if count != had:
                had, since = count, time.monotonic()
            if not at_once and time.monotonic() - since < PATIENCE:
                time.sleep(0.1)
            elif self.sampler == "grid":
                queued = [row[0].system_attrs.get("fixed_params") for row in self.trials]
                for point in self._points:
                    choices = {key: choice_of(value) for key, value in point.items()}
                    if choices not in queued:
                        self.study.enqueue_trial(choices)
            else:
                for _ in range(self.total - count):
                    self.study.enqueue_trial({})

    def _sampler(self, place: int) -> BaseSampler:
        """That of one trial: what it draws depends on train.seed, its place and, for tpe, on what
        is known by then, and not on the worker."""
        seed = (self.config.train.seed * 1_000_003 + place) % 2**32
        return TPESampler(seed=seed) if self.sampler == "tpe" else RandomSampler(seed)

    def _ask(self) -> list[Asked]:
        """Take trials that wait, in their order, and those whose workers died."""
        self._check()
        with experimental():
            fail_stale_trials(self.study)
        asked: list[Asked] = []
        for place, row in enumerate(self.trials):
            if len(asked) == self.plan.batch:
                break
            if outcome(row) or any(trial.state == TrialState.RUNNING for trial in row):
                continue
            waiting = [trial for trial in row if trial.state == TrialState.WAITING]
            if waiting and self._take(waiting[0]):
                asked.append(self._suggest(place, waiting[0]))
            elif not waiting:
                self._adopt(place, row[-1])
        return asked

    def _adopt(self, place: int, failed: FrozenTrial) -> None:
        """Queue a failed trial again, where the worker that failed it died before it could."""
        since = self._orphans.setdefault(place, time.monotonic())
        if time.monotonic() - since > PATIENCE:
            del self._orphans[place]
            retry()(self.study, failed)

    def _take(self, trial: FrozenTrial) -> bool:
        """Whether the trial is this worker's now. The first sign of life comes before, so that no
        trial that runs is ever without."""
        storage = self.study._storage
        storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        try:
            return storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _suggest(self, place: int, waiting: FrozenTrial) -> Asked:
        self._heart.trials.add(waiting._trial_id)
        # With a study of its own: one remembers the trials that it has seen, and those just asked
        # for would be missing.
        study = optuna.load_study(
            study_name=self.name,
            storage=self._storage.optuna,
            sampler=self._sampler(place),
            pruner=self.study.pruner,
        )
        trial = Trial(study, waiting._trial_id)
        asked = Asked(place, trial, {})
        self._mine[place] = asked
        params = {}
        for key, values in self.space.items():
            if isinstance(values, CategoricalDistribution):
                params[key] = trial.suggest_categorical(key, values.choices)
            elif isinstance(values, IntDistribution):
                params[key] = trial.suggest_int(
                    key, values.low, values.high, step=values.step, log=values.log
                )
            elif isinstance(values, FloatDistribution):
                params[key] = trial.suggest_float(
                    key, values.low, values.high, step=values.step, log=values.log
                )
        asked.point.update(point_of(self.config, params))
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        return asked

    def _train(self, asked: list[Asked]) -> Iterator[str]:
        """Train some trials, those that differ in columns alone as one population."""
        possible = []
        for one in asked:
            try:
                check(self.config.at([one.point], [one.label]))
                possible.append(one)
            except InputError as error:
                yield self._fail(one, error)
        if not possible:
            return
        points, labels = [one.point for one in possible], [one.label for one in possible]
        for population in self.config.at(points, labels).populations():
            own = {r.label for r in population.replicas}
            group = [one for one in possible if one.label in own]
            try:
                parts = self._parts(population, group)
            except InputError as error:
                for one in group:
                    yield self._fail(one, error)
                continue
            for part, members in parts:
                yield from self._train_part(part, members)
                if self.stopping:
                    return

    def _parts(
        self, population: Population, group: list[Asked]
    ) -> list[tuple[Population, list[Asked]]]:
        """The trials of a population in parts that fit into memory."""
        each = len(population.replicas) // len(group)
        most = max(1, max(split(population, self.device, self._data)) // each)
        parts = []
        for i in range(0, len(group), most):
            members = group[i : i + most]
            labels = {one.label for one in members}
            replicas = tuple(r for r in population.replicas if r.label in labels)
            parts.append((replace(population, replicas=replicas), members))
        return parts

    def _train_part(self, population: Population, members: list[Asked]) -> Iterator[str]:
        """Train trials as one population, which the ones that end leave."""
        training, _ = build(population, self.device, self._data)
        yield (
            f"{_listed([one.place for one in members])}: training {len(population.replicas)}"
            f" network(s) with {training.network.layout.count:,} parameters for"
            f" {training.settings.epochs} epochs on {training.device}"
        )
        while True:
            ended: list[Asked] = []
            for event in training.run():
                if self.stopping:
                    return
                if isinstance(event, list):
                    for one in members:
                        if (line := self._judge(training, one)) is not None:
                            yield line
                            ended.append(one)
                    if ended:
                        break
            members = [one for one in members if one not in ended]
            if not members:
                return
            training = self._without(training, population, {one.label for one in members})

    def _without(self, training: Training, population: Population, labels: set[str]) -> Training:
        """The training of the networks of these trials alone, where it is."""
        rows = [r for r, replica in enumerate(training.replicas) if replica.label in labels]
        state = of_replicas(training.state(), rows)
        left = tuple(training.replicas[r] for r in rows)
        smaller, _ = build(replace(population, replicas=left), self.device, self._data)
        smaller.restore(state)
        return smaller

    def _judge(self, training: Training, one: Asked) -> str | None:
        """Report a trial's epoch; where it ends tell the study, and give a line about it."""
        try:
            return self._told(training, one)
        except UpdateFinishedTrialError:
            self._let_go(one)
            return f"{one.label}: another worker has it, as this one gave no sign of life"

    def _told(self, training: Training, one: Asked) -> str | None:
        rows = [r for r, replica in enumerate(training.replicas) if replica.label == one.label]
        last = training.finished or all(training.ended[r] for r in rows)
        records = {
            r: [x for x in training.records if (x.run, x.seed) == (one.label, replica.seed)]
            for r, replica in enumerate(training.replicas)
            if r in rows
        }
        alive = [r for r in rows if not training.diverged[r]]
        now, _ = mean_and_std([_latest(records[r]) for r in alive])
        measured = any(
            x[-1].epoch == training.epoch and x[-1].valid_accuracy is not None
            for x in records.values()
        )
        if now is not None and measured:
            one.trial.report(now, training.epoch)
        if not last:
            if not (measured and one.trial.should_prune()):
                return None
            self._tell(one, None, {"epochs": training.epoch})
            return f"{one.label}: pruned in epoch {training.epoch}, at {_percent(now)}"
        facts: dict[str, Any] = {"networks": len(rows), "diverged": len(rows) - len(alive)}
        facts["epochs"] = max(x[-1].epoch for x in records.values())
        kept = [x for r in alive for x in records[r] if x.epoch == training.best_epoch[r]]
        accuracy, std = mean_and_std([x.valid_accuracy for x in kept])
        if accuracy is None:
            self._tell(one, None, facts | {"ended": training.ended[rows[0]]})
            return f"{one.label}: {training.ended[rows[0]]}"
        facts |= {
            "valid_accuracy_std": std,
            "valid_loss": _finite(mean_and_std([x.valid_loss for x in kept])[0]),
            "train_accuracy": mean_and_std([x.train_accuracy for x in kept])[0],
        }
        self._tell(one, accuracy, facts)
        return f"{one.label}: {_percent(accuracy)}"

    def _tell(self, one: Asked, accuracy: float | None, facts: dict[str, Any]) -> None:
        """End a trial: complete with its accuracy, pruned without; what diverged is so, too, as
        samplers then keep away from its values."""
        for name, value in facts.items():
            one.trial.set_user_attr(name, value)
        state = TrialState.PRUNED if accuracy is None else TrialState.COMPLETE
        self.study.tell(one.trial, accuracy, state, skip_if_finished=True)
        self._let_go(one)

    def _fail(self, one: Asked, error: InputError) -> str:
        """End a trial whose values make no network."""
        with suppress(UpdateFinishedTrialError):
            one.trial.set_user_attr("error", str(error))
            self.study.tell(one.trial, state=TrialState.FAIL, skip_if_finished=True)
        self._let_go(one)
        return f"{one.label}: failed: {error}"

    def _let_go(self, one: Asked) -> None:
        self._mine.pop(one.place, None)
        self._heart.trials.discard(one.trial._trial_id)

    def _put_back(self) -> None:
        """Fail the trials that this worker still has, and queue their values again."""
        for one in list(self._mine.values()):
            storage, number = self.study._storage, one.trial._trial_id
            with suppress(UpdateFinishedTrialError):
                storage.set_trial_state_values(number, TrialState.FAIL)
                retry()(self.study, storage.get_trial(number))
            self._let_go(one)


def _latest(records: list[Record]) -> float | None:
    """The validation accuracy where it was last measured."""
    known = [x.valid_accuracy for x in records if x.valid_accuracy is not None]
    return known[-1] if known else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _listed(numbers: list[int]) -> str:
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
