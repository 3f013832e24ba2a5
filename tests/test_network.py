"""Composed networks against autograd; parameters as views; weights files."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from manualnn.errors import InputError
from manualnn.layers import Conv2d
from manualnn.losses import LOSSES, outputs
from manualnn.network import Network, load_weights, save_weights
from manualnn.workspace import Noise, Workspace, clock, mix

from . import oracle

COMPOSED = {
    "softmax regression": [["linear", "classes"]],
    "mlp": [["linear", 7], ["relu"], ["linear", 6], ["relu"], ["linear", "classes"]],
    "all layers": [
        ["flatten"],
        ["linear", 8],
        ["tanh"],
        ["linear", 7],
        ["sigmoid"],
        ["dropout", 0.0],
        ["linear", 6],
        ["relu"],
        ["linear", "classes"],
    ],
}


def random_network(specs, shape, classes, replicas, dtype=torch.float64):
    network = Network(specs, shape, classes, replicas, dtype)
    draw = torch.Generator().manual_seed(2)
    for named in network.params:
        for view in named.values():
            view.copy_(torch.randn(view.shape, generator=draw, dtype=torch.float64) * 0.6)
    return network


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("replicas", [1, 3])
def test_composed_gradients_equal_autograd(name, loss, replicas, differs):
    """The gradient of every parameter and of the input, from the loss down, into used buffers."""
    classes = 2 if loss == "logistic" else 4
    specs = [["linear", outputs(loss, classes)] if s == ["linear", "classes"] else s
             for s in COMPOSED[name]]  # fmt: skip
    network = random_network(specs, (2, 3), classes, replicas)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(replicas, 11, 2, 3, generator=draw, dtype=torch.float64)
    y = torch.randint(0, classes, (replicas, 11), generator=draw)
    grad = torch.full_like(network.theta, torch.nan)
    workspace = Workspace(torch.float64)
    for _ in range(2):  # the second time into buffers that are no longer fresh
        workspace.begin("test")
        logits, caches = network.forward(x, workspace)
        value, dlogits = LOSSES[loss](logits, y, workspace)
        dx = network.backward(dlogits, caches, network.layout.views(grad), workspace, need_dx=True)
    layer_specs = [s for s in specs if s[0] != "flatten"]
    for r in range(replicas):
        leaf = x[r].clone().requires_grad_()
        row = network.theta[r : r + 1].clone().requires_grad_()
        views = [{k: v[0] for k, v in named.items()} for named in network.layout.views(row)]
        params = [v for v, s in zip(views[-len(layer_specs) :], layer_specs, strict=True)]
        expected = oracle.loss(loss, oracle.forward(layer_specs, params, leaf.flatten(1)), y[r])
        expected.backward()
        label = f"network {name}, {loss}, R = {replicas}"
        differs(label, value[r], expected.detach())
        for key, tensor in network.layout.to_dict(row.grad[0]).items():
            differs(label, network.layout.to_dict(grad[r])[key], tensor)
        differs(label, dx[r], leaf.grad)


CNN = [
    ["conv2d", 3, 3, {"padding": 1}],
    ["relu"],
    ["max_pool2d", 2],
    ["conv2d", 4, [2, 3], {"stride": 2, "padding": 1}],
    ["tanh"],
    ["linear", 5],
    ["relu"],
    ["linear", "classes"],
]


def as_torch(network, row):
    """One network's parameters as its weights file has them, a dict for each layer of the specs."""
    tensors = iter(network.layout.views(row))
    named = [{k: v[0] for k, v in views.items()} for views in tensors if views]
    for views, layer in zip(named, (x for x in network.layers if hasattr(x, "units") or
                                    hasattr(x, "channels")), strict=True):  # fmt: skip
        if isinstance(layer, Conv2d):
            views["weight"] = layer.to_torch(views["weight"])
    found = iter(named)
    return [next(found) if spec[0] in ("conv2d", "linear") else {} for spec in network.specs]


@pytest.mark.parametrize("replicas", [1, 3])
def test_convolutional_gradients_equal_autograd(replicas, differs):
    network = random_network(CNN, (2, 9, 7), 4, replicas)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(replicas, 6, 2, 9, 7, generator=draw, dtype=torch.float64)
    y = torch.randint(0, 4, (replicas, 6), generator=draw)
    grad = torch.full_like(network.theta, torch.nan)
    workspace = Workspace(torch.float64)
    for _ in range(2):
        workspace.begin("test")
        logits, caches = network.forward(x, workspace)
        value, dlogits = LOSSES["cross_entropy"](logits, y, workspace)
        dx = network.backward(dlogits, caches, network.layout.views(grad), workspace, need_dx=True)
    at = CNN.index(["linear", 5])
    specs = [*CNN[:at], ["flatten"], *CNN[at:]]
    for r in range(replicas):
        leaf = x[r].clone().requires_grad_()
        row = network.theta[r : r + 1].clone().requires_grad_()
        params = as_torch(network, row)
        params.insert(at, {})
        expected = oracle.loss("cross_entropy", oracle.forward(specs, params, leaf), y[r])
        expected.backward()
        label = f"network cnn, R = {replicas}"
        differs(label, value[r], expected.detach())
        for key, tensor in network.layout.to_dict(row.grad[0]).items():
            differs(label, network.layout.to_dict(grad[r])[key], tensor)
        differs(label, dx[r], leaf.grad)


def test_convolutional_weights_are_torchs(tmp_path):
    """The file alone, with torch's layers, gives the same logits; reading it gives them back."""
    network = random_network(CNN, (2, 9, 7), 4, 2)
    x = torch.randn(5, 2, 9, 7, dtype=torch.float64)
    save_weights(tmp_path / "w.pkl", network, {"loss": "cross_entropy"}, replica=1)
    content = torch.load(tmp_path / "w.pkl")
    assert content["w1"].shape == (3, 2, 3, 3) and content["w2"].shape == (4, 3, 2, 3)
    y = functional.conv2d(x, content["w1"], content["b1"], padding=1)
    y = functional.max_pool2d(torch.relu(y), 2)
    y = torch.tanh(functional.conv2d(y, content["w2"], content["b2"], stride=2, padding=1))
    y = torch.relu(y.flatten(1) @ content["w3"] + content["b3"]) @ content["w4"] + content["b4"]
    torch.testing.assert_close(network.logits(x)[1], y, rtol=1e-12, atol=1e-12)
    again = load_weights(tmp_path / "w.pkl").network
    assert again.logits(x)[0].equal(network.logits(x)[1])
    assert network.first_images(1).shape == (3, 2, 3, 3)


def test_evaluation_takes_as_many_samples_at_a_time_as_memory_allows():
    """2,000 of a perceptron; of a convolution as many as leave its patches within 2**23 numbers."""
    assert Network([["linear", 256], ["linear", 10]], (1, 28, 28), 10).chunk == 2000
    layers = [["conv2d", 16, 3, {"padding": 1}], ["conv2d", 32, 3], ["linear", 10]]
    assert Network(layers, (1, 28, 28), 10).chunk == 2**23 // (26 * 26 * 9 * 16)


def test_parameters_of_the_exercises_networks():
    """784-100-100-10 has 89,610, the CNN 29,066 with padding 1 and 23,946 without."""
    mlp = [["linear", 100], ["relu"], ["linear", 100], ["relu"], ["linear", "classes"]]
    assert Network(mlp, (1, 28, 28), 10).layout.count == 89_610
    for padding, count in ((1, 29_066), (0, 23_946)):
        layers = []
        for channels in (16, 32, 64):
            layers += [["conv2d", channels, 3, {"padding": padding}], ["relu"], ["max_pool2d", 2]]
        network = Network([*layers, ["linear", "classes"]], (1, 28, 28), 10)
        assert network.layout.count == count == sum(r["parameters"] for r in network.summary())
        shapes = [row["output_shape"] for row in network.summary()]
        assert shapes[0] == ([16, 28, 28] if padding else [16, 26, 26])


def test_dropout_inside_a_network_equals_autograd_with_the_same_mask(differs):
    network = random_network([["dropout", 0.3], ["linear", 5], ["relu"], ["linear", 3]], (6,), 3, 2)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y = torch.randint(0, 3, (2, 9))
    noise = Noise(torch.tensor([[mix(1)], [mix(2)]]), clock(5))
    workspace = Workspace(torch.float64)
    workspace.begin("test", noise)
    logits, caches = network.forward(x, workspace)
    _, dlogits = LOSSES["cross_entropy"](logits, y, workspace)
    grad = torch.zeros_like(network.theta)
    dx = network.backward(dlogits, caches, network.layout.views(grad), workspace, need_dx=True)
    for r in range(2):
        leaf = x[r].clone().requires_grad_()
        row = network.theta[r : r + 1].clone().requires_grad_()
        params = [{k: v[0] for k, v in named.items()} for named in network.layout.views(row)]
        out = oracle.forward(network.specs[1:], params[1:], leaf * caches[0][r])
        oracle.loss("cross_entropy", out, y[r]).backward()
        differs("network with dropout, R = 2", grad[r], row.grad[0])
        differs("network with dropout, R = 2", dx[r], leaf.grad)


def test_parameters_are_views_of_one_buffer():
    network = Network([["linear", 4], ["relu"], ["linear", "classes"]], (3,), 2, replicas=2)
    assert network.layout.count == 3 * 4 + 4 + 4 * 2 + 2
    network.params[2]["bias"][1, 0] = 5
    offsets = [slot.offset for slot in network.layout.slots]
    assert offsets == [0, 16, 32, 48]
    assert network.theta.shape == (2, 64)
    assert network.theta[1].nonzero().tolist() == [[48]]
    assert network.layout.keys() == ["w1", "b1", "w2", "b2"]
    assert int(network.layout.weight_mask().sum()) == 3 * 4 + 4 * 2
    assert network.layout.weight_mask()[16:32].eq(0).all()


@pytest.mark.parametrize("init", ["he", "xavier"])
def test_initialization(init):
    network = Network([["linear", 300], ["relu"], ["linear", 200]], (400,), 200, replicas=3)
    network.initialize([7, 8, 7], init)
    assert network.theta[0].equal(network.theta[2])
    assert not network.theta[0].equal(network.theta[1])
    fans = [(400, 300), (300, 200)]
    for layer, (fan_in, fan_out) in zip((0, 2), fans, strict=True):
        weight = network.params[layer]["weight"][0]
        std = (2 / (fan_in if init == "he" else fan_in + fan_out)) ** 0.5
        assert float(weight.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(weight.mean())) < 5 * std / weight.numel() ** 0.5
        assert network.params[layer]["bias"].eq(0).all()


def test_weights_file_round_trip(tmp_path):
    network = random_network([["linear", 4], ["relu"], ["linear", "classes"]], (1, 2, 3), 5, 2)
    save_weights(tmp_path / "w.pkl", network, {"dataset": "mnist", "normalization": {}}, replica=1)
    loaded = load_weights(tmp_path / "w.pkl")
    assert loaded.network.theta[0].equal(network.theta[1])
    assert loaded.meta["dataset"] == "mnist"
    x = torch.randn(7, 1, 2, 3, dtype=torch.float64)
    assert loaded.network.logits(x)[0].equal(network.logits(x)[1])
    assert not loaded.network.logits(x).is_inference()


def test_weights_file_is_plain_for_torch_load(tmp_path):
    """In a process without manualnn: default arguments, contiguous CPU tensors, a small file."""
    network = random_network([["linear", 4], ["relu"], ["linear", 2]], (3,), 2, 50, torch.float32)
    save_weights(tmp_path / "w.pkl", network, {})
    assert (tmp_path / "w.pkl").stat().st_size < 5000  # one network's numbers, not the buffer's
    code = (
        "import sys, torch; d = torch.load('w.pkl');"
        "assert not any(m.startswith('manualnn') for m in sys.modules);"
        "assert list(d) == ['w1', 'b1', 'w2', 'b2', 'meta'], list(d);"
        "assert all(d[k].is_contiguous() and d[k].device.type == 'cpu' for k in list(d)[:4]);"
        "print([tuple(d[k].shape) for k in list(d)[:4]])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(3, 4), (4,), (4, 2), (2,)]"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_a_foreign_file_is_read_as_a_relu_network(tmp_path, transposed, biases):
    shapes = [(9, 6), (6, 6), (6, 3)]  # the square one is read as its neighbours are
    tensors = {}
    for i, (fan_in, fan_out) in enumerate(shapes, 1):
        w = torch.randn(fan_in, fan_out)
        tensors[f"w{i}"] = w.T.contiguous() if transposed else w
        if biases:
            tensors[f"b{i}"] = torch.randn(fan_out)
    torch.save(tensors, tmp_path / "w.pkl")
    loaded = load_weights(tmp_path / "w.pkl")
    x = torch.rand(5, 1, 3, 3)
    h = x.flatten(1)
    for i in (1, 2, 3):
        w = tensors[f"w{i}"].T if transposed else tensors[f"w{i}"]
        h = h @ w + tensors.get(f"b{i}", torch.zeros(w.shape[1]))
        h = torch.relu(h) if i < 3 else h
    torch.testing.assert_close(loaded.network.logits(x)[0], h)
    assert loaded.meta["normalization"]["kind"] == "unit"


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_weights(tmp_path, capsys):
    good = random_network([["linear", 4], ["relu"], ["linear", 2]], (3,), 2, 1)
    save_weights(tmp_path / "good.pkl", good, {})
    whole = torch.load(tmp_path / "good.pkl")
    content = (tmp_path / "good.pkl").read_bytes()
    cases = {
        "text": (b"hello, these are no weights", "not a weights file"),
        "empty": (b"", "not a weights file"),
        "truncated": (content[: len(content) // 2], "not a weights file"),
        "evil": (pickle.dumps(Evil()), "not a weights file"),
    }
    objects = {
        "list": ([1, 2], "holds a list"),
        "nothing": ({}, "neither meta nor matrices"),
        "vector": ({"w1": torch.zeros(3)}, "neither meta nor matrices"),
        "chain": ({"w1": torch.zeros(3, 4), "w2": torch.zeros(5, 6)}, "do not form a network"),
        "shape": ({**whole, "w1": torch.zeros(2, 2)}, r"w1 should have shape \(3, 4\), found"),
        "lost": ({k: v for k, v in whole.items() if k != "b2"}, "b2 should have shape .*None"),
        "meta": ({**whole, "meta": {"layers": [["linear", 2]]}}, "meta is incomplete or unusable"),
        "layer": ({**whole, "meta": {**whole["meta"], "layers": [["conv9", 2]]}}, "unknown layer"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path / name)
    for name, (value, message) in objects.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        load_weights(tmp_path / "absent.pkl")
    assert "executed" not in capsys.readouterr().out


def test_layers_that_give_no_vector_or_have_no_parameters():
    with pytest.raises(InputError, match="end with a linear layer"):
        Network([["relu"]], (1, 2, 2), 4)
    with pytest.raises(InputError, match="no layer with parameters"):
        Network([["flatten"]], (1, 2, 2), 4)
