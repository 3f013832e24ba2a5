"""Figures from records and images. Nothing here knows a network; files are written by `save`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"train": "#4c72b0", "valid": "#dd8452", "test": "#55a868"}
NAMES = {"valid": "validation", "test": "test (no choice depends on it)"}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # seconds to import, so only where a plot is drawn

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def curves(rows: Sequence[dict[str, Any]], title: str, train_label: str = "train") -> "Figure":
    """Accuracy and loss against epochs from rows of history.csv.

    Networks that differ in their seed alone are drawn as thin lines and their mean; networks with
    different settings each in a colour of its own, solid where it validates, else on test data.
    """
    figure = _figure(10, 4.2)
    figure.suptitle(title)
    networks: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in rows:
        networks.setdefault((row["run"], row["seed"]), []).append(row)
    draw = _by_setting if len({run for run, _ in networks}) > 1 else _by_part
    for axes, measure in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        draw(axes, networks, measure, train_label)
        _finish(axes, measure)
    return figure


Networks = dict[tuple[Any, Any], list[dict[str, Any]]]


def _points(network: list[dict[str, Any]], part: str, measure: str) -> list[tuple[int, float]]:
    """(epoch, value) of one network where it was measured; accuracies in %."""
    key, scale = f"{part}_{measure}", 100 if measure == "accuracy" else 1
    return [(row["epoch"], row[key] * scale) for row in network if row[key] is not None]


def _by_part(axes: "Axes", networks: Networks, measure: str, train_label: str) -> None:
    for part, color in COLORS.items():
        lines = [_points(network, part, measure) for network in networks.values()]
        lines = [line for line in lines if line]
        if not lines:
            continue
        for line in lines if len(lines) > 1 else []:
            axes.plot(*zip(*line, strict=True), color=color, alpha=0.3, linewidth=0.8)
        # The mean ends where the first network does: a mean over survivors would jump.
        columns = list(zip(*lines, strict=False))
        mean = [(column[0][0], float(np.mean([v for _, v in column]))) for column in columns]
        label = NAMES.get(part, train_label)
        marker = "o" if len(mean) == 1 else None
        axes.plot(*zip(*mean, strict=True), color=color, linewidth=1.8, label=label, marker=marker)


def _by_setting(axes: "Axes", networks: Networks, measure: str, train_label: str) -> None:
    part = "valid" if any(_points(n, "valid", measure) for n in networks.values()) else "test"
    for number, ((run, seed), network) in enumerate(networks.items()):
        color = f"C{number % 10}"
        for shown, style in (("train", ":"), (part, "-")):
            if line := _points(network, shown, measure):
                x, y = zip(*line, strict=True)
                label = f"{run}, seed {seed}" if shown == part else None
                marker = "o" if len(line) == 1 else None
                axes.plot(x, y, style, color=color, linewidth=1.5, label=label, marker=marker)
    other = NAMES[part] if part == "valid" else "test"
    axes.set_title(f"solid: {other}, dotted: {train_label}", fontsize=9)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    values = values[np.isfinite(values)]
    if measure == "loss" and len(values) and values.max() > 20 * np.median(values):
        axes.set_ylim(0, 5 * float(np.median(values)))  # a network that explodes hides the others


def _finish(axes: "Axes", measure: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy in %" if measure == "accuracy" else "loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if measure == "accuracy":
        _cut_off_the_first_epochs(axes)
    axes.legend(frameon=False, fontsize=8 if len(axes.lines) > 6 else None)


def _cut_off_the_first_epochs(axes: "Axes") -> None:
    """Give the lowest quarter of the values little of the axis: the end is what matters."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    values = values[np.isfinite(values)]
    if len(values) > 8:
        low, middle, high = np.quantile(values, [0.0, 0.25, 1.0])
        if 0 < high - middle < (high - low) / 4:
            axes.set_ylim(max(low, high - 4 * (high - middle)), high + 0.15 * (high - middle))


def confusion(matrix: np.ndarray, class_names: Sequence[str], title: str) -> "Figure":
    """Counts (K, K) of true class (row) against predicted class; colours are shares of the row."""
    classes = len(matrix)
    size = min(max(5.0, 0.55 * classes + 2), 16)
    figure = _figure(size + 0.6, size)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # A root scale shows rare mistakes beside a diagonal of nearly 1.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, shrink=0.8, ticks=np.sqrt([0, 0.01, 0.1, 0.25, 0.5, 1]))
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the true class (root scale)")
    if classes <= 30:
        axes.set_xticks(
            range(classes), class_names, rotation=45 if len(max(class_names, key=len)) > 3 else 0
        )
        axes.set_yticks(range(classes), class_names)
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.4 else "black"
            count = int(matrix[row, column])
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    return figure


def image_grid(
    images: np.ndarray, captions: Sequence[str], title: str, columns: int = 8
) -> "Figure":
    """Images (n, H, W) or (n, C, H, W) under their captions."""
    rows = max(1, -(-len(images) // columns))
    figure = _figure(1.35 * columns, 1.75 * rows + 0.5)
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        if image.ndim == 3:
            image = np.moveaxis(image, 0, -1) if len(image) in (3, 4) else image[0]
        axes.imshow(image, cmap="gray_r")
        axes.set_title(caption, fontsize=8)
    return figure
