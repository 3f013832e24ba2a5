"""Sweeps shared by workers: ranges, what a study asks for, no trial lost and none run twice."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing

import optuna
import psutil
import psycopg
import pytest
import torch
from optuna.trial import TrialState

from benchmarks import postgres
from manualnn import plots
from manualnn import study as studies
from manualnn.config import Range, load_config, parse_config
from manualnn.errors import InputError
from manualnn.files import PACKAGE
from manualnn.study import worker as working
from manualnn.study.queue import outcome, places, space
from manualnn.study.storage import Storage
from manualnn.training import of_replicas

from .conftest import config_of, random_data, training_of, write_folder

CONFIG = """
[data]
name = "idx"
valid = 60
[model]
layers = [["linear", 8], ["relu"], ["linear", "classes"]]
[train]
epochs = 2
batch_size = 32
[train.optimizer]
learning_rate = 0.1
"""
GRID = '[grid]\n"train.batch_size" = [16, 64]\n"train.l2" = [0, 0.0001234567, 0.1]\n'
RANGE = '[grid]\n"train.optimizer.learning_rate" = {low = 1e-3, high = 1, log = true}\n'


@pytest.fixture
def sweep(run, folder, tmp_path):
    """`manualnn sweep` of a grid: exit code, stdout and stderr."""

    def call(grid, *arguments):
        (tmp_path / "c.toml").write_text(CONFIG + grid)
        return run("sweep", "c.toml", "--data-dir", folder, "--device", "cpu", *arguments)

    return call


def trials_of(where, name="c-sweep"):
    storage = Storage(where, 30)
    try:
        study = optuna.load_study(study_name=name, storage=storage.optuna)
        return places(study.trials)
    finally:
        storage.close()


def rows_of(folder):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


# --- The search space


def test_ranges_become_distributions_and_toml(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        CONFIG
        + """[grid]
"train.optimizer.learning_rate" = {low = 1, high = 4}
"train.batch_size" = {low = 16, high = 64, step = 16}
train.l2 = {low = 1e-6, high = 1e-2, log = true}
"model.layers.0.1" = {low = 4, high = 16, log = true}
"model.layers.1" = [["relu"], ["tanh"]]
"""
    )
    config = load_config(path, grid=["train.l1={low=0, high=0.5, step=0.25}"])
    ranges = {key: values for key, values in config.grid if isinstance(values, Range)}
    assert ranges == {
        "train.optimizer.learning_rate": Range(1.0, 4.0),  # not 1, 2, 3 or 4
        "train.batch_size": Range(16, 64, step=16),
        "train.l2": Range(1e-6, 1e-2, log=True),
        "model.layers.0.1": Range(4, 16, log=True),
        "train.l1": Range(0.0, 0.5, step=0.25),
    }
    assert type(ranges["train.optimizer.learning_rate"].low) is float
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "again.toml").grid == config.grid
    assert parse_config(config.to_dict(), "c") == config
    found = space(config)
    assert found["train.batch_size"] == optuna.distributions.IntDistribution(16, 64, step=16)
    assert found["train.l2"] == optuna.distributions.FloatDistribution(1e-6, 1e-2, log=True)
    assert found["model.layers.1"].choices == ('["relu"]', '["tanh"]')
    assert load_config(path, ["train.l2=0.5"]).grid == tuple(
        (key, values) for key, values in config.grid if key not in ("train.l1", "train.l2")
    )


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("{lo = 1, high = 2}", "c.toml:13: grid.train.l2.lo: unknown key; did you mean 'low'"),
        ("{low = 1}", "c.toml:13: grid.train.l2: a range needs high"),
        ("{low = 2, high = 1}", "low = 2 must be below high = 1"),
        ("{low = 1, high = 1}", "must be below"),
        ("{low = '1', high = 2}", "grid.train.l2.low = '1': must be a whole number or a number"),
        ("{low = true, high = 2}", "grid.train.l2.low = True: must be"),
        ("{low = nan, high = 2.0}", "grid.train.l2.low = nan: must be"),
        ("{low = 0, high = 2, log = true}", "low = 0 must be above 0 where log = true"),
        ("{low = 0, high = 2, log = 1}", "grid.train.l2.log = 1: must be true or false"),
        ("{low = 1, high = 2, log = true, step = 1}", "log and step do not go together"),
        ("{low = 0, high = 1, step = 0.3}", "no number of steps of 0.3 leads to high"),
        ("{low = 0, high = 1, step = 0}", "step = 0 must be above 0"),
        ("{low = -1, high = 1}", "grid: train.l2 = -1.0: must be at least 0"),
        ("{least = 1}", "c.toml:13: grid.train.l2.least = 1: must be a list, as in [0, 1e-4]"),
    ],
)
def test_bad_ranges_are_one_line(sweep, table, text):
    code, out, err = sweep(f'[grid]\n"train.l2" = {table}\n', "--sampler", "tpe")
    assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err


def test_a_range_is_for_numbers_and_for_samplers(sweep):
    where = "c: grid.train.optimizer.learning_rate is a range"
    for arguments, text in (
        ([], where),
        (["--sampler", "grid"], where),
        (["--study", "x", "--grid", "train.batch_size={low=1.5, high=2.5}"], "a whole number"),
        (["--study", "x", "--grid", "train.loss={low=1, high=2}"], "train.loss = 1: unknown"),
        (["--study", "x", "--grid", "train.shuffle={low=0, high=1}"], "true or false"),
    ):
        code, out, err = sweep(RANGE, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err


# --- One worker


def test_a_grid_is_covered_once_and_gives_what_a_plain_sweep_gives(sweep, tmp_path):
    assert sweep(GRID, "-q", "--seeds", 2)[0] == 0
    plain = rows_of(tmp_path / "runs/c-sweep")
    code, out, err = sweep(GRID, "--study", "s", "--no-prune", "--seeds", 2, "--batch", 3)
    assert code == 0, err
    assert "trials 0, 1, 2: training 6 network(s)" in err  # one batch size at a time
    shared = rows_of(tmp_path / "runs/s")
    keys = [key for key in plain[0] if key != "train_accuracy"]  # there measured after training
    assert [[r[key] for key in keys] for r in shared] == [[r[key] for key in keys] for r in plain]
    assert {row["state"] for row in shared} == {"complete"}
    folder = tmp_path / "runs/s"
    result = json.loads((folder / "sweep.json").read_text())
    assert result["complete"] == 6 and result["retried"] == 0
    assert [level["n"] for level in result["factors"]["l2"]] == [2, 2, 2]
    assert [level["n"] for level in result["factors"]["batch_size"]] == [3, 3]
    means = "batch_size moves the mean, by 0.00 points, no more than a deviation (16: 100.00"
    assert means in result["findings"] and "most" not in out
    assert "train the best: manualnn train runs/s/best.toml" in out
    best = load_config(folder / "best.toml")
    assert best.data.use_test and best.train.l2 == result["best"]["train.l2"]
    files = {path: path.read_bytes() for path in folder.glob("sweep.*")}
    for path in files:
        path.unlink()
    write_folder(tmp_path / "elsewhere")  # the same data in another place
    again = ["--study", "s", "--no-prune", "--seeds", 2, "--json", "--data-dir", "elsewhere"]
    code, out, err = sweep(GRID, *again)
    assert code == 0 and "training" not in err
    assert json.loads(out) == result | {"out": "runs/s"}
    assert {path: path.read_bytes() for path in folder.glob("sweep.*")} == files
    for name in ("trials.png", "marginals.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampler_draws_the_same_again(sweep, tmp_path, sampler):
    grid = RANGE + '"train.batch_size" = [16, 64]\n"model.layers.0.1" = {low = 4, high = 16}\n'
    arguments = ["--sampler", sampler, "--trials", 14, "--epochs", 1, "-q"]
    for name, batch in (("a", 7), ("b", 7), ("c", 14)):
        code, _, err = sweep(grid, *arguments, "--study", name, "--batch", batch)
        assert code == 0, err
    a, b, c = ((tmp_path / f"runs/{name}/sweep.csv").read_text() for name in "abc")
    assert a == b
    if sampler == "random":
        assert a == c  # a trial's values do not depend on the trials before
    rows = rows_of(tmp_path / "runs/a")
    rates = [float(row["learning_rate"]) for row in rows]
    found = json.loads((tmp_path / "runs/a/sweep.json").read_text())["findings"]
    assert "batch_size m" not in found  # its values were trained with other rates
    assert len(set(rates)) == 14 and all(1e-3 <= rate <= 1 for rate in rates)
    assert {type(int(row["units"])) for row in rows} == {int}
    assert (tmp_path / "runs/a/parameters.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = sweep(grid, *arguments[:2], "--trials", 16, "--epochs", 1, "--study", "a")
    assert code == 0 and "trial 13" not in err, err
    assert len(rows_of(tmp_path / "runs/a")) == 16
    code, _, err = sweep(grid, *arguments, "--study", "a")
    assert (code, err.count("\n")) == (2, 1) and "study a has 16; more may be asked for" in err


def test_bad_trials_are_pruned_and_the_others_do_not_notice(sweep, tmp_path):
    rates = ", ".join(map(str, [0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 1e-6]))
    grid = f'[grid]\n"train.optimizer.learning_rate" = [{rates}]\n'
    options = ["--batch", 6, "--epochs", 4]
    code, out, err = sweep(grid, "--study", "pruned", *options)
    assert code == 0, err
    assert sweep(grid, "--study", "whole", *options, "--no-prune")[0] == 0
    rows = {row["learning_rate"]: row for row in rows_of(tmp_path / "runs/pruned")}
    whole = {row["learning_rate"]: row for row in rows_of(tmp_path / "runs/whole")}
    assert rows["1e-06"]["state"] == "pruned" and rows["1e-06"]["epochs"] == "1"
    out = " ".join(out.split())
    assert "trial 7: pruned in epoch 1" in err
    assert "8 trials, chosen by validation accuracy: 7 complete, 1 pruned. Best: " in out
    assert "the next, learning_rate" in out and "the mean" not in out  # which pruned ones lack
    for rate, row in rows.items():
        if row["state"] == "complete":
            assert row["valid_loss"] == whole[rate]["valid_loss"]
    [pruned] = trials_of("runs/pruned/study.journal", "pruned")[7]
    assert list(pruned.intermediate_values) == [1]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_part_of_a_training_goes_on_alone_to_the_bit(optimizer):
    data = random_data()
    config = config_of(
        train__seeds=[0, 1, 2, 3], train__l2=[0.0, 0.1, 0.2, 0.3],
        train__optimizer__name=optimizer, train__optimizer__momentum=0.5,
    )  # fmt: skip
    whole = training_of(config, data)
    events = whole.run()
    while not isinstance(next(events), list):
        pass
    state = of_replicas(whole.state(), [1, 3])
    part = training_of(config_of(
        train__seeds=[1, 3], train__l2=[0.1, 0.3],
        train__optimizer__name=optimizer, train__optimizer__momentum=0.5,
    ), data)  # fmt: skip
    part.restore(state)
    assert part.epoch == 1
    for _ in events:
        pass
    for _ in part.run():
        pass
    assert part.network.theta.equal(whole.network.theta[torch.tensor([1, 3])])
    assert part.best_epoch == [4, 4]


def test_what_diverges_ends_as_pruned_and_what_is_impossible_fails(sweep, tmp_path):
    grid = (
        '[grid]\n"train.optimizer.learning_rate" = [0.1, 1e30]\n'
        '"model.layers.2.1" = [4, 2]\n"train.loss" = ["squared_error"]\n'
    )
    code, out, err = sweep(grid, "--study", "s")
    assert code == 0, err
    rows = rows_of(tmp_path / "runs/s")
    assert [row["state"] for row in rows] == ["complete", "diverged", "failed", "failed"]
    assert "diverged in epoch 1" in rows[1]["why"] and "has 2 outputs" in rows[2]["why"]
    assert "4 trials, chosen by validation accuracy: 1 complete, 1 diverged, 2 failed." in out
    assert "Best: learning_rate 0.1" in out and "learning_rate m" not in out and " next" not in out
    code, out, err = sweep(grid, "--study", "s")
    assert code == 0 and "training" not in err  # what failed so is not tried again


# --- Pictures


def row_of(trial, state, accuracy, rate):
    row = {"trial": trial, "state": state, "valid_accuracy": accuracy, "rate": rate}
    return row | {"rank": trial + 1}


ROWS = [
    row_of(0, "complete", 0.8, 0.02),
    row_of(1, "complete", 0.9, 0.03),
    row_of(2, "pruned", 0.5, 0.04),
    row_of(3, "diverged", None, 0.09),
]


def ticks(axis):
    low, high = axis.get_view_interval()
    places = [x for x in axis.get_majorticklocs() if low <= x <= high]
    return axis.get_major_formatter().format_ticks(places)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_picture_of_trials_has_all_of_them(epochs):
    curves = {0: [(1, 0.7), (2, 0.8)][:epochs], 1: [(1, 0.9)], 2: [(1, 0.5)], 3: []}
    left, right = plots.trials(ROWS, curves, "title").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines["best so far"] == [[0, 80], [1, 90], [2, 90], [3, 90]]
    assert lines["pruned, at its accuracy then"] == [[2, 50]]
    assert [x for x, _ in lines["diverged, without accuracy"]] == [3]
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(lines)
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert names == ["complete", "pruned", "best"]
    assert ticks(left.xaxis) == ["0", "1", "2", "3"]
    assert ticks(right.xaxis) == ["1", "2"][:epochs]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.01, 0.1, True, ["0.01", "0.02", "0.05", "0.1"]),
        (0.01, 1.0, True, ["0.01", "0.03", "0.1", "0.3", "1"]),
        (0, 4, False, ["0", "1", "2", "3", "4"]),
    ],
)
def test_the_picture_of_parameters_spans_what_was_searched(low, high, log, expected):
    figure = plots.parameters(ROWS, {"rate": (low, high, log)}, "title")
    [axes] = figure.axes
    assert ticks(axes.xaxis) == expected
    assert axes.get_xlim()[0] < low and axes.get_xlim()[1] > high
    assert not any(axes.xaxis.get_minor_formatter().format_ticks(axes.xaxis.get_minorticklocs()))
    lines = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert lines["diverged, without accuracy"] == [0.09]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines) and len(lines) == 3


def test_pictures_of_nothing_but_failures():
    rows = [row_of(0, "failed", None, 0.02)]
    assert not plots.trials(rows, {0: []}, "title").axes[0].lines
    assert not plots.parameters(rows, {"rate": (0.01, 1.0, True)}, "title").legends


def test_words_are_not_joined_by_lines():
    def levels(*words):
        return [{"value": w, "mean": 0.5, "std": 0.1, "best": 0.6} for w in words]

    figure = plots.marginals({"a": levels("sgd", "adam"), "b": levels("0", "1e-4")}, "title")
    styles = [axes.containers[0].lines[0].get_linestyle() for axes in figure.axes]
    assert styles == ["None", "-"]


# --- What is refused


def test_another_sweep_under_the_same_name_is_refused(sweep, tmp_path):
    assert sweep(GRID, "--study", "s", "-q", "--epochs", 1)[0] == 0
    before = (tmp_path / "runs/s/study.journal").read_bytes()
    other = tmp_path / "other"
    write_folder(other, train=280)
    for arguments, text in (
        (["--set", "train.optimizer.momentum=0.5"], "train.optimizer.momentum was 0.0, now 0.5"),
        (["--grid", "train.l2=[0, 1]"], "grid.train.l2 was [0, 0.0001234567, 0.1], now [0, 1]"),
        (["--sampler", "random"], "--sampler was 'grid', now 'random'"),
        (["--no-prune"], "--no-prune was False, now True"),
        (
            ["--no-prune", "--grid", "train.l1=[0]", "--set", "train.l2=0"],
            "--no-prune was False, now True; grid.train.l1 was not in the grid, now [0];"
            " grid.train.l2 was [0, 0.0001234567, 0.1], now not in the grid; give",
        ),
        (["--data-dir", other], "the examples of its data set are others"),
        (["--trials", 3], "--trials 3: the grid has 6 combinations"),
    ):
        code, out, err = sweep(GRID, "--study", "s", "--epochs", 1, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err
    assert (tmp_path / "runs/s/study.journal").read_bytes() == before


def test_a_study_that_no_sweep_made_is_refused(sweep):
    storage = Storage("study.journal", 30)
    study = optuna.create_study(study_name="c-sweep", storage=storage.optuna)
    study.enqueue_trial({})
    code, out, err = sweep(GRID, "--storage", "study.journal")
    assert (code, out, err.count("\n")) == (2, "", 1) and "which no sweep made" in err


def test_bad_options_are_one_line(sweep, tmp_path):
    for arguments, text in (
        (["--sampler", "gird"], "--sampler gird: use grid, random or tpe"),
        (["--trials", 0], "--trials 0: must be at least 1"),
        (["--heartbeat", 0], "--heartbeat 0: must be at least 1"),
        (["--study", "a/b"], "--study a/b: cannot be the name of a folder"),
        (["--study", "s", "--retrain", 1], "--retrain: a shared sweep says how"),
        (["--storage", "mysql://me:hush@host/x"], "--storage mysql://...: unknown; give a path"),
        (["--storage", "postgresql://me:hush@host:port/x"], "not a valid URL"),
        (["--storage", "postgresql://me:hu@hush@127.0.0.1:1/x"], "in a password @ is written %40"),
        (["--storage", "postgresql://me:12/hush@127.0.0.1:1/x"], "refused"),
        (["--storage", "postgresql://me:hush@127.0.0.1:1/x?password=hush"], "refused"),
        (["--storage", "postgresql:me:hush@127.0.0.1/x"], "not a valid URL"),
        (["--storage", "sqlite:///no/such/folder.db"], "unable to open database file"),
        (["--storage", "c.toml/study.journal"], "c.toml/study.journal: "),
        (["--storage", "c.toml"], "c.toml: not a journal, or a damaged one"),
        (["--storage", "."], "is a folder; give a file in it, as in "),
        (["--storage", "/proc/study.journal"], "--storage /proc/study.journal: "),
        (["--study", "s", "--set", "data.valid=0"], "a sweep chooses by validation data"),
    ):
        code, out, err = sweep(GRID, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err
        assert "hush" not in err
    assert not (tmp_path / "runs").exists()
    code, out, err = sweep("", "--study", "s")
    assert code == 2 and "there is no [grid] to sweep over" in err


def test_without_optuna_one_line_names_the_extra(sweep, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[:2] == ["manualnn", "study"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delattr("manualnn.study")
    code, out, err = sweep(GRID, "--study", "s")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'manualnn[sweep]'" in err
    code, out, err = sweep(GRID, "-q")
    assert code == 0, err  # a grid needs it not


# --- Journals that are not whole


def test_an_unfinished_entry_is_cut_off(sweep, tmp_path):
    assert sweep(GRID, "--study", "s", "-q")[0] == 0
    journal = tmp_path / "runs/s/study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":6,"trial')
    code, _, err = sweep(GRID, "--study", "s")
    assert code == 0 and "an unfinished entry is cut off" in err
    assert journal.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], lines[5][:9], b"\n", *lines[6:]]))
    code, _, err = sweep(GRID, "--study", "s")
    assert (code, err.count("\n")) == (2, 1) and "not a journal, or a damaged one" in err


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"a,b\n1,2", b"\x00\x01"])
def test_a_file_that_is_no_journal_is_left_as_it_is(sweep, tmp_path, content):
    (tmp_path / "mine").write_bytes(content)
    code, _, err = sweep(GRID, "--storage", "mine")
    assert (code, err.count("\n")) == (2, 1) and "mine: not a journal" in err
    assert (tmp_path / "mine").read_bytes() == content


def test_a_database_of_another_version_is_one_line(sweep, tmp_path):
    Storage("sqlite:///other.db", 30).close()
    with closing(sqlite3.connect("other.db")) as database:
        database.execute("update alembic_version set version_num = 'v2.6.0.a'")
        database.commit()
    code, out, err = sweep(GRID, "--storage", "sqlite:///other.db")
    assert (code, out, err.count("\n")) == (2, "", 1) and "table schema" in err
    assert not [file for file in psutil.Process().open_files() if "other.db" in file.path]


def worker_of(tmp_path, folder, grid=GRID, where=None, **plan):
    (tmp_path / "c.toml").write_text(CONFIG + grid)
    config = load_config(tmp_path / "c.toml", flags={"data.dir": str(folder)})
    where = where or tmp_path / "study.journal"
    return studies.Worker(config, where, "c-sweep", studies.Plan(**plan), "cpu")


def test_a_journal_that_is_cut_goes_on(tmp_path, folder):
    """What a crash leaves at any moment is filled, retried, and ends with every combination."""
    for _ in worker_of(tmp_path, folder).work():
        pass
    lines = (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    patience = working.PATIENCE
    working.PATIENCE = 0.0
    try:
        for count in (1, 3, 5, 9, 12, 30, len(lines) - 1):
            (tmp_path / "study.journal").write_bytes(b"".join(lines[:count]))
            for _ in worker_of(tmp_path, folder).work():
                pass
            rows = trials_of(tmp_path / "study.journal")
            assert len(rows) == 6 and all(outcome(row) for row in rows)
            done = [x for row in rows for x in row if x.state != TrialState.FAIL]
            assert len({json.dumps(x.params) for x in done}) == len(done) == 6
    finally:
        working.PATIENCE = patience


def test_workers_in_turns_have_no_trial_in_common(tmp_path, folder):
    lines = [worker_of(tmp_path, folder, batch=2).work() for _ in range(2)]
    said = [next(line) for line in lines]
    assert "trials 0, 1: training" in said[0] and "trial 2: training" in said[1]
    turn = 0
    while "waiting" not in said[-1]:  # for what the other has: it would not come to its turn
        said.append(next(lines[turn % 2], "waiting"))
        turn += 1
    said += [*lines[turn % 2], *lines[(turn + 1) % 2]]
    done = [line.partition(":")[0] for line in said if line.endswith("%")]
    assert sorted(done) == [f"trial {place}" for place in range(6)]
    assert all(len(row) == 1 for row in trials_of(tmp_path / "study.journal"))


def test_a_trial_that_another_took_over_is_told_once(tmp_path, folder):
    worker = worker_of(tmp_path, folder, batch=2)
    lines = worker.work()
    assert "training 2 network(s)" in next(lines)
    mine = worker._mine[0].trial  # as if it had been taken for dead
    worker.study._storage.set_trial_state_values(mine._trial_id, TrialState.FAIL)
    working.retry()(worker.study, worker.study._storage.get_trial(mine._trial_id))
    said = list(lines)
    assert any("trial 0: another worker has it" in line for line in said)
    rows = trials_of(tmp_path / "study.journal")
    assert len(rows) == 6 and [x.state.name for x in rows[0]] == ["FAIL", "COMPLETE"]
    assert worker.finished
    assert worker.summarise(tmp_path / "out")["retried"] == 1
    assert len(rows_of(tmp_path / "out")) == 6


def test_a_trial_whose_worker_died_before_it_queued_it_again(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(working, "PATIENCE", 0.1)
    worker = worker_of(tmp_path, folder, batch=2)
    first = worker.study.get_trials()[0]
    worker.study._storage.set_trial_state_values(first._trial_id, TrialState.FAIL)
    assert list(worker.work()) and worker.finished


def test_trials_whose_workers_always_die_are_given_up(tmp_path, folder):
    worker = worker_of(tmp_path, folder, batch=1)
    storage = worker.study._storage
    for _ in range(11):
        waiting = places(worker.study.trials)[0][-1]
        storage.set_trial_state_values(waiting._trial_id, TrialState.FAIL)
        working.retry(10)(worker.study, storage.get_trial(waiting._trial_id))
    assert len(worker.trials[0]) == 11 and outcome(worker.trials[0]) is not None
    assert not any("trial 0:" in line for line in worker.work())
    result = worker.summarise(tmp_path / "out")
    assert (result["complete"], result["failed"], result["trials"]) == (5, 1, 6)


# --- Several processes


@pytest.fixture(scope="module")
def database():
    try:
        with postgres.server() as url:
            yield url
    except postgres.MissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start worker processes whose trials take a while, in an empty folder with c.toml and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG + GRID)
    write_folder(tmp_path / "data")
    started = []

    def call(*arguments, epochs=40):
        command = ["sweep", "c.toml", "--data-dir", "data", "--device", "cpu", "--epochs", epochs]
        command += ["--heartbeat", 1, "--no-prune", "--batch", 2, *arguments]
        command += ["--set", "train.evaluate_every=20"]
        process = subprocess.Popen(
            [sys.executable, "-m", "manualnn", *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)},
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


def until_it_trains(process):
    said = ""
    while "training" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def ended_once(where, name="c-sweep"):
    """Assert that each of the combinations has one trial that ended; all trials."""
    rows = trials_of(where, name)
    done = [[x for x in row if x.state == TrialState.COMPLETE] for row in rows]
    assert [len(trials) for trials in done] == [1] * 6
    assert len({json.dumps(trials[0].params) for trials in done}) == 6
    return rows


def share(start, tmp_path, where):
    """Two workers that start at the same moment on a fresh study."""
    workers = [start("--storage", where, "--out", f"out{i}") for i in range(2)]
    said = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    names = [path.name for path in (tmp_path / "out0").glob("sweep.*")]
    assert sorted(names) == ["sweep.csv", "sweep.json", "sweep.txt"]
    for name in names:
        assert (tmp_path / "out0" / name).read_text() == (tmp_path / "out1" / name).read_text()
    rows = ended_once(where)
    assert all(len(row) == 1 for row in rows)
    return said


def test_two_workers_on_a_journal(start, tmp_path):
    share(start, tmp_path, "study.journal")


def test_two_workers_on_postgresql_and_no_password_is_shown(start, tmp_path, database):
    said = share(start, tmp_path, database)
    assert postgres.PASSWORD not in str(said) and "sweeper:***@127.0.0.1" in str(said)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or postgres.PASSWORD.encode() not in path.read_bytes(), path


def test_a_wrong_password_is_one_line(sweep, database):
    wrong = database.replace(postgres.PASSWORD, "not-this-one")
    code, out, err = sweep(GRID, "--storage", wrong)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "password authentication failed" in err and "not-this-one" not in err


def test_a_database_that_is_dropped_is_one_line(tmp_path, folder, database):
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create database dropped")
        where = database.replace("/postgres", "/dropped")
        worker = worker_of(tmp_path, folder, where=where)
        lines = worker.work()
        assert "training" in next(lines)
        connection.execute("drop database dropped with (force)")
        with pytest.raises(
            InputError, match=r"^--storage postgresql://sweeper:\*\*\*@\S+: "
        ) as error:
            list(lines)
        assert "\n" not in str(error.value) and postgres.PASSWORD not in str(error.value)
        worker.close()


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_a_killed_workers_trial_is_trained_by_another(start, tmp_path, request, kind):
    where = request.getfixturevalue("database") if kind == "postgresql" else "killed.journal"
    options = ["--storage", where, "--study", "killed"]
    killed = start(*options)
    until_it_trains(killed)
    killed.kill()
    killed.communicate()
    other = start(*options)
    _, err = other.communicate(timeout=60)
    assert other.returncode == 0, err
    rows = ended_once(where, "killed")
    again = [row for row in rows if len(row) > 1]
    assert {tuple(x.state.name for x in row) for row in again} == {("FAIL", "COMPLETE")}
    assert json.loads((tmp_path / "runs/killed/sweep.json").read_text())["retried"] == len(again)
    assert len(rows_of(tmp_path / "runs/killed")) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_worker_puts_its_trials_back_at_once(start, tmp_path, number):
    worker = start(epochs=100_000)
    until_it_trains(worker)
    worker.send_signal(number)
    out, err = worker.communicate(timeout=30)
    assert (worker.returncode, out) == (128 + number, "") and "Traceback" not in err
    rows = trials_of("runs/c-sweep/study.journal")
    assert Counter(row[-1].state.name for row in rows) == {"WAITING": 6}
    assert Counter(len(row) for row in rows) == {1: 4, 2: 2}
    assert not list((tmp_path / "runs/c-sweep").glob("sweep.*"))
