"""MNIST beside the scripts of a hand-in, whose data lie in the script's folder."""

import sys
from pathlib import Path

from ..files import PACKAGE
from .sources import IDX_NAME, files_in

RAW = Path("MNIST", "raw")
PLACES = (Path(), RAW, Path("data") / RAW)  # beside a script; then what the package holds


def find_mnist(here: Path, parts: tuple[str, ...] = ("train", "test")) -> Path:
    """The first of PLACES in the scripts' folder `here` that holds the idx files of `parts`, plain
    or .gz, else the folder of those packed with the scripts. Says on stderr which it is, and which
    place holds only some of them."""
    needed = [(part, kind) for part in parts for kind in ("images", "labels")]
    chosen = PACKAGE / "data" / "mnist"
    for folder in (here / place for place in PLACES):
        if not folder.is_dir():
            continue
        found = files_in(folder, "mnist", needed, needed)
        if not isinstance(found, str):
            chosen = folder
            break
        if any(IDX_NAME.fullmatch(path.name) for path in folder.iterdir()):
            print(f"note: {found}; looking elsewhere", file=sys.stderr)
    print(f"data: {chosen}", file=sys.stderr)
    return chosen
