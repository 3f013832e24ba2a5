"""Several processes train as one: the same numbers, one voice, and what becomes of faults."""

import csv
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import restarts
from manualnn import distributed
from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.experiment import Run

from . import together
from .conftest import WORST

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SMALL = ["data.train_samples=1000", "data.valid=200", "train.batch_size=50", "train.epochs=4"]
TINY = 'model.layers=[["linear", 16], ["relu"], ["dropout", 0.2], ["linear", 10]]'


def options(*sets):
    return [part for value in (*SMALL, TINY, *sets) for part in ("--set", value)]


def torchrun(processes, *arguments, restarts=0):
    """Start arguments of `python -m` by torchrun; exit code and all that was printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "-m"]
    return finish(start([*launch, *map(str, arguments)]))


def start(command, **more):
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT | more, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def members(*arguments, **more):
    """Two processes as torchrun starts them, without its agent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", *map(str, arguments)]
    ranks = [meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more for rank in (0, 1)]
    return [start(command, **rank) for rank in ranks]


def group(*arguments):
    """What became of two `members`."""
    processes = members(*arguments)
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def told(err):
    """The only line of an error; torch's own warnings may stand before it."""
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture(scope="module")
def alone():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: together.train(training) for name, training in together.cases().items()}
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What 2 processes and 4 came to; the 2 twice."""
    folder, found = tmp_path_factory.mktemp("together"), {}
    for name, processes in (("2", 2), ("again", 2), ("4", 4)):
        code, _, err = torchrun(processes, "tests.together", folder / name)
        assert code == 0, err
        found[name] = torch.load(folder / name)
    return found


@pytest.mark.parametrize("processes", ["2", "4"])
@pytest.mark.parametrize("name", together.cases())
def test_the_losses_do_not_depend_on_the_number_of_processes(name, processes, trained, alone):
    """200 steps with dropout, batches of one, portions that differ or are empty."""
    ours, theirs = trained[processes][name], alone[name]
    assert ours["same"], "the processes disagree"
    assert ours["losses"].shape == theirs["losses"].shape == (200, len(theirs["theta"]))
    worst = float(((ours["losses"] - theirs["losses"]) / theirs["losses"]).abs().max())
    label = f"losses of 200 steps by {processes} processes ({name}, relative)"
    WORST[label] = worst
    assert worst < (0.1 if name == "float32" else 1e-12)
    if name != "float32":
        assert float((ours["theta"] - theirs["theta"]).abs().max()) < 1e-11
        assert float((ours["measured"] - theirs["measured"]).abs().max()) < 1e-6


@pytest.mark.parametrize("name", together.cases())
def test_as_many_processes_give_the_same_bits_again(name, trained):
    first, again = trained["2"][name], trained["again"][name]
    for key in ("losses", "theta", "measured"):
        assert first[key].equal(again[key])


def test_a_step_sends_one_message_of_gradient_losses_hits_and_count(trained, alone):
    for processes in ("2", "4"):
        for name, found in trained[processes].items():
            replicas, width = alone[name]["theta"].shape
            size = (replicas * width + 2 * replicas + 1) * alone[name]["theta"].element_size()
            assert found["apart"] == (name == "population" and processes == "2")
            assert found["sent"] == ([] if found["apart"] else [size] * 200)


def test_portions_are_consecutive_and_as_equal_as_can_be(monkeypatch):
    for world in (1, 2, 3, 4):
        monkeypatch.setattr(distributed, "world", lambda world=world: world)
        for count in range(10):
            parts = distributed.portions(count)
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
            sizes = [part.stop - part.start for part in parts]
            assert len(parts) == world and max(sizes) - min(sizes) <= 1


def rows(folder):
    with (folder / "history.csv").open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def test_bad_input_is_one_line_of_all_processes(tmp_path):
    out = tmp_path / "out"
    found = group("manualnn", "train", "--out", out, "--set", "train.epochz=2")
    assert [code for code, _, _ in found] == [2, 2]
    assert re.fullmatch("error: .*epochz.*", told(found[0][2]))
    assert found[1][1:] == ("", "") and not out.exists()


def test_usage_errors_and_bad_data_are_one_line_too(tmp_path):
    for arguments in (["--epochz", "2"], ["--set", "data.dir=/nowhere"]):
        found = group("manualnn", "train", *arguments, "--out", tmp_path / "out")
        assert [code for code, _, _ in found] == [2, 2]
        assert told(found[0][2]).startswith("error: ") and found[1][1] == ""
        assert "error" not in found[1][2]
    assert not (tmp_path / "out").exists()


def test_a_rank_that_sees_other_data_is_named(tmp_path):
    out = tmp_path / "out"
    found = group("tests.astray", "data", "train", "--out", out, *options())
    assert [code for code, _, _ in found] == [2, 2]
    assert told(found[0][2]).startswith("error: rank 1 has another data set ")
    assert not out.exists()


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path):
    out = tmp_path / "out"
    found = group("tests.astray", "disk", "train", "--out", out, "--quiet", *options())
    assert [code for code, _, _ in found] == [2, 1]
    assert re.fullmatch("error: rank 0: .*No space left.*--resume goes on.*", told(found[0][2]))
    assert re.match("error: rank 1: lost .*closed; .*--resume", found[1][2].splitlines()[-1])
    assert (out / "checkpoint.pt").exists() and not (out / "metrics.json").exists()


def test_a_peer_that_hangs_is_named_after_the_time_out(tmp_path):
    command = ["tests.astray", "hang", "train", "--out", tmp_path / "out", "--quiet", *options()]
    first, second = members(*command, MANUALNN_TIMEOUT="6")
    try:
        code, _, err = finish(first)
        assert second.poll() is None
    finally:
        second.kill()
        second.communicate()
    assert code == 1
    assert err.splitlines()[-1].startswith("error: rank 0: lost rank 1: no answer within 6 s; ")


def test_torchrun_shows_the_traceback_of_what_nobody_foresaw(tmp_path):
    code, _, err = torchrun(2, "tests.astray", "error", "train", "--out", tmp_path, *options())
    assert code == 1
    assert "ZeroDivisionError: which nobody foresaw" in err
    assert 'in changed\n' in err  # by its function  # fmt: skip


def test_one_process_that_is_asked_to_stop_stops_all_and_others_go_on(tmp_path):
    """Stopped within an epoch by two processes, finished by one: the numbers of one alone."""
    out, double = tmp_path / "out", "train.precision=fp64"
    command = ["train", "--quiet", *options(double), "--out"]
    found = group("tests.astray", "stop", *command, out)
    assert [code for code, _, _ in found] == [130, 143]
    assert "holds epoch 1 and" in found[0][2]
    config = load_config("mnist-mlp", [*SMALL, TINY, double])
    for folder, resume in ((out, True), (tmp_path / "alone", False)):
        for _ in Run(config, folder, "cpu", resume).train():
            pass
    ours, theirs = rows(out), rows(tmp_path / "alone")
    assert len(ours) == len(theirs) == 4
    for row, other in zip(ours, theirs, strict=True):
        for key in row:
            if key not in ("run", "seconds"):
                assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-9)


@pytest.mark.parametrize("work", ["mlp"])
def test_killed_workers_are_started_again_and_go_on(work, tmp_path):
    """The long run is benchmarks/restarts.py."""
    draw = random.Random(3)
    outcome = restarts.run(2, work, 1, draw, tmp_path, "--set", "train.epochs=60")
    assert outcome.faults == [] and outcome.kills == 1


def test_a_sweep_is_shared_by_networks(tmp_path):
    """Each process trains some of the networks; the folder is what one process leaves."""
    grid = ["--grid", "train.l2=[0, 1e-3, 1e-2]", "--seeds", "1", "--retrain", "1"]
    command = ["sweep", "mnist-mlp", "--quiet", "--json", *options(), *grid, "--out"]
    code, out, err = torchrun(2, "manualnn", *command, tmp_path / "two")
    assert code == 0, err
    result = json.loads(out)
    alone = [sys.executable, "-m", "manualnn", *map(str, command), str(tmp_path / "one")]
    code, out, err = finish(start(alone))
    assert code == 0, err
    single = json.loads(out)
    for found in (result, single):
        for key in ("seconds", "samples_per_second", "out"):
            found["retrained"].pop(key)
        found.pop("out")
    assert result["rows"] == single["rows"] and result["best"] == single["best"]
    names = [
        {path.relative_to(folder) for path in folder.rglob("*")}
        for folder in (tmp_path / "two", tmp_path / "one")
    ]
    assert names[0] == names[1]
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


def test_other_commands_are_refused_under_torchrun():
    found = group("manualnn", "evaluate", "mnist-mlp")
    assert [code for code, _, _ in found] == [2, 2]
    assert told(found[0][2]) == (
        "error: torchrun starts several processes for train, compare, sweep, random-labels;"
        " run evaluate without it"
    )
    assert found[1][1:] == ("", "")


def test_a_wrong_time_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for value in ("soon", "0", "nan", "-1"):
        monkeypatch.setenv("MANUALNN_TIMEOUT", value)
        with pytest.raises(InputError, match="MANUALNN_TIMEOUT"):
            distributed.start(torch.device("cpu"))


def test_one_process_is_a_group_of_its_own():
    tensor = torch.ones(3)
    assert distributed.add_up(tensor) is tensor and tensor.tolist() == [1, 1, 1]
    assert distributed.most(2.5) == 2.5 and distributed.gathered("x") == ["x"]
    assert distributed.on_main(lambda: 7) == distributed.together(lambda: 7) == 7
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    distributed.agree({"config": "any"})
    distributed.spread(tensor)


def test_a_restart_goes_on_only_in_the_folders_of_its_own_start(tmp_path, monkeypatch):
    """A folder that was refused is refused again; one that was trained in is gone on with."""
    monkeypatch.chdir(tmp_path)
    config = load_config("mnist-mlp", [*SMALL, TINY, "train.epochs=1"])
    for folder in (Path("other"), None):
        for _ in Run(config, folder, "cpu").train():
            pass
    logs = tmp_path / "logs"
    for attempt in (0, 1):
        (logs / f"attempt_{attempt}/0").mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(logs / f"attempt_{attempt}/0/error.json"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with pytest.raises(InputError, match="other already holds a run"):
            Run(config, Path("other"), "cpu")
        run = Run(config, None, "cpu")
        assert run.folder == Path("runs/mnist-mlp-2")
        run._release()
    assert Run(config, Path("fresh"), "cpu").folder == Path("fresh")
    run = Run(config, Path("fresh"), "cpu")
    assert run.metrics is None and run.folder == Path("fresh")
