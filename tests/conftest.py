"""Fixtures for all tests, and the table of worst differences at the end of a run."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from manualnn.audit import EAGER
from manualnn.cli import main
from manualnn.config import Config, parse_config
from manualnn.data import Prepared, prepare
from manualnn.files import PACKAGE
from manualnn.network import Network
from manualnn.training import DTYPES, Training, threads

WORST: dict[str, float] = {}


def pytest_configure() -> None:
    """Processes that the tests start hear Ctrl-C, also where the tests run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's cache, data folder and runs."""
    monkeypatch.setenv("MANUALNN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("MANUALNN_DATA", raising=False)


@pytest.fixture
def differs() -> Callable[[str, torch.Tensor, torch.Tensor, float], None]:
    """Assert that two float64 tensors differ by at most `bound`; note the worst for the table."""

    def check(
        name: str, actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-12
    ) -> None:
        assert actual.shape == expected.shape
        assert actual.isfinite().all()
        worst = float((actual - expected).abs().max()) if actual.numel() else 0.0
        WORST[name] = max(WORST.get(name, 0.0), worst)
        assert worst <= bound, f"{name}: {worst:.3e} > {bound:.0e}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WORST:
        terminalreporter.section("worst differences from autograd and torch.optim, float64")
        for name, worst in sorted(WORST.items()):
            terminalreporter.line(f"{worst:9.2e}  {name}")


def write_idx(path: Path, array: np.ndarray) -> None:
    """An idx file of bytes, packed where the name ends in .gz."""
    array = np.asarray(array, np.uint8)
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content += array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def write_folder(
    folder: Path,
    train: int = 300,
    test: int = 60,
    classes: int = 4,
    side: int = 6,
    gz: bool = False,
) -> Path:
    """A small data set that can be learned: each class lights up its own pixels, with noise."""
    rng = np.random.default_rng(5)
    patterns = rng.integers(0, 2, (classes, side, side)) * 120
    for prefix, count in (("train", train), ("t10k", test)):
        labels = rng.permutation(np.arange(count) % classes)
        images = patterns[labels] + rng.integers(0, 110, (count, side, side))
        labels[::20] = (labels[::20] + 1) % classes  # some are wrong, so there are mistakes to show
        end = ".gz" if gz else ""
        write_idx(folder / f"{prefix}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", labels)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of idx files: 300 + 60 images of 6 x 6 in 4 classes."""
    return write_folder(tmp_path / "data")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["manualnn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


def random_data(
    samples: int = 96, features: int = 7, classes: int = 3, dtype: str = "fp64", valid: int = 0
) -> Prepared:
    """Gaussian inputs whose labels depend on them."""
    draw = torch.Generator().manual_seed(11)
    x = torch.randn(samples + 30, features, generator=draw, dtype=torch.float64)
    y = (x @ torch.randn(features, classes, generator=draw, dtype=torch.float64)).argmax(1)
    return prepare(
        (x[:samples], y[:samples]),
        (x[samples:], y[samples:]),
        valid=valid,
        normalize="none",
        dtype=DTYPES[dtype],
    )


def config_of(**changes: object) -> Config:
    """A small config; `changes` are dotted keys with `__` for the dot."""
    tree: dict = {
        "model": {"layers": [["linear", 5], ["relu"], ["linear", "classes"]]},
        "train": {"epochs": 4, "batch_size": 32, "precision": "fp64"},
    }
    for key, value in changes.items():
        *tables, last = key.split("__")
        table = tree
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
    return parse_config(tree)


def training_of(config: Config, data: Prepared, classes: int = 3) -> Training:
    """The untrained networks of `config`'s only population for `data`."""
    [population] = config.populations()
    replicas = list(population.replicas)
    dtype = DTYPES[config.train.precision]
    network = Network(population.layers(), data.shape, classes, len(replicas), dtype)
    return Training(network, data, population.config.train, replicas, config.model.init)


def train_alone(config: Config, data: Prepared, classes: int = 3) -> Training:
    """On one thread, as each network of a population is."""
    with threads(1):
        return train_to_the_end(config, data, classes)


def train_to_the_end(config: Config, data: Prepared, classes: int = 3) -> Training:
    training = training_of(config, data, classes)
    for _ in training.run():
        pass
    return training


# A process that has imported torch and forks for each job, as a start costs two seconds.
SERVER = """
import atexit, io, json, os, sys, torch, torch.overrides
from manualnn.audit.child import main
for line in sys.stdin:
    job, folder, output = json.loads(line)
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        del sys.path[0]
        sys.stdin = io.StringIO(job)
        main()
        atexit._run_exitfuncs()
        os._exit(0)  # without what torch does at exit, which takes most of the time
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(f"exit code {status}" if status else "", flush=True)
"""


@pytest.fixture(scope="session")
def forking():
    """What stands in for audit._run."""
    environment = os.environ | EAGER | {"PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=PACKAGE.parent, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as server:  # fmt: skip

        def run(job, folder, seconds, output):
            print(json.dumps([job, str(folder), str(output)]), file=server.stdin, flush=True)
            return server.stdout.readline().strip()

        yield run
        server.stdin.close()
