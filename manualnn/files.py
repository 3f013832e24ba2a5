"""Where shipped files lie; and writing under a temporary name, then moving into place."""

import csv
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it is flushed and takes `path`'s place.

    An error or an interrupt leaves the old file as it was and no temporary file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table to `path` atomically; None is an empty field."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def cache_folder() -> Path:
    """The per-user cache: `$MANUALNN_CACHE`, else `$XDG_CACHE_HOME/manualnn`, else `~/.cache`."""
    if own := os.environ.get("MANUALNN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manualnn"


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
