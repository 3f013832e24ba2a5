"""Memorisation: labels as they are asked for, networks that fit them, figures that are true."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from manualnn import evaluate_weights, plots, random_labels
from manualnn.config import load_config
from manualnn.data import Dataset, Examples, corrupt, prepare, relabel
from manualnn.data import labels as labelling
from manualnn.errors import InputError
from manualnn.training import threads

from .conftest import config_of, training_of, write_folder


@pytest.fixture
def memorise(run, folder):
    """`manualnn random-labels` on the small data set, 4 classes of 6 x 6 images."""

    def call(*arguments):
        return run("random-labels", "--data-dir", folder, "--device", "cpu", *arguments)

    return call


def test_corruption_replaces_exactly_that_fraction_and_nests():
    labels = torch.arange(1000) % 10
    drawn = {p: corrupt(labels, p, 10, seed=3) for p in (0.0, 0.25, 0.5, 1.0)}
    assert drawn[0.0].equal(labels)
    changed = {p: (new != labels).nonzero().flatten() for p, new in drawn.items()}
    for p in (0.25, 0.5, 1.0):  # a drawn label is the old one in a tenth of the cases
        assert len(changed[p]) == pytest.approx(900 * p, abs=40)
    quarter = changed[0.25]
    assert drawn[0.5][quarter].equal(drawn[0.25][quarter])
    assert not corrupt(labels, 1.0, 10, seed=4).equal(drawn[1.0])
    assert corrupt(labels, 1.0, 2, seed=3).unique().tolist() == [0, 1]


def test_relabel():
    images, labels = torch.zeros(400, 1, 2, 2), torch.arange(400) % 10
    examples = Examples(images, labels)
    given = Dataset("mnist", "here", examples, examples, tuple("0123456789"))
    parity = relabel(given, "parity")
    assert parity.train.labels.equal(labels % 2) and parity.class_names == ("even", "odd")
    assert parity.test.labels.equal(labels % 2)
    coins = relabel(given, "parity", "random", seed=1).test.labels
    assert coins.unique().tolist() == [0, 1] and 150 < int(coins.sum()) < 250
    assert coins.equal(relabel(given, "parity", "random", seed=1).test.labels)
    assert not coins.equal(relabel(given, "parity", "random", seed=2).test.labels)
    assert relabel(given, "given", "random").test.labels.unique().tolist() == list(range(10))
    assert relabel(given, "parity", "given").test.labels.equal(labels)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("parity",), "even odd 2"),
        (("parity", "parity", 0), "even odd 2"),
        (("parity", "same", 0.1), "0 1 2"),
        (("parity", "random", 0), "0 1 2"),
        (("parity", "given", 0), "0 1 2"),  # digits against parity
        (("given", "random", 0.5), "cat dog cow"),
        (("given", "random", 1), "0 1 2"),
    ],
)
def test_classes_are_named_only_where_labels_mean_that(kinds, expected):
    names = ("cat", "dog", "cow") if kinds[0] == "given" else ("even", "odd", "2")
    assert labelling.label_names(names, *kinds) == expected.split()
    assert labelling.label_names(names[:2], *kinds) == expected.split()[:2]


def test_coins_are_not_called_even_and_odd(memorise, run, folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "confusion", lambda _, names, title: drawn.append(names) or Figure())
    monkeypatch.setattr(
        plots, "image_grid", lambda x, texts, title: drawn.append(texts) or Figure()
    )
    assert memorise("--samples", 24, "--epochs", 2, "--out", "coins")[0] == 0
    written = torch.load("coins/weights.pkl")
    assert written["meta"]["class_names"] == ["0", "1"]
    written["meta"]["class_names"] = ["even", "odd"]  # as files of before have it
    torch.save(written, "old.pkl")
    code, out, _ = run("evaluate", "old.pkl", "--data-dir", folder, "--device", "cpu")
    assert code == 0 and "\neven" not in out and "\n0 " in out
    assert drawn[0] == drawn[2] == ["0", "1"]
    assert not any("odd" in text for texts in drawn for text in texts)
    sets = ["--set", "data.labels=parity", "--epochs", 1, "--data", folder, "--device", "cpu"]
    assert run("train", *sets, "--out", "parity")[0] == 0
    assert "\neven " in run("evaluate", "parity", "--device", "cpu")[1]


def test_a_population_over_corruption_equals_single_runs():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(64) % 3

    def trained(fractions, seeds):
        config = config_of(
            data__corruption=fractions if len(fractions) > 1 else fractions[0], train__seeds=seeds
        )
        pairs = list(zip(fractions, seeds, strict=True))
        data = prepare(
            (x, y), None, normalize="none", dtype=torch.float64, corruption=pairs, classes=3
        )
        training = training_of(config, data)
        for _ in training.run():
            pass
        return training

    several = trained([0.0, 0.5, 1.0], [0, 0, 1])
    assert several.data.train.y.shape == (3, 64)
    for r, (fraction, seed) in enumerate([(0.0, 0), (0.5, 0), (1.0, 1)]):
        with threads(1):
            alone = trained([fraction], [seed])
        assert alone.network.theta[0].equal(several.network.theta[r])
        assert several.data.train.targets[r].equal(corrupt(y, fraction, 3, seed))


def test_the_shipped_config_has_the_hidden_layers_of_the_default():
    ours = load_config(random_labels.DEFAULT).model.layers
    default = load_config().model.layers
    assert [layer for layer in default if layer[0] != "dropout"] == list(ours)


def test_regularisation_is_turned_off_and_said():
    layers = '[["dropout", 0.1], ["linear", 8], ["relu"], ["linear", "classes"]]'
    sets = [f"model.layers={layers}", "train.l1=1e-5", 'train.class_weights="balanced"']
    config, off = random_labels.configure(load_config("mnist-mlp", sets))
    assert off == [
        *("l1 1e-05", "l2 0.0003", "label_smoothing 0.1", "valid 0.1"),
        *("class_weights", "dropout"),
    ]
    assert (config.train.l1, config.train.l2, config.train.label_smoothing) == (0, 0, 0)
    assert config.train.class_weights is None and config.data.valid == 0
    assert [layer[0] for layer in config.model.layers] == ["linear", "relu", "linear"]
    data, train = config.data, config.train
    assert (data.train_samples, data.labels, data.corruption) == (128, "parity", 1.0)
    assert (data.test_labels, train.batch_size, train.shuffle) == ("random", 128, False)
    assert config.name == "mnist-mlp-random-labels"


def test_a_config_of_random_labels_stays_as_it_is():
    config, off = random_labels.configure(load_config("mnist-student-random-labels"))
    assert off == [] and config.to_dict() == load_config("mnist-student-random-labels").to_dict()


def test_lists_make_a_population_with_seeds():
    config = load_config(random_labels.DEFAULT)
    several, _ = random_labels.configure(config, [0.0, 0.5, 1.0], labels=10)
    [population] = several.populations()
    assert [(r.corruption, r.seed) for r in population.replicas] == [
        (p, seed) for p in (0.0, 0.5, 1.0) for seed in (0, 1, 2)
    ]
    assert several.data.labels == "given" and several.data.test_labels == "same"
    wide, _ = random_labels.configure(config, outputs=10, test_labels="true")
    assert wide.model.layers[-1] == ("linear", 10) and wide.data.test_labels == "given"


def test_seeds_alone_leave_the_corruption_as_it_is():
    partly = load_config(random_labels.DEFAULT, ["data.corruption=0.3"])
    config, _ = random_labels.configure(partly, seeds=2)
    assert (config.data.corruption, config.train.seeds) == (0.3, (0, 1))
    listed = load_config(random_labels.DEFAULT, ["data.corruption=[0.3, 1]"])
    config, _ = random_labels.configure(listed, seeds=2)
    assert config.data.corruption == (0.3, 0.3, 1.0, 1.0)
    assert config.train.seeds == (0, 1, 0, 1)


def test_augmentation_is_turned_off():
    config, off = random_labels.configure(load_config("mnist-mlp", ['data.augment=["shift:2"]']))
    assert config.data.augment is None and "augment" in off


def test_resuming(memorise, folder):
    code, out, _ = memorise("--samples", "24,40", "--epochs", 20, "--out", "r", "--json")
    assert code == 0
    Path("r/samples-40/metrics.json").unlink()
    code, again, err = memorise(
        "--samples", "24,40", "--epochs", 20, "--out", "r", "--json", "--resume"
    )
    assert code == 0 and "r/samples-24: already finished" in err
    assert json.loads(again) == json.loads(out)


def test_another_loss_has_another_bound(memorise):
    sets = ("--set", "train.loss=softmax_squared_error", "--out", "s", "--json")
    code, out, _ = memorise("--samples", 32, "--set", "train.optimizer.learning_rate=0.2", *sets)
    result = json.loads(out)
    assert code == 0 and result["guess_loss"] == 0.25
    assert "(1 - 1/2)/2 = 0.2500" in result["explanation"]


def test_settings_that_differ_have_no_guess_in_common(memorise, tmp_path):
    text = load_config(random_labels.DEFAULT, ["data.train_samples=20"]).to_toml()
    text += '[[run]]\nlabel = "four"\ndata.labels = "given"\n[[run]]\nlabel = "two"\n'
    (tmp_path / "two.toml").write_text(text)
    code, out, err = memorise("two.toml", "--json", "--out", "t")
    assert code == 0, err
    result = json.loads(out)
    assert [run["label_classes"] for run in result["runs"]] == [4, 2]
    assert result["guess_loss"] is None and result["label_classes"] is None


def test_a_large_seed(memorise):
    assert memorise("--samples", 20, "--seed", 2**53 + 1, "--epochs", 2, "--out", "x")[0] == 0


def test_it_memorises_coin_flips(memorise, tmp_path):
    code, out, err = memorise("--samples", 40, "--out", "flips")
    assert code == 0, err
    assert "regularisation and augmentation are off" in err
    result = json.loads(Path("flips/random-labels.json").read_text())
    assert result["train_loss"] <= 1e-4 and result["train_accuracy"] == 1
    assert result["test_loss"] > math.log(2) == result["guess_loss"]
    assert 1 < result["epochs_to_fit"] < result["epochs"] == 100
    assert "ln 2" in out and "0.6931" in out and "uniform guess" in out
    for name in ("random-labels.png", "weights.pkl", "history.csv"):
        assert (tmp_path / "flips" / name).exists()
    # Evaluating the weights repeats the figures, on these labels and not on the digits.
    test, train = (evaluate_weights("flips", split=split).evaluation for split in ("test", "train"))
    assert test.loss == result["test_loss"] and test.accuracy == result["test_accuracy"]
    assert train.accuracy == 1 and len(train.targets) == 40
    assert train.targets.bincount().tolist() != [20, 20]  # drawn, not balanced


def test_what_is_not_memorised_is_not_explained_as_such(memorise):
    _, out, _ = memorise("--samples", 40, "--epochs", 1, "--out", "short")
    assert "The labels are not memorised yet: after 1 epochs" in out.replace("\n", " ")
    rate = ("--set", "train.optimizer.learning_rate=1e30", "--out", "wild")
    code, out, err = memorise("--samples", 40, *rate)
    assert code == 1 and "error: diverged in epoch" in err and "memorising" not in out


def test_ten_outputs_and_other_test_labels(memorise):
    code, out, err = memorise("--outputs", 6, "--samples", 32, "--json", "--out", "wide")
    assert code == 0, err
    result = json.loads(out)
    assert {"train_loss", "train_accuracy", "test_loss", "epochs", "out"} <= set(result)
    assert torch.load("wide/weights.pkl")["w3"].shape == (128, 6)
    assert result["train_accuracy"] == 1 and result["label_classes"] == 2
    args = ("--samples", 32, "--outputs", 6, "--test-labels", "true", "--json", "--out", "true")
    code, out, err = memorise(*args)
    assert code == 0, err
    result = json.loads(out)
    assert result["test_labels"] == "given" and result["guess_loss"] == math.log(4)  # the folder's
    assert evaluate_weights("true").evaluation.targets.max() == 3  # the folder's own classes
    code, out, err = memorise("--labels", 4, "--samples", 32, "--json", "--out", "four")
    assert code == 0, err
    assert json.loads(out)["guess_loss"] == math.log(4)


def test_corruption_and_samples_as_lists(memorise):
    lists = ("--corruption", "0,1", "--samples", "24,60", "--seeds", 2, "--out", "lists")
    code, out, err = memorise(*lists)
    assert code == 0, err
    assert {path.name for path in Path("lists").iterdir()} == {
        "samples-24", "samples-60", "random-labels.png", "epochs-to-fit.png", "random-labels.json",
    }  # fmt: skip
    runs = json.loads(Path("lists/random-labels.json").read_text())["runs"]
    assert [(r["samples"], r["corruption"], r["seed"]) for r in runs] == [
        (n, p, s) for n in (24, 60) for p in (0.0, 1.0) for s in (0, 1)
    ]
    assert out.count("samples, corruption") == 4 and "test accuracy" in out
    clean, random = (
        np.mean([r["test_accuracy"] for r in runs if r["corruption"] == p]) for p in (0, 1)
    )
    assert clean > random + 0.2
    code, _, err = memorise(*lists)
    assert code == 2 and "already holds a run" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "20,1000"), "data.train_samples = 1000, but there are 300 samples"),
        (("--samples", 1000), "data.train_samples = 1000, but there are 300 samples"),
        (("--corruption", 1.2), "--corruption 1.2: must be between 0 and 1"),
        (("--corruption", "0,nan"), "--corruption nan: must be between 0 and 1"),
        (("--corruption", "0,x"), "--corruption 0,x: 'x' is not a number"),
        (("--corruption", "0.5,0.5"), "stands there twice"),
        (("--samples", 0), "--samples 0: must be at least 1"),
        (("--labels", 7), "--labels 7: use 2, or 4, the classes of"),
        (("--outputs", 1), "--outputs 1: must be at least 2"),
        (("--test-labels", "odd"), "--test-labels odd: use random, true or parity"),
        (
            ("--test-labels", "true"),
            "'given' needs a wider last layer, or use 'parity': label 3 of",
        ),
        (("--set", "train.l3=1"), "train.l3: unknown key"),
    ],
)
def test_bad_input(memorise, tmp_path, arguments, message):
    before = set(tmp_path.rglob("*"))
    code, out, err = memorise(*arguments)
    assert (code, out) == (2, "")
    error = err.strip().splitlines()[-1]
    assert message in error, err
    assert set(tmp_path.rglob("*")) == before


def test_only_parity_or_the_own_classes(tmp_path):
    folder = write_folder(tmp_path / "d", classes=3)
    config = load_config(random_labels.DEFAULT, None, {"data.dir": str(folder)})
    chosen, _ = random_labels.configure(config, labels=10)
    with pytest.raises(InputError, match="use 2, or 3"):
        random_labels.runs(chosen, [20], tmp_path / "o", "cpu", labels=10)
