"""All parameters of R networks in one buffer `theta` of shape (R, P), and named views into it.

An optimizer, a penalty, a checkpoint or a sum over processes is then one operation on one tensor; a
layer sees only its own views. Every parameter starts at a multiple of ALIGN elements, with zeros in
between: the kernels behind a matrix product choose their order of summation by the alignment of
their operands, and replica r of a population shall get the bits of a single network.

A matrix of fewer than ALIGN columns lies in memory column by column: products and sums of rows that
narrow would leave most of a register empty, as in a last layer of ten classes.

Shapes: R replicas, P columns (the parameters of one network and the zeros between them).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 16  # elements: 64 bytes in float32, a cache line and an AVX-512 register
Shapes = dict[str, tuple[int, ...]]
Views = dict[str, Tensor]


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


def arrange(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`flat` (R, n) as (R, *shape) without a copy, narrow matrices column by column."""
    if len(shape) == 2 and 1 < shape[1] < ALIGN:
        return flat.view(len(flat), *shape[::-1]).transpose(1, 2)
    return flat.view(len(flat), *shape)


@dataclass(frozen=True)
class Slot:
    """Where one named parameter of one layer lies in a row of the buffer."""

    layer: int
    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The order of all parameters in a row: `slots`, `layers` in number."""

    slots: tuple[Slot, ...]
    layers: int

    @classmethod
    def of(cls, shapes: list[Shapes]) -> "Layout":
        """Lay the parameters of each layer one after another, in the order given."""
        slots: list[Slot] = []
        offset = 0
        for layer, named in enumerate(shapes):
            for name, shape in named.items():
                slots.append(Slot(layer, name, shape, offset))
                offset = aligned(offset + slots[-1].size)
        return cls(tuple(slots), len(shapes))

    @property
    def count(self) -> int:
        """The number of parameters of one network."""
        return sum(slot.size for slot in self.slots)

    @property
    def width(self) -> int:
        """P, the number of columns of the buffer."""
        return aligned(self.slots[-1].offset + self.slots[-1].size) if self.slots else 0

    def views(self, buffer: Tensor) -> list[Views]:
        """For each layer its named views of `buffer` (R, P), each of shape (R, *shape)."""
        views: list[Views] = [{} for _ in range(self.layers)]
        for slot in self.slots:
            views[slot.layer][slot.name] = self.view(buffer, slot)
        return views

    def view(self, buffer: Tensor, slot: Slot) -> Tensor:
        """The part of `buffer` (R, P) that is one parameter, (R, *shape)."""
        return arrange(buffer[:, slot.offset : slot.offset + slot.size], slot.shape)

    def gaps(self, buffer: Tensor) -> list[Tensor]:
        """The views of `buffer` (R, P) between the parameters, where any are."""
        starts = [slot.offset for slot in self.slots[1:]] + [self.width]
        ends = [slot.offset + slot.size for slot in self.slots]
        return [buffer[:, a:b] for a, b in zip(ends, starts, strict=True) if a < b]

    def weight_mask(self) -> Tensor:
        """(P,) float64: 1 for weights, 0 for biases, which penalties leave alone."""
        mask = torch.zeros(self.width, dtype=torch.float64, device="cpu")
        for slot in self.slots:
            if slot.name != "bias":
                mask[slot.offset : slot.offset + slot.size] = 1
        return mask

    def keys(self) -> list[str]:
        """The names of the slots in a weights file: w1, b1, w2, b2, ... in the layers' order."""
        numbers = {
            layer: i for i, layer in enumerate(dict.fromkeys(s.layer for s in self.slots), 1)
        }
        return [f"{slot.name[0]}{numbers[slot.layer]}" for slot in self.slots]

    def to_dict(self, row: Tensor) -> dict[str, Tensor]:
        """Named CPU copies of one network's row (P,): saving a view would save its whole buffer."""
        row = row.detach().cpu().unsqueeze(0)
        return {
            key: self.view(row, slot)[0].clone(memory_format=torch.contiguous_format)
            for key, slot in zip(self.keys(), self.slots, strict=True)
        }
