"""The one exception that stands for bad input, and the hint that names the nearest valid name."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where (file, key), what to do. The command line prints
    it and exits with code 2; in Python it is an ordinary `ValueError`.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def hint(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the valid names where none is near."""
    names = sorted(valid)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names)}"
