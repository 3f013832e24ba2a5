"""Losses and their gradients at the logits against autograd, and at extreme logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn.losses import LOSSES, decide, hits, outputs, probabilities
from manualnn.workspace import Workspace

from . import oracle
from .test_optimizers import Made


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


def sample(name, replicas=2, batch=6, classes=4):
    """Logits and targets for a loss."""
    draw = torch.Generator().manual_seed(2)
    k = outputs(name, 2 if name == "logistic" else classes)
    logits = torch.randn(replicas, batch, k, generator=draw, dtype=torch.float64)
    return logits, torch.randint(0, max(k, 2), (replicas, batch), generator=draw)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch", [1, 6])
def test_value_and_gradient_alone_are_those_of_both(name, batch):
    """By default without smoothing, divided by the batch; with `count` by that."""
    logits, targets = sample(name, batch=batch)
    loss, workspace = LOSSES[name], Workspace(torch.float64)
    workspace.begin("both")
    value, gradient = (t.clone() for t in loss(logits, targets, workspace))
    smooth = loss(logits, targets, workspace, 0.2)[1].clone()
    assert value.shape == (2,) and gradient.shape == logits.shape
    workspace.begin("alone")
    assert loss.value(logits, targets, workspace).equal(value)
    assert loss.gradient(logits, targets, workspace).equal(gradient)
    assert loss.gradient(logits, targets, workspace, 0.2).equal(smooth)
    for count in (1, 13):
        both = loss(logits, targets, workspace, 0.2, count)
        torch.testing.assert_close(both[0], value * batch / count, rtol=1e-14, atol=0)
        torch.testing.assert_close(both[1], smooth * batch / count, rtol=1e-13, atol=1e-17)
        alone = loss.value(logits, targets, workspace, count)
        assert alone.equal(both[0])
        assert loss.gradient(logits, targets, workspace, 0.2, count).equal(both[1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_loss_in_steady_state_makes_nothing_and_changes_no_input(name, replicas):
    logits, targets = sample(name, replicas)
    before, workspace = logits.clone(), Workspace(torch.float64)
    results = []
    for number in range(3):
        workspace.begin("test")
        if number < 2:
            found = [
                *LOSSES[name](logits, targets, workspace, 0.1),
                hits(logits, targets, workspace),
            ]
            results.append([t.clone() for t in found])
            continue
        with Made() as made:
            LOSSES[name](logits, targets, workspace, 0.1)
            hits(logits, targets, workspace)
        assert made.sizes == []
    assert logits.equal(before)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_smoothing_costs_an_operation_only_where_there_is_some():
    logits, targets = sample("squared_error")
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    for smoothing in (0.0, 0.1):
        with Made() as made:
            LOSSES["squared_error"].gradient(logits, targets, workspace, smoothing)
        assert ("sub_" in made.names) == (smoothing > 0)


def test_losses_by_hand():
    """Two samples of two classes with z = (0, log 3), so that p = (1/4, 3/4); targets 1 and 0."""
    z = torch.tensor([[[0.0, 3.0], [0.0, 3.0]]], dtype=torch.float64).clamp(min=1).log()
    targets = torch.tensor([[1, 0]])
    log = torch.tensor([4 / 3, 4.0], dtype=torch.float64).log()
    cases = {
        "cross_entropy": (log.mean(), [[0.125, -0.125], [-0.375, 0.375]]),
        # ((1/4)^2 + (1/4)^2 + (3/4)^2 + (3/4)^2) / 4; g = (p - t) / 2
        "softmax_squared_error": (0.3125, [[3 / 64, -3 / 64], [-9 / 64, 9 / 64]]),
    }
    workspace = Workspace(torch.float64)
    for name, (loss, gradient) in cases.items():
        workspace.begin(name)
        value, dlogits = LOSSES[name](z, targets, workspace)
        torch.testing.assert_close(value, torch.as_tensor([loss], dtype=torch.float64))
        torch.testing.assert_close(dlogits, torch.tensor([gradient], dtype=torch.float64))
    workspace.begin("squared_error")
    outputs = torch.tensor([[[0.5, 1.0], [2.0, 0.0]]], dtype=torch.float64)
    value, dlogits = LOSSES["squared_error"](outputs, targets, workspace)
    assert value.tolist() == [(0.25 + 0 + 1 + 0) / 4]
    assert dlogits.tolist() == [[[0.25, 0.0], [0.5, 0.0]]]
    # Smoothed by 1/2 the targets are (1/4, 3/4) and (3/4, 1/4), in the gradient alone.
    value, dlogits = LOSSES["squared_error"](outputs, targets, workspace, 0.5)
    assert value.tolist() == [1.25 / 4]
    assert dlogits.tolist() == [[[0.125, 0.125], [0.625, -0.125]]]
    workspace.begin("logistic")
    one = torch.tensor([[[0.0], [3.0]]], dtype=torch.float64).clamp(min=1).log()  # s = 1/2, 3/4
    value, dlogits = LOSSES["logistic"](one, torch.tensor([[1, 0]]), workspace)
    expected = torch.tensor([2.0, 4.0], dtype=torch.float64).log().mean()
    torch.testing.assert_close(value[0], expected)
    torch.testing.assert_close(dlogits[0, :, 0], torch.tensor([-0.25, 0.375]).double())
    dlogits = LOSSES["logistic"](one, torch.tensor([[1, 0]]), workspace, 0.5)[1]
    torch.testing.assert_close(dlogits[0, :, 0], torch.tensor([-0.125, 0.25]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_keep_the_type_of_the_logits(name, dtype):
    logits, targets = sample(name)
    workspace = Workspace(dtype)
    workspace.begin("test")
    loss, dlogits = LOSSES[name](logits.to(dtype), targets, workspace, 0.1)
    exact, gradients = both(name, logits, targets, 0.1)[2:]
    assert loss.dtype == dlogits.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(loss.double(), exact, rtol=bound, atol=bound)
    torch.testing.assert_close(dlogits.double(), gradients, rtol=bound, atol=bound)


@pytest.mark.parametrize("classes", [1, 2, 5, 20])
@pytest.mark.parametrize("rows", [1, 3])
def test_hits_are_counted_for_each_network(classes, rows):
    """Also of logits that lie class by class in memory, and of targets that all share."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 8, classes, generator=draw)
    targets = torch.randint(0, max(classes, 2), (rows, 8), generator=draw)
    chosen = logits.argmax(-1) if classes > 1 else (logits[..., 0] > 0).long()
    expected = (chosen == targets).sum(1)
    workspace = Workspace()
    for z in (logits, logits.transpose(1, 2).contiguous().transpose(1, 2)):
        workspace.begin(z.stride())
        found = hits(z, targets, workspace)
        assert found.equal(expected) and found.dtype == torch.int64
    assert decide(logits).equal(chosen) and decide(logits[0]).equal(chosen[0])
    out = torch.empty(3, 8, dtype=torch.int64)
    assert decide(logits, out) is out and out.equal(chosen)


def test_one_logit_of_exactly_0_is_class_0():
    decided = decide(torch.tensor([[0.0], [1e-30], [-1e-30]]))
    assert decided.tolist() == [0, 1, 0] and decided.dtype == torch.int64


def test_how_many_outputs_a_loss_needs():
    assert [outputs(name, 7) for name in LOSSES] == [7, 7, 7, 1]
    assert outputs("logistic", 2) == 1


def test_probabilities_at_any_size():
    for size in (0.0, 1.0, 1e30):
        logits = torch.tensor([[size, 0.0, -size], [size, size, size]], dtype=torch.float64)
        given = logits.clone()
        torch.testing.assert_close(probabilities(logits), torch.softmax(logits, -1))
        one = torch.tensor([[size], [-size]], dtype=torch.float64)
        s = torch.sigmoid(one)
        torch.testing.assert_close(probabilities(one), torch.cat([torch.sigmoid(-one), s], 1))
        assert logits.equal(given) and one.tolist() == [[size], [-size]]
