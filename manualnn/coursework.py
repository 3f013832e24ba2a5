"""The functions that assignments ask for by name.

Shapes: B samples, D features, K hidden units. The functions of logistic backpropagation take torch
tensors and give tensors, or NumPy arrays and lists and give arrays (a loss is then a float). `y`,
`y_hat` and `z_2` may be (B,), (B, 1) or one number; labels are 0 or 1. InputError, a ValueError,
where they are not, or where shapes do not fit.
"""

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .errors import InputError
from .evaluation import describe, evaluate_weights, summarise
from .network import Network


def evaluate_hw1(
    data_dir: Path | str | None = None,
    weights: Path | str | None = None,
    normalize: str | None = None,
    activation: str | None = None,
) -> float:
    """The accuracy in [0, 1] of a trained network over the MNIST test set.

    Without arguments both come with the package, so it works offline and from any folder; only
    `MANUALNN_DATA`, where it is set, comes before the bundled data.
    `data_dir` is another folder of idx files (torchvision's layout, or the files themselves, plain
    or .gz) with examples of the same size; `weights` another weights file or run folder.
    `normalize` and `activation` are those of `evaluate_weights`, for weights of other origin.
    Raises manualnn.InputError, a ValueError, when they cannot be read or do not fit together.
    """
    found = evaluate_weights(weights, data_dir=data_dir, normalize=normalize, activation=activation)
    return found.evaluation.accuracy


def _same_kind(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors take NumPy arrays, lists and numbers, and give arrays where it got
    any of these, a float for an array without dimensions."""

    def to_tensor(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, dict):
            return {key: to_tensor(item) for key, item in value.items()}
        try:  # a copy, as torch takes no array that is read backwards
            return torch.as_tensor(np.array(value, order="C"), device="cpu")
        except (TypeError, ValueError):
            raise InputError(f"no array of numbers: {type(value).__name__}") from None

    def to_array(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: to_array(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(to_array, value))
        return value.numpy() if value.dim() else value.item()

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        flat = [v for x in given for v in (x.values() if isinstance(x, dict) else [x])]
        result = function(*map(to_tensor, args), **{k: to_tensor(v) for k, v in kwargs.items()})
        return result if all(isinstance(x, Tensor) for x in flat) else to_array(result)

    return wrapped


@_same_kind
def predict(X: Tensor, W: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
    """z1 = X w_1 (B, K), z2 = s(z1) w_2 (B,), y_hat = s(z2) (B,), with s(z) = 1 / (1 + exp(-z)).

    X is (B, D), W {"w_1": (D, K), "w_2": (K, 1)}; there are no biases. Raises InputError, a
    ValueError, where the shapes do not fit.
    """
    _check_network(X, W)
    z1 = X @ W["w_1"]
    z2 = (_sigmoid(z1) @ W["w_2"]).squeeze(1)
    return z1, z2, _sigmoid(z2)


@_same_kind
def logistic_loss(y: Tensor, y_hat: Tensor) -> Tensor:
    """The average of -y log y_hat - (1 - y) log(1 - y_hat) over a batch, (): the textbook form.

    Where y_hat is 0 or 1 it is nan even if y is the same, as 0 log 0 is 0 * (-inf) in floating
    point; `stable_logistic_loss` has no such hole.
    """
    y, y_hat = _vectors(y, y_hat, "y_hat")
    return (-y * torch.log(y_hat) - (1 - y) * torch.log(1 - y_hat)).mean()


@_same_kind
def stable_logistic_loss(y: Tensor, z_2: Tensor) -> Tensor:
    """The same average from the logits z_2, (): that of max(m, 0) + log(1 + exp(-|m|)) with m = z
    where y = 0 and m = -z where y = 1.

    From y_hat = s(z) it follows by log s(z) = -log(1 + exp(-z)) and log(1 - s(z)) = log s(-z),
    written so that exp never overflows and an infinite z gives 0 or inf.
    """
    y, z = _vectors(y, z_2, "z_2")
    m = (1 - 2 * y) * z
    return (m.clamp(min=0) + torch.log1p(torch.exp(-m.abs()))).mean()


@_same_kind
def gradient(X: Tensor, y: Tensor, W: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: N803
    """The gradient of the average logistic loss with respect to each of W, a dict like W.

    With h = s(z1): dz2 = (y_hat - y) / B, dw_2 = h^T dz2, dh = dz2 w_2^T, dz1 = dh h (1 - h),
    dw_1 = X^T dz1. The sigmoid cancels the loss's division by y_hat (1 - y_hat), so it is stable.
    """
    z1, z2, y_hat = predict(X, W)
    y, _ = _vectors(y, z2, "X")
    h = _sigmoid(z1)
    dz2 = ((y_hat - y) / len(X)).unsqueeze(1)
    dz1 = dz2 @ W["w_2"].T * h * (1 - h)
    return {"w_1": X.T @ dz1, "w_2": h.T @ dz2}


def count_parameters(of: Network | Config | dict[str, Any] | Path | str | Any) -> int:
    """How many numbers training changes, of one network: weights and biases.

    `of` is a Network, a Config whose runs agree, the dict that `torch.load` reads from a weights
    file, the path or shipped name of either, or anything with `parameters()` as torch's modules
    have it. A known data set needs no files. Raises InputError, a ValueError, for anything else.
    """
    if isinstance(of, str | Path):
        return int(summarise(of)["parameters"])
    if isinstance(of, Network):
        return of.layout.count
    if isinstance(of, Config):
        counts = {p.replicas[0].label: describe(p).layout.count for p in of.populations()}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{label}: {count:,}" for label, count in counts.items())
            raise InputError(f"{of.name}: its runs differ ({each}); give one of config.members()")
        return next(iter(counts.values()))
    tensors: Any = of.values() if isinstance(of, dict) else getattr(of, "parameters", tuple)()
    sizes = [math.prod(t.shape) for t in tensors if isinstance(t, Tensor | np.ndarray)]
    if not sizes:
        raise InputError(f"no parameters in a {type(of).__name__}: give a network or its weights")
    return sum(sizes)


class RandomPermutation:
    """One fixed random order of an image's values, drawn once from torch's generator.

    Callable on a tensor of `num_features` elements, whose shape it keeps; so it can be the last of
    the transforms in torchvision's `Compose`. `reindex` (num_features,) says where each comes from.
    Raises InputError, a ValueError, on another number of elements.
    """

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features
        self.reindex = torch.randperm(num_features, device="cpu")

    def __call__(self, image: Tensor) -> Tensor:
        if image.numel() != self.num_features:
            raise InputError(
                f"RandomPermutation of {self.num_features} features got an image of shape"
                f" {tuple(image.shape)} with {image.numel()}"
            )
        return image.reshape(-1)[self.reindex.to(image.device)].view(image.shape)

    def __repr__(self) -> str:
        return f"RandomPermutation({self.num_features})"


def _sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))  # exp may overflow to inf, and 1 / inf = 0 is the limit


def _vectors(y: Tensor, other: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both as (B,) of floating-point numbers, so that (B,) against (B, 1) is never broadcast to
    (B, B). Raises InputError also where a label is neither 0 nor 1."""
    flat = []
    for label, tensor in (("y", y), (name, other)):
        if tensor.dim() > 2 or (tensor.dim() == 2 and tensor.shape[1] != 1):
            raise InputError(f"{label} must be (B,) or (B, 1), not {tuple(tensor.shape)}")
        flat.append(tensor.reshape(-1))
    y, other = flat
    if y.shape != other.shape:
        raise InputError(f"y has {y.numel()} values, {name} has {other.numel()}")
    if not len(y):
        raise InputError("y is empty: a batch without samples has no average")
    if len(wrong := y[(y != 0) & (y != 1)]):
        raise InputError(f"y holds {wrong[0].item():g}: labels are 0 or 1")
    if not other.is_floating_point():
        other = other.double()
    return y.to(other.dtype), other


def _check_network(x: Tensor, weights: dict[str, Tensor]) -> None:
    if set(weights) != {"w_1", "w_2"}:
        raise InputError(f"W needs the keys w_1 and w_2, not {', '.join(map(str, weights))}")
    w_1, w_2 = weights["w_1"], weights["w_2"]
    fits = x.dim() == w_1.dim() == w_2.dim() == 2 and x.shape[1] == len(w_1)
    if not fits or w_2.shape != (w_1.shape[1], 1):
        raise InputError(
            f"X {tuple(x.shape)}, w_1 {tuple(w_1.shape)} and w_2 {tuple(w_2.shape)} should be"
            " (B, D), (D, K) and (K, 1)"
        )
