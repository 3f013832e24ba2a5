"""Random changes of training images that keep their class, by tensor operations.

Shapes: R replicas, B samples of a batch, images (C, H, W).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, hint
from ..workspace import Noise, Workspace, generator, mix
from .elastic import STREAM, Distortion

AUGMENT_STREAM = 0xA06A
KINDS = {
    "hflip": "hflip",
    "shift": "shift:N, N pixels from 1",
    "cutout": "cutout:N, N pixels from 1",
    "elastic": "elastic:ALPHA or elastic:ALPHA:SIGMA, ALPHA from 0.1 to 1000, SIGMA from 1 to 100",
    "affine": "affine:P, P percent from 0.1 to 99",
}
# The least and the most of the numbers of each; those of WHOLE are whole.
LIMITS: dict[str, tuple[tuple[float, float], ...]] = {
    "hflip": (),
    "shift": ((1, 1e9),),
    "cutout": ((1, 1e9),),
    "elastic": ((0.1, 1000), (1, 100)),
    "affine": ((0.1, 99),),
}
WHOLE = ("shift", "cutout")


@dataclass(frozen=True)
class Augment:
    """Distort by an `elastic` field of that alpha, smoothed over `sigma` pixels, and by a linear
    map, the entries of its matrix off by up to `affine` percent; mirror left and right with
    probability 1/2; move by up to `shift` pixels each way; set a square of `cutout` pixels (DeVries
    and Taylor 2017) to 0, the mean of standardised data. What comes from outside repeats the edge.

    What is drawn depends on the replica's seed, the step and the sample's place in the batch alone.
    """

    hflip: bool = False
    shift: int = 0
    cutout: int = 0
    elastic: float = 0.0
    sigma: float = Distortion.sigma
    affine: float = 0.0

    @classmethod
    def parse(cls, specs: tuple[str, ...]) -> "Augment | None":
        """From `["hflip", "shift:2", "cutout:8", "elastic:36", "affine:10"]`; None where nothing is
        asked for."""
        found: dict[str, list[str]] = {}
        for spec in specs:
            name, *numbers = spec.split(":")
            if name not in KINDS:
                raise InputError(f"data.augment: unknown {spec!r}; {hint(name, KINDS)}")
            if name in found:
                raise InputError(f"data.augment: {name} stands there twice")
            if not _fits(name, numbers):
                raise InputError(f"data.augment: {spec!r}: write {KINDS[name]}")
            found[name] = numbers
        if not found:
            return None
        alpha, sigma = [*found.get("elastic", ["0"]), str(cls.sigma)][:2]
        [shift], [cutout], [affine] = (found.get(x, ["0"]) for x in ("shift", "cutout", "affine"))
        return cls(
            "hflip" in found, int(shift), int(cutout), float(alpha), float(sigma), float(affine)
        )

    def apply(
        self,
        x: Tensor,
        seeds: list[int],
        step: int,
        workspace: Workspace,
        rows: slice | None = None,
        batch: int | None = None,
    ) -> Tensor:
        """Changed copies of x (R, B, C, H, W), each replica's by its own seed. Where x has only the
        `rows` of a batch of `batch` samples, they become what they would become in all of it."""
        whole = batch or x.shape[1]
        rows = rows or slice(0, whole)
        if self.elastic or self.affine:
            x = self._distort(x, seeds, step, workspace, rows.start, whole)
        if self.hflip or self.shift or self.cutout:
            x = self._move(x, seeds, step, workspace, rows, whole)
        return x

    def _distort(
        self, x: Tensor, seeds: list[int], step: int, workspace: Workspace, first: int, batch: int
    ) -> Tensor:
        mixed = workspace.constant(
            ("seeds", *seeds),
            lambda: torch.tensor([[mix(seed, STREAM)] for seed in seeds], device="cpu"),
        )
        now = torch.full((), step << 32, device=x.device)  # a `clock`
        noise = Noise(mixed, now, first)
        out = workspace.empty((1, x.numel())).view(x.shape)
        distortion = Distortion(self.elastic, self.sigma, self.affine / 100)
        return distortion.apply(x, noise, batch, workspace, out)

    def _move(
        self,
        x: Tensor,
        seeds: list[int],
        step: int,
        workspace: Workspace,
        rows: slice,
        batch: int,
    ) -> Tensor:
        """Mirrored, shifted, with squares cut out, by the `rows` of what is drawn for a batch."""
        replicas, count, channels, height, width = x.shape
        y = workspace.empty((replicas, count, height), torch.int64)
        columns = workspace.empty((replicas, count, width), torch.int64)
        keep = workspace.empty((replicas, count, height, width)) if self.cutout else None
        for r, seed in enumerate(seeds):
            draw = generator(seed, AUGMENT_STREAM, step)
            h, w = (
                torch.arange(height, device="cpu"),
                torch.arange(width, device="cpu").expand(batch, width),
            )
            if self.hflip:
                flips = torch.randint(2, (batch, 1), generator=draw, device="cpu")
                w = w + flips * (width - 1 - 2 * w)
            moves = torch.randint(
                -self.shift, self.shift + 1, (2, batch, 1), generator=draw, device="cpu"
            )
            y[r].copy_((h + moves[0]).clamp_(0, height - 1)[rows])
            columns[r].copy_((w + moves[1]).clamp_(0, width - 1)[rows])
            if keep is not None:
                keep[r].copy_(self._holes(batch, height, width, draw)[rows])
        index = workspace.empty((replicas, count, height, width), torch.int64)
        index.copy_(y.unsqueeze(3)).mul_(width).add_(columns.unsqueeze(2))
        flat = (replicas, count, channels, height * width)
        changed = workspace.empty(flat)
        index = index.view(replicas, count, 1, -1).expand(flat)
        torch.gather(x.reshape(flat), 3, index, out=changed)
        if keep is not None:
            changed.mul_(keep.view(replicas, count, 1, -1))
        return changed.view(x.shape)

    def _holes(self, batch: int, height: int, width: int, draw: torch.Generator) -> Tensor:
        """(B, H, W): 0 in a square around a random pixel, which the edge may cut, else 1."""
        centre = torch.stack(
            [
                torch.randint(size, (batch, 1), generator=draw, device="cpu")
                for size in (height, width)
            ]
        )
        first = centre - self.cutout // 2
        inside = [
            (torch.arange(size, device="cpu") >= start)
            & (torch.arange(size, device="cpu") < start + self.cutout)
            for size, start in zip((height, width), first, strict=True)
        ]
        return (~(inside[0].unsqueeze(2) & inside[1].unsqueeze(1))).float()


def _fits(name: str, numbers: list[str]) -> bool:
    """Whether these are the numbers that `KINDS` names."""
    limits = LIMITS[name]
    pattern = "[0-9]{1,9}" + r"(\.[0-9]{1,9})?" * (name not in WHOLE)
    return min(1, len(limits)) <= len(numbers) <= len(limits) and all(
        re.fullmatch(pattern, number) and low <= float(number) <= high
        for number, (low, high) in zip(numbers, limits, strict=False)
    )
