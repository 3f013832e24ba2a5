"""Losses: from logits and targets to each replica's loss and the gradient at the logits, together.

Softmax and sigmoid are fused into their losses, so that nothing overflows. Every loss is called as
`loss(logits, targets, workspace, label_smoothing=0, count=None)` and gives `loss (R,), dlogits
(R, B, K)`; targets are class indices. `count` is the number of samples of the global batch, the
divisor (default B).

Label smoothing e (Szegedy et al. 2016) replaces the one-hot target t by (1 - e) t + e / K in the
gradient. The loss that is returned is always the one against the true t: like a penalty, smoothing
changes what is learned, not what is reported, so training and evaluation stay comparable.

Shapes: R replicas, B samples, K outputs; logits (R, B, K), targets (R, B) or (1, B) int64.
"""

from typing import Protocol

import torch
from torch import Tensor

from .workspace import Workspace


class Loss(Protocol):
    """The signature of every loss; see the module's docstring."""

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        workspace: Workspace,
        label_smoothing: float = 0.0,
        count: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    workspace: Workspace,
    label_smoothing: float = 0.0,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """L = -1/B sum_bk t_bk log softmax(z)_bk;  dz = (softmax(z) - t) / B.

    The softmax Jacobian diag(p) - p p^T and the derivative -t/p of the logarithm cancel to p - t
    (Bishop 2006, eq. 4.109), as the targets of a sample sum to 1.
    """
    t = _one_hot(logits, targets, workspace)
    log_p, p = _log_softmax(logits, workspace)
    count = count or logits.shape[1]
    loss = _total(log_p.mul_(t), workspace).div_(-count)
    return loss, p.sub_(_smooth(t, label_smoothing)).div_(count)


def squared_error(
    logits: Tensor,
    targets: Tensor,
    workspace: Workspace,
    label_smoothing: float = 0.0,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear outputs against one-hot: L = 1/(B K) sum_bk (z_bk - t_bk)^2;  dz = 2 (z - t)/(B K)."""
    t = _one_hot(logits, targets, workspace)
    divisor = (count or logits.shape[1]) * logits.shape[2]
    difference = torch.sub(logits, t, out=workspace.empty(logits.shape))
    loss = _total(difference.mul_(difference), workspace).div_(divisor)
    dlogits = torch.sub(logits, _smooth(t, label_smoothing), out=difference)
    return loss, dlogits.mul_(2 / divisor)


def softmax_squared_error(
    logits: Tensor,
    targets: Tensor,
    workspace: Workspace,
    label_smoothing: float = 0.0,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax outputs p against one-hot: L = 1/(B K) sum_bk (p_bk - t_bk)^2.

    With g = dL/dp = 2 (p - t) / (B K) and dp_k/dz_j = p_k (delta_kj - p_j), the full Jacobian:
    dz_j = p_j (g_j - sum_k g_k p_k).
    """
    t = _one_hot(logits, targets, workspace)
    _, p = _log_softmax(logits, workspace)
    divisor = (count or logits.shape[1]) * logits.shape[2]
    products = torch.sub(p, t, out=workspace.empty(logits.shape))
    loss = _total(products.mul_(products), workspace).div_(divisor)
    g = torch.sub(p, _smooth(t, label_smoothing), out=t).mul_(2 / divisor)
    torch.mul(g, p, out=products)
    inner = torch.sum(products, -1, keepdim=True, out=workspace.empty((*logits.shape[:2], 1)))
    return loss, g.sub_(inner).mul_(p)


def logistic(
    logits: Tensor,
    targets: Tensor,
    workspace: Workspace,
    label_smoothing: float = 0.0,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary, one logit z (K = 1), y in {0, 1}: L = 1/B sum_b max(z, 0) - z y + log(1 + exp(-|z|)).

    That is -y log s - (1 - y) log(1 - s) with s = 1 / (1 + exp(-z)), exact for any z;
    dz = (s - y) / B.
    """
    count = count or logits.shape[1]
    y = workspace.empty(logits.shape).copy_(targets.unsqueeze(-1))
    terms = torch.abs(logits, out=workspace.empty(logits.shape)).neg_().exp_().log1p_()
    terms.addcmul_(logits, y, value=-1)
    terms.add_(torch.clamp(logits, min=0, out=workspace.empty(logits.shape)))
    s = torch.neg(logits, out=workspace.empty(logits.shape)).exp_().add_(1).reciprocal_()
    y.mul_(1 - label_smoothing).add_(label_smoothing / 2)  # K = 2 classes here
    return _total(terms, workspace).div_(count), s.sub_(y).div_(count)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "softmax_squared_error": softmax_squared_error,
    "logistic": logistic,
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
    decided = decide(logits, workspace.empty(shape, torch.int64))
    right = torch.eq(decided, targets, out=workspace.empty(shape, torch.bool))
    return torch.sum(right, 1, out=workspace.empty(shape[:1], torch.int64))


def probabilities(logits: Tensor) -> Tensor:
    """softmax of logits (..., K), or sigmoid as (1 - s, s) where K = 1; rows sum to 1."""
    if logits.shape[-1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], -1)
    p = (logits - logits.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))


def _one_hot(logits: Tensor, targets: Tensor, workspace: Workspace) -> Tensor:
    """t (R, B, K): 1 at the target, 0 elsewhere."""
    t = workspace.empty(logits.shape).zero_()
    return t.scatter_(2, targets.unsqueeze(-1).expand(*logits.shape[:2], 1), 1)


def _smooth(t: Tensor, smoothing: float) -> Tensor:
    """(1 - e) t + e / K, in place."""
    return t.mul_(1 - smoothing).add_(smoothing / t.shape[2]) if smoothing else t


def _total(terms: Tensor, workspace: Workspace) -> Tensor:
    """(R, B, K) to (R,), in two sums: their order then does not depend on R."""
    rows = torch.sum(terms, -1, out=workspace.empty(terms.shape[:2]))
    return torch.sum(rows, -1, out=workspace.empty(terms.shape[:1]))


def _log_softmax(logits: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """log p = z - max z - log sum exp(z - max z), and p. The shift makes the largest exponent 0."""
    top = torch.amax(logits, -1, keepdim=True, out=workspace.empty((*logits.shape[:2], 1)))
    log_p = torch.sub(logits, top, out=workspace.empty(logits.shape))
    p = torch.exp(log_p, out=workspace.empty(logits.shape))
    total = torch.sum(p, -1, keepdim=True, out=top)
    p.div_(total)
    return log_p.sub_(total.log_()), p
