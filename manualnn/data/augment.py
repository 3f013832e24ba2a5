"""Random changes of training images that keep their class, by tensor operations.

Shapes: R replicas, B samples of a batch, images (C, H, W).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, hint
from ..workspace import Workspace, generator

AUGMENT_STREAM = 0xA06A
KINDS = ("hflip", "shift", "cutout")


@dataclass(frozen=True)
class Augment:
    """Mirror left and right with probability 1/2; move by up to `shift` pixels each way, repeating
    the edge; set a square of `cutout` pixels (DeVries and Taylor 2017) to 0, the mean of
    standardised data.

    What is drawn depends on the replica's seed, the step and the sample's place in the batch alone.
    """

    hflip: bool = False
    shift: int = 0
    cutout: int = 0

    @classmethod
    def parse(cls, specs: tuple[str, ...]) -> "Augment | None":
        """From `["hflip", "shift:2", "cutout:8"]`; None where nothing is asked for."""
        found: dict[str, int] = {}
        for spec in specs:
            name, colon, size = spec.partition(":")
            if name not in KINDS:
                raise InputError(f"data.augment: unknown {spec!r}; {hint(name, KINDS)}")
            if name in found:
                raise InputError(f"data.augment: {name} stands there twice")
            if (name == "hflip") == bool(colon) or (colon and not (size.isdigit() and int(size))):
                how = "hflip" if name == "hflip" else f"{name}:N, N pixels from 1"
                raise InputError(f"data.augment: {spec!r}: write {how}")
            found[name] = int(size or 1)
        if not found:
            return None
        return cls("hflip" in found, found.get("shift", 0), found.get("cutout", 0))

    def apply(self, x: Tensor, seeds: list[int], step: int, workspace: Workspace) -> Tensor:
        """Changed copies of x (R, B, C, H, W), each replica's by its own seed."""
        replicas, batch, channels, height, width = x.shape
        rows = workspace.empty((replicas, batch, height), torch.int64)
        columns = workspace.empty((replicas, batch, width), torch.int64)
        keep = workspace.empty((replicas, batch, height, width)) if self.cutout else None
        for r, seed in enumerate(seeds):
            draw = generator(seed, AUGMENT_STREAM, step)
            h, w = torch.arange(height), torch.arange(width).expand(batch, width)
            if self.hflip:
                flips = torch.randint(2, (batch, 1), generator=draw)
                w = w + flips * (width - 1 - 2 * w)
            moves = torch.randint(-self.shift, self.shift + 1, (2, batch, 1), generator=draw)
            rows[r].copy_((h + moves[0]).clamp_(0, height - 1))
            columns[r].copy_((w + moves[1]).clamp_(0, width - 1))
            if keep is not None:
                keep[r].copy_(self._holes(batch, height, width, draw))
        index = workspace.empty((replicas, batch, height, width), torch.int64)
        index.copy_(rows.unsqueeze(3)).mul_(width).add_(columns.unsqueeze(2))
        flat = (replicas, batch, channels, height * width)
        changed = workspace.empty(flat)
        index = index.view(replicas, batch, 1, -1).expand(flat)
        torch.gather(x.reshape(flat), 3, index, out=changed)
        if keep is not None:
            changed.mul_(keep.view(replicas, batch, 1, -1))
        return changed.view(x.shape)

    def _holes(self, batch: int, height: int, width: int, draw: torch.Generator) -> Tensor:
        """(B, H, W): 0 in a square around a random pixel, which the edge may cut, else 1."""
        centre = torch.stack(
            [torch.randint(size, (batch, 1), generator=draw) for size in (height, width)]
        )
        first = centre - self.cutout // 2
        inside = [
            (torch.arange(size) >= start) & (torch.arange(size) < start + self.cutout)
            for size, start in zip((height, width), first, strict=True)
        ]
        return (~(inside[0].unsqueeze(2) & inside[1].unsqueeze(1))).float()
