"""A sweep: every combination of a grid trained, ranked by validation, and what each factor does.

The networks are one run of many; those that differ in column hyperparameters alone train as one
population. Everything here is read from the finished run's folder.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import config as configs
from . import distributed, plots
from .config import Config, Range, word
from .data import csv_files, load
from .errors import InputError
from .evaluation import predict_file, prediction_lines
from .experiment import Run, to_json
from .files import write_csv, write_text, writing
from .results import Trained, by_label, mean_and_std, rank_of, read_run

MAPPED = 4  # factors whose pairs have a heat map


@dataclass(frozen=True)
class Point:
    """One combination: its value of each factor, and means over its seeds; accuracies in [0, 1].

    `accuracy` is None where every network diverged.
    """

    label: str
    values: dict[str, Any]
    accuracy: float | None
    std: float | None
    loss: float | None
    train_accuracy: float | None
    diverged: int
    rows: list[list[dict[str, Any]]]


def configure(config: Config, name: str) -> Config:
    """The config whose runs are the grid's: measured on validation data, the test set unused.

    Raises InputError without a grid, or without validation data to choose by.
    """
    return replace(check(untested(config).expand()), name=name)


def untested(config: Config) -> Config:
    """The config with the test set left alone."""
    return replace(config, data=replace(config.data, use_test=False))


def check(config: Config) -> Config:
    """The config again, unless one of its runs cannot be part of a sweep."""
    for run in config.members():
        if not run.data.valid:
            raise InputError(f"{config.name}: a sweep chooses by validation data: set data.valid")
        if run.data.use_test:
            raise InputError(f"{config.name}: the test set has no part in a sweep: data.use_test")
        if len({replica.label for replica in run.replicas()}) > 1:
            raise InputError(
                f"{config.name}: a list in the config trains several networks of each combination;"
                " put it into [grid]"
            )
    return config


def summarise(folder: Path | str, config: Config) -> dict[str, Any]:
    """Write `sweep.csv`, `sweep.json`, `sweep.txt`, `marginals.png`, `heatmaps.png` and
    `best-curves.png` into a finished sweep's folder; gives what sweep.json holds.

    `config` is the one with the grid. Raises InputError.
    """
    folder = Path(folder)
    names = config.factors()
    grid = {
        names[key]: list(values) for key, values in config.grid if not isinstance(values, Range)
    }
    points = read_points(folder, config)
    margins = {name: margin(points, name, values) for name, values in grid.items()}
    best = points[0]
    rows = [_row(rank, point) for rank, point in enumerate(points, 1)]
    result = {
        "rows": rows,
        "factors": margins,
        "best": {key: best.values[names[key]] for key, _ in config.grid},
        "findings": findings(points, margins),
    }
    with writing(str(folder)):
        write_csv(folder / "sweep.csv", list(rows[0]), (list(row.values()) for row in rows))
        write_text(folder / "sweep.json", to_json(result))
        text = "\n".join([*table(rows), "", str(result["findings"]), ""])
        write_text(folder / "sweep.txt", text)
        _draw(folder, config, points, margins, grid)
    return result | {"out": str(folder)}


def _draw(
    folder: Path,
    config: Config,
    points: Sequence[Point],
    margins: dict[str, list[dict[str, Any]]],
    grid: dict[str, list[Any]],
) -> None:
    """`marginals.png` and `heatmaps.png` of factors with several values, and `best-curves.png`."""
    title = f"{folder.name}: {len(points)} combinations on {config.data.title}"
    words = {name: list(map(word, values)) for name, values in grid.items()}
    levels = {
        name: [level | {"value": word(level["value"])} for level in margins[name]]
        for name in margins
        if len(grid[name]) > 1
    }
    if levels:
        plots.save(plots.marginals(levels, title), folder / "marginals.png")
    strongest = [name for name in _by_range(margins) if name in levels][:MAPPED]
    maps = [
        (a, b, _cells(points, a, grid[a], b, grid[b]), words[a], words[b])
        for a, b in itertools.combinations(strongest, 2)
    ]
    if maps:
        pairs = len(levels) * (len(levels) - 1) // 2
        note = f"\nthe {len(maps)} pairs of the strongest factors, of {pairs}"
        shown = plots.heat_maps(maps, title, note if pairs > len(maps) else "")
        plots.save(shown, folder / "heatmaps.png")
    joined = [row for network in points[0].rows for row in network]
    plots.save(plots.curves(joined, f"best: {points[0].label}"), folder / "best-curves.png")


def read_points(folder: Path, config: Config) -> list[Point]:
    """The combinations in a finished sweep's folder, the best validation accuracy first."""
    names, runs = config.factors(), config.expand().members()
    networks = by_label(read_run(folder))
    if set(networks) != {run.label for run in runs}:
        raise InputError(f"{folder}: holds another sweep than that of {config.name}")
    points = [
        _point(run.label, {names[k]: value for k, value in point.items()}, networks[run.label])
        for run, point in zip(runs, config.points(), strict=True)
    ]
    trained = list(networks)  # of equals the one that was trained first, as in `best_network`
    return sorted(points, key=lambda point: (order(point), trained.index(point.label)))


def order(point: Point) -> tuple[bool, float, float]:
    """The best first, by the rule of `best_network`; last what diverged."""
    return rank_of(point.accuracy, point.loss)


def _point(label: str, values: dict[str, Any], networks: list[Trained]) -> Point:
    alive = [network for network in networks if not network.figures["diverged"]]
    (accuracy, std), (loss, _), (train_accuracy, _) = (
        mean_and_std([network.figures[key] for network in alive])
        for key in ("valid_accuracy", "valid_loss", "train_accuracy")
    )
    return Point(
        label,
        values,
        accuracy,
        std,
        loss,
        train_accuracy,
        len(networks) - len(alive),
        [network.rows for network in networks],
    )


def _row(rank: int, point: Point) -> dict[str, Any]:
    """A line of sweep.csv."""
    return {
        "rank": rank,
        **point.values,
        "valid_accuracy": point.accuracy,
        "valid_accuracy_std": point.std,
        "valid_loss": point.loss,
        "train_accuracy": point.train_accuracy,
        "n": len(point.rows),
        "diverged": point.diverged,
    }


def margin(points: Sequence[Point], name: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """For each value of a factor the mean, deviation and best over all combinations that have it
    and did not diverge."""
    levels = []
    for value in values:
        having = [point for point in points if point.values[name] == value]
        found = [point.accuracy for point in having if point.accuracy is not None]
        mean, std = mean_and_std(found)
        levels.append(
            {
                "value": value,
                "mean": mean,
                "std": std,
                "best": max(found, default=None),
                "n": len(found),
                "diverged": len(having) - len(found),
            }
        )
    return levels


def _range(levels: Sequence[dict[str, Any]]) -> float:
    """How far the means of a factor's values lie apart."""
    means = [level["mean"] for level in levels if level["mean"] is not None]
    return max(means) - min(means) if means else 0.0


def _by_range(margins: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The factors, the one that matters most first."""
    return sorted(margins, key=lambda name: -_range(margins[name]))


def _cells(
    points: Sequence[Point], a: str, rows: Sequence[Any], b: str, columns: Sequence[Any]
) -> list[list[float | None]]:
    """The mean accuracy of each pair of values of two factors, over the others."""

    def mean(row: Any, column: Any) -> float | None:
        found = [
            point.accuracy
            for point in points
            if (point.values[a], point.values[b]) == (row, column) and point.accuracy is not None
        ]
        return statistics.fmean(found) if found else None

    return [[mean(row, column) for column in columns] for row in rows]


def table(rows: Sequence[dict[str, Any]], most: int = 0) -> list[str]:
    """The ranked combinations for a reader, as lines of one width; the first `most`, 0 for all."""
    factors = list(rows[0])[1 : list(rows[0]).index("valid_accuracy")]
    lines = [["rank", *factors, "validation", "loss", "training"]]
    for row in rows[: most or None]:
        cells = [str(row["rank"]), *(word(row[name]) for name in factors)]
        if row["valid_accuracy"] is None or row.get("state") == "pruned":
            lines.append([*cells, row.get("state", "diverged"), "-", "-"])
            continue
        accuracy = _percent(row["valid_accuracy"], row["valid_accuracy_std"])
        loss = "-" if row["valid_loss"] is None else f"{row['valid_loss']:.4f}"
        training = _percent(row["train_accuracy"])
        lines.append([*cells, accuracy, loss, training])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


def _percent(value: float, std: float | None = None) -> str:
    return f"{100 * value:.2f}" + (f" +- {100 * std:.2f}" if std is not None else "") + " %"


def findings(points: Sequence[Point], margins: dict[str, list[dict[str, Any]]]) -> str:
    """What the numbers say, in sentences that are true of them."""
    best = points[0]
    lost = sum(point.accuracy is None for point in points)
    text = [f"{len(points)} combinations, chosen by validation accuracy."]
    if lost:
        text.append(f"{lost} diverged and count in no mean.")
    if best.accuracy is None:
        return " ".join([*text, "Lower the learning rates."])
    text.append(lead(points))
    compared = {
        name: levels
        for name in _by_range(margins)
        if len(levels := [x for x in margins[name] if x["mean"] is not None]) > 1
    }
    for number, (name, levels) in enumerate(compared.items()):
        means = "; ".join(
            f"{word(level['value'])}: {_percent(level['mean'], level['std'])}" for level in levels
        )
        stds = [level["std"] for level in levels if level["std"] is not None]
        unclear = bool(stds) and _range(levels) <= max(stds)
        first = number == 0 and len(compared) > 1 and not unclear
        text.append(f"{name} {'matters most' if first else 'moves the mean'}, by")
        text[-1] += f" {100 * _range(levels):.2f} points{', no more than a deviation' * unclear}"
        text[-1] += f" ({means})."
        values = [level["value"] for level in margins[name]]
        numeric = all(isinstance(value, int | float) for value in values)
        ends = {min(values), max(values)} - {0} if numeric and len(values) > 2 else set()
        if best.values[name] in ends and _range(levels) > 0.001:  # 0 has nothing beyond
            text.append(f"The best {name} is at the edge of the grid.")
    return " ".join(text)


def lead(points: Sequence[Point]) -> str:
    """A sentence on the first of ranked points, which has an accuracy, and the next."""
    best = points[0]
    assert best.accuracy is not None
    text = f"Best: {best.label}, with {_percent(best.accuracy, best.std)}"
    if len(points) > 1 and points[1].accuracy is not None:
        gap = f"{100 * (best.accuracy - points[1].accuracy):.2f} points above"
        text += f", {'level with' if gap.startswith('0.00') else gap} the next, {points[1].label}"
    return f"{text}."


def retrain(
    folder: Path | str,
    config: Config,
    seeds: Sequence[int] = (),
    device: str = "auto",
    resume: bool = False,
) -> Run:
    """The best combination, to be trained on training and validation examples together, into
    `best/`; with early stopping, which needs them, the validation examples stay apart.

    The run is measured on the test set, which had no part in the choice.
    """
    folder = Path(folder)
    best = distributed.on_main(lambda: read_points(folder, config)[0])
    runs = {run.label: run for run in config.expand().members()}
    chosen = replace(runs[best.label], name=f"{config.name}-best", label="")
    data = replace(chosen.data, use_test=True)
    if not chosen.train.early_stopping.patience:
        data = replace(data, valid=0)
    train = replace(chosen.train, seeds=tuple(seeds)) if seeds else chosen.train
    return Run(replace(chosen, data=data, train=train), folder / "best", device, resume)


def write_predictions(folder: Path | str, data: configs.Data, device: str = "auto") -> Path | None:
    """`predictions.csv` beside the weights in `folder`: the class of each example of the test part,
    labelled or not. None where there is none, or where the network was trained on it."""
    folder = Path(folder)
    if data.source == "test":
        return None
    if data.name == "csv":
        file = csv_files(data.place, ("test",), ("test",)).get("test")
        if file is None:
            return None
        classes, _ = predict_file(folder, file, device, header=data.header)
    else:
        if load(data.name, data.dir, ("test",), optional=("test",)).test is None:
            return None
        classes, _ = predict_file(folder, None, device, data.name, data.dir)
    with writing(str(folder)):
        write_text(folder / "predictions.csv", "\n".join([*prediction_lines(classes), ""]))
    return folder / "predictions.csv"
