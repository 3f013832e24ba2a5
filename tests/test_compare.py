"""The comparison of runs: its figures are the history's, its sentences true of them."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from manualnn import compare
from manualnn.errors import InputError
from manualnn.results import read_run

CONFIG = """
[data]
name = "idx"
valid = 60
[model]
layers = [["linear", 8], ["relu"], ["linear", "classes"]]
[train]
epochs = 4
batch_size = 32
[train.optimizer]
nesterov = true
[[run]]
label = "slow"
train.optimizer.learning_rate = 0.002
[[run]]
label = "fast"
train.optimizer.learning_rate = 0.05
train.optimizer.momentum = 0.9
[[run]]
label = "wild"
train.loss = "squared_error"
train.optimizer.learning_rate = 1e30
[[run]]
label = "small"
model.layers = [["linear", "classes"]]
train.optimizer.learning_rate = 0.05
[[run]]
label = "small, permuted"
data.permute_seed = 1
model.layers = [["linear", "classes"]]
train.optimizer.learning_rate = 0.05
"""


@pytest.fixture
def compared(run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG)
    code, out, err = run("compare", "c.toml", "--data-dir", folder, "--seeds", 2, "--device", "cpu")
    assert code == 0, err
    return out, err, Path("runs/c")


def test_the_table_is_the_historys(compared):
    out, err, folder = compared
    assert "part 1 of 4: training 4 network(s)" in err  # slow and fast are one population
    networks = read_run(folder)
    with (folder / "comparison.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["slow", "fast", "wild", "small", "small, permuted"]
    for label in ("slow", "fast", "small"):
        own = [n for n in networks if n.replica.label == label]
        final = [n.rows[-1]["valid_accuracy"] for n in own]
        best = [max(row["valid_accuracy"] for row in n.rows) for n in own]
        assert float(rows[label]["final_accuracy"]) == pytest.approx(statistics.fmean(final))
        assert float(rows[label]["final_accuracy_std"]) == pytest.approx(statistics.stdev(final))
        assert float(rows[label]["best_accuracy"]) == pytest.approx(statistics.fmean(best))
        assert label in out
    assert rows["wild"]["diverged"] == "2" and rows["wild"]["final_accuracy"] == ""
    assert int(rows["small"]["parameters"]) == 36 * 4 + 4 < int(rows["fast"]["parameters"])
    for name in ("comparison.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "comparison.txt").read_text().splitlines()[:6] == out.splitlines()[:6]


def test_the_findings_are_true(compared):
    _, _, folder = compared
    text = json.loads((folder / "comparison.json").read_text())["findings"]
    rows = {row["run"]: row for row in compare.compare(folder)["rows"]}
    assert "wild: 2 of 2 diverged" in text
    alive = [row for row in rows.values() if row["final_accuracy"] is not None]
    best = max(alive, key=lambda row: row["final_accuracy"])
    assert f"Best at the end is {best['run']} with" in text
    more = max(rows["slow"]["final_accuracy"], rows["fast"]["final_accuracy"]) > max(
        rows["small"]["final_accuracy"], rows["small, permuted"]["final_accuracy"]
    )
    assert ("More parameters did better" in text) == more
    change = rows["small, permuted"]["final_accuracy"] - rows["small"]["final_accuracy"]
    assert f"Permuting the pixels changes small by {100 * change:+.2f} points" in text
    # A linear network cannot notice an order of its inputs, but for the draw of its weights.
    assert abs(change) < 0.2


def test_a_finished_run_is_compared_again(compared, run):
    out, _, folder = compared
    (folder / "comparison.png").unlink()
    code, again, _ = run("compare", folder)
    assert code == 0 and again == out and (folder / "comparison.png").exists()


def test_pairs_of_permuted_pixels_differ_in_nothing_else(run, folder, tmp_path):
    text = CONFIG.partition("[[run]]")[0]
    for label, rate, more in (
        ("slow", 0.002, ""),
        ("fast", 0.1, ""),
        ("slow, permuted", 0.002, "data.permute_seed = 1"),
        ("fast, again", 0.1, "data.permute_seed = 2"),
        ("other", 0.1, "data.permute_seed = 1\ntrain.label_smoothing = 0.1"),
    ):
        text += f'[[run]]\nlabel = "{label}"\ntrain.optimizer.learning_rate = {rate}\n{more}\n'
    (tmp_path / "c.toml").write_text(text)
    code, out, err = run("compare", "c.toml", "--data-dir", folder, "--device", "cpu", "--json")
    assert code == 0, err
    result = json.loads(out)
    found = {row["run"]: 100 * row["final_accuracy"] for row in result["rows"]}
    for plain, permuted in (("slow", "slow, permuted"), ("fast", "fast, again")):
        change = found[permuted] - found[plain]
        sentence = f"Permuting the pixels changes {plain} by {change:+.2f} points"
        assert sentence in result["findings"]
    assert result["findings"].count("Permuting") == 2


def test_all_runs_are_compared_on_one_part(run, folder, tmp_path):
    text = CONFIG.partition("[[run]]")[0].replace("valid = 60\n", "")
    text += '[[run]]\nlabel = "a"\ndata.valid = 60\n[[run]]\nlabel = "b"\n'
    (tmp_path / "c.toml").write_text(text)
    arguments = ["compare", "c.toml", "--data-dir", folder, "--device", "cpu"]
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "accuracies on test data" in " ".join(out.split()) and "final validation" not in out
    code, out, err = run(*arguments, "--set", "data.use_test=false", "--out", "none")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "c: nothing that all runs are measured on: set data.valid" in err
    assert not (tmp_path / "none").exists()
    # A loss that is no finite number is null in metrics.json.
    path = tmp_path / "runs/c/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["runs"][0]["test_loss"] = None
    path.write_text(json.dumps(metrics))
    code, out, err = run("compare", "runs/c")
    assert code == 0 and " - " in out.splitlines()[1], (out, err)


def test_bad_input(run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG)
    code, _, err = run("compare", "c.toml", "--seeds", 0, "--data-dir", folder)
    assert code == 2 and "--seeds 0: must be at least 1" in err
    code, _, err = run("compare", "d.toml")
    assert code == 2 and "neither a file nor shipped" in err
    with pytest.raises(InputError, match="holds no finished run"):
        compare.compare(tmp_path)
