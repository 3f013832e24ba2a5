"""The loop: R networks trained at once on one data set, one record per epoch and network.

Shapes: R replicas, B samples of a batch, N samples of the training part, P parameters.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import diagnosis, distributed
from .config import Replica, Train
from .data import Prepared, Samples, Streamed, epoch_order
from .errors import InputError
from .layers import ChannelsLast, Flatten, Linear, lowered
from .losses import LOSSES, outputs
from .memory import available_memory
from .network import Network
from .optimizers import schedule
from .steps import LOW, Steps, evenly, measure, products_in, threads
from .workspace import Workspace, generator

ORDER_STREAM = 0x0D01
SHARD = 2**20  # numbers of one step
DTYPES = {"fp64": torch.float64} | dict.fromkeys(("fp32", "bf16", "tf32"), torch.float32)


@dataclass(frozen=True)
class Record:
    """One epoch of one replica: a row of history.csv. Training figures are averages over the
    epoch's batches as trained; losses are without penalty or label smoothing; None where not
    measured."""

    run: str
    seed: int
    epoch: int
    step: int
    seconds: float
    learning_rate: float
    train_loss: float
    train_accuracy: float
    valid_loss: float | None
    valid_accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None


@dataclass(frozen=True)
class Progress:
    """How far the running epoch is: samples done of one replica's, and seconds so far."""

    epoch: int
    samples: int
    seconds: float


@dataclass(frozen=True)
class Note:
    """A diagnosis: what ails one replica, where, and a remedy."""

    run: str
    seed: int
    epoch: int
    text: str


Event = Progress | Note | list[Record]


class Training:
    """A run of R replicas. `run` yields Progress and, at each epoch's end, Notes of what ails it
    and the live replicas' Records.

    When it ends, `network.theta` holds what each replica is to be judged by: its last finite
    weights, or the best ones with early stopping. `ended[r]` says why replica r stopped before the
    last epoch, `diverged[r]` whether that was a loss or weight that is no longer finite.
    """

    def __init__(
        self, network: Network, data: Prepared, settings: Train, replicas: list[Replica], init: str
    ) -> None:
        if network.outputs != outputs(settings.loss, network.classes):
            raise InputError(
                f"model.layers: the last layer has {network.outputs} outputs, but {settings.loss}"
                f" with {network.classes} classes needs {outputs(settings.loss, network.classes)}"
            )
        if settings.loss == "logistic" and network.classes != 2:
            raise InputError(
                f"train.loss = 'logistic' tells 2 classes apart, not {network.classes}"
            )
        if network.classes < 2:
            raise InputError("the training labels hold only one class; there is nothing to learn")
        seeds = {replica.seed for replica in replicas}
        apart = settings.shuffle and not settings.shared_batches and len(seeds) > 1
        if isinstance(data.train.x, Streamed) and apart and not data.train.x.whole:
            raise InputError(
                "networks with different seeds have an order of the samples each, but these do not"
                " fit into data.memory_mb: set train.shared_batches"
            )
        samples, batch_size = len(data.train), settings.batch_size
        steps = samples // batch_size if settings.drop_last else math.ceil(samples / batch_size)
        if not steps:
            raise InputError(
                f"train.batch_size = {batch_size} with drop_last leaves no batch: {samples} samples"
            )
        total, rise = steps * settings.epochs, settings.schedule.warmup_steps
        if rise > total or (settings.schedule.name == "one_cycle" and rise >= total > 1):
            raise InputError(
                f"train.schedule.warmup_steps = {rise}, but the run has {total} steps: it would"
                " never reach its learning rate"
            )
        self.network, self.data, self.settings, self.replicas = network, data, settings, replicas
        self.steps_per_epoch = steps
        lengths = {"steps_per_epoch": steps, "total_steps": total}
        self.schedule = asdict(settings.schedule) | lengths
        network.initialize([replica.seed for replica in replicas], init)
        theta = network.theta
        self.initial_norms = diagnosis.norms(network, network.params)
        weights = _class_weights(settings, data.train.targets, network.classes, theta)
        if settings.compile:
            torch.compiler.reset()  # it keeps a few of the functions of one name only
        batch_size = min(batch_size, samples)
        # Of several processes each trains networks of its own, or where these are too few a portion
        # of each batch.
        self.apart = 1 < distributed.world() <= len(replicas)
        self.together = distributed.world() > 1 and not self.apart
        own = distributed.portion(len(replicas)) if self.apart else slice(0, len(replicas))
        parts, self.workers, self.hands, self.threads = divide(
            network.part(own), batch_size, settings.compile
        )
        if self.together:  # one message for a step
            parts, self.workers = [own], 1
        self.parts = [slice(own.start + part.start, own.start + part.stop) for part in parts]
        self._measuring = max(1, torch.get_num_threads() // self.workers)  # threads
        learned = data.train
        if low := _first_product(network, settings, batch_size, data):
            learned = Samples(data.train.x.to(low), data.train.y)  # which the product would round
        self.shards = [
            Steps(
                network.part(part),
                replace(data, train=_of_replicas(learned, part)),
                settings,
                replicas,
                part,
                self.schedule,
                None if weights is None else weights[part],
                self.hands,
                self.together,
            )
            for part in self.parts
        ]
        self._spare = [Workspace(theta.dtype, theta.device) for _ in range(self.workers)]
        # What a checkpoint holds besides theta and the optimizer's state:
        self.epoch = self.step_number = self.epoch_step = 0  # the last within the running epoch
        self.seconds = self.epoch_seconds = 0.0
        self.kept = theta.clone()
        self.ended = [""] * len(replicas)
        self.diverged = [False] * len(replicas)
        self.best = [-math.inf] * len(replicas)
        self.best_epoch = [0] * len(replicas)
        self.records: list[Record] = []
        self.ailments: list[str] = []  # of a replica, each told once
        self.diagnosed = -math.inf  # samples trained on before the last look
        self.looked_losses: list[float] = []  # the epoch's at that look

    def run(self) -> Iterator[Event]:
        """Train until the last epoch or until every replica has ended."""
        while not self.finished:
            yield from self._train_epoch()
            yield from self._diagnose()
            records = self._judge_epoch()
            self.records += records
            yield records
        self.network.theta.copy_(self.kept)

    @property
    def device(self) -> torch.device:
        return self.network.theta.device

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs or all(self.ended)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Sample indices (R or 1, B) of each batch of an epoch, a function of (seed, epoch)."""
        x = self.data.train.x
        if not self.settings.shuffle:
            order = epoch_order(x, None).unsqueeze(0)
        else:
            shared = self.settings.shared_batches
            seeds = [self.settings.seed] if shared else [replica.seed for replica in self.replicas]
            draws = (generator(seed, ORDER_STREAM, epoch) for seed in seeds)
            order = torch.stack([epoch_order(x, draw) for draw in draws])
        order = order.to(self.device)
        size = min(self.settings.batch_size, len(x))
        for start in range(0, self.steps_per_epoch * size, size):
            yield order[:, start : start + size]

    def step(self, index: Tensor) -> None:
        """One training step on the samples `index` (R or 1, B)."""
        self._steps([index])

    def _steps(self, batches: list[Tensor], run: Callable[..., Iterator[None]] = map) -> None:
        """All shards on some batches; `run` maps one after another or side by side."""
        with products_in("tf32" if self.settings.precision == "tf32" else "ieee"):
            for _ in run(partial(self._steps_of, batches), range(len(self.shards))):
                pass
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step_number += len(batches)

    def _steps_of(self, batches: list[Tensor], i: int) -> None:
        """Train shard i on the batches."""
        if len(batches[0]) > 1:
            batches = [index[self.parts[i]] for index in batches]
        with threads(self.threads):
            self.shards[i].train(batches, self.step_number)

    def clear_totals(self) -> None:
        """Begin new sums."""
        for shard in self.shards:
            shard.tally.clear()

    def totals(self) -> Tensor:
        """(2, R): the sums over the epoch's samples of the losses and of the hits."""
        totals = torch.cat([shard.tally.totals() for shard in self.shards], 1)
        return torch.cat(distributed.gathered(totals), 1) if self.apart else totals

    def rate_fraction(self, step: int) -> float:
        """The fraction of the base learning rate that a step of the run uses."""
        return schedule(step=step, **self.schedule)

    def state(self) -> dict[str, Any]:
        """All that a later `restore` needs to go on bit for bit: tensors and plain values.

        It is the same in every process, and how many there are has no influence on what it holds.
        """
        self._exchange()
        shards = [(shard.optimizer.state, shard.tally.state()) for shard in self.shards]
        if self.apart:
            shards = list(chain.from_iterable(distributed.gathered(shards)))
        optimizers, tallies = zip(*shards, strict=True)
        return {
            "theta": self.network.theta,
            "strides": self._strides(),
            "optimizer": {
                name: _joined([state[name] for state in optimizers]) for name in optimizers[0]
            },
            "kept": self.kept,
            "tally": _joined_tallies(tallies),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
            "records": [vars(record) for record in self.records],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; KeyError, RuntimeError or TypeError if it is of another run, or of
        a version that had the parameters in another order in memory."""
        if state["strides"] != self._strides():
            raise KeyError("strides")
        self.network.theta.copy_(state["theta"])
        self.kept.copy_(state["kept"])
        for part, shard in zip(self.parts, self.shards, strict=True):
            for name, tensor in shard.optimizer.state.items():
                tensor.copy_(state["optimizer"][name][part])
            shard.tally.restore(state["tally"], part)
        for name in _PROGRESS:
            setattr(self, name, state["progress"][name])
        self.records = [Record(**record) for record in state["records"]]

    def _exchange(self) -> None:
        """Have the parameters of the networks that other processes train."""
        if self.apart:
            for source, part in enumerate(distributed.portions(len(self.replicas))):
                distributed.spread(self.network.theta[part], source)

    def _strides(self) -> list[list[int]]:
        """How each parameter lies in a row of theta."""
        views = [view for named in self.network.params for view in named.values()]
        return [list(view.stride()[1:]) for view in views]

    def _train_epoch(self) -> Iterator[Progress]:
        if not self.epoch_step:
            self.epoch_seconds = 0.0
            self.clear_totals()
        for number, seconds in self.walk(list(self.batches(self.epoch + 1))[self.epoch_step :]):
            self.epoch_step += number
            self.epoch_seconds += seconds
            samples = min(self.epoch_step * self.settings.batch_size, self.epoch_samples)
            yield Progress(self.epoch + 1, samples, self.epoch_seconds)
        self._exchange()
        self.epoch += 1
        self.epoch_step = 0
        self.seconds += self.epoch_seconds

    def walk(self, batches: list[Tensor]) -> Iterator[tuple[int, float]]:
        """Train on the batches, some at a time: how many, and the seconds they took.

        Between them the state is whole, and can be saved. How many they are has no influence on any
        number; they take a tenth of a second, or a second where shards that go side by side wait
        for each other, and end where a checkpoint is due.
        """
        due, pause = self.settings.checkpoint_every_steps, 0.1 if self.workers == 1 else 1.0
        done, many = 0, 1
        with ThreadPoolExecutor(self.workers) as pool:
            run = map if self.workers == 1 else pool.map
            while done < len(batches):
                until_due = due - self.step_number % due if due else many
                some = batches[done : done + min(many, until_due)]
                begin = time.perf_counter()
                self._steps(some, run)
                seconds = distributed.most(time.perf_counter() - begin)
                done += len(some)
                many = max(1, min(4 * many, int(pause / seconds * len(some))))
                yield len(some), seconds

    def _diagnose(self) -> Iterator[Note]:
        """What ails the live replicas, each ailment told once; short epochs share a look."""
        x = self.data.train.x[: diagnosis.SAMPLES]
        trained = self.epoch * self.epoch_samples
        if trained - self.diagnosed < diagnosis.EVERY * len(x):
            return
        self.diagnosed = trained
        y = self.data.train.targets[:, : len(x)]
        found = []
        for part, shard in zip(self.parts, self.shards, strict=True):
            own = diagnosis.diagnose(
                shard.network,
                shard.hands[0].grads,
                self.initial_norms[:, part],
                x,
                y[part] if len(y) > 1 else y,
                shard.loss,
                shard.hands[0].workspace,
            )
            found += [(part.start + r, what, text) for r, what, text in own]
        if self.apart:
            found = list(chain.from_iterable(distributed.gathered(found)))
        replicas = range(len(self.replicas))
        if self.epoch == 1 and diagnosis.constant(self.data.train.x):
            text = "all examples are the same: check the files of the data set"
            found += [(r, "constant", text) for r in replicas]
        losses, accuracies = (self.totals() / self.epoch_samples).tolist()
        classes = int(self.data.train.targets.max()) + 1
        guess = diagnosis.guess_loss(self.settings.loss, classes, self.network.outputs)
        for r in replicas if self.looked_losses and self.step_number >= 100 else ():
            pair = (self.looked_losses[r], losses[r])
            if line := diagnosis.stuck(pair, guess, self.replicas[r].corruption > 0):
                found.append((r, "stuck", line))
        self.looked_losses = losses
        for r, what, text in found:
            fitted = accuracies[r] == 1  # nothing is left to learn, whatever its gradient
            new = f"{r} {what}" not in self.ailments
            if new and not fitted and not self.ended[r]:
                ailment = f"{r} {what}"
                self.ailments.append(ailment)
                yield Note(self.replicas[r].label, self.replicas[r].seed, self.epoch, text)

    def last_records(self) -> list[Record]:
        """Those of the last epoch that has any."""
        return [x for x in self.records if x.epoch == self.records[-1].epoch]

    @property
    def epoch_samples(self) -> int:
        """How many samples an epoch trains on."""
        return min(self.steps_per_epoch * self.settings.batch_size, len(self.data.train))

    def _judge_epoch(self) -> list[Record]:
        """Records of the live replicas; keep their weights; end those that must end."""
        train = (self.totals() / self.epoch_samples).tolist()
        last = self.epoch >= self.settings.epochs
        due = last or self.epoch % self.settings.evaluate_every == 0
        valid = self.measure(self.data.valid if due else None)
        test = self.measure(self.data.test if due else None)
        finite = self.network.theta.isfinite().all(1).tolist()
        fraction = self.rate_fraction(self.step_number - 1)
        records = []
        for r, replica in enumerate(self.replicas):
            if self.ended[r]:
                continue
            record = Record(
                replica.label,
                replica.seed,
                self.epoch,
                self.step_number,
                self.epoch_seconds,
                replica.learning_rate * fraction,
                train[0][r],
                train[1][r],
                *valid[r],
                *test[r],
            )
            records.append(record)
            self._judge(r, record, finite[r])
        return records

    def _judge(self, r: int, record: Record, finite: bool) -> None:
        """Keep the weights of replica r, or say why it ends."""
        early = self.settings.early_stopping
        if not (finite and math.isfinite(record.train_loss)):
            what = "the weights are" if math.isfinite(record.train_loss) else "the loss is"
            self.diverged[r] = True
            self.ended[r] = (
                f"diverged in epoch {self.epoch}: {what} no longer finite; lower"
                " train.optimizer.learning_rate"
            )
            return
        if early.patience:
            value = getattr(record, early.monitor)
            if value is None:
                return  # not measured in this epoch
            score = -value if early.monitor == "valid_loss" else value
            if not score > self.best[r]:
                if self.epoch - self.best_epoch[r] >= early.patience:
                    self.ended[r] = (
                        f"stopped early after epoch {self.epoch}: best {early.monitor} in epoch"
                        f" {self.best_epoch[r]}"
                    )
                return
            self.best[r] = score
        self.best_epoch[r] = self.epoch
        self.kept[r].copy_(self.network.theta[r])

    def measure(self, samples: Samples | None) -> list[tuple[float | None, float | None]]:
        """(loss, accuracy) of each replica on `samples`, in evaluation mode."""
        if samples is None:
            return [(None, None)] * len(self.replicas)

        rows = distributed.portion(len(samples)) if self.together else slice(0, len(samples))
        totals = torch.zeros(2, len(self.replicas), dtype=torch.float64, device=self.device)

        def work(part: slice, shard: Steps) -> None:
            own = _of_replicas(samples, part)
            workspace = self._spare.pop()  # one for each worker, whatever it measures
            try:
                with threads(self._measuring):
                    loss, sums = self.settings.loss, totals[:, part]
                    add_measured(shard.network, own, loss, workspace, sums, rows)
            finally:
                self._spare.append(workspace)

        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(work, self.parts, self.shards):
                pass
        return _means(distributed.add_up(totals), len(samples))


_PROGRESS = (
    *("epoch", "step_number", "epoch_step", "seconds", "epoch_seconds"),
    *("ended", "diverged", "best", "best_epoch", "ailments", "diagnosed"),
    "looked_losses",
)


def of_replicas(state: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The `state` that a Training of some replicas alone goes on from, between two epochs."""
    rows_of = torch.tensor(rows, device=state["theta"].device)
    progress = dict(state["progress"])
    for name in ("ended", "diverged", "best", "best_epoch", "looked_losses"):
        progress[name] = [progress[name][r] for r in rows] if progress[name] else []
    told = [ailment.partition(" ") for ailment in progress["ailments"]]
    places = {str(r): i for i, r in enumerate(rows)}
    progress["ailments"] = [f"{places[r]} {what}" for r, _, what in told if r in places]
    return state | {
        "theta": state["theta"][rows_of],
        "kept": state["kept"][rows_of],
        "optimizer": {name: rows_[rows_of] for name, rows_ in state["optimizer"].items()},
        "tally": {"totals": state["tally"]["totals"][:, rows_of], "count": 0, "size": 0},
        "progress": progress,
    }


def divide(network: Network, batch_size: int, compiled: bool) -> tuple[list[slice], int, int, int]:
    """Which replicas are trained together, how many such shards side by side, how many hands have a
    share of each batch, and the threads of each product.

    One network has all threads; several have one each, or their share of more: a thread that works
    alone never waits for another. Only so many are in a shard that a step's numbers stay in a cache
    while operations on all of them at once still save calls.
    """
    replicas, cores = network.replicas, torch.get_num_threads()
    if replicas == 1 or network.theta.is_cuda or compiled:
        shared = network.convolutional and not (network.theta.is_cuda or compiled)
        hands = cores if shared else 1
        return [slice(0, replicas)], 1, hands, cores if hands == 1 else 1
    workers = min(replicas, cores)
    most = max(1, SHARD // network.numbers(batch_size))
    rounds = -(-replicas // (most * workers))  # each worker trains so many shards in turn
    return evenly(replicas, rounds * workers), workers, 1, max(1, cores // workers)


def _first_product(
    network: Network, settings: Train, batch_size: int, data: Prepared
) -> torch.dtype | None:
    """The low type of the first layer's product, if that is what takes the samples as they are."""
    layers = (x for x in network.layers if not isinstance(x, Flatten | ChannelsLast))
    first = next(layers)
    if not isinstance(first, Linear) or data.augment:
        return None
    workspace = Workspace(torch.float32, network.theta.device, LOW.get(settings.precision))
    out = torch.Size((1, batch_size, first.units))
    return lowered(out, math.prod(data.shape), workspace)


def most_at_once(network: Network, settings: Train, samples: int) -> int:
    """How many networks like this one may train together in half of the memory that is free."""
    state = 1 if settings.optimizer.name == "sgd" else 3
    rows = 2 * (3 + state)  # parameters, those kept, gradient; and a checkpoint's copy of them
    # Forward, backward, and what they round to; or a chunk of an evaluation.
    batch = max(4 * min(settings.batch_size, samples), network.chunk // 8) * network.activations
    batch = -(-batch // distributed.world())  # each process trains some of the networks
    numbers = rows * network.layout.width + batch + 2 * samples  # and their order
    each = numbers * network.theta.element_size()
    free = free_memory(network.theta.device)
    if network.theta.device.type == "cpu":
        free //= distributed.local_world()
    return max(1, free // 2 // each)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """One after another; of one no copy, which a large network has no room for."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _joined_tallies(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all shards' tallies as that of one."""
    joined = dict(states[0])
    for name, dim in (("totals", 1), ("logits", 0), ("y", 0)):
        if name in joined:
            joined[name] = _joined([state[name] for state in states], dim)
    return joined


def _of_replicas(samples: Samples, part: slice) -> Samples:
    """The samples with the labels that the replicas `part` learn."""
    return samples if samples.y.dim() == 1 else Samples(samples.x, samples.y[part])


def _class_weights(settings: Train, labels: Tensor, classes: int, like: Tensor) -> Tensor | None:
    """The weight of each class (R, K) in the gradient, for labels (R or 1, N); None if all are 1.

    "balanced" is N / (C n_k) for a class of n_k samples, C classes having any (King and Zeng 2001):
    they have the same sum, and the mean over the samples is 1. A class without samples has 0.
    """
    chosen = settings.class_weights
    if chosen is None:
        return None
    if chosen == "balanced":
        counts = torch.stack([row.bincount(minlength=classes) for row in labels.cpu()]).double()
        present = (counts > 0).sum(1, keepdim=True)
        weights = torch.where(counts > 0, labels.shape[1] / (present * counts), 0.0)
    else:
        weights = torch.tensor([chosen], dtype=torch.float64, device="cpu")
        if not any(chosen):
            raise InputError("train.class_weights are all 0: nothing would be learned")
        if len(chosen) != classes:
            raise InputError(
                f"train.class_weights has {len(chosen)} numbers, but there are {classes} classes"
            )
    return weights.to(like).expand(len(like), classes)


def evaluate(
    network: Network, samples: Samples, loss: str, workspace: Workspace | None = None
) -> list[tuple[float | None, float | None]]:
    """(mean loss, accuracy in [0, 1]) of each replica, without dropout or label smoothing."""
    totals = torch.zeros(2, network.replicas, dtype=torch.float64, device=network.theta.device)
    workspace = workspace or Workspace(network.theta.dtype, network.theta.device)
    add_measured(network, samples, loss, workspace, totals)
    return _means(totals, len(samples))


def add_measured(
    network: Network,
    samples: Samples,
    loss: str,
    workspace: Workspace,
    totals: Tensor,
    rows: slice | None = None,
) -> None:
    """Add to `totals` (2, R) the sums over the samples, or over `rows` of them, of each replica's
    losses and hits."""
    for start, logits in network.chunks(samples.x, workspace, rows):
        y = samples.targets[:, start : start + logits.shape[1]]
        with torch.inference_mode():
            measure(LOSSES[loss], logits, y, workspace, totals)


def _means(totals: Tensor, count: int) -> list[tuple[float | None, float | None]]:
    """Those of `totals` (2, R) over so many samples, each replica's."""
    losses, accuracies = (totals / count).tolist()
    return list(zip(losses, accuracies, strict=True))
