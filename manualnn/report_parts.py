"""The parts of a report's pages: a network's layers, settings, results, mistakes; losses on random
labels.
"""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import markdown, plots
from .evaluation import Evaluated
from .layers import ChannelsLast, Conv2d, Dropout, Flatten, Layer, Linear, MaxPool2d
from .network import Network
from .pages import GREY, INSIDE, MARGIN, TOP, draw_text, heading, panel, stack
from .random_labels import read_networks
from .results import Trained, by_label, mean_and_std, rank, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOXES = 18  # of an architecture, in rows of six
SHOWN = 6  # runs whose figures and curves have room
BLUE = "#dce6f2"


def small(axes: Any) -> None:
    axes.tick_params(labelsize=6.5)
    axes.xaxis.label.set_fontsize(7)
    axes.yaxis.label.set_fontsize(7)
    axes.title.set_fontsize(7.5)


def turn_names(axes: Any, names: Sequence[str], degrees: int) -> float:
    """Turn the names below a confusion matrix where they are long; what inches that takes."""
    longest = max(map(len, names))
    if longest <= 3 or len(names) > 30:
        return 0.0
    where = "center" if degrees == 90 else "right"
    for text in axes.get_xticklabels():
        text.set(rotation=degrees, ha=where, va="top" if degrees == 90 else "center")
        text.set_rotation_mode("default" if degrees == 90 else "anchor")
    return 0.055 * longest * (1 if degrees == 90 else 0.7)


def architecture(page: "Figure", top: float, network: Network) -> float:
    """A box for each layer with parameters and what follows it; where the drawing ends."""
    from matplotlib.patches import FancyBboxPatch

    boxes: list[list[str]] = [["Input", _shape(network.shape), ""]]
    count = 0
    layers = [layer for layer in network.described if not isinstance(layer, ChannelsLast)]
    for layer, row in zip(layers, network.summary(), strict=True):
        if isinstance(layer, Flatten):
            continue
        if row["parameters"] or len(boxes) == 1:
            boxes.append([])
            count = 0
        count += row["parameters"]
        lines = boxes[-1][:-2] if boxes[-1] else []
        size = f"{count:,} parameters" if count else ""
        boxes[-1] = [*lines, *_name(layer), _shape(row["output_shape"]), size]
    if left_out := max(0, len(boxes) - BOXES):
        boxes[BOXES - 2 : -1] = [["...", f"{left_out + 1} more", ""]]
    per_row = min(len(boxes), 6)
    rows = -(-len(boxes) // per_row)
    height = 0.16 * max(map(len, boxes)) + 0.16
    gap = 0.22
    width = (INSIDE - gap * (per_row - 1)) / per_row
    axes = panel(page, MARGIN, top, INSIDE, rows * (height + gap))
    axes.set_xlim(0, INSIDE)
    axes.set_ylim(rows * (height + gap), 0)
    axes.axis("off")
    for i, lines in enumerate(boxes):
        left, upper = (i % per_row) * (width + gap), (i // per_row) * (height + gap)
        box = FancyBboxPatch(
            (left + 0.05, upper + 0.05), width - 0.1, height - 0.1,
            boxstyle="round,pad=0.05", facecolor="white" if i == 0 else BLUE, edgecolor="#44546a",
            clip_on=False,
        )  # fmt: skip
        axes.add_patch(box)
        for j, line in enumerate(lines):
            weight = "bold" if i and j < len(lines) - 2 else "normal"
            axes.text(
                left + width / 2, upper + 0.16 * (j + 1), line,
                ha="center", va="center", fontsize=7.5, fontweight=weight,
                color="black" if j < len(lines) - 2 or not i else GREY,
            )  # fmt: skip
        if i and i % per_row:
            middle = upper + height / 2
            axes.annotate("", (left, middle), (left - gap, middle), arrowprops={"arrowstyle": "->"})
    return top + rows * (height + gap) + 0.1


def _name(layer: Layer) -> list[str]:
    if isinstance(layer, Linear):
        return [f"Linear {layer.units}"]
    if isinstance(layer, Conv2d):
        changed = [
            f"{name} {_times(value)}"
            for name, value, usual in (("stride", layer.stride, 1), ("padding", layer.padding, 0))
            if value != (usual, usual)
        ]
        return [f"Conv {_times(layer.kernel)}, {layer.channels}", *changed]
    if isinstance(layer, MaxPool2d):
        return [f"Max-pool {_times(layer.kernel)}"]
    if isinstance(layer, Dropout):
        return [f"Dropout {layer.p:g}"]
    return [type(layer).__name__]


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}\u00d7{pair[1]}"


def _shape(shape: Sequence[int]) -> str:
    return "\u00d7".join(map(str, shape))


def settings(
    best: Trained, networks: Sequence[Trained], metrics: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """What was trained and how, of the best network; the others' names say what they change."""
    data, model, train = best.config.data, best.config.model, best.config.train
    replica, optimizer, schedule = best.replica, train.optimizer, train.schedule
    held_out = f"{data.valid:.0%}" if isinstance(data.valid, float) else f"{data.valid:,}"
    yield (
        "data",
        (
            f"{data.title}, {best.figures['train_samples']:,} training samples"
            + (f", {held_out} for validation" if data.valid else "")
            + (", stratified" if data.stratify and data.valid else "")
        ),
    )
    known = {"standard": "one mean and deviation", "feature": "per feature", "unit": "x / 255"}
    fitted = ", of the training part" if data.normalize in ("standard", "feature") else ""
    yield "inputs", known.get(data.normalize, "as they are") + fitted
    if data.augment:
        yield "augmentation", ", ".join(data.augment)
    loss = train.loss.replace("_", " ")
    smoothed = f", label smoothing {train.label_smoothing:g}" if train.label_smoothing else ""
    yield "loss", loss + smoothed
    momentum = f", momentum {replica.momentum:g}" if replica.momentum else ""
    nesterov = " (Nesterov)" if momentum and optimizer.nesterov else ""
    adam = f", betas {optimizer.beta1:g}, {optimizer.beta2:g}"
    yield (
        "optimizer",
        (
            f"{optimizer.name.upper() if optimizer.name == 'sgd' else optimizer.name.capitalize()},"
            f" learning rate {replica.learning_rate:g}"
            + (momentum + nesterov if optimizer.name == "sgd" else adam)
        ),
    )
    warm = f", {schedule.warmup_steps} warm-up steps" if schedule.warmup_steps else ""
    yield "schedule", schedule.name.replace("_", " ") + warm
    penalties = [
        f"{n} {getattr(replica, n.lower()):g}" for n in ("L2", "L1") if getattr(replica, n.lower())
    ]
    yield "penalties", ", ".join(penalties) or "none"
    yield "batches", f"of {train.batch_size}, {train.epochs} epochs"
    if train.early_stopping.patience:
        early = train.early_stopping
        yield "early stopping", f"{early.monitor}, patience {early.patience}"
    yield (
        "initial weights",
        {"he": "He et al. 2015", "xavier": "Glorot and Bengio 2010"}[model.init],
    )
    seeds = sorted({network.replica.seed for network in networks})
    yield "seeds", ", ".join(map(str, seeds)) if len(seeds) < 12 else f"{len(seeds)} of them"
    threads = f", {metrics['threads']} thread(s)" if metrics["device"] == "cpu" else ""
    yield "time", f"{metrics['seconds']:.3g} s of training on {metrics['device']}{threads}"


def pairs(
    page: "Figure", left: float, top: float, pairs: Sequence[tuple[str, str]], key: float, wide: int
) -> float:
    """Names and values below each other; where they end."""
    for name, value in pairs:
        draw_text(page, left, top, name, fontsize=8, color=GREY)
        for line in textwrap.wrap(value, wide) or [""]:
            draw_text(page, left + key, top, line, fontsize=8)
            top += 0.155
        top += 0.02
    return top


def measured(networks: Sequence[Trained]) -> list[str]:
    first = networks[0].figures
    return [part for part in ("train", "valid", "test") if first[f"{part}_accuracy"] is not None]


def ranked(networks: Sequence[Trained]) -> list[tuple[str, list[Trained]]]:
    """The networks that differ in their seed alone, under their label, the best first: by the
    rule of `best_network`, in which the test set has no part."""

    def order(item: tuple[str, list[Trained]]) -> tuple[bool, bool, float, float]:
        alive = [n.figures for n in item[1] if not n.figures["diverged"]]
        return not alive, *rank(alive)

    return sorted(by_label(networks).items(), key=order)


def short_names(groups: Sequence[tuple[str, list[Trained]]]) -> list[str]:
    """What the runs shown are called in legends: their labels, or where these are long numbers."""
    labels = [label for label, _ in groups[:SHOWN]]
    long = max(map(len, labels)) > 24
    return [f"run {i}" for i in range(1, len(labels) + 1)] if long else labels


def results(
    page: "Figure",
    left: float,
    top: float,
    networks: Sequence[Trained],
    groups: Sequence[tuple[str, list[Trained]]],
) -> float:
    """Final figures, means over seeds, as a table; where it ends."""
    shown = measured(networks)
    names = {"train": "training", "valid": "validation", "test": "test"}
    places = [left + 1.0 + 0.78 * i for i in range(len(shown))]
    for place, part in zip(places, shown, strict=True):
        draw_text(page, place, top, names[part], fontsize=8, color=GREY)
    top += 0.18
    lines: list[tuple[str, list[str]]] = []
    if len(groups) == 1:
        [(_, group)] = groups
        lines += [
            ("accuracy in %", [_mean(group, f"{p}_accuracy", 100) for p in shown]),
            ("loss", [_mean(group, f"{p}_loss", 1) for p in shown]),
        ]
    else:
        for name, (label, group) in zip(short_names(groups), groups[:SHOWN], strict=True):
            cells = [_mean(group, f"{p}_accuracy", 100) for p in shown]
            lines.append((label if name == label else f"{name}: {label}", cells))
        if len(groups) > SHOWN:
            lines.append((f"and {len(groups) - SHOWN} more", []))
    for name, cells in lines:
        for line in textwrap.wrap(name, 50)[:2] if len(name) > 14 else [name]:
            draw_text(
                page, left, top, line, fontsize=8, color=GREY if len(groups) == 1 else "black"
            )
            top += 0.155 if len(name) > 14 and cells else 0
        for place, cell in zip(places, cells, strict=False):
            draw_text(page, place, top, cell, fontsize=8)
        top += 0.175
    seeds = {len(group) for _, group in groups}
    note = []
    if max(seeds) > 1:
        note.append(f"Mean and standard deviation, n = {max(seeds)} seeds.")
    if lost := sum(network.figures["diverged"] for network in networks):
        note.append(f"{lost} of {len(networks)} diverged and do not count.")
    counts = sorted({network.figures["parameters"] for network in networks})
    note.append(f"{' / '.join(f'{count:,}' for count in counts)} parameters.")
    if len(networks) == 1 and networks[0].figures["ended"]:
        note.append(f"{networks[0].figures['ended'].capitalize()}.")
    for line in textwrap.wrap(" ".join(note), 48):
        draw_text(page, left, top + 0.06, line, fontsize=8)
        top += 0.155
    return top


def _mean(group: Sequence[Trained], key: str, scale: float) -> str:
    alive = [n.figures[key] for n in group if not n.figures["diverged"]]
    mean, std = mean_and_std([value * scale for value in alive if value is not None])
    if mean is None:
        return "-" if alive else "diverged"
    digits = 2 if scale == 100 else 4
    return f"{mean:.{digits}f}" + ("" if std is None else f"\u00b1{std:.{digits}f}")


def evaluation(
    page: "Figure", top: float, evaluated: Evaluated, names: Sequence[str], height: float
) -> None:
    """The confusion matrix, and the most confident mistakes where there are images."""
    judged = evaluated.evaluation
    heading(page, top, "Confusion matrix")
    accuracy = f"{evaluated.data}: {share(judged.accuracy, 2)}"
    draw_text(page, MARGIN + 1.6, top + 0.025, accuracy, fontsize=8)
    wrong = (judged.predictions != judged.targets).nonzero().flatten()
    below = 0.55 + (0.04 * max(map(len, names)) if max(map(len, names)) > 3 else 0.0)
    side = min(height - 0.35 - below, 2.9)
    axes = panel(page, MARGIN + 0.8, top + 0.35, side, side)
    plots.draw_confusion(axes, judged.confusion.numpy(), names, 6)
    small(axes)
    turn_names(axes, names, 45)
    if evaluated.images.dim() != 4 or not len(wrong):
        return
    left = MARGIN + 4.15
    heading(page, top, "Most confident mistakes", left)
    draw_text(page, left, top + 0.2, "true class as predicted class", fontsize=7)
    columns, size, across, down = 4, 0.55, 0.2, 0.36
    rows = min(int((height - 0.5) / (size + down)), 4)
    order = judged.confidences[wrong].argsort(descending=True, stable=True)
    for i, index in enumerate(wrong[order][: rows * columns].tolist()):
        x = left + (i % columns) * (size + across)
        y = top + 0.42 + (i // columns) * (size + down)
        for line, label in enumerate((judged.targets[index], judged.predictions[index])):
            called = f"{'as ' * line}{names[int(label)]}"[:14]
            draw_text(page, x, y + 0.11 * line, called, fontsize=6.5)
        axes = panel(page, x, y + 0.25, size, size)
        axes.axis("off")
        plots.draw_image(axes, evaluated.images[index].numpy())


def memorised(page: "Figure", folder: Path, height: float) -> float:
    """Losses on random labels and on the test set, in panels of that height, and why they are so;
    where it ends."""
    result = json.loads((folder / "random-labels.json").read_text(encoding="utf-8"))
    networks = read_networks(folder)
    value = result["guess_loss"]
    guess = None if value is None else (f"{result['guess']} = {value:.4f}", value)
    inside = sorted(folder.glob("samples-*")) or [folder]
    trained = read_run(inside[0])[0]
    heading(page, TOP, "Random labels: setting")
    metrics = json.loads((inside[0] / "metrics.json").read_text(encoding="utf-8"))
    counts = sorted({network["samples"] for network in networks})
    rows = [
        ("samples", " / ".join(map(str, counts)) + ", the first of the training set, in order"),
        ("labels", f"drawn at random, corruption {_list(n['corruption'] for n in networks)}"),
    ]
    rows += [p for p in settings(trained, [t for f in inside for t in read_run(f)], metrics)
              if p[0] != "data"]  # fmt: skip
    half = -(-len(rows) // 2)
    ends = [
        pairs(page, left, TOP + 0.28, some, 1.0, 42)
        for left, some in ((MARGIN, rows[:half]), (MARGIN + INSIDE / 2, rows[half:]))
    ]
    top = max(ends) + 0.1
    heading(page, top, "Losses")
    panels = [panel(page, x, top + 0.5, 2.95, height) for x in (MARGIN + 0.45, MARGIN + 4.1)]
    plots.draw_memorisation(panels, networks, guess)
    top += height + 1.0
    lines = [
        f"Training loss after the last update: {_loss(result['train_loss'])}, accuracy"
        f" {share(result['train_accuracy'])}.",
        f"Test loss after the last update: {_loss(result['test_loss'])}; mean over the epochs:"
        f" {_loss(result['mean_test_loss'])}; accuracy {share(result['test_accuracy'])}.",
    ]
    if guess:
        lines.append(f"A uniform guess has the loss {guess[0]}.")
    if len(networks) > 1:
        lines[0] = f"Means over {len(networks)} networks. {lines[0]}"
    heading(page, top, "Results")
    top = stack(page, top + 0.28, markdown.plain(" ".join(lines))) + 0.1
    return stack(page, top, markdown.plain(result["explanation"])) + 0.1


def _list(values: Iterator[float]) -> str:
    return " / ".join(f"{value:g}" for value in sorted(set(values)))


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}" if value >= 1e-3 else f"{value:.2e}"


def share(value: float | None, digits: int = 1) -> str:
    return "not measured" if value is None else f"{100 * value:.{digits}f} %"
