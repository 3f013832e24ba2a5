"""What a finished study leaves: tables, pictures and the best trial's config, from it alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from .. import plots
from ..config import Config, Range, word
from ..experiment import to_json
from ..files import write_csv, write_text, writing
from ..sweep import Point, findings, lead, margin, order, table
from .queue import outcome, places, point_of

STATES = ("complete", "pruned", "diverged", "failed")


def summarise(study: Study, config: Config, total: int, folder: Path) -> dict[str, Any]:
    """Write `sweep.csv`, `sweep.json`, `sweep.txt`, `best.toml`, `trials.png`, `parameters.png` and
    `marginals.png` into the folder; gives what sweep.json holds.

    All of it is a function of the study, so that several workers may write it at the same time.
    Raises InputError where it cannot be written.
    """
    places_of = places(study.get_trials(deepcopy=False))[:total]
    names, rows, points = config.factors(), [], []
    for place, tried in enumerate(places_of):
        trial = outcome(tried)
        if trial is not None:
            row = _row(place, trial, names, config)
            rows.append(row)
            if row["state"] in ("complete", "diverged"):
                points.append(_point(row, list(names.values())))
    rows.sort(key=_order)
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank
    points.sort(key=order)
    factors = {
        names[key]: margin(points, names[key], values)
        for key, values in config.grid
        if not isinstance(values, Range)
    }
    counts = {state: sum(row["state"] == state for row in rows) for state in STATES}
    done = [row for row in rows if row["state"] == "complete"]
    result: dict[str, Any] = {
        "study": study.study_name,
        "trials": len(rows),
        **counts,
        "retried": sum(len(tried) - 1 for tried in places_of),
        "rows": rows,
        "factors": factors,
        "best": {key: done[0][names[key]] for key in names} if done else None,
        "findings": findings(points, factors)
        if _is_whole_grid(config, points, counts)
        else _findings(points, counts),
    }
    with writing(str(folder)):
        write_csv(folder / "sweep.csv", list(rows[0]), (list(row.values()) for row in rows))
        write_text(folder / "sweep.json", to_json(result))
        lines = table([short(row) for row in rows])
        write_text(folder / "sweep.txt", "\n".join([*lines, "", result["findings"], ""]))
        if done:
            write_text(folder / "best.toml", _best(config, result["best"]).to_toml())
        _draw(folder, config, rows, factors, [outcome(tried) for tried in places_of])
    return result | {"out": str(folder)}


def _row(place: int, trial: FrozenTrial, names: dict[str, str], config: Config) -> dict[str, Any]:
    """A line of sweep.csv. What was pruned has the accuracy of its last epoch."""
    facts = trial.user_attrs
    ended = "diverged" if "ended" in facts else "pruned"
    state = {TrialState.COMPLETE: "complete", TrialState.PRUNED: ended}.get(trial.state, "failed")
    point = point_of(config, trial.params)
    known = trial.value is not None and state in ("complete", "pruned")
    return {
        "rank": 0,
        **{name: point.get(key) for key, name in names.items()},
        "valid_accuracy": trial.value if known else None,
        "valid_accuracy_std": facts.get("valid_accuracy_std"),
        "valid_loss": facts.get("valid_loss"),
        "train_accuracy": facts.get("train_accuracy"),
        "n": facts.get("networks"),
        "diverged": facts.get("diverged"),
        "state": state,
        "epochs": facts.get("epochs"),
        "trial": place,
        "why": facts.get("error") or facts.get("ended"),
    }


def short(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a reader, whose parameters have four digits."""
    factors = list(row)[1 : list(row).index("valid_accuracy")]
    drawn = {name: row[name] for name in factors if isinstance(row[name], float)}
    return row | {name: float(f"{value:.4g}") for name, value in drawn.items()}


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Complete trials first, by accuracy and then loss; then those that were pruned the latest."""
    kind = STATES.index(row["state"])
    epochs = -(row["epochs"] or 0) if kind else 0
    loss = math.inf if row["valid_loss"] is None else row["valid_loss"]
    return kind, epochs, -(row["valid_accuracy"] or 0), loss, row["trial"]


def _point(row: dict[str, Any], names: list[str]) -> Point:
    shown = short(row)
    return Point(
        ", ".join(f"{name} {word(shown[name])}" for name in names),
        {name: row[name] for name in names},
        row["valid_accuracy"],
        row["valid_accuracy_std"],
        row["valid_loss"],
        row["train_accuracy"],
        row["diverged"] or 0,
        [],
    )


def _is_whole_grid(config: Config, points: Sequence[Point], counts: dict[str, int]) -> bool:
    """Whether each combination of lists is complete, and once: only then do means over the trials
    that have a value compare it with another. Else they differ in what was drawn or left out."""
    lists = [values for _, values in config.grid if not isinstance(values, Range)]
    if len(lists) < len(config.grid):
        return False
    there = {str(point.values) for point in points}
    combinations = math.prod(map(len, lists))
    return counts["complete"] == sum(counts.values()) == combinations == len(there)


def _findings(points: Sequence[Point], counts: dict[str, int]) -> str:
    """The best trial, and what became of the others."""
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    text = f"{sum(counts.values())} trials, chosen by validation accuracy: {states}."
    return f"{text} {lead(points) if counts['complete'] else 'No trial is complete.'}"


def _best(config: Config, point: dict[str, Any]) -> Config:
    """The config of a point, measured on the test set in the end."""
    [best] = config.at([point], ["best"]).members()
    return replace(best, label="", data=replace(best.data, use_test=True))


def _draw(
    folder: Path,
    config: Config,
    rows: Sequence[dict[str, Any]],
    factors: dict[str, list[dict[str, Any]]],
    trials: Sequence[FrozenTrial | None],
) -> None:
    names = config.factors()
    title = f"{folder.name}: {len(rows)} trials on {config.data.title}"
    levels = {
        name: [level | {"value": word(level["value"])} for level in found]
        for name, found in factors.items()
        if len(found) > 1
    }
    if levels:
        plots.save(plots.marginals(levels, title), folder / "marginals.png")
    curves = {
        place: sorted(trial.intermediate_values.items())
        for place, trial in enumerate(trials)
        if trial is not None
    }
    plots.save(plots.trials(rows, curves, title), folder / "trials.png")
    ranges = {
        names[key]: (values.low, values.high, values.log)
        for key, values in config.grid
        if isinstance(values, Range)
    }
    if ranges:
        plots.save(plots.parameters(rows, ranges, title), folder / "parameters.png")
