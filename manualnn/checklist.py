"""The list of what an assignment asks for, with a tick for each item that a hand-in has."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .classes import sweep_of
from .results import best_of, read_run

ACCURACY = 0.75  # of the test set, at least
MEMORISED = 0.01  # the training loss on random labels, below
PAGES = 2


@dataclass(frozen=True)
class Check:
    """One item: what is asked for, whether it is there, and what was found or is to be done."""

    what: str
    passed: bool
    found: str


def line(check: Check) -> str:
    """An item for a reader; letters where the terminal has no ticks."""
    tick = "\u2713" if check.passed else "\u2717"
    try:
        tick.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        tick = "ok" if check.passed else "NO"
    return f"{tick} {check.what}: {check.found}"


def check_mnist(folders: Sequence[Path]) -> Iterator[Check]:
    """The figures of a trained network and of a memorisation of random labels."""
    accuracy = best_of(folders[0], read_run(folders[0])).figures["test_accuracy"]
    yield Check(
        f"test accuracy at least {100 * ACCURACY:.0f} %",
        accuracy is not None and accuracy >= ACCURACY,
        "not measured" if accuracy is None else f"{100 * accuracy:.2f} %",
    )
    loss = json.loads((folders[1] / "random-labels.json").read_text("utf-8"))["train_loss"]
    yield Check(
        f"training loss on random labels below {MEMORISED:g}",
        loss is not None and loss < MEMORISED,
        "not finite" if loss is None else f"{loss:.3g}",
    )


def check_sweeps(folders: Sequence[Path]) -> Iterator[Check]:
    """The findings of the sweep of each of two networks."""
    for folder in folders:
        trained = best_of(folder, read_run(folder))
        found = sweep_of(folder, trained)
        name = trained.figures["run"]
        todo = f"none of {name} on these data; manualnn sweep CONFIG --data FOLDER"
        yield Check(
            f"findings of a sweep for {folder}", bool(found), str(found[0]) if found else todo
        )


def check_report(
    author: str, notes: Path | None, pages: int, has_page: bool, names: Sequence[str]
) -> Iterator[Check]:
    """The report: its author, its summary (the notes), its pages without that of the derivation
    (`has_page`), the `names` of classes."""
    yield Check("author", bool(author.strip()), author.strip() or "none; give --author NAMES")
    has_text = notes is not None and bool(notes.read_text(encoding="utf-8").strip())
    missing = f"{notes} is empty" if notes else "none; give --notes FILE.md"
    yield Check(
        "summary of attempts and conclusions", has_text, str(notes) if has_text else missing
    )
    own = pages - has_page
    more = ", and one with the derivation" if has_page else ", the derivation included"
    yield Check(f"at most {PAGES} pages", own <= PAGES, f"{own}{more}")
    if names:
        numbers = all(name.isdigit() for name in names)
        found = "numbers; give --class-names A,B,..." if numbers else ", ".join(names)
        yield Check("names of the classes", not numbers, found)


def check_names(names: Sequence[str], packed: Sequence[str], path: Path, archive: str) -> Check:
    """The files that are asked for by name, and the name of the archive."""
    missing = [name for name in names if name not in packed]
    wrong = f"the archive is called {path.name}, not {archive}" if path.name != archive else ""
    found = "; ".join(filter(None, (f"no {', '.join(missing)}" if missing else "", wrong)))
    return Check("file names", not found, found or ", ".join([archive, *names]))
