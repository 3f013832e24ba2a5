"""Played steps: the same bits as steps that are computed, and what cannot be played."""

import pytest
import torch

from manualnn import capture as module
from manualnn.capture import Recording
from manualnn.optimizers import Penalty

from .conftest import config_of, random_data, train_to_the_end
from .test_rules import SHIPPED, shipped_trainings


class Never(Recording):
    """A recording that is never played."""

    def __init__(self):
        super().__init__()
        self.obstacle = "the test"


def obstacles(training):
    """For each shard what keeps the step on batches of each size from being played."""
    return [
        {
            size: "".join(r.recording.obstacle for r in (*batch.shares, batch.finish))
            for size, batch in shard._batches.items()
        }
        for shard in training.shards
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("seeds", [[3], [3, 1, 4]])
def test_played_steps_equal_computed_ones_bit_for_bit(precision, optimizer, seeds, monkeypatch):
    """Dropout, penalties, a schedule, class weights, a short last batch."""
    config = config_of(
        model__layers=[["linear", 9], ["tanh"], ["dropout", 0.2], ["linear", "classes"]],
        train__precision=precision,
        train__batch_size=40,
        train__l2=1e-3,
        train__l1=1e-5,
        train__label_smoothing=0.1,
        train__class_weights="balanced",
        train__optimizer={"name": optimizer, "learning_rate": 0.05, "momentum": 0.9},
        train__schedule={"name": "one_cycle"},
        train__seeds=seeds,
    )
    data = random_data(dtype=precision, valid=20)
    played = train_to_the_end(config, data)
    assert obstacles(played) == [{40: "", 36: ""}] * len(played.shards)
    monkeypatch.setattr(module, "Recording", Never)
    computed = train_to_the_end(config, data)
    assert played.network.theta.equal(computed.network.theta)
    for a, b in zip(played.records, computed.records, strict=True):
        assert a.__dict__ | {"seconds": 0} == b.__dict__ | {"seconds": 0}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_steps_of_every_shipped_config_can_be_played(name):
    if "decisions" in name or "best" in name:
        pytest.skip("layers that the other configs have, and slow")
    for training in shipped_trainings(name):
        index = next(training.batches(1))
        for _ in range(3):
            training.step(index)
        assert obstacles(training) == [{index.shape[1]: ""}] * len(training.shards)


def test_an_obstacle_is_named_and_keeps_the_step_as_it_is():
    buffer = torch.zeros(4)
    for change, obstacle in (
        (lambda: buffer.add_(1), ""),
        (lambda: buffer[1:].view(3, 1)[0].add_(1), ""),
        (lambda: torch.add(buffer, 1, out=buffer), ""),
        (lambda: buffer.add_(buffer + 1), "add"),
        (lambda: buffer.add_(torch.ones(4)), "ones"),
        (lambda: buffer.add_(float(buffer[0])), "__float__"),
        (lambda: buffer.add_(buffer.sum().item()), "sum"),
    ):
        recording = Recording()
        with recording:
            change()
        assert recording.obstacle == obstacle
    recording = Recording()
    buffer.zero_()
    with recording:
        buffer[:2] = 3
        buffer[1:].mul_(2).add_(buffer[:1])
    first = buffer.clone()
    buffer.zero_()
    recording()
    assert buffer.equal(first) and first.tolist() == [3, 9, 3, 3]


def test_a_step_that_cannot_be_played_is_computed(monkeypatch):
    config, data = config_of(train__l2=1e-3), random_data()
    expected = train_to_the_end(config, data)
    add = Penalty.add

    def with_new_memory(self, theta, grad):
        add(self, theta, grad)
        grad.copy_(grad * 1)

    monkeypatch.setattr(Penalty, "add", with_new_memory)
    training = train_to_the_end(config, data)
    assert obstacles(training) == [{32: "mul"}]
    assert training.network.theta.equal(expected.network.theta)
