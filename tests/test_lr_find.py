"""The learning-rate finder: each rate's loss is that of a training at this rate."""

import csv
import json
from pathlib import Path

import pytest

from manualnn import lr_find
from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.evaluation import choose_device
from manualnn.experiment import build

LAYERS = 'model.layers=[["linear", 8], ["relu"], ["linear", "classes"]]'


@pytest.fixture
def config(folder):
    sets = [LAYERS, "data.valid=60", "train.batch_size=32", "train.seed=3"]
    return load_config("mnist-mlp", sets, {"data.dir": str(folder)})


def test_rates_are_even_on_a_log_scale():
    assert lr_find.rates(0.01, 100, 5) == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_a_rate_gives_the_loss_of_a_training_with_it(config, folder):
    result = lr_find.find(config, 1e-3, 1e3, networks=7, steps=20, device="cpu")
    assert len(result["rates"]) == 7
    row = result["rates"][2]
    sets = [LAYERS, "data.valid=60", "train.batch_size=32", "train.seed=3"]
    sets += ["train.schedule.name=constant", f"train.optimizer.learning_rate={0.1}"]
    single = load_config("mnist-mlp", sets, {"data.dir": str(folder)})
    training, _ = build(single.populations()[0], choose_device("cpu"))
    total = count = 0.0
    batches = [index for epoch in (1, 2, 3) for index in training.batches(epoch)]
    for number, index in enumerate(batches[:20]):
        before = float(training.totals()[0, 0])
        training.step(index)
        if number >= 15:
            total += float(training.totals()[0, 0]) - before
            count += index.shape[1]
    assert row["loss"] == pytest.approx(total / count, rel=1e-6)
    first, last = result["good"]
    assert first <= result["best"] <= last
    losses = {row["learning_rate"]: row["loss"] for row in result["rates"]}
    assert losses[result["best"]] == min(v for v in losses.values() if v is not None)


def test_the_command(run, folder):
    arguments = ("lr-find", "--data-dir", folder, "--set", LAYERS, "--steps", 12, "--networks", 5)
    code, out, err = run(*arguments, "--high", 1e6, "--device", "cpu")
    assert code == 0, err
    assert "lowest loss at learning rate" in out
    with Path("runs/mnist-mlp-lr-find/lr-find.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and rows[-1]["loss"] == ""  # not finite
    assert Path("runs/mnist-mlp-lr-find/lr-find.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(*arguments, "--json", "--device", "cpu")
    assert json.loads(out)["out"] == "runs/mnist-mlp-lr-find-2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "need 0 < low < high"),
        ({"networks": 2}, "--networks 2: needs at least 3"),
        ({"steps": 3}, "--steps 3: needs at least 4"),
        ({"low": 1e8, "high": 1e9}, "try a smaller --low"),
    ],
)
def test_bad_input(config, changes, message):
    with pytest.raises(InputError, match=message):
        lr_find.find(config, **{"networks": 4, "steps": 8, "device": "cpu", **changes})


def test_one_network_only(folder):
    config = load_config("mnist-mlp", ["train.l2=[0, 1]"], {"data.dir": str(folder)})
    with pytest.raises(InputError, match="trains 2 networks; lr-find needs the settings of one"):
        lr_find.find(config, device="cpu")
