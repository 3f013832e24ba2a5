"""Runs as a PDF of at most two pages, and on request the derivation on a page of its own.

Everything is drawn with matplotlib, from run folders; the confusion matrix is measured anew.
"""

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots
from .errors import InputError
from .evaluation import Evaluated, evaluate_weights
from .files import package_version, replacing, writing
from .layers import ChannelsLast, Conv2d, Dropout, Flatten, Layer, Linear, MaxPool2d
from .network import Network, load_weights
from .random_labels import read_networks
from .results import Trained, best_of, by_label, mean_and_std, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, MARGIN = 8.27, 11.69, 0.6  # A4, inches
INSIDE = WIDTH - 2 * MARGIN
LINE = 0.165  # inches, of text of 9 points
LETTERS = 108  # of such text in a line
BOXES = 18  # of an architecture, in rows of six
SHOWN = 6  # runs whose figures and curves have room
GREY, BLUE = "#555555", "#dce6f2"


def report(
    folders: Sequence[Path],
    out: Path | None = None,
    author: str = "",
    notes: Path | None = None,
    derivation: bool = False,
    preface: str = "",
) -> Path:
    """Write `report.pdf`, into the first run's folder unless `out` says where: a page for each of
    one or two finished runs, a run of random labels among them or not.

    `author` is a line beside the title, `notes` a text in Markdown for the last page's end, after
    `preface`, another. `derivation` appends a page with the gradient of softmax regression. Raises
    InputError.
    """
    import matplotlib

    if not 1 <= len(folders) <= 2:
        raise InputError(f"a report has one or two runs on two pages, not {len(folders)}")
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8}):
        pages = _pages(folders, author, notes, preface)
        if derivation:
            pages.append(_derivation())
        path = out or folders[0] / "report.pdf"
        _save(pages, path, folders[0].name, author)
    return path


def _pages(
    folders: Sequence[Path], author: str, notes: Path | None, preface: str = ""
) -> "list[Figure]":
    """A page for each run, and the notes where there is room, else on a page of their own."""
    pages: list[Figure] = []
    end = 0.0
    lines = list(_layout(preface + (_read(notes) if notes else "")))
    height = sum(height for *_, height in lines)
    for folder in folders:
        memorised = (folder / "random-labels.json").is_file()
        kept = height + 0.15 if lines and len(pages) == 1 else 0.0
        page, end = _memorised_page(folder) if memorised else _training_page(folder, kept)
        _header(page, folder.name, author if not pages else "")
        pages.append(page)
    if lines:
        if end + height > HEIGHT - MARGIN:
            if len(pages) == 2:
                room = int((HEIGHT - MARGIN - end) / LINE)
                raise InputError(
                    f"{notes or 'the text'}: about {int(height / LINE)} lines of text do not fit:"
                    f" the second page has room for {max(room, 0)}"
                )
            pages.append(_page())
            _header(pages[-1], f"{folders[0].name}: notes", "")
            end = 1.2
        if end + height > HEIGHT - MARGIN:
            raise InputError(f"{notes or 'the text'}: longer than a page; a report has two")
        for text, style, height in lines:
            if text:
                _text(pages[-1], MARGIN, end, text, **style)
            end += height
    return pages


def _save(pages: "Sequence[Figure]", path: Path, title: str, author: str) -> None:
    from matplotlib.backends.backend_pdf import PdfPages

    for number, page in enumerate(pages, 1):
        footer = f"manualnn {package_version()}: gradients derived by hand, no autograd"
        _text(page, MARGIN, HEIGHT - 0.4, footer, fontsize=7, color=GREY)
        right = f"{number} / {len(pages)}"
        _text(page, WIDTH - MARGIN, HEIGHT - 0.4, right, fontsize=7, color=GREY, ha="right")
    information = {"Title": title, "Creator": "manualnn"} | ({"Author": author} if author else {})
    with (
        writing(f"--out {path}"),
        replacing(path) as temporary,
        PdfPages(temporary, metadata=information) as pdf,
    ):
        for page in pages:
            pdf.savefig(page)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _page() -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, HEIGHT))


def _panel(page: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at inches from the page's upper left corner."""
    bottom = HEIGHT - top - height
    return page.add_axes((left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT))


def _text(page: "Figure", left: float, top: float, text: str, **style: Any) -> None:
    """Text with its upper edge at inches from the page's upper left corner."""
    look: dict[str, Any] = {"va": "top", "fontsize": 9, "parse_math": False} | style
    page.text(left / WIDTH, 1 - top / HEIGHT, text, **look)


def _header(page: "Figure", title: str, author: str) -> None:
    _text(page, MARGIN, 0.5, title, fontsize=17, fontweight="bold")
    _text(page, WIDTH - MARGIN, 0.58, author, fontsize=10, ha="right")
    line = _panel(page, MARGIN, 0.88, INSIDE, 0.01)
    line.axis("off")
    line.axhline(0, color="black", linewidth=1)


def _heading(page: "Figure", top: float, text: str, left: float = MARGIN) -> None:
    _text(page, left, top, text, fontsize=11, fontweight="bold")


def _training_page(folder: Path, kept: float) -> "tuple[Figure, float]":
    """Architecture, settings, results, curves, confusion matrix and mistakes; where it ends.

    At the page's end `kept` inches stay free, in place of the last two if need be.
    """
    networks = read_run(folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    best = best_of(folder, networks)
    page = _page()
    groups = _ranked(networks)
    of = f" of {best.replica.label}" if len(groups) > 1 else ""
    _heading(page, 1.0, f"Architecture{of if len(of) < 70 else ' of the best network'}")
    top = _architecture(page, 1.25, load_weights(folder / "weights.pkl").network)
    _heading(page, top, "Training")
    settings = list(_settings(best, networks, metrics))
    end = _pairs(page, MARGIN, top + 0.28, settings, 1.05, 46)
    _heading(page, top, "Results", MARGIN + 3.95)
    end = max(end, _results(page, MARGIN + 3.95, top + 0.28, networks, groups))
    top = max(end + 0.3, 4.3)
    rows = [row for network in networks for row in network.rows]
    names = _short_names(groups)
    drawn = [
        (name, [n.rows for n in g]) for name, (_, g) in zip(names, groups[:SHOWN], strict=True)
    ]
    part = (_measured(networks) or ["train"])[-1]
    dropout = any(layer[0] == "dropout" for layer in best.config.model.layers)
    for measure, left in (("accuracy", MARGIN + 0.45), ("loss", MARGIN + 4.1)):
        axes = _panel(page, left, top, 2.95, 2.05)
        if len(groups) == 1:
            plots.draw_curves(axes, rows, measure, "train (with dropout)" if dropout else "train")
            continue
        plots.draw_comparison(axes, drawn, measure, "epoch", part)
        axes.legend(frameon=False, fontsize=6.5)
    top += 2.5
    room = HEIGHT - MARGIN - kept - top
    if room < 2:
        return page, top
    _evaluation(page, top, evaluate_weights(folder, split=part), room)
    return page, top + room


def _architecture(page: "Figure", top: float, network: Network) -> float:
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
    axes = _panel(page, MARGIN, top, INSIDE, rows * (height + gap))
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


def _settings(
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


def _pairs(
    page: "Figure", left: float, top: float, pairs: Sequence[tuple[str, str]], key: float, wide: int
) -> float:
    """Names and values below each other; where they end."""
    for name, value in pairs:
        _text(page, left, top, name, fontsize=8, color=GREY)
        for line in textwrap.wrap(value, wide) or [""]:
            _text(page, left + key, top, line, fontsize=8)
            top += 0.155
        top += 0.02
    return top


def _measured(networks: Sequence[Trained]) -> list[str]:
    first = networks[0].figures
    return [part for part in ("train", "valid", "test") if first[f"{part}_accuracy"] is not None]


def _ranked(networks: Sequence[Trained]) -> list[tuple[str, list[Trained]]]:
    """The networks that differ in their seed alone, under their label, the best first."""
    by = (_measured(networks) or ["train"])[-1]
    return sorted(by_label(networks).items(), key=lambda item: -_value(item[1], by))


def _short_names(groups: Sequence[tuple[str, list[Trained]]]) -> list[str]:
    """What the runs shown are called in legends: their labels, or where these are long numbers."""
    labels = [label for label, _ in groups[:SHOWN]]
    long = max(map(len, labels)) > 24
    return [f"run {i}" for i in range(1, len(labels) + 1)] if long else labels


def _results(
    page: "Figure",
    left: float,
    top: float,
    networks: Sequence[Trained],
    groups: Sequence[tuple[str, list[Trained]]],
) -> float:
    """Final figures, means over seeds, as a table; where it ends."""
    measured = _measured(networks)
    names = {"train": "training", "valid": "validation", "test": "test"}
    places = [left + 1.0 + 0.78 * i for i in range(len(measured))]
    for place, part in zip(places, measured, strict=True):
        _text(page, place, top, names[part], fontsize=8, color=GREY)
    top += 0.18
    lines: list[tuple[str, list[str]]] = []
    if len(groups) == 1:
        [(_, group)] = groups
        lines += [
            ("accuracy in %", [_mean(group, f"{p}_accuracy", 100) for p in measured]),
            ("loss", [_mean(group, f"{p}_loss", 1) for p in measured]),
        ]
    else:
        for name, (label, group) in zip(_short_names(groups), groups[:SHOWN], strict=True):
            cells = [_mean(group, f"{p}_accuracy", 100) for p in measured]
            lines.append((label if name == label else f"{name}: {label}", cells))
        if len(groups) > SHOWN:
            lines.append((f"and {len(groups) - SHOWN} more", []))
    for name, cells in lines:
        for line in textwrap.wrap(name, 50)[:2] if len(name) > 14 else [name]:
            _text(page, left, top, line, fontsize=8, color=GREY if len(groups) == 1 else "black")
            top += 0.155 if len(name) > 14 and cells else 0
        for place, cell in zip(places, cells, strict=False):
            _text(page, place, top, cell, fontsize=8)
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
        _text(page, left, top + 0.06, line, fontsize=8)
        top += 0.155
    return top


def _value(group: Sequence[Trained], part: str) -> float:
    alive = [n.figures[f"{part}_accuracy"] for n in group if not n.figures["diverged"]]
    mean, _ = mean_and_std(alive)
    return -1.0 if mean is None else mean


def _mean(group: Sequence[Trained], key: str, scale: float) -> str:
    alive = [n.figures[key] for n in group if not n.figures["diverged"]]
    mean, std = mean_and_std([value * scale for value in alive if value is not None])
    if mean is None:
        return "-" if alive else "diverged"
    digits = 2 if scale == 100 else 4
    return f"{mean:.{digits}f}" + ("" if std is None else f"\u00b1{std:.{digits}f}")


def _evaluation(page: "Figure", top: float, evaluated: Evaluated, height: float) -> None:
    """The confusion matrix, and the most confident mistakes where there are images."""
    judged, names = evaluated.evaluation, evaluated.class_names
    share = f"{100 * judged.accuracy:.2f} %"
    _heading(page, top, "Confusion matrix")
    _text(page, MARGIN + 1.6, top + 0.025, f"{evaluated.data}: {share}", fontsize=8)
    wrong = (judged.predictions != judged.targets).nonzero().flatten()
    images = evaluated.images.dim() == 4 and len(wrong)
    side = min(height - 0.85, 2.9)
    axes = _panel(page, MARGIN + 0.75, top + 0.3, side, side)
    plots.draw_confusion(axes, judged.confusion.numpy(), names, 5)
    axes.tick_params(labelsize=6)
    axes.xaxis.label.set_fontsize(7)
    axes.yaxis.label.set_fontsize(7)
    left = MARGIN + 4.15
    if not images:
        return
    _heading(page, top, "Most confident mistakes", left)
    columns, size, across, down = 4, 0.55, 0.2, 0.22
    rows = min(int((side + 0.4) / (size + down)), 5)
    order = judged.confidences[wrong].argsort(descending=True, stable=True)
    for i, index in enumerate(wrong[order][: rows * columns].tolist()):
        axes = _panel(
            page,
            left + (i % columns) * (size + across),
            top + 0.45 + (i // columns) * (size + down),
            size,
            size,
        )
        axes.axis("off")
        plots.draw_image(axes, evaluated.images[index].numpy())
        true, found = (names[int(t[index])] for t in (judged.targets, judged.predictions))
        title = plots.literal(f"{true[:8]} \u2192 {found[:8]}")
        axes.set_title(title, fontsize=5, pad=2)


def _memorised_page(folder: Path) -> "tuple[Figure, float]":
    """Losses on random labels and on the test set, and why they are so; where it ends."""
    result = json.loads((folder / "random-labels.json").read_text(encoding="utf-8"))
    networks = read_networks(folder)
    value = result["guess_loss"]
    guess = None if value is None else (f"{result['guess']} = {value:.4f}", value)
    page = _page()
    inside = sorted(folder.glob("samples-*")) or [folder]
    trained = read_run(inside[0])[0]
    _heading(page, 1.0, "Random labels: setting")
    metrics = json.loads((inside[0] / "metrics.json").read_text(encoding="utf-8"))
    counts = sorted({network["samples"] for network in networks})
    pairs = [
        ("samples", " / ".join(map(str, counts)) + ", the first of the training set, in order"),
        ("labels", f"drawn at random, corruption {_list(n['corruption'] for n in networks)}"),
    ]
    pairs += [p for p in _settings(trained, [t for f in inside for t in read_run(f)], metrics)
              if p[0] != "data"]  # fmt: skip
    top = _pairs(page, MARGIN, 1.28, pairs, 1.15, 95) + 0.2
    _heading(page, top, "Losses")
    panels = [_panel(page, left, top + 0.45, 2.95, 2.5) for left in (MARGIN + 0.45, MARGIN + 4.1)]
    plots.draw_memorisation(panels, networks, guess)
    top += 3.5
    lines = [
        f"Training loss after the last update: {_loss(result['train_loss'])}, accuracy"
        f" {_share(result['train_accuracy'])}.",
        f"Test loss after the last update: {_loss(result['test_loss'])}; mean over the epochs:"
        f" {_loss(result['mean_test_loss'])}; accuracy {_share(result['test_accuracy'])}.",
    ]
    if guess:
        lines.append(f"A uniform guess has the loss {guess[0]}.")
    if len(networks) > 1:
        lines[0] = f"Means over {len(networks)} networks. {lines[0]}"
    _heading(page, top, "Results")
    top += 0.28
    for paragraph in [" ".join(lines), result["explanation"]]:
        for line in textwrap.wrap(paragraph, LETTERS):
            _text(page, MARGIN, top, line)
            top += LINE
        top += 0.1
    return page, top + 0.1


def _list(values: Iterator[float]) -> str:
    return " / ".join(f"{value:g}" for value in sorted(set(values)))


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}" if value >= 1e-3 else f"{value:.2e}"


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


def _layout(text: str) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Lines of a text in Markdown, each with its style and height: headings, lists, paragraphs."""
    paragraph: list[str] = []

    def flush() -> Iterator[tuple[str, dict[str, Any], float]]:
        if paragraph:
            indent = "   " if paragraph[0].startswith("\u2022") else ""
            for line in textwrap.wrap(" ".join(paragraph), LETTERS, subsequent_indent=indent):
                yield _plain(line), {}, LINE
            paragraph.clear()

    for line in text.splitlines():
        plain = line.strip()
        if plain.startswith("#"):
            yield from flush()
            yield _plain(plain.lstrip("# ")), {"fontsize": 11, "fontweight": "bold"}, 0.26
        elif plain.startswith(("- ", "* ")):
            yield from flush()
            paragraph.append(f"\u2022 {plain[2:]}")
        elif plain:
            paragraph.append(plain)
        else:
            yield from flush()
            yield "", {}, 0.09
    yield from flush()


def _plain(text: str) -> str:
    """Without marks of emphasis."""
    return text.replace("**", "").replace("`", "")


def _derivation() -> "Figure":
    """The gradient of softmax regression, step by step, in the letters of the code."""
    page = _page()
    _header(page, "The gradient of softmax regression", "")
    top = 1.1
    text = re.sub(r"<(.+?)/(.+?)>", r"\\dfrac{\\partial \1}{\\partial \2}", DERIVATION)
    text = text.replace("\n  ", " ")
    for line in text.strip().splitlines():
        if line.startswith("#"):
            _heading(page, top + 0.1, line[2:])
            top += 0.4
        elif line.startswith(("$z", r"$\dfrac{\partial")):
            _text(page, MARGIN + 0.25, top + 0.08, line, fontsize=10.5, parse_math=True)
            top += 0.68
        else:
            _text(page, MARGIN, top, line, fontsize=9.5, parse_math=True)
            top += 0.2 if line else 0.08
    return page


# Headings begin with #, formulas with $, continued lines with two spaces; <L/z> is the partial
# derivative.
DERIVATION = r"""
An example $x$ of $D$ numbers has the class $t$ among $K$; $T_k$ is 1 for $k = t$ and else 0.
The layer's logits, the probabilities and the loss are
$z_k = \sum_j x_j\, w_{jk} + b_k \qquad y_k = \dfrac{e^{z_k}}{S},
  \; S = \sum_m e^{z_m} \qquad L = -\sum_k T_k \log y_k$
# 1. The Jacobian of softmax
The quotient rule gives, for $k = i$ and for $k \neq i$,
$<y_i/z_i> = \dfrac{e^{z_i} S - e^{z_i} e^{z_i}}{S^2} = y_i\, (1 - y_i)
  \qquad <y_k/z_i> = \dfrac{0 - e^{z_k} e^{z_i}}{S^2} = -\,y_k\, y_i$
and in one formula, with the Kronecker delta,
$<y_k/z_i> = y_k\, (\delta_{ik} - y_i)$
# 2. The loss with respect to the logits
$<L/z_i> = -\sum_k \dfrac{T_k}{y_k}\, <y_k/z_i> = -\sum_k T_k\, (\delta_{ik} - y_i)
  = -T_i + y_i \sum_k T_k = y_i - T_i$
because exactly one of the $T_k$ is 1. The division by $y_k$ has cancelled, so nothing overflows
where $y_k$ is tiny.
# 3. The loss with respect to weights and biases
Of all logits only $z_k$ depends on $w_{jk}$ and on $b_k$, with the derivatives $x_j$ and 1, so by
the chain rule
$<L/w_{jk}> = <L/z_k>\, <z_k/w_{jk}> = (y_k - T_k)\, x_j \qquad <L/b_k> = y_k - T_k$
# 4. A batch
For $B$ examples, the rows of $X$ ($B \times D$), with $Y$ and $T$ ($B \times K$) and the mean loss:
$<L/Z> = \dfrac{1}{B}\,(Y - T) \qquad <L/W> = X^\top <L/Z> \qquad <L/b> = \sum_{n=1}^{B} <L/Z>_n$
The penalty $\lambda\,|W|^2 / 2$ adds $\lambda\, W$ to the gradient, and $\mu\,|W|_1$ adds
$\,\mu\, \mathrm{sign}(W)$; biases are exempt.
# 5. In the code
losses.py, cross_entropy: the logits' gradient, (Y - T) / B, from logits shifted by their maximum.
layers.py, Linear.backward: dW = x^T dy, db = sum of dy over the batch, dx = dy W^T.
optimizers.py, Penalty.add: the gradient += l2 * weight + l1 * sign(weight).
"""
