"""What ails a training, looked at once per epoch: gradients, dead units, the loss, the inputs.

Shapes: R replicas, N samples looked at, K classes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .data import Streamed
from .layers import ReLU
from .losses import Loss
from .network import Network
from .parameters import Slot, Views
from .workspace import Workspace

SAMPLES = 256  # looked at; between two looks so many times more are trained on:
EVERY = 128
EXPLODING = 50.0  # norm of a layer's gradient over its weights', or of these over the initial ones'
VANISHING = 1e-3  # gradient per weight, a layer's over the strongest one's
DEAD = 0.5  # share of a layer's units
STUCK = 0.01  # relative distance of the loss from that of a guess
FALLING = 0.002  # relative fall from one look to the next

Finding = tuple[int, str, str]  # replica, what ails it and where, the line


@torch.inference_mode()
def diagnose(
    network: Network,
    grads: list[Views],
    initial: Tensor,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    workspace: Workspace,
) -> list[Finding]:
    """Exploding and vanishing gradients of the loss on x (N, ...) and y (R or 1, N), which
    overwrite `grads`; weights far above their `initial` norms; ReLUs that are 0 on all of x."""
    workspace.begin(("diagnose", network.replicas, len(x)))
    logits, caches = network.forward(x.expand(network.replicas, *x.shape), workspace)
    dlogits = loss.gradient(logits, y, workspace)
    network.backward(dlogits, caches, grads, workspace)
    return [*_gradients(network, grads, initial), *_dead_units(network, caches)]


@torch.inference_mode()
def norms(network: Network, views: list[Views]) -> Tensor:
    """Euclidean norm of each weight tensor in `views`, (tensors, R)."""
    weights = [views[slot.layer]["weight"].flatten(1) for slot in _weights(network)]
    return torch.stack([(weight * weight).sum(1) for weight in weights]).sqrt_()


def constant(x: Tensor | Streamed) -> bool:
    """Whether all examples of x (N, ...) are the same."""
    first = x[:1]
    return len(x) > 1 and all(bool((part == first).all()) for part in x.split(SAMPLES))


def guess_loss(loss: str, classes: int, outputs: int = 0) -> tuple[float, str]:
    """The least expected loss of a guess that looks at no input, where each of `classes` is equally
    likely: that of giving each the same probability, and none to other `outputs`. And its name."""
    if loss in ("squared_error", "softmax_squared_error"):
        outputs = max(classes, outputs)
        return (1 - 1 / classes) / outputs, f"(1 - 1/{classes})/{outputs}"
    return math.log(classes), f"ln {classes}"


def stuck(losses: tuple[float, float], guess: tuple[float, str], corrupted: bool) -> str | None:
    """The line, where the mean losses of two looks are both that of a guess and do not fall."""
    (before, now), (value, written) = losses, guess
    near = all(abs(loss - value) < STUCK * value for loss in losses)
    if not near or before - now > FALLING * value:
        return None
    remedy = "" if corrupted else ", and check that the labels belong to the inputs"
    return (
        f"the loss stays at {written} = {value:.4f}, as of a guess: change"
        f" train.optimizer.learning_rate{remedy}"
    )


def _gradients(network: Network, grads: list[Views], initial: Tensor) -> list[Finding]:
    """Of each replica the layer that exploded most, and the one whose gradient vanished most."""
    keys = list(_weights(network).values())
    weights, gradients = norms(network, network.params), norms(network, grads)
    sizes = (
        torch.tensor([slot.size for slot in _weights(network)], device="cpu").to(weights).sqrt_()
    )
    per_weight = gradients / sizes.unsqueeze(1)
    found = []
    for ratio, what in (
        (gradients / weights, "the gradient of {} is {:.3g} times as large as {}"),
        (weights / initial, "{} is {:.3g} times as large as at the start"),
    ):
        worst, layers = (tensor.tolist() for tensor in ratio.max(0))
        for r, (value, layer) in enumerate(zip(worst, layers, strict=True)):
            if value > EXPLODING:
                text = what.format(keys[layer], value, keys[layer])
                remedy = "lower train.optimizer.learning_rate, or set data.normalize"
                found.append((r, "exploding", f"exploding gradients: {text}; {remedy}"))
    worst, layers = (t.tolist() for t in (per_weight / per_weight.amax(0)).min(0))
    for r, (value, layer) in enumerate(zip(worst, layers, strict=True)):
        if value < VANISHING:
            text = (
                f"vanishing gradients: a weight of {keys[layer]} has {value:.1e} of the gradient in"
                " the strongest layer; use relu, fewer layers, or another model.init"
            )
            found.append((r, "vanishing", text))
    return found


def _dead_units(network: Network, caches: list[Any]) -> list[Finding]:
    keys = {slot.layer: key for slot, key in _weights(network).items()}
    found, after = [], ""
    for i, (layer, y) in enumerate(zip(network.layers, caches, strict=True)):
        after = keys.get(i, after)
        if not isinstance(layer, ReLU):
            continue
        units, samples = y.shape[-1], y.shape[1]  # of images (R, B, H, W, C) the channels
        active = y.flatten(1, -2).amax(1)
        for r, count in enumerate((active == 0).sum(1).tolist()):
            if count > DEAD * units:
                text = (
                    f"dead ReLUs after {after}: {count} of {units} units are 0 on all of"
                    f" {samples} samples and learn nothing from them; lower"
                    " train.optimizer.learning_rate"
                )
                found.append((r, f"dead {after}", text))
    return found


def _weights(network: Network) -> dict[Slot, str]:
    """The slots of the weights, in order, and their names in a weights file."""
    layout = network.layout
    named = zip(layout.slots, layout.keys(), strict=True)
    return {slot: key for slot, key in named if slot.name == "weight"}
