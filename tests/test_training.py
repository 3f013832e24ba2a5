"""The loop: against torch.nn and torch.optim, worked by hand, and in its behaviour."""

import math
from dataclasses import replace

import pytest
import torch

from manualnn.data import Normalization, Prepared, Samples
from manualnn.errors import InputError
from manualnn.training import Progress, _class_weights, evaluate

from . import oracle
from .conftest import config_of, random_data, train_alone, train_to_the_end, training_of


def test_one_step_worked_by_hand():
    """A step of SGD on one sample, in numbers that a pencil can check.

    x = (1, 2), target class 0, so t = (1, 0); squared error over K = 2 outputs, learning rate 1/2.

        W1 = [1 -1]   b1 = (0, 1/2)        W2 = [0.1  0.2]   b2 = (0.1, 0)
             [2  0]                             [0.4 -0.2]

    Forward:   z = x W1 + b1 = (1*1 + 2*2, -1 + 0 + 1/2) = (5, -1/2)
               h = max(z, 0) = (5, 0)
               o = h W2 + b2 = (0.5 + 0.1, 1.0 + 0) = (0.6, 1)
    Loss:      ((0.6 - 1)^2 + (1 - 0)^2) / 2 = (0.16 + 1) / 2 = 0.58
    Backward:  do  = 2 (o - t) / 2 = (-0.4, 1)
               dW2 = h^T do = [-2 5]    db2 = do = (-0.4, 1)
                              [ 0 0]
               dh  = do W2^T = (0.1*-0.4 + 0.2*1, 0.4*-0.4 - 0.2*1) = (0.16, -0.36)
               dz  = dh where z > 0 = (0.16, 0)
               dW1 = x^T dz = [0.16 0]    db1 = dz = (0.16, 0)
                              [0.32 0]
    Step:      W1 - dW1/2 = [0.92 -1]   b1 = (-0.08, 0.5)
                            [1.84  0]
               W2 - dW2/2 = [1.1 -2.3]  b2 = (0.3, -0.5)
                            [0.4 -0.2]
    """
    sample = Samples(torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([0]))
    data = Prepared(sample, None, None, Normalization("none"), (2,))
    config = config_of(
        model__layers=[["linear", 2], ["relu"], ["linear", 2]],
        train__loss="squared_error",
        train__batch_size=1,
        train__optimizer__learning_rate=0.5,
    )
    training = training_of(config, data, classes=2)
    start = [[1, -1], [2, 0]], [0, 0.5], [[0.1, 0.2], [0.4, -0.2]], [0.1, 0]
    slots = training.network.layout.slots
    for slot, values in zip(slots, start, strict=True):
        view = training.network.params[slot.layer][slot.name]
        view.copy_(torch.tensor(values, dtype=torch.float64))
    training.step(torch.tensor([[0]]))
    end = [[0.92, -1], [1.84, 0]], [-0.08, 0.5], [[1.1, -2.3], [0.4, -0.2]], [0.3, -0.5]
    for slot, values in zip(slots, end, strict=True):
        result = training.network.params[slot.layer][slot.name][0]
        expected = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(result, expected, rtol=1e-15, atol=1e-15)
    assert float(training.totals()[0]) == pytest.approx(0.58, abs=1e-15)


def losses_by_hand_and_in_torch(precision, steps=100, **changes):
    """Losses of each step by `Training`, and of torch.nn + torch.optim from the same weights on the
    same batches."""
    optimizer = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}
    config = config_of(
        model__layers=[["linear", 20], ["relu"], ["linear", 12], ["tanh"], ["linear", "classes"]],
        train__precision=precision,
        train__epochs=20,
        train__l2=1e-3,
        train__label_smoothing=0.1,
        train__optimizer=optimizer,
        train__schedule={"name": "cosine"},
        **changes,
    )
    data = random_data(samples=200, dtype=precision)
    training = training_of(config, data)
    network = training.network
    modules = [
        torch.nn.Linear(7, 20), torch.nn.ReLU(), torch.nn.Linear(20, 12), torch.nn.Tanh(),
        torch.nn.Linear(12, 3),
    ]  # fmt: skip
    model = torch.nn.Sequential(*modules).to(network.theta.dtype)
    with torch.no_grad():
        for module, named in zip(modules, network.params, strict=True):
            if named:
                module.weight.copy_(named["weight"][0].T)
                module.bias.copy_(named["bias"][0])
    linear = [m for m in modules if isinstance(m, torch.nn.Linear)]
    groups = [
        {"params": [m.weight for m in linear], "weight_decay": 1e-3},
        {"params": [m.bias for m in linear]},
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    total = 20 * training.steps_per_epoch
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, total - 1)
    ours, theirs = [], []
    batches = (index for epoch in range(1, 21) for index in training.batches(epoch))
    for index, _ in zip(batches, range(steps), strict=False):
        training.shards[0].tally.clear()
        training.step(index)
        ours.append(float(training.totals()[0]) / index.shape[1])
        x, y = data.train.x[index[0]], data.train.y[index[0]]
        logits = model(x)
        theirs.append(float(torch.nn.functional.cross_entropy(logits.detach(), y)))
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1).backward()
        sgd.step()
        scheduler.step()
    return torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)


def test_a_hundred_steps_equal_torch(differs):
    ours, theirs = losses_by_hand_and_in_torch("fp64")
    assert len(ours) == 100
    assert theirs[-1] < theirs[0] / 2
    differs("losses of 100 steps against torch.nn (relative)", ours / theirs, theirs / theirs)


def test_a_hundred_steps_stay_near_torch_in_float32(differs):
    ours, theirs = losses_by_hand_and_in_torch("fp32")
    name = "losses of 100 steps against torch.nn (relative), but in float32"
    differs(name, ours / theirs, theirs / theirs, 1e-3)


def population_and_singles(seeds, data, **changes):
    together = train_to_the_end(config_of(train__seeds=seeds, **changes), data)
    alone = [train_alone(config_of(train__seeds=[s], **changes), data) for s in seeds]
    return together, alone


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_population_equals_single_runs_bit_for_bit(precision, optimizer):
    """Five seeds at once: weights, all records, with dropout, penalties, a short last batch."""
    changes = {
        "model__layers": [["dropout", 0.2], ["linear", 33], ["tanh"], ["dropout", 0.1],
                          ["linear", "classes"]],
        "train__precision": precision,
        "train__batch_size": 40,
        "train__l2": 1e-3,
        "train__l1": 1e-5,
        "train__optimizer": {"name": optimizer, "learning_rate": 0.05, "momentum": 0.9},
    }  # fmt: skip
    data = random_data(dtype=precision, valid=20)
    together, alone = population_and_singles([3, 1, 4, 15, 9], data, **changes)
    for r, single in enumerate(alone):
        assert single.network.theta[0].equal(together.network.theta[r])
        mine = [x for x in together.records if x.seed == single.replicas[0].seed]
        for a, b in zip(single.records, mine, strict=True):
            assert a.__dict__ | {"seconds": 0} == b.__dict__ | {"seconds": 0}


def test_lists_of_hyperparameters_train_as_one_population():
    columns = {"learning_rate": [0.1, 0.02, 0.3], "momentum": [0.0, 0.9, 0.5]}
    data = random_data()
    layers = [["dropout", [0.0, 0.3, 0.5]], ["linear", 6], ["relu"], ["linear", 3]]
    together = train_to_the_end(
        config_of(model__layers=layers, train__optimizer=columns, train__l2=[0.0, 0.1, 0.01]), data
    )
    assert together.replicas[1].label == "learning_rate 0.02, momentum 0.9, l2 0.1, dropout[0] 0.3"
    for r in range(3):
        alone = train_alone(
            config_of(
                model__layers=[["dropout", layers[0][1][r]], *layers[1:]],
                train__optimizer={key: values[r] for key, values in columns.items()},
                train__l2=[0.0, 0.1, 0.01][r],
            ),
            data,
        )
        # Not to the bit: the first, with neither momentum nor penalty, takes a shorter way alone.
        torch.testing.assert_close(
            alone.network.theta[0], together.network.theta[r], rtol=1e-12, atol=1e-14
        )


def test_a_replica_that_overflows_leaves_the_others_unchanged():
    data = random_data()
    rates = [0.1, 1e200, 0.05]
    optimizer = {"learning_rate": rates, "momentum": 0.9}
    together = train_to_the_end(
        config_of(train__optimizer=optimizer, train__loss="squared_error"), data
    )
    assert together.diverged == [False, True, False]
    assert "diverged in epoch 1: the loss is no longer finite" in together.ended[1]
    assert together.kept[1].isfinite().all()
    assert [x.epoch for x in together.records if x.run == together.replicas[1].label] == [1]
    for r in (0, 2):
        alone = train_alone(
            config_of(
                train__optimizer={"learning_rate": rates[r], "momentum": 0.9},
                train__loss="squared_error",
            ),
            data,
        )
        assert alone.network.theta[0].equal(together.network.theta[r])


def test_a_single_run_that_diverges_keeps_its_last_finite_weights():
    """The rate is so large that the first steps of epoch 2 overflow; epoch 1 is kept."""
    data = random_data()
    config = config_of(
        train__loss="squared_error",
        train__epochs=50,
        train__optimizer__learning_rate=1e2,
        train__precision="fp64",
    )
    training = train_to_the_end(config, data)
    assert training.diverged == [True]
    assert training.epoch < 50
    assert training.best_epoch[0] == training.epoch - 1
    assert training.network.theta.isfinite().all()


def test_early_stopping_restores_the_best_weights():
    data = random_data(samples=60, valid=30)
    config = config_of(
        data__valid=30,
        train__epochs=300,
        train__optimizer__learning_rate=1.0,
        train__early_stopping={"patience": 5, "monitor": "valid_loss"},
    )
    training = train_to_the_end(config, data)
    best = min(training.records, key=lambda record: record.valid_loss)
    assert training.epoch == best.epoch + 5 < 300
    assert "stopped early" in training.ended[0]
    assert not training.diverged[0]
    [(loss, accuracy)] = evaluate(training.network, data.valid, "cross_entropy")
    assert (loss, accuracy) == (best.valid_loss, best.valid_accuracy)


def test_replicas_stop_early_independently():
    data = random_data(samples=60, valid=30)
    changes = {
        "data__valid": 30,
        "train__epochs": 60,
        "train__optimizer__learning_rate": 1.0,
        "train__early_stopping": {"patience": 3},
    }
    together, alone = population_and_singles([0, 1, 2], data, **changes)
    for r, single in enumerate(alone):
        assert single.ended[0] == together.ended[r]
        assert single.network.theta[0].equal(together.network.theta[r])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resuming_equals_an_unbroken_run_bit_for_bit(optimizer):
    layers = [["dropout", 0.2], ["linear", 6], ["relu"], ["linear", 3]]
    config = config_of(
        model__layers=layers,
        train__seeds=[0, 1],
        train__optimizer={"name": optimizer, "learning_rate": 0.05, "momentum": 0.9},
        train__schedule={"name": "one_cycle"},
        train__early_stopping={"patience": 3},
        data__valid=20,
    )
    data = random_data(valid=20)
    whole = train_to_the_end(config, data)
    broken = training_of(config, data)
    for event in broken.run():
        if isinstance(event, list) and broken.epoch == 2:
            break
    resumed = training_of(config, data)
    resumed.restore(broken.state())
    for _ in resumed.run():
        pass
    assert resumed.network.theta.equal(whole.network.theta)
    for a, b in zip(resumed.records, whole.records, strict=True):
        assert a.__dict__ | {"seconds": 0} == b.__dict__ | {"seconds": 0}


def test_larger_l2_gives_smaller_weights_and_l1_more_zeros():
    data = random_data()
    weights = train_to_the_end(config_of(train__l2=[0.0, 0.05, 0.5], train__epochs=30), data)
    norms = weights.network.theta.square().sum(1)
    assert norms[0] > norms[1] > norms[2]
    sparse = train_to_the_end(
        config_of(train__l1=[0.0, 0.05], train__epochs=30, train__optimizer__learning_rate=0.1),
        data,
    )
    small = sparse.network.theta.abs().lt(0.02).sum(1)
    assert small[1] > small[0]


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "softmax_squared_error"])
def test_each_loss_learns(loss):
    data = random_data(samples=300)
    config = config_of(
        train__loss=loss, train__epochs=40, train__optimizer={"name": "adam", "learning_rate": 0.02}
    )
    training = train_to_the_end(config, data)
    assert training.records[-1].train_accuracy > 0.9 > training.records[0].train_accuracy
    assert training.records[-1].train_loss < training.records[0].train_loss / 2


def test_logistic_learns_two_classes():
    data = random_data(samples=300, classes=2)
    config = config_of(
        model__layers=[["linear", 5], ["sigmoid"], ["linear", 1]],
        train__loss="logistic",
        train__epochs=60,
        train__optimizer={"name": "adamw", "learning_rate": 0.05},
    )
    training = train_to_the_end(config, data, classes=2)
    assert training.records[-1].test_accuracy > 0.85
    predicted = training.network.predict(data.test.x)[0]
    assert float((predicted == data.test.y).double().mean()) == training.records[-1].test_accuracy


def test_golden_losses():
    """The first losses as they were when this was written: a change in results is seen."""
    config = config_of(
        model__layers=[["dropout", 0.1], ["linear", 5], ["relu"], ["linear", 3]],
        train__optimizer={"learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
    )
    training = train_to_the_end(config, random_data())
    golden = GOLDEN
    assert [x.train_loss for x in training.records] == pytest.approx(golden, rel=1e-12)


GOLDEN = [1.628723726209743, 1.0900304102606941, 0.9377652022997583, 0.8254639750256874]


def test_order_is_a_function_of_seed_and_epoch():
    data = random_data()
    training = training_of(config_of(train__seeds=[5, 6]), data)
    first = torch.cat(list(training.batches(1)), 1)
    assert first.sort(1).values.equal(torch.arange(96).expand(2, -1))
    assert not first[0].equal(first[1])
    assert not torch.cat(list(training.batches(2)), 1).equal(first)
    alone = training_of(config_of(train__seed=6), data)
    assert torch.cat(list(alone.batches(1)), 1)[0].equal(first[1])
    unshuffled = training_of(config_of(train__shuffle=False), data)
    assert torch.cat(list(unshuffled.batches(3)), 1)[0].equal(torch.arange(96))


def test_shared_batches_give_every_replica_the_same_order():
    data = random_data()
    changes = {"train__seed": 1, "train__shared_batches": True}
    together, alone = population_and_singles([5, 6], data, **changes)
    assert next(together.batches(1)).shape == (1, 32)
    for r, single in enumerate(alone):
        assert next(single.batches(1)).equal(next(together.batches(1)))
        assert single.network.theta[0].equal(together.network.theta[r])


def test_drop_last_and_progress():
    data = random_data(samples=101)
    config = config_of(train__batch_size=4, train__drop_last=True, train__epochs=1)
    training = training_of(config, data)
    assert training.steps_per_epoch == 25
    events = list(training.run())
    *progress, records = events
    assert {type(event) for event in progress} == {Progress}
    samples = [event.samples for event in progress]
    assert samples == sorted(set(samples)) and samples[-1] == 100
    assert records[0].step == 25
    with pytest.raises(InputError, match="leaves no batch"):
        training_of(config_of(train__batch_size=200, train__drop_last=True), data)


def test_a_last_layer_that_does_not_fit_the_loss():
    data = random_data()
    with pytest.raises(InputError, match=r"2 outputs, but cross_entropy with 3 classes needs 3"):
        training_of(config_of(model__layers=[["linear", 2]]), data)
    assert training_of(config_of(model__layers=[["linear", 4]]), data).network.classes == 4
    config = config_of(model__layers=[["linear", 1]], train__loss="logistic")
    with pytest.raises(InputError, match="'logistic' tells 2 classes apart, not 3"):
        training_of(config, data)


def test_evaluation_in_chunks_equals_the_whole(monkeypatch):
    data = random_data(samples=300)
    training = train_to_the_end(config_of(), data)
    [(loss, accuracy)] = evaluate(training.network, data.train, "cross_entropy")
    monkeypatch.setattr("manualnn.network.CHUNK", 7)
    [chunked] = evaluate(training.network, data.train, "cross_entropy")
    assert chunked[1] == accuracy
    assert chunked[0] == pytest.approx(loss, rel=1e-13)
    logits = training.network.logits(data.train.x)[0]
    expected = oracle.loss("cross_entropy", logits, data.train.y)
    assert loss == pytest.approx(float(expected), rel=1e-12)
    assert math.isfinite(loss)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "softmax_squared_error"])
def test_class_weights_are_the_gradient_of_a_weighted_loss(loss, differs):
    """One step of plain SGD against autograd on mean_b w[y_b] L_b."""
    data, weights = random_data(), [0.5, 1.0, 3.0]
    layers = [["linear", 5], ["tanh"], ["linear", 3]]
    config = config_of(
        model__layers=layers,
        train__loss=loss,
        train__class_weights=weights,
        train__optimizer__learning_rate=1.0,
    )
    training = training_of(config, data)
    params = [
        {k: v[0].clone().requires_grad_() for k, v in named.items()}
        for named in training.network.params
    ]
    index = next(training.batches(1))
    x, y = data.train.x[index[0]], data.train.y[index[0]]
    logits = oracle.forward(layers, params, x)
    scale = torch.tensor(weights, dtype=torch.float64)[y]
    each = torch.stack(
        [oracle.loss(loss, z[None], t[None]) for z, t in zip(logits, y, strict=True)]
    )
    (each * scale).mean().backward()
    training.step(index)
    # The reported loss is that without weights, which evaluation has too.
    assert float(training.totals()[0, 0]) == pytest.approx(float(each.sum().detach()))
    for ours, before in zip(training.network.params, params, strict=True):
        for name, value in before.items():
            expected = (value - value.grad).detach()
            differs(f"class weights, {loss}", ours[name][0], expected)


def test_balanced_class_weights():
    labels = torch.tensor([[0, 0, 0, 1, 1, 3]])
    settings = config_of(train__class_weights="balanced").train
    like = torch.zeros(2, 1, dtype=torch.float64)
    [weights, again] = _class_weights(settings, labels, 4, like)
    assert weights.tolist() == pytest.approx([6 / 9, 1, 0, 2]) and again.equal(weights)
    assert float(weights[labels[0]].mean()) == pytest.approx(1)
    with pytest.raises(InputError, match="class_weights are all 0"):
        training_of(config_of(train__class_weights=[0, 0, 0]), random_data())
    with pytest.raises(InputError, match="class_weights has 2 numbers, but there are 3 classes"):
        training_of(config_of(train__class_weights=[1, 2]), random_data())


def test_balanced_class_weights_help_a_rare_class():
    data = random_data(600)
    rare = (data.train.y == 2) & (torch.arange(600) % 12 > 0)
    keep = (~rare).nonzero().flatten()
    train = Samples(data.train.x[keep], data.train.y[keep])
    data = replace(data, train=train)

    def recall(weights):
        config = config_of(
            model__layers=[["linear", 3]], train__class_weights=weights, train__epochs=20
        )
        network = train_to_the_end(config, data).network
        own = data.test.y == 2
        return float((network.predict(data.test.x)[0][own] == 2).double().mean())

    assert recall("balanced") > recall(None)


def test_evaluate_every_leaves_the_rest_empty():
    config = config_of(train__epochs=7, train__evaluate_every=3)
    records = train_to_the_end(config, random_data()).records
    measured = [record.epoch for record in records if record.test_loss is not None]
    assert measured == [3, 6, 7]
    assert all(record.train_loss is not None for record in records)


def test_early_stopping_judges_measured_epochs_only():
    config = config_of(
        data__valid=20,
        train__epochs=9,
        train__evaluate_every=2,
        train__early_stopping__patience=100,
    )
    training = train_to_the_end(config, random_data(valid=20))
    assert training.best_epoch[0] in (2, 4, 6, 8, 9)
