"""Losses: of logits and targets each replica's `value` (R,) and the `gradient` at the logits.

Softmax and sigmoid are fused into their losses, so that nothing overflows. Targets are class
indices. `count` is the number of samples of the global batch, the divisor (default B). Called, a
loss gives both; a training step needs only the gradient, evaluation only the value.

Label smoothing e (Szegedy et al. 2016) replaces the one-hot target t by (1 - e) t + e / K in the
gradient. The value is always the one against the true t: like a penalty, smoothing changes what is
learned, not what is reported, so training and evaluation stay comparable.

Shapes: R replicas, B samples, K outputs; logits (R, B, K), targets (R, B) or (1, B) int64.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from .workspace import Workspace

LOG2_E = 1 / math.log(2)


class Loss(Protocol):
    """What every loss offers; see the module's docstring."""

    def value(
        self, logits: Tensor, targets: Tensor, workspace: Workspace, count: int | None = None
    ) -> Tensor: ...

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        workspace: Workspace,
        label_smoothing: float = 0.0,
        count: int | None = None,
    ) -> Tensor: ...

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        workspace: Workspace,
        label_smoothing: float = 0.0,
        count: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        return (
            self.value(logits, targets, workspace, count),
            self.gradient(logits, targets, workspace, label_smoothing, count),
        )


class CrossEntropy(Loss):
    """L = -1/B sum_bk t_bk log softmax(z)_bk;  dz = (softmax(z) - t) / B.

    The softmax Jacobian diag(p) - p p^T and the derivative -t/p of the logarithm cancel to p - t
    (Bishop 2006, eq. 4.109), as the targets of a sample sum to 1. log p = z' - log sum exp z' with
    z' = z - max z, whose largest exponent is 0.
    """

    def value(
        self, logits: Tensor, targets: Tensor, workspace: Workspace, count: int | None = None
    ) -> Tensor:
        shifted, _, total = _exponentials(logits, workspace)
        log_p = workspace.empty(total.shape)  # of the target
        torch.gather(shifted, 2, _index(targets, total), out=log_p).sub_(total.log_())
        return _total(log_p, workspace).div_(-(count or logits.shape[1]))

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        workspace: Workspace,
        label_smoothing: float = 0.0,
        count: int | None = None,
    ) -> Tensor:
        dlogits = _softmax(logits, workspace)
        _subtract_targets(dlogits, targets, label_smoothing)
        return dlogits.mul_(_number(1 / (count or logits.shape[1]), workspace))


class SquaredError(Loss):
    """Linear outputs against one-hot: L = 1/(B K) sum_bk (z_bk - t_bk)^2;  dz = 2 (z - t)/(B K)."""

    def value(
        self, logits: Tensor, targets: Tensor, workspace: Workspace, count: int | None = None
    ) -> Tensor:
        return _mean_square(_copy(logits, workspace), targets, workspace, count)

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        workspace: Workspace,
        label_smoothing: float = 0.0,
        count: int | None = None,
    ) -> Tensor:
        return _twice_mean(_copy(logits, workspace), targets, workspace, label_smoothing, count)


class SoftmaxSquaredError(Loss):
    """Softmax outputs p against one-hot: L = 1/(B K) sum_bk (p_bk - t_bk)^2.

    With g = dL/dp = 2 (p - t) / (B K) and dp_k/dz_j = p_k (delta_kj - p_j), the full Jacobian:
    dz_j = p_j (g_j - sum_k g_k p_k).
    """

    def value(
        self, logits: Tensor, targets: Tensor, workspace: Workspace, count: int | None = None
    ) -> Tensor:
        return _mean_square(_softmax(logits, workspace), targets, workspace, count)

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        workspace: Workspace,
        label_smoothing: float = 0.0,
        count: int | None = None,
    ) -> Tensor:
        p = _softmax(logits, workspace)
        g = _twice_mean(_copy(p, workspace), targets, workspace, label_smoothing, count)
        products = torch.mul(g, p, out=workspace.empty(p.shape))
        inner = torch.sum(products, -1, keepdim=True, out=workspace.empty((*p.shape[:2], 1)))
        return g.sub_(inner).mul_(p)


class Logistic(Loss):
    """Binary, one logit z (K = 1), y in {0, 1}: L = 1/B sum_b max(z, 0) - z y + log(1 + exp(-|z|)).

    That is -y log s - (1 - y) log(1 - s) with s = 1 / (1 + exp(-z)), exact for any z;
    dz = (s - y) / B.
    """

    def value(
        self, logits: Tensor, targets: Tensor, workspace: Workspace, count: int | None = None
    ) -> Tensor:
        y = workspace.empty(logits.shape).copy_(targets.unsqueeze(-1))
        terms = torch.abs(logits, out=workspace.empty(logits.shape)).neg_().exp_().log1p_()
        terms.addcmul_(logits, y, value=-1)
        terms.add_(torch.clamp(logits, min=0, out=y))
        return _total(terms, workspace).div_(count or logits.shape[1])

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        workspace: Workspace,
        label_smoothing: float = 0.0,
        count: int | None = None,
    ) -> Tensor:
        y = workspace.empty(logits.shape).copy_(targets.unsqueeze(-1))
        s = torch.neg(logits, out=workspace.empty(logits.shape)).exp_().add_(1).reciprocal_()
        y.mul_(1 - label_smoothing).add_(label_smoothing / 2)  # K = 2 classes here
        return s.sub_(y).div_(count or logits.shape[1])


LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "squared_error": SquaredError(),
    "softmax_squared_error": SoftmaxSquaredError(),
    "logistic": Logistic(),
}


def outputs(loss: str, classes: int) -> int:
    """How many outputs a network needs to tell `classes` classes apart under a loss."""
    return 1 if loss == "logistic" else classes


def decide(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The predicted class of each sample, (..., K) to (...): the largest logit; z > 0 for one."""
    if out is None:
        out = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if logits.shape[-1] == 1:
        return torch.gt(logits[..., 0], 0, out=out)
    return torch.argmax(logits, -1, out=out)


def hits(logits: Tensor, targets: Tensor, workspace: Workspace) -> Tensor:
    """How many predictions of each replica are right, (R,) int64."""
    shape = logits.shape[:2]
    # Narrow logits lie class by class, which argmax is slow on.
    rows = workspace.empty((len(logits), logits[0].numel())).view(logits.shape).copy_(logits)
    decided = decide(rows, workspace.empty(shape, torch.int64))
    right = torch.eq(decided, targets, out=workspace.empty(shape, torch.bool))
    return torch.sum(right, 1, out=workspace.empty(shape[:1], torch.int64))


def probabilities(logits: Tensor) -> Tensor:
    """softmax of logits (..., K), or sigmoid as (1 - s, s) where K = 1; rows sum to 1."""
    if logits.shape[-1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], -1)
    p = (logits - logits.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))


def _total(terms: Tensor, workspace: Workspace) -> Tensor:
    """(R, B, K) to (R,), in two sums: their order then does not depend on R."""
    rows = torch.sum(terms, -1, out=workspace.empty(terms.shape[:2]))
    return torch.sum(rows, -1, out=workspace.empty(terms.shape[:1]))


def _index(targets: Tensor, like: Tensor) -> Tensor:
    """targets (R or 1, B) as indices (R, B, 1) into the classes of `like` (R, B, K)."""
    return targets.unsqueeze(-1).expand(*like.shape[:2], 1)


def _number(value: float, workspace: Workspace) -> Tensor:
    """A constant as a tensor (): an operation with one takes half the time of one with a float."""
    return workspace.constant(
        value, lambda: torch.tensor(value, dtype=workspace.dtype, device="cpu")
    )


def _subtract_targets(x: Tensor, targets: Tensor, smoothing: float = 0.0) -> None:
    """x - t in place, with t smoothed; t itself is not made."""
    if smoothing:
        x.sub_(smoothing / x.shape[2])
    x.scatter_(2, _index(targets, x), smoothing - 1, reduce="add")


def _copy(x: Tensor, workspace: Workspace) -> Tensor:
    return workspace.empty(x.shape).copy_(x)


def _mean_square(x: Tensor, targets: Tensor, workspace: Workspace, count: int | None) -> Tensor:
    """1/(B K) sum_bk (x_bk - t_bk)^2 of each replica; x is overwritten."""
    _subtract_targets(x, targets)
    divisor = (count or x.shape[1]) * x.shape[2]
    return _total(x.mul_(x), workspace).div_(divisor)


def _twice_mean(
    x: Tensor, targets: Tensor, workspace: Workspace, smoothing: float, count: int | None
) -> Tensor:
    """The derivative of `_mean_square`, 2 (x - t) / (B K), in place."""
    _subtract_targets(x, targets, smoothing)
    divisor = (count or x.shape[1]) * x.shape[2]
    return x.mul_(_number(2 / divisor, workspace))


def _exponentials(logits: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """z' = z - max z, exp z', and its sum over the classes, (R, B, 1)."""
    total = torch.amax(logits, -1, keepdim=True, out=workspace.empty((*logits.shape[:2], 1)))
    shifted = torch.sub(logits, total, out=workspace.empty(logits.shape))
    # As a power of 2: torch's exp has one thread, and a slow path for numbers far below 0.
    exponentials = torch.mul(shifted, _number(LOG2_E, workspace), out=workspace.empty(logits.shape))
    exponentials.exp2_()
    return shifted, exponentials, torch.sum(exponentials, -1, keepdim=True, out=total)


def _softmax(logits: Tensor, workspace: Workspace) -> Tensor:
    """p = exp z' / sum exp z'."""
    _, p, total = _exponentials(logits, workspace)
    return p.div_(total)
