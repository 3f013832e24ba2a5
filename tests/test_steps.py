"""Steps: the results of before they were fast, shares and pieces of a batch, what they cost."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.steady import allocations
from manualnn import steps, training
from manualnn.config import parse_config
from manualnn.data.augment import Augment
from manualnn.experiment import build
from manualnn.layers import arrange_pooling, build_layers
from manualnn.network import Network
from manualnn.workspace import Workspace

from .conftest import config_of, random_data, train_to_the_end, training_of
from .test_capture import obstacles

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
CNN = [
    ["conv2d", 4, 3, {"padding": 1}], ["relu"], ["max_pool2d", 2],
    ["conv2d", 6, 3], ["tanh"], ["relu"], ["max_pool2d", [2, 3]], ["dropout", 0.2],
    ["linear", "classes"],
]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_losses_are_those_of_before(name):
    """50 steps in float64 against what version 0.1's first implementation gave."""
    golden = GOLDEN[name]
    train = {"epochs": 2, "batch_size": 32, "precision": "fp64"} | golden["train"]
    tree = {"data": {"train_samples": 800}, "model": {"layers": golden["layers"]}, "train": train}
    made, _ = build(parse_config(tree).populations()[0], torch.device("cpu"))
    losses = []
    for epoch in (1, 2):
        for index in made.batches(epoch):
            for shard in made.shards:
                shard.tally.clear()
            made.step(index)
            losses.append((made.totals()[0] / index.shape[1]).tolist())
    found, expected = (torch.tensor(x, dtype=torch.float64) for x in (losses, golden["losses"]))
    assert float(((found - expected) / expected).abs().max()) < 1e-12


def images(seeds, **changes):
    """A training of small CNNs on random images, and its data."""
    config = config_of(model__layers=CNN, train__seeds=seeds, train__batch_size=20, **changes)
    data = random_data(samples=50)
    x = torch.randn(50, 2, 12, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return config, replace(data, train=replace(data.train, x=x), test=None, shape=(2, 12, 13))


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_pieces_and_shares_of_a_batch_give_the_gradient_of_the_whole(seeds, momentum, monkeypatch):
    config, data = images(seeds, train__optimizer__momentum=momentum, train__l2=1e-3 * momentum)
    monkeypatch.setattr(training, "divide", lambda n, b, c: ([slice(0, n.replicas)], 1, 1, 1))
    whole = train_to_the_end(config, data)
    assert len(whole.shards[0]._batches[20].shares) == 1
    monkeypatch.setattr(steps, "PIECE", 3 * whole.network.activations)
    monkeypatch.setattr(training, "divide", lambda n, b, c: ([slice(0, n.replicas)], 1, 3, 1))
    parts = train_to_the_end(config, data)
    assert len(parts.shards[0]._batches[20].shares) == 3
    assert obstacles(parts) == [{20: "", 10: ""}]
    torch.testing.assert_close(parts.network.theta, whole.network.theta, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layers", [
    [["conv2d", 4, 3], ["relu"], ["max_pool2d", 2]],
    [["conv2d", 3, [3, 2], {"stride": 2}], ["sigmoid"], ["relu"], ["max_pool2d", [3, 2]]],
    [["conv2d", 4, 2], ["max_pool2d", 2], ["max_pool2d", 2], ["relu"]],
    [["conv2d", 4, 2], ["relu"], ["max_pool2d", 2], ["conv2d", 3, 2], ["max_pool2d", 1]],
])  # fmt: skip
def test_pooling_first_gives_the_same(layers):
    """Outputs and all gradients, also the one at x, of layers as they are and as arranged."""
    layers = [*layers, ["linear", 3]]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (2, 5, 2, 11, 14), generator=generator).double()  # with many ties
    results = []
    for arrange in (True, False):
        network = Network(layers, (2, 11, 14), 3, 2, torch.float64)
        if arrange:
            assert network.layers == arrange_pooling(build_layers(layers, (2, 11, 14), 3))
            assert network.layers != network.described
        else:
            network.layers = network.described
        network.initialize([0, 1])
        for named in network.params:
            for parameter in named.values():
                parameter.copy_((parameter * 4).round() / 4)
        workspace = Workspace(torch.float64)
        workspace.begin("test")
        logits, caches = network.forward(x, workspace)
        grads = network.layout.views(torch.zeros_like(network.theta))
        dx = network.backward(torch.ones_like(logits), caches, grads, workspace, need_dx=True)
        results.append([logits, dx, *(g for named in grads for g in named.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("changes", [
    {},
    {"train__optimizer": {"name": "adam"}, "train__l2": 1e-3},
    {"train__seeds": [0, 1, 2]},
    {"model__layers": [["linear", 40], ["tanh"], ["dropout", 0.2], ["linear", "classes"]]},
])  # fmt: skip
def test_a_step_allocates_nothing_of_a_kilobyte(changes):
    made = training_of(config_of(**changes), random_data(samples=320))
    total, largest = allocations(made, 8)
    assert largest < 1024 and total < 1024


def test_bf16_learns_as_well_and_keeps_weights_in_fp32(monkeypatch):
    monkeypatch.setattr("manualnn.layers.LOW_FROM", 1)
    data = random_data(samples=300, dtype="fp32")
    found = {
        precision: train_to_the_end(
            config_of(train__precision=precision, train__epochs=20, train__l2=1e-4), data
        )
        for precision in ("fp32", "bf16", "tf32")
    }
    ends = {name: made.records[-1] for name, made in found.items()}
    assert found["bf16"].network.theta.dtype == torch.float32
    assert not found["bf16"].network.theta.equal(found["fp32"].network.theta)
    assert ends["bf16"].train_loss == pytest.approx(ends["fp32"].train_loss, rel=0.05)
    assert found["tf32"].network.theta.equal(found["fp32"].network.theta)  # a GPU's format


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_gives_the_same():
    data = random_data(samples=128)
    layers = [["linear", 7], ["relu"], ["dropout", 0.2], ["linear", "classes"]]
    changes = {"model__layers": layers, "train__l2": 1e-3, "train__optimizer": {"name": "adam"}}
    played = train_to_the_end(config_of(**changes), data)
    compiled = train_to_the_end(config_of(train__compile=True, **changes), data)
    torch.testing.assert_close(compiled.network.theta, played.network.theta, rtol=1e-11, atol=1e-13)


def test_an_error_in_a_shard_ends_the_training(monkeypatch):
    made = training_of(config_of(train__seeds=[0, 1, 2]), random_data())
    if made.workers == 1:
        pytest.skip("one core")

    def broken(batches, first):
        raise ArithmeticError("broken")

    monkeypatch.setattr(made.shards[-1], "train", broken)
    with pytest.raises(ArithmeticError, match="broken"):
        for _ in made.run():
            pass


def test_the_last_shard_to_fail_is_heard_of(monkeypatch):
    """While nobody waits for it, as its neighbours are done."""
    made = training_of(config_of(train__seeds=[0, 1]), random_data())
    if made.workers == 1:
        pytest.skip("one core")

    def broken(batches, first):
        time.sleep(0.3)
        raise ArithmeticError("broken")

    monkeypatch.setattr(made.shards[1], "train", broken)
    with pytest.raises(ArithmeticError, match="broken"):
        for _ in made.run():
            time.sleep(0.4)
    assert made.epoch == 0 and made.step_number == 0


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99995, 0.9999999])
def test_adam_leaves_weights_without_gradient_alone(beta2):
    """In fp32, whose smallest normal number times 1 - beta2 is 0."""
    optimizer = {"name": "adam", "beta2": beta2, "learning_rate": 0.01}
    data = random_data(dtype="fp32")
    data.train.x[:, 0] = 0
    config = config_of(train__optimizer=optimizer, train__precision="fp32")
    before = training_of(config, data).network.theta
    made = train_to_the_end(config, data)
    assert not made.diverged[0] and made.network.theta.isfinite().all()
    assert not made.network.theta.equal(before)


def test_a_learning_rate_of_0_changes_nothing():
    for name in ("sgd", "adam", "adamw"):
        config = config_of(train__optimizer={"name": name, "learning_rate": 0.0}, train__l2=0.1)
        made = training_of(config, random_data())
        before = made.network.theta.clone()
        for index in made.batches(1):
            made.step(index)
        assert made.network.theta.equal(before), name


def test_an_empty_share_adds_nothing(monkeypatch):
    """Three hands, and a last batch that leaves one of them without samples."""
    config, data = images([0], train__optimizer__momentum=0.9)
    config = replace(config, train=replace(config.train, batch_size=8))
    data = replace(data, train=replace(data.train, x=data.train.x[:12], y=data.train.y[:12]))
    found = []
    for hands, piece in ((1, 2**20), (3, 1)):
        monkeypatch.setattr(steps, "PIECE", piece)
        monkeypatch.setattr(
            training, "divide", lambda n, b, c, hands=hands: ([slice(0, 1)], 1, hands, 1)
        )
        found.append(train_to_the_end(config, data).network.theta)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("augment", [Augment(hflip=True, shift=2), Augment(elastic=9, affine=9)])
def test_augmented_shared_batches_do_not_depend_on_the_cores(monkeypatch, augment):
    config, data = images([0, 1, 2, 3], train__shared_batches=True)
    data = replace(data, augment=augment)
    found = []
    for parts in ([slice(0, 4)], [slice(0, 3), slice(3, 4)]):
        monkeypatch.setattr(training, "divide", lambda n, b, c, parts=parts: (parts, 1, 1, 1))
        found.append(train_to_the_end(config, data).network.theta)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("first", [["relu"], ["dropout", 0.1], ["linear", 6]])
def test_bf16_with_any_first_layer(first, monkeypatch):
    monkeypatch.setattr("manualnn.layers.LOW_FROM", 1)
    layers = [first, ["linear", 5], ["relu"], ["linear", "classes"]]
    config = config_of(model__layers=layers, train__precision="bf16")
    made = train_to_the_end(config, random_data(dtype="fp32"))
    assert made.records[-1].train_loss < made.records[0].train_loss


def test_memory_is_estimated_per_network():
    network = training_of(config_of(), random_data()).network
    settings = config_of().train
    many = training.most_at_once(network, settings, 1000)
    assert many > 1000
    assert training.most_at_once(network, replace(settings, batch_size=10**9), 1000) > many / 50
    assert training.free_memory(torch.device("cpu")) > 2**20
