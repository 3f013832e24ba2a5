"""Sweep workers on one study: what is lost, run twice or retried, and the time against one worker.

    python -m benchmarks.workers [--trials 24] [--epochs 12] [--samples 6000] [--url postgresql://...]

1, 2 and 4 processes of `manualnn sweep` begin at the same moment on a fresh study, on a journal
file and on PostgreSQL (without --url on a server of their own, where one is installed); then 2 and
4 of them, of which one is ended by SIGKILL when a third is done. What became of each trial is read
from the study. Exit code 1 where one was lost or was run to its end twice.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

from manualnn.files import PACKAGE
from manualnn.study.queue import outcome, places
from manualnn.study.storage import Storage

from . import postgres
from .results import machine, table

CONFIG = """
[data]
name = "mnist"
train_samples = {samples}
valid = 1000
[model]
layers = [["linear", 64], ["relu"], ["linear", "classes"]]
[train]
epochs = {epochs}
[grid]
"train.optimizer.learning_rate" = {{low = 1e-3, high = 1.0, log = true}}
"train.l2" = {{low = 1e-6, high = 1e-2, log = true}}
"""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
HEARTBEAT, BATCH = 1, 3


@dataclass(frozen=True)
class Outcome:
    """What became of a study's trials; the seconds from the first one's start to the last one's
    end, and those from the start of the processes to their end, which have drawn their pictures."""

    complete: int
    pruned: int
    lost: int
    twice: int
    retried: int
    workers: int
    seconds: float
    wall: float


def run(folder: Path, where: str, name: str, workers: int, trials: int, kill: bool) -> Outcome:
    """Share a fresh study between workers, one of which is killed if `kill` is set."""
    command = ["sweep", "c.toml", "--storage", where, "--study", name, "--trials", str(trials)]
    command += ["--sampler", "random", "--batch", str(BATCH), "--heartbeat", str(HEARTBEAT)]
    begin, processes = time.monotonic(), list[subprocess.Popen[bytes]]()
    for number in range(workers):
        out = ["--out", f"{name}-{number}", "-q"]
        process = subprocess.Popen(
            [sys.executable, "-m", "manualnn", *command, *out], cwd=folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        )  # fmt: skip
        processes.append(process)
    while kill and processes[0].poll() is None:
        if _may_be_killed(folder, where, name, trials, processes[0].pid):
            processes[0].kill()
        time.sleep(0.05)
    for number, process in enumerate(processes):
        error = process.communicate()[1].decode()
        if process.returncode not in ((-9,) if kill and number == 0 else (0,)):
            raise SystemExit(f"worker {number}: exit code {process.returncode}: {error}")
    wall = time.monotonic() - begin
    rows = places(_trials(folder, where, name))[:trials]
    times = [t for row in rows for x in row for t in (x.datetime_start, x.datetime_complete) if t]
    ended = [[trial for trial in row if trial.state in ENDED] for row in rows]
    return Outcome(
        sum(any(t.state == TrialState.COMPLETE for t in row) for row in ended),
        sum(any(t.state == TrialState.PRUNED for t in row) for row in ended),
        trials - sum(outcome(row) is not None for row in rows),
        sum(len(row) > 1 for row in ended),
        sum(len(row) - 1 for row in rows),
        len({trial.user_attrs["worker"] for row in ended for trial in row}),
        (max(times) - min(times)).total_seconds(),
        wall,
    )


def _trials(folder: Path, where: str, name: str) -> list[optuna.trial.FrozenTrial]:
    storage = Storage(where if "://" in where else folder / where, HEARTBEAT)
    try:
        return optuna.load_study(study_name=name, storage=storage.optuna).trials
    except KeyError:  # nobody has created it yet
        return []
    finally:
        storage.close()


def _may_be_killed(folder: Path, where: str, name: str, trials: int, pid: int) -> bool:
    """Whether a third of the trials are done, and the process is training some."""
    found = _trials(folder, where, name)
    running = [trial for trial in found if trial.state == TrialState.RUNNING]
    mine = [t for t in running if t.user_attrs.get("worker", "").endswith(f":{pid}")]
    return bool(mine) and sum(trial.state in ENDED for trial in found) >= trials // 3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--url", help="a PostgreSQL database; default a server of its own")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each worker
    rows, wrong = [], False
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        text = CONFIG.format(samples=options.samples, epochs=options.epochs)
        (folder / "c.toml").write_text(text)
        storages = {"journal": "study.journal"}
        try:
            storages["postgresql"] = options.url or stack.enter_context(postgres.server())
        except postgres.MissingError as error:
            print(f"without PostgreSQL: {error}", file=sys.stderr)
        for kind, where in storages.items():
            alone = 0.0
            for workers, kill in ((1, False), (2, False), (4, False), (2, True), (4, True)):
                name = f"{kind}-{workers}{'-killed' if kill else ''}-{time.time_ns()}"
                found = run(folder, where, name, workers, options.trials, kill)
                alone = alone or found.seconds
                wrong |= bool(found.lost or found.twice)
                killed = "1" if kill else "-"
                counts = found.complete, found.pruned, found.lost, found.twice, found.retried
                times = found.seconds, found.seconds / alone, found.wall
                row = [kind, workers, killed, *counts, *(f"{value:.2f}" for value in times)]
                rows.append(row)
                print(*rows[-1], file=sys.stderr, flush=True)
    heads = ("storage", "workers", "killed", "complete", "pruned", "lost", "run twice", "retried")
    print(machine())
    print(f"{options.trials} trials, {options.epochs} epochs of {options.samples} samples\n")
    print(table((*heads, "seconds", "against one", "with start and end"), rows))
    sys.exit(wrong)


if __name__ == "__main__":
    main()
