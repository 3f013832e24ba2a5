"""The commands that check rather than train: parse, call, print. `cli` adds them to its own.

Exit codes are those of `cli`: 1 where a check found something, 2 where it could not be made.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError

app = typer.Typer()


@app.command()
def gradcheck(
    what: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|WEIGHTS|FILE.py:FUNCTION",
            help="A TOML file, a weights file, a run folder or a shipped name; or your own function"
            " gradient(X, y, W) or loss_and_gradients(params, x, y).",
        ),
    ] = "mnist-mlp",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of CONFIG."),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Coordinates of each tensor, chosen by the seed; 0: all.")
    ] = 50,
    batch: Annotated[int, typer.Option(help="Random examples in the batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of examples, weights and coordinates.")] = 0,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with the data, where CONFIG needs it for a shape.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print every figure.")] = False,
) -> None:
    """Compare gradients derived by hand with central differences, in float64.

    Of a network: each layer, loss and penalty alone, then the whole. Exit code 1 where one is
    wrong, 2 where one could not be judged.
    """
    for name, value, least in (("samples", samples, 0), ("batch", batch, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")

    from . import gradcheck as checking
    from . import own_gradient
    from .differences import lines, to_dict
    from .experiment import to_json
    from .own_function import is_function

    if is_function(what):
        if set_ or data_dir:
            raise InputError(f"--set and --data-dir go with a config, but {what} names a function")
        reports = [own_gradient.check_function(what, samples, seed)]
    else:
        reports = [
            checking.check(case, samples, batch, seed)
            for case in checking.cases(what, set_, data_dir, seed)
        ]
    text = to_json(to_dict(reports)) if json_ else "\n".join([*lines(reports), ""])
    print(text, end="")
    if any(report.wrong for report in reports):
        raise typer.Exit(1)
    if not all(report.passed for report in reports):
        raise typer.Exit(2)


@app.command()
def reproduce(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    out: Annotated[
        Path | None, typer.Option(help="Keep what is trained; default a temporary folder.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Only the first epochs; their history is compared.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="The folder where the run's data are now.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the comparison.")] = False,
) -> None:
    """Train a finished run again, as it was trained, and say whether the figures agree.

    On the same device, processor, build and number of threads they are equal to the bit. Exit code
    1 where they are not, and no circumstance has changed, or an accuracy differs by over 0.5
    points.
    """
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs {epochs}: must be at least 1")

    from . import reproduce as reproducing
    from .experiment import to_json

    found = reproducing.reproduce(run, out, epochs, data_dir)
    if json_:
        result = asdict(found) | {"equal": found.equal, "agrees": found.agrees}
        print(to_json(result | {"folder": str(out) if out else None}), end="")
    else:
        print(f"{run}: {found.epochs} epoch{'s' * (found.epochs > 1)} trained again")
        names = ("history.csv", "metrics.json", "weights")
        for name, same in zip(names, (found.history, found.figures, found.weights), strict=True):
            if same is not None:
                print(f"{name:<13}{'equal to the bit' if same else 'not equal'}")
        accuracy, loss = found.accuracy_difference, found.loss_difference
        if accuracy == float("inf"):
            print("history.csv has other rows")
        elif accuracy or loss:
            print(f"accuracies differ by at most {100 * accuracy:.2f} points, losses by {loss:.2g}")
        for name, (before, now) in found.changed.items():
            what = "has changed" if name.endswith("sha256") else f"was {before}, is {now}"
            print(f"{name.removesuffix('_sha256')} {what}")
        if found.equal:
            verdict = "the figures agree to the bit"
        elif found.agrees:
            verdict = "the figures agree, though not to the bit"
        else:
            why = "something has changed" if found.changed else "nothing that is recorded changed"
            verdict = f"the figures do not agree; {why}"
        print(verdict)
    raise typer.Exit(0 if found.agrees else 1)


Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Permit a name, as softmax; may be given again."),
]
Memory = Annotated[int, typer.Option(metavar="MB", min=256, help="The most data of a script.")]


@app.command()
def audit(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG|FILE.py", help="A config, or a script of your own.")
    ] = "mnist-mlp",
    call: Annotated[
        str | None,
        typer.Option(metavar="FUNCTION", help="Import FILE.py and call this in place of running."),
    ] = None,
    allow: Allow = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=1, help="Seconds a script may take.")
    ] = 60,
    memory: Memory = 4096,
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as an object.")] = False,
) -> None:
    """Look for autograd, torch.nn, torch.optim and built-in layers, in the source and as it runs.

    CONFIG: some training steps of this package. FILE.py runs in a process of its own with limits,
    which is not a sandbox for hostile code. Exit code 0: no forbidden call observed; 1: something
    was; 2: it could not be judged.
    """
    from . import audit as auditing
    from .experiment import to_json

    if target.endswith(".py"):
        report = auditing.audit_file(Path(target), call, timeout, memory, allow or ())
    elif call or allow:
        raise InputError("--call and --allow are for a script, FILE.py")
    else:
        from .config import load_config

        report = auditing.audit_config(load_config(target))
    print(to_json(report.to_dict()) if json_ else "\n".join(auditing.lines(report)) + "\n", end="")
    if report.code:
        raise typer.Exit(report.code)


@app.command()
def grade(
    submissions: Annotated[
        list[Path], typer.Argument(metavar="ZIP|DIR...", help="Zips, folders, or folders of zips.")
    ],
    out: Annotated[Path, typer.Option(help="The table to write.")] = Path("grades.csv"),
    allow: Allow = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=1, help="Seconds a measurement may take.")
    ] = 120,
    memory: Memory = 4096,
    seed: Annotated[int, typer.Option(help="Of the variant.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as an object.")] = False,
) -> None:
    """Grade submissions with evaluate_hw1(): the rules, and the accuracy on MNIST and on a variant.

    The variant has the images in another order, and 30 % wrong labels: an accuracy that does not
    fall with it was not measured. One row each; a submission that fails is a row, too, and exit
    code 0. Each runs in a process of its own with limits, which is not a sandbox for hostile code.
    """
    import sys

    from . import grade as grading
    from .experiment import to_json
    from .files import write_csv, writing

    results = []
    for result in grading.grade(submissions, timeout, memory, allow or (), seed):
        results.append(result)
        with writing(f"--out {out}"):
            write_csv(out, grading.HEADER, [result.row() for result in results])
        print(grading.line(result), file=sys.stderr if json_ else sys.stdout, flush=True)
    if json_:
        found = [result.to_dict() for result in results]
        print(to_json({"out": str(out), "submissions": found}), end="")
    else:
        print(f"{out}: {len(results)} submission{'s' * (len(results) != 1)}")


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
