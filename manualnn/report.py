"""Runs as a PDF of at most two pages, the derivation of the gradient included; on request it has a
page of its own.

Everything is drawn with matplotlib, from run folders; the confusion matrix is measured anew.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import derivation as deriving
from . import markdown, plots
from . import report_parts as parts
from .classes import class_grid, names_of, sweep_of, training_images
from .data import Examples
from .errors import InputError, printable
from .evaluation import Evaluated, evaluate_weights
from .network import load_weights
from .pages import (
    BOTTOM,
    MARGIN,
    TOP,
    WIDTH,
    Block,
    heading,
    heading_block,
    height_of,
    new_page,
    panel,
    save_pages,
    stack,
)
from .places import check_there
from .results import Trained, best_of, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8}
LEAST = 2.9  # inches of a page that have room for a large confusion matrix
PANELS = (2.4, 2.0)  # heights of smaller ones, beside the curves


@dataclass(frozen=True)
class Layout:
    """How much a page shows: letters of `size` points, rows of the grid of classes, and whether the
    derivation stands on the first of two pages."""

    size: float = 9
    rows: int = 2
    first: bool = False


# As room gets scarce.
LAYOUTS = (
    *(Layout(), Layout(8), Layout(9, 1, True), Layout(8, 1, True)),
    *(Layout(8, 0), Layout(8, 0, True)),
)


@dataclass(frozen=True)
class Options:
    """What a report has besides its runs: see `report`."""

    author: str = ""
    notes: Path | None = None
    derivation: bool = False
    preface: str = ""
    title: str = ""
    class_names: tuple[str, ...] = ()
    derivation_page: bool = False
    data_dir: Path | str | None = None


def report(
    folders: Sequence[Path | str],
    out: Path | str | None = None,
    author: str = "",
    notes: Path | str | None = None,
    derivation: bool = False,
    preface: str = "",
    title: str = "",
    class_names: Sequence[str] = (),
    derivation_page: bool = False,
    data_dir: Path | str | None = None,
) -> Path:
    """Write `report.pdf`, into the first run's folder unless `out` says where: a page for each of
    one or two finished runs, a run of random labels among them or not.

    `title` is a heading in place of the run's name, `author` a line beside it, `notes` a text in
    Markdown for the last page's end, after `preface`, another. `derivation` is the gradient of
    softmax and cross-entropy on these pages, `derivation_page` the same on a page more.
    `class_names` name the classes of data that have no names. `data_dir` is the folder of the runs'
    data, where they are no longer where they were. Raises InputError.
    """
    runs = [Path(folder) for folder in folders]
    path = Path(out) if out is not None else runs[0] / "report.pdf"
    text, names = Path(notes) if notes is not None else None, tuple(class_names)
    options = Options(author, text, derivation, preface, title, names, derivation_page, data_dir)
    write(runs, path, options)
    return path


def write(folders: Sequence[Path], path: Path, options: Options) -> int:
    """Write a report to `path`; the number of its pages."""
    import matplotlib

    if not 1 <= len(folders) <= 2:
        raise InputError(f"a report has one or two runs on two pages, not {len(folders)}")
    with matplotlib.rc_context(STYLE):
        pages = draw(folders, options)
        pages += [deriving.page()] if options.derivation_page else []
    title = options.title or printable(folders[0].resolve().name)
    save_pages(pages, path, title, options.author)
    return len(pages)


def draw(folders: Sequence[Path], options: Options) -> "list[Figure]":
    """A page for each run; the text where there is room, else on a page of its own. Where all does
    not fit it is drawn smaller. The derivation that has a page more is not among them."""
    notes = options.notes
    runs = [_Run(folder, options.class_names, options.data_dir) for folder in folders]
    text = options.preface + (_read(notes) if notes else "")
    short = options.derivation and not options.derivation_page
    for layout in LAYOUTS:
        blocks = markdown.blocks(text, layout.size) if text else []
        derived = deriving.short(layout.size) if short else []
        try:
            return _compose(runs, options.author, options.title, layout, derived, blocks)
        except _FullError as full:
            room = full
    lines = int(height_of(blocks) / (markdown.LINE * 8 / 72))
    if room.page == 0:
        raise InputError(f"{folders[0]}: {-room.left:.1f} inches of its page do not fit")
    if room.page == 1:
        raise InputError(f"{notes or 'the text'}: longer than a page; a report has two")
    free = int(max(room.left + height_of(blocks), 0) / (markdown.LINE * 8 / 72))
    raise InputError(
        f"{notes or 'the text'}: about {lines} lines of text do not fit: the second page has room"
        f" for {free}"
    )


class _FullError(Exception):
    """A page (its number) on which inches are `left`, fewer than none."""

    def __init__(self, page: int, left: float) -> None:
        self.page, self.left = page, left


def _compose(
    runs: "Sequence[_Run]",
    author: str,
    title: str,
    layout: Layout,
    derived: list[Block],
    text: list[Block],
) -> "list[Figure]":
    """The pages in one layout; the classes of the same data are shown once. Raises _FullError."""
    pages: list[Figure] = []
    on_first = derived if layout.first and len(runs) == 2 else []
    on_last = derived if not on_first else []
    on_last = [*on_last, *([_gap(0.08), *text] if text else [])]
    for number, run in enumerate(runs):
        after = [*run.findings(layout.size), *(on_first if number == 0 else [])]
        after += on_last if number == 1 else []
        name = title or run.name
        of = f": {run.name}" if title and number else ""
        rows = layout.rows if number == 0 or not run.is_like(runs[0]) else 0
        page, end = run.page(f"{name}{of}", author if not pages else "", after, rows)
        if end > BOTTOM:
            raise _FullError(2 if number else 0, BOTTOM - end)
        pages.append(page)
    if len(runs) == 1 and on_last:
        if end + height_of(on_last) > BOTTOM:
            page, end = new_page(f"{title or runs[0].name}: notes"), TOP + 0.1
            pages.append(page)
        if (left := BOTTOM - end - height_of(on_last)) < 0:
            raise _FullError(1, left)
        stack(page, end, on_last)
    return pages


def class_names_of(folder: Path, options: Options) -> list[str]:
    """The names of a run's classes in its report."""
    return _Run(folder, options.class_names, options.data_dir).names


def _gap(height: float) -> Block:
    return Block(height, lambda page, left, top: None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


class _Run:
    """A finished run and what its page shows."""

    def __init__(
        self, folder: Path, class_names: tuple[str, ...], data_dir: Path | str | None
    ) -> None:
        self.folder, self.given, self.data_dir = folder, class_names, data_dir
        self.name = printable(folder.resolve().name)
        self.is_memorised = (folder / "random-labels.json").is_file()

    @cached_property
    def networks(self) -> list[Trained]:
        return read_run(self.folder, self.data_dir)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text("utf-8"))
        return found

    @cached_property
    def best(self) -> Trained:
        return best_of(self.folder, self.networks)

    @cached_property
    def examples(self) -> Examples | None:
        """Training images of the CSV exercise, whose report shows them."""
        if self.is_memorised or self.best.config.data.name != "csv":
            return None
        if self.data_dir is None:
            check_there(self.best.config.data, self.folder)
        return training_images(self.best)

    def is_like(self, other: "_Run") -> bool:
        """Whether two networks were trained on the same data."""
        if self.is_memorised or other.is_memorised:
            return False
        mine, its = self.best.config.data, other.best.config.data
        return (mine.name, mine.place, mine.source) == (its.name, its.place, its.source)

    @cached_property
    def part(self) -> str:
        return (parts.measured(self.networks) or ["train"])[-1]

    @cached_property
    def evaluated(self) -> Evaluated:
        return evaluate_weights(self.folder, data_dir=self.data_dir, split=self.part)

    @cached_property
    def names(self) -> list[str]:
        """The names of the classes. Raises InputError where as many were not given."""
        own = self.evaluated.class_names
        if self.given and len(self.given) != len(own):
            raise InputError(f"--class-names: {len(self.given)} names for {len(own)} classes")
        return list(self.given) or names_of(self.best, self.examples) or own

    def findings(self, size: float) -> list[Block]:
        """What the sweep found that the settings come from, in the CSV exercise."""
        if self.is_memorised or self.best.config.data.name != "csv":
            return []
        if not (found := sweep_of(self.folder, self.best)):
            return []
        where, text = found
        lines = markdown.plain(text, size - 1)
        return [heading_block(f"Findings of the sweep {where.name}"), *lines, _gap(0.1)]

    def page(
        self, title: str, author: str, after: list[Block], rows: int
    ) -> "tuple[Figure, float]":
        """The run's page with `after` at its end, and where it ends, which may be below it."""
        if self.is_memorised:
            for tall in (2.5, 2.1, 1.7):
                page = new_page(title, author)
                end = parts.memorised(page, self.folder, tall)
                if end + height_of(after) <= BOTTOM:
                    break
            return page, stack(page, end, after)
        for height in (None, *PANELS):
            page = new_page(title, author)
            top = TOP
            if self.examples is not None and rows:
                top = stack(page, top, [class_grid(self.examples, self.names, rows)])
            end = self._trained(page, top, height, BOTTOM - height_of(after))
            if end + height_of(after) <= BOTTOM:
                break
        return page, stack(page, end, after)

    def _trained(self, page: "Figure", top: float, height: float | None, bottom: float) -> float:
        """Architecture, settings, results, curves, confusion matrix and mistakes; where it ends.

        With `height` that of a row of curves and confusion matrix, below settings in few lines;
        without, a large confusion matrix and mistakes stand below, if they end at `bottom`.
        """
        networks, best = self.networks, self.best
        groups = parts.ranked(networks)
        of = f" of {best.replica.label}" if len(groups) > 1 else ""
        heading(page, top, f"Architecture{of if len(of) < 70 else ' of the best network'}")
        top = parts.architecture(
            page, top + 0.27, load_weights(self.folder / "weights.pkl").network
        )
        heading(page, top, "Training")
        heading(page, top, "Results", MARGIN + 3.95)
        end = parts.results(page, MARGIN + 3.95, top + 0.28, networks, groups)
        settings = list(parts.settings(best, networks, self.metrics))
        if height is None:
            end = max(end, parts.pairs(page, MARGIN, top + 0.28, settings, 1.05, 46))
            top = self._curves(page, max(end + 0.3, 4.3), (0.45, 4.1), 2.95, 2.05) + 0.5
            if bottom - top < LEAST:
                return BOTTOM + 1  # no room
            parts.evaluation(page, top, self.evaluated, self.names, bottom - top)
            return bottom
        text = "; ".join(f"{key}: {value}" for key, value in settings)
        top = max(end, stack(page, top + 0.28, markdown.plain(text, 8, 3.75))) + 0.25
        self._curves(page, top, (0.4, 2.5), 1.55, height - 0.45, 6.5)
        axes = panel(page, WIDTH - MARGIN - height + 0.45, top, height - 0.45, height - 0.45)
        plots.draw_confusion(axes, self.evaluated.evaluation.confusion.numpy(), self.names, 5)
        accuracy = parts.share(self.evaluated.evaluation.accuracy, 2)
        axes.set_title(f"{plots.literal(self.evaluated.data)}: {accuracy}")
        parts.small(axes)
        return top + height + parts.turn_names(axes, self.names, 90)

    def _curves(
        self,
        page: "Figure",
        top: float,
        places: tuple[float, float],
        width: float,
        height: float,
        letters: float = 8,
    ) -> float:
        """Accuracy and loss against epochs; where their panels end."""
        groups = parts.ranked(self.networks)
        rows = [row for network in self.networks for row in network.rows]
        drawn = [
            (name, [n.rows for n in g])
            for name, (_, g) in zip(parts.short_names(groups), groups[: parts.SHOWN], strict=True)
        ]
        dropout = any(layer[0] == "dropout" for layer in self.best.config.model.layers)
        for measure, left in zip(("accuracy", "loss"), places, strict=True):
            axes = panel(page, MARGIN + left, top, width, height)
            if len(groups) == 1:
                label = "train (with dropout)" if dropout else "train"
                plots.draw_curves(axes, rows, measure, label)
            else:
                plots.draw_comparison(axes, drawn, measure, "epoch", self.part)
                axes.legend(frameon=False, fontsize=min(letters, 6.5))
            if letters < 8:
                parts.small(axes)
                if legend := axes.get_legend():
                    for text in legend.get_texts():
                        text.set_fontsize(letters)
        return top + height
