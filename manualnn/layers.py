"""Layers as frozen values: forward and backward side by side, the mathematics in the docstring.

Each layer has `build(shape)`, which maps the shape of ONE example to the output's and names its
parameters; `forward(params, x, workspace) -> y, cache`; and
`backward(params, grads, cache, dy, workspace, need_dx=True, beta=0) -> dx`, which makes the views
of `grads` beta times themselves plus the gradient. With beta = 0 it overwrites them; with beta = 1
they may be `params` themselves, a step of gradient descent where dy carries -learning_rate, for dx
comes first. Nothing survives a call but what it returns, valid until the workspace begins anew.

Shapes: R replicas, B samples of a batch; x is (R, B, ...), dy has the shape of y. `d` + name is the
derivative of the loss with respect to name.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import InputError, hint
from .parameters import Shapes, Views
from .workspace import Workspace, random_bits

Shape = tuple[int, ...]
LOW_FROM = 2**22  # products of numbers from which rounding the factors first pays


def product(a: Tensor, b: Tensor, out: Tensor, workspace: Workspace, beta: int = 0) -> Tensor:
    """out = beta out + a b for each replica, in place: (R, m, k) and (R, k, n) give (R, m, n).

    With beta = 0 what stood in `out`, even a nan, is not read. On the CPU each replica is a product
    of its own: batched kernels order their sums by R, and a population could not equal single runs
    bit for bit. Where the workspace has a `low` type and the product is worth it, the factors and
    the product are rounded to that, and the sums inside it and in `out` are not.
    """
    if low := lowered(out.shape, a.shape[2], workspace) or (a.dtype != out.dtype and a.dtype):
        rounded = workspace.empty(out.shape, low)
        _multiply(_round(a, low, workspace), _round(b, low, workspace), rounded, 0)
        return out.add_(rounded) if beta else out.copy_(rounded)
    return _multiply(a, b, out, beta)


def lowered(shape: torch.Size, inner: int, workspace: Workspace) -> torch.dtype | None:
    """The low type, if a product of `shape` (R, m, n) over `inner` is to be computed in one."""
    worth = shape[1] * shape[2] * inner >= LOW_FROM or torch.device(workspace.device).type != "cpu"
    return workspace.low if worth else None


def _multiply(a: Tensor, b: Tensor, out: Tensor, beta: int) -> Tensor:
    if out.is_cuda:
        return out.baddbmm_(a, b, beta=beta)
    for r in range(len(out)):
        out[r].addmm_(a[r], b[r], beta=beta)
    return out


def _round(x: Tensor, low: torch.dtype, workspace: Workspace) -> Tensor:
    """x (R, m, n) in another type and the same order in memory."""
    if x.dtype == low:
        return x
    if x.stride(2) != 1:
        return _round(x.transpose(1, 2), low, workspace).transpose(1, 2)
    return workspace.empty(x.shape, low).copy_(x)


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
        beta: int = 0,
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
        return product(x, params["weight"], y, workspace, beta=1), x

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: Tensor,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
        beta: int = 0,
    ) -> Tensor | None:
        x, dx = cache, None
        if need_dx:
            old = params["weight"].transpose(1, 2)
            dx = product(dy, old, workspace.empty(x.shape), workspace)
        product(x.transpose(1, 2), dy, grads["weight"], workspace, beta)
        product(_ones(dy, workspace), dy, grads["bias"].unsqueeze(1), workspace, beta)
        return dx


@dataclass(frozen=True)
class ChannelsLast:
    """Images (C, H, W) as (H, W, C), the order that convolution and pooling work in; a view."""

    def build(self, shape: Shape) -> tuple[Shape, Shapes]:
        channels, height, width = shape
        return (height, width, channels), {}

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, None]:
        return x.movedim(2, -1), None

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: None,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
        beta: int = 0,
    ) -> Tensor | None:
        return dy.movedim(-1, 2)


@dataclass(frozen=True)
class Flatten:
    """y = x with all dimensions of an example in one, in the order (C, H, W); dx = dy, reshaped.

    `channels_last` says that x is (R, B, H, W, C) and has to be reordered.
    """

    channels_last: bool = False

    def build(self, shape: Shape) -> tuple[Shape, Shapes]:
        return (math.prod(shape),), {}

    def forward(self, params: Views, x: Tensor, workspace: Workspace) -> tuple[Tensor, torch.Size]:
        if not self.channels_last:
            return x.flatten(2), x.shape
        moved = x.movedim(-1, 2)
        return workspace.empty(moved.shape).copy_(moved).flatten(2), moved.shape

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: torch.Size,
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
        beta: int = 0,
    ) -> Tensor | None:
        dx = dy.view(cache)
        if not self.channels_last:
            return dx
        moved = dx.movedim(2, -1)
        return workspace.empty(moved.shape).copy_(moved)


@dataclass(frozen=True)
class Conv2d:
    """y_hwo = sum_ijc x_(sh+i-p, sw+j-p, c) W_ijco + b_o: cross-correlation, as torch's Conv2d.

    x (R, B, H, W, C), kernel (kh, kw), stride s, padding p with zeros; y has (H + 2p - kh) / s + 1
    rows, rounded down, and columns likewise. It is Linear on patches: with X (R, B H' W', kh kw C),
    the window at each output, y = X W + b, dW = X^T dy, db = sum dy, and dX = dy W^T, of which dx
    sums all entries that came from the same pixel.

    Before a pooling over `pool` = (ph, pw), y is (R, ph, pw, B, H' / ph, W' / pw, O): each place in
    a window of the pooling lies apart from the others, and outputs in no window are not computed.
    """

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: tuple[int, int] = (1, 1)

    def build(self, shape: Shape) -> tuple[Shape, Shapes]:
        height, width, channels = shape
        out_height, out_width = (
            ((size + 2 * p - k) // s + 1) // q * q
            for size, k, s, p, q in zip(
                (height, width), self.kernel, self.stride, self.padding, self.pool, strict=True
            )
        )
        fan_in = self.kernel[0] * self.kernel[1] * channels
        out = (out_height, out_width, self.channels)
        return out, {"weight": (fan_in, self.channels), "bias": (self.channels,)}

    def forward(
        self, params: Views, x: Tensor, workspace: Workspace
    ) -> tuple[Tensor, tuple[Tensor, torch.Size]]:
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        shape = x.shape
        if ph or pw:
            image, (replicas, batch, height, width, channels) = x, shape
            x = workspace.zeros((replicas, batch, height + 2 * ph, width + 2 * pw, channels))
            x[:, :, ph : height + ph, pw : width + pw].copy_(image)
        windows = x.unfold(2, kh, sh).unfold(3, kw, sw)  # (R, B, H', W', C, kh, kw)
        windows = self._apart(windows)
        n = math.prod(windows.shape[1:6])
        low = lowered(torch.Size((1, n, self.channels)), math.prod(windows.shape[6:]), workspace)
        patches = _patches(windows, workspace, low)
        y = workspace.empty((*windows.shape[:6], self.channels))
        y.copy_(params["bias"].view(-1, 1, 1, 1, 1, 1, self.channels))
        product(patches, params["weight"], _rows(y, 1), workspace, beta=1)
        return (y if self.pool != (1, 1) else y[:, 0, 0]), (patches, shape)

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: tuple[Tensor, torch.Size],
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
        beta: int = 0,
    ) -> Tensor | None:
        patches, shape = cache
        rows, dx = _rows(dy, 1), None
        if need_dx:
            dy = self._together(dy, workspace)
            dpatches = workspace.empty((*dy.shape[:4], *self.kernel, shape[-1]))
            old = params["weight"].transpose(1, 2)
            product(_rows(dy, 1), old, _rows(dpatches, 3), workspace)
            dx = self._sum_patches(dpatches, shape, workspace)
        product(patches.transpose(1, 2), rows, grads["weight"], workspace, beta)
        product(_ones(rows, workspace), rows, grads["bias"].unsqueeze(1), workspace, beta)
        return dx

    def _apart(self, windows: Tensor) -> Tensor:
        """A view of windows (R, B, H', W', ...) as (R, ph, pw, B, H' / ph, W' / pw, ...)."""
        (ph, pw), (height, width) = self.pool, windows.shape[2:4]
        windows = windows[:, :, : height // ph * ph, : width // pw * pw]
        windows = windows.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))
        return windows.movedim((3, 5), (1, 2))

    def _together(self, dy: Tensor, workspace: Workspace) -> Tensor:
        """The inverse for dy, (R, B, H', W', O)."""
        if self.pool == (1, 1):
            return dy
        moved = dy.movedim((1, 2), (3, 5))
        copied = workspace.empty(moved.shape).copy_(moved)
        return copied.flatten(4, 5).flatten(2, 3)

    def _sum_patches(self, dpatches: Tensor, shape: torch.Size, workspace: Workspace) -> Tensor:
        """dx of `shape`: of dpatches (R, B, H', W', kh, kw, C) all entries of each pixel."""
        dx = workspace.empty(shape).zero_()
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                (h, out_h), (w, out_w) = (
                    _overlap(offset - p, s, size, out)
                    for offset, p, s, size, out in zip(
                        (i, j),
                        self.padding,
                        self.stride,
                        shape[2:4],
                        dpatches.shape[2:4],
                        strict=True,
                    )
                )
                dx[:, :, h, w].add_(dpatches[:, :, out_h, out_w, i, j])
        return dx

    def to_torch(self, weight: Tensor) -> Tensor:
        """A weight (kh kw C, O) in torch's order (O, C, kh, kw)."""
        return weight.view(*self.kernel, -1, self.channels).permute(3, 2, 0, 1)

    def from_torch(self, weight: Tensor) -> Tensor:
        """The inverse of `to_torch`."""
        return weight.permute(2, 3, 1, 0).reshape(-1, self.channels)


def _ones(dy: Tensor, workspace: Workspace) -> Tensor:
    """(R, 1, n), whose product with dy (R, n, K) is the sum over the samples."""
    return workspace.ones(1, 1, dy.shape[1]).expand(len(dy), 1, dy.shape[1])


def _patches(windows: Tensor, workspace: Workspace, dtype: torch.dtype | None) -> Tensor:
    """Windows (R, ..., C, kh, kw) as matrices (R, n, kh kw C)."""
    replicas, *outputs, channels, kh, kw = windows.shape
    if channels > 1:
        moved = windows.movedim(-3, -1)
        return _rows(workspace.empty(moved.shape, dtype).copy_(moved), 3)
    # Of one channel only single numbers lie together there: whole rows of images do the other way.
    patches = workspace.empty((replicas, kh, kw, *outputs), dtype)
    for i in range(kh):
        for j in range(kw):
            patches[:, i, j].copy_(windows[..., 0, i, j])
    return patches.view(replicas, kh * kw, math.prod(outputs)).transpose(1, 2)


def _rows(x: Tensor, last: int) -> Tensor:
    """(R, ...) as matrices (R, m, n), n the product of the `last` dimensions."""
    return x.view(len(x), -1, math.prod(x.shape[-last:]))


def _overlap(offset: int, stride: int, size: int, out: int) -> tuple[slice, slice]:
    """Where stride * o + offset, for outputs o in [0, out), lies in [0, size): these positions and
    these outputs."""
    first = max(0, -(offset // stride))
    last = max(first, min(out, (size - 1 - offset) // stride + 1))
    start = first * stride + offset
    return slice(start, max(start, (last - 1) * stride + offset + 1), stride), slice(first, last)


@dataclass(frozen=True)
class MaxPool2d:
    """y = the largest of each kh x kw window of x (R, B, H, W, C); windows side by side, an
    incomplete one at the edge is left out.

    dx = dy where x is the first largest of its window, row by row as in torch, else 0. With `apart`
    x comes as a Conv2d with that `pool` makes it.
    """

    kernel: tuple[int, int]
    apart: bool = False

    def build(self, shape: Shape) -> tuple[Shape, Shapes]:
        height, width, channels = shape
        return (height // self.kernel[0], width // self.kernel[1], channels), {}

    def forward(
        self, params: Views, x: Tensor, workspace: Workspace
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first, *others = self._corners(x)
        y = workspace.empty(first.shape).copy_(first)
        for other in others:
            torch.maximum(y, other, out=y)
        return y, (x, y)

    def backward(
        self,
        params: Views,
        grads: Views,
        cache: tuple[Tensor, Tensor],
        dy: Tensor,
        workspace: Workspace,
        need_dx: bool = True,
        beta: int = 0,
    ) -> Tensor | None:
        x, y = cache
        dx = workspace.empty(x.shape)
        if not self.apart and (x.shape[2] % self.kernel[0] or x.shape[3] % self.kernel[1]):
            dx.zero_()
        rest = workspace.empty(y.shape).copy_(dy)  # dy where no largest was found yet, else 0
        below = workspace.empty(y.shape)
        *others, last = zip(self._corners(x), self._corners(dx), strict=True)
        for corner, out in others:
            out.copy_(rest)
            rest.mul_(torch.sub(y, corner, out=below).sign_())
            out.sub_(rest)
        last[1].copy_(rest)
        return dx

    def _corners(self, x: Tensor) -> list[Tensor]:
        """For each place in a window the view of x there, (R, B, H', W', C)."""
        kh, kw = self.kernel
        if self.apart:
            return [x[:, i, j] for i in range(kh) for j in range(kw)]
        height, width = x.shape[2] // kh * kh, x.shape[3] // kw * kw
        return [x[:, :, i:height:kh, j:width:kw] for i in range(kh) for j in range(kw)]


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
        beta: int = 0,
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
        beta: int = 0,
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
        beta: int = 0,
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
        beta: int = 0,
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
                (name, self, replicas),
                lambda: torch.tensor(column, dtype=dtype, device="cpu").view(-1, 1, 1),
            )

        probabilities = list(self.p) if isinstance(self.p, tuple) else [self.p]
        threshold = per_replica(
            "threshold", [int(p * 2**32) - 2**31 for p in probabilities], torch.int32
        )
        scale = per_replica("scale", [1 / (1 - p) for p in probabilities], workspace.dtype)

        h = random_bits(workspace, noise, (replicas, batch, units), self.stream)
        keep = torch.ge(h, threshold, out=workspace.empty(h.shape, torch.bool))
        mask = workspace.empty(h.shape)
        return mask.copy_(keep).mul_(scale).view(shape)


ACTIVATIONS: dict[str, type[ReLU] | type[Tanh] | type[Sigmoid]] = {
    "relu": ReLU,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
}
NAMES = ("linear", "conv2d", "max_pool2d", "flatten", "dropout", *ACTIVATIONS)


def arrange_pooling(layers: list[Layer]) -> list[Layer]:
    """The same function, faster: pooling before the activations between it and its convolution.

    They never fall, so that max f(x) = f(max x), and the gradient of both goes to the same places:
    where values of f are equal but those of x are not, its slope is 0 (or f was rounded).
    """
    arranged = list(layers)
    for i, conv in enumerate(layers):
        j = i + 1
        while j < len(layers) and isinstance(layers[j], ReLU | Tanh | Sigmoid):
            j += 1
        if isinstance(conv, Conv2d) and j < len(layers):
            pooling = layers[j]
            if isinstance(pooling, MaxPool2d) and pooling.kernel != (1, 1):
                arranged[i] = replace(conv, pool=pooling.kernel)
                arranged[i + 1] = replace(pooling, apart=True)
                arranged[i + 2 : j + 1] = layers[i + 1 : j]
    return arranged


def build_layers(specs: list[list[Any]], shape: Shape, classes: int) -> list[Layer]:
    """The layers that a config's `model.layers` names, for examples of `shape`.

    `["linear", "classes"]` is as wide as there are classes; a `flatten` is put before a linear
    layer where its input has more than one dimension. Images (C, H, W) are turned to (H, W, C)
    before the first convolution or pooling. Raises InputError naming the entry.
    """
    layers: list[Layer] = []
    channels_last = False
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
                layers.append(Flatten(channels_last))
                shape, channels_last = layers[-1].build(shape)[0], False
            layer = Linear(units)
        elif name in ("conv2d", "max_pool2d"):
            layer = _of_images(name, arguments, where)
            if len(shape) != 3:
                raise InputError(f"{where}: {name} needs images (C, H, W), not {shape}")
            if not channels_last:
                layers.append(ChannelsLast())
                shape, channels_last = layers[-1].build(shape)[0], True
            if min(layer.build(shape)[0][:2]) < 1:
                raise InputError(
                    f"{where}: {name} with kernel {layer.kernel} leaves nothing of an image of"
                    f" {shape[0]} x {shape[1]}"
                )
        elif name == "dropout":
            layer = Dropout(_probability(_one(arguments, where, name, "p"), where), number)
        else:
            if arguments:
                raise InputError(f"{where}: {name} takes no arguments, not {arguments}")
            layer = Flatten(channels_last) if name == "flatten" else ACTIVATIONS[name]()
            channels_last = channels_last and name != "flatten"
        shape = layer.build(shape)[0]
        layers.append(layer)
    return layers


def _of_images(name: str, arguments: list[Any], where: str) -> Conv2d | MaxPool2d:
    """conv2d with channels, kernel and options, or max_pool2d with a kernel."""
    if name == "max_pool2d":
        return MaxPool2d(_pair(_one(arguments, where, name, "kernel"), where, "kernel", 1))
    options = arguments[2] if len(arguments) == 3 else {}
    if len(arguments) not in (2, 3) or not isinstance(options, dict):
        raise InputError(
            f'{where}: write ["conv2d", channels, kernel, {{stride = 1, padding = 0}}], not'
            f" {[name, *arguments]}"
        )
    for key in options:
        if key not in ("stride", "padding"):
            raise InputError(f"{where}: unknown option {key!r}; {hint(key, ('stride', 'padding'))}")
    channels, kernel = arguments[:2]
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise InputError(f"{where}: conv2d needs channels >= 1, not {channels!r}")
    return Conv2d(
        channels,
        _pair(kernel, where, "kernel", 1),
        _pair(options.get("stride", 1), where, "stride", 1),
        _pair(options.get("padding", 0), where, "padding", 0),
    )


def _pair(value: Any, where: str, meaning: str, least: int) -> tuple[int, int]:
    """Rows and columns from one whole number for both, or a list of two."""
    pair = value if isinstance(value, list | tuple) else [value, value]
    if len(pair) != 2 or any(
        isinstance(item, bool) or not isinstance(item, int) or item < least for item in pair
    ):
        raise InputError(
            f"{where}: {meaning} must be a whole number from {least}, or two of them, not {value!r}"
        )
    return pair[0], pair[1]


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
