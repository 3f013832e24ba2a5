"""Layers as frozen values: forward and backward side by side, the mathematics in the docstring.

Each layer has `build(shape)`, which maps the shape of ONE example to the output's and names its
parameters; `forward(params, x, workspace) -> y, cache`; and
`backward(params, grads, cache, dy, workspace, need_dx=True) -> dx`, which overwrites the views of
`grads`. Nothing survives a call but what it returns, valid until the workspace begins anew.

Shapes: R replicas, B samples of a batch; x is (R, B, ...), dy has the shape of y. `d` + name is the
derivative of the loss with respect to name.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import InputError, hint
from .parameters import Shapes, Views
from .workspace import Workspace, mix

Shape = tuple[int, ...]


def product(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> Tensor:
    """out = beta out + a b for each replica, in place: (R, m, k) and (R, k, n) give (R, m, n).

    With beta = 0 what stood in `out`, even a nan, is not read. On the CPU each replica is a product
    of its own: batched kernels order their sums by R, and a population could not equal single runs
    bit for bit.
    """
    if out.is_cuda:
        return out.baddbmm_(a, b, beta=beta)
    for r in range(len(out)):
        out[r].addmm_(a[r], b[r], beta=beta)
    return out


class Layer(Protocol):
    """What every layer offers; see the module's docstring."""

    def build(self, shape: Shape) -> tuple[Shape, Shapes]: ...

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, Any]: ...

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: Any,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
    ) -> Tensor | None: ...


@dataclass(frozen=True)
class Linear:
    """y = x W + b, with x (R, B, fan_in), W (R, fan_in, fan_out), b (R, fan_out).

    dW = x^T dy,  db = sum over the batch of dy,  dx = dy W^T.
    """

    units: int

    def build(self, shape: Shape) -> tuple[Shape, Shapes]:
        (fan_in,) = shape
        return (self.units,), {"weight": (fan_in, self.units), "bias": (self.units,)}

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
        y = workspace.empty((*x.shape[:2], self.units)).copy_(params["bias"].unsqueeze(1))
        return product(x, params["weight"], y, beta=1), x

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: Tensor,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
    ) -> Tensor | None:
        x = cache
        replicas, batch = dy.shape[:2]
        product(x.transpose(1, 2), dy, grads["weight"])
        ones = workspace.ones(1, 1, batch).expand(replicas, 1, batch)
        product(ones, dy, grads["bias"].unsqueeze(1))
        if not need_dx:
            return None
        return product(dy, params["weight"].transpose(1, 2), workspace.empty(x.shape))


@dataclass(frozen=True)
class Flatten:
    """y = x with all dimensions of an example in one, in the order (C, H, W); dx = dy, reshaped."""

    def build(self, shape: Shape) -> tuple[Shape, Shapes]:
        return (math.prod(shape),), {}

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, torch.Size]:
        return x.flatten(2), x.shape

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: torch.Size,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
    ) -> Tensor | None:
        return dy.view(cache)


class _Elementwise:
    """A layer without parameters whose output has the shape of its input."""

    def build(self, shape: Shape) -> tuple[Shape, Shapes]:
        return shape, {}


@dataclass(frozen=True)
class ReLU(_Elementwise):
    """y = max(x, 0);  dx = dy where x > 0, else 0 (at the kink 0, as in torch)."""

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
        y = torch.clamp(x, min=0, out=workspace.empty(x.shape))
        return y, y

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: Tensor,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
    ) -> Tensor | None:
        y = cache
        dx = torch.sign(y, out=workspace.empty(y.shape))  # y >= 0, so this is 1 where x > 0, else 0
        return dx.mul_(dy)


@dataclass(frozen=True)
class Tanh(_Elementwise):
    """y = (1 - e) / (1 + e) * sign(x) with e = exp(-2 |x|), which cannot overflow.

    dx = dy (1 - y^2).
    """

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
        e = torch.abs(x, out=workspace.empty(x.shape)).mul_(-2).expm1_()  # e - 1, exact near x = 0
        y = torch.add(e, 2, out=workspace.empty(x.shape))
        torch.div(e, y, out=y).neg_()
        torch.sign(x, out=e)
        return y.mul_(e), y

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: Tensor,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
    ) -> Tensor | None:
        y = cache
        dx = torch.mul(y, y, out=workspace.empty(y.shape)).mul_(dy)
        return torch.sub(dy, dx, out=dx)


@dataclass(frozen=True)
class Sigmoid(_Elementwise):
    """y = 1 / (1 + exp(-x));  dx = dy y (1 - y)."""

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
        # exp may overflow to inf for x very negative; 1 / inf = 0 is then the right limit.
        y = torch.neg(x, out=workspace.empty(x.shape)).exp_().add_(1).reciprocal_()
        return y, y

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: Tensor,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
    ) -> Tensor | None:
        y = cache
        dx = torch.mul(y, y, out=workspace.empty(y.shape))
        return torch.sub(y, dx, out=dx).mul_(dy)


@dataclass(frozen=True)
class Dropout(_Elementwise):
    """Inverted dropout (Srivastava et al. 2014): y = x m / (1 - p) in training,
    m ~ Bernoulli(1 - p); y = x in evaluation. dx = dy m / (1 - p).

    `p` is the probability of dropping a unit, a number or one per replica. The mask is a hash of
    (seed, stream, step, position of the sample, unit): the same on every device and for every split
    of the work. `stream` tells the dropout layers of a network apart.
    """

    p: float | tuple[float, ...]
    stream: int = 0

    def forward(
        self, params: Views, x: Tensor, workspace: Workspace
    ) -> tuple[Tensor, Tensor | None]:
        if workspace.noise is None:
            return x, None
        mask = self._mask(x.shape, workspace)
        return torch.mul(x, mask, out=workspace.empty(x.shape)), mask

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: Tensor | None,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
    ) -> Tensor | None:
        mask = cache
        return dy if mask is None else torch.mul(dy, mask, out=workspace.empty(dy.shape))

    def _mask(self, shape: torch.Size, workspace: Workspace) -> Tensor:
        """(R, B, ...): 1 / (1 - p) where a unit is kept, else 0."""
        noise = workspace.noise
        assert noise is not None
        replicas, batch = shape[:2]
        units = math.prod(shape[2:])

        def per_replica(name: str, value: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            column = (value * replicas)[:replicas]
            return workspace.constant(
                (name, self, replicas), lambda: torch.tensor(column, dtype=dtype).view(-1, 1, 1)
            )

        probabilities = list(self.p) if isinstance(self.p, tuple) else [self.p]
        threshold = per_replica(
            "threshold", [int(p * 2**32) - 2**31 for p in probabilities], torch.int32
        )
        scale = per_replica("scale", [1 / (1 - p) for p in probabilities], workspace.dtype)

        # Constants of splitmix64 and murmur3 as signed integers; products wrap around.
        position = workspace.constant(("position", batch), lambda: torch.arange(batch).view(1, -1))
        rows = workspace.empty((replicas, batch), torch.int64)
        shifted = workspace.empty(rows.shape, torch.int64)
        counter = noise.first + (noise.step << 32)
        rows.copy_(position).add_(counter).mul_(-0x61C8864680B583EB)
        rows.add_(noise.seeds).add_(mix(self.stream))
        for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
            torch.bitwise_right_shift(rows, 30, out=shifted)
            rows.bitwise_xor_(shifted).mul_(multiplier)
        torch.bitwise_right_shift(rows, 32, out=shifted)
        row_keys = workspace.empty(rows.shape, torch.int32).copy_(shifted).unsqueeze(-1)
        columns = workspace.constant(
            ("unit", units), lambda: (torch.arange(units) * 0x9E3779B1).to(torch.int32)
        )
        h = workspace.empty((replicas, batch, units), torch.int32)
        low = workspace.empty(h.shape, torch.int32)
        torch.bitwise_xor(row_keys, columns, out=h).mul_(-0x7A143595)
        torch.bitwise_right_shift(h, 15, out=low)
        h.bitwise_xor_(low).mul_(-0x3D4D51CB)
        keep = torch.ge(h, threshold, out=workspace.empty(h.shape, torch.bool))
        mask = workspace.empty(h.shape)
        return mask.copy_(keep).mul_(scale).view(shape)


ACTIVATIONS: dict[str, type[ReLU] | type[Tanh] | type[Sigmoid]] = {
    "relu": ReLU,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
}
NAMES = ("linear", "flatten", "dropout", *ACTIVATIONS)


def build_layers(specs: list[list[Any]], shape: Shape, classes: int) -> list[Layer]:
    """The layers that a config's `model.layers` names, for examples of `shape`.

    `["linear", "classes"]` is as wide as there are classes; a `flatten` is put before a linear
    layer where its input has more than one dimension. Raises InputError naming the entry.
    """
    layers: list[Layer] = []
    for number, spec in enumerate(specs):
        where = f"model.layers[{number}]"
        name, arguments = spec[0], spec[1:]
        if name not in NAMES:
            raise InputError(f"{where}: unknown layer {name!r}; {hint(str(name), NAMES)}")
        layer: Layer
        if name == "linear":
            units = classes if arguments == ["classes"] else _one(arguments, where, name, "units")
            if isinstance(units, bool) or not isinstance(units, int) or units < 1:
                raise InputError(f"{where}: linear needs units >= 1 or 'classes', not {units!r}")
            if len(shape) > 1:
                layers.append(Flatten())
                shape = layers[-1].build(shape)[0]
            layer = Linear(units)
        elif name == "dropout":
            layer = Dropout(_probability(_one(arguments, where, name, "p"), where), number)
        else:
            if arguments:
                raise InputError(f"{where}: {name} takes no arguments, not {arguments}")
            layer = Flatten() if name == "flatten" else ACTIVATIONS[name]()
        shape = layer.build(shape)[0]
        layers.append(layer)
    return layers


def _one(arguments: list[Any], where: str, name: str, meaning: str) -> Any:
    if len(arguments) != 1:
        raise InputError(f'{where}: write ["{name}", {meaning}], not {[name, *arguments]}')
    return arguments[0]


def _probability(value: Any, where: str) -> float | tuple[float, ...]:
    several = tuple(value) if isinstance(value, list) else (value,)
    for p in several:
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise InputError(f"{where}: dropout must be at least 0 and below 1, not {p!r}")
    if not several:
        raise InputError(f"{where}: dropout has an empty list; give one probability per replica")
    return tuple(float(p) for p in several) if isinstance(value, list) else float(value)
