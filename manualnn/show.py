"""Examples of each class of a data set as one picture."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import plots
from .data import Place, Rows, load, load_source
from .data.prepare import permutation, select
from .errors import InputError
from .files import writing
from .workspace import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOW_STREAM = 0x5403


def show(
    name: str,
    place: Place = None,
    source: str = "train",
    class_names: tuple[str, ...] | None = None,
    examples: int = 4,
    seed: int = 0,
    permute_seed: int | None = None,
) -> "Figure":
    """A row for each class with `examples` different images, chosen by `seed`.

    With `permute_seed` each stands beside itself as a network gets it, its pixels in one fixed
    random order. `source` "test" shows test images. Raises InputError where these are no images.
    """
    if source == "train":
        dataset = load(name, place, ("train",), class_names=class_names)
    else:
        dataset = load_source(source, name, place, class_names)
    assert dataset.train is not None and dataset.class_names is not None
    images, labels = dataset.train.images, dataset.train.labels
    if images.dim() != 4:
        raise InputError(
            f"{dataset.where}: examples of {images.shape[1]} values are no images, which have 8 x 8"
            " bytes or a larger square of them"
        )
    order = torch.randperm(len(labels), generator=generator(seed, SHOW_STREAM), device="cpu")
    print(f"read {dataset.read}", file=sys.stderr)
    rows = [
        _different(select(images, order[labels[order] == k]), examples) for k in labels.unique()
    ]
    names = [dataset.class_names[int(k)] for k in labels.unique()]
    shown = [row.numpy() for row in rows]
    title = f"{name}: {'test' if source == 'test' else 'training'} images"
    if permute_seed is None:
        return plots.class_grid(shown, names, title)
    moved = permutation(permute_seed, images.shape[1:].numel())
    permuted = [row.flatten(1)[:, moved].view(row.shape).numpy() for row in rows]
    title += f", and permuted (seed {permute_seed})"
    return plots.class_grid(shown, names, title, permuted)


def _different(images: Tensor | Rows, count: int) -> Tensor:
    """The first `count` images, none of them twice."""
    chosen: list[Tensor] = []
    for image in images:
        if len(chosen) == count:
            break
        if not any(image.equal(other) for other in chosen):
            chosen.append(image)
    return torch.stack(chosen)


def save(figure: "Figure", path: Path | str) -> None:
    """Write it as PNG. Raises InputError."""
    path = Path(path)
    with writing(f"--out {path}"):
        plots.save(figure, path)
