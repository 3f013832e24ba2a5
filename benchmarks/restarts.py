"""Kill random workers of a training under torchrun, which starts them again; compare.

    python -m benchmarks.restarts [--kills 20] [--processes 2] [--seed 0]

Each work is trained once by as many processes without a break. Then torchrun trains it with
`--max-restarts` while, at random moments, a random one of its processes is ended by SIGKILL. The
run must come to its end, with the same weights to the bit and the same history but for `seconds`.
"""

import argparse
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from .kill import Outcome, command, differences, faults_in, kill_all, stamp, writes

WORKS = ("mlp", "population")


def torchrun(processes: int, work: str, out: Path, restarts: int, *more: str) -> list[str]:
    """kill.command of a work, by so many processes; without --resume, as a user starts it."""
    [python, *train] = command(work, out, *more)
    train.remove("--resume")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [python, *launch, f"--max-restarts={restarts}", *train]


def run(
    processes: int, work: str, kills: int, draw: random.Random, folder: Path, *more: str
) -> Outcome:
    """Train `work` without a break, then with `kills` kills in one run or several."""
    outcome, whole = Outcome(), folder / "whole"
    launch = torchrun(processes, work, whole, 0, *more)
    subprocess.run(launch, check=True, capture_output=True, env=environment())
    while outcome.kills < kills:
        outcome.runs += 1
        out = folder / f"broken-{outcome.runs}"
        with (folder / "log").open("w") as log:
            launch = torchrun(processes, work, out, kills + 1, *more)
            agent = subprocess.Popen(launch, stdout=log, stderr=log, env=environment())
            while outcome.kills < kills and _killed(agent, out, draw, outcome):
                outcome.faults += faults_in(out)
            code = agent.wait()
        if code:
            text = (folder / "log").read_text()[-1000:]
            outcome.faults.append(f"{out.name}: exit code {code}: {text}")
            break
        outcome.faults += differences(out, whole)
    return outcome


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started."""
    with suppress(OSError):
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        return [int(child) for child in children]
    return []


def _killed(agent: subprocess.Popen, out: Path, draw: random.Random, outcome: Outcome) -> bool:
    """Whether a worker was killed before the run came to its end."""
    before = stamp(out)
    while agent.poll() is None and stamp(out) == before:
        time.sleep(0.002)  # they import, meet, and read their data
    deadline = time.monotonic() + draw.uniform(0, 1.5)
    while agent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    running = workers(agent.pid)
    if agent.poll() is not None or not running or (out / "metrics.json").exists():
        return False
    os.kill(draw.choice(running), signal.SIGKILL)
    outcome.kills += 1
    outcome.writing += writes(out)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of all works together")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    done = f"workers of {options.processes} killed"
    kill_all(WORKS, options.kills, options.seed, partial(run, options.processes), done)


if __name__ == "__main__":
    main()
