"""For any network, data, hyperparameters and memory layout: the same as autograd, torch.optim, a
network alone; and what is written is read back."""

import tomllib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manualnn.config import parse_config
from manualnn.layers import build_layers
from manualnn.losses import LOSSES, decide, hits, outputs, probabilities
from manualnn.network import Network
from manualnn.optimizers import SGD, Adam, Penalty
from manualnn.parameters import ALIGN, Layout
from manualnn.workspace import Workspace

from . import oracle
from .conftest import config_of, random_data, train_alone, train_to_the_end
from .test_network import as_torch, random_network

ACTIVATIONS = st.sampled_from([["relu"], ["tanh"], ["sigmoid"]])


def budget(examples):
    """So many examples, always the same ones, in any time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@st.composite
def architectures(draw):
    """(layers, shape of an example): images with convolutions and pooling, or plain vectors."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    specs = []
    if draw(st.booleans()):
        shape = number(1, 3), number(3, 9), number(3, 9)
        height, width = shape[1:]
        for _ in range(number(1, 3)):
            if draw(st.booleans()):
                padding, stride = [number(0, 2), number(0, 2)], [number(1, 3), number(1, 2)]
                kernel = [number(1, min(4, height + 2 * padding[0]))]
                kernel.append(number(1, min(4, width + 2 * padding[1])))
                options = {"padding": padding, "stride": stride}
                specs.append(["conv2d", number(1, 18), kernel, options])
                height = (height + 2 * padding[0] - kernel[0]) // stride[0] + 1
                width = (width + 2 * padding[1] - kernel[1]) // stride[1] + 1
            for _ in range(number(0, 2)):
                specs.append(draw(ACTIVATIONS))
            if draw(st.booleans()):
                kernel = [number(1, min(3, height)), number(1, min(3, width))]
                specs.append(["max_pool2d", kernel])
                height, width = height // kernel[0], width // kernel[1]
        specs.append(["flatten"])
    else:
        shape = (number(1, 20),)
    for _ in range(number(0, 2)):
        specs += [["linear", number(1, 20)], draw(ACTIVATIONS)]
    return specs, shape


def laid_out(x, how):
    """The numbers of x (R, B, ...) in another order in memory, or with others between them."""
    if how == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "reversed":
        order = tuple(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if how == "expanded":
        return x[:1].expand(x.shape)
    return x


LAYOUTS = st.sampled_from(["as made", "transposed", "reversed", "sliced", "expanded"])


@budget(200)
@given(
    architecture=architectures(),
    loss=st.sampled_from(list(LOSSES)),
    replicas=st.integers(1, 3),
    batch=st.integers(1, 7),
    classes=st.integers(1, 18),
    how=LAYOUTS,
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    need_dx=st.booleans(),
)
def test_any_network_equals_autograd(
    architecture, loss, replicas, batch, classes, how, dtype, need_dx
):
    specs, shape = architecture
    classes = 2 if loss == "logistic" else classes
    specs = [*specs, ["linear", outputs(loss, classes)]]
    network = random_network(specs, shape, classes, replicas, dtype)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(replicas, batch, *shape, generator=draw, dtype=torch.float64).to(dtype)
    x = laid_out(x, how)
    y = torch.randint(0, classes, (replicas, batch), generator=draw)
    grad = torch.full_like(network.theta, torch.nan)
    workspace = Workspace(dtype)
    for _ in range(2):  # the second time into buffers that are no longer fresh
        workspace.begin("test")
        logits, caches = network.forward(x, workspace)
        value, dlogits = LOSSES[loss](logits, y, workspace)
        views = network.layout.views(grad)
        dx = network.backward(dlogits, caches, views, workspace, need_dx=need_dx)
    bound = dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-5)
    for r in range(replicas):
        leaf = x[r].double().requires_grad_()
        row = network.theta[r : r + 1].double().requires_grad_()
        out = oracle.forward(specs, as_torch(network, row), leaf)
        expected = oracle.loss(loss, out, y[r])
        expected.backward()
        torch.testing.assert_close(value[r].double(), expected.detach(), **bound)
        ours, theirs = (network.layout.to_dict(g[0].double()) for g in (grad[r : r + 1], row.grad))
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, **bound)
        if need_dx:
            torch.testing.assert_close(dx[r].double(), leaf.grad, **bound)


@budget(150)
@given(
    name=st.sampled_from(list(LOSSES)),
    replicas=st.integers(1, 3),
    batch=st.integers(1, 6),
    classes=st.integers(1, 18),
    exponents=st.lists(st.integers(-300, 10), min_size=2, max_size=2),
    smoothing=st.sampled_from([0.0, 0.3]),
    shared=st.booleans(),
    how=LAYOUTS,
)
def test_losses_of_huge_and_small_logits(
    name, replicas, batch, classes, exponents, smoothing, shared, how
):
    """Logits of two sizes side by side; targets of each replica, or one row for all."""
    classes = 2 if name == "logistic" else classes
    k = outputs(name, classes)
    draw = torch.Generator().manual_seed(4)
    sizes = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
    logits = torch.randn(replicas, batch, k, generator=draw, dtype=torch.float64)
    logits = logits * sizes[torch.randint(0, 2, logits.shape, generator=draw)]
    logits = laid_out(logits, how)
    rows = 1 if shared else replicas
    targets = torch.randint(0, classes, (rows, batch), generator=draw)
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    loss, dlogits = LOSSES[name](logits, targets, workspace, smoothing)
    assert loss.isfinite().all() and dlogits.isfinite().all()
    right = hits(logits, targets, workspace)
    for r, y in enumerate(targets.expand(replicas, -1)):
        leaf = logits[r].clone().requires_grad_()
        oracle.loss(name, leaf, y, smoothing).backward()
        expected = oracle.loss(name, logits[r], y)
        torch.testing.assert_close(loss[r], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(dlogits[r], leaf.grad, rtol=1e-12, atol=1e-14)
        chosen = decide(logits[r])
        assert right[r] == (chosen == y).sum()
        if k > 1:
            picked = logits[r].gather(1, chosen.unsqueeze(1)).squeeze(1)
            assert picked.equal(logits[r].max(1).values)
            expected = torch.softmax(logits[r], 1)
        else:
            assert chosen.equal((logits[r, :, 0] > 0).long())
            s = torch.sigmoid(logits[r])
            expected = torch.cat([torch.sigmoid(-logits[r]), s], 1)
        torch.testing.assert_close(probabilities(logits[r]), expected, rtol=1e-12, atol=1e-300)


RATES = st.sampled_from([0.0, 1e-4, 0.1, 3.0])


@budget(100)
@given(
    name=st.sampled_from(["sgd", "adam", "adamw"]),
    columns=st.lists(
        st.tuples(RATES, st.sampled_from([0.0, 0.5, 0.99]), st.sampled_from([0.0, 1e-3, 0.4])),
        min_size=1,
        max_size=3,
    ),
    nesterov=st.booleans(),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.9, 0.999])),
    epsilon=st.sampled_from([1e-8, 1e-3]),
    sizes=st.lists(st.sampled_from([0.0, 1e-20, 1e-8, 1.0, 1e6]), min_size=1, max_size=12),
)
def test_optimizers_equal_torch(name, columns, nesterov, betas, epsilon, sizes):
    """A sequence of gradients of any sizes, each replica with its own rate, momentum and L2."""
    count = len(columns)
    draw = torch.Generator().manual_seed(5)
    start = torch.randn(count, 4, generator=draw, dtype=torch.float64)
    gradients = [torch.randn(count, 4, generator=draw, dtype=torch.float64) * s for s in sizes]
    rate, momentum, l2 = (
        torch.tensor(values, dtype=torch.float64).unsqueeze(1)
        for values in zip(*columns, strict=True)
    )
    theta, mask = start.clone(), torch.ones(4, dtype=torch.float64)
    if name == "sgd":
        ours = SGD(theta, momentum, nesterov)
    else:
        ours = Adam(theta, *betas, epsilon, decay=l2 * mask if name == "adamw" else None)
    penalty = Penalty(0 * l2, 0 * l2 if name == "adamw" else l2, mask)
    for t, gradient in enumerate(gradients, 1):
        grad = gradient.clone()
        penalty.add(theta, grad)
        ours.prepare(rate, t)
        ours.step(theta, grad, rate)
    for r, (lr, m, decay) in enumerate(columns):
        leaf = start[r].clone().requires_grad_()
        if name == "sgd":
            options = dict(momentum=m, nesterov=nesterov and m > 0)
            theirs = torch.optim.SGD([leaf], lr, weight_decay=decay, **options)
        else:
            kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
            theirs = kind([leaf], lr, betas, epsilon, weight_decay=decay)
        for gradient in gradients:
            leaf.grad = gradient[r].clone()
            theirs.step()
        torch.testing.assert_close(theta[r], leaf.detach(), rtol=1e-11, atol=1e-13)


@st.composite
def trees(draw):
    """Nested values of a valid config."""
    number = lambda low, high: draw(st.floats(low, high, allow_subnormal=False))  # noqa: E731
    several = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    specs = draw(architectures())[0]
    if draw(st.booleans()):
        specs.append(["dropout", number(0, 0.9)])
    networks = draw(st.integers(1, 3))
    column = lambda low, high: [number(low, high) for _ in range(networks)]  # noqa: E731
    return {
        "data": {"name": several("mnist", "kmnist"), "valid": several(0, 100, 0.25)},
        "model": {"layers": [*specs, ["linear", "classes"]], "init": several("he", "xavier")},
        "train": {
            "epochs": draw(st.integers(1, 9)),
            "batch_size": draw(st.integers(1, 999)),
            "loss": several(*LOSSES),
            "label_smoothing": number(0, 0.9),
            "seeds": draw(
                st.lists(st.integers(0, 99), min_size=networks, max_size=networks, unique=True)
            ),
            "l1": column(0, 1),
            "l2": number(0, 1),
            "optimizer": {
                "name": several("sgd", "adam", "adamw"),
                "learning_rate": column(0, 10),
                "momentum": number(0, 0.99),
                "epsilon": number(1e-12, 1),
            },
            "schedule": {
                "name": several("constant", "step", "linear", "cosine", "one_cycle"),
                "warmup_steps": draw(st.integers(0, 50)),
                "gamma": number(0, 1),
            },
        },
    }


@budget(40)
@given(tree=trees())
def test_a_config_is_read_back_as_it_was(tree):
    config = parse_config(tree)
    text = config.to_toml()
    again = parse_config(tomllib.loads(text))
    assert again.to_dict() == config.to_dict() and again.to_toml() == text
    for table, values in tree.items():
        found = again.to_dict()[table]
        for key, value in values.items():
            if not isinstance(value, dict):
                assert found[key] == value, key
            else:
                assert {k: found[key][k] for k in value} == value, key


@budget(12)
@given(
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    columns=st.lists(
        st.tuples(
            st.integers(0, 50),
            st.sampled_from([0.01, 0.1]),
            st.sampled_from([0.5, 0.9]),
            st.sampled_from([1e-3, 0.1]),
            st.sampled_from([1e-5, 1e-3]),
        ),
        min_size=2,
        max_size=3,
        unique_by=lambda column: column[0],
    ),
    batch=st.sampled_from([7, 32]),
    width=st.integers(1, 20),
    precision=st.sampled_from(["fp32", "fp64"]),
)
def test_a_population_equals_its_networks_alone(optimizer, columns, batch, width, precision):
    def run(train, seeds, rate, momentum, l2, l1):
        return train(
            config_of(
                model__layers=[["linear", width], ["tanh"], ["dropout", 0.2], ["linear", 3]],
                train__epochs=2,
                train__batch_size=batch,
                train__precision=precision,
                train__seeds=seeds,
                train__optimizer={"name": optimizer, "learning_rate": rate, "momentum": momentum},
                train__l2=l2,
                train__l1=l1,
            ),
            data,
        )

    data = random_data(samples=40, dtype=precision)
    together = run(train_to_the_end, *map(list, zip(*columns, strict=True)))
    for r, (seed, *values) in enumerate(columns):
        alone = run(train_alone, [seed], *values)
        assert alone.network.theta[0].equal(together.network.theta[r])


@budget(40)
@given(
    shapes=st.lists(
        st.dictionaries(
            st.sampled_from(["weight", "bias"]),
            st.lists(st.integers(1, 19), min_size=1, max_size=2).map(tuple),
            min_size=1,
        ),
        min_size=1,
        max_size=5,
    ),
    replicas=st.integers(1, 3),
)
def test_views_part_the_buffer(shapes, replicas):
    """Each number of the buffer belongs to one view or to one gap; names and copies fit."""
    layout = Layout.of(shapes)
    buffer = torch.zeros(replicas, layout.width, dtype=torch.float64)
    views = layout.views(buffer)
    assert [{n: tuple(v.shape[1:]) for n, v in named.items()} for named in views] == shapes
    flat = [view for named in views for view in named.values()]
    for number, view in enumerate(flat, 1):
        view.add_(number)
        assert view.data_ptr() % (buffer.element_size() * ALIGN) == buffer.data_ptr() % (
            buffer.element_size() * ALIGN
        )
    for gap in layout.gaps(buffer):
        assert gap.eq(0).all() and gap.shape[1] < ALIGN
        gap.sub_(1)
    assert buffer.ne(0).all()
    assert sum(int((buffer[0] == n).sum()) for n in range(1, len(flat) + 1)) == layout.count
    assert int(layout.weight_mask().sum()) == sum(
        view[0].numel() for named in views for name, view in named.items() if name == "weight"
    )
    for r in range(replicas):
        copies = layout.to_dict(buffer[r])
        assert list(copies) == layout.keys()
        other = torch.zeros_like(buffer)
        for slot, (key, copy) in zip(layout.slots, copies.items(), strict=True):
            assert key[0] == slot.name[0] and copy.is_contiguous()
            layout.view(other, slot)[r].copy_(copy)
        for gap in layout.gaps(other):
            gap.sub_(1)
        assert other[r].equal(buffer[r])


@budget(40)
@given(architecture=architectures(), data=st.data())
def test_layers_promise_the_shapes_that_they_give(architecture, data):
    """`build` against what forward makes, and against the count of torch's parameters."""
    specs, shape = architecture
    replicas, batch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    workspace = Workspace(torch.float64)
    workspace.begin("test")
    x = torch.randn(replicas, batch, *shape, dtype=torch.float64)
    expected = shape
    for layer in build_layers(specs, shape, 3):
        expected, named = layer.build(expected)
        params = {name: torch.randn(replicas, *size).double() for name, size in named.items()}
        x, _ = layer.forward(params, x, workspace)
        assert x.shape == (replicas, batch, *expected)


def test_a_network_of_one_sample_and_one_unit():
    network = Network([["linear", 1]], (1,), 1, 1, torch.float64)
    network.params[0]["weight"].fill_(3.0)
    network.params[0]["bias"].fill_(0.5)
    assert network.logits(torch.tensor([[2.0]], dtype=torch.float64)).item() == pytest.approx(6.5)
