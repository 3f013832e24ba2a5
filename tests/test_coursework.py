"""The functions of logistic backpropagation: against autograd, finite differences, the extremes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from manualnn import load_config
from manualnn.coursework import (
    RandomPermutation,
    count_parameters,
    gradient,
    logistic_loss,
    predict,
    stable_logistic_loss,
)
from manualnn.errors import InputError
from manualnn.files import find_shipped
from manualnn.network import Network


def example(batch=9, features=7, units=5, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64) * scale

    weights = {"w_1": normal(features, units), "w_2": normal(units, 1)}
    y = torch.randint(0, 2, (batch,), generator=draw).double()
    return normal(batch, features), y, weights


def test_predict():
    x, _, weights = example()
    z1, z2, y_hat = predict(x, weights)
    assert (z1.shape, z2.shape, y_hat.shape) == ((9, 5), (9,), (9,))
    torch.testing.assert_close(z1, x @ weights["w_1"], rtol=0, atol=0)
    expected = torch.sigmoid(z1) @ weights["w_2"]
    torch.testing.assert_close(z2, expected[:, 0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(y_hat, torch.sigmoid(z2), rtol=1e-14, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 9), st.integers(1, 7), st.integers(0, 99),
    st.sampled_from([0.1, 1.0, 20.0]),
)  # fmt: skip
def test_gradient_equals_autograd(batch, features, units, seed, scale):
    x, y, weights = example(batch, features, units, seed, scale)
    leaves = {key: w.clone().requires_grad_() for key, w in weights.items()}
    z2 = torch.sigmoid(x @ leaves["w_1"]) @ leaves["w_2"]
    functional.binary_cross_entropy_with_logits(z2[:, 0], y).backward()
    found = gradient(x, y, weights)
    assert set(found) == set(weights)
    for key, leaf in leaves.items():
        torch.testing.assert_close(found[key], leaf.grad, rtol=1e-11, atol=1e-12)


def test_gradient_equals_finite_differences(differs):
    x, y, weights = example()
    found = gradient(x, y, weights)
    for key, w in weights.items():
        numeric = torch.empty_like(w)
        for index in np.ndindex(*w.shape):
            losses = []
            for step in (1e-5, -1e-5):
                moved = {k: v.clone() for k, v in weights.items()}
                moved[key][index] += step
                losses.append(stable_logistic_loss(y, predict(x, moved)[1]))
            numeric[index] = (losses[0] - losses[1]) / 2e-5
        differs("logistic gradient, finite differences", found[key], numeric, 1e-9)


def test_the_losses_agree_in_between():
    for z in torch.linspace(-20, 20, 81, dtype=torch.float64)[:, None]:
        for label in (0.0, 1.0):
            y = torch.full_like(z, label)
            textbook = logistic_loss(y, 1 / (1 + torch.exp(-z)))
            torch.testing.assert_close(textbook, stable_logistic_loss(y, z), rtol=1e-6, atol=1e-12)


def test_the_losses_are_averages_over_the_batch():
    assert stable_logistic_loss(np.zeros(4), -1e10 * np.ones(4)) == 0.0
    assert isinstance(stable_logistic_loss(np.zeros(4), -1e10 * np.ones(4)), float)
    y, z = [0, 1, 1, 0], [0.5, -2.0, 3.0, 0.0]
    y_hat = [1 / (1 + math.exp(-value)) for value in z]
    expected = sum(-math.log(p if label else 1 - p) for label, p in zip(y, y_hat, strict=True)) / 4
    for of in (list, np.array, lambda values: np.array(values)[:, None]):
        for loss, values in ((stable_logistic_loss, z), (logistic_loss, y_hat)):
            assert loss(of(y), of(values)) == pytest.approx(expected, rel=1e-14)
            assert type(loss(of(y), of(values))) is float
    for loss, values in ((stable_logistic_loss, z), (logistic_loss, y_hat)):
        found = loss(torch.tensor(y), torch.tensor(values, dtype=torch.float64))
        assert found.shape == () and float(found) == pytest.approx(expected, rel=1e-14)
    backwards = np.array(z)[::-1]
    assert stable_logistic_loss(y[::-1], backwards) == pytest.approx(expected, rel=1e-14)
    assert math.isnan(logistic_loss(0, 0)) and stable_logistic_loss(1, 2) < 0.2


def test_the_losses_at_the_extremes():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert math.isnan(logistic_loss(zero, zero)) and math.isnan(logistic_loss(one, one))
    assert logistic_loss(zero, one) == math.inf
    for label, z, expected in (
        (0, -1e10, 0.0), (0, 1e10, 1e10), (1, -1e10, 1e10), (1, 1e10, 0.0),
        (0, -math.inf, 0.0), (0, math.inf, math.inf), (1, -math.inf, math.inf), (1, math.inf, 0.0),
    ):  # fmt: skip
        assert stable_logistic_loss([label], [z]) == expected
    assert stable_logistic_loss([0, 1, 1], [-math.inf, math.inf, 1e4]) == 0.0
    assert stable_logistic_loss([0, 1], [-math.inf, -math.inf]) == math.inf
    x = torch.tensor([[1e10], [-1e10]], dtype=torch.float64)
    weights = {"w_1": torch.ones(1, 1).double(), "w_2": torch.full((1, 1), 1e10).double()}
    found = gradient(x, torch.tensor([1, 0]), weights)
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_columns_are_never_broadcast_to_a_matrix():
    x, y, weights = example()
    _, z2, y_hat = predict(x, weights)
    for labels in (y, y[:, None], y.long(), y.bool()):
        for z, p in ((z2, y_hat), (z2[:, None], y_hat[:, None])):
            assert logistic_loss(labels, p).shape == stable_logistic_loss(labels, z).shape == ()
            torch.testing.assert_close(logistic_loss(labels, p), stable_logistic_loss(labels, z))
        for key, value in gradient(x, labels, weights).items():
            assert value.equal(gradient(x, y, weights)[key])


def test_numpy_in_numpy_out():
    x, y, weights = example()
    arrays = {key: w.numpy() for key, w in weights.items()}
    for ours, theirs in zip(predict(x.numpy(), arrays), predict(x, weights), strict=True):
        assert isinstance(ours, np.ndarray) and np.array_equal(ours, theirs.numpy())
    found = gradient(x.numpy(), y.numpy()[:, None], arrays)
    assert all(isinstance(value, np.ndarray) for value in found.values())
    np.testing.assert_array_equal(found["w_1"], gradient(x, y, weights)["w_1"].numpy())
    lists = {key: w.tolist() for key, w in weights.items()}
    found = gradient(x.tolist(), y.tolist(), lists)
    np.testing.assert_array_equal(found["w_1"], gradient(x, y, weights)["w_1"].numpy())
    assert isinstance(stable_logistic_loss(y.numpy(), y.numpy()), float)
    assert isinstance(stable_logistic_loss(y, y), torch.Tensor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y, w: gradient(x, y[:4], w), "y has 4 values, X has 9"),
        (lambda x, y, w: gradient(x, x, w), r"y must be \(B,\) or \(B, 1\), not \(9, 7\)"),
        (lambda x, y, w: predict(x[:, :3], w), r"X \(9, 3\), w_1 \(7, 5\) and w_2 \(5, 1\)"),
        (lambda x, y, w: predict(x, {"w_1": w["w_1"]}), "W needs the keys w_1 and w_2"),
        (lambda x, y, w: logistic_loss(y, y[None]), r"y_hat must be \(B,\) or \(B, 1\)"),
        (lambda x, y, w: gradient(x, 2 * y - 1, w), "y holds -1: labels are 0 or 1"),
        (lambda x, y, w: logistic_loss([0.5], [0.5]), "y holds 0.5: labels are 0 or 1"),
        (lambda x, y, w: stable_logistic_loss(y + 1, y), "y holds 2: labels are 0 or 1"),
        (lambda x, y, w: stable_logistic_loss([math.nan], [1.0]), "y holds nan: labels are"),
        (lambda x, y, w: stable_logistic_loss([], []), "y is empty"),
        (lambda x, y, w: stable_logistic_loss([[0, 1], [1]], [0, 1]), "no array of numbers: list"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(*example())


def test_random_permutation():
    from torchvision import transforms

    torch.manual_seed(1)
    permute = RandomPermutation(784)
    assert permute.num_features == 784 and permute.reindex.sort().values.equal(torch.arange(784))
    image = torch.arange(784.0).view(1, 28, 28)
    moved = permute(image)
    assert moved.shape == image.shape and moved.flatten().equal(permute.reindex.float())
    assert permute(image).equal(moved)  # fixed
    composed = transforms.Compose([transforms.ToTensor(), permute])
    array = np.arange(784, dtype=np.float32).reshape(28, 28)
    assert composed(array).equal(moved)
    with pytest.raises(InputError, match=r"784 features got an image of shape \(3, 28, 28\)"):
        permute(torch.zeros(3, 28, 28))


def test_count_parameters():
    layers = [["conv2d", 4, 3], ["relu"], ["linear", 7]]
    expected = (3 * 3 * 2 * 4 + 4) + (6 * 6 * 4 * 7 + 7)
    network = Network(layers, (2, 8, 8), 7, replicas=3)
    assert count_parameters(network) == expected
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 7)
    )
    assert count_parameters(module) == expected
    assert count_parameters(load_config("kmnist-mlp")) == 89_610
    assert count_parameters("kmnist-cnn") == 29_066
    assert count_parameters("kmnist-cnn-nopad") == 23_946
    assert count_parameters({"w_1": np.ones((7, 5)), "w_2": np.ones((5, 1))}) == 40
    shipped = find_shipped("mnist-mlp", "weights", ".pkl", "weights file")
    read = torch.load(shipped)
    assert count_parameters(read) == count_parameters(shipped) == count_parameters("mnist-mlp")


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (load_config("kmnist-permuted"), "its runs differ .MLP: 89,610, .*CNN: 29,066.*members"),
        ({"meta": {}}, "no parameters in a dict"),
        (None, "no parameters in a NoneType"),
    ],
)
def test_what_has_no_count_of_parameters(of, message):
    with pytest.raises(InputError, match=message):
        count_parameters(of)
