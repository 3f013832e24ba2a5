"""The process in which a user's script runs under observation. `audit_file` starts it.

A job comes as JSON on stdin; findings, and at the very end a summary, are lines of JSON that are
appended to a file. The limits keep an accident small. They are no sandbox: hostile code can undo
all of this.
"""

import atexit
import json
import os
import runpy
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from .record import Record
from .watch import Watch, observe_for_good

LARGEST_FILE = 2**30  # bytes a script may write into one file


def main() -> None:
    """Run the job on stdin."""
    job = json.loads(sys.stdin.read())
    limit(job["memory"])
    sink = os.open(job["results"], os.O_WRONLY | os.O_APPEND)
    watch = Watch(Record(sink), allow=job["allow"], root=Path(job["root"]))
    summary: dict[str, Any] = {"error": "", "result": None, "seconds": 0.0}
    atexit.register(_last_word, watch, summary, os.getpid(), sink)  # runs after all others
    if job["mnist"]:
        os.environ["MANUALNN_DATA"] = job["mnist"]
        if job["torchvision"]:
            _redirect_mnist(job["mnist"])
    # The script may bring a package of this name, and has nothing to look for in this one.
    for name in [name for name in sys.modules if name.split(".")[0] == "manualnn"]:
        del sys.modules[name]
    script = Path(job["script"])
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.parent))
    observe_for_good(watch)
    begin = time.perf_counter()
    try:
        if job["call"]:
            names = runpy.run_path(str(script), run_name=script.stem)
            if not callable(names.get(job["call"])):
                raise NameError(f"{script.name} defines no function {job['call']}")
            summary["result"] = _plain(names[job["call"]]())
        else:
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            summary["error"] = f"ended with {error.code!r}"
    except BaseException as error:
        traceback.print_exc()
        lines = [x for x in traceback.extract_tb(error.__traceback__) if _own(x.filename, job)]
        place = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}: " if lines else ""
        summary["error"] = f"{place}{type(error).__name__}: {error}".splitlines()[0]
    summary["seconds"] = time.perf_counter() - begin


def limit(megabytes: int) -> bool:
    """Limit the data of this process, and the size of a file; False where there are no limits."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    for what, most in (
        (resource.RLIMIT_DATA, megabytes * 2**20),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # a lower one is set
            resource.setrlimit(what, (most, most))
    return True


def _own(file: str, job: dict[str, Any]) -> bool:
    return file.startswith(job["root"])


def _plain(value: Any) -> Any:
    """A number for what is one, else its text."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return repr(value)[:200]


def _redirect_mnist(raw: str) -> None:
    """Let torchvision find MNIST in the folder `raw`, whatever root a script names."""
    from torchvision.datasets import mnist

    elsewhere = mnist.MNIST.raw_folder

    def raw_folder(dataset: Any) -> str:
        own = type(dataset).__name__ == "MNIST"
        return raw if own else elsewhere.fget(dataset)

    mnist.MNIST.raw_folder = property(raw_folder)


def _last_word(watch: Watch, summary: dict[str, Any], pid: int, sink: int) -> None:
    if os.getpid() != pid:
        return
    summary["operations"] = watch.record.operations()
    root = str(watch.root)
    files = [str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())]
    own = [f for f in files if f.startswith(root) and watch.kind(f) == "user"]
    summary["files"] = [f for f in own if f.endswith(".py")]
    os.write(sink, (json.dumps(summary) + "\n").encode())
