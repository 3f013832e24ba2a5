"""One training step of R networks: batches copied to buffers, forward, backward, optimizer.

What a step computes, it writes to memory that the next one uses again; the calls that do it are
recorded once for each batch size and then played.

Shapes: R replicas, B samples of a batch, N samples of the training part, P parameters.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .capture import Replay
from .config import Replica, Train
from .data import Prepared, Streamed
from .layers import Dropout
from .losses import LOSSES, Loss, hits
from .network import Network
from .optimizers import SGD, Adam, Optimizer, Penalty, schedule
from .parameters import Views
from .workspace import Noise, Workspace, clock, mix

DROPOUT_STREAM = 0xD120
PIECE = 2**20  # numbers that stay in a cache
LOW = {"bf16": torch.bfloat16}  # of products, where the precision names another type


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products of float32 matrices on a GPU are in "tf32" or "ieee" arithmetic.

    Set by torch's newer interface alone: a program may use it, too, and the older one beside it is
    an error (https://docs.pytorch.org/docs/stable/notes/cuda.html). Untouched where it is so.
    """
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    if (before == "tf32") == (precision == "tf32"):
        yield
        return
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


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

    def count_in(self, sums: Tensor) -> None:
        """Add the sums (2, R) of a step that was measured elsewhere."""
        self._totals.add_(sums)

    def totals(self) -> Tensor:
        """(2, R) float64: the sum over the samples of the loss, and how many were decided right."""
        if self._count:
            self._measure()
        return self._totals

    def state(self) -> dict[str, Any]:
        """What a later `restore` needs to go on bit for bit."""
        state: dict[str, Any] = {"totals": self._totals, "count": self._count, "size": self._size}
        if self._count:
            logits, y = (kept[:, : self._count * self._size] for kept in self._kept[self._size])
            state |= {"logits": logits, "y": y.expand(len(logits), -1)}
        return state

    def restore(self, state: dict[str, Any], part: slice) -> None:
        """Go on from the replicas `part` of a `state`."""
        self._totals.copy_(state["totals"][:, part])
        self._count, self._size = 0, 0
        for i in range(state["count"]):
            rows = slice(i * state["size"], (i + 1) * state["size"])
            self.add(state["logits"][part, rows], state["y"][part, rows])

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


class Batch:
    """What the steps on batches of one size share: buffers for the indices (R or 1, B) of samples,
    the samples x (R or 1, B, ...) and y (R or 1, B), and the logits (R, B, K); and what a step does
    with them: `shares` may go side by side, then comes `finish`, and between them `report` where
    processes train together. These are the samples from `first` on of a batch of `whole`."""

    shares: list[Replay]
    report: Replay
    finish: Replay

    def __init__(
        self, index: Tensor, data: Prepared, network: Network, first: int, whole: int
    ) -> None:
        self.data, self.first, self.whole = data, first, whole
        with torch.inference_mode(False):
            self.index = index.new_empty(index.shape)
            # Each replica's starts aligned, as products of one column choose their order by it.
            numbers = index.shape[1] * math.prod(data.shape)
            room = data.train.x.new_empty(len(index), -(-numbers // 32) * 32)
            self.x = room[:, :numbers].view(*index.shape, *data.shape)
            rows = max(len(index), len(data.train.targets))
            self.y = data.train.y.new_empty((rows, index.shape[1]))
        workspace = Workspace(network.theta.dtype, network.theta.device)
        self.logits = workspace.empty((network.replicas, index.shape[1], network.outputs))

    def gather(self, piece: slice) -> None:
        """Copy those of the samples that `piece` names, of each replica, to x."""
        x, index = self.x[:, piece], self.index[:, piece]
        if x.is_contiguous():
            x, index = x.flatten(0, 1).unsqueeze(0), index.flatten().unsqueeze(0)
        for out, chosen in zip(x, index, strict=True):
            if isinstance(self.data.train.x, Streamed):
                self.data.train.x.gather(chosen, out)
            else:
                torch.index_select(self.data.train.x, 0, chosen, out=out)

    def gather_labels(self, piece: slice) -> None:
        """Copy their labels to y."""
        labels, out = self.data.train.targets, self.y[:, piece]
        index = self.index[:, piece].expand(out.shape)
        torch.gather(labels.expand(len(out), -1), 1, index, out=out)


@dataclass
class Hand:
    """The memory of one thread that works on shares of batches: buffers, and their gradient."""

    workspace: Workspace
    grad: Tensor
    grads: list[Views]


class Steps:
    """The training steps of the replicas `part` of a population, of their `network`, and the memory
    that they need. What kind of step it is does not depend on the part.

    `schedule` are the arguments of `manualnn.optimizers.schedule` besides the step; `class_weights`
    (R, K) scale the gradient of a sample by its class. With `together` each process has a portion
    of each batch, and the sum of all gradients: the losses and hits travel in the same message.
    """

    def __init__(
        self,
        network: Network,
        data: Prepared,
        settings: Train,
        population: list[Replica],
        part: slice,
        schedule: dict[str, Any],
        class_weights: Tensor | None = None,
        hands: int = 1,
        together: bool = False,
    ) -> None:
        replicas = population[part]
        self.network, self.data, self.settings, self.replicas = network, data, settings, replicas
        self.schedule, self.class_weights = schedule, class_weights
        theta = network.theta

        def column(name: str) -> Tensor:
            values = [getattr(replica, name) for replica in replicas]
            return torch.tensor(values, dtype=torch.float64, device="cpu").to(theta).unsqueeze(1)

        # Whether samples are gathered before what is recorded of a step.
        self._early = bool(data.augment) or isinstance(data.train.x, Streamed)
        self.loss = LOSSES[settings.loss]
        self.tally = Tally(self.loss, len(replicas), Workspace(theta.dtype, theta.device))
        self.base_rate = column("learning_rate")
        self.rate = self.base_rate.clone()
        self._negative_rate = -self.rate.unsqueeze(2)
        self._fraction = 1.0
        mask = network.layout.weight_mask().to(theta)
        self.optimizer, coupled = make_optimizer(
            settings,
            theta,
            column("momentum") if any(r.momentum for r in population) else None,
            column("l2") * mask,
        )
        self.penalty = Penalty(column("l1"), column("l2") * coupled, mask)
        # Plain gradient descent goes into the products: W += x^T (-learning_rate dy).
        plain = settings.optimizer.name == "sgd" and all(r.plain for r in population)
        self.plain = plain and not together  # what others add is not in the products
        self.together = together
        # The gradient, and behind it what travels with it.
        self._message = theta.new_zeros(theta.numel() + 2 * len(replicas) + 1)
        self._sums = self._message[theta.numel() : -1].view(2, -1)
        self._counted = torch.zeros((), dtype=torch.float64, device=theta.device)
        self.hands = []
        for number in range(hands):
            first = self._message[: theta.numel()].view(theta.shape)
            grad = torch.zeros_like(theta) if number else first
            workspace = Workspace(
                theta.dtype, theta.device, LOW.get(settings.precision), settings.compile
            )
            self.hands.append(Hand(workspace, grad, network.layout.views(grad)))
        self._gaps = network.layout.gaps(self.hands[0].grad)
        self._crew = ThreadPoolExecutor(hands - 1) if hands > 1 else None
        self._clock = clock().to(theta.device)
        self._random = any(isinstance(layer, Dropout) for layer in network.layers)
        self._noise_seeds = torch.tensor(
            [[mix(replica.seed, DROPOUT_STREAM)] for replica in replicas], device=theta.device
        )
        self._batches: dict[int, Batch] = {}  # of each size

    @torch.inference_mode()
    def train(self, batches: list[Tensor], first: int) -> None:
        """Steps `first` and on of the run, from 0, on the samples `batches`, each (R or 1, B)."""
        for number, index in enumerate(batches, first):
            self._step(index, number)
        if self.together:
            counted, expected = int(self._counted), sum(index.shape[1] for index in batches)
            self._counted.zero_()
            if counted != expected:
                raise RuntimeError(f"the processes trained on {counted} samples of {expected}")

    def _step(self, index: Tensor, number: int) -> None:
        count = whole = index.shape[1]
        own = slice(0, whole)
        if self.together:
            own = distributed.portion(whole)
            index, count = index[:, own], own.stop - own.start
        if whole not in self._batches:
            batch = Batch(index, self.data, self.network, own.start, whole)
            self._batches[whole] = self._prepare(batch)
        batch = self._batches[whole]
        batch.index.copy_(index)
        self._set_rate(schedule(step=number, **self.schedule))
        self.optimizer.prepare(self.rate, number + 1)
        if self._random:
            self._clock.fill_(number << 32)
        if self._early and count:
            batch.gather(slice(count))
        if self.data.augment and count:
            seeds = [r.seed for r in self.replicas]
            if self.settings.shared_batches or not self.settings.shuffle:
                seeds = [self.settings.seed]  # one row for all, also for those of other shards
            workspace = self.hands[0].workspace
            workspace.begin(("augment", count))
            with products_in("ieee"):  # coordinates of pixels need all their digits
                changed = self.data.augment.apply(batch.x, seeds, number, workspace, own, whole)
            batch.x.copy_(changed)
        if self._crew is None or not count:
            for share in batch.shares:
                share()
        else:
            others = [self._crew.submit(self._help, share) for share in batch.shares[1:]]
            try:
                batch.shares[0]()
            finally:
                wait(others)
            for other in others:
                other.result()
        if not self.together:
            batch.finish()
            self.tally.add(batch.logits, batch.y)
            return
        batch.report()
        distributed.add_up(self._message)
        self.tally.count_in(self._sums)
        self._counted.add_(self._message[-1])
        batch.finish()

    @staticmethod
    def _help(share: Replay) -> None:
        with torch.inference_mode(), threads(1):
            share()

    def _set_rate(self, fraction: float) -> None:
        """Learning rates are numbers in memory, which a recorded step reads."""
        if fraction != self._fraction:
            self._fraction = fraction
            torch.mul(self.base_rate, fraction, out=self.rate)
            torch.neg(self.rate.unsqueeze(2), out=self._negative_rate)

    def _prepare(self, batch: Batch) -> Batch:
        """Say what a step does to a batch: each hand has a share of the samples, one after another
        so many that what becomes of them stays in the cache."""
        how = "graph" if self.network.theta.is_cuda else "calls"
        how = "compile" if self.settings.compile else how
        count = batch.y.shape[1]
        most = max(1, count)
        if self.network.convolutional and how == "calls":
            most = max(1, PIECE // self.network.activations)
        hands = self.hands[: max(1, -(-count // most))]
        share = -(-count // len(hands))
        each = max(1, -(-share // most))  # pieces of a share
        pieces = evenly(count, each * len(hands))
        shares = [pieces[i : i + each] for i in range(0, len(pieces), each)]
        hands = hands[: len(shares)]
        alone = self.plain and [len(pieces) for pieces in shares] == [1]
        batch.shares = [
            Replay(partial(self._backpropagate, batch, pieces, hand, alone), how)
            for pieces, hand in zip(shares, hands, strict=True)
        ]
        report = partial(self._report, batch, hands)
        batch.report = Replay(report, "calls" if not count else how)
        finish = partial(self._finish, [] if self.together else hands[1:], alone)
        batch.finish = Replay(finish, "calls" if alone else how)  # nothing makes no graph
        return batch

    def _backpropagate(self, batch: Batch, pieces: list[slice], hand: Hand, alone: bool) -> None:
        """Forward and backward on the samples `pieces`: the gradient, into `hand`.

        Where they are `alone`, plain gradient descent goes into the products of backward itself:
        W += x^T (-learning_rate dy), dx of the old W before it.
        """
        network, settings, workspace = self.network, self.settings, hand.workspace
        for number, piece in enumerate(pieces):
            batch.gather_labels(piece)
            if not self._early:
                batch.gather(piece)
            x, y = batch.x[:, piece], batch.y[:, piece]
            noise = Noise(self._noise_seeds, self._clock, batch.first + piece.start)
            workspace.begin(("train", x.shape[1]), noise)
            logits, caches = network.forward(x.expand(network.replicas, *x.shape[1:]), workspace)
            batch.logits[:, piece].copy_(logits)
            smoothing = settings.label_smoothing
            dlogits = self.loss.gradient(logits, y, workspace, smoothing, batch.whole)
            if self.class_weights is not None:
                scale = workspace.empty(logits.shape[:2])
                torch.gather(self.class_weights, 1, y.expand(scale.shape), out=scale)
                dlogits.mul_(scale.unsqueeze(2))
            if alone:
                dlogits.mul_(self._negative_rate)
                network.backward(dlogits, caches, network.params, workspace, beta=1)
            else:
                network.backward(dlogits, caches, hand.grads, workspace, beta=int(number > 0))

    def _report(self, batch: Batch, hands: list[Hand]) -> None:
        """What the other processes need of this one's portion: the sums over its samples of the
        gradients, which are divided by the whole batch's size, losses and hits; and their number.
        """
        if not hands:
            self._message.zero_()
            return
        for other in hands[1:]:
            hands[0].grad.add_(other.grad)
        workspace = hands[0].workspace
        workspace.begin(("report", batch.y.shape[1]))
        self._sums.zero_()
        measure(self.loss, batch.logits, batch.y, workspace, self._sums)
        self._message[-1:].fill_(batch.y.shape[1])

    def _finish(self, others: list[Hand], alone: bool) -> None:
        """Sum the gradients and update the parameters."""
        if alone:
            return
        theta, grad = self.network.theta, self.hands[0].grad
        for other in others:
            grad.add_(other.grad)
        self.penalty.add(theta, grad)
        self.optimizer.step(theta, grad, self.rate)
        for gap in self._gaps:  # which the optimizer may have written to
            gap.zero_()


def evenly(count: int, parts: int) -> list[slice]:
    """range(count) in so many parts, as equal as can be; none of them is empty."""
    edges = [i * count // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's operations of this thread with `count` threads, and numbers below 1e-38 as 0.

    Probabilities of fitted samples get there, where a product takes many times as long. Threads
    have the setting from the one that starts them.
    """
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        if count != before:
            torch.set_num_threads(before)


def make_optimizer(
    settings: Train, theta: Tensor, momentum: Tensor | None, decay: Tensor
) -> tuple[Optimizer, bool]:
    """The optimizer, and whether L2 belongs into the gradient: AdamW applies `decay` itself."""
    chosen = settings.optimizer
    if chosen.name == "sgd":
        return SGD(theta, momentum, chosen.nesterov), True
    decoupled = decay if chosen.name == "adamw" else None
    adam = Adam(theta, chosen.beta1, chosen.beta2, chosen.epsilon, decoupled)
    return adam, decoupled is None
