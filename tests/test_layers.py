"""Every layer's backward against autograd in float64 with a random cotangent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn.errors import InputError
from manualnn.layers import Dropout, build_layers
from manualnn.parameters import Layout
from manualnn.workspace import Noise, Workspace, clock, mix

from . import oracle

KINDS = ["linear", "flatten", "relu", "tanh", "sigmoid"]


def check_layer(kind, replicas, batch, shape, seed, differs, scale=1.0):
    """Output, dx and the parameters' gradients of one layer equal autograd's, for each replica."""
    draw = torch.Generator().manual_seed(seed)
    [layer] = build_layers([[kind, 4] if kind == "linear" else [kind]], shape, 4)
    out_shape, named = layer.build(shape)
    layout = Layout.of([named])

    def random(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64) * scale

    theta, grad = random(replicas, layout.width), torch.full((replicas, layout.width), torch.nan)
    grad = grad.double()
    x, dy = random(replicas, batch, *shape), random(replicas, batch, *out_shape)
    [params], [grads] = layout.views(theta), layout.views(grad)
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    y, cache = layer.forward(params, x, workspace)
    dx = layer.backward(params, grads, cache, dy.clone(), workspace)
    for r in range(replicas):
        leaf = x[r].clone().requires_grad_()
        leaves = {name: view[r].clone().requires_grad_() for name, view in params.items()}
        expected = oracle.forward([[kind]], [leaves], leaf)
        expected.backward(dy[r])
        name = f"layer {kind}, R = {replicas}"
        differs(name, y[r], expected.detach())
        differs(name, dx[r], leaf.grad)
        for key, tensor in leaves.items():
            differs(name, grads[key][r], tensor.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_backward_equals_autograd(kind, replicas, differs):
    shape = (2, 3, 5) if kind == "flatten" else (6,)
    check_layer(kind, replicas, 8, shape, seed=0, differs=differs)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    replicas=st.integers(1, 4),
    batch=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_backward_equals_autograd_for_any_shape(kind, replicas, batch, width, seed, scale):
    def close(name, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    check_layer(kind, replicas, batch, (width,), seed, close, scale)


def test_a_wrong_backward_is_caught(differs, monkeypatch):
    """The check itself: a sign error in tanh's backward must not pass."""
    from manualnn.layers import Tanh

    right = Tanh.backward
    monkeypatch.setattr(Tanh, "backward", lambda *args, **kw: right(*args, **kw).neg_())
    with pytest.raises(AssertionError, match="layer tanh"):
        check_layer("tanh", 1, 4, (3,), 0, lambda n, a, e: torch.testing.assert_close(a, e, msg=n))


@pytest.mark.parametrize("kind", ["relu", "tanh", "sigmoid"])
def test_extreme_inputs(kind):
    """Values at +-1e10 are the limits, not nan; at 0 the ReLU's derivative is 0, as in torch."""
    [layer] = build_layers([[kind]], (5,), 2)
    x = torch.tensor([[[-1e10, -1.0, 0.0, 1e-12, 1e10]]], dtype=torch.float64)
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    y, cache = layer.forward({}, x, workspace)
    dx = layer.backward({}, {}, cache, torch.ones_like(x), workspace)
    leaf = x[0].clone().requires_grad_()
    expected = oracle.forward([[kind]], [{}], leaf)
    expected.sum().backward()
    torch.testing.assert_close(y[0], expected.detach(), rtol=1e-14, atol=1e-300)
    torch.testing.assert_close(dx[0], leaf.grad, rtol=1e-14, atol=1e-15)


def masks(p, shape, seeds=(0,), step=0, first=0, stream=0):
    """The mask of a dropout layer: its output on ones."""
    workspace = Workspace(torch.float64)
    mixed = torch.tensor([[mix(seed)] for seed in seeds])
    workspace.begin("test", Noise(mixed, clock(step), first))
    layer = Dropout(p, stream)
    x = torch.ones(len(seeds), *shape, dtype=torch.float64)
    y, cache = layer.forward({}, x, workspace)
    dy = torch.randn(y.shape, dtype=torch.float64)
    dx = layer.backward({}, {}, cache, dy, workspace)
    torch.testing.assert_close(dx, dy * y, rtol=0, atol=0)  # y = x m / (1 - p) on ones
    return y.clone()


def test_dropout_keeps_the_mean_and_is_scaled():
    y = masks(0.3, (400, 500))
    assert set(y.unique().tolist()) == {0.0, 1 / 0.7}
    kept = (y > 0).double()
    # 5 standard deviations of a mean of n Bernoulli draws, for all units, rows and columns.
    for mean, count in ((kept.mean(), 200_000), (kept.mean(1), 500), (kept.mean(2), 400)):
        bound = 5 * (0.3 * 0.7 / count) ** 0.5
        assert ((mean - 0.7).abs() <= bound).all()


def test_dropout_masks_are_independent():
    """No correlation between steps, streams, seeds, neighbouring samples and neighbouring units."""
    base = masks(0.5, (200, 300))[0] - 1
    others = {
        "step": masks(0.5, (200, 300), step=1)[0] - 1,
        "stream": masks(0.5, (200, 300), stream=1)[0] - 1,
        "seed": masks(0.5, (200, 300), seeds=(1,))[0] - 1,
        "sample": base.roll(1, 0),
        "unit": base.roll(1, 1),
        "both": base.roll((1, 1), (0, 1)),
    }
    for name, other in others.items():
        assert abs(float((base * other).mean())) < 5 / 60_000**0.5, name


def test_dropout_is_a_function_of_seed_step_and_position():
    whole = masks(0.4, (10, 6), seeds=(3, 4), step=7)
    assert whole.equal(masks(0.4, (10, 6), seeds=(3, 4), step=7))
    assert whole[1:].equal(masks(0.4, (10, 6), seeds=(4,), step=7))
    assert whole[:, 4:].equal(masks(0.4, (6, 6), seeds=(3, 4), step=7, first=4))


def test_dropout_with_a_probability_per_replica():
    y = masks((0.0, 0.5), (50, 40), seeds=(1, 1))
    assert y[0].eq(1).all()
    assert y[1].equal(masks(0.5, (50, 40), seeds=(1,))[0])


def test_dropout_is_the_identity_in_evaluation():
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    y, cache = Dropout(0.9).forward({}, x, workspace)
    assert y is x
    assert Dropout(0.9).backward({}, {}, cache, x, workspace) is x


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([["lineer", 3]], r"model.layers\[0\]: unknown layer 'lineer'; did you mean 'linear'"),
        ([["relu"], ["linear", 0]], r"model.layers\[1\]: linear needs units >= 1"),
        ([["linear"]], r"model.layers\[0\]: write \[\"linear\", units\]"),
        ([["relu", 3]], "relu takes no arguments"),
        ([["dropout", 1.5]], "dropout must be at least 0 and below 1, not 1.5"),
        ([["dropout", 1]], "below 1, not 1"),
        ([["dropout", []]], "empty list"),
    ],
)
def test_bad_layers_are_named(specs, message):
    with pytest.raises(InputError, match=message):
        build_layers(specs, (4,), 3)


def test_flatten_is_implied_before_a_linear_layer():
    layers = build_layers([["linear", "classes"]], (1, 28, 28), 10)
    assert [type(layer).__name__ for layer in layers] == ["Flatten", "Linear"]
    assert layers[1].units == 10


def check_image_layer(spec, shape, replicas, batch, seed, check, integers=False):
    """A convolution or pooling (after its change of order) against autograd, for each replica."""
    draw = torch.Generator().manual_seed(seed)
    turn, layer = build_layers([spec], shape, 4)
    out_shape, named = layer.build(turn.build(shape)[0])
    layout = Layout.of([named])

    def random(*size):
        if integers:  # many ties
            return torch.randint(-1, 2, size, generator=draw).double()
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    theta, grad = random(replicas, layout.width), random(replicas, layout.width)
    x, dy = random(replicas, batch, *shape), random(replicas, batch, *out_shape)
    [params], [grads] = layout.views(theta), layout.views(grad)
    workspace = Workspace(torch.float64)
    for _ in range(2):  # buffers are used again
        workspace.begin("test")
        y, cache = layer.forward(params, turn.forward({}, x, workspace)[0], workspace)
        dx = layer.backward(params, grads, cache, dy.clone(), workspace)
        dx = turn.backward({}, {}, None, dx, workspace)
    for r in range(replicas):
        leaf = x[r].clone().requires_grad_()
        leaves = {name: view[r].clone() for name, view in params.items()}
        if leaves:
            leaves["weight"] = layer.to_torch(leaves["weight"]).contiguous()
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        expected = oracle.forward([spec], [leaves], leaf)
        expected.backward(dy[r].movedim(-1, 1))
        name = f"layer {spec[0]}, R = {replicas}"
        check(name, y[r].movedim(-1, 1), expected.detach())
        check(name, dx[r], leaf.grad)
        if leaves:
            check(name, layer.to_torch(grads["weight"][r]), leaves["weight"].grad)
            check(name, grads["bias"][r], leaves["bias"].grad)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (["conv2d", 4, 3], (1, 7, 6)),
        (["conv2d", 4, 3, {"padding": 1}], (3, 7, 6)),
        (["conv2d", 2, 3, {"stride": 2, "padding": 1}], (2, 7, 8)),
        (["conv2d", 3, [1, 4], {"stride": [3, 2], "padding": [2, 1]}], (2, 5, 6)),
        (["conv2d", 2, 2, {"stride": 3}], (2, 9, 7)),
        (["conv2d", 2, 5, {"padding": 4}], (1, 3, 2)),
        (["conv2d", 3, 1], (4, 3, 3)),
        (["max_pool2d", 2], (3, 6, 4)),
        (["max_pool2d", 2], (2, 7, 5)),
        (["max_pool2d", [3, 2]], (2, 8, 5)),
    ],
)
def test_layers_of_images_equal_autograd(spec, shape, replicas, differs):
    check_image_layer(spec, shape, replicas, 5, 0, differs)


def test_pooling_gives_a_tie_to_the_first_as_torch_does(differs):
    check_image_layer(["max_pool2d", 2], (2, 7, 6), 2, 6, 1, differs, integers=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_convolution_equals_autograd_for_any_shape(data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    channels, height, width = number(1, 3), number(1, 7), number(1, 7)
    padding = [number(0, 3), number(0, 3)]
    kernel = [number(1, height + 2 * padding[0]), number(1, width + 2 * padding[1])]
    options = {"stride": [number(1, 3), number(1, 3)], "padding": padding}

    def close(name, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    spec = ["conv2d", number(1, 4), kernel, options]
    check_image_layer(spec, (channels, height, width), number(1, 2), number(1, 3), 3, close)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([["conv2d", 4, 9]], "kernel .9, 9. leaves nothing of an image of 6 x 7"),
        ([["max_pool2d", 3], ["max_pool2d", 3]], r"layers\[1\]: max_pool2d with kernel .3, 3."),
        ([["flatten"], ["conv2d", 4, 3]], r"layers\[1\]: conv2d needs images \(C, H, W\), not"),
        ([["linear", 4], ["max_pool2d", 2]], "max_pool2d needs images"),
        ([["conv2d", 4]], r'write \["conv2d", channels, kernel'),
        ([["conv2d", 0, 3]], "conv2d needs channels >= 1, not 0"),
        ([["conv2d", 4, 3, {"stride": 0}]], "stride must be a whole number from 1"),
        ([["conv2d", 4, 3, {"padding": -1}]], "padding must be a whole number from 0"),
        ([["conv2d", 4, 3, {"strid": 1}]], "unknown option 'strid'; did you mean 'stride'"),
        ([["conv2d", 4, [1, 2, 3]]], "kernel must be a whole number from 1, or two of them"),
        ([["max_pool2d"]], r'write \["max_pool2d", kernel\]'),
    ],
)
def test_bad_layers_of_images_are_named(specs, message):
    with pytest.raises(InputError, match=message):
        build_layers(specs, (2, 6, 7), 3)
