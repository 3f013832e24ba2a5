"""Where shipped files lie; and writing under a temporary name, then moving into place."""

import csv
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import InputError, hint

PACKAGE = Path(__file__).parent


def shipped(kind: str) -> Path:
    """The folder of shipped `configs` or `weights`: in a wheel's package, beside it in a clone."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def find_shipped(name: str | Path, kind: str, suffix: str, what: str) -> Path:
    """The path a user named: a file, or a shipped one by its bare name.

    Raises InputError when there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = shipped(kind)
    if (folder / f"{name}{suffix}").is_file() and path.name == str(name):
        return folder / f"{name}{suffix}"
    names = [file.stem for file in folder.glob(f"*{suffix}")]
    raise InputError(
        f"no {what} {str(name)!r}: neither a file nor shipped; {hint(path.stem, names)}"
    )


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Make what goes wrong with a file into an InputError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: cannot be written: {error.strerror or error}") from None


LOCK = ".lock"
TEMPORARY = ".writing-"  # a name that begins so is of a file that is not whole


@contextmanager
def replacing(path: Path, previous: Path | None = None, flushed: bool = True) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it is flushed and takes `path`'s place,
    the file of before that of `previous`. What can be made again need not be `flushed`.

    An error or an interrupt leaves the old file as it was and no temporary file behind; a process
    that is killed leaves one, for `remove_temporary`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.stem.encode(errors="ignore")[:100].decode(errors="ignore")  # a name has 255 bytes
    prefix, suffix = f"{TEMPORARY}{short}-", path.suffix
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if flushed:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if flushed:
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flush the names in a folder, so that a file that was replaced is so after a power failure."""
    with suppress(OSError):  # where folders cannot be opened, or not be flushed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process was writing to a folder, which no other process writes to."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            path.unlink()


def lock(folder: Path) -> FileLock:
    """Make a folder this process's own, as long as it lives and keeps the lock.

    Raises InputError where another process has it, OSError where it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise InputError(
            f"{folder}: another run trains there; wait until it ends, or give another --out"
        ) from None
    except NotImplementedError:
        print(f"note: {folder}: its file system has no locks", file=sys.stderr)
    return held


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8. Raises InputError where a name in it is none."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        line = text[: error.start].rpartition("\n")[2] + text[error.start :].partition("\n")[0]
        raise InputError(f"{path}: {line.strip()!a} is not UTF-8; rename the file") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_csv(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], flushed: bool = True
) -> None:
    """Write a table to `path` atomically; None is an empty field."""
    with (
        replacing(path, flushed=flushed) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def cache_folder() -> Path:
    """The per-user cache: `$MANUALNN_CACHE`, else `$XDG_CACHE_HOME/manualnn`, else `~/.cache`; of a
    user without a home a folder that ends with the process."""
    if own := os.environ.get("MANUALNN_CACHE"):
        return user_path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "manualnn"
    try:
        return Path.home() / ".cache" / "manualnn"
    except RuntimeError:
        return Path(_homeless_cache().name)


@cache
def _homeless_cache() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="manualnn-", ignore_cleanup_errors=True)


def user_path(path: Path | str) -> Path:
    """A path whose ~ is the home of a user. Raises InputError where that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: the home that ~ stands for is unknown") from None


def package_version() -> str:
    """The installed version, or "unknown" in a tree that is not installed."""
    try:
        return version("manualnn")
    except PackageNotFoundError:
        return "unknown"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
