"""Every layer's backward against autograd in float64 with a random cotangent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn import layers as module
from manualnn.errors import InputError
from manualnn.layers import (
    LOW_FROM,
    ChannelsLast,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sigmoid,
    Tanh,
    arrange_pooling,
    build_layers,
    lowered,
    product,
)
from manualnn.parameters import Layout
from manualnn.workspace import Noise, Workspace, clock, mix

from . import oracle
from .test_optimizers import Made

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


class Nans(Workspace):
    """A workspace whose new memory is never 0 by chance."""

    def _make(self, shape, dtype):
        buffer = super()._make(shape, dtype)
        return buffer.fill_(torch.nan if dtype.is_floating_point else 77)


def normal(*shape, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


LAYERS = {
    "linear": (Linear(5), (7,)),
    "flatten": (Flatten(), (2, 3, 4)),
    "flatten, channels last": (Flatten(True), (2, 3, 4)),
    "channels last": (ChannelsLast(), (2, 3, 4)),
    "conv2d": (Conv2d(3, (2, 3), (2, 1), (1, 2)), (6, 5, 2)),
    "conv2d of one channel": (Conv2d(3, (2, 3), (1, 2)), (6, 5, 1)),
    "conv2d before pooling": (Conv2d(3, (2, 3), pool=(2, 1), padding=(0, 1)), (6, 5, 2)),
    "max_pool2d": (MaxPool2d((2, 2)), (5, 7, 2)),
    "max_pool2d, rows left out": (MaxPool2d((2, 1)), (5, 4, 2)),
    "max_pool2d, columns left out": (MaxPool2d((1, 2)), (4, 5, 2)),
    "max_pool2d, none left out": (MaxPool2d((2, 3)), (4, 6, 2)),
    "relu": (ReLU(), (3, 4)),
    "tanh": (Tanh(), (6,)),
    "sigmoid": (Sigmoid(), (6,)),
    "dropout": (Dropout(0.3), (4, 5)),
    "dropout, a column": (Dropout((0.3, 0.0, 0.5)), (6,)),
}


def of_layer(name, replicas=3, batch=4):
    """A layer with random parameters (two buffers), x, and dy of y's shape."""
    layer, shape = LAYERS[name]
    out, named = layer.build(shape)
    layout = Layout.of([named])
    theta, grad = normal(replicas, layout.width, seed=1), normal(replicas, layout.width, seed=2)
    x = normal(replicas, batch, *shape, seed=3)
    return layer, layout.views(theta)[0], layout.views(grad)[0], x, out


def begin(workspace, key="test"):
    workspace.begin(key, Noise(torch.tensor([[mix(i)] for i in range(3)]), clock(2)))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_leaves_alone_what_it_is_given_and_makes_nothing(name):
    """x, dy and the parameters are not written to; from the second step on no memory is made; the
    first and the third step give the same; with beta = 1 the gradient is added to what was there;
    without need_dx it is the same gradient."""
    layer, params, grads, x, _ = of_layer(name)
    workspace = Nans(torch.float64)
    begin(workspace)
    y, cache = layer.forward(params, x, workspace)
    dy = normal(*y.shape, seed=4)
    given = [t.clone() for t in (x, dy, *params.values())]
    dx = layer.backward(params, grads, cache, dy, workspace)
    results = [t.clone() for t in (y, dx, *grads.values())]
    assert all(t.isfinite().all() for t in results) and dx.shape == x.shape
    for _ in range(2):
        begin(workspace)
        with Made() as made:
            y, cache = layer.forward(params, x, workspace)
            dx = layer.backward(params, grads, cache, dy, workspace)
        assert made.sizes == []
        found = [t.clone() for t in (y, dx, *grads.values())]
        assert all(a.equal(b) for a, b in zip(results, found, strict=True))
    assert all(a.equal(b) for a, b in zip(given, (x, dy, *params.values()), strict=True))

    start = {key: normal(*grad.shape, seed=5) for key, grad in grads.items()}
    for key, grad in grads.items():
        grad.copy_(start[key])
    begin(workspace)
    _, cache = layer.forward(params, x, workspace)
    layer.backward(params, grads, cache, dy, workspace, False, 1)
    for (key, grad), alone in zip(grads.items(), results[2:], strict=True):
        torch.testing.assert_close(grad, start[key] + alone, rtol=1e-13, atol=1e-13)
    begin(workspace)
    _, cache = layer.forward(params, x, workspace)
    if grads:
        assert layer.backward(params, grads, cache, dy, workspace, need_dx=False) is None
    for grad, alone in zip(grads.values(), results[2:], strict=True):
        assert grad.equal(alone)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d before pooling"])
def test_a_step_may_go_into_the_parameters_themselves(name):
    """beta = 1 with params as grads: W += dW, and dx is that of the old W."""
    layer, params, grads, x, _ = of_layer(name)
    workspace = Nans(torch.float64)
    begin(workspace)
    y, cache = layer.forward(params, x, workspace)
    dy = normal(*y.shape, seed=4)
    dx = layer.backward(params, grads, cache, dy, workspace).clone()
    before = {key: view.clone() for key, view in params.items()}
    begin(workspace)
    _, cache = layer.forward(params, x, workspace)
    assert layer.backward(params, params, cache, dy, workspace, beta=1).equal(dx)
    for key, view in params.items():
        torch.testing.assert_close(view, before[key] + grads[key], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_several_networks_is_each_networks_bit_for_bit(name):
    layer, params, grads, x, _ = of_layer(name, batch=33)
    workspace, made = Nans(torch.float64), Workspace(torch.float64)
    made.begin("aligned as a training's")
    x = made.empty(x.shape).copy_(x)
    begin(workspace)
    y, cache = layer.forward(params, x, workspace)
    dy = made.empty(y.shape).copy_(normal(*y.shape, seed=4))
    dx = layer.backward(params, grads, cache, dy, workspace)
    together = [t.clone() for t in (y, dx, *grads.values())]
    for r in range(3):
        one = slice(r, r + 1)
        alone = layer
        if isinstance(layer, Dropout) and isinstance(layer.p, tuple):
            alone = Dropout(layer.p[one])
        workspace.begin(r, Noise(torch.tensor([[mix(r)]]), clock(2)))
        mine = [{key: view[one] for key, view in views.items()} for views in (params, grads)]
        y, cache = alone.forward(mine[0], x[one], workspace)
        dx = alone.backward(*mine, cache, dy[one], workspace)
        found = (y, dx, *mine[1].values())
        assert all(a[one].equal(b) for a, b in zip(together, found, strict=True)), r


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("beta", [0, 1])
def test_a_product(replicas, beta):
    """out = beta out + a b; with beta = 0 not even a nan in out is read."""
    a, b = normal(replicas, 4, 300, seed=1), normal(replicas, 300, 5, seed=2)
    out = normal(replicas, 4, 5, seed=3) if beta else torch.full((replicas, 4, 5), torch.nan)
    out = out.double()
    expected = torch.einsum("rik,rkj->rij", a, b) + (out if beta else 0)
    assert product(a, b, out, Workspace(torch.float64), beta) is out
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    again = torch.full_like(out, torch.nan)
    product(a, b, again, Workspace(torch.float64))  # beta is 0 unless given
    torch.testing.assert_close(again, torch.einsum("rik,rkj->rij", a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1024, 1), (2, 1024, 1), (4, 64, 16)])
def test_products_of_several_networks_are_each_networks_bit_for_bit(m, k, n, dtype):
    """Where a batched kernel is known to sum in another order for one; and the workspace is not
    asked for memory."""
    a, b = normal(3, m, k, dtype=dtype), normal(3, k, n, seed=1, dtype=dtype)
    workspace = Workspace(dtype)
    workspace.begin("test")
    together = product(a, b, torch.empty(3, m, n, dtype=dtype), workspace)
    for r in range(3):
        parts = a[r : r + 1].clone(), b[r : r + 1].clone(), torch.empty(1, m, n, dtype=dtype)
        assert product(*parts, workspace)[0].equal(together[r])
    assert workspace._pools == {"test": []}


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("kind", ["both rounded", "one is low", "transposed"])
def test_a_product_in_bf16(kind, beta, monkeypatch):
    """Factors and product are rounded, the sum with what stood in out is not."""
    monkeypatch.setattr(module, "LOW_FROM", 1)
    low = torch.bfloat16
    a, b = normal(2, 4, 9, seed=1).float(), normal(2, 9, 5, seed=2).float()
    workspace = Nans(torch.float32, low=low)
    if kind == "one is low":  # as patches are, made before; then the product is always low
        workspace.low = None
        a = a.to(low)
    if kind == "transposed":
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
    rounded = torch.stack([a[r].to(low) @ b[r].to(low) for r in range(2)])
    assert not rounded.float().equal(a.float() @ b)
    out = normal(2, 4, 5, seed=3).float() if beta else torch.full((2, 4, 5), torch.nan)
    expected = (out if beta else 0) + rounded.float()
    workspace.begin("test")
    assert product(a, b, out, workspace, beta) is out and out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7)
    if not beta:
        assert out.equal(out.to(low).float())


def test_rounding_keeps_the_order_in_memory():
    workspace = Workspace(torch.float32, low=torch.bfloat16)
    workspace.begin("test")
    wide = normal(2, 20, 30).float()
    for x in (wide, wide.transpose(1, 2), wide[:, ::2], wide[:, :, :1]):
        found = module._round(x, torch.bfloat16, workspace)
        assert found.dtype == torch.bfloat16 and found.equal(x.to(torch.bfloat16))
        assert (found.stride(2) == 1) == (x.stride(2) == 1)
    half = wide.to(torch.bfloat16)
    assert module._round(half, torch.bfloat16, workspace) is half


def test_from_which_size_a_product_is_in_the_low_type():
    """On the CPU from 2^22 numbers; elsewhere always; never without a low type."""
    low = torch.bfloat16
    assert LOW_FROM == 4_194_304
    size = torch.Size((3, 2**10, 2**5))
    assert lowered(size, 2**7, Workspace(low=low)) == low
    assert lowered(size, 2**7 - 1, Workspace(low=low)) is None
    assert lowered(torch.Size((3, 2**10 + 1, 2**5)), 2**7 - 1, Workspace(low=low)) is None
    assert lowered(torch.Size((1, 2**11, 3)), 2**10, Workspace(low=low)) == low
    assert lowered(torch.Size((1, 3, 2**11)), 2**10, Workspace(low=low)) == low
    assert lowered(size, 2**7, Workspace()) is None
    assert lowered(torch.Size((1, 1, 1)), 1, Workspace(low=low, device="meta")) == low
    assert lowered(torch.Size((1, 1, 1)), 1, Workspace(device="meta")) is None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pool", [(1, 1), (3, 2)])
def test_a_convolution_in_bf16_is_near_and_keeps_low_patches(channels, pool, monkeypatch):
    layer = Conv2d(4, (3, 2), padding=(1, 0), pool=pool)
    x = normal(2, 3, 6, 5, channels).float()
    params = {"weight": normal(2, 6 * channels, 4).float(), "bias": normal(2, 4).float()}
    found = {}
    # A product of one network is (3 * 6 * 4, 4) over 6 channels: the limit is of that.
    for low_from in (72 * 4 * 6 * channels, 72 * 4 * 6 * channels + 1):
        monkeypatch.setattr(module, "LOW_FROM", low_from)
        workspace = Nans(torch.float32, low=torch.bfloat16)
        workspace.begin("test")
        y, cache = layer.forward(params, x, workspace)
        grads = {key: torch.full_like(view, torch.nan) for key, view in params.items()}
        dx = layer.backward(params, grads, cache, normal(*y.shape, seed=4).float(), workspace)
        assert all(t.dtype == torch.float32 for t in (y, dx, *grads.values()))
        found[cache[0].dtype] = [t.clone() for t in (y, dx, *grads.values())]
    assert set(found) == {torch.float32, torch.bfloat16}
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.2)
        assert not a.equal(b) or a.shape == (2, 4)  # the biases' product is too small


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("beta", [0, 1])
def test_a_product_on_a_gpu(beta):
    a, b, out = normal(3, 4, 9, seed=1), normal(3, 9, 5, seed=2), normal(3, 4, 5, seed=3)
    found = product(a.cuda(), b.cuda(), out.cuda(), Workspace(torch.float64, "cuda"), beta)
    torch.testing.assert_close(found.cpu(), beta * out + a @ b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 2)])
def test_torchs_order_of_a_convolutions_weights_and_back(kernel):
    layer, (kh, kw), channels = Conv2d(4, kernel), kernel, 3
    weight = normal(kh * kw * channels, 4)
    theirs = layer.to_torch(weight)
    assert theirs.shape == (4, channels, kh, kw)
    for i in range(kh):
        for j in range(kw):
            for c in range(channels):
                for o in range(4):
                    assert theirs[o, c, i, j] == weight[(i * kw + j) * channels + c, o]
    assert layer.from_torch(theirs).equal(weight)


def test_where_a_kernels_offset_meets_the_image():
    """Against a count of all outputs, one by one."""
    for offset in range(-5, 6):
        for stride in (1, 2, 3):
            for size in range(1, 6):
                for out in range(1, 6):
                    inside, outputs = module._overlap(offset, stride, size, out)
                    expected = [o for o in range(out) if 0 <= stride * o + offset < size]
                    found = list(range(out))[outputs]
                    assert found == expected
                    positions = list(range(size))[inside]
                    assert positions == [stride * o + offset for o in expected]


@pytest.mark.parametrize("name", ["max_pool2d", "max_pool2d, rows left out"])
def test_pooling_of_equal_numbers_sends_the_gradient_to_the_first(name):
    layer, shape = LAYERS[name]
    workspace = Nans(torch.float64)
    workspace.begin("test")
    x = torch.ones(2, 1, *shape, dtype=torch.float64)
    y, cache = layer.forward({}, x, workspace)
    dx = layer.backward({}, {}, cache, torch.full_like(y, 3), workspace)
    expected, (kh, kw) = torch.zeros_like(x), layer.kernel
    rows, columns = shape[0] // kh, shape[1] // kw
    expected[:, :, : rows * kh : kh, : columns * kw : kw] = 3
    assert dx.equal(expected) and y.eq(1).all()


@pytest.mark.parametrize("name", ["rows left out", "columns left out", "none left out", "apart"])
def test_pooling_sets_its_gradient_to_0_only_where_pixels_are_left_out(name):
    if name == "apart":  # as a convolution before it makes x, (R, ph, pw, B, H, W, C)
        layer, x = MaxPool2d((2, 2), True), normal(2, 2, 2, 3, 5, 5, 4)
    else:
        layer, shape = LAYERS[f"max_pool2d, {name}"]
        x = normal(2, 3, *shape)
    workspace = Nans(torch.float64)
    workspace.begin("test")
    y, cache = layer.forward({}, x, workspace)
    with Made() as made:
        dx = layer.backward({}, {}, cache, torch.ones_like(y), workspace)
    assert ("zero_" in made.names) == ("s left" in name)
    assert dx.isfinite().all() and dx.sum() == y.numel()


@pytest.mark.parametrize("padding", [(0, 0), (0, 1), (1, 0)])
def test_an_image_is_copied_only_to_be_padded(padding):
    layer, x = Conv2d(2, (2, 2), padding=padding), normal(1, 3, 5, 6, 2)
    params = {key: normal(1, *size) for key, size in layer.build((5, 6, 2))[1].items()}
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    layer.forward(params, x, workspace)
    padded = (1, 3, 5 + 2 * padding[0], 6 + 2 * padding[1], 2)
    assert any(buffer.shape == padded for buffer in workspace._pools["test"]) == any(padding)


def test_what_layers_make_of_a_shape():
    assert Linear(5).build((7,)) == ((5,), {"weight": (7, 5), "bias": (5,)})
    with pytest.raises(ValueError, match="too many values"):
        Linear(5).build((7, 2))
    assert ChannelsLast().build((2, 3, 4)) == ((3, 4, 2), {})
    assert Flatten().build((2, 3, 4)) == ((24,), {})
    shape, named = Conv2d(6, (2, 3), (2, 1), (1, 2)).build((7, 5, 3))
    assert shape == ((7 + 2 - 2) // 2 + 1, 5 + 4 - 3 + 1, 6)
    assert named == {"weight": (2 * 3 * 3, 6), "bias": (6,)}
    assert Conv2d(6, (2, 2), pool=(2, 3)).build((8, 6, 1))[0] == (6, 3, 6)  # of 7 x 5
    assert MaxPool2d((2, 3)).build((5, 7, 4)) == ((2, 2, 4), {})
    assert Flatten() == Flatten(False) and MaxPool2d((2, 3)) == MaxPool2d((2, 3), False)
    assert Dropout(0.1) == Dropout(0.1, 0)
    assert Conv2d(6, (2, 3)) == Conv2d(6, (2, 3), (1, 1), (0, 0), (1, 1))
    assert ReLU().build((2, 3)) == Dropout(0.1).build((2, 3)) == ((2, 3), {})


def hash_by_hand(seed, stream, step, position, unit):
    """The dropout mask's hash in Python's integers: splitmix64's mixing of the row, murmur3's of
    the unit, both on numbers that wrap around, the 32 bits signed at the end."""

    def signed(value, bits):
        value &= 2**bits - 1
        return value - 2**bits if value >> (bits - 1) else value

    row = (position + (step << 32)) * 0x9E3779B97F4A7C15 + mix(seed) + mix(stream)
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        row = signed(row, 64)
        row = (row ^ (row >> 30)) * multiplier
    key = signed(signed(row, 64) >> 32, 32)
    h = signed((key ^ signed(unit * 0x9E3779B1, 32)) * 0x85EBCA6B, 32)
    return signed((h ^ (h >> 15)) * 0xC2B2AE35, 32)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
def test_dropout_masks_are_the_hash_by_hand(p):
    seeds, step, first, stream = (5, 11), 3, 40, 2
    found = masks(p, (9, 13), seeds, step, first, stream)
    for r, seed in enumerate(seeds):
        for b in range(9):
            for unit in range(13):
                h = hash_by_hand(seed, stream, step, first + b, unit)
                kept = h >= int(p * 2**32) - 2**31
                assert found[r, b, unit] == pytest.approx(1 / (1 - p) if kept else 0.0)


def test_the_least_number_that_is_kept_is_the_threshold():
    """p 2^32 of the 2^32 numbers are dropped, those below p 2^32 - 2^31; p is chosen for a unit."""
    for unit in range(5):
        h = hash_by_hand(0, 0, 0, 0, unit)
        p = (h + 2**31) / 2**32
        assert masks(p, (1, 5))[0, 0, unit] == 1 / (1 - p)
        assert masks(p + 2**-32, (1, 5))[0, 0, unit] == 0


def test_dropout_of_images_counts_the_units_of_a_sample():
    flat, image = masks(0.5, (4, 30)), masks(0.5, (4, 2, 3, 5))
    assert image.shape == (1, 4, 2, 3, 5) and image.flatten(2).equal(flat)


def test_dropouts_constants_are_those_of_the_layer_at_work():
    """In one workspace: layers of other probabilities, widths and batches, before and after."""
    workspace = Workspace(torch.float64)
    for number in range(2):
        for p, units, batch, first in ((0.5, 6, 4, 0), (0.9, 6, 4, 0), (0.5, 9, 3, 2)):
            workspace.begin(number, Noise(torch.tensor([[mix(0)], [mix(1)]]), clock(0), first))
            x = torch.ones(2, batch, units, dtype=torch.float64)
            y, _ = Dropout(p).forward({}, x, workspace)
            assert y.equal(masks(p, (batch, units), (0, 1), first=first))


def arranged(specs, shape=(2, 12, 12)):
    return arrange_pooling(build_layers(specs, shape, 3))


def test_pooling_is_put_before_the_activations_between():
    conv, pool = ["conv2d", 4, 3], ["max_pool2d", 2]
    moved = [ChannelsLast(), Conv2d(4, (3, 3), pool=(2, 2)), MaxPool2d((2, 2), True)]
    assert arranged([conv, pool]) == moved
    assert arranged([conv, ["relu"], pool]) == [*moved, ReLU()]
    several = [conv, ["relu"], ["tanh"], ["sigmoid"], pool, ["relu"]]
    assert arranged(several) == [*moved, ReLU(), Tanh(), Sigmoid(), ReLU()]
    twice = arranged([conv, ["relu"], pool, conv, ["tanh"], pool])
    assert twice == [*moved, ReLU(), *moved[1:], Tanh()]
    for same in (
        [conv, ["relu"]],
        [conv],
        [pool, conv],
        [conv, ["dropout", 0.1], pool],
        [conv, conv, ["relu"]],
        [["relu"], pool],
        [conv, ["relu"], ["max_pool2d", 1]],
    ):
        assert arranged(same) == build_layers(same, (2, 12, 12), 3)
    assert arranged([conv, ["max_pool2d", [1, 2]]])[1].pool == (1, 2)
    given_layers = build_layers([conv, pool], (2, 12, 12), 3)
    before = list(given_layers)
    assert arrange_pooling(given_layers) is not given_layers and given_layers == before


def test_what_is_built():
    """Orders of channels, implied and asked-for flattening, pairs of numbers, dropout's streams."""
    specs = [
        ["dropout", 0],
        ["conv2d", 4, [3, 2], {"stride": [2, 1], "padding": 1}],
        ["relu"],
        ["max_pool2d", [2, 3]],
        ["dropout", [0.25, 0.5]],
        ["linear", 6],
        ["tanh"],
        ["linear", "classes"],
        ["sigmoid"],
    ]
    assert build_layers(specs, (2, 9, 9), 5) == [
        Dropout(0.0, 0),
        ChannelsLast(),
        Conv2d(4, (3, 2), (2, 1), (1, 1)),
        ReLU(),
        MaxPool2d((2, 3)),
        Dropout((0.25, 0.5), 4),
        Flatten(True),
        Linear(6),
        Tanh(),
        Linear(5),
        Sigmoid(),
    ]
    assert build_layers([["conv2d", 1, 2], ["flatten"], ["linear", 1]], (1, 2, 2), 9) == [
        ChannelsLast(),
        Conv2d(1, (2, 2), (1, 1), (0, 0)),
        Flatten(True),
        Linear(1),
    ]
    assert build_layers([["flatten"], ["flatten"], ["relu"]], (1, 2, 2), 9) == [
        Flatten(False),
        Flatten(False),
        ReLU(),
    ]
    conv = ["conv2d", 1, 2]
    assert build_layers([conv, ["flatten"], ["flatten"]], (1, 2, 2), 9)[2:] == [
        Flatten(True),
        Flatten(False),
    ]
    assert build_layers([conv, ["linear", 3], ["flatten"]], (1, 3, 3), 9)[2:] == [
        Flatten(True),
        Linear(3),
        Flatten(False),
    ]
    pools = build_layers([["max_pool2d", (2, 2)], ["max_pool2d", 2], ["linear", 2]], (3, 4, 4), 2)
    assert pools == [ChannelsLast(), MaxPool2d((2, 2)), MaxPool2d((2, 2)), Flatten(True), Linear(2)]
    assert build_layers([["linear", 3]], (4, 5), 2) == [Flatten(False), Linear(3)]
    assert type(build_layers([["dropout", 0]], (4,), 2)[0].p) is float
    rates = build_layers([["dropout", [0, 0.5]]], (4,), 2)[0].p
    assert rates == (0.0, 0.5) and all(type(p) is float for p in rates)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["linear", 1.0], "linear needs units >= 1 or 'classes', not 1.0"),
        (["linear", True], "not True"),
        (["linear", "class"], "not 'class'"),
        (["linear", -1], "not -1"),
        (["linear", 1, 2], r'write \["linear", units\], not \[.linear., 1, 2\]'),
        (["linear", "classes", 2], r'write \["linear", units\]'),
        (["flatten", 2], r"flatten takes no arguments, not \[2\]"),
        (["dropout"], r'write \["dropout", p\], not \[.dropout.\]'),
        (["dropout", 0.1, 0.2], r'write \["dropout", p\]'),
        (["dropout", -0.1], "not -0.1"),
        (["dropout", 1.0], "not 1.0"),
        (["dropout", True], "not True"),
        (["dropout", False], "not False"),
        (["dropout", "half"], "not 'half'"),
        (["dropout", [0.5, 1.0]], "not 1.0"),
        (["dropout", [0.5, True]], "not True"),
        (["dropout", float("nan")], "not nan"),
        (["conv2d", 4, 3, {"stride": 1}, 5], r'write \["conv2d", channels, kernel'),
        (["conv2d", 4, 3, 1], r'write \["conv2d", channels, kernel'),
        (["conv2d", 4, {"stride": 1}], "kernel must be a whole number from 1, or two of them"),
        (["conv2d", True, 3], "conv2d needs channels >= 1, not True"),
        (["conv2d", 2.0, 3], "conv2d needs channels >= 1, not 2.0"),
        (["conv2d", -1, 3], "conv2d needs channels >= 1, not -1"),
        (["conv2d", 4, 0], "kernel must be a whole number from 1, or two of them, not 0"),
        (["conv2d", 4, [3, 0]], r"kernel must be .* not \[3, 0\]"),
        (["conv2d", 4, [True, 3]], r"kernel must be .* not \[True, 3\]"),
        (["conv2d", 4, 2.0], "kernel must be .* not 2.0"),
        (["conv2d", 4, [3]], r"kernel must be .* not \[3\]"),
        (["conv2d", 4, 3, {"stride": [1, 0]}], r"stride must be a whole number from 1.* \[1, 0\]"),
        (["conv2d", 4, 3, {"padding": [0, -1]}], r"padding must be a whole number from 0.* -1\]"),
        (["conv2d", 4, 3, {"kernel": 1}], "unknown option 'kernel'"),
        (["conv2d", 4, 3, {"padding": 1, "pad": 1}], "unknown option 'pad'; did you mean"),
        (["conv2d", 4, [7, 3]], r"kernel \(7, 3\) leaves nothing of an image of 6 x 7"),
        (["conv2d", 4, [3, 8]], r"kernel \(3, 8\) leaves nothing of an image of 6 x 7"),
        (["max_pool2d", [1, 8]], r"kernel \(1, 8\) leaves nothing of an image of 6 x 7"),
        (["max_pool2d", 2, 2], r'write \["max_pool2d", kernel\]'),
        (["max_pool2d", 0], "kernel must be a whole number from 1"),
        ([3], r"model.layers\[0\]: unknown layer 3"),
    ],
)
def test_bad_values_are_named(spec, message):
    with pytest.raises(InputError, match=message) as error:
        build_layers([spec], (2, 6, 7), 3)
    assert str(error.value).startswith("model.layers[0]: ") and "\n" not in str(error.value)


def test_the_least_that_is_allowed():
    """One unit, channel, pixel; an image as large as the kernel; dropout of 0."""
    for spec in (
        ["linear", 1],
        ["conv2d", 1, [6, 7]],
        ["conv2d", 1, 1, {"stride": 9}],
        ["conv2d", 1, 6, {"padding": 0, "stride": 1}],
        ["max_pool2d", [6, 7]],
        ["max_pool2d", 1],
        ["dropout", 0],
        ["dropout", [0]],
        ["dropout", 0.999],
    ):
        assert build_layers([spec], (2, 6, 7), 3)
    for spec in (["conv2d", 1, 3], ["max_pool2d", 2]):
        for shape in ((4,), (4, 5), (1, 2, 3, 4)):
            with pytest.raises(InputError, match=f"{spec[0]} needs images"):
                build_layers([spec], shape, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_and_sigmoid_are_exact_for_tiny_and_large_inputs(dtype):
    x = torch.tensor([0.0, 1e-30, -1e-20, 1e-4, 0.5, 3.0, -9.0, 40.0, -100.0, 1e5], dtype=dtype)
    x = x.view(1, 2, 5)
    workspace = Workspace(dtype)
    for layer, exact in ((Tanh(), torch.tanh), (Sigmoid(), torch.sigmoid)):
        workspace.begin(exact.__name__)
        y = layer.forward({}, x, workspace)[0]
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, exact(x.double()).to(dtype), rtol=bound, atol=1e-37)


def test_patches_of_one_channel_lie_row_by_row():
    """Whole rows of images are copied, not single numbers; of more channels, all of a pixel."""
    workspace = Workspace(torch.float64)
    for channels in (1, 2):
        workspace.begin(channels)
        x = normal(1, 2, 6, 7, channels)
        windows = Conv2d(1, (3, 2))._apart(x.unfold(2, 3, 1).unfold(3, 2, 1))
        patches = module._patches(windows, workspace, None)
        assert patches.shape == (1, 2 * 4 * 6, 6 * channels)
        assert patches.stride()[1:] == ((1, 48) if channels == 1 else (12, 1))
        assert patches.dtype == torch.float64
        expected = torch.stack([
            x[0, b, h : h + 3, w : w + 2].reshape(-1)
            for b in range(2) for h in range(4) for w in range(6)
        ])  # fmt: skip
        assert patches[0].equal(expected)
