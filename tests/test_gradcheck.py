"""The gradient check itself: right gradients pass, and each wrong one is called by its name."""

import json

import pytest
import torch

from manualnn import gradcheck, layers
from manualnn.differences import differences
from manualnn.errors import InputError
from manualnn.evaluation import find_weights
from manualnn.gradcheck import Case, cases, check
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


def dw(cls, change):
    return cls, parameter(cls, "weight", change), "w"


def db(cls, change):
    return cls, parameter(cls, "bias", change), "b"


def dx(cls, change):
    return cls, result(cls.backward, change), "x"


def by(cls, change):
    return cls, of_cache(change), "x"


def dz(cls, change):
    return cls, result(cls.gradient, change), "logits"


def no_smoothing(cls):
    return cls, unsmoothed(cls.gradient), "logits"


FIRST = torch.tensor(0)
# What is wrong: a class, its wrong method, and the tensor whose gradient that is.
BROKEN = {
    "dW, the sign": dw(Linear, lambda g: g.neg_()),
    "dW divided by B": dw(Linear, lambda g: g.div_(4)),
    "db, a mean": db(Linear, lambda g: g.div_(4)),
    "db not written": db(Linear, lambda g: g.fill_(torch.nan)),
    "dx twice": dx(Linear, lambda g: g * 2),
    "dx 1e-4 too large": dx(Linear, lambda g: g * 1.0001),
    "dW, rows reversed": dw(Conv2d, lambda g: g.copy_(g.flip(1))),
    "db 0": db(Conv2d, lambda g: g.zero_()),
    "dx a pixel aside": dx(Conv2d, lambda g: g.roll(1, 3)),
    "dx without its first channel": dx(Conv2d, lambda g: g.index_fill(-1, FIRST, 0)),
    "to the whole window": (MaxPool2d, to_places(0, 1), "x"),
    "to the last place": (MaxPool2d, to_places(-1), "x"),
    "another order": dx(Flatten, lambda g: g.flip(-1)),
    "no mask": by(ReLU, lambda dy, y: dy.clone()),
    "where x < 0": by(ReLU, lambda dy, y: dy * (y == 0)),
    "derivative at y": by(Tanh, lambda dy, y: dy * (1 - y.tanh() ** 2)),
    "1 - y": by(Tanh, lambda dy, y: dy * (1 - y)),
    "y, not y (1 - y)": by(Sigmoid, lambda dy, y: dy * y),
    "not scaled": by(Dropout, lambda dy, m: dy * (m > 0)),
    "all units kept": by(Dropout, lambda dy, m: dy / 0.7),
    "1/B is missing": dz(CrossEntropy, lambda g: g * 4),
    "the sign": dz(CrossEntropy, lambda g: -g),
    "a constant more": dz(CrossEntropy, lambda g: g + 0.01),
    "not smoothed": no_smoothing(CrossEntropy),
    "2 is missing": dz(SquaredError, lambda g: g / 2),
    "1/K is missing": dz(SquaredError, lambda g: g * 3),
    "targets not smoothed": no_smoothing(SquaredError),
    "diagonal of the Jacobian": (SoftmaxSquaredError, diagonal, "logits"),
    "one-hot not smoothed": no_smoothing(SoftmaxSquaredError),
    "B is missing": dz(Logistic, lambda g: g * 4),
    "y not smoothed": no_smoothing(Logistic),
    "on biases": (Penalty, penalty(lambda g, w: 0.1 * w + 0.01 * w.sign()), "b"),
    "L2 twice": (Penalty, penalty(lambda g, w: g + 0.1 * w * (g != 0)), "w"),
    "L1 without sign": (Penalty, penalty(lambda g, w: g + 0.01 * (1 - w.sign()) * (g != 0)), "w"),
}


def broken(monkeypatch, cls, method):
    """The report of a network of every layer where one method is wrong."""
    name = (
        "add" if cls is Penalty else "backward" if cls in layers.__dict__.values() else "gradient"
    )
    monkeypatch.setattr(cls, name, method)
    loss = next((key for key, value in LOSSES.items() if value is cls), "cross_entropy")
    return check(case_of(loss=loss, label_smoothing=0.1, l1=0.01, l2=0.1), samples=30)


@pytest.mark.parametrize(
    ("cls", "method", "tensor"),
    BROKEN.values(),
    ids=[f"{entry[0].__name__}: {what}" for what, entry in BROKEN.items()],
)
def test_a_wrong_backward_is_named(monkeypatch, cls, method, tensor):
    report = broken(monkeypatch, cls, method)
    part = "loss" if cls in LOSSES.values() else cls.__name__.lower()
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


def test_kinks_are_skipped_and_counted():
    """Inputs at 0 are kinks of a ReLU for good; those within 1e-5 only for the largest step."""

    def relu(values):
        return values.clamp(min=0), (values > 0).long()

    at = torch.tensor([0.0, 3e-6, -3e-6, 0.5, -0.5, 1e-9], dtype=torch.float64)
    numeric, _, kinked = differences(relu, at, torch.arange(6))
    assert kinked.tolist() == [True, False, False, False, False, True]
    torch.testing.assert_close(numeric[1:5], torch.tensor([1.0, 0, 1, 0]).double())


def dead(bias):
    """A network whose ReLU's inputs are all `bias`."""
    case = case_of([["linear", 4], ["relu"], ["linear", "classes"]], (5,))
    case.network.params[0]["weight"].zero_()
    case.network.params[0]["bias"].fill_(bias)
    return case


def test_what_lies_at_kinks_is_not_judged():
    report = check(dead(0.0), samples=0)
    assert not report.passed and not report.wrong
    rows = {(row.part, row.tensor): row for row in report.rows}
    row = rows["relu 1", "x"]
    assert (row.tried, row.size, row.skipped, row.verdict) == (16, 16, 16, "not judged")
    assert (row.worst, row.median, row.index) == (None, None, None)
    assert rows["network", "b1"].verdict == rows["network", "w1"].verdict == "not judged"
    assert rows["network", "w2"].verdict == "zero" and rows["network", "b2"].verdict == "ok"
    assert report.finding.startswith("not judged, ") and "relu 1 x; network w1" in report.finding


def test_what_skips_some_coordinates_is_judged_by_the_others():
    """A second ReLU gets exact zeros from the first."""
    report = check(case_of([["linear", 8], ["relu"], ["relu"], ["linear", "classes"]], (5,)))
    row = next(row for row in report.rows if (row.part, row.tensor) == ("relu 2", "x"))
    assert report.passed and 8 < row.skipped < 24 and row.tried == 32


def test_dead_units_have_a_gradient_of_zero(monkeypatch):
    report = check(dead(-1.0), samples=0)
    assert report.passed
    zero = {(row.part, row.tensor) for row in report.rows if row.verdict == "zero"}
    assert {("relu 1", "x"), ("network", "w1"), ("network", "b1"), ("network", "x")} <= zero
    monkeypatch.setattr(ReLU, "backward", of_cache(lambda dy, y: dy.clone()))
    assert wrong(check(dead(-1.0), samples=0)) == {"relu 1": {"x"}}


def test_a_gradient_below_the_rounding_is_not_judged():
    """Saturated units: the slope of the first layer is far below what differences resolve."""
    case = case_of([["linear", 4], ["sigmoid"], ["linear", "classes"]], (5,))
    case.network.params[0]["bias"].fill_(33.0)
    row = next(r for r in check(case).rows if (r.part, r.tensor) == ("network", "w1"))
    assert row.verdict == "not judged" and row.skipped == 0


def test_the_coordinates_are_chosen_by_the_seed():
    case = case_of([["linear", 30], ["relu"], ["linear", "classes"]], (20,))
    first, again, other = (check(case, samples=9, seed=seed) for seed in (0, 0, 1))
    assert first.rows == again.rows
    assert [row.index for row in first.rows] != [row.index for row in other.rows]
    assert {row.tried for row in first.rows} == {9, 3}
    assert all(row.tried == row.size for row in check(case, samples=0).rows)


def test_one_wrong_place_is_found_and_shown(monkeypatch):
    def change(grad):
        if grad.shape[1:] == (5, 3):
            grad[0, 4, 1] *= 1.001

    monkeypatch.setattr(Linear, "backward", parameter(Linear, "weight", change))
    report = check(case_of([["linear", 5], ["tanh"], ["linear", "classes"]], (6,)), samples=0)
    assert wrong(report) == {"linear 2": {"w2"}}
    row = next(row for row in report.wrong if row.part == "linear 2")
    assert row.index == (4, 1) and row.worst == pytest.approx(0.001, rel=0.01)
    assert row.median < 1e-8


def test_cases_of_a_config_are_the_different_networks():
    layers = [["linear", 4], ["relu"], ["dropout", [0.1, 0.1, 0.4]], ["linear", "classes"]]
    config = config_of(
        model__layers=layers,
        train__l2=[0.0, 1e-3, 1e-3],
        train__optimizer__learning_rate=[0.1, 0.2, 0.3],
    )
    found = list(gradcheck._of_config(config, None, 0))
    assert [(case.network.specs[2][1], case.l2) for case in found] == [
        (0.1, 0),
        (0.1, 1e-3),
        (0.4, 1e-3),
    ]
    config = config_of(train__optimizer__name="adamw", train__l2=0.1, train__l1=0.2)
    [case] = gradcheck._of_config(config, None, 0)
    assert (case.l1, case.l2) == (0.2, 0)  # AdamW's L2 is no part of the gradient
    [case] = gradcheck._of_config(config_of(train__class_weights="balanced"), None, 0)
    assert check(case, 2, 2).notes == ("note: class weights are left out",)
    assert len(cases("kmnist-mlp")) == 1 and len(cases("mnist-student-compare")) == 2
    assert cases("kmnist-mlp", ["train.loss=squared_error"])[0].loss == "squared_error"


def test_a_network_that_fits_no_loss_and_bad_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="10 outputs, 10 classes and logistic do not fit"):
        cases("mnist-mlp", ["train.loss=logistic"])
    case = case_of([["linear", "classes"]], (4,))
    case.network.theta.fill_(1e308)
    with pytest.raises(InputError, match="case: its loss is not finite"):
        check(case)
    torch.save({"w1": torch.full((4, 3), torch.nan)}, tmp_path / "nan.pkl")
    with pytest.raises(InputError, match=r"nan.pkl: its weights are not finite"):
        cases(str(tmp_path / "nan.pkl"))


def test_the_command_on_a_config_a_run_and_weights(run, folder, monkeypatch):
    code, out, err = run("gradcheck", "fashion-logistic", "--samples", "20")
    assert (code, err) == (0, "")
    assert "passed: 10 gradients" in out and "20 of 7,840" in out
    config = folder / "small.toml"
    config.write_text(
        '[data]\nname = "idx"\n[model]\nlayers = [["linear", 5], ["relu"], ["linear", "classes"]]\n'
        "[train]\nepochs = 1\nl1 = 1e-3\n"
    )
    options = ["--data-dir", folder]
    code, out, err = run("gradcheck", config, *options, "--json")
    found = json.loads(out)
    [report] = found["reports"]
    assert code == 0 and found["passed"] and report["title"].startswith("small: cross_entropy")
    assert {row["part"] for row in report["rows"]} >= {"linear 1", "loss", "penalty", "network"}
    assert run("train", config, *options, "--out", "runs/small", "-q")[0] == 0
    student = find_weights("shipped:mnist-student")
    for name, title in (
        ("runs/small", "runs/small/weights.pkl: cross_entropy"),
        ("runs/small/weights.pkl", "runs/small/weights.pkl: cross_entropy"),
        ("small", "runs/small/weights.pkl: cross_entropy"),
        (student, f"{student}: softmax_squared_error"),
    ):
        code, out, err = run("gradcheck", name, "--samples", "5")
        assert code == 0 and out.startswith(f"{title}, 4 random")
        assert err == ("note: small is the run runs/small/weights.pkl\n" if name == "small" else "")
    monkeypatch.setattr(ReLU, "backward", of_cache(lambda dy, y: dy.clone()))
    code, out, err = run("gradcheck", config, *options)
    assert (code, err) == (1, "") and "wrong: relu 1: x\n" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["mnist-mpl"], "no config 'mnist-mpl'"),
        (["mnist-mlp", "--samples", "-1"], "--samples -1: must be at least 0"),
        (["mnist-mlp", "--batch", "0"], "--batch 0: must be at least 1"),
        (["mnist-mlp", "--set", "train.los=1"], "did you mean 'loss'"),
        (["nothing.pkl"], "no weights file 'nothing.pkl'"),
    ],
)
def test_bad_input_is_one_line(run, arguments, text):
    code, out, err = run("gradcheck", *arguments)
    assert (code, out) == (2, "") and text in err and err.count("\n") == 1


def test_not_judged_exits_with_2(run, monkeypatch):
    monkeypatch.setattr(gradcheck, "cases", lambda *_: [dead(0.0)])
    code, out, _ = run("gradcheck", "mnist-mlp")
    assert code == 2 and "not judged" in out
