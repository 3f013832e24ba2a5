"""A function of the user's own file that computes gradients: which are wrong, and how.

`gradient(X, y, W)` of the exercise on logistic backpropagation is compared with
`manualnn.coursework.gradient`. `loss_and_gradients(params, x, y)`, which gives the loss and a dict
like `params`, is compared with central differences of its own loss; its arguments are those that
`example()` in the file gives, else those of a small network of two linear layers, which is compared
with the project's own as well. Arguments are in float64, as torch tensors or NumPy arrays.

Shapes: B samples.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from .coursework import gradient
from .differences import BAR, FLOOR, Report, Row, judge
from .errors import InputError
from .layers import ACTIVATIONS
from .losses import LOSSES, outputs
from .network import Network
from .own_function import Arrays, Own, as_array, attempt, load, running
from .workspace import Workspace, generator

OWN_STREAM = 0x0361
BATCH, INPUTS, HIDDEN, CLASSES = 7, 6, 5, 3  # all different, so that a factor has a name
LOW_BAR, LOW_NOISE = 1e-2, 1e-3  # for a function that computes in float32


@dataclass(frozen=True)
class Right:
    """The right gradient of a tensor: nan where it was not measured; with where it is none for a
    kink, and how far each number may be from the truth."""

    gradient: np.ndarray
    kinked: np.ndarray
    noise: np.ndarray

    @property
    def clear(self) -> np.ndarray:
        return np.where(self.kinked, np.nan, self.gradient)


def check_function(name: str, samples: int = 50, seed: int = 0) -> Report:
    """Check FILE.py:FUNCTION: of each tensor `samples` coordinates, all where that is 0, but all
    where there is a right gradient. Raises InputError where it cannot be judged."""
    own = load(name)
    draw = np.random.default_rng([seed, OWN_STREAM])
    if own.signature == "gradient":
        report = _check_gradient(own, draw)
    else:
        report = _check_loss(own, draw, samples, seed)
    for label in own.changed:
        report.rows.append(Row(own.name, label, (), how="an argument that it changes in place"))
    return report


def _check_gradient(own: Own, draw: np.random.Generator) -> Report:
    x = draw.standard_normal((BATCH, INPUTS))
    y = draw.permutation(np.arange(BATCH) % 2).astype(float)
    weights = {
        "w_1": draw.standard_normal((INPUTS, HIDDEN)),
        "w_2": draw.standard_normal((HIDDEN, 1)),
    }

    def rows(y: np.ndarray, count: int = BATCH) -> list[Row]:
        found = own.gradients(x[:count], y[:count], weights)
        exact = gradient(x[:count], y[:count], weights)
        right = {key: Right(value, value != value, 0 * value) for key, value in exact.items()}
        return compare(own.name, found, right, count, _bar(found))

    shapes = {(BATCH,): y, (BATCH, 1): y[:, None]}
    try:
        own.choose(x, y, weights)
    except InputError as error:
        if isinstance(attempt(lambda: own.choose(x, y[:, None], weights)), InputError):
            raise error from None
    found = {shape: attempt(partial(rows, of)) for shape, of in shapes.items()}
    judged = {shape: rows for shape, rows in found.items() if not isinstance(rows, InputError)}
    if not judged:  # what it gives is no dict of arrays
        raise found[BATCH,]
    right = [shape for shape, rows in judged.items() if all(row.right for row in rows)]
    best = (right or list(judged))[0]
    others = [shape for shape in shapes if shape not in right] if right else []
    notes = [f"note: right for y of shape {best} only; {o} would broadcast" for o in others]
    if not right:
        judged[best] = _alone(judged[best], attempt(partial(rows, shapes[best], 1)))
    title = f"{own.path}: {own.name}(X, y, W) against manualnn.coursework.gradient"
    return Report(f"{title} ({own.kinds[0]})", judged[best], tuple(notes))


def _check_loss(own: Own, draw: np.random.Generator, samples: int, seed: int) -> Report:
    example = own.content.get("example")
    if callable(example):
        with running(own.path):
            given = example()
        if not (isinstance(given, tuple) and len(given) == 3 and isinstance(given[0], dict)):
            raise InputError(f"{own.path}: example() must give (params, x, y), params a dict")
        if any(map(torch.is_tensor, given[0].values())):
            own.kinds = tuple(kind for kind in own.kinds if kind != "numpy")
        x, y = map(_double, given[1:])
        try:
            params = {k: np.asarray(as_array(v), dtype=float) for k, v in given[0].items()}
        except (TypeError, ValueError):
            raise InputError(f"{own.path}: example() gives params that are no arrays") from None
        own.choose(params, x, y)
    else:
        shapes = {
            "w1": (INPUTS, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES), "b2": (CLASSES,)
        }  # fmt: skip
        params = {key: draw.standard_normal(shape) for key, shape in shapes.items()}
        x = draw.standard_normal((BATCH, INPUTS))
        y = draw.permutation(np.arange(BATCH) % CLASSES)
        try:
            own.choose(params, x, y)
        except InputError as error:
            raise InputError(
                f"{error} (given w1 {shapes['w1']}, b1, w2, b2, x {x.shape} and class indices y"
                f" {y.shape}; for others define example() that returns (params, x, y))"
            ) from None
    loss, found = own.loss_and_gradients(params, x, y)
    if not math.isfinite(loss):
        raise InputError(f"{own.path}: {own.name} gives the loss {loss}")
    if own.loss_and_gradients(params, x, y)[0] != loss:
        raise InputError(f"{own.path}: {own.name} gives another loss each time; fix its randomness")
    double = _in_double(own, params, x, y)
    rows = _against_differences(own, params, x, y, samples, seed, double)
    several = isinstance(x, np.ndarray) and isinstance(y, np.ndarray) and len(x) == len(y) > 1
    # Differences in float32 are too coarse to call a gradient right for one example only.
    if double and several and any(row.verdict == "wrong" for row in rows):
        alone = partial(_against_differences, own, params, x[:1], y[:1], samples, seed, double)
        rows = _alone(rows, attempt(alone))
    notes = () if callable(example) else (_against_network(params, x, y, loss, found),)
    title = f"{own.path}: {own.name}(params, x, y) against differences of its loss"
    return Report(f"{title} ({own.kinds[0]})", rows, notes)


def _in_double(own: Own, params: Arrays, x: Any, y: Any) -> bool:
    """Whether the loss is computed in float64, which the type of the gradients does not tell.

    In float32 it shows in the loss's digits (a round number may do so once), or, as these are
    hidden by a later division in float64, in that it moves by jumps along a tiny line.
    """

    def at(tilt: float) -> float:
        moved = {key: (1 + 1.23 * tilt) * value + 0.77 * tilt for key, value in params.items()}
        return own.loss_and_gradients(moved, x, y)[0]

    loss, found = own.loss_and_gradients(params, x, y)
    if all(float(np.float32(value)) == value for value in (loss, at(0.01))):
        return False
    if _bar(found) == BAR:
        return True
    first, *others = (at(times * 1e-9) - loss for times in (1, 2, 3))
    return first != 0 and all(
        math.isclose(other, times * first, rel_tol=0.01) for times, other in enumerate(others, 2)
    )


def _against_differences(
    own: Own, params: Arrays, x: Any, y: Any, samples: int, seed: int, double: bool
) -> list[Row]:
    """The rows of each parameter, its gradient against differences of the function's own loss,
    which is computed in float64 if `double`.

    Unlike the project's layers it does not say where its kinks are: at one, the slopes to both
    sides differ, or those of a large and a small step.
    """
    loss, found = own.loss_and_gradients(params, x, y)
    step, nearer = (1e-5, 10) if double else (1e-2, 3)

    def slope(key: str, k: int, h: float) -> float:
        moved = params[key].copy()
        moved.flat[k] += h
        above, _ = own.loss_and_gradients({**params, key: moved}, x, y)
        return (above - loss) / float(moved.flat[k] - params[key].flat[k])

    right = {}
    for number, (key, value) in enumerate(params.items()):
        chosen = np.arange(value.size)
        if 0 < samples < value.size:
            order = torch.randperm(
                value.size, generator=generator(seed, OWN_STREAM, number), device="cpu"
            )
            chosen = order[:samples].numpy()
        steps = (step, -step, step / nearer, -step / nearer)
        up, down, near_up, near_down = (
            np.array([slope(key, k, h) for k in chosen.tolist()]) for h in steps
        )
        mean, near = (up + down) / 2, (near_up + near_down) / 2
        scale = np.abs(mean).max(initial=0.0)
        rounding = np.finfo(np.float64 if double else np.float32).eps * abs(loss) / step
        if double:
            noise = np.full(mean.shape, rounding)
            bound = BAR * np.maximum(np.abs(mean), FLOOR * scale) + 20 * noise
            at_kink = np.abs(up - down) > 0.01 * scale + 20 * noise
            at_kink |= np.abs(mean - near) > bound
        else:
            # The large step crosses many small kinks, so each coordinate has a bound of its own:
            # what the slopes to both sides differ by (one kink moves the mean by half, several
            # by more), unless that shrinks with the step as for a curve; and a few times what the
            # step moves the mean by.
            bend, nearer_bend = np.abs(up - down), np.abs(near_up - near_down)
            curved = np.abs(nearer * nearer_bend - bend) + 10 * rounding <= bend / 2
            bound = np.maximum(4 * np.abs(mean - near), np.where(curved, 0, bend))
            bound += 2 * rounding
            # What is kept is within a hundredth of the largest that is, if any is so near.
            scale = np.abs(mean[bound <= LOW_BAR * np.abs(mean)]).max(initial=0.0)
            noise = np.maximum(bound, LOW_NOISE * scale)
            at_kink = (bound > LOW_BAR * scale) & (scale > 0)
        measured = Right(*(np.full(value.shape, fill) for fill in (np.nan, False, 0.0)))
        for whole, part in zip(
            (measured.gradient, measured.kinked, measured.noise),
            (mean, at_kink, noise),
            strict=True,
        ):
            whole.flat[chosen] = part
        right[key] = measured
    batch = len(x) if isinstance(x, np.ndarray) and x.ndim else 1
    return compare(own.name, found, right, batch, _bar(found) if double else LOW_BAR)


def compare(part: str, found: Arrays, right: dict[str, Right], batch: int, bar: float) -> list[Row]:
    """A row for each gradient of `right`, and one for each that is too much."""
    rows, clear = [], {key: value.clear for key, value in right.items()}
    for key, wanted in right.items():
        shape, own = wanted.gradient.shape, found.get(key)
        row = Row(part, key, shape)
        if own is None:
            row = replace(row, how="missing")
        elif own.shape != shape:
            row = replace(row, how=_misshapen(own, clear[key], batch, bar))
        elif bad := int((~np.isfinite(own)).sum()):
            row = replace(row, how=f"{bad} of {own.size} numbers are nan or infinite")
        else:
            known = np.isfinite(wanted.gradient).flatten().nonzero()[0]
            a, n, noise, kinked = (
                torch.from_numpy(values.flatten()[known])
                for values in (own.astype(float), wanted.gradient, wanted.noise, wanted.kinked)
            )
            row = judge(part, key, shape, torch.from_numpy(known), a, n, noise, kinked, bar)
            if row.verdict == "wrong":
                row = replace(row, how=_how(key, own, clear, batch, bar))
        rows.append(row)
    how = f"not asked for: the keys are {', '.join(right)}"
    extra = [key for key in found if key not in right]
    return rows + [Row(part, str(key), (), how=how) for key in extra]


def _misshapen(found: np.ndarray, wanted: np.ndarray, batch: int, bar: float) -> str:
    """How a gradient of another shape is wrong."""
    shapes = f"has shape {found.shape}, should have {wanted.shape}"
    if found.T.shape == wanted.shape and _close(found.T, wanted, bar):
        return f"transposed: {shapes}"
    if found.shape == (batch, *wanted.shape) and _close(found.sum(0), wanted, bar):
        return f"not summed over the batch: {shapes}"
    if found.size == wanted.size and _close(found.reshape(wanted.shape), wanted, bar):
        return f"the right numbers, but it {shapes}"
    return shapes


def _how(key: str, found: np.ndarray, right: Arrays, batch: int, bar: float) -> str:
    """How a gradient of the right shape is wrong, where that is plain; else nothing."""
    wanted = right[key]
    if not found.any():
        return "all 0"
    if found.T.shape == wanted.shape and found.ndim > 1 and _close(found.T, wanted, bar):
        return "transposed"
    for other, values in right.items():
        if other != key and values.shape == found.shape and _close(found, values, bar):
            return f"it is the gradient of {other}"
    known = np.isfinite(wanted)
    factor = float((found[known] * wanted[known]).sum() / max((wanted[known] ** 2).sum(), 1e-300))
    if _close(found, factor * wanted, bar):
        return _times(factor, batch, bar)
    return _lines(found, wanted, bar)


def _lines(found: np.ndarray, wanted: np.ndarray, bar: float) -> str:
    """The few rows, columns or entries that are wrong as a whole, if nothing else is: the axis with
    the fewest. Cells that are not known, or too small to tell, speak neither for nor against."""
    error, size = np.abs(found - wanted), np.maximum(np.abs(found), np.abs(wanted))
    scale = np.nanmax(np.abs(wanted))
    wrong, right = error > bar * scale, (error <= bar * size) & (size > bar * scale)
    best = ""
    fewest = math.inf
    for axis, line in enumerate({1: ("entry",), 2: ("row", "column")}.get(found.ndim, ())):
        other_axes = tuple(i for i in range(found.ndim) if i != axis)
        bad, good = wrong.any(axis=other_axes), right.any(axis=other_axes)
        # One wrong cell in each of some lines is no sign of a line, where a line has several.
        cells = 1 if found.size == found.shape[axis] else 2
        if wrong.sum() < cells * bad.sum() or (bad & good).any() or bad.sum() >= good.sum():
            continue
        if 0 < bad.sum() < fewest:
            fewest, names = bad.sum(), list(map(str, bad.nonzero()[0]))
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            plural = {"row": "rows", "column": "columns", "entry": "entries"}[line]
            kind = plural if len(names) > 1 else line
            best = f"only {kind} {', '.join(names[:5])}{more} wrong"
    return best


def _times(factor: float, batch: int, bar: float) -> str:
    """What a constant factor says."""
    size = abs(factor)
    known = {
        float(batch): f"{batch} times too large, the batch size: 1/B is missing",
        1 / batch: f"{batch} times too small, the batch size: 1/B is there twice",
        2.0: "twice as large as it should be",
        0.5: "half as large as it should be",
        1.0: "",
    }
    near = [text for value, text in known.items() if math.isclose(size, value, rel_tol=10 * bar)]
    text = near[0] if near else f"{size:.4g} times what it should be"
    return ", and ".join(filter(None, ("the sign is flipped" if factor < 0 else "", text)))


def _close(found: np.ndarray, wanted: np.ndarray, bar: float) -> bool:
    """Whether they are the same for the eye, where `wanted` is known."""
    known = np.isfinite(wanted)
    scale = np.abs(wanted[known]).max(initial=0.0)
    return bool((np.abs(found - wanted)[known] <= 10 * bar * scale).all()) and scale > 0


def _alone(rows: list[Row], single: list[Row] | InputError) -> list[Row]:
    """The rows, with a word on those that are right in `single`, of the first example alone."""
    if isinstance(single, InputError):
        return rows
    right = {row.tensor for row in single if row.right}
    text = "right for a batch of one example only"
    return [
        replace(row, how=text)
        if row.verdict == "wrong" and not row.how and row.tensor in right
        else row
        for row in rows
    ]


def _against_network(
    params: Arrays, x: np.ndarray, y: np.ndarray, loss: float, found: Arrays
) -> str:
    """A sentence on which of the project's networks has this loss, and on its gradients."""
    multiclass = [name for name in LOSSES if outputs(name, CLASSES) == CLASSES]
    for activation, name in product(ACTIVATIONS, multiclass):
        value, right = _project(params, x, y, activation, name)
        for times in (1, BATCH, CLASSES, BATCH * CLASSES):
            if not math.isclose(loss, times * value, rel_tol=1e-5):
                continue
            worst = max(
                float(np.abs(found[key] - times * ours).max() / np.abs(times * ours).max())
                if key in found and found[key].shape == ours.shape
                else math.inf
                for key, ours in right.items()
            )
            many = f"{times} times " if times > 1 else ""
            apart = f"; the gradients are {worst:.1e} from the project's, of the largest"
            return (
                f"note: the loss is {many}that of the project's linear, {activation}, linear with"
                f" {name}{apart if math.isfinite(worst) else ''}"
            )
    return "note: the loss is none of the project's, so that only its own differences were compared"


def _project(
    params: Arrays, x: np.ndarray, y: np.ndarray, activation: str, loss: str
) -> tuple[float, Arrays]:
    """The loss and the gradients of the project's network with these parameters."""
    specs: list[list[Any]] = [["linear", HIDDEN], [activation], ["linear", CLASSES]]
    network = Network(specs, (INPUTS,), CLASSES, 1, torch.float64)
    layout, workspace = network.layout, Workspace(torch.float64)
    for key, slot in zip(layout.keys(), layout.slots, strict=True):
        layout.view(network.theta, slot)[0].copy_(torch.from_numpy(params[key]))
    workspace.begin("project")
    logits, caches = network.forward(torch.from_numpy(x).unsqueeze(0), workspace)
    value, dlogits = LOSSES[loss](logits, torch.from_numpy(y).unsqueeze(0), workspace)
    grad = torch.zeros_like(network.theta)
    network.backward(dlogits, caches, layout.views(grad), workspace)
    return float(value), {key: v.numpy() for key, v in layout.to_dict(grad[0]).items()}


def _bar(found: Arrays) -> float:
    """What relative error is allowed: more where something was computed in float32."""
    return BAR if all(value.dtype.itemsize >= 8 for value in found.values()) else LOW_BAR


def _double(value: Any) -> Any:
    """An array or tensor as an array, of floating-point numbers in float64; others as they are."""
    value = as_array(value)
    floating = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return value.astype(np.float64) if floating else value
