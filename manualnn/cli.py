"""The command line: parse, call, print. Results go to stdout, everything else to stderr.

Exit codes: 0 done; 1 a bar that was asked for was missed, or a single run diverged; 2 bad input;
130 interrupted (143 by SIGTERM), after saving. torch is imported by the commands that need it, so
`--help` answers at once.
"""

import math
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_checks
from .errors import InputError, printable

if TYPE_CHECKING:
    from . import config as configs
    from .experiment import Run
    from .study import Worker
    from .training import Record

app = typer.Typer(
    name="manualnn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train neural networks whose gradients are derived by hand: no autograd, no torch.nn.",
    epilog="Start with: manualnn train, then manualnn evaluate.",
)


# Options that several commands have.
Config = Annotated[
    str, typer.Argument(help="A TOML file, or the name of a shipped one.", show_default=True)
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in train.epochs=5."),
]
DataName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PATH",
        help="mnist, fashion-mnist or kmnist; a CSV file; or a folder of CSV, idx or shard files.",
    ),
]
DataDir = Annotated[
    str | None, typer.Option(help="Folder with the data: torchvision's layout or idx files.")
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="NAME|first|last|N",
        help="The label's column in CSV files.",
        show_default="told by the table",
    ),
]
HeaderLine = Annotated[
    str | None,
    typer.Option(
        "--header", metavar="yes|no", help="Whether the first line of CSV files holds names."
    ),
]
RunFolder = Annotated[
    Path | None, typer.Option(help="The run's folder; default runs/NAME.", show_default=False)
]
Epochs = Annotated[int | None, typer.Option(help="train.epochs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Normalize = Annotated[
    str | None,
    typer.Option(
        metavar="none|unit|standard|MEAN,STD",
        help="How raw values become inputs, for weights of other origin; unit is x / 255.",
        show_default=False,
    ),
]
Activation = Annotated[
    str | None,
    typer.Option(
        metavar="relu|sigmoid|tanh",
        help="Between the layers of weights of other origin; default relu.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out, or the newest one.")
]
ClassNames = Annotated[
    str | None, typer.Option(help="Names of the classes, as in cat,dog.", show_default=False)
]
Title = Annotated[
    str, typer.Option(help="The report's heading, in place of the run's name.", show_default=False)
]
DerivationPage = Annotated[
    bool, typer.Option("--derivation-page", help="The derivation at length, on a page more.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Argument(help="A TOML file, or the name of a shipped one.", show_default="mnist-mlp"),
    ] = None,
    set_: Sets = None,
    out: RunFolder = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="train.seed, of a single network.")] = None,
    epochs: Epochs = None,
    data: DataName = None,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
    resume: Resume = False,
    require_accuracy: Annotated[
        float | None, typer.Option(help="Exit 1 if the test accuracy is below this, in [0, 1].")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train two steps and save nothing.")
    ] = False,
    train_plot: Annotated[
        bool,
        typer.Option(
            "--train-plot", help="Draw curves.png and first-layer.png anew after every epoch."
        ),
    ] = False,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="torch.compile the step: takes some 10 s, and on a CPU steps are slower then.",
        ),
    ] = False,
    quiet: Quiet = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print metrics.json and the folder.")
    ] = False,
) -> None:
    """Train the networks of CONFIG and leave a folder with weights, curves and figures.

    Without CONFIG: a multi-layer perceptron on MNIST, which comes with the package; with --resume
    the newest unfinished run in runs/, of whatever config, or what is in --out.
    """
    from .config import data_flags, load_config

    if require_accuracy is not None and not 0 <= require_accuracy <= 1:
        raise InputError(f"--require-accuracy {require_accuracy:g}: give a fraction, as in 0.98")
    if config is None and resume and out is None and (newest := _newest_run()):
        out = newest
    if config is None:
        held = out / "config.toml" if resume and out else None
        config = str(held) if held and held.is_file() else "mnist-mlp"
    flags = {
        "train.seed": seed,
        "train.epochs": epochs,
        "train.compile": compile_ or None,
        **data_flags(data, data_dir, label, header),
    }
    resolved = load_config(config, set_, flags)
    if seed is not None and any(member.train.seeds for member in resolved.members()):
        raise InputError(
            f"--seed {seed}: train.seeds is set and wins; use --set train.seeds=[{seed}]"
        )
    if print_config:
        print(resolved.to_toml(), end="")
        return

    from . import experiment

    if dry_run:
        for training in experiment.dry_run(resolved, device):
            print(
                f"{resolved.name}: {training.step_number} steps of {len(training.replicas)}"
                f" network(s) with {training.network.layout.count:,} parameters on"
                f" {training.device}; nothing saved"
            )
        return
    run = experiment.Run(resolved, out, device, resume, train_plot)
    if resume and run.metrics is None and not run.records and not run.training.step_number:
        print(f"note: nothing to resume in {run.folder}; starting afresh", file=sys.stderr)
    metrics = _follow(run, quiet)
    if json_:
        print(experiment.to_json(metrics | {"out": str(run.folder)}), end="")
    else:
        _print_metrics(metrics, run.folder)
    _require(metrics, require_accuracy)


def _newest_run() -> Path | None:
    """The run that --resume alone means: the newest that is not finished, else the newest."""
    from .find import runs_called

    found = [folder for folder in runs_called("", "config.toml") if not _is_sweep(folder)]
    open_ = [folder for folder in found if not (folder / "metrics.json").is_file()]
    if not found:
        return None
    which = "the newest unfinished run" if open_ else "the newest run; none is unfinished"
    print(f"note: --resume: {[*open_, *found][0]}, {which}", file=sys.stderr)
    return [*open_, *found][0]


def _is_sweep(folder: Path) -> bool:
    """Whether a sweep goes on with a run, which writes its table after training."""
    return "-sweep" in folder.name or (folder / "sweep.json").is_file()


@app.command("random-labels")
def random_labels(
    config: Config = "mnist-random-labels",
    samples: Annotated[
        str | None, typer.Option(help="The first N training samples; a list: 128,512,2048.")
    ] = None,
    corruption: Annotated[
        str | None, typer.Option(help="Fraction of labels that are random; a list: 0,0.5,1.")
    ] = None,
    labels: Annotated[
        int | None, typer.Option(help="Classes of the labels: 2, or all of the data set's.")
    ] = None,
    outputs: Annotated[
        int | None, typer.Option(help="Outputs of the network; default one for each class.")
    ] = None,
    test_labels: Annotated[
        str | None,
        typer.Option(
            help="random, true or parity; default random where all training labels are.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Networks for each corruption; 3 for a list.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The first seed.")] = None,
    epochs: Epochs = None,
    set_: Sets = None,
    data: DataName = None,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
    out: RunFolder = None,
    device: Device = "auto",
    resume: Resume = False,
    quiet: Quiet = False,
    json_: Annotated[bool, typer.Option("--json", help="Print random-labels.json.")] = False,
) -> None:
    """Memorise coin flips: train on the first 128 images with random labels (Zhang et al. 2017).

    With a list of corruptions or sample counts: how many epochs it takes to fit them.
    """
    from .config import data_flags, load_config

    flags = {
        "train.seed": seed,
        "train.epochs": epochs,
        **data_flags(data, data_dir, label, header),
    }
    resolved = load_config(config, set_, flags)
    counts = _numbers("--samples", samples, int, 1, None)
    fractions = _numbers("--corruption", corruption, float, 0, 1)
    for name, value in (("--labels", labels), ("--outputs", outputs), ("--seeds", seeds)):
        if value is not None and value < (1 if name == "--seeds" else 2):
            raise InputError(f"{name} {value}: must be at least {1 if name == '--seeds' else 2}")

    from . import random_labels as memorise

    chosen, off = memorise.configure(
        resolved, fractions, labels or 0, outputs or 0, test_labels or "", seeds or 0
    )
    folder, runs = memorise.runs(chosen, counts, out, device, labels or 0, resume)
    if not quiet:
        what = ", ".join(off) or "none was on"
        print(f"regularisation and augmentation are off ({what})", file=sys.stderr)
    followed = [(run.folder, _follow(run, quiet, folder)) for run in runs]
    _go_on_alone()
    result = memorise.summarise(folder, [path for path, _ in followed])
    if json_:
        from .experiment import to_json

        print(to_json(result), end="")
        return
    _print_memorised(result)
    names = ("random-labels.png", "epochs-to-fit.png", "random-labels.json", "weights.pkl")
    print(f"{folder}: {', '.join(name for name in names if (folder / name).exists())}")
    if len(followed) == 1:
        _require(followed[0][1], None)


@app.command()
def compare(
    config: Annotated[
        str, typer.Argument(help="A TOML file, the name of a shipped one, or a finished run.")
    ],
    set_: Sets = None,
    seeds: Annotated[
        int | None, typer.Option(help="Networks of each run: mean and deviation over seeds.")
    ] = None,
    epochs: Epochs = None,
    data: DataName = None,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
    out: RunFolder = None,
    device: Device = "auto",
    resume: Resume = False,
    quiet: Quiet = False,
    json_: Annotated[bool, typer.Option("--json", help="Print comparison.json.")] = False,
) -> None:
    """Train the runs of CONFIG and compare them: one plot, one table, what the numbers say."""
    folder = Path(config)
    if not (folder / "metrics.json").is_file():
        from .config import data_flags, load_config

        many = None if seeds is None else list(range(seeds))
        if many == []:
            raise InputError(f"--seeds {seeds}: must be at least 1")
        flags = {"train.epochs": epochs, **data_flags(data, data_dir, label, header)}
        resolved = load_config(config, set_, flags | {"train.seeds": many})

        from . import compare as comparing
        from . import experiment

        comparing.check(resolved)

        run = experiment.Run(resolved, out, device, resume)
        _follow(run, quiet)
        _go_on_alone()
        folder = run.folder

    from . import compare as comparing
    from .experiment import to_json

    result = comparing.compare(folder)
    if json_:
        print(to_json(result), end="")
        return
    print("\n".join(comparing.table(result["rows"])))
    print(f"\n{textwrap.fill(result['findings'], 100)}\n")
    print(f"{folder}: comparison.png, comparison.csv, comparison.txt, comparison.json")


@app.command()
def show(
    data: Annotated[
        str,
        typer.Argument(metavar="NAME|PATH", help="A data set, a CSV file, or a folder of either."),
    ] = "mnist",
    out: Annotated[
        Path | None, typer.Option(help="The picture; default NAME.png.", show_default=False)
    ] = None,
    examples: Annotated[int, typer.Option(help="Images of each class.")] = 4,
    class_names: ClassNames = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    permute_seed: Annotated[
        int | None,
        typer.Option(help="Beside each its pixels in the order of data.permute_seed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
) -> None:
    """Show examples of each class as one picture, a row for each class."""
    from . import show as showing

    if split not in ("train", "test"):
        raise InputError(f"--split {split}: use train or test")
    if examples < 1:
        raise InputError(f"--examples {examples}: must be at least 1")
    names = _names(class_names) or None
    figure = showing.show(
        *_found(data, data_dir, split, label, header),
        split,
        names,
        examples,
        seed,
        permute_seed,
    )
    path = out or Path(f"{Path(data).stem}.png")
    showing.save(figure, path)
    print(path)


def _names(text: str | None) -> tuple[str, ...]:
    """The parts of a list like cat,dog."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _found(
    source: str,
    data_dir: str | None,
    part: str = "train",
    label: str | None = None,
    header: str | None = None,
) -> "tuple[str, str | dict[str, str] | None]":
    """The name of a data set that is given as NAME|PATH, and its place; of a file as that part."""
    from .config import data_source

    name, place = data_source(source, data_dir, part, label, header)
    return str(name), place


data_app = typer.Typer(no_args_is_help=True, help="Data sets as files.")
app.add_typer(data_app, name="data")


@data_app.command("export-csv")
def export_csv(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|PATH", help="A data set, or a folder of idx or CSV files."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("csv"),
    test: Annotated[
        float | None, typer.Option(help="The share of test.csv.", show_default="0.2")
    ] = None,
    keep_split: Annotated[
        bool, typer.Option("--keep-split", help="Into test.csv the data set's own test examples.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
) -> None:
    """Write a data set as train.csv (label first), test.csv (no labels) and test_labels.csv.

    The training and test examples are joined and shuffled: of 70,000 the test file has 14,000.
    """
    from . import data

    if test is not None and keep_split:
        raise InputError("--test and --keep-split: give one of them")
    share = None if keep_split else 0.2 if test is None else test
    if share is not None and not 0 < share < 1:
        raise InputError(f"--test {share:g}: must be between 0 and 1")
    dataset = data.load(*_found(name, data_dir, label=label, header=header))
    counts = data.export_csv(dataset, out, seed, share)
    print(f"read {dataset.read}", file=sys.stderr)
    print("\n".join(f"{out / file}: {count:,} examples" for file, count in counts.items()))


@data_app.command("convert")
def convert(
    source: Annotated[
        str, typer.Argument(metavar="NAME|PATH", help="A data set, a CSV file, or a folder.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, new or empty.")],
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
) -> None:
    """Write a data set as a folder of shards, which may be larger than memory: train with --data.

    Files of idx or CSV, plain or .gz, are read some examples at a time.
    """
    from . import data

    counts = data.convert(*_found(source, data_dir, label=label, header=header), out)
    print("\n".join(f"{out}: {count:,} {part} examples" for part, count in counts.items()))


@data_app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of shards.")],
) -> None:
    """Read all files of a shard folder and compare them with their checksums."""
    from . import data

    sizes = [size for _, size in data.verify_shards(folder)]
    print(f"{folder}: {len(sizes)} files, {sum(sizes):,} bytes, as they were written")


@data_app.command()
def generate(
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    samples: Annotated[int, typer.Option(help="How many training examples.")],
    from_: Annotated[
        str,
        typer.Option("--from", metavar="NAME|PATH", help="The data set they are made from."),
    ] = "mnist",
    augment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="A change as in data.augment, any number of them.",
            show_default="elastic:36",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the changes and of the order.")] = 0,
    data_dir: DataDir = None,
    quiet: Quiet = False,
) -> None:
    """Write a folder with any number of training examples, each one of a data set distorted at
    random, and with the data set's own test examples.

    Example i depends on the seed and on i alone: fewer are the first of more.
    """
    from . import data

    if samples < 1:
        raise InputError(f"--samples {samples}: must be at least 1")
    chosen = data.Augment.parse(tuple(augment or ["elastic:36"]))
    assert chosen is not None
    dataset = data.load(*_found(from_, data_dir), optional=("test",))
    show = sys.stderr.isatty() and not quiet
    with _counting(samples) if show else nullcontext(lambda count: None) as progress:
        data.generate(dataset, out, samples, chosen, seed, progress)
    test = len(dataset.test.labels) if dataset.test else 0
    print(f"{out}: {samples:,} training and {test:,} test examples")


@contextmanager
def _counting(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for what counts up to `total`."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.update(task, completed=count)


@app.command()
def sweep(
    config: Config = "fashion-logistic",
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LIST",
            help="Values of a key, as in train.l2=[0, 1e-4], or a range of them, as in"
            " train.l2={low=1e-6, high=1e-2, log=true}; adds to \\[grid].",
        ),
    ] = None,
    set_: Sets = None,
    seeds: Annotated[
        int | None, typer.Option(help="Networks of each combination.", show_default="1")
    ] = None,
    epochs: Epochs = None,
    data: DataName = None,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder; default runs/NAME-sweep.", show_default=False)
    ] = None,
    device: Device = "auto",
    resume: Resume = False,
    retrain: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Then train N networks of the best combination on training and validation examples"
            " together, measure them on the test set, and write predictions.csv.",
        ),
    ] = 0,
    most: Annotated[int, typer.Option("--top", help="Rows of the table to print; 0: all.")] = 10,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="Share the sweep through a journal file, sqlite:///FILE or postgresql://...",
            show_default="runs/STUDY/study.journal",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Its name; each process with it is a worker.", show_default="NAME-sweep"),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="grid, random or tpe.", show_default="tpe with a range, else grid"),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Of all workers together.", show_default="32, or the grid's"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Trials that a worker trains at once.", show_default="8")
    ] = None,
    heartbeat: Annotated[
        int | None,
        typer.Option(
            help="Seconds between a worker's signs of life; after 4 without its trials are"
            " trained by another.",
            show_default="30",
        ),
    ] = None,
    no_prune: Annotated[
        bool, typer.Option("--no-prune", help="Train all trials of a study to their end.")
    ] = False,
    quiet: Quiet = False,
    json_: Annotated[bool, typer.Option("--json", help="Print sweep.json.")] = False,
) -> None:
    """Train every combination of CONFIG's \\[grid], rank them by validation accuracy, and say which
    factor matters most.

    The test set is not touched; combinations that differ in learning rate, momentum, penalties,
    dropout or seed alone train together. With --storage, --study, --sampler or --trials the sweep
    is a study that any number of workers share: start the same command again, here or elsewhere.
    """
    from .config import data_flags, load_config

    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds {seeds}: must be at least 1")
    if retrain < 0:
        raise InputError(f"--retrain {retrain}: must be at least 0")
    many = list(range(seeds)) if seeds else None
    flags = {
        "train.epochs": epochs,
        "train.seeds": many,
        **data_flags(data, data_dir, label, header),
    }
    gridded = load_config(config, set_, flags, grid)
    if any(x is not None for x in (storage, study, sampler, trials, batch, heartbeat)) or no_prune:
        if retrain:
            raise InputError("--retrain: a shared sweep says how to train the best; leave it out")
        options = {"trials": trials, "batch": batch, "seconds": heartbeat}
        if bad := [f"--{name} {x}" for name, x in options.items() if x is not None and x < 1]:
            raise InputError(f"{bad[0].replace('seconds', 'heartbeat')}: must be at least 1")
        if sampler not in (None, "grid", "random", "tpe"):
            raise InputError(f"--sampler {sampler}: use grid, random or tpe")
        chosen = {name: x for name, x in options.items() if x is not None}
        plan = {**chosen, "sampler": sampler, "prune": not no_prune}
        result = _share(gridded, storage, study, plan, out, device, quiet)
        if json_:
            from .experiment import to_json

            print(to_json(result), end="")
        else:
            _print_study(result, most)
        return

    from . import distributed, experiment
    from . import sweep as sweeping

    name = f"{gridded.name}-sweep"
    run = experiment.Run(sweeping.configure(gridded, name), out, device, resume)
    _follow(run, quiet)
    result = distributed.on_main(lambda: sweeping.summarise(run.folder, gridded))
    if not json_:
        print("\n".join(sweeping.table(result["rows"], most)))
        print(f"\n{textwrap.fill(result['findings'], 100)}\n")
        names = ("sweep.csv", "sweep.json", "marginals.png", "heatmaps.png", "best-curves.png")
        written = [name for name in names if (run.folder / name).exists()]
        print(f"{run.folder}: {', '.join(written)}")
    if retrain:
        best = sweeping.retrain(run.folder, gridded, range(retrain), device, resume)
        metrics = _follow(best, quiet, run.folder)
        _go_on_alone()
        predictions = sweeping.write_predictions(best.folder, best.config.data, device)
        result |= {"retrained": metrics | {"out": str(best.folder)}}
        if not json_:
            _print_metrics(metrics, best.folder)
            print(predictions or "there are no test examples to predict")
    if json_:
        print(experiment.to_json(result), end="")


def _share(
    config: "configs.Config",
    storage: str | None,
    name: str | None,
    plan: dict[str, Any],
    out: Path | None,
    device: str,
    quiet: bool,
) -> dict[str, Any]:
    """Be a worker of a shared sweep until it is finished; what it leaves."""
    from . import study
    from .find import RUNS

    name = name if name is not None else f"{config.name}-sweep"
    if out is None and not study.is_file_name(name):
        raise InputError(f"--study {name}: cannot be the name of a folder; give --out")
    folder = out or RUNS / name
    if (folder / "config.toml").exists():
        raise InputError(f"{folder} holds a run; give another --out or --study")
    worker = study.Worker(
        config, storage or folder / "study.journal", name, study.Plan(**plan), device
    )
    received: list[int] = []
    try:
        print(f"study {name} in {worker.where}: {worker.total} trials", file=sys.stderr)
        if not quiet:
            print(f"read {worker.read}", file=sys.stderr)
        try:
            with _stopped_by_signals(worker, received), closing(worker.work()) as lines:
                for line in lines:
                    if not quiet:
                        print(line, file=sys.stderr)
        except KeyboardInterrupt:
            worker.stopped = True
        if worker.stopped or received:
            print("interrupted: its trials wait for another worker", file=sys.stderr)
            raise typer.Exit(128 + (received or [signal.SIGINT])[0])
        return worker.summarise(folder)
    finally:
        worker.close()


def _print_study(result: dict[str, Any], most: int) -> None:
    """The result of a shared sweep for a reader."""
    from .study import short
    from .sweep import table

    folder = Path(result["out"])
    print("\n".join(table([short(row) for row in result["rows"]], most)))
    print(f"\n{textwrap.fill(result['findings'], 100)}\n")
    if result["best"]:
        print(f"train the best: manualnn train {folder / 'best.toml'} --out {folder / 'best'}")
    names = ("sweep.csv", "sweep.json", "trials.png", "parameters.png", "marginals.png")
    print(f"{folder}: {', '.join(name for name in names if (folder / name).exists())}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of one or two finished runs.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The PDF; default report.pdf in the first RUN.")
    ] = None,
    author: Annotated[str, typer.Option(help="A line with names and ids.")] = "",
    notes: Annotated[
        Path | None, typer.Option(help="Markdown: attempts and conclusions, for the last page.")
    ] = None,
    derivation: Annotated[
        bool, typer.Option("--derivation", help="The gradient of softmax and cross-entropy, too.")
    ] = False,
    derivation_page: DerivationPage = False,
    title: Title = "",
    class_names: ClassNames = None,
    data_dir: DataDir = None,
) -> None:
    """Write finished runs as a PDF of at most two pages: architecture, training, curves, results.

    A run of random labels has a page with its losses and their explanation, one on a CSV file
    examples of its classes and the findings of its sweep. Only --derivation-page adds a third page.
    """
    from . import report as reporting

    path = reporting.report(
        *(runs, out, author, notes, derivation, "", title),
        *(_names(class_names), derivation_page, data_dir),
    )
    print(path)


@app.command("hand-in")
def hand_in(
    identity: Annotated[str, typer.Option("--id", help="Your id, or ids as in ID1_ID2.")],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN RUN]", help="Two finished runs; default the exercise's newest in runs/."
        ),
    ] = None,
    exercise: Annotated[str, typer.Option(help="mnist or fashion.")] = "mnist",
    out: Annotated[
        Path | None, typer.Option(help="The zip; default hw1_ID.zip or, for fashion, ID.zip.")
    ] = None,
    author: Annotated[str, typer.Option(help="The report's line of names; default the id.")] = "",
    notes: Annotated[
        Path | None, typer.Option(help="Markdown: the summary, attempts and conclusions.")
    ] = None,
    derivation_page: DerivationPage = False,
    title: Title = "",
    class_names: ClassNames = None,
    data_dir: DataDir = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Pack nothing, exit code 1, where a check is missed.")
    ] = False,
) -> None:
    """Pack what a course asks for: scripts that run with torch alone, weights, report; and say what
    of the assignment is met.

    mnist: runs of train and random-labels. fashion: a logistic regression and a network trained on
    CSV files, with lr_pred.csv and NN_pred.csv.
    """
    from . import checklist
    from . import hand_in as handing

    names = _names(class_names)
    made = handing.hand_in(
        *(identity, exercise, runs or [], out, author, notes, title, names),
        *(derivation_page, strict, data_dir),
    )
    print("\n".join(map(checklist.line, made.checks)))
    if made.path is None:
        missed = sum(not check.passed for check in made.checks)
        print(f"error: {missed} of {len(made.checks)} missed; nothing is packed", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{made.path}: {made.runs[0]}, {made.runs[1]}")


@app.command("lr-find")
def lr_find(
    config: Config = "mnist-mlp",
    low: Annotated[float, typer.Option(help="The lowest learning rate.")] = 1e-4,
    high: Annotated[float, typer.Option(help="The highest learning rate.")] = 10.0,
    networks: Annotated[int, typer.Option(help="How many rates, evenly on a log scale.")] = 20,
    steps: Annotated[int, typer.Option(help="Training steps of each network.")] = 200,
    set_: Sets = None,
    data: DataName = None,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default runs/NAME-lr-find.", show_default=False)
    ] = None,
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print what was found.")] = False,
) -> None:
    """Find a learning rate: the loss of one population, a network for each rate, as a plot."""
    from .config import data_flags, load_config

    resolved = load_config(config, set_, data_flags(data, data_dir, label, header))

    from . import experiment
    from . import lr_find as finder
    from .files import writing

    result = finder.find(resolved, low, high, networks, steps, device)
    folder = out or experiment.new_folder(f"{resolved.name}-lr-find")
    with writing(f"--out {folder}"):
        finder.save(result, resolved.name, folder)
    if json_:
        print(experiment.to_json(result | {"out": str(folder)}), end="")
        return
    for row in result["rates"]:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        print(f"{row['learning_rate']:<12.3g}{loss}")
    first, last = result["good"]
    print(
        f"lowest loss at learning rate {result['best']:.2g}, nearly as low from {first:.2g} to"
        f" {last:.2g} (untrained: {result['start_loss']:.4f})"
    )
    print(f"{folder}: lr-find.png, lr-find.csv")


def _numbers(option: str, text: str | None, kind: Any, low: float, high: float | None) -> list[Any]:
    """The numbers of a list like 1,2,3, each within its bounds."""
    numbers = []
    for part in text.split(",") if text is not None else []:
        try:
            number = kind(part)
        except ValueError:
            raise InputError(f"{option} {text}: {part!r} is not a number") from None
        if not low <= number or (high is not None and number > high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise InputError(f"{option} {part.strip()}: must be {bounds}")
        if number in numbers:
            raise InputError(f"{option} {text}: {part.strip()} stands there twice")
        numbers.append(number)
    return numbers


def _print_memorised(result: dict[str, Any]) -> None:
    """The result of a memorisation for a reader."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in result.get("runs", []):
        groups.setdefault((run["samples"], run["run"]), []).append(run)
    for (samples, label), runs in groups.items():
        fits = [run["epochs_to_fit"] for run in runs]
        fitted = f"fitted in epoch {_spread(fits, 1, '', 'not fitted')}"
        figures = [fitted if any(fits) else f"not fitted in {runs[0]['epochs']} epochs"]
        figures += [
            f"{name} {_spread([run[key] for run in runs], scale, unit, 'not finite')}"
            for name, key, scale, unit in (
                ("training loss", "train_loss", 1, ""),
                ("test loss", "test_loss", 1, ""),
                ("test accuracy", "test_accuracy", 100, " %"),
            )
        ]
        print(f"{samples} samples, {label}: {', '.join(figures)}")
    if "runs" not in result:
        print(
            f"training loss  {_loss(result['train_loss'])}   accuracy"
            f" {_percent(result['train_accuracy'])}, {_fitted(result)}"
        )
        print(
            f"test loss      {_loss(result['test_loss'])}   accuracy"
            f" {_percent(result['test_accuracy'])}, mean over the epochs"
            f" {_loss(result['mean_test_loss'])}"
        )
        print(f"{result['guess']:<15}{result['guess_loss']:.4f}   what a uniform guess has")
    print(f"\n{textwrap.fill(result['explanation'], 100)}\n")


def _fitted(result: dict[str, Any]) -> str:
    if result["epochs_to_fit"]:
        return f"all fitted in epoch {int(result['epochs_to_fit'])} of {result['epochs']}"
    return f"not all fitted in {result['epochs']} epochs"


def _spread(values: list[float | None], scale: float, unit: str, missing: str) -> str:
    """Mean and standard deviation of the values that there are, in three digits; how many are
    `missing`."""
    import statistics

    known = [value * scale for value in values if value is not None]
    if not known:
        return missing
    error = f" +- {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    lost = len(values) - len(known)
    rest = f" ({lost} of {len(values)} {missing})" if lost else ""
    return f"{statistics.fmean(known):.4g}{error}{unit}{rest}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 0.001 else f"{value:.2e}"


@app.command()
def evaluate(
    weights: Annotated[
        str | None,
        typer.Argument(
            help="A weights file, a run folder, the name of a run, or shipped:NAME. Default: the"
            " newest run here, else the network that comes with the package.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="test, valid or train.")] = "test",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="As in train, a CSV file with labels; default what it was trained on.",
        ),
    ] = None,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures; default in the run's own, else evaluation/."),
    ] = None,
    device: Device = "auto",
    predictions: Annotated[
        Path | None, typer.Option(help="A file of predictions, one per line; needs --labels.")
    ] = None,
    normalize: Normalize = None,
    activation: Activation = None,
    labels: Annotated[
        Path | None, typer.Option(help="The labels they should be: one per line, or a CSV file.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print accuracy, loss, n and per_class.")
    ] = False,
) -> None:
    """Measure trained weights: accuracy, loss, each class, confusion matrix, worst mistakes.

    With --predictions and --labels: the accuracy of a file of predictions.
    """
    from . import evaluation as evaluating
    from . import experiment, find
    from .files import writing

    if predictions is not None or labels is not None:
        if predictions is None or labels is None or weights is not None:
            raise InputError("--predictions and --labels go together, and without WEIGHTS")
        right, n = evaluating.score_predictions(predictions, labels, label, header)
        if json_:
            print(experiment.to_json({"accuracy": right / n, "n": n}), end="")
        else:
            print(f"{predictions}: accuracy {_percent(right / n)}, {right:,} of {n:,} are right")
        return
    newest = find.newest_run("", find.WEIGHTS) if weights is None else None
    evaluated = evaluating.evaluate_weights(
        newest or weights, data, data_dir, split, device, label, header, normalize, activation
    )
    if weights is None:
        what = f"the newest run, {newest}" if newest else "no run here: the network of the package"
        print(f"note: {what}", file=sys.stderr)
    evaluation, names, path = evaluated.evaluation, evaluated.class_names, evaluated.path
    is_run = (path.parent / "config.toml").exists()
    name = path.parent.name if is_run else path.stem
    label = evaluated.data.replace(" ", "-")
    folder = out or (path.parent / label if is_run else Path("evaluation") / f"{name}-{label}")
    with writing(f"--out {folder}"):
        evaluating.draw_evaluation(
            evaluation, evaluated.images, names, f"{name}, {evaluated.data} set", folder
        )
    print(f"read {evaluated.read}", file=sys.stderr)
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


@app.command()
def predict(
    weights: Annotated[
        str,
        typer.Argument(help="A weights file, a run folder, the name of a run, or shipped:NAME."),
    ],
    examples: Annotated[
        Path | None, typer.Argument(metavar="[INPUT]", help="A CSV file, or an idx file of images.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME|PATH", help="In place of INPUT: the test part of a data set."),
    ] = None,
    data_dir: DataDir = None,
    label: LabelColumn = None,
    header: HeaderLine = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default stdout.", show_default=False)
    ] = None,
    with_probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Append each class's probability.")
    ] = False,
    normalize: Normalize = None,
    activation: Activation = None,
    device: Device = "auto",
) -> None:
    """Predict the class of each example in INPUT: one per line, in order, no header.

    A CSV row holds the pixels, or a label before them, which is ignored.
    """
    from . import evaluation as evaluating
    from .find import find_weights

    if (examples is None) == (data is None):
        raise InputError("give either INPUT, a CSV or idx file, or --data")
    path = find_weights(weights)
    classes, p = evaluating.predict_file(
        path, examples, device, data, data_dir, label, header, normalize, activation
    )
    lines = evaluating.prediction_lines(classes, p if with_probabilities else None)
    if out is None:
        print("\n".join(lines))
        return
    from .files import write_text, writing

    with writing(f"--out {out}"):
        write_text(out, "\n".join([*lines, ""]))
    print(f"{out}: {len(classes):,} predictions of {path}")


@app.command()
def summary(
    name: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|WEIGHTS", help="A TOML file, a weights file, a run folder, or a name."
        ),
    ] = "mnist-mlp",
    data_dir: DataDir = None,
    json_: Annotated[bool, typer.Option("--json", help="Print layers and parameters.")] = False,
) -> None:
    """Show the layers of a config or of trained weights: output shapes and parameters."""
    from . import evaluation as evaluating

    found = evaluating.summarise(name, data_dir)
    if json_:
        from .experiment import to_json

        print(to_json(found), end="")
        return
    print(f"{found['source']}: input {_shape(found['input_shape'])}")
    print(f"{'':<4}{'layer':<14}{'output':<14}{'parameters':>10}")
    for i, row in enumerate(found["layers"], 1):
        shape = _shape(row["output_shape"])
        print(f"{i:<4}{row['name']:<14}{shape:<14}{row['parameters']:>10,}")
    print(f"{'total':<32}{found['parameters']:>10,}")
    meta = dict(found["meta"])
    if meta.get("class_names"):
        meta["classes"] = len(meta["class_names"])
    if isinstance(meta.get("normalization"), dict):
        meta["normalization"] = meta["normalization"].get("kind")
    for key in ("dataset", "classes", "normalization", "loss", "run", "seed", "torch", "manualnn"):
        if key in meta:
            print(f"{key:<18}{meta[key]}")


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


@app.command()
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as an object.")] = False,
) -> None:
    """Say what works here: torch's build, the device and why, data sets, versions."""
    from . import doctor as examiner
    from .experiment import to_json

    report = examiner.examine()
    print(to_json(report) if json_ else "\n".join(examiner.lines(report)).rstrip() + "\n", end="")
    if report["problems"]:
        raise typer.Exit(1)


app.add_typer(cli_checks.app)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(version("manualnn"))
        raise typer.Exit


# Whether torchrun started this process as one of several, and first; what these do together.
SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
FIRST = not SEVERAL or os.environ.get("RANK") == "0"
TOGETHER = ("train", "compare", "sweep", "random-labels")


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if SEVERAL and context.invoked_subcommand not in TOGETHER:
        raise InputError(
            f"torchrun starts several processes for {', '.join(TOGETHER)}; run"
            f" {context.invoked_subcommand} without it"
        )


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    _make_streams_safe()
    try:
        if SEVERAL:
            from .distributed import as_one

            code = as_one(lambda: app(standalone_mode=False))
        else:
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
    except OSError as error:
        # Of a file no name of which was checked before, else of our output.
        where = error.filename or "the output"
        print(f"error: {printable(str(where))}: {error.strerror or error}", file=sys.stderr)
        code = 2 if error.filename else 1
        if not error.filename and sys.stdout is not None:  # what is left must not fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        # A usage error of typer's parser, told by its interface: its module has changed before.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if text := " ".join(message().split()):
            print(f"error: {text} (see --help)", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _make_streams_safe() -> None:
    """Let output that is closed, or a terminal that cannot show a letter, end nothing."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is not known to every matplotlib
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")


def _go_on_alone() -> None:
    """Of several processes only the first writes and prints what comes now."""
    if not FIRST:
        raise typer.Exit


def _follow(run: "Run", quiet: bool, out: Path | None = None) -> dict[str, Any]:
    """Iterate over a run's training, with a bar on a terminal or a line per epoch in a pipe; its
    metrics. Exits with 130 where it is interrupted. `out` is the folder that was or can be given as
    --out, where it is not the run's own."""
    if run.metrics is not None:
        print(f"{run.folder}: already finished", file=sys.stderr)
        return run.metrics
    from .training import Note, Training

    show = not quiet
    report = _bar if show and sys.stderr.isatty() else _plain
    told: set[int] = set()
    received: list[int] = []
    read = ""
    try:
        with _stopped_by_signals(run, received):
            for event in report(run):
                if isinstance(event, Training):
                    told = set()
                    if show and run.dataset.read != read:
                        read = run.dataset.read
                        print(f"read {read}", file=sys.stderr)
                    if show:
                        print(_announce(run), file=sys.stderr)
                elif isinstance(event, Note):
                    print(
                        f"note: {event.run}, seed {event.seed}, epoch {event.epoch}: {event.text}",
                        file=sys.stderr,
                    )
                elif isinstance(event, list) and show and report is _plain and _worth_a_line(run):
                    print(_describe(event), file=sys.stderr)
                for r, reason in enumerate(run.training.ended):
                    if reason and r not in told:
                        told.add(r)
                        replica = run.training.replicas[r]
                        print(f"{replica.label}, seed {replica.seed}: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        run.stopped = True
    if run.stopped:
        how = f"go on with the same options and --resume --out {out or run.folder}"
        print(f"interrupted: {run.folder} holds {run.saved}; {how}", file=sys.stderr)
        raise typer.Exit(128 + (received or [signal.SIGINT])[0])
    if received:  # while it was finished; what would come next must not begin
        print(f"{run.folder}: finished, then stopped by the signal", file=sys.stderr)
        raise typer.Exit(128 + received[0])
    assert run.metrics is not None
    return run.metrics


@contextmanager
def _stopped_by_signals(run: "Run | Worker", received: list[int]) -> Iterator[None]:
    """Let the first of these signals save the run and stop it, and the next stop it at once."""

    def stop(number: int, _: object) -> None:
        received.append(number)
        if run.stopping:
            raise KeyboardInterrupt
        run.stop()
        if not FIRST:
            return
        try:  # not print, which a signal must not enter twice
            os.write(2, b"stopping as soon as all is saved; the next signal stops at once\n")
        except OSError:  # the terminal is gone
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python gives signals to the main thread alone
    numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # as nohup sets it
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _worth_a_line(run: "Run") -> bool:
    """All of up to 50 epochs; of more only every so many, and the last."""
    epoch, epochs = run.training.epoch, run.training.settings.epochs
    return epochs <= 50 or epoch % (epochs // 25) == 0 or run.training.finished


def _announce(run: "Run") -> str:
    """One line for the population whose training begins."""
    training, parts = run.training, len(run.populations)
    part = f"part {run.number + 1} of {parts}: " if parts > 1 else ""
    first = f"from epoch {training.epoch + 1} of" if training.step_number else "for"
    what = f"{first} {training.settings.epochs} epochs"
    if training.epoch == training.settings.epochs:
        what = f"whose {training.epoch} epochs are done"
    return (
        f"{part}training {len(training.replicas)} network(s) with"
        f" {training.network.layout.count:,} parameters {what} on {training.device}"
    )


def _plain(run: "Run") -> Any:
    yield from run.train()


def _bar(run: "Run") -> Any:
    """Pass the run's events on and show them as a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from .training import Progress

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(10), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", figures="")
        for event in run.train():
            training = run.training
            size, epochs = training.epoch_samples, training.settings.epochs
            if isinstance(event, Progress):
                figures = f"{event.samples * len(training.replicas) / event.seconds:,.0f} samples/s"
                if last := training.last_records():
                    loss = _figure(last, "train_loss", "{:.4f}".format)
                    accuracy = _figure(last, "train_accuracy", _percent)
                    figures = f"loss {loss}, accuracy {accuracy}, {figures}"
                bar.update(
                    task,
                    description=f"epoch {event.epoch}/{epochs}",
                    total=epochs * size,
                    completed=training.epoch * size + event.samples,
                    figures=figures,
                )
            yield event


def _figure(records: "list[Record]", name: str, form: Callable[[float], str]) -> str | None:
    """A figure of an epoch: of several networks the range, the better end first; None where it was
    not measured."""
    measured = [value for record in records if (value := getattr(record, name)) is not None]
    values = [value for value in measured if math.isfinite(value)]
    if not measured:
        return None
    if not values:
        return "not finite"
    low, high = form(min(values)), form(max(values))
    shown = f"{low} to {high}" if name.endswith("loss") else f"{high} to {low}"
    lost = len(measured) - len(values)
    return (low if low == high else shown) + (f" ({lost} not finite)" if lost else "")


def _describe(records: "list[Record]") -> str:
    """One line for an epoch; of several networks, best to worst of each figure."""
    if not records:
        return "no network is left"
    loss = _figure(records, "train_loss", "{:.4f}".format)
    accuracy = _figure(records, "train_accuracy", _percent)
    line = f"epoch {records[0].epoch:>3}  loss {loss}  accuracy {accuracy}"
    if valid := _figure(records, "valid_accuracy", _percent):
        line += f"  validation {valid}"
    if len(records) > 1:
        line += f"  ({len(records)} networks, best to worst)"
    return f"{line}  {records[0].seconds:.2f} s"


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
        figures = "  ".join(
            f"{name} {_percent(run[f'{part}_accuracy'])}"
            for part, name in (("test", "test"), ("valid", "validation"), ("train", "training"))
            if run[f"{part}_accuracy"] is not None
        )
        if "epochs_to_target" in run:
            reached = run["epochs_to_target"]
            figures += f"  target {f'reached in epoch {reached}' if reached else 'not reached'}"
        print(f"  {run['run']}, seed {run['seed']}: {figures}  {run['ended'] or ''}".rstrip())
    if "runs" in metrics:
        kept = metrics["weights"]
        why = f": {kept['chosen_by']}" if "chosen_by" in kept else ""
        print(f"weights.pkl is {kept['run']}, seed {kept['seed']}{why}")
    speed = metrics["samples_per_second"] or 0
    print(
        f"{metrics['parameters']:,} parameters, {metrics['epochs']} epochs,"
        f" {metrics['seconds']:.1f} s of training ({speed:,.0f} samples/s) on {metrics['device']}"
    )
    names = (
        *("weights.pkl", "curves.png", "first-layer.png", "confusion.png", "mistakes.png"),
        "metrics.json",
    )
    print(f"{folder}: {', '.join(name for name in names if (folder / name).exists())}")


def _require(metrics: dict[str, Any], bar: float | None) -> None:
    """Exit with 1 where every network diverged or the accuracy bar was missed."""
    networks = metrics.get("runs", [metrics])
    if all(network["diverged"] for network in networks):
        every = f"all {len(networks)} networks diverged; lower train.optimizer.learning_rate"
        print(f"error: {metrics['ended'] or every}", file=sys.stderr)
        raise typer.Exit(1)
    if bar is not None and (metrics["test_accuracy"] is None or metrics["test_accuracy"] < bar):
        if metrics["test_accuracy"] is None:
            said = "there is no test accuracy to compare with --require-accuracy"
        else:
            said = f"test accuracy {_percent(metrics['test_accuracy'])} is below {_percent(bar)}"
        print(f"error: {said}", file=sys.stderr)
        raise typer.Exit(1)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
