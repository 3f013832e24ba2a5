"""The same networks and losses in torch.nn and autograd: what the hand-derived ones must equal."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def forward(specs: Sequence[Sequence[Any]], params: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    """Logits (B, K) of one network, differentiable. `params` has an entry for each layer."""
    for spec, named in zip(specs, params, strict=True):
        name = spec[0]
        if name == "linear":
            x = functional.linear(x, named["weight"].T, named["bias"])
        elif name == "flatten":
            x = torch.flatten(x, 1)
        elif name == "conv2d":
            options = spec[3] if len(spec) == 4 else {}
            x = functional.conv2d(x, named["weight"], named["bias"], **options)
        elif name == "max_pool2d":
            x = functional.max_pool2d(x, spec[1])
        elif name == "dropout":
            continue
        else:
            x = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[name](x)
    return x


def loss(name: str, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The scalar loss of logits (B, K) and class indices (B,)."""
    if name == "logistic":
        y = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits[:, 0], y)
    if name == "cross_entropy":
        return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    t = functional.one_hot(targets, logits.shape[1]).to(logits.dtype)
    t = t * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    outputs = torch.softmax(logits, 1) if name == "softmax_squared_error" else logits
    return functional.mse_loss(outputs, t)
