"""The commands that check rather than train: parse, call, print. `cli` adds them to its own.

Exit codes are those of `cli`: 1 where a check found something, 2 where it could not be made.
"""

from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Weights, a checkpoint or any pickle; a run folder; or a name."
        ),
    ],
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as an object.")] = False,
) -> None:
    """Say what a file of weights holds, without executing any of it.

    Exit code 1 where it is not read here, as when it would execute code.
    """
    from . import inspection
    from .experiment import to_json

    report = inspection.inspect(file)
    print(to_json(report) if json_ else "\n".join([*inspection.lines(report), ""]), end="")
    if report["problem"]:
        raise typer.Exit(1)
