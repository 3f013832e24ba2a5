"""Images distorted at random: every pixel of the result is taken from a place near its own.

The places of all pixels of a result are one bilinear form for each axis,

    place(y, x) = sum_ij rows(y, i) z_ij columns(x, j),

where the columns of both matrices are Gaussians around some nodes, the distance from the centre,
and 1. Random z between Gaussians are an elastic distortion (Simard, Steinkraus and Platt 2003:
noise, smoothed and scaled), z between distance and 1 a linear map, between 1 and 1 the centre.

Shapes: R replicas, B samples of a batch, n of one block, images (C, H, W).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..workspace import Noise, Workspace, random_bits

STREAM = 0xE1A5
BLOCK = 2**17  # pixels that are sampled at once: what becomes of them stays in a cache
SPACING = 1.25  # of the nodes, in sigmas: the variance then changes by 0.4 % from node to node
UNIT = 2.0**-31  # 32 random bits times this are in [-1, 1)


@dataclass(frozen=True)
class Distortion:
    """The place of each pixel is moved by uniform noise in [-1, 1] at every pixel, smoothed by a
    Gaussian of `sigma` pixels and multiplied by `alpha`: by alpha / (2 sqrt(3 pi) sigma) pixels in
    the root mean square. Before it, the distance from the image's centre is multiplied by I + U,
    the four entries of U uniform in [-affine, affine]: turned, scaled and sheared.

    Values between pixels are interpolated bilinearly; outside, the edge is repeated.
    """

    alpha: float = 0.0
    sigma: float = 6.0
    affine: float = 0.0

    def apply(
        self, x: Tensor, noise: Noise, batch: int, workspace: Workspace, out: Tensor
    ) -> Tensor:
        """Write to `out` the distorted x (R, rows, C, H, W), which are the rows from `noise.first`
        on of a batch of `batch` samples, and return it.

        What becomes of a row depends on nothing but its replica's seed, the step, its position and
        `batch`: the places of a block are computed for the whole block, also where only some of its
        rows are asked for, as the order of a sum in a product depends on the product's size.
        """
        height, width = x.shape[3:]
        block = min(batch, max(1, BLOCK // (height * width)))
        first, last = noise.first, noise.first + x.shape[1]
        for r in range(len(x)):
            for start in range(first // block * block, last, block):
                count = min(block, batch - start)
                own = replace(noise, seeds=noise.seeds[r : r + 1], first=start)
                rows = slice(max(first, start) - start, min(last, start + count) - start)
                part = slice(start + rows.start - first, start + rows.stop - first)
                key = ("distort", self, height, width, count, rows.stop - rows.start)
                with workspace.within(key):
                    places = self._places(own, count, height, width, workspace)
                    sample(x[r, part], places[:, :, rows], workspace, out[r, part])
        return out

    def _places(
        self, noise: Noise, count: int, height: int, width: int, workspace: Workspace
    ) -> Tensor:
        """(2, H, n, W): where the pixels of `count` samples come from, as row and as column."""

        def make(size: int, scale: float) -> Tensor:
            return basis(size, self.sigma if self.alpha else 0, scale).to(workspace.dtype)

        rows = workspace.constant(("rows", self, height), lambda: make(height, self.alpha * UNIT))
        columns = workspace.constant(
            ("columns", self, width), lambda: make(width, 1).T.contiguous()
        )
        i, j = rows.shape[1] - 2, len(columns) - 2  # nodes; then the distance, and 1
        bits = random_bits(workspace, noise, (1, count, 4 + 2 * i * j), STREAM)[0]
        z = _flat_zeros(workspace, 2, i + 2, count, j + 2)
        if i:
            z[:, :i, :, :j].copy_(bits[:, 4:].view(count, 2, i, j).permute(1, 2, 0, 3))
        identity = workspace.constant(
            "identity", lambda: torch.eye(2, dtype=workspace.dtype, device="cpu")
        )
        linear = _flat(workspace, count, 2, 2).copy_(bits[:, :4].view(count, 2, 2))
        linear = linear.mul_(self.affine * UNIT).add_(identity).permute(1, 2, 0)
        z[:, i, :, j + 1].copy_(linear[:, 0])
        z[:, i + 1, :, j].copy_(linear[:, 1])
        z[0, i + 1, :, j + 1].fill_((height - 1) / 2)
        z[1, i + 1, :, j + 1].fill_((width - 1) / 2)
        half = _flat(workspace, 2 * (i + 2) * count, width)
        torch.mm(z.view(-1, j + 2), columns, out=half)
        places = _flat(workspace, 2, height, count * width)
        torch.bmm(rows.expand(2, *rows.shape), half.view(2, i + 2, -1), out=places)
        return places.view(2, height, count, width)


def basis(size: int, sigma: float, scale: float = 1.0) -> Tensor:
    """(size, K + 2) float64: K Gaussians times `scale`, the distance from the centre, and 1.

    Independent numbers of variance v in the place of the K give what the same at every pixel,
    smoothed by a Gaussian of sum 1, gives: sum_k s N(p - n_k) N(q - n_k), nodes n_k being s apart,
    is the integral of N(p - n) N(q - n) up to a share of 2 exp(-(pi sigma / s)^2).
    """
    distance = torch.arange(size, dtype=torch.float64, device="cpu").sub_((size - 1) / 2)
    columns = [distance, torch.ones_like(distance)]
    if sigma:
        reach = (size - 1) / 2 + 2 * sigma  # noise farther away would add 0.2 % at the edge
        count = math.ceil(2 * reach / (SPACING * sigma)) + 1
        nodes = (
            torch.arange(count, dtype=torch.float64, device="cpu") * (2 * reach / (count - 1))
            - reach
        )
        off = (distance.unsqueeze(1) - nodes) / sigma
        height = math.sqrt(2 * reach / (count - 1)) / (sigma * math.sqrt(2 * math.pi))
        columns = [*off.square().div_(-2).exp_().mul_(height * scale).unbind(1), *columns]
    return torch.stack(columns, 1)


def sample(x: Tensor, places: Tensor, workspace: Workspace, out: Tensor) -> Tensor:
    """Write to `out` what images x (n, C, H, W) have at `places` (2, H, n, W), rows and columns:
    interpolated bilinearly between four pixels; outside, the edge is repeated."""
    count, channels, height, width = x.shape
    size = height * width
    shape = (height, count, width)
    row, column, down, right, *values = (_flat(workspace, *shape) for _ in range(8))
    torch.clamp(places[0], 0, height - 1, out=row)
    torch.clamp(places[1], 0, width - 1, out=column)
    torch.frac(row, out=down)
    torch.frac(column, out=right)
    index = _flat(workspace, *shape, dtype=torch.int32)
    index.copy_(column.sub_(right).add_(row.sub_(down), alpha=width))
    starts = torch.arange(0, count * size, size, dtype=torch.int32, device="cpu").view(1, -1, 1)
    index.add_(workspace.constant(("starts", shape), lambda: starts.repeat(height, 1, width)))
    # On the last row and column the neighbours beyond have the weight 0: any number will do.
    source = _flat_zeros(workspace, count * size + width + 1)
    for c in range(channels):
        source[: count * size].view(count, height, width).copy_(x[:, c])
        for start, value in zip((0, 1, width, width + 1), values, strict=True):
            torch.index_select(source[start:], 0, index.view(-1), out=value.view(-1))
        upper, upper_right, lower, lower_right = values
        torch.lerp(upper, upper_right, right, out=upper)
        torch.lerp(lower, lower_right, right, out=lower)
        out[:, c].copy_(torch.lerp(upper, lower, down, out=upper).permute(1, 0, 2))
    return out


def _flat(workspace: Workspace, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A buffer of the workspace, contiguous whatever its shape."""
    return workspace.empty((1, math.prod(shape)), dtype).view(shape)


def _flat_zeros(workspace: Workspace, *shape: int) -> Tensor:
    return workspace.zeros((1, math.prod(shape))).view(shape)
