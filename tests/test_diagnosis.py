"""Each ailment brought about on purpose, and none where a training is well."""

import math

import pytest
import torch

from manualnn import diagnosis
from manualnn.config import load_config
from manualnn.data import load, prepare
from manualnn.losses import LOSSES
from manualnn.training import Note

from .conftest import config_of, random_data, training_of


def notes_of(config, data, classes=3):
    """The notes of a training, by the epoch that they were written in."""
    training = training_of(config, data, classes)
    return [event for event in training.run() if isinstance(event, Note)], training


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    monkeypatch.setattr(diagnosis, "EVERY", 0)


def test_a_healthy_training_is_silent():
    notes, _ = notes_of(config_of(train__optimizer__learning_rate=0.1), random_data())
    assert notes == []


def test_the_default_config_is_silent():
    mnist = load("mnist", parts=("test",)).test
    data = prepare((mnist.images, mnist.labels), None, normalize="standard")
    config = load_config("mnist-mlp", ["train.epochs=2", "data.valid=0"])
    notes, training = notes_of(config, data, 10)
    assert notes == [] and training.records[-1].train_accuracy > 0.9


def test_dead_relus():
    config = config_of(model__layers=[["linear", 6], ["relu"], ["linear", 3]])
    training = training_of(config, random_data())
    training.network.params[0]["bias"][0, :4] = -1e3
    notes = [event for event in training.run() if isinstance(event, Note)]
    assert [note.epoch for note in notes] == [1]
    assert "dead ReLUs after w1: 4 of 6 units are 0 on all of 96 samples" in notes[0].text


def test_exploding_gradients_name_the_layer():
    data = random_data()
    training = training_of(config_of(train__optimizer__learning_rate=1e-3), data)
    training.network.params[2]["weight"].mul_(200)
    notes = [event for event in training.run() if isinstance(event, Note)]
    assert any("exploding gradients: w2 is 200 times as large" in note.text for note in notes)
    assert all("lower train.optimizer.learning_rate" in note.text for note in notes)


def test_vanishing_gradients_name_the_layer():
    layers = [spec for _ in range(9) for spec in (["linear", 8], ["sigmoid"])]
    config = config_of(model__layers=[*layers, ["linear", 3]], model__init="xavier")
    notes, training = notes_of(config, random_data())
    [note] = [note for note in notes if "vanishing" in note.text]
    assert note.epoch == 1 and "a weight of w1 has" in note.text
    # The same figure from the network itself.
    x, y = training.data.train.x, training.data.train.targets
    training.shards[0].hands[0].workspace.begin("again")
    logits, caches = training.network.forward(x.unsqueeze(0), training.shards[0].hands[0].workspace)
    _, dlogits = LOSSES["cross_entropy"](logits, y, training.shards[0].hands[0].workspace)
    training.network.backward(
        dlogits, caches, training.shards[0].hands[0].grads, training.shards[0].hands[0].workspace
    )
    rms = [g["weight"].square().mean().sqrt() for g in training.shards[0].hands[0].grads if g]
    assert min(rms) == rms[0] < 1e-3 * max(rms)


def test_a_loss_that_is_stuck():
    config = config_of(
        train__epochs=40, train__optimizer__learning_rate=0.0, model__layers=[["linear", 3]]
    )
    training = training_of(config, random_data())
    training.network.theta.zero_()
    notes = [event for event in training.run() if isinstance(event, Note)]
    [note] = [note for note in notes if "loss" in note.text]
    assert f"the loss stays at ln 3 = {math.log(3):.4f}" in note.text
    assert note.epoch == math.ceil(100 / training.steps_per_epoch)


def test_a_loss_that_falls_is_not_stuck():
    guess = diagnosis.guess_loss("cross_entropy", 10)
    assert diagnosis.stuck((2.303, 2.302), guess, False)
    assert "labels" not in diagnosis.stuck((2.303, 2.302), guess, True)
    assert diagnosis.stuck((2.31, 2.30), guess, False) is None
    assert diagnosis.stuck((2.0, 2.302), guess, False) is None
    assert diagnosis.stuck((2.2, 2.2), guess, False) is None


def test_what_fits_all_samples_is_not_ailing():
    layers = [["linear", 6], ["relu"], ["linear", 3]]
    data = random_data()
    data.train.y.fill_(1)
    training = training_of(config_of(model__layers=layers), data)
    training.network.params[0]["bias"][0, :4] = -1e3
    training.network.params[2]["bias"][0, 1] = 1e3
    assert not [event for event in training.run() if isinstance(event, Note)]


@pytest.mark.parametrize(
    ("loss", "value"),
    [("cross_entropy", math.log(4)), ("logistic", math.log(2)), ("softmax_squared_error", 3 / 16)],
)
def test_the_loss_of_a_guess(loss, value):
    assert diagnosis.guess_loss(loss, 2 if loss == "logistic" else 4)[0] == pytest.approx(value)
    # With outputs that never are a target a guess gives them nothing.
    wide, _ = diagnosis.guess_loss(loss, 2, 10)
    assert wide == pytest.approx(0.05 if loss == "softmax_squared_error" else math.log(2))


def test_constant_inputs():
    data = random_data()
    data.train.x.copy_(data.train.x[:1].clone().expand_as(data.train.x))
    notes, _ = notes_of(config_of(), data)
    assert "all examples are the same" in notes[0].text
    data.train.x[-1, 0] += 1
    assert not diagnosis.constant(data.train.x)


def test_each_ailment_is_told_once_for_each_network_and_after_a_resume():
    layers = [["linear", 6], ["relu"], ["linear", 3]]
    config = config_of(model__layers=layers, train__seeds=[0, 1], train__epochs=3)
    training = training_of(config, random_data())
    training.network.params[0]["bias"][1] = -1e3
    events = training.run()
    first = []
    for event in events:
        first.append(event)
        if isinstance(event, list):
            break
    [note] = [event for event in first if isinstance(event, Note)]
    assert (note.seed, note.epoch) == (1, 1)
    again = training_of(config, random_data())
    again.restore(training.state())
    assert not [event for event in again.run() if isinstance(event, Note)]


def test_short_epochs_share_a_look(monkeypatch):
    monkeypatch.setattr(diagnosis, "EVERY", 3)
    looks = []
    look = diagnosis.diagnose
    monkeypatch.setattr(
        diagnosis, "diagnose", lambda *given: looks.append(training.epoch) or look(*given)
    )
    training = training_of(config_of(train__epochs=8), random_data())
    for _ in training.run():
        pass
    assert looks == [1, 4, 7]


def test_looking_changes_nothing():
    data = random_data()
    plain, looked = (training_of(config_of(train__epochs=3), data) for _ in range(2))
    plain._diagnose = lambda: iter(())
    for training in (plain, looked):
        for _ in training.run():
            pass
    assert torch.equal(plain.network.theta, looked.network.theta)
