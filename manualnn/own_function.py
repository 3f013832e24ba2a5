"""A function in a file of the user's own: found, called with arrays, its results as arrays.

The file runs in this process, with what it prints on stderr.
"""

import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, hint

TARGET = re.compile(r"(.+\.py)(?::(\w+))?")
SIGNATURES = {"gradient": ("X", "y", "W"), "loss_and_gradients": ("params", "x", "y")}
Arrays = dict[str, np.ndarray]


@dataclass
class Own:
    """A function called `name` in `path`, with one of the known signatures.

    It is called with copies of arrays: as torch tensors where the file uses torch, else as NumPy
    arrays, and as another of the `kinds` if that fails. `changed` are the arguments that it wrote
    to, `content` all that the file defines.
    """

    path: Path
    name: str
    signature: str
    function: Callable[..., Any]
    kinds: tuple[str, ...]
    content: dict[str, Any]
    changed: dict[str, None] = field(default_factory=dict)

    def choose(self, *arguments: Any) -> None:
        """Keep to the first kind that the function works with. Raises InputError."""
        kinds, errors = self.kinds, []
        for kind in kinds:
            self.kinds = (kind,)
            found = attempt(lambda: self(*arguments))
            if not isinstance(found, InputError):
                return
            errors.append(found)
        self.kinds = kinds
        raise errors[0]

    def __call__(self, *arguments: Any) -> Any:
        """What it returns, tensors as arrays. Raises InputError with the line where it raises."""
        given = [_convert(value, self.kinds[0]) for value in arguments]
        with running(self.path):
            result = self.function(*given)
        for name, before, after in zip(SIGNATURES[self.signature], arguments, given, strict=True):
            pairs = {name: (before, after)}
            if isinstance(before, dict):
                pairs = {f"{name}[{k!r}]": (v, after.get(k)) for k, v in before.items()}
            for label, (old, new) in pairs.items():
                if not np.array_equal(as_array(_convert(old, self.kinds[0])), as_array(new)):
                    self.changed[label] = None
        return tuple(map(as_array, result)) if isinstance(result, tuple) else as_array(result)

    def gradients(self, *arguments: Any) -> Arrays:
        """The dict of arrays that it returns. Raises InputError where it is none."""
        return self._gradients(self(*arguments))

    def loss_and_gradients(self, *arguments: Any) -> tuple[float, Arrays]:
        """The number and the dict of arrays that it returns. Raises InputError."""
        result = self(*arguments)
        if isinstance(result, tuple) and len(result) == 2:
            loss, found = result
            if np.size(loss) == 1 and not isinstance(loss, dict):
                return float(np.asarray(loss).item()), self._gradients(found)
        raise InputError(
            f"{self.path}: {self.name} must give (loss, gradients), a number and a dict"
        )

    def _gradients(self, found: Any) -> Arrays:
        if not isinstance(found, dict):
            kind = type(found).__name__
            like = "W" if self.signature == "gradient" else "params"
            raise InputError(f"{self.path}: {self.name} gives a {kind}, not a dict like {like}")
        try:
            arrays = {key: np.asarray(value) for key, value in found.items()}
            return {k: v if v.dtype.kind == "f" else v.astype(float) for k, v in arrays.items()}
        except (TypeError, ValueError):
            raise InputError(
                f"{self.path}: {self.name} gives a dict of what are no arrays"
            ) from None


def is_function(name: str) -> bool:
    """Whether `name` is FILE.py or FILE.py:FUNCTION."""
    return TARGET.fullmatch(name) is not None


def load(name: str) -> Own:
    """The function that FILE.py:FUNCTION names, or the one of a known name in FILE.py. Runs the
    file. Raises InputError."""
    match = TARGET.fullmatch(name)
    path, wanted = (Path(match[1]), match[2]) if match else (Path(name), None)
    if match is None or not path.is_file():
        raise InputError(f"{path}: no such file; give FILE.py:FUNCTION")
    with running(path):
        content = runpy.run_path(str(path))
    wanted = wanted or next((known for known in SIGNATURES if known in content), "")
    if not callable(function := content.get(wanted)):
        functions = [key for key, value in content.items() if inspect.isfunction(value)]
        which = f"has no function {wanted!r}" if wanted else "has no function of a known name"
        advice = hint(wanted, functions) if functions else "it has none"
        raise InputError(f"{path}: {which}; {advice}")
    uses_torch = any(
        value is torch or str(getattr(value, "__module__", "")).startswith("torch")
        for value in content.values()
    )
    torches = ("torch", "torch in float32")  # the latter beside tensors of torch's default type
    kinds = (*torches, "numpy") if uses_torch else ("numpy", *torches)
    return Own(path, wanted, _signature(path, wanted, function), function, kinds, content)


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
        if name in SIGNATURES:
            return name
    shown = ", ".join(p.name for p in usual)
    raise InputError(
        f"{path}: {name}({shown}) is neither gradient(X, y, W) nor"
        " loss_and_gradients(params, x, y); give it three such parameters"
    )


def attempt(call: Callable[[], Any]) -> Any:
    """What a call gives, or the InputError that it raises."""
    try:
        return call()
    except InputError as error:
        return error


def as_array(value: Any) -> Any:
    """A tensor, or each in a dict, as an array, also one that autograd follows; others as they
    are."""
    if isinstance(value, dict):
        return {key: as_array(item) for key, item in value.items()}
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _convert(value: Any, kind: str) -> Any:
    """A copy of an array, or of each in a dict, as a tensor or an array."""
    if isinstance(value, dict):
        return {key: _convert(item, kind) for key, item in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    if kind == "numpy":
        return value.copy()
    tensor = torch.from_numpy(value.copy())
    return tensor.float() if kind != "torch" and tensor.is_floating_point() else tensor


@contextmanager
def running(path: Path) -> Iterator[None]:
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
