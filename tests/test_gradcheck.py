"""The gradient check itself: right gradients pass, and each wrong one is called by its name."""

import json
from dataclasses import replace

import pytest
import torch

from manualnn import gradcheck, layers, losses
from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.gradcheck import Case, cases, check, differences
from manualnn.layers import Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU, Sigmoid, Tanh
from manualnn.losses import CrossEntropy, Logistic, SoftmaxSquaredError, SquaredError
from manualnn.network import Network
from manualnn.optimizers import Penalty

from .conftest import config_of
from .test_config import SHIPPED

LOSSES = {
    "cross_entropy": CrossEntropy,
    "squared_error": SquaredError,
    "softmax_squared_error": SoftmaxSquaredError,
    "logistic": Logistic,
}
# Every layer; a pooling that is moved before its activation, and one that is not.
EVERY = [
    ["max_pool2d", [2, 1]],
    ["conv2d", 3, 3, {"padding": 1}],
    ["relu"],
    ["max_pool2d", 2],
    ["conv2d", 2, [1, 2], {"stride": [1, 2]}],
    ["tanh"],
    ["dropout", 0.3],
    ["linear", 5],
    ["sigmoid"],
    ["linear", "classes"],
]


def case_of(specs=EVERY, shape=(2, 9, 8), loss="cross_entropy", seed=0, **settings):
    classes = 1 if loss == "logistic" else 3
    network = Network(specs, shape, classes, 1, torch.float64)
    network.theta.copy_(torch.randn(network.theta.shape, generator=torch.manual_seed(seed)) / 2)
    for gap in network.layout.gaps(network.theta):
        gap.zero_()
    return Case("case", network, loss, **settings)


def wrong(report):
    """The parts that are wrong by themselves, each with its tensors."""
    return {
        row.part: {r.tensor for r in report.wrong if r.part == row.part}
        for row in report.wrong
        if row.part != "network"
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_layer_loss_and_penalty_passes(loss, smoothing):
    report = check(case_of(loss=loss, label_smoothing=smoothing, l1=0.01, l2=0.1), samples=30)
    assert report.passed, report.finding
    assert report.finding.startswith(f"passed: {len(report.rows)} gradients")
    parts = dict.fromkeys(row.part for row in report.rows)
    assert list(parts) == [
        "channelslast 1", "maxpool2d 1", "conv2d 1", "maxpool2d 2", "relu 1", "conv2d 2", "tanh 1",
        "dropout 1", "flatten 1", "linear 1", "sigmoid 1", "linear 2", "loss", "penalty", "network",
    ]  # fmt: skip
    whole = [row.tensor for row in report.rows if row.part == "network"]
    assert whole == ["w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4", "x"]
    for row in report.rows:
        assert row.tried == min(30, row.size) and row.worst <= 1e-5
        assert row.verdict == ("zero" if (row.part, row.tensor[0]) == ("penalty", "b") else "ok")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_pass(name):
    """Of those with one architecture a few coordinates: the layers are large."""
    for case in cases(name):
        report = check(case, samples=2, batch=2)
        assert report.passed, report.finding


def parameter(cls, name, change):
    """A backward that changes one parameter's gradient in place afterwards."""
    right = cls.backward

    def backward(self, params, grads, *args, **kw):
        dx = right(self, params, grads, *args, **kw)
        change(grads[name])
        return dx

    return backward


def result(method, change):
    """A method whose result, if there is one, is changed."""

    def changed(*args, **kw):
        value = method(*args, **kw)
        return None if value is None else change(value)

    return changed


def to_places(*places):
    """A pooling's backward that gives dy to these places of each window."""

    def backward(self, params, grads, cache, dy, *args, **kw):
        dx = torch.zeros_like(cache[0])
        for place in places:
            self._corners(dx)[place].copy_(dy)
        return dx

    return backward


def of_cache(change):
    """dx as a function of dy and what forward kept."""
    return lambda self, params, grads, cache, dy, *args, **kw: change(dy, cache)


def diagonal(self, logits, targets, workspace, smoothing=0.0, count=None):
    """Softmax and squared error with the diagonal of the Jacobian alone."""
    p = logits.softmax(-1)
    g = 2 * (p - torch.nn.functional.one_hot(targets, p.shape[2])) / p[0].numel()
    return g * p * (1 - p)


def unsmoothed(method):
    return lambda self, logits, y, workspace, smoothing=0.0, count=None: method(
        self, logits, y, workspace, 0.0, count
    )


def penalty(change):
    """Penalty.add with what it adds changed: (what is added, theta) to that."""
    right = Penalty.add

    def add(self, theta, grad):
        before = grad.clone()
        right(self, theta, grad)
        grad.copy_(before + change(grad - before, theta))

    return add


X, W, B, LOGITS = "x", "w", "b", "logits"
# What is wrong; the class and its method; the wrong method; the part and tensor that it is in.
BROKEN = [
    ("dW, the sign", Linear, parameter(Linear, "weight", lambda g: g.neg_()), "linear", W),
    ("dW divided by B", Linear, parameter(Linear, "weight", lambda g: g.div_(4)), "linear", W),
    ("db, a mean", Linear, parameter(Linear, "bias", lambda g: g.div_(4)), "linear", B),
    ("db not written", Linear, parameter(Linear, "bias", lambda g: g.fill_(torch.nan)), "linear", B),
    ("dx twice", Linear, result(Linear.backward, lambda dx: dx * 2), "linear", X),
    ("dx 1e-4 too large", Linear, result(Linear.backward, lambda dx: dx * 1.0001), "linear", X),
    ("dW, rows reversed", Conv2d, parameter(Conv2d, "weight", lambda g: g.copy_(g.flip(1))), "conv2d", W),
    ("db 0", Conv2d, parameter(Conv2d, "bias", lambda g: g.zero_()), "conv2d", B),
    ("dx a pixel aside", Conv2d, result(Conv2d.backward, lambda dx: dx.roll(1, 3)), "conv2d", X),
    ("dx without its first channel", Conv2d, result(Conv2d.backward, lambda dx: dx.index_fill(-1, torch.tensor(0), 0)), "conv2d", X),
    ("to the whole window", MaxPool2d, to_places(0, 1), "maxpool2d", X),
    ("to the last place", MaxPool2d, to_places(-1), "maxpool2d", X),
    ("another order", Flatten, result(Flatten.backward, lambda dx: dx.flip(-1)), "flatten", X),
    ("no mask", ReLU, of_cache(lambda dy, y: dy.clone()), "relu", X),
    ("where x < 0", ReLU, of_cache(lambda dy, y: dy * (y == 0)), "relu", X),
    ("derivative at y", Tanh, of_cache(lambda dy, y: dy * (1 - y.tanh() ** 2)), "tanh", X),
    ("1 - y", Tanh, of_cache(lambda dy, y: dy * (1 - y)), "tanh", X),
    ("y in place of y (1 - y)", Sigmoid, of_cache(lambda dy, y: dy * y), "sigmoid", X),
    ("not scaled", Dropout, of_cache(lambda dy, m: dy * (m > 0)), "dropout", X),
    ("no mask", Dropout, of_cache(lambda dy, m: dy / 0.7), "dropout", X),
    ("1/B is missing", CrossEntropy, result(CrossEntropy.gradient, lambda g: g * 4), "loss", LOGITS),
    ("the sign", CrossEntropy, result(CrossEntropy.gradient, lambda g: -g), "loss", LOGITS),
    ("a constant more", CrossEntropy, result(CrossEntropy.gradient, lambda g: g + 0.01), "loss", LOGITS),
    ("not smoothed", CrossEntropy, unsmoothed(CrossEntropy.gradient), "loss", LOGITS),
    ("2 is missing", SquaredError, result(SquaredError.gradient, lambda g: g / 2), "loss", LOGITS),
    ("1/K is missing", SquaredError, result(SquaredError.gradient, lambda g: g * 3), "loss", LOGITS),
    ("not smoothed", SquaredError, unsmoothed(SquaredError.gradient), "loss", LOGITS),
    ("diagonal of the Jacobian", SoftmaxSquaredError, diagonal, "loss", LOGITS),
    ("not smoothed", SoftmaxSquaredError, unsmoothed(SoftmaxSquaredError.gradient), "loss", LOGITS),
    ("1/B is missing", Logistic, result(Logistic.gradient, lambda g: g * 4), "loss", LOGITS),
    ("not smoothed", Logistic, unsmoothed(Logistic.gradient), "loss", LOGITS),
    ("on biases as well", Penalty, penalty(lambda g, w: 0.1 * w + 0.01 * w.sign()), "penalty", B),
    ("L2 twice", Penalty, penalty(lambda g, w: g + 0.1 * w * (g != 0)), "penalty", W),
    ("L1 without the sign", Penalty, penalty(lambda g, w: g + (0.01 - 0.01 * w.sign()) * (g != 0)), "penalty", W),
]  # fmt: skip


def broken(monkeypatch, cls, method):
    """The report of a network of every layer where one method is wrong."""
    name = (
        "add" if cls is Penalty else "backward" if cls in layers.__dict__.values() else "gradient"
    )
    monkeypatch.setattr(cls, name, method)
    loss = next((key for key, value in LOSSES.items() if value is cls), "cross_entropy")
    return check(case_of(loss=loss, label_smoothing=0.1, l1=0.01, l2=0.1), samples=30)


@pytest.mark.parametrize(
    ("cls", "method", "part", "tensor"),
    [entry[1:] for entry in BROKEN],
    ids=[f"{entry[1].__name__}: {entry[0]}" for entry in BROKEN],
)
def test_a_wrong_backward_is_named(monkeypatch, cls, method, part, tensor):
    report = broken(monkeypatch, cls, method)
    assert not report.passed
    every = {row.part for row in report.rows if row.part.split()[0] == part}
    assert set(wrong(report)) == every  # each layer of the kind, and nothing else
    for tensors in wrong(report).values():
        assert {name[0] for name in tensors} == {tensor[0]}
    assert report.finding.startswith("wrong: ")
    if part != "penalty":  # which the network's rows leave out
        assert any(row.part == "network" for row in report.wrong)


def test_what_comes_after_the_wrong_layer_is_right(monkeypatch):
    """With tanh wrong, the gradients of the network are wrong before it and right behind it."""
    report = broken(monkeypatch, Tanh, of_cache(lambda dy, y: dy))
    whole = {row.tensor: row.verdict for row in report.rows if row.part == "network"}
    assert {name for name, verdict in whole.items() if verdict == "ok"} == {"w3", "b3", "w4", "b4"}
    assert report.finding == "wrong: tanh 1: x"


def test_a_wrong_chain_of_right_layers(monkeypatch):
    """Only what training asks for, no dx, is wrong: the layers by themselves are right."""
    right = Network.backward

    def backward(self, dlogits, caches, grads, workspace, need_dx=False, beta=0):
        dx = right(self, dlogits, caches, grads, workspace, need_dx, beta)
        if not need_dx:
            grads[self.first]["bias"].zero_()
        return dx

    monkeypatch.setattr(Network, "backward", backward)
    report = check(case_of(), samples=10)
    assert wrong(report) == {} and [row.tensor for row in report.wrong] == ["b1"]
    assert report.finding.startswith("wrong: the whole network (b1), though each part")


def test_the_random_cotangent_shows_what_the_loss_hides(monkeypatch):
    """An error that is the same for every class has no effect on a loss of softmax alone."""
    specs = [["linear", "classes"]]
    monkeypatch.setattr(
        Linear, "backward", parameter(Linear, "bias", lambda g: g.sub_(g.mean(-1, keepdim=True)))
    )
    report = check(case_of(specs, (6,)), samples=0)
    assert {row.tensor for row in report.wrong if row.part == "network"} == {"b1"}
    assert wrong(report) == {"linear 1": {"b1"}}
