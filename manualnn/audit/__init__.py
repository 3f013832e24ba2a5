"""Whether a program keeps the rule: tensor operations only, no autograd, no built-in layers.

Five checks together (CHECKS): what the source names; which functions of torch are called; which
operations reach its dispatcher; whether autograd follows a tensor; traps on entry points. Each sees
what another cannot. Together they observe; they prove nothing. docs/audit.md says what escapes.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import PACKAGE
from .record import CHECKS, Finding, Record
from .source import EXEMPT, check_files, check_package, local_files

if TYPE_CHECKING:
    from ..config import Config
    from ..training import Training

SAMPLES = 500  # of MNIST's test images, for the audit of a config
STEPS = 4  # the second is recorded, the third and fourth played
# Without TorchScript and torch.compile every function runs where it is observed.
EAGER = {"PYTORCH_JIT": "0", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
NOT_A_SANDBOX = (
    "the script runs in a process of its own with limits of time and memory;"
    " this is not a sandbox for hostile code"
)


@dataclass
class Report:
    """What an audit found. `error` says why the program could not be judged, or only in part.

    `operations` has [calls, flops, bytes] of each; `result` is what a function that was called
    returned, a float where it is a number; `tail` the end of the program's output.
    """

    target: str
    findings: list[Finding] = field(default_factory=list)
    operations: dict[str, list[int]] = field(default_factory=dict)
    error: str = ""
    notes: list[str] = field(default_factory=list)
    result: Any = None
    seconds: float = 0.0
    tail: str = ""

    def of(self, check: str, kind: str = "finding") -> list[Finding]:
        return [x for x in self.findings if x.check == check and x.kind == kind]

    def all_of(self, kind: str) -> list[Finding]:
        return [x for x in self.findings if x.kind == kind]

    @property
    def code(self) -> int:
        """0: nothing was found, 1: something was, 2: it could not be judged."""
        if self.all_of("finding"):
            return 1
        return 2 if self.error or self.all_of("unobserved") else 0

    @property
    def verdict(self) -> str:
        count = len(self.all_of("finding"))
        if count:
            return f"{count} finding{'s' * (count > 1)}"
        if self.code == 2:
            what = self.error or "a part of it ran where nothing watches"
            return f"could not be judged: {what}"
        return "no forbidden call observed"

    def to_dict(self) -> dict[str, Any]:
        def listed(findings: list[Finding]) -> list[dict[str, str]]:
            return [{"where": x.where, "what": x.what} for x in findings]

        checks = {
            name: {"passed": not self.of(name), "findings": listed(self.of(name))}
            for name in CHECKS
        }
        columns = ("calls", "flops", "bytes")
        return {
            "target": self.target,
            "verdict": self.verdict,
            "code": self.code,
            "checks": checks,
            "to_look_at": listed(self.all_of("note")),
            "unobserved": listed(self.all_of("unobserved")),
            "operations": {
                name: dict(zip(columns, row, strict=True)) for name, row in self.operations.items()
            },
            "notes": self.notes,
            "error": self.error or None,
            "result": self.result,
            "seconds": self.seconds,
        }


def audit_config(config: "Config", steps: int = STEPS) -> Report:
    """Audit the training of a config by this package, on images of the bundled MNIST: its source in
    the strict form, and some steps and an evaluation of every population. Raises InputError where
    its networks do not fit these images."""
    from .watch import Watch, observing

    report, record = Report(config.name), Record()
    report.findings += check_package(PACKAGE)
    begin = time.perf_counter()
    for training in trainings(config):
        with observing(Watch(record, strict=True, root=PACKAGE)):
            few_steps(training, steps)
    report.seconds = time.perf_counter() - begin
    report.findings += _relative(record.findings, PACKAGE)
    report.operations = record.operations()
    if not report.operations:
        report.error = "no operation was observed"
    report.notes = [
        f"source: all modules of manualnn but {EXEMPT}, which sets the traps and so names them",
        f"{steps} training steps and an evaluation on {SAMPLES} images of the bundled MNIST,"
        " whatever data.name is; steps after the second are played, and seen as they are",
    ]
    return report


def few_steps(training: "Training", steps: int) -> None:
    """Train some steps as a run does, networks of a population side by side, and evaluate."""
    batches = itertools.islice(itertools.cycle(training.batches(1)), steps)
    for _ in training.walk(list(batches)):
        pass
    training.measure(training.data.train)


def trainings(config: "Config") -> "Iterator[Training]":
    """The trainings of a config on the first test images of the bundled MNIST."""
    from ..data import Examples, load, prepare, relabel
    from ..network import Network
    from ..training import Training

    mnist = load("mnist", PACKAGE / "data" / "mnist", parts=("test",))
    assert mnist.test is not None
    first = Examples(mnist.test.images[:SAMPLES], mnist.test.labels[:SAMPLES])
    for population in config.populations():
        chosen = relabel(replace(mnist, train=first, test=None), population.config.data.labels)
        classes = len(chosen.class_names or ())
        replicas = list(population.replicas)
        assert chosen.train is not None
        data = prepare(
            (chosen.train.images, chosen.train.labels),
            None,
            normalize=population.config.data.normalize,
            corruption=[(replica.corruption, replica.seed) for replica in replicas],
            classes=classes,
        )
        network = Network(population.layers(), data.shape, classes, len(replicas))
        settings = population.config
        yield Training(network, data, settings.train, replicas, settings.model.init)


def audit_file(
    script: Path | str,
    call: str | None = None,
    seconds: float = 60,
    memory: int = 4096,
    allow: Collection[str] = (),
    root: Path | None = None,
    mnist: Path | None = None,
) -> Report:
    """Audit a script, run as `__main__` in its folder, or imported and its function `call` called.

    It runs on the CPU in a process of its own, for at most `seconds` and with `memory` MB of data.
    `allow` are names that are permitted; `root` is the folder whose files are judged, by default
    the script's; `mnist` a folder of MNIST's files that torchvision finds under whatever root.
    Raises InputError where there is no such file.
    """
    script = Path(script)
    if not script.is_file():
        raise InputError(f"{script}: no such file")
    script = script.resolve()
    root = root.resolve() if root else script.parent
    report = Report(str(script.relative_to(root)), notes=[NOT_A_SANDBOX])
    if os.name == "nt":
        report.notes.append("this system has no limits of memory")
    files = local_files(script, root)
    report.findings += check_files(files, root, allow)
    with tempfile.TemporaryDirectory() as temporary:
        results, output = Path(temporary) / "results", Path(temporary) / "output"
        results.touch()
        job = {
            "script": str(script), "root": str(root), "call": call, "memory": memory,
            "allow": list(allow), "mnist": str(mnist) if mnist else None, "results": str(results),
            "torchvision": any(map(_uses_torchvision, files)),
        }  # fmt: skip
        begin = time.perf_counter()
        report.error = _run(json.dumps(job), script.parent, seconds, output)
        report.seconds = time.perf_counter() - begin  # of a script that does not say it itself
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - 2000))
            report.tail = file.read().decode(errors="replace")
        try:
            told = [json.loads(line) for line in results.read_text().splitlines()]
            found = [Finding(**line) for line in told if "check" in line]
        except (ValueError, TypeError):
            report.error = "what it told of itself is damaged"
            return report
    report.findings += _relative(found, root)
    summary = next((line for line in told if "operations" in line), None)
    if summary is None:
        report.error = report.error or "it ended without a last word"
        return report
    report.operations, report.result = summary["operations"], summary["result"]
    report.seconds, report.error = summary["seconds"], summary["error"] or report.error
    later = [path for path in map(Path, summary["files"]) if path not in files]
    report.findings += check_files(dict.fromkeys(later), root, allow)
    if not report.operations:
        report.notes.append("no torch operation was observed: judged by source and traps only")
    return report


def _uses_torchvision(path: Path) -> bool:
    with suppress(OSError):
        return b"torchvision" in path.read_bytes()
    return False


def _run(job: str, folder: Path, seconds: float, output: Path) -> str:
    """Run the child with its output in a file; what went wrong, or ""."""
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r});"
        "from manualnn.audit.child import main; del sys.path[0]; main()"
    )
    with output.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | EAGER | {"PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
        try:
            child.communicate(job.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:g} s"
        finally:
            _end(child)
    if child.returncode < 0:
        return f"killed by signal {signal.Signals(-child.returncode).name}"
    return f"exit code {child.returncode}" if child.returncode else ""


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Kill the child and what it has begun."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


def _relative(findings: list[Finding], root: Path) -> list[Finding]:
    return [replace(x, where=x.where.removeprefix(f"{root}{os.sep}")) for x in findings]


def lines(report: Report, most: int = 10) -> Iterator[str]:
    """The report for a reader: a table of the checks, what was found, the operations."""
    yield f"{report.target}: {report.verdict}"
    yield ""
    for check, what in CHECKS.items():
        found = len(report.of(check))
        passed = "nothing so far" if report.error else "passed"
        yield f"{check:<12}{what:<58}{f'{found} found' if found else passed:>14}"
    for kind, title in (
        ("finding", "found"), ("unobserved", "not observed"), ("note", "to look at; no finding"),
    ):  # fmt: skip
        if some := report.all_of(kind):
            yield ""
            yield f"{title}:"
            yield from (f"  {x.check:<12}{x}" for x in some)
    if report.operations:
        yield ""
        yield f"{'operation':<26}{'calls':>10}{'MFLOP':>12}{'MB':>12}"
        for name, row in list(report.operations.items())[:most]:
            yield _row(name, row)
        if rest := list(report.operations.values())[most:]:
            yield _row(f"{len(rest)} more (see --json)", [sum(x) for x in zip(*rest, strict=True)])
    yield ""
    yield from (f"note: {note}" for note in report.notes)
    if report.error and report.tail.strip():
        yield "its last output:"
        yield from (f"  {line}" for line in report.tail.strip().splitlines()[-8:])


def _row(name: str, row: list[int]) -> str:
    return f"{name:<26}{row[0]:>10,}{row[1] / 1e6:>12,.1f}{row[2] / 1e6:>12,.1f}"


__all__ = ["CHECKS", "Finding", "Report", "audit_config", "audit_file", "lines"]
