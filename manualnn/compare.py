"""The runs of an experiment side by side: one figure, one table, and what the numbers say.

Everything is read from a finished run's folder.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import plots
from .config import Config, without_columns
from .errors import InputError
from .experiment import to_json
from .files import write_csv, write_text, writing
from .results import Trained, by_label, mean_and_std, rank_of, read_run

COLUMNS = (
    *("run", "parameters", "n", "diverged", "part", "final_accuracy", "final_accuracy_std"),
    *("best_accuracy", "best_accuracy_std", "best_epoch", "final_loss", "final_loss_std"),
    *("train_accuracy", "test_accuracy", "test_accuracy_std", "seconds_per_epoch"),
)


NOTHING_COMMON = (
    "nothing that all runs are measured on: set data.valid for all, or leave the test set to them"
)


def compare(folder: Path | str) -> dict[str, Any]:
    """Draw `comparison.png` and write `comparison.csv`, `comparison.json` and `comparison.txt` into
    a finished run's folder: `rows`, one for each run with means and deviations over its seeds, and
    `findings`, a paragraph. Raises InputError."""
    folder = Path(folder)
    networks = read_run(folder)
    groups = by_label(networks)
    part = _common_part(networks, folder)
    rows = [_row(label, group, part) for label, group in groups.items()]
    where = ", ".join(dict.fromkeys(n.config.data.title for n in networks))
    result = {"data": where, "rows": rows, "findings": findings(rows, groups, where)}
    title = f"{folder.name}: {where}"
    drawn = [(label, [n.rows for n in group]) for label, group in groups.items()]
    text = "\n".join([*table(rows), "", str(result["findings"]), ""])
    with writing(str(folder)):
        plots.save(plots.comparison(drawn, title, part), folder / "comparison.png")
        write_csv(folder / "comparison.csv", COLUMNS, ([row[c] for c in COLUMNS] for row in rows))
        write_text(folder / "comparison.json", to_json(result))
        write_text(folder / "comparison.txt", text)
    return result | {"out": str(folder)}


def check(config: Config) -> None:
    """Raise InputError where no part of the data is one that all runs can be compared on."""
    members = config.members()
    if not all(m.data.valid for m in members) and not all(m.data.use_test for m in members):
        raise InputError(f"{config.name}: {NOTHING_COMMON}")


def _common_part(networks: Sequence[Trained], folder: Path) -> str:
    """The validation part if all networks were measured on one, else the test part."""
    alive = [network for network in networks if not network.figures["diverged"]]
    for part in ("valid", "test"):
        if all(network.figures[f"{part}_accuracy"] is not None for network in alive):
            return part
    raise InputError(f"{folder}: {NOTHING_COMMON}")


def _row(label: str, group: Sequence[Trained], part: str) -> dict[str, Any]:
    """The figures of the networks that share all but the seed: means and standard deviations."""
    alive = [n for n in group if not n.figures["diverged"]]
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"run": label, "parameters": group[0].figures["parameters"], "n": len(group)}
    row |= {"diverged": len(group) - len(alive), "part": part}
    row["seconds_per_epoch"] = statistics.fmean(r["seconds"] for n in group for r in n.rows)
    if not alive:
        return row

    def put(name: str, values: list[float | None], spread: bool = True) -> None:
        row[name], std = mean_and_std(values)  # a loss may have no finite value
        if spread and std is not None:
            row[f"{name}_std"] = std

    bests = [max(n.rows, key=lambda r: r[f"{part}_accuracy"] or 0) for n in alive]
    put("final_accuracy", [n.figures[f"{part}_accuracy"] for n in alive])
    put("final_loss", [n.figures[f"{part}_loss"] for n in alive])
    put("best_accuracy", [best[f"{part}_accuracy"] for best in bests])
    put("best_epoch", [best["epoch"] for best in bests], spread=False)
    put("train_accuracy", [n.figures["train_accuracy"] for n in alive], spread=False)
    put("test_accuracy", [n.figures["test_accuracy"] for n in alive])
    return row


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows for a reader, as lines of one width."""
    width = max(len(row["run"]) for row in rows)
    measured = "validation" if rows[0]["part"] == "valid" else "test"
    head = (f"final {measured}", f"best {measured}", "in epoch", "final loss", "training", "test")
    lines = [f"{'run':<{width}}  {'parameters':>10}  " + "  ".join(f"{h:>16}" for h in head)]
    for row in rows:
        if row["final_accuracy"] is None:
            cells = ["diverged"]
        else:
            cells = [
                _percent(row, "final_accuracy"),
                _percent(row, "best_accuracy"),
                f"{row['best_epoch']:.1f}",
                "-" if row["final_loss"] is None else f"{row['final_loss']:.4f}",
                _percent(row, "train_accuracy"),
                _percent(row, "test_accuracy"),
            ]
        line = f"{row['run']:<{width}}  {row['parameters']:>10,}  "
        lines.append(line + "  ".join(f"{cell:>16}" for cell in cells))
    return lines


def _percent(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    std = row.get(f"{name}_std")
    return f"{100 * row[name]:.2f}" + (f" +- {100 * std:.2f}" if std is not None else "") + " %"


def findings(rows: Sequence[dict[str, Any]], groups: dict[str, list[Trained]], where: str) -> str:
    """What the numbers say, in sentences that are true of them."""
    measured = "validation" if rows[0]["part"] == "valid" else "test"
    finished = [row for row in rows if row["final_accuracy"] is not None]
    lost = [row for row in rows if row["diverged"]]
    text = [f"Measured on {where}, accuracies on {measured} data, n = {rows[0]['n']} seeds each."]
    for row in lost:
        text.append(f"{row['run']}: {row['diverged']} of {row['n']} diverged.")
    if not finished:
        return " ".join([*text, "None finished."])
    ordered = sorted(finished, key=lambda row: rank_of(row["final_accuracy"], row["final_loss"]))
    best = ordered[0]
    text.append(f"Best at the end is {best['run']} with {_percent(best, 'final_accuracy')}")
    if len(ordered) > 1:
        gap = 100 * (best["final_accuracy"] - ordered[1]["final_accuracy"])
        text[-1] += f", {gap:.2f} points above {ordered[1]['run']}"
        spread = best["final_accuracy_std"]
        if spread is not None and gap <= 200 * spread:
            text[-1] += ", within two of its standard deviations"
    text[-1] += "."
    for row in ordered:
        if row["final_accuracy"] < best["final_accuracy"] / 2:
            text.append(f"{row['run']} is far behind, at {_percent(row, 'final_accuracy')}.")
        elif row["best_accuracy"] - row["final_accuracy"] > 0.005:
            lost_points = 100 * (row["best_accuracy"] - row["final_accuracy"])
            text.append(
                f"{row['run']} ends {lost_points:.2f} points below its best, of epoch"
                f" {row['best_epoch']:.0f}."
            )
    text += _by_parameters(finished)
    text += _by_permutation(finished, groups)
    return " ".join(text)


def _by_parameters(finished: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the best run of each number of parameters is better with more of them."""
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(finished, key=lambda row: row["final_accuracy"]):
        best[row["parameters"]] = row
    counts = sorted(best)
    if len(counts) < 2:
        return []
    few, many = best[counts[0]], best[counts[-1]]
    better = many["final_accuracy"] > few["final_accuracy"]
    return [
        f"More parameters {'did' if better else 'did not do'} better: the best run with"
        f" {counts[-1]:,} has {_percent(many, 'final_accuracy')}, that with {counts[0]:,} has"
        f" {_percent(few, 'final_accuracy')}."
    ]


def _by_permutation(
    finished: Sequence[dict[str, Any]], groups: dict[str, list[Trained]]
) -> list[str]:
    """For each network that was trained with and without permuted pixels, the difference."""
    kinds: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for row in finished:
        first = groups[row["run"]][0]
        tree = without_columns(first.config)
        permuted = tree["data"].pop("permute_seed", None) is not None
        key = repr((tree, replace(first.replica, label="", seed=0)))
        kinds.setdefault(key, ([], []))[permuted].append(row)
    return [
        f"Permuting the pixels changes {plain['run']} by"
        f" {100 * (permuted['final_accuracy'] - plain['final_accuracy']):+.2f} points, from"
        f" {_percent(plain, 'final_accuracy')} to {_percent(permuted, 'final_accuracy')}."
        for plains, permuteds in kinds.values()
        for plain, permuted in itertools.product(plains, permuteds)
    ]
