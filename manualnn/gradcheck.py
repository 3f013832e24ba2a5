"""Backward against central differences, in float64: each layer, loss and penalty by itself, and the
whole network, on random examples.

A layer alone is the scalar sum(c y) of its output y, for the inputs it has in the network and a
random cotangent c: its dx and the gradients of its parameters. So what is wrong has a name, while
in the network all that lies before it has wrong gradients, too. The network is the loss plus
sum(c z) of the logits z: the loss's own gradient sums to 0 over the classes, which hides what a
random one shows. Label smoothing is part of the loss here; class weights, which scale gradients
alone, are left out.

Shapes: R replicas, B samples, K outputs.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config, load_config
from .differences import Function, Report, differences, judge
from .errors import InputError
from .evaluation import describe
from .find import find_described
from .layers import Layer, MaxPool2d, ReLU
from .losses import LOSSES, outputs
from .network import Network, load_weights
from .optimizers import Penalty
from .parameters import Slot
from .workspace import Noise, Workspace, clock, generator, mix

CHECK_STREAM = 0xC4EC
AT_ONCE = 2**21  # numbers that are made together
# Part, name of a tensor, the tensor, its gradient, and the function it is of; the tensors without a
# dimension for replicas.
Gradient = tuple[str, str, Tensor, Tensor, Function]


@dataclass(frozen=True)
class Case:
    """A network of one replica with what it is trained for; float64."""

    title: str
    network: Network
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    notes: tuple[str, ...] = ()


def cases(
    name: str, sets: list[str] | None = None, data_dir: Path | str | None = None, seed: int = 0
) -> list[Case]:
    """What there is to check of a config (of its networks that differ in layers, loss or penalties
    each) or of trained weights; names as in `summary`. Raises InputError."""
    path = find_described(name)
    if path.suffix != ".pkl":
        return list(_of_config(load_config(path, sets), data_dir, seed))
    if sets:
        raise InputError(f"--set goes with a config, but {name} names weights")
    weights = load_weights(path)
    network = _double(weights.network)
    if not bool(network.theta.isfinite().all()):
        raise InputError(f"{path}: its weights are not finite, so they have no gradient")
    return [Case(str(path), network, weights.meta.get("loss", "cross_entropy"))]


def _of_config(config: Config, data_dir: Path | str | None, seed: int) -> Iterator[Case]:
    seen = set()
    for population in config.populations():
        train = population.config.train
        coupled = train.optimizer.name != "adamw"  # which applies L2 itself
        for replica in population.replicas:
            layers, l2 = population.layers(replica), replica.l2 * coupled
            key = repr((layers, train.loss, train.label_smoothing, replica.l1 > 0, l2 > 0))
            if key in seen:
                continue
            seen.add(key)
            network = _double(describe(population, data_dir), layers)
            if network.outputs != outputs(train.loss, network.classes):
                raise InputError(
                    f"{replica.label}: {network.outputs} outputs, {network.classes} classes and"
                    f" {train.loss} do not fit"
                )
            network.initialize([seed], population.config.model.init)
            draw = generator(seed, CHECK_STREAM, 1)
            for params in network.params:
                if "bias" in params:  # at 0 they would hide a penalty on them
                    params["bias"].copy_(_normal(params["bias"].shape, draw).mul_(0.1))
            notes = ("note: class weights are left out",) if train.class_weights else ()
            yield Case(
                replica.label, network, train.loss, train.label_smoothing, replica.l1, l2, notes
            )


def _double(network: Network, specs: list[list[Any]] | None = None) -> Network:
    """One network of the same shape in float64, and with the same parameters if its layers are."""
    double = Network(specs or network.specs, network.shape, network.classes, 1, torch.float64)
    if specs is None:
        double.theta.copy_(network.theta)
    return double


@torch.inference_mode()
def check(case: Case, samples: int = 50, batch: int = 4, seed: int = 0) -> Report:
    """Check each layer, loss, penalty and the network on `batch` random examples: of every tensor
    `samples` coordinates, all where that is 0. Raises InputError where a loss is not finite."""
    problem = Problem(case, batch, seed)
    rows = []
    for number, (part, tensor, at, gradient, function) in enumerate(problem.gradients()):
        coordinates = torch.arange(at.numel(), device="cpu")
        if 0 < samples < at.numel():
            draw = generator(seed, CHECK_STREAM, 2, number)
            coordinates = (
                torch.randperm(at.numel(), generator=draw, device="cpu")[:samples].sort().values
            )
        room = AT_ONCE // (case.network.numbers(batch) + at.numel())
        found = differences(function, at, coordinates, max(1, room // 2))
        analytic = gradient.flatten()[coordinates]
        rows.append(judge(part, tensor, tuple(at.shape), coordinates, analytic, *found))
    return Report(f"{case.title}: {case.loss}, {batch} random examples", rows, case.notes)


class Problem:
    """A case on random examples: each gradient that backward gives, and the function it is of."""

    def __init__(self, case: Case, batch: int, seed: int) -> None:
        self.case, self.network, self.loss = case, case.network, LOSSES[case.loss]
        self.draw = generator(seed, CHECK_STREAM)
        self.classes = 2 if case.loss == "logistic" else self.network.outputs
        self.y = torch.randint(self.classes, (1, batch), generator=self.draw, device="cpu")
        noise = Noise(torch.tensor([[mix(seed, CHECK_STREAM)]], device="cpu"), clock())
        self.noise = noise  # one for all: dropout's masks stay as they are
        # Backward works on memory that is used again, as in training; differences on their own.
        self.workspace = Workspace(torch.float64)
        self.fresh = Workspace(torch.float64, fresh=True)
        self.fresh.begin("differences", noise)
        self.inputs = [_normal((1, batch, *self.network.shape), self.draw)]  # and the logits last
        for layer, params in zip(self.network.layers, self.network.params, strict=True):
            self.inputs.append(layer.forward(params, self.inputs[-1], self.fresh)[0])
        if not bool(self._value(self.inputs[-1]).isfinite().all()):
            raise InputError(f"{case.title}: its loss is not finite on random examples")

    def gradients(self) -> Iterator[Gradient]:
        """All there are. One is valid until the next."""
        counts = Counter[str]()
        for i, layer in enumerate(self.network.layers):
            kind = type(layer).__name__.lower()
            counts[kind] += 1
            yield from self._of_layer(i, f"{kind} {counts[kind]}")
        yield self._of_loss()
        if self.case.l1 or self.case.l2:
            yield from self._of_penalty()
        yield from self._of_network()

    def _slots(self) -> Iterator[tuple[str, Slot, Tensor]]:
        """Each parameter's name in a weights file, where it lies, and itself."""
        layout = self.network.layout
        for name, slot in zip(layout.keys(), layout.slots, strict=True):
            yield name, slot, layout.view(self.network.theta, slot)[0]

    def _of_layer(self, i: int, part: str) -> Iterator[Gradient]:
        layer, params, x = self.network.layers[i], self.network.params[i], self.inputs[i]
        c = _normal(self.inputs[i + 1].shape, self.draw)
        grads = {name: torch.full_like(view, torch.nan) for name, view in params.items()}
        self.workspace.begin(i, self.noise)
        _, cache = layer.forward(params, x, self.workspace)
        dx = layer.backward(params, grads, cache, c.clone(), self.workspace)
        assert dx is not None
        for name, slot, at in self._slots():
            if slot.layer == i:
                function = self._function(i, i + 1, slot.name, c)
                yield part, name, at, grads[slot.name][0], function
        yield part, "x", x[0], dx[0], self._function(i, i + 1, "x", c)

    def _of_loss(self) -> Gradient:
        logits = self.inputs[-1]
        self.workspace.begin("loss")
        smoothing = self.case.label_smoothing
        dlogits = self.loss.gradient(logits, self.y, self.workspace, smoothing)

        def function(values: Tensor) -> tuple[Tensor, Tensor]:
            return self._value(values).unsqueeze(1), _none(values)

        return "loss", "logits", logits[0], dlogits[0], function

    def _of_penalty(self) -> Iterator[Gradient]:
        theta, layout = self.network.theta, self.network.layout
        l1, l2 = (
            torch.full((1, 1), v, dtype=theta.dtype, device="cpu")
            for v in (self.case.l1, self.case.l2)
        )
        grad = torch.zeros_like(theta)
        Penalty(l1, l2, layout.weight_mask()).add(theta, grad)

        def of_weights(w: Tensor) -> tuple[Tensor, Tensor]:
            w = w.flatten(1)
            return self.case.l2 / 2 * w * w + self.case.l1 * w.abs(), (w > 0).long()

        def of_biases(b: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(b), _none(b)

        for name, slot, at in self._slots():
            function = of_biases if slot.name == "bias" else of_weights
            yield "penalty", name, at, layout.view(grad, slot)[0], function

    def _of_network(self) -> Iterator[Gradient]:
        logits, last = self.inputs[-1], len(self.network.layers)
        c = _normal(logits.shape, self.draw) / logits.shape[1]  # as large as the mean's gradient
        grad, _ = self._backpropagate(c, need_dx=False)
        for name, slot, at in self._slots():
            function = self._function(slot.layer, last, slot.name, c, with_loss=True)
            yield "network", name, at, self.network.layout.view(grad, slot)[0], function
        _, dx = self._backpropagate(c, need_dx=True)
        assert dx is not None
        yield "network", "x", self.inputs[0][0], dx[0], self._function(0, last, "x", c, True)

    def _backpropagate(self, c: Tensor, need_dx: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient (1, P) of the loss plus sum(c z), and that at x, as a training step does."""
        network, smoothing = self.network, self.case.label_smoothing
        self.workspace.begin("network", self.noise)
        logits, caches = network.forward(self.inputs[0], self.workspace)
        dlogits = self.loss.gradient(logits, self.y, self.workspace, smoothing).add_(c)
        grad = torch.full_like(network.theta, torch.nan)
        views = network.layout.views(grad)
        return grad, network.backward(dlogits, caches, views, self.workspace, need_dx)

    def _function(
        self, first: int, last: int, name: str, c: Tensor, with_loss: bool = False
    ) -> Function:
        """Of a parameter of layer `first`, or of its input "x": sum(c y), and the loss, of what
        comes out before layer `last`."""

        def function(values: Tensor) -> tuple[Tensor, Tensor]:
            replicas, branches = len(values), [_none(values)]
            x = values if name == "x" else _repeated(self.inputs[first], replicas)
            for i in range(first, last):
                layer = self.network.layers[i]
                params = {k: _repeated(v, replicas) for k, v in self.network.params[i].items()}
                if i == first and name != "x":
                    params[name] = values
                branches.append(_branches(layer, x))
                x, _ = layer.forward(params, x, self.fresh)
            terms = [(x * c).flatten(1)]
            if with_loss:
                terms.append(self._value(x).unsqueeze(1))
            return torch.cat(terms, 1), torch.cat(branches, 1)

        return function

    def _value(self, logits: Tensor) -> Tensor:
        """The loss (R,) of logits (R, B, K) against smoothed targets, but for a constant.

        A loss is linear in t, or has t^2 but no t^2 z, so that of (1 - e) t + e / K is (1 - e) that
        of t and e times the mean over all classes as t.
        """
        value, e = self.loss.value(logits, self.y, self.fresh), self.case.label_smoothing
        if e:
            every = [torch.full_like(self.y, k) for k in range(self.classes)]
            mean = sum(self.loss.value(logits, y, self.fresh) for y in every) / self.classes
            value = (1 - e) * value + e * mean
        return value


def _normal(shape: tuple[int, ...] | torch.Size, draw: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")


def _repeated(x: Tensor, replicas: int) -> Tensor:
    return x.expand(replicas, *x.shape[1:])


def _none(values: Tensor) -> Tensor:
    """No branches."""
    return torch.empty(len(values), 0, dtype=torch.int64, device="cpu")


def _branches(layer: Layer, x: Tensor) -> Tensor:
    """Where the inputs x (R, ...) of a ReLU are positive, which of a pooling's window is the
    largest; nothing for another layer."""
    if isinstance(layer, ReLU):
        return (x > 0).flatten(1).long()
    if not isinstance(layer, MaxPool2d):
        return _none(x)
    if layer.apart:
        return x.flatten(1, 2).argmax(1).flatten(1)
    (kh, kw), (height, width) = layer.kernel, x.shape[2:4]
    windows = x[:, :, : height // kh * kh, : width // kw * kw].unfold(2, kh, kh).unfold(3, kw, kw)
    return windows.flatten(-2).argmax(-1).flatten(1)
