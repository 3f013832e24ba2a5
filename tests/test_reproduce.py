"""A run trained again: the same to the bit, or what has changed."""

import json
from pathlib import Path

import pytest
import torch

from manualnn.circumstances import data_digest, digest
from manualnn.config import load_config
from manualnn.data import load
from manualnn.errors import InputError
from manualnn.reproduce import reproduce

SETS = ["--set", "data.valid=60", "--epochs", "3"]


@pytest.fixture
def finished(run, folder):
    arguments = ["train", "mnist-mlp", "--data-dir", folder, "--device", "cpu", *SETS]
    code, _, err = run(*arguments, "--set", "train.seeds=[1, 2]", "--out", "first")
    assert code == 0, err
    return Path("first")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_is_reproduced_to_the_bit(run, finished):
    threads = torch.get_num_threads()
    code, out, _ = run("reproduce", finished, "--out", "second")
    assert code == 0, out
    assert "the figures agree to the bit" in out and "weights      equal to the bit" in out
    assert (Path("second") / "weights" / "mnist-mlp-2.pkl").exists()
    code, out, _ = run("reproduce", finished, "--epochs", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["epochs"] == 2 and found["equal"] and found["weights"] is None
    assert torch.get_num_threads() == threads


def test_what_does_not_agree_is_told(run, finished):
    weights = torch.load("first/weights/mnist-mlp-1.pkl")
    weights["w1"][0, 0] += 1e-7
    torch.save(weights, "first/weights/mnist-mlp-1.pkl")
    code, out, _ = run("reproduce", finished)
    assert code == 1 and "history.csv  equal" in out and "weights      not equal" in out
    assert "do not agree; nothing that is recorded changed" in out
    change(Path("first/metrics.json"), processor="another")
    code, out, _ = run("reproduce", finished)
    assert code == 0 and "processor was another, is" in out and "though not to the bit" in out
    text = Path("first/history.csv").read_text().splitlines()
    row = text[1].split(",")
    row[-1] = str(float(row[-1]) / 2)
    Path("first/history.csv").write_text("\n".join([text[0], ",".join(row), *text[2:]]))
    found = reproduce(finished)
    assert not found.agrees and found.accuracy_difference == pytest.approx(float(row[-1]))


def test_weights_are_those_of_the_run(run, finished):
    """Not of others that lie in its folder; and one that is missing is not the same."""
    assert run("reproduce", finished, "--out", "first/again")[0] == 0
    assert run("reproduce", finished)[0] == 0
    Path("first/weights/mnist-mlp-2.pkl").unlink()
    code, out, _ = run("reproduce", finished)
    assert code == 1 and "weights      not equal" in out


def test_final_figures_are_compared(run, finished):
    path = Path("first/metrics.json")
    before = json.loads(path.read_text())
    before["runs"][1]["test_accuracy"] += 0.001
    path.write_text(json.dumps(before))
    code, out, _ = run("reproduce", finished)
    assert code == 1 and "metrics.json not equal" in out and "at most 0.10 points" in out
    change(path, test_accuracy="0.99")
    code, _, err = run("reproduce", finished)
    assert code == 2 and "metrics.json: cannot be read (TypeError('0.99'))" in err
    Path("many/samples-64").mkdir(parents=True)
    path.rename("many/samples-64/metrics.json")
    code, _, err = run("reproduce", "many")
    assert code == 2 and "it has samples-64: give one of them" in err


def test_several_data_sets(run, folder):
    config = Path("several.toml")
    config.write_text(
        f'[data]\nname = "mnist"\ndir = "{folder}"\nvalid = 60\n[train]\nepochs = 2\n'
        '[model]\nlayers = [["linear", "classes"]]\n'
        '[[run]]\nlabel = "given"\n[[run]]\nlabel = "parity"\ndata.labels = "parity"\n'
    )
    assert run("train", config, "--out", "run", "--device", "cpu")[0] == 0
    assert len(json.loads(Path("run/metrics.json").read_text())["data_sha256"]) == 2
    for options in ([], ["--epochs", "1"]):
        code, out, _ = run("reproduce", "run", *options)
        assert code == 0 and "agree to the bit" in out and "data has changed" not in out
    assert json.loads(run("reproduce", "run", "--epochs", "1", "--json")[1])["epochs"] == 1


def test_the_threads_of_the_run_are_used(finished, monkeypatch):
    used = []
    change(Path("first/metrics.json"), threads=3)
    monkeypatch.setattr("torch.set_num_threads", used.append)
    assert "threads" in reproduce(finished, epochs=1).changed  # as it was not really set
    assert used[0] == 3


def test_what_is_no_finished_run(run, finished):
    assert run("reproduce", "nothing")[0] == 2
    change(Path("first/metrics.json"), threads=None)
    code, _, err = run("reproduce", finished)
    assert code == 2 and "first/metrics.json: cannot be read (TypeError('threads'))" in err
    for threads in (0, True):
        change(Path("first/metrics.json"), threads=threads)
        with pytest.raises(InputError, match="threads"):
            reproduce(finished)
    Path("first/metrics.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        reproduce(finished)
    assert run("reproduce", finished, "--epochs", "0")[0] == 2


def test_digests_depend_on_what_they_name(folder):
    config = load_config("mnist-mlp")
    assert digest(config) != digest(load_config("mnist-mlp", ["train.seed=5"]))
    mnist = load("mnist", parts=("test",))
    before = data_digest(mnist)
    mnist.test.images[5, 0, 3, 3] += 1
    assert data_digest(mnist) != before
