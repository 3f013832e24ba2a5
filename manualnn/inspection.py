"""What a weights file, a checkpoint or any pickle holds, told without executing any of it."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import InputError
from .find import find_weights
from .network import to_weights
from .safe import read_file, read_tensors, scan, shown

CHUNK = 2**20  # numbers looked at at a time
FOLDER = ("weights.pkl", "checkpoint.pt")


def inspect(name: Path | str) -> dict[str, Any]:
    """What a file holds (a path, a run folder, or the name of shipped weights).

    `kind` is "weights", "checkpoint", "tensors", "pickle" or "other"; `globals` are the names that
    its pickle asks for, each with whether it is `safe`; `problem` says why it is not read here, and
    is empty where it is: then `tensors` has a dict for each tensor, `network` what weights are of,
    `checkpoint` how far a training was, `meta` what else there is. Raises InputError where the file
    is missing or damaged.
    """
    path = _file(Path(name))
    data = read_file(path)
    found = scan(path, content=data)
    unsafe = set(found.unsafe)
    digest = hashlib.sha256(data).hexdigest()
    report: dict[str, Any] = {
        "file": str(path),
        "kind": "other" if found.format else "pickle",
        "bytes": found.size,
        "sha256": digest,
        "globals": [{"name": name, "safe": name not in unsafe} for name in found.globals],
        "problem": found.problem,
        "tensors": [],
        "network": None,
        "checkpoint": None,
        "meta": {},
    }
    if unsafe:
        report["problem"] = f"it would execute code where it is unpickled: {', '.join(unsafe)}"
    if report["problem"]:
        return report
    content = read_tensors(path, "file of torch.save", data)
    report["kind"] = "tensors"
    report["tensors"] = [_describe(name, tensor) for name, tensor in _tensors(content, "")]
    plain = content if isinstance(content, dict) else {"content": content}
    report["meta"] = {str(key): _brief(value) for key, value in plain.items() if _is_other(value)}
    theta, epoch = _find(content, "theta"), _find(content, "epoch")
    if isinstance(theta, Tensor) and isinstance(epoch, int):
        report["kind"] = "checkpoint"
        step = _find(content, "step_number")
        report["checkpoint"] = {"epoch": epoch, "step": step, "networks": len(theta)}
        return report
    try:
        loaded = to_weights(content, path, len(data))
    except InputError as error:
        report["network"] = {"problem": str(error).removeprefix(f"{path}: ")}
        return report
    network = loaded.network
    report |= {"kind": "weights", "meta": {} if loaded.foreign else loaded.meta}
    report["network"] = {
        "input_shape": list(network.shape),
        "layers": network.summary(),
        "classes": network.classes,
        "parameters": network.layout.count,
        "foreign": loaded.foreign,
    }
    return report


def lines(report: dict[str, Any]) -> Iterator[str]:
    """A report for a reader; what comes from the file is cut and escaped."""
    yield f"{shown(report['file'])}: {report['kind']}, {report['bytes']:,} bytes"
    yield f"{'sha256':<15}{report['sha256']}"
    for number, named in enumerate(report["globals"]):
        mark = "" if named["safe"] else "  UNSAFE"
        yield f"{'asks for' if not number else '':<15}{shown(named['name'])}{mark}"
    if report["problem"]:
        yield f"{'not read':<15}{shown(report['problem'])}"
        if any(named["name"] == "torch.storage._load_from_bytes" for named in report["globals"]):
            yield "as pickle.dump writes tensors; where it is trusted, torch.save it anew"
        return
    rows = [_row(tensor) for tensor in report["tensors"]]
    if rows:
        rows.insert(0, ["tensor", "shape", "type", "min", "max", "mean", ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield ""
        for row in rows:
            cells = zip(row, widths, strict=True)
            yield "  ".join(f"{cell:<{width}}" for cell, width in cells).rstrip()
        yield ""
    if network := report["network"]:
        what = shown(network["problem"]) if "problem" in network else _name(network)
        yield f"{'network':<15}{what}"
        if network.get("foreign"):
            yield "of other origin: the layers between its matrices are a guess"
    for key, value in (report["checkpoint"] or {}).items():
        yield f"{key:<15}{shown(str(value))}"
    for key, value in report["meta"].items():
        if key not in ("layers", "shape"):
            yield f"{shown(key):<15}{shown(str(value))}"


def _file(path: Path) -> Path:
    """The file that is meant: of a run folder its weights, else its checkpoint."""
    if not path.is_dir():
        return path if path.exists() else find_weights(path)
    inside = [path / name for name in FOLDER if (path / name).is_file()]
    if not inside:
        raise InputError(f"{path}: a folder without {' or '.join(FOLDER)}")
    return inside[0]


def _tensors(content: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers, by the dotted path to each."""
    if isinstance(content, Tensor):
        yield name, content.detach()
    elif isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _describe(name: str, tensor: Tensor) -> dict[str, Any]:
    """Shape, type and range of a tensor; `nan` and `inf` count what is not finite, and the rest is
    about the others."""
    report: dict[str, Any] = {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        **dict.fromkeys(("min", "max", "mean")),
        **dict.fromkeys(("nan", "inf"), 0),
    }
    low, high, total, count = math.inf, -math.inf, 0.0, 0
    for part in () if tensor.is_complex() else tensor.reshape(-1).split(CHUNK):
        values = part.double()
        if not (finite := values.isfinite()).all():
            report["nan"] += int(values.isnan().sum())
            report["inf"] += int(values.isinf().sum())
            values = values[finite]
        if len(values):
            low, high = min(low, float(values.amin())), max(high, float(values.amax()))
            total, count = total + float(values.sum()), count + len(values)
    return report | ({"min": low, "max": high, "mean": total / count} if count else {})


def _row(tensor: dict[str, Any]) -> list[str]:
    strange = [f"{tensor[kind]:,} {kind}" for kind in ("nan", "inf") if tensor[kind]]
    figures = [
        "" if tensor[key] is None else f"{tensor[key]:.4g}" for key in ("min", "max", "mean")
    ]
    shape = " x ".join(map(str, tensor["shape"])) or "one number"
    return [shown(tensor["name"]), shape, tensor["dtype"], *figures, ", ".join(strange)]


def _name(network: dict[str, Any]) -> str:
    """A network in one line: its layers with the shape that each gives."""
    shape = " x ".join(map(str, network["input_shape"]))
    layers = [
        f"{layer['name']} {' x '.join(map(str, layer['output_shape']))}"
        if layer["parameters"]
        else layer["name"]
        for layer in network["layers"]
    ]
    return f"input {shape}, {', '.join(layers)}; {network['parameters']:,} parameters"


def _is_other(value: Any) -> bool:
    """Whether a value is no tensor and no container of tensors."""
    return not isinstance(value, Tensor) and not any(_tensors(value, "x"))


def _brief(value: Any) -> Any:
    return value if isinstance(value, int | float | None) else shown(str(value))


def _find(content: Any, key: str) -> Any:
    """The value of a key in nested dicts, the nearest to the root first."""
    level = [content]
    while level:
        dicts = [item for item in level if isinstance(item, dict)]
        for item in dicts:
            if key in item:
                return item[key]
        level = [value for item in dicts for value in item.values()]
    return None
