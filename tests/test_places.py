"""Where a run finds its data again, and which run --resume means."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from manualnn import coursework
from manualnn.config import load_config
from manualnn.evaluation import evaluate_weights, summarise
from manualnn.experiment import Run
from manualnn.report import report
from manualnn.reproduce import reproduce
from manualnn.training import Progress


def write_table(path, count=60):
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, 64))
    labels = np.arange(count) % 3
    rows = np.column_stack((labels, pixels))
    header = "label," + ",".join(f"p{i}" for i in range(64))
    np.savetxt(path, rows, "%d", ",", header=header, comments="")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder in which a run was started on tables named relative to it."""
    folder = tmp_path / "project"
    (folder / "csv").mkdir(parents=True)
    write_table(folder / "csv" / "train.csv")
    write_table(folder / "csv" / "test.csv", 30)
    monkeypatch.chdir(folder)
    sets = ["train.epochs=1", "data.valid=9", "model.layers=[['linear', 'classes']]"]
    config = load_config("fashion-nn", sets, {"data.name": "csv", "data.dir": "csv"})
    for out in (folder / "runs" / "a", tmp_path / "elsewhere"):
        for _ in Run(config, out, "cpu").train():
            pass
    return folder


@pytest.mark.parametrize("run_folder", ["project/runs/a", "elsewhere"])
def test_a_run_is_used_from_another_folder(project, tmp_path, monkeypatch, run_folder):
    folder = tmp_path / run_folder
    here = evaluate_weights(folder).evaluation.accuracy
    other = tmp_path / "other"
    (other / "csv").mkdir(parents=True)  # another project's data, which are not meant
    write_table(other / "csv" / "test.csv", 6)
    monkeypatch.chdir(other)
    assert evaluate_weights(folder).evaluation.accuracy == here
    assert reproduce(folder).equal
    assert report([folder], tmp_path / "r.pdf").exists()


def test_a_project_that_moved(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(project, tmp_path / "moved")
    assert len(evaluate_weights("moved/runs/a").evaluation.targets) == 30


@pytest.mark.parametrize("command", ["evaluate", "report", "reproduce"])
def test_data_that_are_gone_are_said(run, project, tmp_path, monkeypatch, command):
    monkeypatch.chdir(project)
    shutil.move(project / "csv", tmp_path / "tables")
    code, out, err = run(command, "runs/a")
    assert (code, out) == (2, "")
    assert "runs/a: its data are not at csv: give --data-dir FOLDER" in err.splitlines()[-1]
    code, _, err = run(command, "runs/a", "--data-dir", tmp_path / "tables")
    assert code == 0, err


def test_what_needs_no_data_asks_for_none(tmp_path, monkeypatch):
    """MANUALNN_DATA may be a folder with other data sets."""
    monkeypatch.setenv("MANUALNN_DATA", str(tmp_path))
    monkeypatch.setattr("manualnn.data.sources._download", None)
    assert summarise("kmnist-cnn")["parameters"] == 29066
    assert coursework.count_parameters("kmnist-cnn-nopad") == 23946


def interrupted(name, folder, seconds):
    """A run in runs/ that was stopped in its first epoch."""
    sets = ["train.epochs=2", "train.batch_size=4", "train.optimizer.learning_rate=1e-3"]
    config = load_config("mnist-mlp", [*sets, f'data.dir="{folder}"'])
    run = Run(config, Path("runs", name), "cpu")
    for event in run.train():
        if isinstance(event, Progress):
            run.stop()
    os.utime(run.folder / "config.toml", (seconds, seconds))


def test_resume_alone_takes_the_newest_unfinished_run(folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = int(time.time())
    small = ["--set", "train.epochs=1", "--data-dir", folder, "--device", "cpu"]
    assert run("train", *small, "--out", "runs/finished")[0] == 0
    for name, age in (("older", 200), ("newer-of-another-config", 100)):
        interrupted(name, folder, now - age)
    code, _, err = run("train", "--resume")
    assert code == 0, err
    assert "--resume: runs/newer-of-another-config, the newest unfinished run" in err
    assert (tmp_path / "runs/newer-of-another-config/metrics.json").exists()
    assert "--resume: runs/older, the newest unfinished run" in run("train", "--resume")[2]
    _, _, err = run("train", "--resume")
    assert "the newest run; none is unfinished" in err and "already finished" in err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "finished", "newer-of-another-config", "older",
    ]  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with tables, and a function that trains on them into a folder."""
    (tmp_path / "work" / "csv").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for part, count in (("train", 60), ("test", 30)):
        write_table(Path("csv") / f"{part}.csv", count)

    def train(out, *sets, **flags):
        sets = ["train.epochs=1", "data.valid=9", "model.layers=[['linear', 'classes']]", *sets]
        run = Run(load_config("fashion-nn", sets, {"data.name": "csv", **flags}), Path(out), "cpu")
        for _ in run.train():
            pass
        return run

    return train


def test_a_run_called_as_its_data(small):
    run = small("runs/csv", **{"data.dir": "csv"})
    assert evaluate_weights(run.folder).evaluation.accuracy == run.metrics["test_accuracy"]


def test_other_data_beside_the_run_are_not_taken(small, tmp_path):
    (tmp_path / "results" / "csv").mkdir(parents=True)
    write_table(tmp_path / "results" / "csv" / "test.csv", 6)
    run = small("../results/a", **{"data.dir": "csv"})
    assert len(evaluate_weights(run.folder).evaluation.targets) == 30
    assert len(evaluate_weights(tmp_path / "results" / "a").evaluation.targets) == 30


def test_a_test_file_alone_is_enough_to_evaluate(small):
    flags = {"data.dir": None, "data.train": "csv/train.csv", "data.test": "csv/test.csv"}
    run = small("runs/a", **flags)
    Path("csv/train.csv").unlink()
    assert evaluate_weights(run.folder).evaluation.accuracy == run.metrics["test_accuracy"]
