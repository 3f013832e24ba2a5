r"""Markdown as blocks of a page: headings, lists, code, tables, and formulas between dollar signs.

A dollar sign begins a formula as in Pandoc: `$x_1$` is one, "5 $ or 10 $" has none. Widths are
those of the letters, so that lines are as long as the page allows.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .pages import INSIDE, Block, draw_text, height_of, panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMULA = re.compile(r"(`[^`]+`|\\\$)|\$\$(.+?)\$\$|\$(?=\S)([^$]*?[^\s$\\])\$(?!\d)")
ITEM = re.compile(r"(\s*)([-*+]|\d+[.)])\s+(.*)")
RULE = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?")  # below the head of a table
LINE = 1.32  # from a line to the next, in sizes of its letters


@dataclass(frozen=True)
class Word:
    """What is not broken: a word as written, or a formula in matplotlib's notation."""

    text: str
    is_formula: bool = False


def blocks(text: str, size: float = 9, width: float = INSIDE) -> list[Block]:
    """The blocks of a text in Markdown, with letters of `size` points, `width` inches wide."""
    found: list[Block] = []
    lines, place = text.splitlines(), 0

    def take(belongs: Callable[[str], object]) -> list[str]:
        """The next lines that belong together."""
        nonlocal place
        first = place
        while place < len(lines) and belongs(lines[place].strip()):
            place += 1
        return lines[first:place]

    while place < len(lines):
        line = lines[place]
        bare = line.strip()
        if not bare:
            place += 1
            found.append(Block(0.01 * size, lambda page, left, top: None))
        elif bare.startswith("```"):
            place += 1
            code = take(lambda line: not line.startswith("```"))
            place += 1
            found += [
                _line([Word(row.expandtabs(4))], size - 0.5, family="monospace") for row in code
            ]
        elif bare.startswith("#"):
            place += 1
            title = _line(_words(bare.lstrip("# ")), 11, fontweight="bold")
            found.append(Block(max(0.26, title.height), title.draw))
        elif bare.startswith("|"):
            found += _table(take(lambda line: line.startswith("|")), size, width)
        elif bare.startswith("$$"):
            place += 1
            more: list[str] = []
            if not bare[2:].endswith("$$"):
                more = [*take(lambda line: not line.endswith("$$")), *lines[place : place + 1]]
                place += 1
            formula = " ".join([bare, *(line.strip() for line in more)])
            found.append(_line(_words(formula), size + 0.5, left=0.15))
        elif item := ITEM.fullmatch(line):
            place += 1
            rest = take(_continues)
            mark = "\u2022" if item[2] in "-*+" else item[2]
            indent = 0.15 * min(len(item[1].expandtabs(4)) // 2, 4)
            found += _paragraph(" ".join([item[3], *rest]), size, width, mark, indent)
        else:
            place += 1
            found += _paragraph(" ".join([bare, *take(_continues)]), size, width)
    return found


def plain(text: str, size: float = 9, width: float = INSIDE) -> list[Block]:
    """The lines of a paragraph that is no Markdown."""
    words = [Word(word) for word in text.split()]
    return [_line(line, size) for line in _wrap(words, size, width, "normal")]


def _continues(line: str) -> bool:
    """Whether a line goes on with the paragraph before it."""
    return bool(line) and not (line.startswith(("#", "|", "```", "$$")) or ITEM.fullmatch(line))


def _plain(text: str) -> str:
    """Without marks of emphasis."""
    return re.sub(r"\*\*|__|`|(?<!\w)\*(?=\S)|(?<=\S)\*(?!\w)", "", text)


def _words(text: str) -> list[Word]:
    """The words and formulas of a text; what hangs together without a space is one."""
    pieces: list[Word] = []
    glued = False  # to the piece before

    def add(word: str, is_formula: bool) -> None:
        if not glued or not pieces:
            pieces.append(Word(word, is_formula))
            return
        before = pieces.pop()
        mixed = before.is_formula or is_formula
        first = before.text if before.is_formula or not mixed else before.text.replace("$", r"\$")
        second = word if is_formula or not mixed else word.replace("$", r"\$")
        pieces.append(Word(first + second, mixed))

    place = 0
    for match in [*FORMULA.finditer(text), None]:
        before = text[place : match.start() if match else len(text)]
        for number, word in enumerate(_plain(before).split()):
            glued = glued and number == 0 and not before[:1].isspace()
            add(word, False)
        if match is None:
            break
        glued = not before[-1].isspace() if before else glued
        formula = f"${(match[2] or match[3] or '').strip()}$"
        is_formula = match[1] is None and _is_readable(formula)
        written = formula if is_formula else (match[1] or match[0]).strip("`").replace(r"\$", "$")
        for number, word in enumerate([written] if is_formula else written.split()):
            glued = glued and number == 0
            add(word, is_formula)
        place, glued = match.end(), True
    return [  # a backslash before a formula leaves none
        Word(w.text.replace(r"\$", "$")) if w.is_formula and not _is_readable(w.text) else w
        for w in pieces
    ]


def _is_readable(formula: str) -> bool:
    try:
        _measure(formula, True, 9.0)
    except ValueError:
        return False
    return True


@cache
def _measure(
    text: str, is_formula: bool, size: float, weight: str = "normal"
) -> tuple[float, float]:
    """Width and height in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    width, height, _ = text_to_path.get_text_width_height_descent(text, font, is_formula)
    return width / 72, height / 72


def _wrap(words: Sequence[Word], size: float, width: float, weight: str) -> Iterator[list[Word]]:
    """Words in lines of at most `width` inches."""
    space = 0.318 * size / 72  # of DejaVu Sans
    line: list[Word] = []
    used = 0.0
    for word in words:
        wide, _ = _measure(word.text, word.is_formula, size, weight)
        if line and used + space + wide > width:
            yield line
            line, used = [], 0.0
        used += wide + (space if line else 0)
        line.append(word)
    yield line


def _line(words: Sequence[Word], size: float, left: float = 0.0, **style: str) -> Block:
    """A line as a block, higher than others where a formula is."""
    math = any(word.is_formula for word in words)
    shown = [w.text if w.is_formula or not math else w.text.replace("$", r"\$") for w in words]
    line = " ".join(shown)
    if math and not _is_readable(line):  # a backslash before a formula
        math, line = False, line.replace(r"\$", "$")
    heights = [_measure(w.text, True, size)[1] for w in words if math and w.is_formula]
    tall = max([LINE * size / 72, *(height + 0.07 for height in heights)])
    return Block(
        tall,
        lambda page, x, y: draw_text(
            page, x + left, y, line, fontsize=size, parse_math=math, **style
        ),
    )


def _paragraph(
    text: str, size: float, width: float, mark: str = "", indent: float = 0.0
) -> Iterator[Block]:
    """The lines of a paragraph, after a mark where it is an item of a list."""
    hang = indent + ((0.05 * size / 9 + 0.075 * len(mark)) + 0.04 if mark else 0.0)
    for number, words in enumerate(_wrap(_words(text), size, width - hang, "normal")):
        line = _line(words, size, hang)
        if mark and number == 0:
            yield _marked(line, mark, size, indent)
        else:
            yield line


def _marked(line: Block, mark: str, size: float, indent: float) -> Block:
    def draw(page: "Figure", left: float, top: float) -> None:
        middle = (line.height - LINE * size / 72) / 2
        draw_text(page, left + indent, top + middle, mark, fontsize=size)
        line.draw(page, left, top)

    return Block(line.height, draw)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def _table(rows: Sequence[str], size: float, width: float) -> Iterator[Block]:
    """A table: its head in bold above a line, columns as wide as they need and have room."""
    has_head = len(rows) > 1 and bool(RULE.fullmatch(rows[1]))
    texts = [_cells(row) for i, row in enumerate(rows) if not (has_head and i == 1)]
    count = max(map(len, texts))
    words = [[_words(cell) for cell in [*row, *[""] * (count - len(row))]] for row in texts]
    weights = ["bold" if has_head and i == 0 else "normal" for i in range(len(words))]
    gap, small = 0.14, size - 0.5
    natural = [
        max(
            sum(_measure(w.text, w.is_formula, small, weight)[0] + 0.05 for w in row[j])
            for row, weight in zip(words, weights, strict=True)
        )
        for j in range(count)
    ]
    room = width - gap * (count - 1)
    widths = _shares(natural, room)
    places = [sum(widths[:j]) + gap * j for j in range(count)]
    for i, (row, weight) in enumerate(zip(words, weights, strict=True)):
        lines = [
            [_line(part, small, fontweight=weight) for part in _wrap(cell, small, wide, weight)]
            for cell, wide in zip(row, widths, strict=True)
        ]
        yield _row(lines, places, sum(widths) + gap * (count - 1), has_head and i == 0)
    yield Block(0.06, lambda page, left, top: None)


def _shares(natural: Sequence[float], room: float) -> list[float]:
    """Widths of columns that need `natural` ones: where they have no room, the wide ones shrink."""
    widths = list(natural)
    if sum(widths) <= room:
        return widths
    narrow: set[int] = set()
    while True:
        left = room - sum(natural[j] for j in narrow)
        share = left / max(len(widths) - len(narrow), 1)
        more = {j for j, wide in enumerate(natural) if j not in narrow and wide <= share}
        if not more:
            return [natural[j] if j in narrow else share for j in range(len(widths))]
        narrow |= more


def _row(
    lines: Sequence[Sequence[Block]], places: Sequence[float], width: float, is_head: bool
) -> Block:
    """A row of a table, whose cells have one or several lines."""
    height = max(height_of(cell) for cell in lines) + 0.02

    def draw(page: "Figure", left: float, top: float) -> None:
        for cell, place in zip(lines, places, strict=True):
            below = top
            for line in cell:
                line.draw(page, left + place, below)
                below += line.height
        if is_head:
            axes = panel(page, left, top + height, width, 0.01)
            axes.axis("off")
            axes.axhline(0, color="black", linewidth=0.6)

    return Block(height + (0.04 if is_head else 0.0), draw)
