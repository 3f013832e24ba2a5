"""A finished run trained again, and whether it comes out the same."""

import csv
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .circumstances import circumstances
from .config import load_config, parse_config
from .errors import InputError
from .experiment import MEASURES, Run, to_json, write_history
from .places import check_there, run_config
from .safe import read_tensors

CIRCUMSTANCES = (
    *("config_sha256", "data_sha256", "device", "processor", "threads", "versions", "commit"),
)
CLOSE = 0.005  # accuracies that are so near agree, where a circumstance has changed


@dataclass(frozen=True)
class Reproduced:
    """`changed` circumstances (name: before, now); whether `history`, the final `figures` and the
    `weights` are equal to the bit (None where not compared); the largest difference of an accuracy
    and of a loss."""

    folder: Path
    epochs: int
    changed: dict[str, tuple[Any, Any]]
    history: bool
    figures: bool | None
    weights: bool | None
    accuracy_difference: float
    loss_difference: float

    @property
    def equal(self) -> bool:
        return self.history and False not in (self.figures, self.weights)

    @property
    def agrees(self) -> bool:
        """Equal to the bit, or close where something that the numbers depend on has changed."""
        return self.equal or (bool(self.changed) and self.accuracy_difference <= CLOSE)


def reproduce(
    run: Path | str,
    out: Path | str | None = None,
    epochs: int | None = None,
    data_dir: Path | str | None = None,
) -> Reproduced:
    """Train the config of a finished run again, on the device and with the number of threads that
    it had, into `out` (default a temporary folder), and compare.

    With `epochs` only the first epochs are trained, and their rows of history.csv compared. With
    `data_dir` its data are in that folder now. Raises InputError where `run` holds no finished run.
    """
    run = Path(run)
    out = Path(out) if out is not None else None
    metrics = _metrics(run)
    written = parse_config(load_config(run / "config.toml").to_dict(), metrics["config"])
    found = run_config(run, data_dir)
    for member in found.members():
        check_there(member.data, run)
    config = parse_config(found.to_dict(), metrics["config"])
    device = _device_called(metrics["device"])
    threads = torch.get_num_threads()
    torch.set_num_threads(metrics["threads"])
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = out or Path(temporary) / run.resolve().name
            again = Run(config, folder, device)
            for event in again.train():
                reached = again.training.epoch == epochs
                if isinstance(event, list) and reached and not again.training.finished:
                    break
            if again.metrics is None:
                again.note_data()
                write_history(folder / "history.csv", again.records)
            now = circumstances(written, again.data_digests, again.device)
            return _compare(run, folder, metrics, now, again.metrics)
    finally:
        torch.set_num_threads(threads)


def _device_called(name: str) -> str:
    """The device of a run, as metrics.json names it; the GPU of that name, else the current one."""
    if name == "cpu":
        return "cpu"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"cuda:{names.index(name)}" if name in names else "cuda"


def _metrics(run: Path) -> dict[str, Any]:
    try:
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        for name, kind in (("threads", int), ("device", str), ("config", str)):
            if type(metrics[name]) is not kind or not metrics[name]:
                raise TypeError(name)
        if metrics["threads"] < 1:
            raise ValueError("threads")
        for figure in [value for row in _finals(metrics) for value in row.values()]:
            if figure is not None and type(figure) not in (int, float):
                raise TypeError(figure)
        return metrics
    except FileNotFoundError:
        inside = sorted(path.parent.name for path in run.glob("*/metrics.json"))
        hint = f"; it has {', '.join(inside)}: give one of them" if inside else ""
        raise InputError(f"{run}: holds no finished run: there is no metrics.json{hint}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run}/metrics.json: cannot be read ({error!r})") from None


def _compare(
    run: Path,
    folder: Path,
    before: dict[str, Any],
    now: dict[str, Any],
    metrics: dict[str, Any] | None,
) -> Reproduced:
    """`metrics` are those of the new run, None where it did not come to its end."""
    changed = {
        name: (before[name], now[name])
        for name in CIRCUMSTANCES
        if name in before and before[name] != now[name]
    }
    if metrics is None and now["data_sha256"] == (before.get("data_sha256") or [])[:1]:
        changed.pop("data_sha256", None)  # of the others nothing was read
    ours, theirs = _history(folder), _history(run)
    if metrics is None:  # of several populations the first
        theirs = {key: row for key, row in theirs.items() if key in ours}
    pairs = [(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()]
    figures = weights = None
    if metrics is not None:
        ends = _finals(json.loads(to_json(metrics))), _finals(before)
        figures = ends[0] == ends[1]
        pairs += zip(*ends, strict=False)
        paths = [path.relative_to(folder) for path in folder.rglob("*.pkl")]
        weights = all(_same(run / path, folder / path) for path in paths)
    worst = {"accuracy": 0.0, "loss": 0.0}
    for one, other in pairs:
        for name, kind in ((name, name.rpartition("_")[2]) for name in one):
            values = one[name], other.get(name)
            if kind in worst and None not in values and "" not in values:
                difference = abs(float(one[name]) - float(other[name]))
                worst[kind] = max(worst[kind], difference)  # of which nan is none
    return Reproduced(
        folder,
        max(epoch for _, _, epoch in ours),
        changed,
        ours == theirs,
        figures,
        weights,
        worst["accuracy"] if ours.keys() == theirs.keys() else math.inf,
        worst["loss"],
    )


def _finals(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The final figures, and those of each network."""
    rows = [metrics, *metrics.get("runs", [])]
    return [{name: row.get(name) for name in MEASURES} for row in rows]


def _history(folder: Path) -> dict[tuple[str, str, int], dict[str, str]]:
    """The rows of history.csv by run, seed and epoch, without their times."""
    try:
        with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
            rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
        return {(row["run"], row["seed"], int(row["epoch"])): row for row in rows}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{folder}/history.csv: cannot be read ({error})") from None


def _same(path: Path, other: Path) -> bool:
    """Whether two weights files hold the same numbers."""
    if not path.exists():
        return False
    ours, theirs = (read_tensors(each, "weights file") for each in (path, other))
    tensors = [
        {key: value for key, value in each.items() if isinstance(value, torch.Tensor)}
        for each in (ours, theirs)
    ]
    return tensors[0].keys() == tensors[1].keys() and all(
        tensors[0][key].equal(tensors[1][key]) for key in tensors[0]
    )
