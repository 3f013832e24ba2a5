"""A study's trials as a sweep has them: their parameters, and which of them ended a place of it."""

import json
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from ..config import Config, Range
from .storage import RETRIES


def space(config: Config) -> dict[str, BaseDistribution]:
    """The values of each key of the grid, as Optuna has them."""
    found: dict[str, BaseDistribution] = {}
    for key, values in config.grid:
        if not isinstance(values, Range):
            found[key] = CategoricalDistribution([choice_of(value) for value in values])
        elif isinstance(values.low, int) and isinstance(values.high, int):
            step = 1 if values.step is None else int(values.step)
            found[key] = IntDistribution(values.low, values.high, values.log, step)
        else:
            found[key] = FloatDistribution(values.low, values.high, values.log, values.step)
    return found


def point_of(config: Config, params: dict[str, Any]) -> dict[str, Any]:
    """The values of the grid's keys from a trial's parameters, as far as it has them."""
    point = {}
    for key, values in config.grid:
        if key in params:
            same = [v for v in values if _same(v, params[key])] if isinstance(values, tuple) else []
            point[key] = same[0] if same else params[key]
    return point


def choice_of(value: Any) -> Any:
    """A value of a list as a choice of Optuna's, which are words, numbers, true and false."""
    return value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)


def _same(value: Any, choice: Any) -> bool:
    return bool(choice_of(value) == choice)


def places(trials: list[FrozenTrial]) -> list[list[FrozenTrial]]:
    """The trials that were asked for, each with those that were begun again in its place.

    Of a grid's combination that two workers put into the queue at once the second is left out.
    """
    rows: dict[int, list[FrozenTrial]] = {}
    queued = set()
    for trial in trials:
        fixed = json.dumps(trial.system_attrs.get("fixed_params") or trial.number, sort_keys=True)
        if "failed_trial" in trial.system_attrs:
            if trial.system_attrs["failed_trial"] in rows:
                rows[trial.system_attrs["failed_trial"]].append(trial)
        elif fixed not in queued:
            queued.add(fixed)
            rows[trial.number] = [trial]
    return list(rows.values())


def outcome(row: list[FrozenTrial]) -> FrozenTrial | None:
    """The trial of a place that ended it; None where it is not ended."""
    for trial in row:
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "error" in trial.user_attrs:
            return trial
    over = all(trial.state == TrialState.FAIL for trial in row) and len(row) > RETRIES
    return row[-1] if over else None
