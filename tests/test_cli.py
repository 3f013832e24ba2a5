"""The command line as a user meets it: folders, figures, exit codes, and one line for bad input."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manualnn import evaluate_hw1, experiment, training
from manualnn.data import DATASETS

from .conftest import write_folder, write_idx

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(folder):
    """Arguments of a short training on the small data set."""
    sets = ["train.epochs=3", "train.batch_size=32", "data.valid=60"]
    layers = 'model.layers=[["linear", 8], ["relu"], ["linear", "classes"]]'
    sets = [part for value in [*sets, layers] for part in ("--set", value)]
    return ["train", "mnist-mlp", "--data-dir", folder, "--device", "cpu", *sets]


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_train_leaves_a_whole_folder(run, small, tmp_path):
    code, out, err = run(*small)
    assert code == 0, err
    folder = tmp_path / "runs" / "mnist-mlp"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.toml", "history.csv", "metrics.json", "weights.pkl", "checkpoint.pt", "curves.png",
        "confusion.png", "mistakes.png",
    }  # fmt: skip
    history = rows(folder / "history.csv")
    assert list(history[0]) == (
        "run,seed,epoch,step,seconds,learning_rate,train_loss,train_accuracy,valid_loss,"
        "valid_accuracy,test_loss,test_accuracy"
    ).split(",")
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert float(history[-1]["test_accuracy"]) == metrics["test_accuracy"]
    assert float(history[-1]["valid_loss"]) == metrics["valid_loss"]
    for key in ("train_accuracy", "parameters", "seconds", "samples_per_second", "seed", "device"):
        assert metrics[key] is not None
    assert f"{100 * metrics['test_accuracy']:.2f} %" in out
    assert "epoch   3" in err
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    run(*small)
    assert (tmp_path / "runs" / "mnist-mlp-2" / "metrics.json").exists()


def test_evaluate_repeats_the_accuracy_to_the_last_digit(run, small, folder):
    _, out, _ = run(*small, "--json", "--quiet")
    metrics = json.loads(out)
    assert metrics["out"] == "runs/mnist-mlp"
    for split, part in (("test", "test"), ("valid", "valid"), ("train", "train")):
        code, out, _ = run("evaluate", "--data-dir", folder, "--split", split, "--json")
        result = json.loads(out)
        assert code == 0
        assert result["accuracy"] == metrics[f"{part}_accuracy"]
        assert result["loss"] == metrics[f"{part}_loss"]
        assert result["n"] == {"test": 60, "valid": 60, "train": 240}[split]
        assert sum(row["n"] for row in result["per_class"]) == result["n"]
        hits = sum(row["n"] * row["accuracy"] for row in result["per_class"])
        assert hits / result["n"] == pytest.approx(result["accuracy"])
    assert Path("runs/mnist-mlp/mnist-test/confusion.png").exists()
    assert evaluate_hw1(folder, "runs/mnist-mlp/weights.pkl") == metrics["test_accuracy"]
    _, out, _ = run("evaluate", "runs/mnist-mlp", "--data-dir", folder, "--out", "elsewhere")
    assert f"accuracy {100 * metrics['test_accuracy']:.2f} %" in out
    assert Path("elsewhere/mistakes.png").exists()


def test_several_seeds(run, small, tmp_path):
    code, out, _ = run(*small, "--set", "train.seeds=[3, 4, 5]", "--json")
    metrics = json.loads(out)
    assert code == 0
    assert metrics["n"] == 3 and metrics["seed"] == [3, 4, 5]
    accuracies = [one["test_accuracy"] for one in metrics["runs"]]
    assert metrics["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert metrics["std"]["test_accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    folder = tmp_path / "runs" / "mnist-mlp"
    best = min(metrics["runs"], key=lambda one: (-one["valid_accuracy"], one["valid_loss"]))
    single = torch.load(folder / "weights" / f"mnist-mlp-{best['seed']}.pkl")
    assert torch.load(folder / "weights.pkl")["w1"].equal(single["w1"])
    assert len(rows(folder / "history.csv")) == 9


def test_the_other_options(run, small, tmp_path):
    code, out, _ = run(*small, "--print-config")
    assert code == 0 and "batch_size = 32" in out
    Path("mine.toml").write_text(out)
    assert run("train", "mine.toml", "--print-config")[1] == out
    code, out, _ = run(*small, "--dry-run")
    assert code == 0 and "2 steps" in out and "nothing saved" in out
    assert not Path("runs").exists()
    still = ["--set", "train.optimizer.learning_rate=0"]
    code, out, err = run(*small, *still, "--require-accuracy", "1", "--quiet")
    assert code == 1 and err.count("\n") == 1 and "below 100.00 %" in err
    code, out, err = run(*small, "--require-accuracy", "0.1", "--seed", "7", "--out", "seven")
    assert code == 0 and json.loads(Path("seven/metrics.json").read_text())["seed"] == 7
    code, out, _ = run("--version")
    assert code == 0 and out[0].isdigit()


def test_without_a_test_set_its_columns_stay_empty(run, small, folder):
    for path in folder.glob("t10k*"):
        path.unlink()
    code, out, err = run(*small)
    assert code == 0, err
    assert "test accuracy" not in out
    assert {row["test_accuracy"] for row in rows(Path("runs/mnist-mlp/history.csv"))} == {""}
    assert run(*small, "--require-accuracy", "0.1")[0] == 1


def test_resume(run, small):
    whole = [*small, "--set", "train.seeds=[1, 2]"]
    assert run(*whole, "--out", "whole")[0] == 0
    # A run that was cut off after its first epoch: the checkpoint as it was then.
    code = (
        "import sys; from manualnn import cli, experiment\n"
        "save = experiment.Run._save_epoch\n"
        "def stop(run):\n"
        "    save(run)\n"
        "    raise KeyboardInterrupt\n"
        "experiment.Run._save_epoch = stop\n"
        f"sys.argv = ['manualnn', *{[*map(str, whole), '--out', 'broken']}]\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 130
    assert (
        "broken holds epoch 1; go on with the same options and --resume --out broken" in done.stderr
    )
    code, _, err = run(*whole, "--out", "broken")
    assert code == 2 and "already holds a run; give --resume" in err
    code, _, err = run(*whole, "--out", "broken", "--resume", "--epochs", "9")
    assert code == 2 and "train.epochs was 3, now 9" in err
    code, _, err = run(*whole, "--out", "broken", "--resume")
    assert code == 0 and "from epoch 2 of 3" in err
    ours, theirs = (torch.load(f"{name}/weights.pkl") for name in ("broken", "whole"))
    assert all(ours[k].equal(theirs[k]) for k in ("w1", "b1", "w2", "b2"))

    def without_time(name):
        return [{**row, "seconds": ""} for row in rows(Path(name) / "history.csv")]

    assert without_time("broken") == without_time("whole")
    Path("broken/metrics.json").unlink()  # killed between the last epoch and the measuring
    code, out, err = run("train", "--resume", "--out", "broken")
    assert code == 0 and "whose 3 epochs are done" in err
    assert json.loads(Path("broken/metrics.json").read_text())["runs"][0]["run"] == "mnist-mlp"
    again, out, err = run(*whole, "--out", "broken", "--resume")
    assert again == 0 and "already finished" in err and "test accuracy" in out
    assert run(*whole, "--out", "fresh", "--resume")[0] == 0  # nothing there yet: a fresh start
    Path("whole/checkpoint.pt").write_bytes(b"broken")
    Path("whole/metrics.json").unlink()
    code, _, err = run(*whole, "--out", "whole", "--resume")
    assert code == 2 and "whole/checkpoint.pt: not a checkpoint" in err


def test_a_run_that_diverges_exits_1_and_keeps_its_last_good_weights(run, small):
    rate = ["--set", "train.optimizer.learning_rate=1e30", "--set", "train.loss=squared_error"]
    code, out, err = run(*small, *rate)
    assert code == 1
    assert "diverged in epoch 1: the loss is no longer finite" in err
    weights = torch.load("runs/mnist-mlp/weights.pkl")
    assert all(weights[k].isfinite().all() for k in ("w1", "b1", "w2", "b2"))
    metrics = json.loads(Path("runs/mnist-mlp/metrics.json").read_text())
    assert metrics["diverged"] == 1 and "diverged" in metrics["ended"]
    rates = ["--set", "train.optimizer.learning_rate=[0.1, 1e30]", "--set", rate[3], "--out", "two"]
    code, out, err = run(*small, *rates)
    assert code == 0 and "1 network(s) diverged" in out  # in a population only that replica ends
    assert run("train", "--resume", *small[1:], *rate)[0] == 1


def environment(**changes):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **changes}


def test_interrupting_says_what_is_kept(folder, tmp_path):
    """Ctrl-C while it trains: exit code 130, one line, and an epoch to go on from."""
    command = [
        sys.executable,
        "-m",
        "manualnn",
        "train",
        "--data-dir",
        folder,
        "--epochs",
        "100000",
    ]
    command += ["--device", "cpu", "--set", "data.valid=60", "--out", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    for _ in range(600):
        if (tmp_path / "out" / "history.csv").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert "interrupted: " in err and "Traceback" not in err
    assert (tmp_path / "out" / "checkpoint.pt").exists()


def bad_inputs(tmp_path):
    """Arguments that cannot be used, with a part of the line that says why."""
    layers = "model.layers="
    small = write_folder(tmp_path / "small")
    truncated = write_folder(tmp_path / "truncated")
    images = truncated / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    magic = write_folder(tmp_path / "magic")
    (magic / "train-labels-idx1-ubyte").write_bytes(b"no idx file at all")
    count = write_folder(tmp_path / "count")
    write_idx(count / "train-labels-idx1-ubyte", np.zeros(299))
    labels = write_folder(tmp_path / "labels")
    write_idx(labels / "t10k-labels-idx1-ubyte", np.full(60, 12))
    empty = write_folder(tmp_path / "empty")
    write_idx(empty / "train-images-idx3-ubyte", np.zeros((0, 6, 6)))
    write_idx(empty / "train-labels-idx1-ubyte", np.zeros(0))
    (tmp_path / "text.pkl").write_text("no weights")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "bad.toml").write_text("[train]\nepochs = 5\nbatchsize = 3\n")
    train = ["train", "--device", "cpu"]
    return {
        "unknown config": (["train", "mnist-mpl"], "did you mean 'mnist-mlp'?"),
        "unknown key in a file": (
            ["train", "bad.toml"],
            "bad.toml:3: train.batchsize: unknown key",
        ),
        "unknown key": ([*train, "--set", "train.epoch=3"], "did you mean 'epochs'?"),
        "wrong type": (
            [*train, "--set", "train.optimizer.learning_rate=fast"],
            "--set: train.optimizer.learning_rate = 'fast': must be a number",
        ),
        "out of range": ([*train, "--set", "train.batch_size=0"], "must be at least 1"),
        "dropout 1.5": (
            [*train, "--set", layers + '[["dropout", 1.5], ["linear", 10]]'],
            "model.layers[0]: dropout must be at least 0 and below 1, not 1.5",
        ),
        "unknown layer": ([*train, "--set", layers + '[["liner", 10]]'], "did you mean 'linear'?"),
        "last layer too narrow": (
            [*train, "--set", layers + '[["linear", 5]]'],
            "the last layer has 5 outputs, but cross_entropy with 10 classes needs 10",
        ),
        "validation takes all": ([*train, "--set", "data.valid=60000"], "leaves a part empty"),
        "no such option": (["train", "--epoch", "3"], "No such option: --epoch"),
        "option of wrong type": (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
        "accuracy bar": (["train", "--require-accuracy", "98"], "give a fraction, as in 0.98"),
        "truncated idx": ([*train, "--data-dir", truncated], "train-images-idx3-ubyte: truncated"),
        "wrong magic": ([*train, "--data-dir", magic], "train-labels-idx1-ubyte: not an idx file"),
        "counts differ": ([*train, "--data-dir", count], "300 images in"),
        "label outside": ([*train, "--data-dir", labels], "label 12 of example 0 is outside the 4"),
        "empty data": ([*train, "--data-dir", empty], "holds no data"),
        "no data folder": ([*train, "--data-dir", tmp_path / "absent"], "absent is not a folder"),
        "unwritable folder": ([*train, "--data-dir", small, "--out", "file/run"], "--out file/run"),
        "no such device": ([*train[:1], "--device", "tpu"], "--device tpu: unknown; use auto"),
        "no such weights": (["evaluate", "absent.pkl"], "no weights file 'absent.pkl'"),
        "not weights": (["evaluate", "text.pkl"], "text.pkl: not a weights file"),
        "weights of other shape": (
            ["evaluate", "shipped:mnist-mlp", "--data-dir", small],
            "mnist-mlp.pkl takes examples of shape (1, 28, 28), but those of",
        ),
        "unknown split": (["evaluate", "--split", "all"], "--split all: use test, valid or train"),
        "unknown data": (["evaluate", "--data", "mnits"], "did you mean 'mnist'?"),
        "unwritable pictures": (
            ["evaluate", "shipped:mnist-mlp", "--out", "file/x"],
            "--out file/x: cannot",
        ),
    }


def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path):
    """Printed with -s: the table of what each bad input says."""
    cases = bad_inputs(tmp_path)
    before, table = sorted(tmp_path.rglob("*")), []
    for name, (arguments, expected) in cases.items():
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), (name, out, err)
        assert err.count("\n") == 1 and err.startswith("error: "), (name, err)
        assert expected in err, (name, err)
        assert sorted(tmp_path.rglob("*")) == before, name
        table.append(f"{name}: {err.strip().replace(str(tmp_path), 'DIR')}")
    print(*table, sep="\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_cuda_without_cuda_says_why(run, monkeypatch):
    code, _, err = run("train", "--device", "cuda")
    assert (code == 2 and "finds no NVIDIA driver or no GPU" in err) or "without CUDA" in err
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "is built without CUDA" in run("train", "--device", "cuda")[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trained_on_cuda_evaluated_on_the_cpu(run, small, folder):
    small[small.index("--device") + 1] = "cuda"
    metrics = json.loads(run(*small, "--json")[1])
    result = json.loads(run("evaluate", "--device", "cpu", "--data-dir", folder, "--json")[1])
    assert result["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-4)


def test_offline_kmnist_says_what_is_missing(run, monkeypatch):
    known = replace(DATASETS["kmnist"], url="https://127.0.0.1:9/")
    monkeypatch.setitem(DATASETS, "kmnist", known)
    code, _, err = run("train", "--data", "kmnist", "--device", "cpu")
    assert code == 2
    assert "train-images-idx3-ubyte.gz (md5 bdb82020997e1d708af4cf47b453dcf7)" in err
    assert "put it into" in err


def test_evaluate_hw1_reaches_its_accuracy_from_any_folder(tmp_path):
    code = "from manualnn import evaluate_hw1; print(evaluate_hw1())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.stderr == ""
    assert 0.983 <= float(done.stdout) <= 1
    assert list(tmp_path.iterdir()) == []


def test_help_is_helpful(run):
    code, out, _ = run("--help")
    assert code == 0 and "train" in out and "evaluate" in out
    code, out, _ = run("train", "--help")
    for option in ("--set", "--resume", "--require-accuracy", "--data-dir", "--dry-run"):
        assert option in out
    assert "CONFIG's [grid], rank" in " ".join(run("sweep", "--help")[1].split())  # no markup


PARTS = """
[data]
name = "idx"
valid = 60
[model]
layers = [["linear", 8], ["relu"], ["linear", "classes"]]
[train]
epochs = 3
batch_size = 32
target_accuracy = 0.5
seeds = [0, 1]
[train.optimizer]
learning_rate = 0.05
[[run]]
label = "plain"
[[run]]
label = "momentum"
train.optimizer.momentum = 0.9
[[run]]
label = "tanh, two epochs"
train.epochs = 2
model.layers = [["linear", 5], ["tanh"], ["linear", "classes"]]
"""


@pytest.fixture
def parts(folder, tmp_path):
    (tmp_path / "parts.toml").write_text(PARTS)
    return ["train", "parts.toml", "--data-dir", folder, "--device", "cpu"]


def test_a_config_of_several_runs(run, parts):
    code, out, err = run(*parts)
    assert code == 0, err
    assert "part 1 of 2: training 4 network(s)" in err  # momentum is a column
    assert "part 2 of 2: training 2 network(s)" in err
    folder = Path("runs/parts")
    metrics = json.loads((folder / "metrics.json").read_text())
    labels = [(r["run"], r["seed"], r["epochs"]) for r in metrics["runs"]]
    assert labels == [
        *(("plain", s, 3) for s in (0, 1)),
        *(("momentum", s, 3) for s in (0, 1)),
        *(("tanh, two epochs", s, 2) for s in (0, 1)),
    ]
    history = rows(folder / "history.csv")
    assert len(history) == 4 * 3 + 2 * 2
    for row in metrics["runs"]:
        own = [h for h in history if (h["run"], int(h["seed"])) == (row["run"], row["seed"])]
        reached = [int(h["epoch"]) for h in own if float(h["valid_accuracy"]) >= 0.5]
        assert row["epochs_to_target"] == (reached[0] if reached else None)
        assert row["valid_accuracy"] == float(own[-1]["valid_accuracy"])
    assert {row["train_samples"] for row in metrics["runs"]} == {240}
    # The best mean over seeds, then the best of them; of equal accuracies the lower loss.
    mean = {
        label: np.mean(
            [(-r["valid_accuracy"], r["valid_loss"]) for r in metrics["runs"] if r["run"] == label],
            axis=0,
        ).tolist()
        for label, *_ in labels
    }
    best = min(
        metrics["runs"],
        key=lambda row: (mean[row["run"]], -row["valid_accuracy"], row["valid_loss"]),
    )
    assert metrics["weights"] == {
        "run": best["run"],
        "seed": best["seed"],
        "chosen_by": "the highest validation accuracy",
    }
    assert metrics["parameters"] == best["parameters"]
    assert len(list((folder / "weights").glob("*.pkl"))) == 6
    code, out, _ = run("evaluate", folder, "--split", "valid", "--json")
    assert json.loads(out)["accuracy"] == best["valid_accuracy"]
    tanh = folder / "weights" / "tanh,twoepochs-1.pkl"
    code, out, _ = run("evaluate", tanh, "--data-dir", parts[3], "--json")
    assert json.loads(out)["accuracy"] == metrics["runs"][5]["test_accuracy"]


def test_weights_of_several_runs_have_files_of_their_own(run, parts, tmp_path):
    labels = ["a/b", "a_b", "a b", "AB", "ab", "ä" * 200]
    runs = "".join(
        f'[[run]]\nlabel = "{label}"\ntrain.l2 = {i}e-3\n' for i, label in enumerate(labels)
    )
    (tmp_path / "parts.toml").write_text(PARTS.partition("[[run]]")[0] + runs)
    code, _, err = run(*parts, "--epochs", 1, "--out", "n")
    assert code == 0, err
    found = [torch.load(path)["meta"] for path in Path("n/weights").iterdir()]
    assert {(meta["run"], meta["seed"]) for meta in found} == {
        (k, s) for k in labels for s in (0, 1)
    }
    assert len({path.name.lower() for path in Path("n/weights").iterdir()}) == 12
    chosen = torch.load("n/weights.pkl")["meta"]
    metrics = json.loads(Path("n/metrics.json").read_text())
    assert metrics["weights"] == {
        "run": chosen["run"],
        "seed": chosen["seed"],
        "chosen_by": "the highest validation accuracy",
    }


def test_runs_with_data_of_their_own(run, folder, tmp_path):
    other = write_folder(tmp_path / "other", classes=2)
    text = PARTS.partition("target_accuracy")[0] + "[train.optimizer]\nlearning_rate = 0.1\n"
    text += f'[[run]]\nlabel = "four"\ndata.dir = "{folder}"\ndata.valid = 0\n'
    text += f'[[run]]\nlabel = "two"\ndata.dir = "{other}"\n'
    (tmp_path / "d.toml").write_text(text)
    code, _, err = run("train", "d.toml", "--out", "d", "--device", "cpu")
    assert code == 0, err
    rows = json.loads(Path("d/metrics.json").read_text())["runs"]
    assert [row["classes"] for row in rows] == [4, 2]
    for row in rows:
        code, out, err = run("evaluate", f"d/weights/{row['run']}-0.pkl", "--json")
        assert code == 0, err
        assert json.loads(out)["accuracy"] == row["test_accuracy"]


def test_a_run_stopped_before_its_history_was_written(run, small):
    whole = [*small, "--epochs", 2]
    assert run(*whole, "--out", "whole")[0] == 0
    code = (
        "import sys; from manualnn import cli, experiment\n"
        "write = experiment.write_history\n"
        "def stop(path, records, flushed=True):\n"
        "    if records[-1].epoch == 2: raise KeyboardInterrupt\n"
        "    write(path, records, flushed)\n"
        "experiment.write_history = stop\n"
        f"sys.argv = ['manualnn', *{[*map(str, whole), '--out', 'broken']}]\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment())
    assert done.returncode == 130, done.stderr
    assert run("train", "--resume", "--out", "broken")[0] == 0
    keep = [{**row, "seconds": ""} for row in rows(Path("whole/history.csv"))]
    assert keep == [{**row, "seconds": ""} for row in rows(Path("broken/history.csv"))]


def test_losses_that_are_not_finite_have_no_deviation(run, small):
    """Weights that are finite, but so large that the loss on other images is not."""
    sets = ["--set", "train.seeds=[0, 1]", "--set", "train.loss=squared_error", "--epochs", 3]
    grows = ["--set", "train.optimizer.learning_rate=1e30", "--set", "data.valid=60"]
    code, _, err = run(*small, *sets, *grows, "--out", "wild")
    assert code == 1 and "error: all 2 networks diverged; lower train.optimizer" in err
    assert json.loads(Path("wild/metrics.json").read_text())["diverged"] == 2
    runs = [
        dict.fromkeys((*experiment.MEASURES, *experiment._SHARED), 0.5)
        | {"run": "a", "seed": seed, "epochs": 1, "diverged": False, "ended": None}
        for seed in (0, 1)
    ]
    runs[1]["test_loss"] = math.inf
    summary = experiment._summary(runs, 0)
    assert summary["std"]["test_loss"] is None and summary["std"]["test_accuracy"] == 0


@pytest.mark.parametrize("saves", [2, 4, 5])  # in the first part, at the second's start, in it
def test_resuming_several_runs(run, parts, saves):
    assert run(*parts, "--out", "whole")[0] == 0
    code = (
        "import sys; from manualnn import cli, experiment\n"
        "save, left = experiment.Run._save_epoch, [None] * SAVES\n"
        "def stop(run):\n"
        "    save(run); left.pop()\n"
        "    if not left: raise KeyboardInterrupt\n"
        "experiment.Run._save_epoch = stop\n"
        f"sys.argv = ['manualnn', *{[*map(str, parts), '--out', 'broken']}]\n"
        "cli.main()"
    ).replace("SAVES", str(saves))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 130, done.stderr
    code, _, err = run(*parts, "--out", "broken", "--resume")
    assert code == 0, err
    assert ("part 1 of 2" in err) == (saves < 4)
    for name in sorted(path.name for path in Path("whole/weights").iterdir()):
        ours, theirs = (torch.load(f"{f}/weights/{name}") for f in ("broken", "whole"))
        assert all(ours[k].equal(theirs[k]) for k in ("w1", "b1", "w2", "b2"))
    keep = [{**row, "seconds": ""} for row in rows(Path("whole/history.csv"))]
    assert keep == [{**row, "seconds": ""} for row in rows(Path("broken/history.csv"))]


def test_a_part_that_does_not_fit_stops_all_before_anything_is_written(run, parts, tmp_path):
    narrow = PARTS.replace('["tanh"], ["linear", "classes"]', '["tanh"], ["linear", 2]')
    (tmp_path / "parts.toml").write_text(narrow)
    code, out, err = run(*parts)
    assert (code, out) == (2, "")
    assert "parts, run 'tanh, two epochs': model.layers: the last layer has 2 outputs" in err
    assert not (tmp_path / "runs").exists()


def test_a_split_of_the_test_images(run, small, folder):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (folder / name).unlink()
    sets = ["--set", "data.source=test", "--set", "data.valid=20"]
    code, out, err = run(*small, *sets, "--out", "s")
    assert code == 0, err
    assert "test accuracy" not in out
    metrics = json.loads(Path("s/metrics.json").read_text())
    assert metrics["test_accuracy"] is None
    code, out, _ = run("evaluate", "s", "--split", "valid", "--json")
    assert json.loads(out)["accuracy"] == metrics["valid_accuracy"] and json.loads(out)["n"] == 20
    code, _, err = run("evaluate", "s")
    assert code == 2 and "no test set left; use --split valid or train" in err


def test_a_convolutional_network_on_permuted_pixels(run, small, folder):
    layers = [["conv2d", 3, 3, {"padding": 1}], ["relu"], ["max_pool2d", 2], ["linear", "classes"]]
    sets = ["--set", f"model.layers={json.dumps(layers).replace(': ', ' = ')}"]
    sets += ["--set", "data.permute_seed=4", "--set", 'data.augment=["hflip", "shift:1"]']
    code, _, err = run(*small, *sets, "--out", "c", "--train-plot")
    assert code == 0, err
    metrics = json.loads(Path("c/metrics.json").read_text())
    code, out, _ = run("evaluate", "c", "--json")
    assert json.loads(out)["accuracy"] == metrics["test_accuracy"]
    idx = folder / "t10k-images-idx3-ubyte"
    code, out, _ = run("predict", "c", idx)
    labels = torch.from_numpy(np.fromfile(folder / "t10k-labels-idx1-ubyte", np.uint8)[8:])
    found = torch.tensor([int(line) for line in out.split()])
    assert float((found == labels).double().mean()) == metrics["test_accuracy"]
    assert torch.load("c/weights.pkl")["w1"].shape == (3, 1, 3, 3)


def test_train_plot(run, small):
    code, out, err = run(*small, "--train-plot", "--out", "seen")
    assert code == 0, err
    assert "first-layer.png" in out
    for name in ("curves.png", "first-layer.png"):
        assert Path("seen", name).read_bytes().startswith(b"\x89PNG")


def test_notes_are_told_and_kept(run, small):
    layers = [["linear", 8], *[["sigmoid"], ["linear", 8]] * 8, ["linear", "classes"]]
    code, _, err = run(*small, "--set", f"model.layers={json.dumps(layers)}", "--out", "deep")
    assert code == 0
    assert "note: mnist-mlp, seed 0, epoch 1: vanishing gradients: a weight of w1 has" in err
    [note] = json.loads(Path("deep/metrics.json").read_text())["diagnoses"]
    assert note["epoch"] == 1 and "vanishing" in note["text"]


def test_a_last_layer_wider_than_the_classes(run, small):
    layers = 'model.layers=[["linear", 8], ["relu"], ["linear", 6]]'
    code, _, err = run(*small, "--set", layers, "--out", "wide")
    assert code == 0, err
    code, out, _ = run("evaluate", "wide", "--json")
    per_class = json.loads(out)["per_class"]
    assert [row["n"] > 0 for row in per_class] == [True] * 4 + [False] * 2


def test_a_population_that_does_not_fit_into_memory_is_split(run, small, tmp_path, monkeypatch):
    """The same weights to the bit; an interrupted run keeps the split that it began with."""
    arguments = [*small, "--set", "train.seeds=[0, 1, 2, 3]", "--epochs", "2"]
    whole = json.loads(run(*arguments, "--json", "--out", tmp_path / "whole")[1])
    monkeypatch.setattr(training, "free_memory", lambda device: 2**19)
    split = json.loads(run(*arguments, "--json", "--out", tmp_path / "split")[1])
    assert json.dumps(whole["runs"]) == json.dumps(split["runs"])
    for name in sorted(path.name for path in (tmp_path / "whole" / "weights").iterdir()):
        pairs = [torch.load(tmp_path / folder / "weights" / name) for folder in ("whole", "split")]
        assert all(pairs[0][key].equal(pairs[1][key]) for key in ("w1", "b1", "w2", "b2"))
    state = torch.load(tmp_path / "split" / "checkpoint.pt")
    assert state["sizes"] == [[2, 2]]
