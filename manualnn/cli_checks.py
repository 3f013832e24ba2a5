"""The commands that check rather than train: parse, call, print. `cli` adds them to its own.

Exit codes are those of `cli`: 1 where a check found something, 2 where it could not be made.
"""

import typer

app = typer.Typer()
