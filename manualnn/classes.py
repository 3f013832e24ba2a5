"""What the report of the CSV exercise has besides its networks: examples of each class, with their
names, and what a sweep found.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import plots
from .config import Data, load_config
from .data import Examples, load_source
from .data.prepare import select
from .data.sources import FASHION
from .files import user_path
from .find import runs_called
from .pages import INSIDE, Block, draw_text, heading, panel
from .results import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FASHION_MEAN = 72.94  # of the training pixels; MNIST has 33.3, KMNIST 48.9
MOST = 20  # classes with room


def training_images(trained: Trained) -> Examples | None:
    """The raw training examples of a network that learned their own labels, or None where they are
    no images. Raises InputError where they cannot be read."""
    data = trained.config.data
    train = load_source(data.source, data.name, data.place, data.class_names).train
    if train is None or train.images.dim() != 4 or data.labels != "given" or data.corruption:
        return None
    return train


def names_of(trained: Trained, examples: Examples | None) -> list[str]:
    """The names of the classes of a CSV file, which has none: those of Fashion-MNIST where the
    config is called after it and ten classes of images are like its own; else none."""
    data = trained.config.data
    if data.name != "csv" or data.class_names or examples is None:
        return []
    called = any(n.startswith("fashion") for n in (trained.figures["run"], trained.config.name))
    images = examples.images
    if not called or trained.figures["classes"] != 10 or images.shape[1:] != (1, 28, 28):
        return []
    some = select(images, torch.linspace(0, len(images) - 1, 2000, device="cpu").long())[:]
    alike = images.dtype == torch.uint8 and abs(float(some.double().mean()) - FASHION_MEAN) < 5
    return list(FASHION) if alike else []


def class_grid(examples: Examples, names: Sequence[str], rows: int) -> Block:
    """A column for each class: its name and its first `rows` images."""
    labels = examples.labels.unique().tolist()
    shown = labels[:MOST]
    columns = min(10, max(len(shown), 6))
    wide = INSIDE / columns
    size = min(wide * 0.86, 0.6)
    lines = -(-len(shown) // columns)
    down = 0.2 + rows * (size + 0.04)
    title = "Classes" + (f": the first {MOST} of {len(labels)}" if len(labels) > MOST else "")

    def draw(page: "Figure", left: float, top: float) -> None:
        heading(page, top, title, left)
        for i, k in enumerate(shown):
            x, y = left + (i % columns) * wide, top + 0.27 + (i // columns) * down
            draw_text(page, x + wide / 2, y, names[k], fontsize=7, ha="center")
            index = (examples.labels == k).nonzero().flatten()[:rows]
            for j, image in enumerate(select(examples.images, index)[:]):
                place = y + 0.17 + j * (size + 0.04)
                axes = panel(page, x + (wide - size) / 2, place, size, size)
                axes.axis("off")
                plots.draw_image(axes, image.numpy())

    return Block(0.27 + lines * down + 0.1, draw)


def sweep_of(folder: Path, trained: Trained) -> tuple[Path, str] | None:
    """The folder and findings of the sweep that a run's settings come from: the run is it, lies in
    it, or it is the newest of the same config, beside the run or in `runs/`, on the same data."""
    name = f"{trained.figures['run']}-sweep"
    places = [folder, folder.parent, folder.parent / name, *runs_called(name, "sweep.json")]
    for sweep in dict.fromkeys(places):
        with suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
            findings = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))["findings"]
            files = [sweep / file for file in ("config.toml", "best.toml")]
            config = load_config(next(file for file in files if file.is_file()))
            if all(_same(run.data, trained.config.data) for run in config.members()):
                return sweep, str(findings)
    return None


def _same(data: Data, other: Data) -> bool:
    """Whether two configs have the same files."""
    places = [
        [str(user_path(file).resolve()) for file in (d.dir, d.train) if file is not None]
        for d in (data, other)
    ]
    return data.name == other.name and places[0] == places[1]
