"""Which file a name means: a path or a run's folder, the newest run of that name, a shipped file.

One rule for every command; where a bare name was given, the file is said on stderr.
"""

from contextlib import suppress
from pathlib import Path

from .errors import InputError, hint, note
from .files import find_shipped, shipped

RUNS = Path("runs")
SHIPPED = "shipped:"  # before a name: the file that comes with the package, whatever runs there are
WEIGHTS = "weights.pkl"


def find_weights(name: Path | str) -> Path:
    """The weights file that is meant: a path, a run's folder, the newest run of that name in
    `runs/`, or the shipped one; `shipped:NAME` is always the shipped one.

    A note on stderr says which file a bare name stands for. Raises InputError.
    """
    path = Path(name)
    if str(name).startswith(SHIPPED):
        return _shipped(str(name).removeprefix(SHIPPED))
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if path.is_file():
        return path
    if path.name == str(name) and (newest := newest_run(path.name, WEIGHTS)):
        also = (shipped("weights") / f"{name}.pkl").is_file()
        other = f" ({SHIPPED}{name} is the one of the package)" if also else ""
        note(f"{name} is the run {newest / WEIGHTS}{other}")
        return newest / WEIGHTS
    if path.is_dir():
        raise InputError(f"{path}: the folder holds no {WEIGHTS}; is the run finished?")
    found = _shipped(name)
    note(f"{name} is the network of the package, {found}")
    return found


def find_described(name: Path | str) -> Path:
    """The weights file or config that is meant: a path, a run's folder, a shipped config, else what
    `find_weights` finds.

    Raises InputError.
    """
    path = Path(name)
    inside = [path / file for file in (WEIGHTS, "config.toml") if (path / file).is_file()]
    if inside:
        return inside[0]
    if path.suffix == ".pkl" or str(name).startswith(SHIPPED):
        return find_weights(name)
    try:
        return find_shipped(path, "configs", ".toml", "config")
    except InputError:
        with suppress(InputError):
            return find_weights(path)
        raise


def newest_run(name: str = "", file: str = "config.toml") -> Path | None:
    """The first of `runs_called`, if there is one."""
    return next(iter(runs_called(name, file)), None)


def runs_called(name: str, file: str) -> list[Path]:
    """The folders under `runs/` called `NAME`, `NAME-2` and so on (all where `name` is empty) that
    have `file`, the one with the newest first."""
    paths = sorted(RUNS.glob(f"*/{file}"), key=lambda path: -path.stat().st_mtime_ns)
    folders = [RUNS / path.relative_to(RUNS).parts[0] for path in paths]
    return [
        folder
        for folder in dict.fromkeys(folders)
        if not name or folder.name == name or _is_numbered(folder.name, name)
    ]


def _is_numbered(folder: str, name: str) -> bool:
    head, _, tail = folder.rpartition("-")
    return head == name and tail.isdigit()


def _shipped(name: Path | str) -> Path:
    path = shipped("weights") / f"{name}.pkl"
    if Path(name).name == str(name) and path.is_file():
        return path
    names = {file.stem for file in shipped("weights").glob("*.pkl")}
    names |= {folder.name for folder in runs_called("", WEIGHTS)}
    raise InputError(
        f"no weights file {str(name)!r}: neither a file, nor a run, nor shipped;"
        f" {hint(Path(name).stem, names)}"
    )
