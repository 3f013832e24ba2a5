"""From examples to tensors: a split, and a normalisation fitted on its training part.

Shapes: N samples, the rest of x is the shape of one example.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..workspace import generator
from .augment import Augment
from .labels import corrupt
from .ranges import Range, differ_in_scale
from .rows import Rows
from .stream import Streamed

SPLIT_STREAM, PERMUTATION_STREAM = 0x5911, 0x9E12


@dataclass(frozen=True)
class Normalization:
    """x -> (x - mean) / std on raw values: mean and std are numbers, or lists over the features.

    With `permute_seed` all values of an example are then put into one fixed random order.
    """

    kind: str
    mean: float | list[float] = 0.0
    std: float | list[float] = 1.0
    permute_seed: int | None = None

    @classmethod
    def fit(cls, kind: str, images: "Tensor | Rows") -> "Normalization":
        """Fit on `images` (N, ...): "none", "unit" (x / 255), "standard" (one mean and standard
        deviation) or "feature" (one each per feature). A constant feature is only shifted."""
        if kind in ("none", "unit"):
            return cls(kind, 0.0, 255.0 if kind == "unit" else 1.0)
        if kind == "standard" and images.dtype == torch.uint8:  # each of 256 values at once
            counts = _histogram(images).double()
            values = torch.arange(256, dtype=torch.float64, device="cpu")
            mean = values @ counts / images.numel()
            std = ((values - mean).square() @ counts / images.numel()).sqrt()
            return cls(kind, float(mean), float(std) or 1.0)
        dims = [0] if kind == "feature" else list(range(images.dim()))
        count = len(images) if kind == "feature" else images.numel()
        mean = torch.stack([c.double().sum(dims) for c in images.split(4096)]).sum(0).div_(count)
        squares = torch.stack([(c.double() - mean).square().sum(dims) for c in images.split(4096)])
        std = squares.sum(0).div_(count).sqrt()
        std = torch.where(std > 0, std, 1.0)
        return (
            cls(kind, mean.flatten().tolist(), std.flatten().tolist())
            if dims == [0]
            else cls(kind, float(mean), float(std))
        )

    def apply(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """The normalised images in `dtype`, of the same shape."""
        mean, std, moved = self.values(images.shape[1:], dtype)
        x = images.to(dtype, copy=True)
        if moved is not None:
            x = x.flatten(1)[:, moved].view(x.shape)
        return x.sub_(mean).div_(std)

    def values(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """For examples of `shape`: what to subtract and to divide by, once their values have been
        put into the order that is the third, if there is one."""
        count = math.prod(shape)
        mean, std = (
            torch.tensor(v, dtype=dtype, device="cpu").expand(count) for v in (self.mean, self.std)
        )
        if self.permute_seed is None:
            return mean.view(shape), std.view(shape), None
        moved = permutation(self.permute_seed, count)
        return mean[moved].view(shape), std[moved].view(shape), moved

    def to_meta(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Samples:
    """x (N, ...) normalised, y (N,) int64, or (R, N) where each replica has labels of its own; both
    on the training device. Of data larger than memory x stands for a tensor that is in files."""

    x: Tensor | Streamed
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def targets(self) -> Tensor:
        """y as (R, N) or (1, N)."""
        return self.y.view(-1, len(self))


@dataclass(frozen=True)
class Prepared:
    """The parts of one experiment; `valid` and `test` are None where there is none. `range` is that
    of the raw training examples."""

    train: Samples
    valid: Samples | None
    test: Samples | None
    normalization: Normalization
    shape: tuple[int, ...]
    augment: Augment | None = None
    range: Range | None = None


def head(images: Tensor | Rows, count: int) -> Tensor | Rows:
    """The first so many; those in files are not yet read."""
    return images.first(count) if isinstance(images, Rows) else images[:count]


def select(images: Tensor | Rows, index: Tensor) -> Tensor | Rows:
    """Some images, by their indices; those in files are not yet read."""
    return images.select(index) if isinstance(images, Rows) else images[index]


def permutation(seed: int, count: int) -> Tensor:
    """Where each of `count` values comes from: a random order that depends on `seed` alone."""
    return torch.randperm(count, generator=generator(seed, PERMUTATION_STREAM), device="cpu")


def split(
    labels: Tensor, valid: int | float, seed: int, stratify: bool = False
) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation part, each in ascending order.

    `valid` is a count, or a fraction where it is a float below 1. With `stratify` every class gives
    the same share, to within one sample. Raises InputError when a part would be empty.
    """
    count = round(valid * len(labels)) if isinstance(valid, float) else valid
    if not 0 <= count < len(labels) or (valid and not count):
        raise InputError(
            f"data.valid = {valid} of {len(labels)} samples leaves a part empty; change it or the"
            " number of samples"
        )
    if not count:
        return torch.arange(len(labels), device="cpu"), torch.arange(0, device="cpu")
    order = torch.randperm(len(labels), generator=generator(seed, SPLIT_STREAM), device="cpu")
    if stratify:
        # Rank each sample within its class, in a random order; the lowest relative ranks validate.
        by_class = order[labels[order].argsort(stable=True)]
        sizes = labels.bincount()
        starts = (sizes.cumsum(0) - sizes)[labels[by_class]]
        rank = (torch.arange(len(labels), device="cpu") - starts + 0.5) / sizes[labels[by_class]]
        order = by_class[rank.argsort(stable=True)]
    return order[count:].sort().values, order[:count].sort().values


def only_class(labels: Tensor) -> str:
    """The class of all labels (N,), as text, where they have but one; else ""."""
    return str(int(labels[0])) if len(labels) and bool((labels == labels[0]).all()) else ""


def _histogram(images: Tensor | Rows) -> Tensor:
    """How often each of 256 values is in images (N, ...) of bytes; files' are counted."""
    if not isinstance(images, Rows):
        return images.flatten().bincount(minlength=256)

    def count(rows: Rows) -> Tensor:
        return sum(
            map(_histogram, rows.split(4096)), torch.zeros(256, dtype=torch.int64, device="cpu")
        )

    if images.counts is None:
        return count(images)
    counts = images.counts - count(images.left_out())
    if (counts < 0).any():
        raise InputError(f"{images.files[0].path.parent}: the manifest's histogram is wrong")
    return counts


def prepare(
    train: tuple[Tensor | Rows, Tensor],
    test: tuple[Tensor | Rows, Tensor] | None,
    *,
    valid: int | float = 0,
    stratify: bool = False,
    seed: int = 0,
    train_samples: int = 0,
    corruption: Sequence[tuple[float, int]] = (),
    classes: int = 0,
    normalize: str = "standard",
    permute_seed: int | None = None,
    augment: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_mb: int = 512,
) -> Prepared:
    """Split (images, labels), fit the normalisation on the training part only, and normalise all.
    Training images that are `Rows` stay in their files, but for `memory_mb` MiB of them.

    `train_samples` keeps only the first so many before the split; 0 keeps all. `corruption` has
    each replica's fraction of training labels that random ones of `classes` replace, and the seed.
    """
    images, labels = train
    if train_samples > len(labels):
        raise InputError(
            f"data.train_samples = {train_samples}, but there are {len(labels)} samples"
        )
    if train_samples:
        images = head(images, train_samples)
        labels = labels[:train_samples]
    chosen, held_out = split(labels, valid, seed, stratify)
    used = select(images, chosen) if len(held_out) else images
    normalization = replace(Normalization.fit(normalize, used), permute_seed=permute_seed)
    chosen_augment = Augment.parse(augment)
    if chosen_augment and images.dim() != 4:
        raise InputError(
            f"data.augment needs images, not examples of shape {tuple(images.shape[1:])}"
        )

    if isinstance(images, Rows):
        if not torch.tensor([normalization.mean, normalization.std], device="cpu").isfinite().all():
            raise InputError("the training examples hold a number that is not finite")
    elif images.is_floating_point() and not images.isfinite().all():
        worst = int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(f"training example {worst} holds a number that is not finite")

    found = Range.of(used)
    if test and len(test[1]) and differ_in_scale(found, other := Range.of(test[0])):
        raise InputError(
            f"the training examples are {found}, but the test examples {other}: give both on one"
            " scale"
        )

    def samples(images: Tensor | Rows, labels: Tensor) -> Samples:
        if isinstance(images, Rows):
            x = Streamed(images, normalization, dtype, device, memory_mb << 20)
            return Samples(x, labels.to(device))
        return Samples(normalization.apply(images, dtype).to(device), labels.to(device))

    held = select(images, held_out)
    if isinstance(held, Rows) and held.numel() * dtype.itemsize <= memory_mb << 20:
        held = held[:]  # more of them stay in their files, too
    learned = labels[chosen] if len(held_out) else labels
    if only := only_class(learned):
        print(
            f"note: all {len(learned)} of the training labels that are used are {only}: accuracies"
            " say nothing",
            file=sys.stderr,
        )
    if any(fraction for fraction, _ in corruption):
        learned = torch.stack([corrupt(learned, p, classes, seed) for p, seed in corruption])
    return Prepared(
        samples(used, learned),
        samples(held, labels[held_out]) if len(held_out) else None,
        samples(*test) if test else None,
        normalization,
        tuple(images.shape[1:]),
        chosen_augment,
        found,
    )
