"""Backward against central differences, in float64: each layer, loss and penalty by itself, and the
whole network, on random examples.

A layer alone is the scalar sum(c y) of its output y, for the inputs it has in the network and a
random cotangent c: its dx and the gradients of its parameters. So what is wrong has a name, while
in the network all that lies before it has wrong gradients, too. The network is the loss plus
sum(c z) of the logits z: the loss's own gradient sums to 0 over the classes, which hides what a
random one shows. Label smoothing is part of the loss here; class weights, which scale gradients
alone, are left out.

A difference is (f(v + h) - f(v - h)) / 2h, for many coordinates at once as replicas. Where the
input of a ReLU changes its sign, or a pooling its place, between v - h and v + h, it is no
derivative: h is made smaller, and what still crosses a kink at 1e-7 is skipped and counted.

Shapes: R replicas, B samples, K outputs, k coordinates of one tensor.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config, load_config
from .errors import InputError
from .evaluation import describe, find_weights
from .files import find_shipped
from .layers import Layer, MaxPool2d, ReLU
from .losses import LOSSES, outputs
from .network import Network, load_weights
from .optimizers import Penalty
from .parameters import Slot
from .workspace import Noise, Workspace, clock, generator, mix

CHECK_STREAM = 0xC4EC
BAR = 1e-5
STEPS = (1e-5, 1e-6, 1e-7)  # times |v| where that is above 1
AT_ONCE = 2**21  # numbers that are made together
FLOOR = 1e-3  # of a tensor's largest gradient
# R values of a tensor, (R, ...), to terms (R, m), whose sum is the scalar, and the branches (R, n)
# that ReLUs and poolings took.
Function = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """What the check of one tensor found.

    `part` is a layer as "linear 2", "loss", "penalty" or "network"; `index` is the place of the
    worst error in `shape`. Of `size` coordinates `tried` were chosen and `skipped` at kinks or
    ties. `verdict` is "ok", "zero" (ok, all is 0), "wrong" or "not judged"; `how` is what is wrong.
    """

    part: str
    tensor: str
    shape: tuple[int, ...]
    worst: float | None
    median: float | None
    index: tuple[int, ...] | None
    tried: int
    size: int
    skipped: int
    verdict: str
    how: str = ""


@dataclass(frozen=True)
class Report:
    """The rows of one network or function; `title` says which, `notes` what else is to be said."""

    title: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(row.verdict in ("ok", "zero") for row in self.rows)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "wrong"]

    @property
    def finding(self) -> str:
        """What the rows say together: the parts that are wrong by themselves, if any are."""
        if parts := dict.fromkeys(row.part for row in self.wrong if row.part != "network"):
            named = {
                part: ", ".join(
                    row.tensor + (f" ({row.how})" if row.how else "")
                    for row in self.wrong
                    if row.part == part
                )
                for part in parts
            }
            return f"wrong: {'; '.join(f'{part}: {what}' for part, what in named.items())}"
        if self.wrong:
            names = ", ".join(row.tensor for row in self.wrong)
            return f"wrong: the whole network ({names}), though each part of it is right by itself"
        if unjudged := [f"{row.part} {row.tensor}" for row in self.rows if row.verdict[0] == "n"]:
            return (
                f"not judged, too few coordinates or differences too small: {'; '.join(unjudged)}"
            )
        worst = max((row.worst or 0.0 for row in self.rows), default=0.0)
        return f"passed: {len(self.rows)} gradients, worst relative error {worst:.1e}"


@dataclass(frozen=True)
class Case:
    """A network of one replica with what it is trained for; float64."""

    title: str
    network: Network
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    l1: float = 0.0
    l2: float = 0.0


def cases(
    name: str, sets: list[str] | None = None, data_dir: Path | str | None = None, seed: int = 0
) -> list[Case]:
    """What there is to check of a config (of its networks that differ in layers, loss or penalties
    each) or of trained weights; names as in `summary`. Raises InputError."""
    path = Path(name)
    inside = [path / file for file in ("weights.pkl", "config.toml") if (path / file).is_file()]
    path = inside[0] if inside else path
    if path.suffix != ".pkl":
        try:
            find_shipped(path, "configs", ".toml", "config")
        except InputError:
            with suppress(InputError):
                path = find_weights(path)
    if path.suffix != ".pkl":
        return list(_of_config(load_config(path, sets), data_dir, seed))
    if sets:
        raise InputError(f"--set goes with a config, but {name} names weights")
    weights = load_weights(path := find_weights(path))
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
            described = describe(population, data_dir)
            network = _double(described, layers)
            if network.outputs != outputs(train.loss, network.classes):
                raise InputError(
                    f"{replica.label}: {network.outputs} outputs, {network.classes} classes and"
                    f" {train.loss} do not fit"
                )
            network.initialize([seed], population.config.model.init)
            draw = generator(seed, CHECK_STREAM, 1)
            for slot in network.layout.slots:
                if slot.name == "bias":  # at 0 they would hide a penalty on them
                    size = network.params[slot.layer]["bias"].shape
                    network.params[slot.layer]["bias"].copy_(_normal(size, draw).mul_(0.1))
            yield Case(replica.label, network, train.loss, train.label_smoothing, replica.l1, l2)


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
        coordinates = torch.arange(at.numel())
        if 0 < samples < at.numel():
            draw = generator(seed, CHECK_STREAM, 2, number)
            coordinates = torch.randperm(at.numel(), generator=draw)[:samples].sort().values
        room = AT_ONCE // (case.network.numbers(batch) + at.numel())
        found = differences(function, at, coordinates, max(1, room // 2))
        analytic = gradient.flatten()[coordinates]
        rows.append(judge(part, tensor, tuple(at.shape), coordinates, analytic, *found))
    return Report(f"{case.title}: {case.loss}", rows)


def differences(
    function: Function, at: Tensor, coordinates: Tensor, most: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Central differences (k,) at `at`, how far rounding may have moved each, and where none of the
    steps is free of a kink.

    Terms are subtracted before they are summed, so that those without the coordinate cancel.
    """
    flat, count = at.flatten(), len(coordinates)
    _, here = function(at.unsqueeze(0))
    numeric, noise = (flat.new_zeros(count) for _ in range(2))
    kinked = torch.ones(count, dtype=torch.bool)
    for step in STEPS:
        left = kinked.nonzero().flatten()
        for todo in left.split(most) if len(left) else ():
            chosen, n = coordinates[todo], len(todo)
            h = step * flat[chosen].abs().clamp(min=1)
            copies = flat.repeat(2 * n, 1)
            copies[torch.arange(n), chosen] += h
            copies[torch.arange(n, 2 * n), chosen] -= h
            width = copies[torch.arange(n), chosen] - copies[torch.arange(n, 2 * n), chosen]
            terms, branches = function(copies.view(-1, *at.shape))
            numeric[todo] = (terms[:n] - terms[n:]).sum(1) / width
            noise[todo] = 10 * torch.finfo(at.dtype).eps * terms[:n].norm(dim=1) / width
            same = (branches == here).all(1)
            kinked[todo] = ~(same[:n] & same[n:])
    return numeric, noise, kinked


def judge(
    part: str,
    tensor: str,
    shape: tuple[int, ...],
    coordinates: Tensor,
    analytic: Tensor,
    numeric: Tensor,
    noise: Tensor,
    kinked: Tensor,
    bar: float = BAR,
) -> Row:
    """The row of a tensor whose gradient is `analytic` (k,) at the `coordinates`.

    The relative error is |a - n| / max(|a|, |n|, floor). The floor is a thousandth of the largest
    |a| or |n|, as of smaller ones only the difference matters to a step, and at least what makes an
    error as large as the rounding count as the bar. Not judged: a tensor with most coordinates
    skipped, or one where the rounding is above a hundredth of the largest.
    """
    kept = ~kinked
    a, n, noise = analytic[kept], numeric[kept], noise[kept]
    size = torch.maximum(a.abs(), n.abs())
    scale = float(size.amax()) if len(size) else 0.0
    errors = (a - n).abs() / size.clamp(min=FLOOR * scale).maximum(noise / bar).clamp(min=1e-300)
    errors = torch.where(errors.isfinite(), errors, torch.inf)
    worst = int(errors.argmax()) if len(errors) else None
    if worst is not None and not float(errors[worst]) <= bar:
        verdict = "wrong"
    elif 2 * len(a) < len(kinked):
        verdict = "not judged"
    elif not bool(a.any()) and bool((n.abs() <= noise).all()):
        verdict = "zero"
    else:
        verdict = "ok" if float(noise.amax()) <= 0.01 * scale else "not judged"
    index = None
    if worst is not None:
        place = torch.unravel_index(coordinates[kept][worst], shape)
        index = tuple(int(i) for i in place)
    return Row(
        part,
        tensor,
        shape,
        None if worst is None else float(errors[worst]),
        None if worst is None else float(errors.median()),
        index,
        len(coordinates),
        int(torch.tensor(shape).prod()),
        int(kinked.sum()),
        verdict,
    )


class Problem:
    """A case on random examples: each gradient that backward gives, and the function it is of."""

    def __init__(self, case: Case, batch: int, seed: int) -> None:
        self.case, self.network, self.loss = case, case.network, LOSSES[case.loss]
        self.draw = generator(seed, CHECK_STREAM)
        self.classes = 2 if case.loss == "logistic" else self.network.outputs
        self.y = torch.randint(self.classes, (1, batch), generator=self.draw)
        noise = Noise(torch.tensor([[mix(seed, CHECK_STREAM)]]), clock())
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

    def gradients(self) -> Iterator[tuple[str, str, Tensor, Tensor, Function]]:
        """Part, name of a tensor, the tensor, its gradient and the function it is of; the tensors
        without a dimension for replicas. A gradient is valid until the next."""
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

    def _of_layer(self, i: int, part: str) -> Iterator[tuple[str, str, Tensor, Tensor, Function]]:
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

    def _of_loss(self) -> tuple[str, str, Tensor, Tensor, Function]:
        logits = self.inputs[-1]
        self.workspace.begin("loss")
        smoothing = self.case.label_smoothing
        dlogits = self.loss.gradient(logits, self.y, self.workspace, smoothing)

        def function(values: Tensor) -> tuple[Tensor, Tensor]:
            return self._value(values).unsqueeze(1), _none(values)

        return "loss", "logits", logits[0], dlogits[0], function

    def _of_penalty(self) -> Iterator[tuple[str, str, Tensor, Tensor, Function]]:
        theta, layout = self.network.theta, self.network.layout
        l1, l2 = (torch.full((1, 1), v, dtype=theta.dtype) for v in (self.case.l1, self.case.l2))
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

    def _of_network(self) -> Iterator[tuple[str, str, Tensor, Tensor, Function]]:
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
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _repeated(x: Tensor, replicas: int) -> Tensor:
    return x.expand(replicas, *x.shape[1:])


def _none(values: Tensor) -> Tensor:
    """No branches."""
    return torch.empty(len(values), 0, dtype=torch.int64)


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


def lines(reports: list[Report]) -> Iterator[str]:
    """The reports for a reader."""
    for report in reports:
        yield report.title
        header = ("worst", "median", "at", "checked", "skipped")
        yield (
            f"{'':<27}{header[0]:>9}{header[1]:>10}  {header[2]:<18}{header[3]:>16}{header[4]:>9}"
        )
        for row in report.rows:
            yield f"{row.part:<19} {row.tensor:<7}{_figures(row)}  {row.verdict}"
        yield report.finding
        yield from report.notes
        yield ""


def _figures(row: Row) -> str:
    worst, median = ("-" if v is None else f"{v:.1e}" for v in (row.worst, row.median))
    at = "-" if row.index is None else ", ".join(map(str, row.index))
    checked = f"{row.tried - row.skipped} of {row.size:,}"
    return f"{worst:>9}{median:>10}  {at:<18}{checked:>16}{row.skipped:>9}"


def to_dict(reports: list[Report]) -> dict[str, Any]:
    """The reports as plain values."""
    each = [
        {
            "title": report.title,
            "passed": report.passed,
            "finding": report.finding,
            "notes": report.notes,
            "rows": [asdict(row) for row in report.rows],
        }
        for report in reports
    ]
    return {"passed": all(report.passed for report in reports), "reports": each}
