"""Pages of a PDF: text and panels at places in inches from the upper left corner.

What fills a page is a list of blocks, each of a known height, one below the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import package_version, replacing, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, MARGIN = 8.27, 11.69, 0.6  # A4, inches
INSIDE = WIDTH - 2 * MARGIN
TOP, BOTTOM = 1.0, HEIGHT - MARGIN  # where what is below the header begins and ends
GREY = "#555555"


@dataclass(frozen=True)
class Block:
    """A part of a page: `draw(page, left, top)` stays within `height` inches."""

    height: float
    draw: Callable[["Figure", float, float], None]


def height_of(blocks: Sequence[Block]) -> float:
    return sum(block.height for block in blocks)


def stack(page: "Figure", top: float, blocks: Sequence[Block]) -> float:
    """Draw blocks below each other; where they end."""
    for block in blocks:
        block.draw(page, MARGIN, top)
        top += block.height
    return top


def new_page(title: str, author: str = "") -> "Figure":
    """An empty page with its header."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(WIDTH, HEIGHT))
    room = INSIDE - 0.085 * len(author) - 0.2  # letters of 17 points are 0.165 inches wide, about
    size = max(8.0, min(17.0, 17 * room / (0.165 * max(len(title), 1))))
    draw_text(page, MARGIN, 0.5, title, fontsize=size, fontweight="bold")
    draw_text(page, WIDTH - MARGIN, 0.58, author, fontsize=10, ha="right")
    line = panel(page, MARGIN, 0.88, INSIDE, 0.01)
    line.axis("off")
    line.axhline(0, color="black", linewidth=1)
    return page


def panel(page: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at inches from the page's upper left corner."""
    bottom = HEIGHT - top - height
    return page.add_axes((left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT))


def draw_text(page: "Figure", left: float, top: float, text: str, **style: Any) -> None:
    """Text with its upper edge at inches from the page's upper left corner."""
    look: dict[str, Any] = {"va": "top", "fontsize": 9, "parse_math": False} | style
    page.text(left / WIDTH, 1 - top / HEIGHT, text, **look)


def heading(page: "Figure", top: float, text: str, left: float = MARGIN) -> None:
    draw_text(page, left, top, text, fontsize=11, fontweight="bold")


def heading_block(text: str) -> Block:
    return Block(0.28, lambda page, left, top: heading(page, top + 0.02, text, left))


def save_pages(pages: "Sequence[Figure]", path: Path, title: str, author: str) -> None:
    """Write pages as a PDF with numbers in their footers. Raises InputError."""
    from matplotlib.backends.backend_pdf import PdfPages

    for number, page in enumerate(pages, 1):
        footer = f"manualnn {package_version()}: gradients derived by hand, no autograd"
        draw_text(page, MARGIN, HEIGHT - 0.4, footer, fontsize=7, color=GREY)
        right = f"{number} / {len(pages)}"
        draw_text(page, WIDTH - MARGIN, HEIGHT - 0.4, right, fontsize=7, color=GREY, ha="right")
    information = {"Title": title, "Creator": "manualnn"} | ({"Author": author} if author else {})
    with (
        writing(f"--out {path}"),
        replacing(path) as temporary,
        PdfPages(temporary, metadata=information) as pdf,
    ):
        for page in pages:
            pdf.savefig(page)
