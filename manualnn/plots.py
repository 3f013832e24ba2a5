"""Figures from records and images. Nothing here knows a network; files are written by `save`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

COLORS = {"train": "#4c72b0", "valid": "#dd8452", "test": "#55a868"}
NAMES = {"valid": "validation", "test": "test (no choice depends on it)"}


def _figure(width: float, height: float, title: str = "", size: int | None = None) -> "Figure":
    from matplotlib.figure import Figure  # seconds to import, so only where a plot is drawn

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(literal(title), fontsize=size)
    return figure


def literal(text: str) -> str:
    """A user's text as it is: a dollar sign starts no formula, and what is not UTF-8 is escaped."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def save(figure: "Figure", path: Path | str) -> None:
    """Write a figure as PNG."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def curves(rows: Sequence[dict[str, Any]], title: str, train_label: str = "train") -> "Figure":
    """Accuracy and loss against epochs from rows of history.csv.

    Networks that differ in their seed alone are drawn as thin lines and their mean; networks with
    different settings each in a colour of its own, solid where it validates, else on test data.
    """
    figure = _figure(10, 4.2, title)
    for axes, measure in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        draw_curves(axes, rows, measure, train_label)
    return figure


def draw_curves(
    axes: "Axes", rows: Sequence[dict[str, Any]], measure: str, train_label: str = "train"
) -> None:
    """One panel of `curves`: "accuracy" or "loss" against epochs."""
    networks: Networks = {}
    for row in rows:
        networks.setdefault((row["run"], row["seed"]), []).append(row)
    draw = _by_setting if len({run for run, _ in networks}) > 1 else _by_part
    draw(axes, networks, measure, train_label)
    _finish(axes, measure)
    _say_what_is_cut(axes)


def _short(label: str) -> str:
    """A label that leaves a legend room."""
    return literal(label if len(label) <= 48 else f"{label[:45]}...")


Networks = dict[tuple[Any, Any], list[dict[str, Any]]]


def _points(
    network: Sequence[dict[str, Any]], part: str, measure: str, along: str = "epoch"
) -> list[tuple[int, float]]:
    """(epoch, value) of one network where it was measured; accuracies in %."""
    key, scale = f"{part}_{measure}", 100 if measure == "accuracy" else 1
    return [(row[along], row[key] * scale) for row in network if row[key] is not None]


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
        label = NAMES.get(part, f"{train_label}, average over the epoch")
        marker = "o" if len(mean) == 1 else None
        axes.plot(*zip(*mean, strict=True), color=color, linewidth=1.8, label=label, marker=marker)


BEST = 8  # networks with different settings in colours of their own


def _by_setting(axes: "Axes", networks: Networks, measure: str, train_label: str) -> None:
    """Each network in a colour of its own; of more than there are colours the best on validation
    data (without any, the first), and the others in grey behind them."""
    seeds = len({seed for _, seed in networks}) > 1
    part = "valid" if any(_points(n, "valid", measure) for n in networks.values()) else "test"
    last = max(row["epoch"] for network in networks.values() for row in network)
    runs = list(dict.fromkeys(run for run, _ in networks))  # the seeds of one share its colour
    chosen = runs
    if len(runs) > 10 and part == "valid":
        of = {run: [n for (r, _), n in networks.items() if r == run] for run in runs}
        chosen = sorted(runs, key=lambda run: _rank(of[run], last))[:BEST]
    elif len(runs) > 10:
        chosen = runs[:BEST]
    places = {run: number for number, run in enumerate(chosen)}
    colored = {key: f"C{places[key[0]]}" for key in networks if key[0] in places}
    colored = dict(sorted(colored.items(), key=lambda item: places[item[0][0]]))
    grey = [key for key in networks if key not in colored]
    for key in (*grey, *colored):
        (run, seed), network = key, networks[key]
        color, width = colored.get(key, "0.8"), 1.5 if key in colored else 0.7
        for shown, style in (("train", ":"), (part, "-")):
            if (key in colored or shown == part) and (line := _points(network, shown, measure)):
                x, y = zip(*line, strict=True)
                name = _short(run)
                label = (f"{name}, seed {seed}" if seeds else name) if shown == part else None
                label = label if key in colored else None
                marker = "o" if len(line) == 1 else None
                axes.plot(x, y, style, color=color, linewidth=width, label=label, marker=marker)
    other = NAMES[part] if part == "valid" else "test"
    which = "best" if part == "valid" else "first"
    rest = f"\nthe {which} {len(chosen)} of {len(runs)}, the others grey" if grey else ""
    said = f"solid: {other}, dotted: {train_label}, averages over the epoch{rest}"
    axes.set_title(said, fontsize=9)
    _cut_off_explosions(axes, measure)


def _rank(group: Sequence[Sequence[dict[str, Any]]], last: int) -> tuple[bool, float, float]:
    """What sorts the better first: trained to the end, the higher accuracy, the lower loss."""
    accuracy = _last_accuracy(group, "valid")
    losses = [points[-1][1] for network in group if (points := _points(network, "valid", "loss"))]
    finite = [loss for loss in losses if np.isfinite(loss)]
    ended = min(network[-1]["epoch"] for network in group) < last
    return ended, -accuracy, float(np.mean(finite)) if finite else float("inf")


def _cut_off_explosions(axes: "Axes", measure: str) -> None:
    """A network that explodes must not hide the others."""
    values = _values(axes.lines)
    if measure != "loss" or not len(values) or values.max() <= 20 * np.median(values):
        return
    top = 5 * float(np.median(values))
    if axes.get_yscale() == "log":
        axes.set_ylim(top=2 * top)
    else:
        axes.set_ylim(0, top)


def _values(lines: "Iterable[Line2D]") -> np.ndarray:
    """The finite values that lines are drawn through."""
    values = [np.asarray(line.get_ydata(), float) for line in lines]
    joined = np.concatenate([*values, np.empty(0)])
    return joined[np.isfinite(joined)]


def _finish(axes: "Axes", measure: str, lines: "Sequence[Line2D] | None" = None) -> None:
    """Name the axes; that of accuracies is made for `lines`, by default all, and then the legend
    names curves that lie outside."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy in %" if measure == "accuracy" else "loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _tick_the_last(axes)
    if measure == "accuracy":
        _fit_accuracies(axes, lines or axes.lines)
    if lines is not None:
        _name_the_unseen(axes, measure)
    _frame(axes, 8 if len(axes.lines) > 6 else None)


def _tick_the_last(axes: "Axes") -> None:
    """Give the last epoch a tick; one that would touch it goes."""
    drawn = [np.asarray(line.get_xdata(), float) for line in axes.lines]
    ends = [float(x.max()) for x in drawn if x.size]
    if not ends:
        return
    last, width = max(ends), np.ptp(axes.get_xlim())
    ticks = [x for x in axes.get_xticks() if 0 <= x < last and last - x > width / 15]
    limits = axes.get_xlim()
    axes.set_xticks([*ticks, last])
    axes.set_xlim(limits)


def _frame(axes: "Axes", size: int | None = 8) -> None:
    """Grid, no lines above and to the right, and a legend with letters of that size where it has
    few enough entries to be read."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if 0 < len(axes.get_legend_handles_labels()[1]) <= 16:
        axes.legend(frameon=False, fontsize=size)


def _fit_accuracies(axes: "Axes", lines: "Sequence[Line2D]") -> None:
    """An axis for `lines`, with little of it for their lowest quarter: the end is what matters."""
    values = _values(lines)
    if len(values) > 8:
        low, middle, high = np.quantile(values, [0.0, 0.25, 1.0])
        if 0 < high - middle < (high - low) / 4:
            low = max(low, high - 4 * (high - middle))
        elif len(lines) == len(axes.lines) or low == high:
            return
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


Runs = Sequence[tuple[str, Sequence[Sequence[dict[str, Any]]]]]


def comparison(runs: Runs, title: str, part: str) -> "Figure":
    """Loss (logarithmic where it spans a decade) and accuracy of each run, its networks' rows of
    history.csv, against epochs and steps: the mean over seeds, solid on `part` (valid or test),
    dotted in training.

    Where a run learned nothing the axis of accuracy is that of the others, and the legend says so.
    """
    figure = _figure(12, 8, title)
    panels = [(measure, along) for measure in ("loss", "accuracy") for along in ("epoch", "step")]
    for axes, (measure, along) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        draw_comparison(axes, runs, measure, along, part)
    return figure


def draw_comparison(axes: "Axes", runs: Runs, measure: str, along: str, part: str) -> None:
    """One panel of `comparison`: "loss" or "accuracy" against each "epoch" or "step"."""
    ends = {label: _last_accuracy(networks, part) for label, networks in runs}
    failed = {label for label, end in ends.items() if end < max(ends.values()) / 2}
    learned: list[Line2D] = []
    for number, (label, networks) in enumerate(runs):
        for shown, style in {"train": ":", part: "-"}.items():
            lines = [line for n in networks if (line := _points(n, shown, measure, along))]
            columns = list(zip(*lines, strict=False))
            if not columns:
                continue
            x = [column[0][0] for column in columns]
            y = np.array([[value for _, value in column] for column in columns])
            color, name = f"C{number % 10}", _short(label) if shown == part else None
            marker = "o" if len(x) == 1 else None
            drawn = axes.plot(x, y.mean(1), style, color=color, label=name, marker=marker)
            learned += drawn if label not in failed else []
            if y.shape[1] < 2 or shown != part:
                continue
            mean, std = y.mean(1), y.std(1, ddof=1)
            if (std <= mean).all():  # the band of a run that explodes would cover the rest
                axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    values = _values(axes.lines)
    if measure == "loss" and len(values) and values.max() > 10 * values.min() > 0:
        axes.set_yscale("log")
    _cut_off_explosions(axes, measure)
    _finish(axes, measure, learned)
    axes.set_xlabel(along if along == "epoch" else "training step")
    solid = NAMES[part] if part == "valid" else part
    said = f"{measure}, solid: {solid}, dotted: train, averages over the epoch"
    axes.set_title(said, fontsize=9)
    _say_what_is_cut(axes)


def _say_what_is_cut(axes: "Axes") -> None:
    """Say so above the axes where a point of a curve lies outside of them."""
    low, high = axes.get_ylim()
    values = _values(axes.lines)
    if len(values) and not (low <= values.min() and values.max() <= high):
        lines = [line for line in (axes.get_title(), "what lies outside is cut off") if line]
        axes.set_title("\n".join(lines), fontsize=9)


def _name_the_unseen(axes: "Axes", measure: str) -> None:
    """Say in the legend which curves lie outside the axes, and what they end with."""
    low, high = axes.get_ylim()
    for line in axes.lines:
        values, label = _values([line]), str(line.get_label())
        if len(values) and not label.startswith("_"):
            end = f"{values[-1]:.1f} %" if measure == "accuracy" else f"{values[-1]:.3g}"
            side = "below" if values.max() < low else "above" if values.min() > high else ""
            line.set_label(f"{label}: {end}, {side}" if side else label)


def _last_accuracy(networks: Sequence[Sequence[dict[str, Any]]], part: str) -> float:
    """The mean of the last measured accuracies, in %; 0 where nothing was measured."""
    lines = [line for n in networks if (line := _points(n, part, "accuracy"))]
    return float(np.mean([line[-1][1] for line in lines])) if lines else 0.0


def memorisation(
    networks: Sequence[dict[str, Any]], title: str, guess: tuple[str, float] | None
) -> "Figure":
    """Loss on the memorised samples and on the test set against epochs, linear and logarithmic.

    Networks have `samples`, `corruption`, `run` and their `rows` of history.csv; those that share
    these differ in their seed: their mean is drawn, in a band of one standard deviation. `guess` is
    the name and value of the loss of giving every label the same probability.
    """
    figure = _figure(11, 4.6, title)
    draw_memorisation(figure.subplots(1, 2), networks, guess)
    return figure


def draw_memorisation(
    panels: "Iterable[Axes]", networks: Sequence[dict[str, Any]], guess: tuple[str, float] | None
) -> None:
    """The two panels of `memorisation`."""
    groups = _by_settings(networks)
    most = max(row["epoch"] for network in networks for row in network["rows"])
    long = most > 4 * min(len(network["rows"]) for network in networks)
    for axes, scale in zip(panels, ("linear", "log"), strict=True):
        for number, (name, group) in enumerate(groups.items()):
            for part, style in (("train", "--"), ("test", "-")):
                color = COLORS[part] if len(groups) == 1 else f"C{number}"
                points = [_points(network["rows"], part, "loss") for network in group]
                if not all(points):
                    continue
                epochs = [epoch for epoch, _ in min(points, key=len)]
                values = np.array([[v for _, v in line[: len(epochs)]] for line in points])
                mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
                what = f"{part}{', mean and std of ' + str(len(group)) if len(group) > 1 else ''}"
                label = what if len(groups) == 1 else _short(name) if part == "test" else None
                axes.plot(epochs, mean, style, color=color, label=label)
                if len(values) > 1:
                    low = np.maximum(mean - std, mean / 10)  # a log axis has no room below 0
                    axes.fill_between(epochs, low, mean + std, color=color, alpha=0.2, linewidth=0)
        if guess:
            axes.axhline(guess[1], color="black", linewidth=0.8, linestyle=":", label=guess[0])
        axes.set_yscale(scale)
        if long:
            axes.set_xscale("log")
        kind = "linear" if scale == "linear" else "logarithmic"
        styles = ", solid: test, dashed: train" if len(groups) > 1 else ""
        axes.set_title(f"loss on a {kind} axis{styles}", fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        if not long:
            _tick_the_last(axes)
        _frame(axes)


def _by_settings(networks: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The networks that differ in their seed alone, under a name that tells them from the rest."""
    keys = ("samples", "run")
    varied = [key for key in keys if len({network[key] for network in networks}) > 1]
    groups: dict[str, list[dict[str, Any]]] = {}
    for network in networks:
        names = {"samples": f"{network['samples']} samples", "run": network["run"]}
        groups.setdefault(", ".join(names[key] for key in varied), []).append(network)
    return groups


def fit_times(networks: Sequence[dict[str, Any]], name: str) -> "Figure":
    """Epochs until all samples are fitted, and test accuracy, against the share of random labels
    and the number of samples: mean and standard deviation over seeds."""
    shown = [
        (x, other, measure)
        for x, other in (("corruption", "samples"), ("samples", "corruption"))
        if len({network[x] for network in networks}) > 1
        for measure in ("epochs_to_fit", "test_accuracy")
    ]
    titles = {"corruption": "fraction of random labels", "samples": "number of samples"}
    labels = {"epochs_to_fit": "epochs until all are fitted", "test_accuracy": "test accuracy in %"}
    figure = _figure(
        10.4, 2.1 * len(shown), f"Memorisation on {name}: mean and standard deviation over seeds"
    )
    grid = figure.subplots(len(shown) // 2, 2, squeeze=False)
    for axes, (x, other, measure) in zip(grid.flat, shown, strict=True):
        most = max(network["epochs"] for network in networks)
        for number, fixed in enumerate(sorted({network[other] for network in networks})):
            group = [network for network in networks if network[other] == fixed]
            places = sorted({network[x] for network in group})
            found = [[n[measure] for n in group if n[x] == place] for place in places]
            scale = 100 if measure == "test_accuracy" else 1
            known = [np.array([v for v in values if v is not None]) * scale for values in found]
            some = [(p, v) for p, v in zip(places, known, strict=True) if len(v)]
            never = [p for p, v in zip(places, found, strict=True) if None in v]
            label = f"{titles[other]} {fixed:g}"
            if some:
                means = [v.mean() for _, v in some]
                stds = [v.std(ddof=1) if len(v) > 1 else 0 for _, v in some]
                axes.errorbar(
                    [p for p, _ in some], means, stds, fmt="o-", capsize=3, color=f"C{number}",
                    label=label,
                )  # fmt: skip
            if never and measure == "epochs_to_fit":
                axes.plot(
                    never, [most] * len(never), "^", color=f"C{number}", fillstyle="none",
                    label=f"{label}: not all within {most} epochs",
                )  # fmt: skip
        if x == "samples":
            axes.set_xscale("log", base=2)
        axes.set_xlabel(titles[x])
        axes.set_ylabel(labels[measure])
        axes.set_ylim(bottom=0)
        _frame(axes)
    return figure


def learning_rates(result: dict[str, Any], name: str) -> "Figure":
    """Loss against learning rate, as `lr_find.find` gives them."""
    figure = _figure(7, 4.4)
    axes = figure.subplots()
    rates = [row["learning_rate"] for row in result["rates"]]
    losses = [np.nan if row["loss"] is None else row["loss"] for row in result["rates"]]
    start, best = result["start_loss"], result["best"]
    axes.plot(rates, losses, "o-", color=COLORS["train"], label="mean of the last quarter")
    axes.axhline(start, color="black", linestyle=":", linewidth=0.8, label="untrained")
    axes.axvline(best, color=COLORS["valid"], label=f"lowest, at {best:.3g}")
    axes.axvspan(*result["good"], color=COLORS["valid"], alpha=0.15, linewidth=0)
    top = 1.3 * start
    above = [x for x, loss in zip(rates, losses, strict=True) if not loss <= top]
    label = "above, or not finite"
    axes.plot(above, [0.98 * top] * len(above), "^", color="#c44e52", label=label if above else "")
    axes.set_ylim(0, top)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(f"{literal(name)}: {len(rates)} networks, {result['steps']} steps each")
    _frame(axes)
    return figure


def weight_grid(weights: np.ndarray, title: str, columns: int = 16) -> "Figure":
    """Weights (n, H, W), (n, C, H, W) or (n, D) into n units, blue below 0 and red above."""
    if weights.ndim == 2:
        weights = weights[:, None, :]
    elif weights.ndim == 4:
        weights = weights.mean(1)
    rows, columns = -(-len(weights) // columns), min(columns, len(weights))
    figure = _figure(0.62 * columns + 1.2, 0.62 * rows + 0.7, title, 10)
    bound = float(np.quantile(np.abs(weights), 0.999)) or 1.0
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image in zip(grid.flat, weights, strict=False):
        shown = axes.imshow(image, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    figure.colorbar(shown, ax=grid, shrink=0.8)
    return figure


def confusion(matrix: np.ndarray, class_names: Sequence[str], title: str) -> "Figure":
    """Counts (K, K) of true class (row) against predicted class; colours are shares of the row."""
    size = min(max(5.0, 0.55 * len(matrix) + 2), 16)
    figure = _figure(size + 0.6, size)
    axes = figure.subplots()
    image = draw_confusion(axes, matrix, class_names)
    bar = figure.colorbar(image, shrink=0.8, ticks=np.sqrt([0, 0.01, 0.1, 0.25, 0.5, 1]))
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the true class (root scale)")
    axes.set_title(literal(title))
    return figure


def draw_confusion(
    axes: "Axes", matrix: np.ndarray, class_names: Sequence[str], size: int = 8
) -> "AxesImage":
    """The panel of `confusion`, with letters of that size."""
    classes = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # A root scale shows rare mistakes beside a diagonal of nearly 1.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    if classes <= 30:
        turn = 45 if len(max(class_names, key=len)) > 3 else 0
        names = [literal(name) for name in class_names]
        axes.set_xticks(range(classes), names, rotation=turn)
        axes.set_yticks(range(classes), names)
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.4 else "black"
            count = str(int(matrix[row, column]))
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return image


def image_grid(
    images: np.ndarray, captions: Sequence[str], title: str, columns: int = 8
) -> "Figure":
    """Images (n, H, W) or (n, C, H, W) under their captions."""
    rows = max(1, -(-len(images) // columns))
    figure = _figure(1.35 * columns, 1.08 * (1.6 * rows - 0.3) + 0.45, title)
    axes = figure.subplots()  # one for all: to lay out one for each would take a second
    axes.axis("off")
    for i, (image, caption) in enumerate(zip(images, captions, strict=False)):
        left, top = 1.25 * (i % columns), -1.6 * (i // columns)
        height, width = (size / max(image.shape[-2:]) for size in image.shape[-2:])
        draw_image(axes, image, (left, left + width, top - height, top))
        axes.text(left + 0.5, top + 0.05, literal(caption), ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(-0.1, 1.25 * columns - 0.15), ylim=(-1.6 * (rows - 1) - 1.05, 0.25))
    return figure


def class_grid(
    rows: Sequence[np.ndarray],
    names: Sequence[str],
    title: str,
    permuted: Sequence[np.ndarray] | None = None,
) -> "Figure":
    """A row of images (n, C, H, W) for each class after its name; each beside its permuted self."""
    each = 1 if permuted is None else 2
    columns = each * max(map(len, rows))
    figure = _figure(1.05 * columns + 1.4, 1.05 * len(rows) + 0.6, title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for i, (line, images, name) in enumerate(zip(grid, rows, names, strict=True)):
        for axes in line:
            axes.axis("off")
        for j, image in enumerate(images):
            draw_image(line[each * j], image)
            if permuted is not None:
                draw_image(line[each * j + 1], permuted[i][j])
        line[0].text(
            -0.15,
            0.5,
            literal(name),
            transform=line[0].transAxes,
            ha="right",
            va="center",
            fontsize=10,
        )
    return figure


def draw_image(
    axes: "Axes", image: np.ndarray, extent: tuple[float, float, float, float] | None = None
) -> None:
    """An image (H, W) or (C, H, W), one channel as black on white, at (left, right, bottom, top) of
    the axes."""
    if image.ndim == 3:
        image = np.moveaxis(image, 0, -1) if len(image) in (3, 4) else image[0]
    axes.imshow(image, cmap="gray_r", extent=extent)


def marginals(factors: Mapping[str, Sequence[dict[str, Any]]], title: str) -> "Figure":
    """For each factor the mean of each of its values, with one standard deviation over the
    combinations, and the best of them: levels with `value` (a word), `mean`, `std` and `best` in
    [0, 1]."""
    columns = 2 if len(factors) == 4 else min(3, len(factors))
    rows = -(-len(factors) // columns)
    figure = _figure(4 * columns, 3.2 * rows + 0.4, title)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(factors) :]:
        axes.axis("off")
    for axes, (name, levels) in zip(grid.flat, factors.items(), strict=False):
        known = [(i, level) for i, level in enumerate(levels) if level["mean"] is not None]
        x = [i for i, _ in known]
        means = [100 * level["mean"] for _, level in known]
        stds = [100 * (level["std"] or 0) for _, level in known]
        # A line would say that there is something between two words.
        style = "-" if all(map(_is_number, (level["value"] for level in levels))) else ""
        axes.errorbar(x, means, stds, marker="o", linestyle=style, capsize=3, label="mean and std")
        axes.plot(x, [100 * level["best"] for _, level in known], "x", color="C1", label="best")
        axes.set_xticks(range(len(levels)), [literal(level["value"]) for level in levels])
        axes.set_xlim(-0.5, len(levels) - 0.5)
        axes.set_xlabel(name)
        _frame(axes)
        if axes is not grid.flat[0]:
            axes.get_legend().remove()
    for line in grid:
        line[0].set_ylabel("validation accuracy in %")
    return figure


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def heat_maps(
    maps: Sequence[tuple[str, str, Sequence[Sequence[float | None]], Sequence[str], Sequence[str]]],
    title: str,
    note: str = "",
) -> "Figure":
    """The mean accuracy of pairs of factors, over the others: (row factor, column factor, cells in
    [0, 1], row values, column values). All maps share one scale of colours, so that a factor that
    changes little looks it. `note` follows the title."""
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = _figure(
        4.2 * columns,
        3.4 * rows + 0.5,
        f"{title}: mean validation accuracy in %, over the other factors{note}",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.axis("off")
    known = [100 * c for _, _, cells, _, _ in maps for line in cells for c in line if c is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    digits = 1 if high - low >= 10 else 2
    for axes, (row, column, cells, row_values, column_values) in zip(grid.flat, maps, strict=False):
        values = np.array([[np.nan if c is None else 100 * c for c in line] for line in cells])
        axes.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
        for (i, j), value in np.ndenumerate(values):
            light = not np.isfinite(value) or value > (low + high) / 2
            text = f"{value:.{digits}f}" if np.isfinite(value) else "-"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="k" if light else "w")
        axes.set_xticks(range(len(column_values)), list(map(literal, column_values)))
        axes.set_yticks(range(len(row_values)), list(map(literal, row_values)))
        axes.set_xlabel(column)
        axes.set_ylabel(row)
    return figure


STATES: dict[str, dict[str, Any]] = {
    "complete": {"marker": "o", "color": "C0"},
    "pruned": {"marker": "o", "color": "0.6", "markerfacecolor": "none"},
    "diverged": {"marker": "x", "color": "0.3"},
}
LEGEND = {"pruned": "pruned, at its accuracy then", "diverged": "diverged, without accuracy"}


def trials(
    rows: Sequence[dict[str, Any]], curves: Mapping[int, Sequence[tuple[int, float]]], title: str
) -> "Figure":
    """The accuracy of each trial with the best so far, and of each epoch: `rows` have `trial`,
    `state` and `valid_accuracy` in [0, 1]; `curves` the epochs and accuracies of each trial."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(10, 4.6, title)
    left, right = figure.subplots(1, 2)
    _by_state(left, rows, "trial")
    done = {r["trial"]: 100 * r["valid_accuracy"] for r in rows if r["state"] == "complete"}
    if done:
        places = range(min(done), max(row["trial"] for row in rows) + 1)
        best = np.maximum.accumulate([done.get(place, 0.0) for place in places])
        left.plot(places, best, color="C1", drawstyle="steps-post", label="best so far")
    left.set_xlabel("trial")
    left.set_ylabel("validation accuracy in %")
    states = {row["trial"]: row["state"] for row in rows}
    top = min((row["rank"], row["trial"]) for row in rows)[1]
    for place, curve in sorted(curves.items(), key=lambda item: item[0] == top):  # the best on top
        if curve:
            epochs, values = zip(*curve, strict=True)
            own = STATES.get(states.get(place, ""), {"color": "0.85"})["color"]
            right.plot(
                epochs, 100 * np.array(values), color="C1" if place == top and done else own,
                linewidth=1.8 if place == top else 0.8,
                marker="o" if len(epochs) == 1 else None, markersize=3,
            )  # fmt: skip
    right.set_xlabel("epoch")
    drawn = {states.get(place) for place, curve in curves.items() if curve}
    colors = {state: style["color"] for state, style in STATES.items() if state in drawn}
    for state, color in (colors | ({"best": "C1"} if done else {})).items():
        right.plot([], [], color=color, label=state)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _frame_below(axes)
    return figure


def _by_state(axes: "Axes", rows: Sequence[dict[str, Any]], name: str) -> None:
    """The accuracy of trials against a column, and those that diverged at the bottom."""
    axes.margins(y=0.1)
    for state, style in STATES.items():
        own = [row for row in rows if row["state"] == state]
        is_known = state != "diverged"
        own = [row for row in own if not is_known or row["valid_accuracy"] is not None]
        if own:
            y = [100 * row["valid_accuracy"] if is_known else 0.03 for row in own]
            place = axes.transData if is_known else axes.get_xaxis_transform()
            axes.plot(
                [row[name] for row in own], y, linestyle="", markersize=5, transform=place,
                label=LEGEND.get(state, state), **style,
            )  # fmt: skip


def _frame_below(axes: "Axes") -> None:
    """`_frame` with the legend under the panel, where no point is."""
    _frame(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16)
        )


def parameters(
    rows: Sequence[dict[str, Any]], ranges: Mapping[str, tuple[float, float, bool]], title: str
) -> "Figure":
    """The accuracy of each complete or pruned trial against each parameter that was drawn from a
    range, and where trials diverged; `ranges` has the ends of each, and whether it is on a log
    scale. `rows` as in `trials`."""
    columns = min(3, len(ranges))
    figure = _figure(max(6, 4 * columns), 3.4 * -(-len(ranges) // columns) + 0.6, title)
    grid = figure.subplots(-(-len(ranges) // columns), columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(ranges) :]:
        axes.axis("off")
    for axes, (name, (low, high, log)) in zip(grid.flat, ranges.items(), strict=False):
        _by_state(axes, rows, name)
        _searched(axes, low, high, log)
        axes.set_xlabel(name)
        _frame(axes)
        if legend := axes.get_legend():
            legend.remove()
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles, frameon=False, fontsize=8, ncols=3,
            loc="outside lower center",
        )  # fmt: skip
    for line in grid:
        line[0].set_ylabel("validation accuracy in %")
    return figure


def _searched(axes: "Axes", low: float, high: float, log: bool) -> None:
    """An axis of all values from `low` to `high`, with few enough ticks to be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    whole = isinstance(low, int) and isinstance(high, int)
    if not log:
        room = 0.04 * (high - low)
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
        return
    room = (high / low) ** 0.04
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    decades = np.log10(high / low)
    if decades > 2.2:  # powers of ten, as matplotlib writes them
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
    else:
        subs = (1.0, 2.0, 5.0) if decades <= 1.2 else (1.0, 3.0)
        few = decades < 0.7
        axes.xaxis.set_major_locator(
            MaxNLocator(4, integer=whole) if few else LogLocator(subs=subs)
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
