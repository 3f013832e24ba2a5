"""The range of raw values, by which data on another scale are noticed.

Shapes: N examples, the rest is the shape of one.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .rows import Rows

CHUNK = 4096  # examples looked at at a time
LIGHT = 64  # the highest value of bytes that use their range at least reaches this


@dataclass(frozen=True)
class Range:
    """The lowest and the highest value; `whole`: all are whole numbers from 0 to 255 (bytes)."""

    low: float
    high: float
    whole: bool

    @classmethod
    def of(cls, images: Tensor | Rows) -> "Range":
        """The range of raw examples (N, ...), N > 0; those in files are read part by part."""
        if isinstance(images, Rows) and images.counts is not None:  # also of those not chosen
            found = images.counts.nonzero()
            return cls(float(found[0]), float(found[-1]), True)
        low, high, whole = float("inf"), float("-inf"), True
        for part in images.split(CHUNK):
            low, high = min(low, float(part.amin())), max(high, float(part.amax()))
            if part.is_floating_point() and whole:
                whole = bool((part == part.floor()).all())
        return cls(low, high, whole and low >= 0 and high <= 255)

    @classmethod
    def from_meta(cls, stored: dict[str, Any]) -> "Range":
        return cls(float(stored["min"]), float(stored["max"]), bool(stored["bytes"]))

    def to_meta(self) -> dict[str, Any]:
        return {"min": self.low, "max": self.high, "bytes": self.whole}

    @property
    def is_unit(self) -> bool:
        """Whether the values are fractions in [0, 1]."""
        return not self.whole and self.low >= 0 and self.high <= 1

    @property
    def is_light(self) -> bool:
        """Whether these are bytes that reach beyond what fractions in [0, 1] could be."""
        return self.whole and self.high >= LIGHT

    def __str__(self) -> str:
        kind = "whole numbers " if self.whole else ""
        return f"{kind}from {self.low:.4g} to {self.high:.4g}"


def differ_in_scale(one: Range, other: Range) -> bool:
    """Whether one holds fractions in [0, 1], and the other bytes that reach far beyond."""
    return (one.is_unit and other.is_light) or (one.is_light and other.is_unit)
