"""Finished run folders, read back: what plots and reports are made of."""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, Replica
from .errors import InputError
from .places import run_config


@dataclass(frozen=True)
class Trained:
    """One network of a run: its figures in metrics.json, rows of history.csv, and settings."""

    figures: dict[str, Any]
    rows: list[dict[str, Any]]
    replica: Replica
    config: Config


def read_run(folder: Path | str, data_dir: Path | str | None = None) -> list[Trained]:
    """The networks of a finished run, in their order. Values of history.csv are numbers, or None
    where not measured. The configs have the data as they are found from here, or `data_dir`.
    Raises InputError when the folder holds no finished run."""
    folder = Path(folder)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
            rows = [{k: _value(k, v) for k, v in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise InputError(f"{folder}: holds no finished run: {name} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: holds no finished run: {error}") from None
    settings = [
        (replica, population.config)
        for population in run_config(folder, data_dir).populations()
        for replica in population.replicas
    ]
    try:
        trained = metrics.get("runs") or [metrics | metrics["weights"]]
        pairs = list(zip(trained, settings, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{folder}: metrics.json and config.toml are of different runs") from None
    networks = []
    for figures, (replica, config) in pairs:
        key = (figures["run"], figures["seed"])
        own = [row for row in rows if (row["run"], row["seed"]) == key]
        networks.append(Trained(figures, own, replica, config))
    return networks


def by_label(networks: Sequence[Trained]) -> dict[str, list[Trained]]:
    """The networks that differ in their seed alone, under what they are called."""
    groups: dict[str, list[Trained]] = {}
    for network in networks:
        groups.setdefault(network.replica.label, []).append(network)
    return groups


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of the values that were measured; None without enough, or
    the deviation of values that are not finite."""
    known = [value for value in values if value is not None]
    return (
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 and all(map(math.isfinite, known)) else None,
    )


def best_network(runs: Sequence[dict[str, Any]]) -> int:
    """The place of the best network among the `runs` of metrics.json: the one rule for weights.pkl,
    sweeps and reports.

    Of those that did not diverge: the highest validation accuracy, then the lowest validation loss,
    then the first. Networks that differ in their seed alone are first compared by their means. The
    test set has no part in it; without validation data the first is taken.
    """
    alive = [r for r, run in enumerate(runs) if not run["diverged"]]
    groups: dict[str, list[int]] = {}
    for r in alive or range(len(runs)):
        groups.setdefault(runs[r]["run"], []).append(r)
    best = min(list(groups.values()), key=lambda group: rank([runs[r] for r in group]))
    return min(best, key=lambda r: rank([runs[r]]))


def rank(runs: Sequence[dict[str, Any]]) -> tuple[bool, float, float]:
    """What sorts the better first of networks, each group those that differ in their seed alone."""
    accuracy, _ = mean_and_std([run["valid_accuracy"] for run in runs])
    loss, _ = mean_and_std([run["valid_loss"] for run in runs])
    return rank_of(accuracy, loss)


def rank_of(accuracy: float | None, loss: float | None) -> tuple[bool, float, float]:
    """What sorts the better first: the higher accuracy, of equals the lower loss."""
    finite = loss is not None and math.isfinite(loss)
    return accuracy is None, -(accuracy or 0.0), loss if finite and loss is not None else math.inf


def chosen_by(runs: Sequence[dict[str, Any]]) -> str:
    """The reason for the choice of `best_network`, for a reader."""
    if any(run["valid_accuracy"] is not None for run in runs):
        return "the highest validation accuracy"
    return "the first, as there are no validation data to choose by (data.valid)"


def best_of(folder: Path, networks: list[Trained]) -> Trained:
    """The network whose weights are `weights.pkl`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    of = metrics["weights"]
    return next(n for n in networks if all(n.figures[key] == of[key] for key in ("run", "seed")))


def _value(key: str, text: str) -> Any:
    if key == "run":
        return text
    if key in ("seed", "epoch", "step"):
        return int(text)  # exact also beyond what a float holds
    return float(text) if text else None
