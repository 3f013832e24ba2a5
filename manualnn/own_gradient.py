"""A function of the user's own file that computes gradients: which are wrong, and how.

`gradient(X, y, W)` of the exercise on logistic backpropagation is compared with
`manualnn.coursework.gradient`. `loss_and_gradients(params, x, y)`, which gives the loss and a dict
like `params`, is compared with central differences of its own loss; its arguments are those that
`example()` in the file gives, else those of a small network of two linear layers, which is compared
with the project's own as well. Arguments are in float64, as torch tensors or NumPy arrays.

The file runs in this process: check only what you would run anyway.

Shapes: B samples.
"""

import inspect
import math
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .coursework import gradient
from .differences import BAR, FLOOR, Report, Row, judge
from .errors import InputError, hint
from .layers import ACTIVATIONS
from .losses import LOSSES, outputs
from .network import Network
from .workspace import Workspace, generator

OWN_STREAM = 0x0361
BATCH, INPUTS, HIDDEN, CLASSES = 7, 6, 5, 3  # all different, so that a factor has a name
LOW_BAR, LOW_NOISE = 1e-2, 1e-3  # for a function that computes in float32
TARGET = re.compile(r"(.+\.py)(?::(\w+))?")
NAMES = {"gradient": ("X", "y", "W"), "loss_and_gradients": ("params", "x", "y")}
Arrays = dict[str, np.ndarray]


@dataclass
class Own:
    """A function of the file `path`, called with copies of arrays in the `kind` that it takes.

    `changed` are the arguments that it wrote to.
    """

    path: Path
    name: str
    function: Callable[..., Any]
    kind: str
    arguments: tuple[str, ...]
    changed: dict[str, None] = field(default_factory=dict)

    def __call__(self, *values: Any) -> Any:
        """What it returns, tensors as arrays. Raises InputError with the line where it raises."""
        given = [_convert(value, self.kind) for value in values]
        with _running(self.path):
            result = self.function(*given)
        for name, before, after in zip(self.arguments, values, given, strict=True):
            pairs = {name: (before, after)}
            if isinstance(before, dict):
                pairs = {f"{name}[{k!r}]": (v, after.get(k)) for k, v in before.items()}
            for label, (old, new) in pairs.items():
                if not np.array_equal(old, _array(new)):
                    self.changed[label] = None
        if isinstance(result, tuple | list):
            return tuple(map(_arrays, result))
        return _arrays(result)


def is_function(name: str) -> bool:
    """Whether `name` is FILE.py or FILE.py:FUNCTION."""
    return TARGET.fullmatch(name) is not None


def check_function(name: str, samples: int = 100, seed: int = 0) -> Report:
    """Check FILE.py:FUNCTION. Raises InputError where it cannot be judged."""
    match = TARGET.fullmatch(name)
    path, wanted = (Path(match[1]), match[2]) if match else (Path(name), None)
    if match is None or not path.is_file():
        raise InputError(f"{path}: no such file; give FILE.py:FUNCTION")
    with _running(path):
        content = runpy.run_path(str(path))
    wanted = wanted or next((known for known in NAMES if known in content), "")
    functions = [key for key, value in content.items() if inspect.isfunction(value)]
    if not callable(function := content.get(wanted)):
        which = f"has no function {wanted!r}" if wanted else "has no function of a known name"
        advice = hint(wanted, functions) if functions else "it has none"
        raise InputError(f"{path}: {which}; {advice}")
    signature = _signature(path, wanted, function)
    uses_torch = any(
        value is torch or str(getattr(value, "__module__", "")).startswith("torch")
        for value in content.values()
    )
    kinds = ("torch", "numpy") if uses_torch else ("numpy", "torch")
    own = Own(path, wanted, function, kinds[0], NAMES[signature])
    draw = np.random.default_rng([seed, OWN_STREAM])
    if signature == "gradient":
        report = _check_gradient(own, kinds, draw)
    else:
        report = _check_loss(own, kinds, content.get("example"), samples, draw, seed)
    for label in own.changed:
        report.rows.append(Row(wanted, label, (), how="an argument that it changes in place"))
    return report


def _signature(path: Path, name: str, function: Callable[..., Any]) -> str:
    """Which of the known signatures a function has, by its parameters' names, else by its own."""
    parameters = inspect.signature(function).parameters.values()
    usual = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name.lower() for p in usual if p.default is p.empty]
    if len(needed) == 3:
        a, b, c = needed
        if a[0] == "x" and c[0] in "wpt":
            return "gradient"
        if a[0] in "wpt" and b[0] == "x":
            return "loss_and_gradients"
        if name in NAMES:
            return name
    shown = ", ".join(p.name for p in usual)
    raise InputError(
        f"{path}: {name}({shown}) is neither gradient(X, y, W) nor"
        " loss_and_gradients(params, x, y); give it three such parameters"
    )


def _check_gradient(own: Own, kinds: tuple[str, str], draw: np.random.Generator) -> Report:
    x = draw.standard_normal((BATCH, INPUTS))
    y = draw.permutation(np.arange(BATCH) % 2).astype(float)
    weights = {
        "w_1": draw.standard_normal((INPUTS, HIDDEN)),
        "w_2": draw.standard_normal((HIDDEN, 1)),
    }

    def rows(y: np.ndarray, count: int = BATCH) -> list[Row]:
        found = _gradients(own, own(x[:count], y[:count], weights))
        right = gradient(x[:count], y[:count], weights)
        return compare(own.name, found, right, count, _bar(found))

    _choose(own, kinds, (x, y, weights))
    shapes = {(BATCH,): y, (BATCH, 1): y[:, None]}
    found = {shape: _attempt(partial(rows, of)) for shape, of in shapes.items()}
    right = [shape for shape in shapes if _right(found[shape])]
    judged = [shape for shape in shapes if not isinstance(found[shape], InputError)]
    if not judged:
        raise found[BATCH,]
    best = (right or judged)[0]
    notes = [f"note: wrong for y of shape {shape}" for shape in shapes if shape not in right]
    if not right:
        single = _attempt(partial(rows, shapes[best], 1))
        found[best] = _alone(found[best], single)
    title = f"{own.path}: {own.name}(X, y, W) against manualnn.coursework.gradient ({own.kind})"
    return Report(title, found[best], tuple(notes) if right else ())


def _check_loss(
    own: Own,
    kinds: tuple[str, str],
    example: Any,
    samples: int,
    draw: np.random.Generator,
    seed: int,
) -> Report:
    if callable(example):
        with _running(own.path):
            given = example()
        if not (isinstance(given, tuple) and len(given) == 3 and isinstance(given[0], dict)):
            raise InputError(f"{own.path}: example() must give (params, x, y), params a dict")
        kinds = ("torch",) * 2 if any(map(torch.is_tensor, given[0].values())) else kinds
        params, x, y = ({k: _double(v) for k, v in given[0].items()}, *map(_double, given[1:]))
        own.kind = kinds[0]
    else:
        shapes = {
            "w1": (INPUTS, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES), "b2": (CLASSES,)
        }  # fmt: skip
        params = {key: draw.standard_normal(shape) for key, shape in shapes.items()}
        x = draw.standard_normal((BATCH, INPUTS))
        y = draw.permutation(np.arange(BATCH) % CLASSES)
    try:
        _choose(own, kinds, (params, x, y))
    except InputError as error:
        what = "" if callable(example) else (
            f" (given w1 {shapes['w1']}, b1, w2, b2, x {x.shape} and class indices y {y.shape};"
            " define example() that returns (params, x, y) for others)"
        )  # fmt: skip
        raise InputError(f"{error}{what}") from None
    loss, found = _loss_and_gradients(own, own(params, x, y))
    if not math.isfinite(loss):
        raise InputError(f"{own.path}: {own.name} gives the loss {loss}")
    if _loss_and_gradients(own, own(params, x, y))[0] != loss:
        raise InputError(f"{own.path}: {own.name} gives another loss each time; fix its randomness")
    rows = _against_differences(own, params, x, y, samples, seed)
    single = isinstance(x, np.ndarray) and isinstance(y, np.ndarray) and len(x) == len(y) > 1
    if single and any(row.verdict == "wrong" for row in rows):
        alone = partial(_against_differences, own, params, x[:1], y[:1], samples, seed)
        rows = _alone(rows, _attempt(alone))
    notes = () if callable(example) else (_against_network(params, x, y, loss, found),)
    title = f"{own.path}: {own.name}(params, x, y) against differences of its loss ({own.kind})"
    return Report(title, rows, notes)


def _against_differences(
    own: Own, params: Arrays, x: Any, y: Any, samples: int, seed: int
) -> list[Row]:
    """The rows of each parameter, its gradient against differences of the function's own loss.

    Unlike the project's layers it does not say where its kinks are: at one, the slopes to both
    sides differ, or those of a large and a small step.
    """
    loss, found = _loss_and_gradients(own, own(params, x, y))
    exact = _bar(found) == BAR and float(np.float32(loss)) != loss
    bar, step, kink = (BAR, 1e-5, 0.01) if exact else (LOW_BAR, 1e-2, 0.1)
    right, noise, kinked = dict[str, np.ndarray](), dict[str, float](), dict[str, np.ndarray]()
    for number, (key, value) in enumerate(params.items()):
        chosen = np.arange(value.size)
        if 0 < samples < value.size:
            order = torch.randperm(value.size, generator=generator(seed, OWN_STREAM, number))
            chosen = np.sort(order[:samples].numpy())

        def slopes(h: float, key: str = key, chosen: np.ndarray = chosen) -> np.ndarray:
            found = []
            for k in chosen:
                moved = params[key].copy()
                moved.flat[k] += h
                above, _ = _loss_and_gradients(own, own({**params, key: moved}, x, y))
                found.append((above - loss) / (moved.flat[k] - params[key].flat[k]))
            return np.array(found)

        up, down = slopes(step), slopes(-step)
        mean = (up + down) / 2
        scale = np.abs(mean).max(initial=0.0)
        lost = np.finfo(np.float64).eps * abs(loss) / step  # by rounding the loss
        noise[key] = lost if exact else LOW_NOISE * scale
        at_kink = np.abs(up - down) > kink * scale + 20 * noise[key]
        if exact:
            nearer = (slopes(step / 10) + slopes(-step / 10)) / 2
            bound = BAR * np.maximum(np.abs(mean), FLOOR * scale) + 20 * lost
            at_kink |= np.abs(mean - nearer) > bound
        right[key] = _placed(mean, chosen, value.shape)
        kinked[key] = _placed(at_kink, chosen, value.shape)
    batch = len(x) if isinstance(x, np.ndarray) and x.ndim else 1
    return compare(own.name, found, right, batch, bar, noise, kinked)


def compare(
    part: str,
    found: Arrays,
    right: Arrays,
    batch: int,
    bar: float,
    noise: dict[str, float] | None = None,
    kinked: Arrays | None = None,
) -> list[Row]:
    """A row for each gradient of `right`, nan where it is not known, and for what is too much."""
    rows = []
    clear = (
        right
        if kinked is None
        else {key: np.where(kinked[key] > 0, np.nan, values) for key, values in right.items()}
    )
    for key, wanted in right.items():
        row = Row(part, key, wanted.shape)
        own = found.get(key)
        if own is None:
            row = replace(row, how="missing")
        elif own.shape != wanted.shape:
            row = replace(row, how=_misshapen(own, wanted, batch, bar))
        else:
            known = np.isfinite(wanted).flatten().nonzero()[0]
            a, n = (torch.from_numpy(v.flatten()[known].astype(float)) for v in (own, wanted))
            lost = torch.full_like(n, (noise or {}).get(key, 0.0))
            at_kink = torch.zeros(len(n), dtype=torch.bool)
            if kinked:
                at_kink = torch.from_numpy(kinked[key].flatten()[known] > 0)
            row = judge(part, key, wanted.shape, torch.from_numpy(known), a, n, lost, at_kink, bar)
            if row.verdict == "wrong":
                row = replace(row, how=_how(key, own, clear, batch, bar))
        rows.append(row)
    how = f"not asked for: the keys are {', '.join(right)}"
    extra = [key for key in found if key not in right]
    return rows + [Row(part, str(key), (), how=how) for key in extra]


def _placed(values: np.ndarray, chosen: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values at the flat places `chosen` of an array that is nan elsewhere."""
    whole = np.full(math.prod(shape), np.nan)
    whole[chosen] = values
    return whole.reshape(shape)


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
    if bad := int((~np.isfinite(found)).sum()):
        return f"{bad} of {found.size} numbers are nan or infinite"
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
    wrong = known & (np.abs(found - wanted) > bar * np.nanmax(np.abs(wanted)))
    for axis, line in enumerate(("row", "column") if found.ndim == 2 else ("entry",)):
        other_axes = tuple(i for i in range(found.ndim) if i != axis)
        lines = wrong.any(axis=other_axes).nonzero()[0] if found.ndim <= 2 else []
        if 0 < len(lines) < found.shape[axis] / 2:
            plural = {"row": "rows", "column": "columns", "entry": "entries"}[line]
            return f"only {plural if len(lines) > 1 else line} {', '.join(map(str, lines))} wrong"
    return ""


def _times(factor: float, batch: int, bar: float) -> str:
    """What a constant factor says."""
    size = abs(factor)
    known = {
        1.0: "",
        float(batch): f"{batch} times too large, the batch size: 1/B is missing",
        1 / batch: f"{batch} times too small, the batch size: 1/B is there twice",
        2.0: "twice as large as it should be",
        0.5: "half as large as it should be",
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
            return (
                f"note: the loss is {many}that of the project's linear, {activation}, linear with"
                f" {name}; the gradients are {worst:.1e} from the project's, of the largest"
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


def _loss_and_gradients(own: Own, result: Any) -> tuple[float, Arrays]:
    if isinstance(result, tuple) and len(result) == 2:
        loss, found = result
        if np.size(loss) == 1 and not isinstance(loss, dict):
            return float(np.asarray(loss).item()), _gradients(own, found)
    raise InputError(f"{own.path}: {own.name} must give (loss, gradients): a number and a dict")


def _gradients(own: Own, found: Any) -> Arrays:
    """What the function gave, if that is a dict of arrays."""
    if not isinstance(found, dict):
        raise InputError(
            f"{own.path}: {own.name} gives a {type(found).__name__}, not a dict like"
            f" {own.arguments[2 if own.arguments[0] == 'X' else 0]}"
        )
    try:
        arrays = {key: np.asarray(value) for key, value in found.items()}
        return {k: v if v.dtype.kind == "f" else v.astype(float) for k, v in arrays.items()}
    except (TypeError, ValueError):
        raise InputError(f"{own.path}: {own.name} gives a dict of what are no arrays") from None


def _bar(found: Arrays) -> float:
    """What relative error is allowed: more where something was computed in float32."""
    return BAR if all(value.dtype.itemsize >= 8 for value in found.values()) else LOW_BAR


def _choose(own: Own, kinds: tuple[str, str], arguments: tuple[Any, ...]) -> None:
    """Let the function take the first of the kinds that it works with. Raises InputError."""
    errors = []
    for own.kind in kinds:
        found = _attempt(partial(own, *arguments))
        if not isinstance(found, InputError):
            return
        errors.append(found)
    raise errors[0]


def _attempt(call: Callable[[], Any]) -> Any:
    """What a call gives, or the InputError that it raises."""
    try:
        return call()
    except InputError as error:
        return error


def _right(rows: list[Row] | InputError) -> bool:
    return not isinstance(rows, InputError) and all(row.right for row in rows)


def _double(value: Any) -> Any:
    """An array or tensor as an array, numbers with a point in float64; others as they are."""
    value = _array(value)
    floating = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return value.astype(np.float64) if floating else value


def _array(value: Any) -> Any:
    """A tensor as an array, also one that autograd follows; others as they are."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _arrays(value: Any) -> Any:
    return {k: _array(v) for k, v in value.items()} if isinstance(value, dict) else _array(value)


def _convert(value: Any, kind: str) -> Any:
    """A copy of an array, or of each in a dict, as a tensor or an array."""
    if isinstance(value, dict):
        return {key: _convert(item, kind) for key, item in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value.copy()) if kind == "torch" else value.copy()


@contextmanager
def _running(path: Path) -> Iterator[None]:
    """Run code of the user's file: what it prints goes to stderr, what it raises is one line."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        at = f"{path}:{line}" if line else str(path)
        raise InputError(f"{at}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(folder)
