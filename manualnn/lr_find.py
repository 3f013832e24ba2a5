"""The learning-rate finder: one population, a network for each rate, all from the same weights on
the same batches (after Smith 2017, "Cyclical learning rates", who sweeps one network instead).
"""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from . import plots
from .config import Config, Population, Schedule
from .diagnosis import guess_loss
from .errors import InputError
from .evaluation import choose_device
from .experiment import build
from .files import write_csv
from .training import Training


def rates(low: float, high: float, count: int) -> list[float]:
    """`count` learning rates from `low` to `high`, evenly spaced by their logarithm."""
    if not 0 < low < high or not math.isfinite(high):
        raise InputError(f"--low {low:g} --high {high:g}: need 0 < low < high")
    if count < 3:
        raise InputError(f"--networks {count}: needs at least 3")
    step = math.log(high / low) / (count - 1)
    return [low * math.exp(i * step) for i in range(count)]


def find(
    config: Config,
    low: float = 1e-4,
    high: float = 10.0,
    networks: int = 20,
    steps: int = 200,
    device: str = "auto",
) -> dict[str, Any]:
    """Train `networks` copies of a config's network for `steps` steps at constant learning rates.

    Gives `rates`: for each its learning_rate and `loss`, the mean training loss over the last
    quarter of the steps (None where it is not finite), and whether it is `stable`: no eighth of the
    steps had a mean loss that is not finite, or a twentieth above an untrained network's. `best`
    is the stable rate of the lowest loss; `good` are the smallest and the largest stable rate
    around it within a twentieth of the way back to `start_loss`, the untrained network's. Raises
    InputError.
    """
    if steps < 4:
        raise InputError(f"--steps {steps}: needs at least 4")
    training = _training(config, rates(low, high, networks), steps, device)
    batches = list(itertools.islice(_batches(training), steps))
    # Sums over each piece by itself: as a difference of running totals a small one is rounded away
    # once a large loss is in them.
    last, each = steps - steps // 4, max(1, steps // 8)
    pieces = [0, 1, *range(1 + each, last, each), last, steps]
    means = []
    for first, end in itertools.pairwise(sorted(set(pieces))):
        training.clear_totals()
        for _ in training.walk(batches[first:end]):
            pass
        samples = sum(index.shape[1] for index in batches[first:end])
        means.append((training.totals()[0] / samples).tolist())
    start = means[0][0]
    guess, _ = guess_loss(
        training.settings.loss, training.network.classes, training.network.outputs
    )
    highest = 1.05 * max(start, guess)
    rows: list[dict[str, Any]] = [
        {
            "learning_rate": replica.learning_rate,
            "loss": losses[-1] if math.isfinite(losses[-1]) else None,
            "stable": all(loss <= highest for loss in losses),  # nan is not
        }
        for replica, losses in zip(training.replicas, zip(*means, strict=True), strict=True)
    ]
    known = [row for row in rows if row["stable"]]
    if not known or min(row["loss"] for row in known) >= start:
        raise InputError(
            f"no learning rate between {low:g} and {high:g} lowers the loss within {steps} steps;"
            " try a smaller --low"
        )
    best = min(known, key=lambda row: row["loss"])
    bound = best["loss"] + 0.05 * (start - best["loss"])
    first = last = rows.index(best)
    while first > 0 and _within(rows[first - 1], bound):
        first -= 1
    while last + 1 < len(rows) and _within(rows[last + 1], bound):
        last += 1
    return {
        "best": best["learning_rate"],
        "good": [rows[first]["learning_rate"], rows[last]["learning_rate"]],
        "start_loss": start,
        "steps": steps,
        "rates": rows,
    }


def save(result: dict[str, Any], name: str, folder: Path | str) -> None:
    """Write `lr-find.csv` and `lr-find.png`."""
    folder = Path(folder)
    columns = ("learning_rate", "loss")
    rows = ([row[column] for column in columns] for row in result["rates"])
    write_csv(folder / "lr-find.csv", columns, rows)
    plots.save(plots.learning_rates(result, name), folder / "lr-find.png")


def _within(row: dict[str, Any], bound: float) -> bool:
    return bool(row["stable"]) and row["loss"] <= bound


def _training(config: Config, chosen: list[float], steps: int, device: str) -> Training:
    members = config.members()
    replicas = [replica for member in members for replica in member.replicas()]
    if len(replicas) > 1:
        raise InputError(
            f"{config.name}: trains {len(replicas)} networks; lr-find needs the settings of one,"
            " without [[run]] and lists"
        )
    train = replace(
        members[0].train, schedule=Schedule(), shared_batches=True, seed=replicas[0].seed
    )
    single = replace(members[0], train=train)
    copies = tuple(replace(replicas[0], label=f"{x:g}", learning_rate=x) for x in chosen)
    training, dataset = build(Population(single, copies), choose_device(device))
    print(f"read {dataset.read}", file=sys.stderr)
    return training


def _batches(training: Training) -> Iterator[Tensor]:
    for epoch in itertools.count(1):
        yield from training.batches(epoch)
