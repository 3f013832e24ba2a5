"""The formulas of docs/derivations.md, entry by entry, against automatic differentiation; and its
quoted lines and tests against the source."""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd.functional import jacobian

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
B, D, H, K = 4, 3, 5, 6


def test_the_quoted_lines_are_the_sources():
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) > 15
    for file, block in blocks:
        source = (ROOT / file).read_text(encoding="utf-8").splitlines()
        for line in block.splitlines():
            assert line in source, f"{file}: {line}"


def test_the_tests_it_names_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXT)
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def normal(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def one_hot(count=B, classes=K):
    return torch.eye(classes, dtype=torch.float64)[torch.arange(count) * 2 % classes]


def softmax(z):
    return torch.softmax(z, -1)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def gradients(loss, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


def test_softmax_jacobian():
    z = normal(K)
    p = softmax(z)
    formula = torch.empty(K, K, dtype=torch.float64)
    for k in range(K):
        for i in range(K):
            formula[k, i] = p[k] * (float(k == i) - p[i])
    same(formula, jacobian(softmax, z))
    same(formula, torch.diag(p) - p[:, None] * p)
    same(formula.sum(1), torch.zeros(K, dtype=torch.float64))


def test_softmax_with_one_weight_per_class():
    """f_k(w_k) = sin(w_k): the formulas, and that the ones with lost terms are others."""
    w = normal(K)
    p, slope = softmax(torch.sin(w)), torch.cos(w)
    expected = jacobian(lambda w: softmax(torch.sin(w)), w)
    right, wrong = torch.empty_like(expected), torch.empty_like(expected)
    for i in range(K):
        for k in range(K):
            right[i, k] = p[i] * (1 - p[i]) * slope[i] if i == k else -p[i] * p[k] * slope[k]
            wrong[i, k] = p[i] * (slope[i] - p[i]) if i == k else p[i] * p[k] * slope[k]
    same(right, expected)
    assert (wrong - expected).abs().min() > 1e-4
    assert wrong.sum(0).abs().min() > 1e-3  # the probabilities would no longer sum to 1


def test_softmax_with_shared_weights():
    """f_k(w) = x_k^T w, one weight vector for all classes."""
    x, w = normal(K, D, seed=1), normal(D)
    p = softmax(x @ w)
    formula = torch.stack([p[i] * (x[i] - (p[:, None] * x).sum(0)) for i in range(K)])
    same(formula, jacobian(lambda w: softmax(x @ w), w))


def test_any_loss_of_any_model():
    """f_k(w) = sin(x_k^T w), L = sum c_i p_i^3."""
    x, w, c = normal(K, D, seed=1), normal(D), normal(K, seed=2)
    p, dp = softmax(torch.sin(x @ w)), 3 * c * softmax(torch.sin(x @ w)) ** 2
    dw = torch.zeros_like(w)
    for i in range(K):
        for k in range(K):
            dw += dp[i] * p[i] * (float(i == k) - p[k]) * torch.cos(x[k] @ w) * x[k]
    same(dw, gradients(lambda w: (c * softmax(torch.sin(x @ w)) ** 3).sum(), w)[0])


def cross_entropy(z, t):
    return -(t * torch.log_softmax(z, -1)).sum() / len(z)


def test_cross_entropy():
    z, t = normal(B, K), one_hot()
    same((softmax(z) - t) / B, gradients(lambda z: cross_entropy(z, t), z)[0])
    smooth = 0.9 * t + 0.1 / K
    same((softmax(z) - smooth) / B, gradients(lambda z: cross_entropy(z, smooth), z)[0])


def test_softmax_regression():
    x, w, b, t = normal(B, D), normal(D, K, seed=1), normal(K, seed=2), one_hot()
    p = softmax(x @ w + b)
    dw, db = torch.zeros_like(w), torch.zeros_like(b)
    for n in range(B):
        for k in range(K):
            db[k] += (p[n, k] - t[n, k]) / B
            for j in range(D):
                dw[j, k] += x[n, j] * (p[n, k] - t[n, k]) / B
    expected = gradients(lambda w, b: cross_entropy(x @ w + b, t), w, b)
    same(dw, expected[0])
    same(db, expected[1])


def test_softmax_and_squared_error():
    z, t = normal(B, K), one_hot()
    p = softmax(z)
    g = 2 * (p - t) / (B * K)
    formula = p * (g - (g * p).sum(1, keepdim=True))
    expected = gradients(lambda z: ((torch.softmax(z, -1) - t) ** 2).mean(), z)[0]
    same(formula, expected)
    same(2 * (z - t) / (B * K), gradients(lambda z: ((z - t) ** 2).mean(), z)[0])


def test_logistic_loss():
    z, y = normal(8) * 3, torch.tensor([0, 1] * 4, dtype=torch.float64)
    s = 1 / (1 + torch.exp(-z))
    textbook = -y * torch.log(s) - (1 - y) * torch.log(1 - s)
    same(z.clamp(min=0) - z * y + torch.log(1 + torch.exp(-z.abs())), textbook)
    same(torch.log(1 + torch.exp(z)) - z * y, textbook)
    m = (1 - 2 * y) * z
    same(m.clamp(min=0) + torch.log(1 + torch.exp(-m.abs())), textbook)
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    same(s - y, gradients(lambda z: binary(z, y, reduction="sum"), z)[0])


def test_logistic_network():
    x, w1, w2, y = normal(D), normal(D, H, seed=1), normal(H, seed=2), 1.0
    h = torch.sigmoid(x @ w1)
    y_hat = torch.sigmoid(h @ w2)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    for j in range(H):
        dw2[j] = (y_hat - y) * h[j]
        for i in range(D):
            dw1[i, j] = (y_hat - y) * w2[j] * h[j] * (1 - h[j]) * x[i]

    def loss(w1, w2):
        return -torch.log(torch.sigmoid(torch.sigmoid(x @ w1) @ w2))

    expected = gradients(loss, w1, w2)
    same(dw1, expected[0])
    same(dw2, expected[1])


def test_linear():
    x, w, dy = normal(B, D), normal(D, K, seed=1), normal(B, K, seed=2)
    dw, db, dx = torch.zeros_like(w), torch.zeros(K, dtype=torch.float64), torch.zeros_like(x)
    for n in range(B):
        for k in range(K):
            db[k] += dy[n, k]
            for j in range(D):
                dw[j, k] += x[n, j] * dy[n, k]
                dx[n, j] += dy[n, k] * w[j, k]
    expected = gradients(lambda x, w, b: ((x @ w + b) * dy).sum(), x, w, torch.zeros_like(db))
    for found, right in zip((dx, dw, db), expected, strict=True):
        same(found, right)


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_one_hidden_layer(name):
    g = getattr(torch, name)
    x, t = normal(B, D), one_hot()
    w1, b1, w2, b2 = (
        normal(D, H, seed=1),
        normal(H, seed=2),
        normal(H, K, seed=3),
        normal(K, seed=4),
    )
    a = x @ w1 + b1
    h = g(a)
    slope = {"relu": (a > 0).double(), "tanh": 1 - h**2, "sigmoid": h * (1 - h)}[name]
    dz = (softmax(h @ w2 + b2) - t) / B
    da = (dz @ w2.T) * slope
    expected = gradients(
        lambda w1, b1, w2, b2: cross_entropy(g(x @ w1 + b1) @ w2 + b2, t), w1, b1, w2, b2
    )
    for found, right in zip((x.T @ da, da.sum(0), h.T @ dz, dz.sum(0)), expected, strict=True):
        same(found, right)


def test_activations():
    x, dy = normal(20) * 2, normal(20, seed=1)
    e = torch.exp(-2 * x.abs())
    y = torch.sign(x) * (1 - e) / (1 + e)
    same(y, torch.tanh(x))
    same(dy * (1 - y**2), gradients(lambda x: (torch.tanh(x) * dy).sum(), x)[0])
    s = 1 / (1 + torch.exp(-x))
    same(dy * s * (1 - s), gradients(lambda x: (torch.sigmoid(x) * dy).sum(), x)[0])
    y = x.clamp(min=0)
    same(dy * torch.sign(y), gradients(lambda x: (torch.relu(x) * dy).sum(), x)[0])
    mask = (normal(20, seed=2) > 0).double()
    same(dy * mask / 0.7, gradients(lambda x: (x * mask / 0.7 * dy).sum(), x)[0])


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1)])
def test_convolution(stride, padding):
    x, w, b = normal(5, 4, 2), normal(3, 2, 2, 3, seed=1), normal(3, seed=2)
    height = (5 + 2 * padding - 3) // stride + 1
    width = (4 + 2 * padding - 2) // stride + 1
    dy = normal(height, width, 3, seed=3)
    y = b.expand(height, width, 3).clone()
    dx, dw = torch.zeros_like(x), torch.zeros_like(w)
    for h, v in torch.cartesian_prod(torch.arange(height), torch.arange(width)).tolist():
        for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
            row, column = stride * h + i - padding, stride * v + j - padding
            if 0 <= row < 5 and 0 <= column < 4:
                y[h, v] += x[row, column] @ w[i, j]
                dw[i, j] += x[row, column][:, None] * dy[h, v]
                dx[row, column] += w[i, j] @ dy[h, v]

    def output(x, w, b):
        moved = x.permute(2, 0, 1)[None], w.permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(*moved, b, stride, padding)[0].permute(1, 2, 0)

    same(y, output(x, w, b))
    expected = gradients(lambda x, w, b: (output(x, w, b) * dy).sum(), x, w, b)
    for found, right in zip((dx, dw, dy.sum((0, 1))), expected, strict=True):
        same(found, right)


def test_max_pooling():
    window = torch.tensor([1.0, 3.0, 3.0, 2.0], dtype=torch.float64)  # a tie
    dy = 7.0
    rest, dx = torch.tensor(dy), []
    for entry in window[:-1]:
        after = torch.sign(window.max() - entry) * rest
        dx.append(float(rest - after))
        rest = after
    dx.append(float(rest))

    def pooled(x):
        return dy * torch.nn.functional.max_pool2d(x.view(1, 1, 2, 2), 2).sum()

    assert dx == [0, 7, 0, 0] == gradients(pooled, window)[0].tolist()


def test_nesterov_is_the_gradient_at_the_point_ahead():
    """The textbook form, written for the point theta - rate momentum v, is the code's."""
    rate, momentum = 0.1, 0.9
    theta = ahead = normal(D)
    textbook_v = v = torch.zeros_like(theta)
    for _ in range(5):
        g = torch.cos(theta - rate * momentum * textbook_v)  # of sum sin at the point ahead
        textbook_v = momentum * textbook_v + g
        theta = theta - rate * textbook_v
        same(g, torch.cos(ahead))
        v = momentum * v + g
        ahead = ahead - rate * (g + momentum * v)
        same(ahead, theta - rate * momentum * textbook_v)


def test_adam_divides_by_the_sum_of_its_weights():
    beta, m = 0.9, 0.0
    gs = normal(6).tolist()
    for step, g in enumerate(gs, 1):
        m = beta * m + (1 - beta) * g
        weights = [(1 - beta) * beta ** (step - i) for i in range(1, step + 1)]
        assert m == pytest.approx(sum(w * g for w, g in zip(weights, gs[:step], strict=True)))
        assert sum(weights) == pytest.approx(1 - beta**step)
