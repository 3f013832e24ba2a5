"""Where the data of a finished run are: its config may name a place relative to the folder in which
the run was started."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .config import Config, Data, load_config
from .errors import InputError
from .files import user_path

PATHS = ("dir", "train", "test")


def run_config(folder: Path, data_dir: Path | str | None = None) -> Config:
    """The config of a run's folder, with the places of its data as they are found from here.

    A relative place is looked for in the folder in which the run was started (here, while it is not
    finished), then beside the run's folder and above it, so that it moves with the run, then here.
    With `data_dir` the data are there.
    Raises InputError.
    """
    config = load_config(folder / "config.toml")
    bases = [_started_in(folder), *folder.resolve().parents[:3], Path.cwd()]

    def found(data: Data) -> Data:
        if data_dir is not None:
            return replace(data, dir=str(data_dir), train=None, test=None)
        folder, train, test = (_found(getattr(data, key), bases) for key in PATHS)
        return replace(data, dir=folder, train=train, test=test)

    runs = tuple(replace(run, data=found(run.data)) for run in config.runs)
    return replace(config, data=found(config.data), runs=runs)


def check_there(data: Data, run: Path, keys: tuple[str, ...] = PATHS) -> None:
    """Raise InputError where the data of a run, or those `keys` of them, are not where its config
    says."""
    for key in keys:
        place = getattr(data, key)
        if place is not None and not user_path(place).exists():
            raise InputError(f"{run}: its data are not at {place}: give --data-dir FOLDER")


def _found(place: str | None, bases: list[Path]) -> str | None:
    """The place as the first of the folders has it; unchanged where none does."""
    if place is None or user_path(place).is_absolute():
        return place
    found = (base / place for base in bases if (base / place).exists())
    # A run may be called as its data are: `csv` beside `runs/csv`.
    there = next((path for path in found if not (path / "config.toml").exists()), None)
    if there is None or (Path(place).exists() and there.samefile(place)):
        return place
    return str(there)


def _started_in(folder: Path) -> Path:
    """Where a finished run was started; here for one that is not finished."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Path(json.loads((folder / "metrics.json").read_text("utf-8"))["started_in"])
    return Path.cwd()
