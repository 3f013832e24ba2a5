"""What a course asks to be handed in, as one zip: scripts, weights, report, and all they need.

The scripts run in an empty folder where only torch and torchvision are installed: the package and
MNIST lie beside them.
"""

import re
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .checklist import Check, check_mnist, check_names, check_report, check_sweeps
from .config import Config
from .errors import InputError
from .files import PACKAGE, replacing, writing
from .find import RUNS, runs_called
from .places import run_config
from .report import Options, class_names_of, write
from .results import best_of, by_label, read_run
from .sweep import write_predictions

EXERCISES = {
    "mnist": ("mnist-mlp", "mnist-random-labels"),
    "fashion": ("fashion-logistic", "fashion-nn"),
}
ROLES = {
    "mnist": ("a run of train", "one of random-labels"),
    "fashion": ("a softmax regression", "a network with a hidden layer"),
}
# What is to be handed in, by name; the report's and the weights' are part of it.
NAMES = {
    "mnist": (
        *("hw1_ID_train.py", "hw1_ID_q2_train.py", "hw1_ID_eval.py", "hw1_ID_weights.pkl"),
        "hw1_ID_report.pdf",
    ),
    "fashion": ("train.py", "lr_pred.csv", "NN_pred.csv", "ID_report.pdf"),
}
COMMANDS = {
    "mnist-mlp": "manualnn train",
    "mnist-random-labels": "manualnn random-labels",
    "fashion-logistic": "manualnn train fashion-logistic --data FOLDER",
    "fashion-nn": "manualnn train fashion-nn --data FOLDER",
}


@dataclass(frozen=True)
class HandIn:
    """What was packed: the archive (None where a check was missed and the hand-in is to be strict),
    from which runs, and how it meets the assignment."""

    path: Path | None
    runs: list[Path]
    checks: list[Check]


def hand_in(
    identity: str,
    exercise: str = "mnist",
    runs: Sequence[Path | str] = (),
    out: Path | str | None = None,
    author: str = "",
    notes: Path | str | None = None,
    title: str = "",
    class_names: Sequence[str] = (),
    derivation_page: bool = False,
    strict: bool = False,
    data_dir: Path | str | None = None,
) -> HandIn:
    """Write the zip of an exercise from two finished runs, by default those its commands leave,
    after checking it against the assignment; a `strict` one is only written if it has all.

    "mnist": `hw1_ID_train.py`, `hw1_ID_q2_train.py` (random labels), `hw1_ID_eval.py` with
    `evaluate_hw1()`, weights and report. "fashion": code, report, `lr_pred.csv`, `NN_pred.csv`.
    Author, notes and so on are as for `report`. Runs and errors are as in `choose`.
    """
    out = Path(out) if out is not None else None
    notes = Path(notes) if notes is not None else None
    if not re.fullmatch(r"\w+", identity, re.ASCII):
        raise InputError(f"--id {identity}: letters, digits and _ only; it becomes part of names")
    folders = choose(exercise, [Path(run) for run in runs])
    collect = _mnist if exercise == "mnist" else _fashion
    name = f"{'hw1_' if exercise == 'mnist' else ''}{identity}.zip"
    path = out or Path(name)
    options = Options(
        author or identity.replace("_", ", "),
        notes,
        derivation=True,
        title=title,
        class_names=tuple(class_names),
        derivation_page=derivation_page,
        data_dir=data_dir,
    )
    with tempfile.TemporaryDirectory() as temporary:
        files, pages = collect(identity, folders, options, Path(temporary))
        checks = list(check_mnist(folders) if exercise == "mnist" else check_sweeps(folders))
        names = []
        if exercise == "fashion":
            names = class_names_of(folders[0], options)
        checks += check_report(author, notes, pages, derivation_page, names)
        wanted = [file.replace("ID", identity) for file in NAMES[exercise]]
        checks.append(check_names(wanted, list(files), path, name))
        if strict and not all(check.passed for check in checks):
            return HandIn(None, folders, checks)
        files |= _package(with_mnist=exercise == "mnist")
        with (
            writing(f"--out {path}"),
            replacing(path) as unfinished,
            zipfile.ZipFile(
                unfinished, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False
            ) as archive,
        ):
            for file, content in sorted(files.items()):
                if isinstance(content, Path):
                    archive.write(content, file)
                else:
                    entry = zipfile.ZipInfo(file, time.localtime()[:6])
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    entry.external_attr = 0o644 << 16  # readable by whoever unpacks it
                    archive.writestr(entry, content)
    return HandIn(path, folders, checks)


def choose(exercise: str, runs: Sequence[Path] = ()) -> list[Path]:
    """The two runs of an exercise in the order in which it asks for them: those given, in any
    order, or the newest that suit of those its commands left. Raises InputError where they do not.
    """
    if exercise not in EXERCISES:
        raise InputError(f"--exercise {exercise}: use {' or '.join(EXERCISES)}")
    names = EXERCISES[exercise]
    first, second = ROLES[exercise]
    if len(runs) not in (0, 2):
        raise InputError(f"a hand-in has two runs, not {len(runs)}: {first}, and {second}")
    is_second = _is_memorised if exercise == "mnist" else _is_deep
    folders = list(runs)
    if not runs:
        for name, wanted in zip(names, (False, True), strict=True):
            found = runs_called(name, "metrics.json")
            single = [folder for folder in found if len(by_label(read_run(folder))) == 1]
            suits = [folder for folder in single if is_second(folder) == wanted]
            folders.append([*suits, *found, RUNS / name][0])
    for folder, name in zip(folders, names, strict=True):
        if not (folder / "metrics.json").is_file():
            raise InputError(f"{folder}: no finished run there; first: {COMMANDS[name]}")
    folders.sort(key=is_second)
    if [is_second(folder) for folder in folders] != [False, True]:
        raise InputError(f"{folders[0]}, {folders[1]}: a hand-in has {first}, and {second}")
    return folders


def _is_memorised(folder: Path) -> bool:
    return (folder / "random-labels.json").is_file()


def _is_deep(folder: Path) -> bool:
    layers = read_run(folder)[0].config.model.layers
    return sum(layer[0] == "linear" for layer in layers) > 1


Files = dict[str, Path | str]
PLACES = """The data are the idx files beside this file (plain or .gz), in MNIST/raw or in
data/MNIST/raw, else those packed."""


def _mnist(
    identity: str, folders: list[Path], options: Options, temporary: Path
) -> tuple[Files, int]:
    """The files of the exercise without the package, and how many pages the report has."""
    names = {"ID": f"hw1_{identity}", "PLACES": PLACES}
    files: Files = {}
    for folder, script in zip(folders, ("train", "q2_train"), strict=True):
        config = _single(folder)
        if config.data.name != "mnist" or read_run(folder)[0].figures["test_accuracy"] is None:
            raise InputError(f"{folder}: not measured on MNIST's test set, which the scripts do")
        files[f"{names['ID']}_{script}.toml"] = _portable(config).to_toml()
        files[f"{names['ID']}_{script}.py"] = _fill(SCRIPTS[script], names)
    files[f"{names['ID']}_eval.py"] = _fill(SCRIPTS["eval"], names)
    files[f"{names['ID']}_weights.pkl"] = folders[0] / "weights.pkl"
    files["README.txt"] = _fill(SCRIPTS["readme"], names)
    pdf = temporary / "report.pdf"
    files[f"{names['ID']}_report.pdf"] = pdf
    return files, write(folders, pdf, options)


def _fashion(
    identity: str, folders: list[Path], options: Options, temporary: Path
) -> tuple[Files, int]:
    """As `_mnist`, of the other exercise."""
    configs = [_single(folder, options.data_dir) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.data.name != "csv":
            raise InputError(f"{folder}: not trained on CSV files, which the exercise asks for")
    commands = f"# How to run\n{SCRIPTS['fashion_commands']}\n"
    files: Files = {
        "README.txt": _fill(SCRIPTS["fashion"], {}),
        "train.py": _fill(SCRIPTS["fashion_train"], {}),
    }
    pdf = temporary / "report.pdf"
    files[f"{identity}_report.pdf"] = pdf
    pages = write(folders, pdf, replace(options, preface=commands))
    for folder, config, name in zip(folders, configs, ("lr", "NN"), strict=True):
        predictions = write_predictions(folder, config.data)
        if predictions is None:
            raise InputError(f"{folder}: its data have no test.csv to predict")
        files[f"{name}_pred.csv"] = predictions
        files[f"{name}.toml"] = _portable(config).to_toml()
        files[f"{name}_weights.pkl"] = folder / "weights.pkl"
    return files, pages


def _single(folder: Path, data_dir: Path | str | None = None) -> Config:
    """The config of a run's network; of several that differ in their seed alone, of the one in
    weights.pkl."""
    networks = read_run(folder, data_dir)
    if len(by_label(networks)) > 1:
        raise InputError(
            f"{folder}: holds {len(networks)} networks; hand in a run of one, or of its seeds"
        )
    [member] = run_config(folder, data_dir).members()
    seed = best_of(folder, networks).replica.seed
    return replace(member, train=replace(member.train, seeds=None, seed=seed))


def _portable(config: Config) -> Config:
    """Without the places where its data lie on this machine."""
    return replace(config, data=replace(config.data, dir=None, train=None, test=None))


def _package(with_mnist: bool) -> Files:
    """The sources of this package, and MNIST; without the audit, which names what is forbidden."""
    patterns = ["**/*.py", *(["data/mnist/*.gz"] if with_mnist else [])]
    found = [x for p in patterns for x in PACKAGE.glob(p) if x.parent != PACKAGE / "audit"]
    return {f"manualnn/{path.relative_to(PACKAGE).as_posix()}": path for path in found}


def _fill(text: str, names: dict[str, str]) -> str:
    for key, value in names.items():
        text = text.replace(f"{{{key}}}", value)
    return text.lstrip("\n")


SCRIPTS = {
    "train": '''
"""Trains the network from scratch on MNIST: every gradient is derived by hand, without autograd.

    python {ID}_train.py

It prints each epoch, and writes {ID}_weights.pkl as in the report. The mathematics is in
manualnn/layers.py, losses.py and optimizers.py, the loop in training.py.

{PLACES}
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the package lies beside this file

from manualnn.config import load_config
from manualnn.data.beside import find_mnist
from manualnn.errors import InputError
from manualnn.experiment import train_single


def main():
    data = {"data.dir": str(find_mnist(HERE))}
    config = load_config(HERE / "{ID}_train.toml", flags=data)
    training = train_single(config, HERE / "{ID}_weights.pkl")
    [last] = training.last_records()
    print(f"test accuracy {100 * last.test_accuracy:.2f} %, test loss {last.test_loss:.4f}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
''',
    "q2_train": '''
"""Memorises random labels: training loss near 0, test loss far above a uniform guess.

    python {ID}_q2_train.py

{PLACES}
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the package lies beside this file

from manualnn.config import load_config
from manualnn.data.beside import find_mnist
from manualnn.errors import InputError
from manualnn.experiment import train_single


def main():
    data = {"data.dir": str(find_mnist(HERE))}
    config = load_config(HERE / "{ID}_q2_train.toml", flags=data)
    training = train_single(config)
    [(train_loss, train_accuracy)] = training.measure(training.data.train)
    [(test_loss, _)] = training.measure(training.data.test)
    losses = [r.test_loss for r in training.records if r.test_loss is not None]
    print(f"training loss {train_loss:.4g}, accuracy {100 * train_accuracy:.2f} %")
    print(f"test loss {test_loss:.4f}, mean over the epochs {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
''',
    "eval": '''
"""Measures the trained network on the MNIST test set.

    python {ID}_eval.py

The weights lie beside this file.

{PLACES}
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the package lies beside this file

from manualnn.data.beside import find_mnist
from manualnn.errors import InputError
from manualnn.evaluation import evaluate_weights


def evaluate_hw1():
    """The accuracy in [0, 1] on the test images."""
    data = find_mnist(HERE, ("test",))
    found = evaluate_weights(HERE / "{ID}_weights.pkl", "mnist", data)
    return found.evaluation.accuracy


if __name__ == "__main__":
    try:
        print(evaluate_hw1())
    except InputError as error:
        sys.exit(f"error: {error}")
''',
    "readme": """
{ID}_train.py      trains the network from scratch and writes {ID}_weights.pkl
{ID}_eval.py       evaluate_hw1(): the accuracy of these weights on the MNIST test set
{ID}_q2_train.py   trains on random labels
{ID}_report.pdf    the report
{ID}_*.toml        the settings of both trainings
manualnn/          the implementation, and MNIST (CC BY-SA 3.0, see yann.lecun.com/exdb/mnist)

MNIST is read from the first place that holds the files which a script needs: its own folder (the
idx files, plain or .gz), MNIST/raw or data/MNIST/raw in it, else manualnn/data/mnist. The script
says which it was. Only torch and torchvision are needed, and no network connection.
""",
    "fashion_commands": """
- Put train.csv and test.csv into one FOLDER; torch and torchvision are installed.
- `python train.py lr FOLDER` trains the logistic regression and writes lr_pred.csv.
- `python train.py NN FOLDER` trains the network with one hidden layer and writes NN_pred.csv.
""",
    "fashion_train": '''
"""Trains on train.csv and predicts test.csv: python train.py lr|NN FOLDER"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the package lies beside this file

from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.evaluation import predict_file, prediction_lines
from manualnn.experiment import train_single


def main(name, folder):
    weights, flags = HERE / f"{name}_weights.pkl", {"data.name": "csv", "data.dir": folder}
    train_single(load_config(HERE / f"{name}.toml", flags=flags), weights)
    classes, _ = predict_file(weights, None, data="csv", data_dir=folder)
    lines = prediction_lines(classes)
    (HERE / f"{name}_pred.csv").write_text("\\n".join([*lines, ""]))
    print(f"{name}_pred.csv: {len(lines)} predictions")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("lr", "NN"):
        sys.exit(__doc__.strip())
    try:
        main(*sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
''',
    "fashion": """
train.py            python train.py lr FOLDER and python train.py NN FOLDER train from scratch
lr.toml, NN.toml    their settings
lr_pred.csv         predictions of the logistic regression for test.csv, one class per line
NN_pred.csv         predictions of the network with one hidden layer
*_report.pdf        the report
manualnn/           the implementation: gradients derived by hand, torch tensors, no autograd

Only torch and torchvision are needed.
""",
}
