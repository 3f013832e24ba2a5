"""The one exception that stands for bad input, the hint that names the nearest valid name, and
notes on what was made of an input.
"""

import sys
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where (file, key), what to do. The command line prints
    it and exits with code 2; in Python it is an ordinary `ValueError`. What it quotes may be of any
    length and hold anything, also what a terminal would obey: it is cut and escaped. `everywhere`
    marks one that all of several processes raise.
    """

    everywhere = False

    def __str__(self) -> str:
        line = printable(" ".join(super().__str__().split()))
        return line if len(line) <= LONGEST else f"{line[: LONGEST - 200]} ... {line[-190:]}"


def printable(text: str) -> str:
    """`text` with what is no printable character escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def note(text: str) -> None:
    """Say on stderr what was read or done otherwise than a reader may expect."""
    print(f"note: {text}", file=sys.stderr)


def hint(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the valid names where none is near."""
    names = sorted(valid)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names)}"
