"""Optimizers, penalties and learning-rate schedules on flat tensors.

Every hyperparameter is a column (R, 1), so that R networks with different values train as one.
`theta` and `grad` are (R, P). State lives in equally shaped buffers, in `state`.
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """`step` changes `theta` in place and may use `grad` as scratch. `prepare` goes before it with
    the number t of the step, from 1: what depends on t, it writes to where `step` reads it."""

    state: dict[str, Tensor]

    def prepare(self, learning_rate: Tensor, t: int) -> None: ...

    def step(self, theta: Tensor, grad: Tensor, learning_rate: Tensor) -> None: ...


class SGD:
    """v = momentum v + g;  theta -= learning_rate d, where d = v, or g + momentum v with Nesterov.

    Sutskever et al. 2013 in the form of torch.optim.SGD (no dampening). Without `momentum` d = g
    and no velocity is kept.
    """

    def __init__(self, theta: Tensor, momentum: Tensor | None, nesterov: bool = False) -> None:
        self.momentum = momentum
        self.nesterov = nesterov
        self.state = {} if momentum is None else {"velocity": torch.zeros_like(theta)}

    def prepare(self, learning_rate: Tensor, t: int) -> None:
        pass

    def step(self, theta: Tensor, grad: Tensor, learning_rate: Tensor) -> None:
        direction = grad
        if self.momentum is not None:
            velocity = self.state["velocity"]
            torch.addcmul(grad, velocity, self.momentum, out=velocity)
            direction = grad.addcmul_(velocity, self.momentum) if self.nesterov else velocity
        theta.addcmul_(direction, learning_rate, value=-1)


class Adam:
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
    theta -= learning_rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

    Kingma and Ba 2015, algorithm 1. With `decay` (R, P) it is AdamW (Loshchilov and Hutter 2019):
    theta *= 1 - learning_rate decay comes first and the gradient carries no L2 penalty.
    """

    def __init__(
        self,
        theta: Tensor,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        decay: Tensor | None = None,
    ) -> None:
        self.beta1, self.beta2, self.epsilon, self.decay = beta1, beta2, epsilon, decay
        self.state = {
            "first_moment": torch.zeros_like(theta),
            "second_moment": torch.zeros_like(theta),
        }
        self._decayed = None if decay is None else torch.empty_like(theta)
        self._slope = theta.new_empty(len(theta), 1)
        self._floor = theta.new_empty(len(theta), 1)
        # Times 1 - beta2 still above what counts as 0.
        self._tiny = theta.new_tensor(torch.finfo(theta.dtype).tiny * 1e4 / (1 - beta2))

    def prepare(self, learning_rate: Tensor, t: int) -> None:
        # Rate and denominator in one: floor + slope sqrt(v), infinite where the rate is 0.
        unbias = 1 - self.beta1**t
        torch.div(unbias * self.epsilon, learning_rate, out=self._floor)
        torch.div(unbias / math.sqrt(1 - self.beta2**t), learning_rate, out=self._slope)
        self._slope.clamp_(max=1e18)

    def step(self, theta: Tensor, grad: Tensor, learning_rate: Tensor) -> None:
        m, v = self.state["first_moment"], self.state["second_moment"]
        if self.decay is not None and self._decayed is not None:
            torch.mul(self.decay, learning_rate, out=self._decayed)
            theta.addcmul_(theta, self._decayed, value=-1)
        m.lerp_(grad, 1 - self.beta1)
        v.lerp_(self._tiny, 1 - self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        # sqrt(v) = v / sqrt(v) with a v never 0, where torch's sqrt takes five times as long.
        root = torch.rsqrt(v, out=grad).mul_(self._slope)
        denominator = torch.addcmul(self._floor, root, v, out=root)
        theta.addcdiv_(m, denominator, value=-1)


class Penalty:
    """L2 adds l2 w and L1 adds l1 sign(w) to the gradient of the weights w; biases are exempt.

    L2 is torch's `weight_decay`: the gradient of l2/2 |w|^2. `l1` and `l2` are (R, 1), `mask` is
    (P,), 1 for weights.
    """

    def __init__(self, l1: Tensor, l2: Tensor, mask: Tensor) -> None:
        self.l1 = l1 * mask if bool((l1 != 0).any()) else None
        self.l2 = l2 * mask if bool((l2 != 0).any()) else None
        self._scratch = None if self.l1 is None else torch.empty_like(self.l1)

    def add(self, theta: Tensor, grad: Tensor) -> None:
        """Add the penalties' gradient at `theta` to `grad`."""
        if self.l2 is not None:
            grad.addcmul_(theta, self.l2)
        if self.l1 is not None and self._scratch is not None:
            grad.addcmul_(torch.sign(theta, out=self._scratch), self.l1)


def schedule(
    name: str,
    step: int,
    total_steps: int,
    *,
    steps_per_epoch: int,
    warmup_steps: int = 0,
    step_epochs: int = 10,
    gamma: float = 0.1,
    initial_fraction: float = 0.04,
    final_fraction: float = 0.0,
    peak: float = 0.3,
) -> float:
    """The fraction of the base learning rate that step `step` (from 0) of `total_steps` uses.

    constant: 1. step: `gamma` to the power of the epochs gone over `step_epochs`. linear, cosine:
    from 1 to `final_fraction` on a line or half a cosine (Loshchilov and Hutter 2017). one_cycle:
    half a cosine from `initial_fraction` up to 1 at `peak` of the steps, another down to
    `final_fraction` (Smith and Topin 2018). `warmup_steps` rise on a line to 1 first; in one_cycle
    they are the length of the rise.
    """
    last = total_steps - 1
    if name == "one_cycle":
        top = warmup_steps or peak * last
        if step < top:
            return _cosine(initial_fraction, 1.0, step / top)
        return _cosine(1.0, final_fraction, (step - top) / (last - top) if last > top else 0.0)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(last - warmup_steps, 1)
    if name == "step":
        return gamma ** (step // steps_per_epoch // step_epochs)
    if name == "linear":
        return 1 + (final_fraction - 1) * done
    if name == "cosine":
        return _cosine(1.0, final_fraction, done)
    assert name == "constant", name
    return 1.0


SCHEDULES = ("constant", "step", "linear", "cosine", "one_cycle")


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
