"""Runs that survive: signals, kills, full disks, damaged checkpoints, folders that go away."""

import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import kill
from manualnn import experiment
from manualnn.checkpoint import PREVIOUS, Saver
from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.experiment import Run
from manualnn.files import LOCK
from manualnn.training import Progress

from .conftest import config_of, random_data, train_to_the_end, training_of

ROOT = Path(__file__).parent.parent
SETS = ["data.valid=60", "train.epochs=4", "train.seeds=[1, 2]", "train.optimizer.momentum=0.9"]


def small(folder, *sets):
    return load_config("mnist-mlp", [f'data.dir="{folder}"', *SETS, *sets])


def finish(config, out, **options):
    run = Run(config, Path(out), "cpu", **options)
    for _ in run.train():
        pass
    return run


def weights(out):
    content = torch.load(Path(out) / "weights.pkl")
    return torch.cat([content[key].flatten() for key in ("w1", "b1", "w2", "b2", "w3", "b3")])


def history(out):
    lines = (Path(out) / "history.csv").read_text().splitlines()
    return [[*line.split(",")[:4], *line.split(",")[5:]] for line in lines]  # without seconds


def same(out, whole):
    return weights(out).equal(weights(whole)) and history(out) == history(whole)


@pytest.mark.parametrize(
    ("optimizer", "seeds", "layers"),
    [
        ("sgd", [0], [["linear", 6], ["relu"], ["linear", 3]]),
        ("adam", [0, 1, 2], [["dropout", 0.2], ["linear", 6], ["relu"], ["linear", 3]]),
    ],
)
def test_going_on_within_an_epoch_equals_an_unbroken_run(optimizer, seeds, layers):
    """Saved and restored at every event, in other objects each time; early stopping included."""
    config = config_of(
        model__layers=layers,
        train__seeds=seeds,
        train__batch_size=3,
        train__epochs=6,
        train__precision="fp32",
        train__optimizer={"name": optimizer, "learning_rate": 0.05, "momentum": 0.9},
        train__schedule={"name": "one_cycle"},
        train__early_stopping={"patience": 2},
        data__valid=20,
    )
    data = random_data(valid=20, dtype="fp32")
    whole, broken = train_to_the_end(config, data), training_of(config, data)
    within, state = 0, broken.state()
    while not broken.finished:
        broken = training_of(config, data)
        broken.restore(state)
        for event in broken.run():
            if isinstance(event, Progress | list):
                within += bool(broken.epoch_step)
                break
        state = broken.state()
    last = training_of(config, data)
    last.restore(state)
    for _ in last.run():
        pass
    assert within > 10
    assert last.network.theta.equal(whole.network.theta)
    assert last.ended == whole.ended and last.best_epoch == whole.best_epoch
    for a, b in zip(last.records, whole.records, strict=True):
        assert a.__dict__ | {"seconds": 0} == b.__dict__ | {"seconds": 0}


def test_checkpoints_every_so_many_steps(folder, tmp_path, monkeypatch):
    config = small(folder, "train.batch_size=16", "train.checkpoint_every_steps=4")
    finish(config, tmp_path / "whole")
    steps, save = [], Run._save

    def count(run, history=False):
        steps.append(run.training.step_number)

    monkeypatch.setattr(Run, "_save", count)
    run = Run(config, tmp_path / "broken", "cpu")
    for _ in run.train():
        if run.training.step_number == 24:  # 9 of the second epoch's 15
            save(run)
            break
    del run
    assert steps == [4, 8, 12, 15, 16, 20, 24]
    monkeypatch.setattr(Run, "_save", save)
    finish(config, tmp_path / "broken", resume=True)
    assert same(tmp_path / "broken", tmp_path / "whole")


def test_stop_saves_and_resume_goes_on(folder, tmp_path):
    config = small(folder, "train.batch_size=4")
    finish(config, tmp_path / "whole")
    rounds = 0
    while not (tmp_path / "out" / "metrics.json").exists():
        run = Run(config, tmp_path / "out", "cpu", resume=True)
        for event in run.train():
            if isinstance(event, Progress):
                run.stop()
        assert run.stopped or run.metrics
        rounds += 1
        del run
    assert rounds > 8 and same(tmp_path / "out", tmp_path / "whole")


def test_two_signals_stop_at_once(run, folder, monkeypatch):
    """The first lets it save; a second, while it does, ends it as Ctrl-C always did."""
    before = signal.getsignal(signal.SIGINT)
    raised = []

    def save_epoch(self):
        for _ in range(2):
            raised.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "_save_epoch", save_epoch)
    code, _, err = run("train", "--data-dir", folder, "--device", "cpu", "--out", "out")
    assert code == 130 and len(raised) == 2
    assert "interrupted: out holds nothing yet" in err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_within_an_epoch(folder, tmp_path, number, code, run):
    options = ["train", "--data-dir", folder, "--device", "cpu", "--epochs", "2"]
    for value in ("data.valid=60", "train.batch_size=1", "train.optimizer.learning_rate=1e-3"):
        options += ["--set", value]
    out = tmp_path / "out"
    assert run(*options, "--out", tmp_path / "whole")[0] == 0
    script = (
        "import os, signal, sys; from manualnn import cli, training\n"
        "judge = training.Training._steps\n"
        "def step(self, *given):\n"
        "    judge(self, *given)\n"
        f"    if self.step_number > 300: os.kill(os.getpid(), {int(number)})\n"
        "training.Training._steps = step\n"
        f"sys.argv = ['manualnn', *{[*map(str, options), '--out', str(out)]}]\n"
        "cli.main()"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == code, done.stderr
    assert "out holds epoch 1 and " in done.stderr and "Traceback" not in done.stderr
    assert run(*options, "--out", out, "--resume")[0] == 0
    assert same(out, tmp_path / "whole")


def test_two_runs_cannot_have_one_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small(folder)
    first = Run(config, None, "cpu")
    assert first.folder == Path("runs/mnist-mlp")
    with pytest.raises(InputError, match="runs/mnist-mlp: another run trains there; wait"):
        Run(config, first.folder, "cpu", resume=True)
    assert Run(config, None, "cpu").folder == Path("runs/mnist-mlp-2")
    # One that was as fast: its folder appears after the name was chosen.
    names = iter([Path("runs/mnist-mlp"), Path("runs/mnist-mlp-3")])
    monkeypatch.setattr(experiment, "new_folder", lambda *_: next(names))
    monkeypatch.setattr(experiment, "_holds_run", lambda folder: False)
    assert Run(config, None, "cpu").folder == Path("runs/mnist-mlp-3")
    monkeypatch.undo()
    (tmp_path / "runs/mnist-mlp" / ".writing-checkpoint-x1.pt").write_bytes(b"half")
    os.chdir(tmp_path)
    del first
    finish(config, "runs/mnist-mlp", resume=True)
    names = {path.name for path in Path("runs/mnist-mlp").iterdir()}
    assert not names & {LOCK, PREVIOUS, ".writing-checkpoint-x1.pt"}


@pytest.fixture
def broken(folder, tmp_path):
    """A config, the folder of its whole run, and one that was left after two epochs."""
    config = small(folder)
    finish(config, tmp_path / "whole")
    run = Run(config, tmp_path / "broken", "cpu")
    for event in run.train():
        if isinstance(event, list) and run.training.epoch == 2:
            break
    return config, tmp_path / "whole", tmp_path / "broken"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(broken, capsys):
    config, whole, out = broken
    path = out / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    run = Run(config, out, "cpu", resume=True)
    assert run.training.epoch == 1
    assert f"the one before it, {PREVIOUS}, is used" in capsys.readouterr().err
    del run
    assert not path.exists()  # as between the two names
    finish(config, out, resume=True)
    assert same(out, whole)


def test_the_good_checkpoint_stays_where_the_last_is_damaged(broken):
    config, _, out = broken
    good = (out / PREVIOUS).read_bytes()
    (out / "checkpoint.pt").write_bytes(b"damaged")
    run = Run(config, out, "cpu", resume=True)
    run._saver = Saver(out)
    run._save()
    run._saver.flush()
    assert (out / PREVIOUS).read_bytes() == good


def test_a_signal_while_a_run_is_finished_stops_what_comes_next(run, folder, monkeypatch):
    finish = Run._finish

    def signalled(self):
        signal.raise_signal(signal.SIGTERM)
        finish(self)

    monkeypatch.setattr(Run, "_finish", signalled)
    options = ["--data-dir", folder, "--device", "cpu", "--epochs", "2", "--samples", "20,40"]
    code, _, err = run("random-labels", *options)
    assert code == 143
    assert "samples-20: finished, then stopped by the signal" in err
    assert not Path("runs/mnist-random-labels/samples-40").exists()
    monkeypatch.setattr(Run, "_finish", finish)
    code, _, err = run("random-labels", *options, "--resume")
    assert code == 0 and "samples-20: already finished" in err
    assert Path("runs/mnist-random-labels/samples-40/metrics.json").exists()


def test_a_lost_terminal_is_no_error(folder, tmp_path):
    """As when a connection breaks: nobody reads what is written any more."""
    ours, theirs = pty.openpty()
    options = ["train", "--data-dir", folder, "--device", "cpu", "--epochs", "100000"]
    options += ["--set", "data.valid=60", "--out", tmp_path / "out"]
    script = (
        "import signal, sys; from manualnn import cli\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # where nohup runs the tests
        f"sys.argv = ['manualnn', *{[*map(str, options)]}]\n"
        "cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "history.csv").exists() and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 4096)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 129
    assert (tmp_path / "out" / "checkpoint.pt").exists()


def test_two_damaged_checkpoints_are_refused(broken):
    config, _, out = broken
    for name in ("checkpoint.pt", PREVIOUS):
        (out / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{PREVIOUS}: not a checkpoint"):
        Run(config, out, "cpu", resume=True)


def test_a_checkpoint_of_another_config_is_refused(broken, folder, tmp_path):
    config, _, out = broken
    other = small(folder, "train.l2=0.1")
    finish(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "checkpoint.pt", out / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint.pt: is of another config than config.toml"):
        Run(config, out, "cpu", resume=True)
    with pytest.raises(InputError, match=r"train.l2 was .*, now 0.1"):
        Run(other, out, "cpu", resume=True)


def test_a_full_disk_loses_nothing(broken):
    """As a limit on the size of files: writing fails within torch's own writer."""
    config, whole, out = broken
    before = (out / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = Run(config, out, "cpu", resume=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large; what was saved"):
            for _ in run.train():
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    del run
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob(".writing-*"))
    finish(config, out, resume=True)
    assert same(out, whole)


def test_a_full_disk_at_the_start_leaves_no_folder(folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = small(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(InputError, match=r"--out .*out: cannot be written: File too large"):
            Run(config, tmp_path / "out", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_goes_away_is_made_again(broken, capsys):
    config, whole, out = broken
    run = Run(config, out, "cpu", resume=True)
    for event in run.train():
        if isinstance(event, list) and run.training.epoch == 3:
            run._saver.flush()
            shutil.rmtree(out)
        elif isinstance(event, list):
            run._saver.flush()
            with pytest.raises(InputError, match="another run trains there"):
                Run(config, out, "cpu", resume=True)
    assert same(out, whole) and (out / "config.toml").exists()
    assert f"note: {out} was removed; it is made again" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o500)
    with pytest.raises(InputError, match=r"--out .*: cannot be written: Permission denied"):
        Run(small(folder), out, "cpu")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("work", kill.WORKS)
def test_a_run_survives_being_killed(work, tmp_path):
    """SIGKILL at random moments; the long run is benchmarks/kill.py."""
    begin = time.monotonic()
    outcome = kill.run(work, 2, random.Random(5), tmp_path, "--set", "train.epochs=12")
    print(f"{work}: {outcome.kills} kills in {time.monotonic() - begin:.0f} s")
    assert outcome.faults == [] and outcome.kills == 2
