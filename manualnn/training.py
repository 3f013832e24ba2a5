"""The loop: R networks trained at once on one data set, one record per epoch and network.

Shapes: R replicas, B samples of a batch, N samples of the training part, P parameters.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import diagnosis
from .capture import Recording
from .config import Replica, Train
from .data import Prepared, Samples
from .errors import InputError
from .losses import LOSSES, Loss, hits, outputs
from .network import Network
from .optimizers import SGD, Adam, Optimizer, Penalty, schedule
from .workspace import Noise, Workspace, generator, mix

# Probabilities of fitted samples fall below 1e-38, and products of such numbers take many times as
# long. Set before there are threads, which have it from the one that starts them.
torch.set_flush_denormal(True)

ORDER_STREAM, DROPOUT_STREAM = 0x0D01, 0xD120
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


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


class Tally:
    """Sums of the losses and of the hits over the batches of an epoch.

    A step only leaves its logits here. They are measured together, some steps' at a time: a dozen
    small operations for each would take as long as a good part of its products.
    """

    STEPS, NUMBERS = 16, 2**18  # together: so many steps at most, so many logits of one network

    def __init__(self, loss: Loss, replicas: int, workspace: Workspace) -> None:
        self.loss, self.workspace = loss, workspace
        self._totals = torch.zeros(2, replicas, dtype=torch.float64, device=workspace.device)
        self._room: dict[int, list[tuple[Tensor, Tensor]]] = {}  # for each batch size
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # the same as wholes
        self._count = self._size = 0  # steps kept, and their batch size

    def clear(self) -> None:
        """Begin a new epoch."""
        self._count = 0
        self._totals.zero_()

    def add(self, logits: Tensor, y: Tensor) -> None:
        """Keep the logits (R, B, K) and targets (R or 1, B) of a step."""
        size = logits.shape[1]
        if size != self._size:
            self.totals()
            self._size = size
            if size not in self._room:
                self._make_room(logits, y)
        room = self._room[size]
        kept_logits, kept_y = room[self._count]
        kept_logits.copy_(logits)
        kept_y.copy_(y)
        self._count += 1
        if self._count == len(room):
            self._measure()

    def totals(self) -> Tensor:
        """(2, R) float64: the sum over the samples of the loss, and how many were decided right."""
        if self._count:
            self._measure()
        return self._totals

    def _make_room(self, logits: Tensor, y: Tensor) -> None:
        replicas, size, outputs = logits.shape
        steps = max(1, min(self.STEPS, self.NUMBERS // (size * outputs)))
        self.workspace.begin(("tally", size))
        logits = self.workspace.empty((replicas, steps * size, outputs))
        y = self.workspace.empty((len(y), steps * size), torch.int64)
        self._kept[size] = logits, y
        parts = [slice(i * size, (i + 1) * size) for i in range(steps)]
        self._room[size] = [(logits[:, part], y[:, part]) for part in parts]

    @torch.inference_mode()
    def _measure(self) -> None:
        rows = self._count * self._size
        logits, y = (kept[:, :rows] for kept in self._kept[self._size])
        self.workspace.begin(("measure", rows))
        measure(self.loss, logits, y, self.workspace, self._totals)
        self._count = 0


def measure(loss: Loss, logits: Tensor, y: Tensor, workspace: Workspace, totals: Tensor) -> None:
    """Add to `totals` (2, R) the sum of the losses of logits (R, B, K), and their hits."""
    totals[0].add_(loss.value(logits, y, workspace), alpha=logits.shape[1])
    totals[1].add_(hits(logits, y, workspace))


@dataclass
class Batch:
    """What the steps on batches of one size share: the buffers x (R or 1, B, ...) and y (R or 1, B)
    that samples are copied to, the logits, and the recorded step."""

    x: Tensor
    y: Tensor
    logits: Tensor | None = None
    recording: Recording | None = None

    @classmethod
    def like(cls, index: Tensor, data: Prepared) -> "Batch":
        """For the samples `index` (R or 1, B)."""
        with torch.inference_mode(False):
            x = data.train.x.new_empty((*index.shape, *data.shape))
            rows = max(len(index), len(data.train.targets))
            return cls(x, data.train.y.new_empty((rows, index.shape[1])))

    def gather(self, index: Tensor, data: Prepared) -> None:
        """Copy the samples `index` (R or 1, B) to the buffers."""
        for out, chosen in zip(self.x, index, strict=True):
            torch.index_select(data.train.x, 0, chosen, out=out)
        labels = data.train.targets
        if len(labels) < len(index):
            labels = labels.expand(len(index), -1)
        elif len(index) < len(labels):
            index = index.expand(self.y.shape)
        torch.gather(labels, 1, index, out=self.y)


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
        samples, batch_size = len(data.train), settings.batch_size
        steps = samples // batch_size if settings.drop_last else math.ceil(samples / batch_size)
        if not steps:
            raise InputError(
                f"train.batch_size = {batch_size} with drop_last leaves no batch: {samples} samples"
            )
        self.network, self.data, self.settings, self.replicas = network, data, settings, replicas
        self.steps_per_epoch = steps
        lengths = {"steps_per_epoch": steps, "total_steps": steps * settings.epochs}
        self.schedule = asdict(settings.schedule) | lengths
        network.initialize([replica.seed for replica in replicas], init)
        theta = network.theta
        self.initial_norms = diagnosis.norms(network, network.params)

        def column(name: str) -> Tensor:
            values = [getattr(replica, name) for replica in replicas]
            return torch.tensor(values, dtype=torch.float64).to(theta).unsqueeze(1)

        self.workspace = Workspace(theta.dtype, theta.device)
        self.class_weights = _class_weights(settings, data.train.targets, network.classes, theta)
        self.loss = LOSSES[settings.loss]
        self.base_rate = column("learning_rate")
        self.rate = self.base_rate.clone()
        mask = network.layout.weight_mask().to(theta)
        self.optimizer, coupled = make_optimizer(
            settings, theta, column("momentum"), column("l2") * mask
        )
        self.penalty = Penalty(column("l1"), column("l2") * coupled, mask)
        self.grad = torch.zeros_like(theta)
        self.grads = network.layout.views(self.grad)
        self.noise_seeds = torch.tensor(
            [[mix(replica.seed, DROPOUT_STREAM)] for replica in replicas], device=theta.device
        )
        self._batches: dict[int, Batch] = {}  # of each size
        # Plain gradient descent goes into the products: W += x^T (-learning_rate dy).
        self.plain = settings.optimizer.name == "sgd" and all(r.plain for r in replicas)
        self._negative_rate = -self.rate.unsqueeze(2)
        self._fraction = 1.0
        self.tally = Tally(self.loss, len(replicas), self.workspace)
        # What a checkpoint holds besides theta and the optimizer's state:
        self.epoch = self.step_number = 0
        self.seconds = 0.0
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
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs or all(self.ended)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Sample indices (R or 1, B) of each batch of an epoch, a function of (seed, epoch)."""
        count = len(self.data.train)
        if not self.settings.shuffle:
            order = torch.arange(count).unsqueeze(0)
        else:
            shared = self.settings.shared_batches
            seeds = [self.settings.seed] if shared else [replica.seed for replica in self.replicas]
            order = torch.stack(
                [torch.randperm(count, generator=generator(s, ORDER_STREAM, epoch)) for s in seeds]
            )
        order = order.to(self.grad.device)
        size = min(self.settings.batch_size, count)
        for start in range(0, self.steps_per_epoch * size, size):
            yield order[:, start : start + size]

    @torch.inference_mode()
    def step(self, index: Tensor) -> None:
        """One training step on the samples `index` (R or 1, B)."""
        count = index.shape[1]
        if count not in self._batches:
            self._batches[count] = Batch.like(index, self.data)
        batch = self._batches[count]
        self.workspace.begin(("train", count), Noise(self.noise_seeds, self.step_number))
        self._set_rate(self.rate_fraction(self.step_number))
        if not self.plain:
            self.optimizer.prepare(self.rate, self.step_number + 1)
        batch.gather(index, self.data)
        x = batch.x
        if self.data.augment:
            seeds = [r.seed for r in self.replicas[: len(x)]]
            x = self.data.augment.apply(x, seeds, self.step_number, self.workspace)
        x = x.expand(self.network.replicas, *x.shape[1:])
        if batch.recording and not batch.recording.obstacle:
            batch.recording()
        elif batch.logits is None or batch.recording:
            batch.logits = self._update(x, batch.y)  # and all other buffers are made
        else:
            batch.recording = Recording()
            with batch.recording:
                self._update(x, batch.y)
        self.tally.add(batch.logits, batch.y)
        self.step_number += 1

    def _set_rate(self, fraction: float) -> None:
        """Learning rates are numbers in memory, which a recorded step reads."""
        if fraction != self._fraction:
            self._fraction = fraction
            torch.mul(self.base_rate, fraction, out=self.rate)
            torch.neg(self.rate.unsqueeze(2), out=self._negative_rate)

    def _update(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward, backward and optimizer on a batch x (R, B, ...), y (R or 1, B); the logits."""
        network, settings, workspace = self.network, self.settings, self.workspace
        count = x.shape[1]
        logits, caches = network.forward(x, workspace)
        dlogits = self.loss.gradient(logits, y, workspace, settings.label_smoothing)
        if self.class_weights is not None:
            scale = workspace.empty((network.replicas, count))
            torch.gather(self.class_weights, 1, y.expand(scale.shape), out=scale)
            dlogits.mul_(scale.unsqueeze(2))
        if self.plain:
            dlogits.mul_(self._negative_rate)
            network.backward(dlogits, caches, network.params, workspace, beta=1)
        else:
            network.backward(dlogits, caches, self.grads, workspace)
            self.penalty.add(network.theta, self.grad)
            self.optimizer.step(network.theta, self.grad, self.rate)
        return logits

    def rate_fraction(self, step: int) -> float:
        """The fraction of the base learning rate that a step of the run uses."""
        return schedule(step=step, **self.schedule)

    def state(self) -> dict[str, Any]:
        """All that a later `restore` needs to go on bit for bit: tensors and plain values."""
        return {
            "theta": self.network.theta,
            "optimizer": self.optimizer.state,
            "kept": self.kept,
            "progress": {name: getattr(self, name) for name in _PROGRESS},
            "records": [asdict(record) for record in self.records],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; KeyError, RuntimeError or TypeError if it is of another run."""
        self.network.theta.copy_(state["theta"])
        self.kept.copy_(state["kept"])
        for name, tensor in self.optimizer.state.items():
            tensor.copy_(state["optimizer"][name])
        for name in _PROGRESS:
            setattr(self, name, state["progress"][name])
        self.records = [Record(**record) for record in state["records"]]

    def _train_epoch(self) -> Iterator[Progress]:
        self.tally.clear()
        begin = time.perf_counter()
        for number, index in enumerate(self.batches(self.epoch + 1), 1):
            self.step(index)
            if number % 16 == 0:
                samples = number * self.settings.batch_size
                yield Progress(self.epoch + 1, samples, time.perf_counter() - begin)
        if self.grad.is_cuda:
            torch.cuda.synchronize(self.grad.device)
        self.epoch += 1
        self.epoch_seconds = time.perf_counter() - begin
        self.seconds += self.epoch_seconds

    def _diagnose(self) -> Iterator[Note]:
        """What ails the live replicas, each ailment told once; short epochs share a look."""
        x = self.data.train.x[: diagnosis.SAMPLES]
        trained = self.epoch * self.epoch_samples
        if trained - self.diagnosed < diagnosis.EVERY * len(x):
            return
        self.diagnosed = trained
        y = self.data.train.targets[:, : len(x)]
        found = diagnosis.diagnose(
            self.network, self.grads, self.initial_norms, x, y, self.loss, self.workspace
        )
        replicas = range(len(self.replicas))
        if self.epoch == 1 and diagnosis.constant(self.data.train.x):
            text = "all examples are the same: check the files of the data set"
            found += [(r, "constant", text) for r in replicas]
        losses, accuracies = (self.tally.totals() / self.epoch_samples).tolist()
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
        train = (self.tally.totals() / self.epoch_samples).tolist()
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
        return evaluate(self.network, samples, self.settings.loss, self.workspace)


_PROGRESS = (
    *("epoch", "step_number", "seconds", "ended", "diverged", "best", "best_epoch"),
    *("ailments", "diagnosed", "looked_losses"),
)


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
        weights = torch.tensor([chosen], dtype=torch.float64)
        if not any(chosen):
            raise InputError("train.class_weights are all 0: nothing would be learned")
        if len(chosen) != classes:
            raise InputError(
                f"train.class_weights has {len(chosen)} numbers, but there are {classes} classes"
            )
    return weights.to(like).expand(len(like), classes)


def make_optimizer(
    settings: Train, theta: Tensor, momentum: Tensor, decay: Tensor
) -> tuple[Optimizer, bool]:
    """The optimizer, and whether L2 belongs into the gradient: AdamW applies `decay` itself."""
    chosen = settings.optimizer
    if chosen.name == "sgd":
        return SGD(theta, momentum, chosen.nesterov), True
    decoupled = decay if chosen.name == "adamw" else None
    adam = Adam(theta, chosen.beta1, chosen.beta2, chosen.epsilon, decoupled)
    return adam, decoupled is None


def evaluate(
    network: Network, samples: Samples, loss: str, workspace: Workspace | None = None
) -> list[tuple[float | None, float | None]]:
    """(mean loss, accuracy in [0, 1]) of each replica, without dropout or label smoothing."""
    workspace = workspace or Workspace(network.theta.dtype, network.theta.device)
    totals = torch.zeros(2, network.replicas, dtype=torch.float64, device=network.theta.device)
    for start, logits in network.chunks(samples.x, workspace):
        y = samples.targets[:, start : start + logits.shape[1]]
        with torch.inference_mode():
            measure(LOSSES[loss], logits, y, workspace, totals)
    losses, accuracies = (totals / len(samples)).tolist()
    return list(zip(losses, accuracies, strict=True))
