"""The command line: parse, call, print. Results go to stdout, everything else to stderr.

Exit codes: 0 done; 1 a bar that was asked for was missed, or a single run diverged; 2 bad input;
130 interrupted. torch is imported by the commands that need it, so `--help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import InputError

if TYPE_CHECKING:
    from .experiment import Run
    from .training import Record

app = typer.Typer(
    name="manualnn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train neural networks whose gradients are derived by hand: no autograd, no torch.nn.",
    epilog="Start with: manualnn train, then manualnn evaluate.",
)


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a shipped one.", show_default=True)
    ] = "mnist-mlp",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in train.epochs=5."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; default runs/NAME.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="train.seed, of a single network.")] = None,
    epochs: Annotated[int | None, typer.Option(help="train.epochs.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set: mnist, fashion-mnist, kmnist or idx.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with the data: torchvision's layout or idx files.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or the newest one.")
    ] = False,
    require_accuracy: Annotated[
        float | None, typer.Option(help="Exit 1 if the test accuracy is below this, in [0, 1].")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train two steps and save nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print metrics.json and the folder.")
    ] = False,
) -> None:
    """Train the networks of CONFIG and leave a folder with weights, curves and figures.

    Without CONFIG: a multi-layer perceptron on MNIST, which comes with the package.
    """
    from .config import load_config

    if require_accuracy is not None and not 0 <= require_accuracy <= 1:
        raise InputError(f"--require-accuracy {require_accuracy:g}: give a fraction, as in 0.98")
    flags = {"train.seed": seed, "train.epochs": epochs, "data.name": data, "data.dir": data_dir}
    resolved = load_config(config, set_, flags)
    if seed is not None and resolved.train.seeds:
        raise InputError(
            f"--seed {seed}: train.seeds is set and wins; use --set train.seeds=[{seed}]"
        )
    if print_config:
        print(resolved.to_toml(), end="")
        return

    from . import experiment

    if dry_run:
        training = experiment.dry_run(resolved, device)
        print(
            f"{resolved.name}: {training.step_number} steps of {len(training.replicas)} network(s)"
            f" with {training.network.layout.count:,} parameters on {training.grad.device};"
            " nothing saved"
        )
        return
    run = experiment.Run(resolved, out, device, resume)
    if resume and run.metrics is None and not run.saved_epoch:
        print(f"note: nothing to resume in {run.folder}; starting afresh", file=sys.stderr)
    try:
        _follow(run, quiet)
    except KeyboardInterrupt:
        kept = f"{run.folder} holds epoch {run.saved_epoch}"
        how = f"go on with the same options and --resume --out {run.folder}"
        print(f"interrupted: {kept}; {how}", file=sys.stderr)
        raise typer.Exit(130) from None
    metrics = run.metrics
    assert metrics is not None
    if json_:
        print(experiment.to_json(metrics | {"out": str(run.folder)}), end="")
    else:
        _print_metrics(metrics, run.folder)
    _require(metrics, require_accuracy)


@app.command()
def evaluate(
    weights: Annotated[
        str | None,
        typer.Argument(
            help="A weights file, a run folder, or a shipped name. Default: the newest run here,"
            " else the network that comes with the package.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="test, valid or train.")] = "test",
    data: Annotated[
        str | None, typer.Option(help="Data set; default the one it was trained on.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data: torchvision's layout or idx files.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures; default in the run's own, else evaluation/."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_: Annotated[
        bool, typer.Option("--json", help="Print accuracy, loss, n and per_class.")
    ] = False,
) -> None:
    """Measure trained weights: accuracy, loss, each class, confusion matrix, worst mistakes."""
    from . import experiment

    if (
        weights is None
        and (newest := experiment.newest_run())
        and (newest / "weights.pkl").exists()
    ):
        weights = str(newest)
    evaluated = experiment.evaluate_weights(weights, data, data_dir, split, device)
    evaluation, names, path = evaluated.evaluation, evaluated.class_names, evaluated.path
    is_run = (path.parent / "config.toml").exists()
    name = path.parent.name if is_run else path.stem
    label = evaluated.data.replace(" ", "-")
    folder = out or (path.parent / label if is_run else Path("evaluation") / f"{name}-{label}")
    try:
        experiment.draw_evaluation(
            evaluation, evaluated.images, names, f"{name}, {evaluated.data} set", folder
        )
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
    per_class = evaluation.per_class(names)
    if json_:
        result = {
            "accuracy": evaluation.accuracy,
            "loss": evaluation.loss,
            "n": len(evaluation.targets),
            "per_class": per_class,
        }
        print(experiment.to_json(result), end="")
        return
    print(f"{path} on {evaluated.data} ({len(evaluation.targets):,} samples in {evaluated.where})")
    print(f"accuracy {_percent(evaluation.accuracy)}, loss {evaluation.loss:.4f}\n")
    width = max(len(name) for name in [*names, "class"])
    print(f"{'class':<{width}}  samples  accuracy  precision")
    for row in per_class:
        accuracy, precision = _percent(row["accuracy"]), _percent(row["precision"])
        print(f"{row['class']:<{width}}  {row['n']:>7,}  {accuracy:>8}  {precision:>9}")
    pictures = [name for name in ("confusion.png", "mistakes.png") if (folder / name).exists()]
    print(f"\n{folder}: {', '.join(pictures)}")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(version("manualnn"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        # A usage error of typer's parser, told by its interface: its module has changed before.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if text := " ".join(message().split()):
            print(f"error: {text} (see --help)", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _follow(run: "Run", quiet: bool) -> None:
    """Iterate over a run's training, with a bar on a terminal or a line per epoch in a pipe."""
    if run.metrics is not None:
        print(f"{run.folder}: already finished", file=sys.stderr)
        return
    training = run.training
    if not quiet:
        first = f"from epoch {training.epoch + 1} of" if training.epoch else "for"
        print(
            f"training {len(training.replicas)} network(s) with {training.network.layout.count:,}"
            f" parameters {first} {training.settings.epochs} epochs on {training.grad.device}",
            file=sys.stderr,
        )
    report = _lines if quiet or not sys.stderr.isatty() else _bar
    told = set()
    for event in report(run):
        if isinstance(event, list) and not quiet and report is _lines:
            print(_describe(event), file=sys.stderr)
        for r, reason in enumerate(training.ended):
            if reason and r not in told:
                told.add(r)
                replica = training.replicas[r]
                print(f"{replica.label}, seed {replica.seed}: {reason}", file=sys.stderr)


def _lines(run: "Run") -> Any:
    yield from run.train()


def _bar(run: "Run") -> Any:
    """Pass the run's events on and show them as a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    training = run.training
    size, epochs = len(training.data.train), training.settings.epochs
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(10), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=epochs * size, figures="")
        last: list[Record] = training.records[-1:]
        for event in run.train():
            if isinstance(event, list):
                last = event or last
            else:
                figures = f"{event.samples * len(training.replicas) / event.seconds:,.0f} samples/s"
                if last:
                    loss, accuracy = _mean(last, "train_loss"), _mean(last, "train_accuracy")
                    figures = f"loss {loss:.4f}, accuracy {_percent(accuracy)}, {figures}"
                bar.update(
                    task,
                    description=f"epoch {event.epoch}/{epochs}",
                    completed=training.epoch * size + event.samples,
                    figures=figures,
                )
            yield event


def _mean(records: "list[Record]", name: str) -> float | None:
    """The mean of a figure over networks; None where it was not measured."""
    values = [getattr(record, name) for record in records]
    return None if values[0] is None else sum(values) / len(values)


def _describe(records: "list[Record]") -> str:
    """One line for an epoch: means over the live networks."""
    if not records:
        return "no network is left"

    valid, seconds = _mean(records, "valid_accuracy"), records[0].seconds
    line = f"epoch {records[0].epoch:>3}  loss {_mean(records, 'train_loss'):.4f}"
    line += f"  accuracy {_percent(_mean(records, 'train_accuracy'))}"
    if valid is not None:
        line += f"  validation {_percent(valid)}"
    return f"{line}  {seconds:.2f} s"


def _print_metrics(metrics: dict[str, Any], folder: Path) -> None:
    """The result of a run for a reader."""
    std = metrics.get("std", {})
    same = len({run["run"] for run in metrics.get("runs", [])}) <= 1
    for part, name in (("test", "test"), ("valid", "validation"), ("train", "training")):
        accuracy, loss = metrics[f"{part}_accuracy"], metrics[f"{part}_loss"]
        if accuracy is None:
            continue
        spread = std.get(f"{part}_accuracy")
        if not same:
            continue  # different settings: each network's figures stand below
        error = f" +- {100 * spread:.2f}" if spread is not None else ""
        many = f"  mean and std of {metrics['n']} networks" if "runs" in metrics else ""
        shown = "not finite" if loss is None else f"{loss:.4f}"
        print(f"{name + ' accuracy':<20} {_percent(accuracy)}{error}  loss {shown}{many}")
    if metrics["diverged"]:
        print(f"{metrics['diverged']} network(s) diverged")
    for run in metrics.get("runs", []):
        figures = (
            f"test {_percent(run['test_accuracy'])}  validation {_percent(run['valid_accuracy'])}"
        )
        print(f"  {run['run']}, seed {run['seed']}: {figures}  {run['ended'] or ''}".rstrip())
    if "runs" in metrics:
        print(f"weights.pkl is {metrics['weights']['run']}, seed {metrics['weights']['seed']}")
    speed = metrics["samples_per_second"] or 0
    print(
        f"{metrics['parameters']:,} parameters, {metrics['epochs']} epochs,"
        f" {metrics['seconds']:.1f} s of training ({speed:,.0f} samples/s) on {metrics['device']}"
    )
    names = ("weights.pkl", "curves.png", "confusion.png", "mistakes.png", "metrics.json")
    print(f"{folder}: {', '.join(name for name in names if (folder / name).exists())}")


def _require(metrics: dict[str, Any], bar: float | None) -> None:
    """Exit with 1 where the only network diverged or the accuracy bar was missed."""
    if metrics["diverged"] and "runs" not in metrics:
        print(f"error: {metrics['ended']}", file=sys.stderr)
        raise typer.Exit(1)
    if bar is not None and (metrics["test_accuracy"] is None or metrics["test_accuracy"] < bar):
        reached = _percent(metrics["test_accuracy"])
        print(f"error: test accuracy {reached} is below {_percent(bar)}", file=sys.stderr)
        raise typer.Exit(1)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
