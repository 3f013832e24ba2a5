"""Losses and their gradients at the logits against autograd, and at extreme logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn.losses import LOSSES, decide, outputs, probabilities
from manualnn.workspace import Workspace

from . import oracle


def both(name, logits, targets, smoothing=0.0):
    """(loss, dlogits) by hand, and by autograd for each replica."""
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    loss, dlogits = LOSSES[name](logits, targets, workspace, smoothing)
    expected, gradients = [], []
    for z, y in zip(logits, targets.expand(len(logits), -1), strict=True):
        leaf = z.clone().requires_grad_()
        oracle.loss(name, leaf, y, smoothing).backward()
        expected.append(oracle.loss(name, z, y))
        gradients.append(leaf.grad)
    return loss, dlogits, torch.stack(expected), torch.stack(gradients)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_equal_autograd(name, replicas, smoothing, differs):
    """With smoothing the gradient is the smoothed loss's; the loss that of the true labels."""
    draw = torch.Generator().manual_seed(1)
    k = outputs(name, 2 if name == "logistic" else 5)
    logits = torch.randn(replicas, 9, k, generator=draw, dtype=torch.float64) * 3
    targets = torch.randint(0, max(k, 2), (replicas, 9), generator=draw)
    loss, dlogits, expected, gradients = both(name, logits, targets, smoothing)
    label = f"loss {name}, R = {replicas}" + (", smoothed" if smoothing else "")
    differs(label, loss, expected)
    differs(label, dlogits, gradients)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([n for n in LOSSES if n != "logistic"]),
    replicas=st.integers(1, 3),
    batch=st.integers(1, 6),
    classes=st.integers(1, 6),
    scale=st.sampled_from([1e-6, 1.0, 100.0]),
)
def test_loss_and_gradient_for_any_shape(name, replicas, batch, classes, scale):
    logits = torch.randn(replicas, batch, classes, dtype=torch.float64) * scale
    targets = torch.randint(0, classes, (1, batch))  # shared by the replicas
    loss, dlogits, expected, gradients = both(name, logits, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dlogits, gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "softmax_squared_error", "logistic"])
@pytest.mark.parametrize("size", [1e3, 1e10])
def test_exact_at_huge_logits(name, size):
    z = [[size], [-size]] if name == "logistic" else [[size, 0.0, -size], [size, size, -size]]
    logits = torch.tensor([z], dtype=torch.float64)
    targets = torch.tensor([[1, 0]])
    loss, dlogits, expected, gradients = both(name, logits, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(dlogits, gradients, rtol=1e-15, atol=1e-15)
    assert dlogits.isfinite().all()


def test_the_divisor_can_be_the_global_batch():
    logits, targets = torch.randn(2, 6, 4, dtype=torch.float64), torch.randint(0, 4, (2, 6))
    for name in ("cross_entropy", "squared_error", "softmax_squared_error"):
        workspace = Workspace(torch.float64)
        workspace.begin("whole")
        loss, dlogits = (t.clone() for t in LOSSES[name](logits, targets, workspace))
        parts = []
        for part in (slice(0, 4), slice(4, 6)):
            workspace.begin(part.start)
            parts.append(LOSSES[name](logits[:, part], targets[:, part], workspace, count=6))
        torch.testing.assert_close(parts[0][0] + parts[1][0], loss, rtol=1e-14, atol=0)
        torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), dlogits, rtol=1e-14, atol=0)


def test_decisions_and_probabilities():
    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, -1e10]]])
    assert decide(logits).tolist() == [[1, 0]]
    torch.testing.assert_close(probabilities(logits), torch.softmax(logits, -1))
    one = torch.tensor([[[-1e10], [0.5], [1e10]]])
    assert decide(one).tolist() == [[0, 1, 1]]
    torch.testing.assert_close(probabilities(one)[..., 1], torch.sigmoid(one[..., 0]))
