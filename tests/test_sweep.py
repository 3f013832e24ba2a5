"""Sweeps: the grid's combinations, what is read from their folder, the best one trained anew."""

import csv
import json
import statistics

import pytest

from manualnn import sweep
from manualnn.config import load_config, parse_config
from manualnn.errors import InputError
from manualnn.results import read_run

from .conftest import write_folder

CONFIG = """
[data]
name = "idx"
valid = 60
[model]
layers = [["linear", 8], ["relu"], ["dropout", 0.1], ["linear", "classes"]]
[train]
epochs = 2
batch_size = 32
[train.optimizer]
learning_rate = 0.1
[grid]
"train.batch_size" = [16, 64]
train.optimizer.learning_rate = [0.003, 0.3]
"model.layers.0.1" = [4, 12]
"model.layers.1.0" = ["relu", "tanh"]
"model.layers.2.1" = [0.0, 0.2]
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG)
    return load_config(tmp_path / "c.toml")


def test_expand(config):
    assert list(config.factors().values()) == [
        "batch_size", "learning_rate", "units", "activation", "dropout",
    ]  # fmt: skip
    assert config.members() == (config,)  # train ignores the grid
    runs = config.expand().members()
    assert len(runs) == 32 and len({run.label for run in runs}) == 32
    assert runs[0].label == (
        "batch_size 16, learning_rate 0.003, units 4, activation relu, dropout 0"
    )
    last = runs[-1]
    assert last.train.batch_size == 64 and last.train.optimizer.learning_rate == 0.3
    assert last.model.layers == (("linear", 12), ("tanh",), ("dropout", 0.2), ("linear", "classes"))
    assert runs[0].model.layers[1] == ("relu",) and config.model.layers[0] == ("linear", 8)
    populations = config.expand().populations()
    assert sorted(len(p.replicas) for p in populations) == [4] * 8  # rates and dropout are columns
    assert parse_config(config.to_dict(), "c") == config


def test_every_run_holds_what_its_label_says(config):
    for run in config.expand().members():
        said = dict(part.split(" ") for part in run.label.split(", "))
        assert float(said["batch_size"]) == run.train.batch_size
        assert float(said["learning_rate"]) == run.train.optimizer.learning_rate
        assert [str(layer[-1]) for layer in run.model.layers[:2]] == [
            said["units"], said["activation"],
        ]  # fmt: skip
        assert run.model.layers[2] == ("dropout", float(said["dropout"]))


def test_whole_layers_and_tables_as_values(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.partition("[grid]")[0])
    layers = 'model.layers.1=[["relu"], ["tanh"]]'
    tables = 'train.optimizer=[{name = "sgd", momentum = 0.5}, {name = "adam"}]'
    runs = load_config(path, grid=[layers, tables]).expand().members()
    assert [(r.model.layers[1], r.train.optimizer.name) for r in runs] == [
        (("relu",), "sgd"), (("relu",), "adam"), (("tanh",), "sgd"), (("tanh",), "adam"),
    ]  # fmt: skip
    assert runs[0].train.optimizer.learning_rate == 0.1  # of the config, as the grid is silent


def test_a_name_is_called_as_what_it_names(tmp_path, config):
    grid = ['train.optimizer.name=["sgd", "adam"]', "train.optimizer.momentum=[0, 0.5]"]
    named = load_config(tmp_path / "c.toml", grid=grid)
    assert named.factors()["train.optimizer.name"] == "optimizer"
    assert named.expand().members()[0].label.endswith("optimizer sgd, momentum 0")


def test_set_takes_a_key_out_of_the_grid(tmp_path, config):
    path = tmp_path / "c.toml"
    for key in ("train.batch_size", "train.optimizer.learning_rate"):
        changed = load_config(path, [f"{key}=8"])
        assert key not in dict(changed.grid) and len(changed.grid) == 4
        assert len(changed.expand().members()) == 16
    whole = load_config(path, ['model.layers=[["linear", "classes"]]'])
    assert [key for key, _ in whole.grid] == ["train.batch_size", "train.optimizer.learning_rate"]
    again = load_config(path, grid=["train.optimizer.learning_rate=[0.5]"])
    assert dict(again.grid)["train.optimizer.learning_rate"] == (0.5,) and len(again.grid) == 5
    added = load_config(path, grid=["train.l2=[0.0, 0.1, 0.2]"])
    assert len(added.expand().members()) == 96


def test_a_sweep_ranks_and_explains(run, folder, tmp_path, config):
    arguments = ["sweep", "c.toml", "--data-dir", folder, "--seeds", 2, "--device", "cpu"]
    code, out, err = run(*arguments, "--json", "--retrain", 2)
    assert code == 0, err
    assert "part 1 of 8: training 8 network(s)" in err
    result, swept = json.loads(out), tmp_path / "runs" / "c-sweep"
    rows = result["rows"]
    accuracies = [row["valid_accuracy"] for row in rows]
    assert len(rows) == 32 and accuracies == sorted(accuracies, reverse=True)
    networks = read_run(swept)
    assert len(networks) == 64
    best = [n for n in networks if f"Best: {n.replica.label}, with" in result["findings"]]
    assert len(best) == 2
    for name in ("valid_accuracy", "valid_loss", "train_accuracy"):
        own = [n.figures[name] for n in best]
        assert rows[0][name] == pytest.approx(statistics.fmean(own))
        if name == "valid_accuracy":
            assert rows[0]["valid_accuracy_std"] == pytest.approx(statistics.stdev(own))
    ties = [(-row["valid_accuracy"], row["valid_loss"]) for row in rows]
    assert ties == sorted(ties)  # the lower loss goes before where accuracies are equal
    assert all(n.figures["test_accuracy"] is None for n in networks)  # the test set is not touched
    for name in ("marginals.png", "heatmaps.png", "best-curves.png"):
        assert (swept / name).read_bytes().startswith(b"\x89PNG")
    with (swept / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["valid_accuracy"]) for row in table] == accuracies

    rates = result["factors"]["learning_rate"]
    for level in rates:
        found = [r["valid_accuracy"] for r in rows if r["learning_rate"] == level["value"]]
        assert len(found) == level["n"] == 16
        assert level["mean"] == pytest.approx(statistics.fmean(found))
        assert level["std"] == pytest.approx(statistics.stdev(found))
        assert level["best"] == max(found)
    assert rates[1]["mean"] > rates[0]["mean"] + 0.1  # which the data show clearly
    assert "learning_rate matters most" in result["findings"]
    assert result["best"]["train.optimizer.learning_rate"] == 0.3

    again = result["retrained"]
    assert again["n"] == 2 and again["test_accuracy"] > 0.7 and again["valid_accuracy"] is None
    assert again["train_samples"] == 300  # with those that validated
    predictions = (swept / "best" / "predictions.csv").read_text().split()
    assert len(predictions) == 60 and set(predictions) <= set("0123")

    code, resumed, err = run(*arguments, "--json", "--resume")
    assert code == 0 and json.loads(resumed) == {
        k: v for k, v in result.items() if k != "retrained"
    }
    code, out, _ = run(*arguments, "--resume", "--top", 3)
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["rank", "batch_size", "learning_rate"]
    assert lines[3].split()[0] == "3" and "combinations, chosen by validation" in out


def test_diverged_combinations_count_in_no_mean(run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG)
    grid = ["--grid", "train.optimizer.learning_rate=[0.1, 1e30]", "--set", "train.batch_size=64"]
    grid += ["--set", "train.loss=squared_error", "--set", "model.layers=[['linear', 'classes']]"]
    drop = [a for i in "012" for a in ("--grid", f"model.layers.{i}.1=[1]")]
    code, out, err = run("sweep", "c.toml", "--data-dir", folder, *grid, *drop)
    assert code == 2 and "is no place in a list of" in err
    text = CONFIG.partition("[grid]")[0].replace('["dropout", 0.1], ', "")
    (tmp_path / "c.toml").write_text(text + '[grid]\ntrain.loss = ["squared_error"]\n')
    code, out, err = run("sweep", "c.toml", "--data-dir", folder, *grid[:2], "--device", "cpu")
    assert code == 0, err
    assert "1 diverged and count in no mean" in out and "diverged" in out.splitlines()[2]
    assert "learning_rate matters most" not in out  # one value is left


def test_bad_grids_are_one_line(run, tmp_path):
    write_folder(tmp_path / "data")
    for grid, text in (
        ('train.l3 = [1]', "c.toml:5: grid: train.l3: unknown key; valid: batch_size"),
        ('"train.l2" = [0, -1]', "c.toml:5: grid: train.l2 = -1.0: must be at least 0"),
        ('"train.l2" = 1', "c.toml:5: grid.train.l2 = 1: must be a list, as in"),
        ('"train.l2" = []', "must be a list, as in [0, 1e-4]"),
        ('"train.l2" = [1, 1]', "a value stands there twice"),
        ('"train.l2" = [1]\ntrain.l2 = [2]', "grid.train.l2 stands there twice"),
        ('train.optimizer = [{}]\n"train.optimizer.momentum" = [0, 1]',
         "grid.train.optimizer.momentum is a part of grid.train.optimizer"),
        ('"model.layers.0.x" = [1]', "x is no place in a list"),
        ('"data.name.x.0" = [1]', "is no place in a list of 0"),
        ('"model.layers.4.1" = [1]', "c.toml:5: grid: model.layers.4.1: 4 is no place in a list"),
        ('"train.l2" = [0, 1]\n[[run]]\nlabel = "a"', "[[run]] and [grid] do not go together"),
    ):  # fmt: skip
        start = '[data]\nname = "idx"\nvalid = 60\n[grid]\n'
        (tmp_path / "c.toml").write_text(f"{start}{grid}\n")
        code, out, err = run("sweep", "c.toml", "--data-dir", "data")
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err
    (tmp_path / "c.toml").write_text('[data]\nname = "idx"\n')
    for arguments, text in (
        (["--grid", "train.l2=[0, 1]"], "c: a sweep chooses by validation data: set data.valid"),
        (["--set", "data.valid=60"], "there is no [grid] to sweep over"),
        (["--set", "data.valid=60", "--grid", "train.l2"], "--grid train.l2: write key=value"),
        (["--set", "data.valid=60", "--grid", "train.l9=[1]"], "--grid: grid: train.l9"),
        (["--set", "data.valid=60", "--set", "train.l1=[0, 1]", "--grid", "train.l2=[0, 1]"],
         "put it into [grid]"),
        (["--grid", "data.valid=[0.1, 0]"], "set data.valid"),
        (["--set", "data.valid=60", "--grid", "data.use_test=[true, false]"], "has no part in a"),
        (["--seeds", "0"], "--seeds 0"),
        (["--retrain", "-1"], "--retrain -1"),
    ):  # fmt: skip
        code, out, err = run("sweep", "c.toml", "--data-dir", "data", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err


def test_without_test_examples_and_one_factor(run, tmp_path):
    folder = write_folder(tmp_path / "data")
    for path in folder.glob("t10k-*"):
        path.unlink()
    (tmp_path / "c.toml").write_text(CONFIG.partition("[grid]")[0])
    grid = ["--grid", "train.optimizer.learning_rate=[0.2, 1e-4, 0.02, 0.05]", "--retrain", 1]
    code, out, err = run("sweep", "c.toml", "--data-dir", folder, *grid, "--device", "cpu")
    assert code == 0, err
    assert "there are no test examples to predict" in out
    assert "marginals.png" in out and "heatmaps.png" not in out
    assert "The best learning_rate is at the edge of the grid." in out  # 0.2, the largest


def point(rate, l2, accuracy, loss=0.5):
    values = {"learning_rate": rate, "l2": l2}
    return sweep.Point(f"{rate}, {l2}", values, accuracy, None, loss, accuracy, 0, [])


def said(points):
    points = sorted(points, key=sweep.order)
    grid = {name: sorted({p.values[name] for p in points}) for name in ("learning_rate", "l2")}
    margins = {name: sweep.margin(points, name, values) for name, values in grid.items()}
    return sweep.findings(points, margins)


def test_the_findings_claim_what_the_numbers_hold():
    rates = [(1e-3, 0.5), (1e-2, 0.7), (0.1, 0.9), (1e30, None)]
    text = said([point(rate, 0, accuracy) for rate, accuracy in rates])
    assert "edge" not in text  # beyond 0.1 the grid has a rate that diverges
    assert "edge" in said([point(rate, 0, accuracy) for rate, accuracy in rates[:3]])
    assert "edge" not in said([point(0.1, l2, 0.9 - l2) for l2 in (0, 0.1, 0.2)])  # 0: no further
    text = said([point(0.1, 0, 0.9, 0.4), point(0.2, 0, 0.9, 0.3)])
    assert "Best: 0.2, 0, with 90.00 %, level with the next, 0.1, 0." in text


def test_a_factor_matters_most_only_beside_others_and_beyond_the_deviations():
    values = ((0.1, 0, 0.5), (0.1, 1, 0.52), (0.2, 0, 0.9), (0.2, 1, 0.92))
    text = said([point(*x) for x in values])
    assert "learning_rate matters most, by 40.00 points (" in text
    assert "l2 moves the mean, by 2.00 points, no more than a deviation (" in text
    text = said([point(rate, 0, accuracy) for rate, l2, accuracy in values if not l2])
    assert "learning_rate moves the mean, by 40.00 points (" in text and "most" not in text
    text = said([point(0.1, 0, 0.5), point(0.1, 1, 0.9), point(0.2, 0, 0.9), point(0.2, 1, 0.6)])
    assert "most" not in text and text.count("no more than a deviation") == 2


def test_heat_maps_are_of_the_factors_that_matter_most(config, monkeypatch, tmp_path):
    names = ("a", "b", "c", "d", "e")
    points = [sweep.Point("x", dict.fromkeys(names, v), 0.5, None, 1, 0.5, 0, []) for v in (0, 1)]
    margins = {
        name: [{"value": v, "mean": 0.5 + v * size, "std": 0, "best": 1} for v in (0, 1)]
        for name, size in zip(names, (0.01, 0.5, 0.4, 0.3, 0.2), strict=True)
    }
    drawn, notes = [], []

    def heat_maps(maps, _, note):
        drawn.extend(maps)
        notes.append(note)

    for name in ("save", "marginals", "curves"):
        monkeypatch.setattr(sweep.plots, name, lambda *_: None)
    monkeypatch.setattr(sweep.plots, "heat_maps", heat_maps)
    sweep._draw(tmp_path, config, points, margins, {name: [0, 1] for name in margins})
    assert [a + b for a, b, *_ in drawn] == ["bc", "bd", "be", "cd", "ce", "de"]
    assert notes == ["\nthe 6 pairs of the strongest factors, of 10"]


def test_retraining_with_early_stopping_keeps_the_validation_part(run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG.partition("[grid]")[0])
    stop = ["--set", "train.early_stopping.patience=1", "--grid", "train.l2=[0, 0.1]"]
    code, out, err = run(
        "sweep", "c.toml", "--data-dir", folder, *stop, "--retrain", 1, "--json", "--device", "cpu"
    )
    assert code == 0, err
    assert json.loads(out)["retrained"]["valid_accuracy"] is not None


def test_what_cannot_be_written_is_one_line(run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG.partition("[grid]")[0])
    sweep_it = ["sweep", "c.toml", "--data-dir", folder, "--grid", "train.l2=[0, 0.1]", "-q"]
    assert run(*sweep_it, "--device", "cpu")[0] == 0
    (tmp_path / "runs/c-sweep/sweep.csv").unlink()
    (tmp_path / "runs/c-sweep/sweep.csv").mkdir()
    code, out, err = run(*sweep_it, "--device", "cpu", "--resume")
    assert (code, out) == (2, "") and "error: runs/c-sweep: cannot be written: Is a dir" in err


def test_the_run_of_another_grid_is_refused(run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG.partition("[grid]")[0])
    sweep_it = ["sweep", "c.toml", "--data-dir", folder, "--grid", "train.l2=[0, 0.1]", "-q"]
    assert run(*sweep_it, "--device", "cpu")[0] == 0
    other = load_config(tmp_path / "c.toml", grid=["train.l2=[0, 0.2]"])
    with pytest.raises(InputError, match="holds another sweep than that of c"):
        sweep.read_points(tmp_path / "runs/c-sweep", other)
    (tmp_path / "runs/c-sweep/metrics.json").write_text('{"runs": []}')
    with pytest.raises(InputError, match=r"metrics.json and config.toml are of different runs"):
        sweep.read_points(tmp_path / "runs/c-sweep", other)
