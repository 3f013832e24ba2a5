"""The zip: what it holds, and that its scripts run in an empty folder with torch alone."""

import gzip
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest

from manualnn import checklist, evaluate_weights, load_config, train
from manualnn import hand_in as packing
from manualnn.errors import InputError
from manualnn.files import shipped
from manualnn.hand_in import hand_in

from .conftest import write_folder

# What is installed in the environment of the tests, but not where the scripts shall run.
BLOCKED = "matplotlib typer rich tomli_w hypothesis pytest"


def run_alone(script, *arguments):
    """Run a script with none of this package's dependencies but torch, torchvision and numpy."""
    code = (
        "import runpy, sys\n"
        f"for name in {BLOCKED!r}.split(): sys.modules[name] = None\n"
        f"sys.argv = {[str(script), *map(str, arguments)]!r}\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MANUALNN"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd="/", timeout=300,
        env=environment | {"HOME": str(script.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def runs(run, tmp_path):
    """A short training on the bundled MNIST, and a memorisation."""
    sets = ["train.epochs=1", "data.train_samples=4000", "train.batch_size=64"]
    train(load_config("mnist-mlp", sets), tmp_path / "net", device="cpu")
    arguments = ["--samples", 40, "--epochs", 30, "--device", "cpu", "--out", "coins"]
    assert run("random-labels", *arguments)[0] == 0
    return [tmp_path / "net", tmp_path / "coins"]


def test_the_scripts_of_mnist_repeat_the_reports_figures(runs, run, tmp_path):
    os.utime(runs[0] / "weights.pkl", (0, 0))  # before what a zip can hold
    code, out, err = run("hand-in", *reversed(runs), "--id", "1234")  # in any order
    assert (code, err) == (0, "") and out.endswith(f"\nhw1_1234.zip: {runs[0]}, {runs[1]}\n")
    alone = tmp_path / "alone"
    with zipfile.ZipFile(tmp_path / "hw1_1234.zip") as archive:
        names = archive.namelist()
        assert {info.external_attr >> 16 & 0o777 for info in archive.infolist()} == {0o644}
        archive.extractall(alone)
    top = {name for name in names if "/" not in name}
    assert top == {
        "README.txt", "hw1_1234_train.py", "hw1_1234_train.toml", "hw1_1234_q2_train.py",
        "hw1_1234_q2_train.toml", "hw1_1234_eval.py", "hw1_1234_weights.pkl", "hw1_1234_report.pdf",
    }  # fmt: skip
    assert not any("configs" in name or "__pycache__" in name for name in names)
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert float(run_alone(alone / "hw1_1234_eval.py")) == metrics["test_accuracy"]
    (alone / "hw1_1234_weights.pkl").unlink()
    out = run_alone(alone / "hw1_1234_train.py")
    assert f"test accuracy {100 * metrics['test_accuracy']:.2f} %" in out
    assert float(run_alone(alone / "hw1_1234_eval.py")) == metrics["test_accuracy"]
    memorised = json.loads((runs[1] / "random-labels.json").read_text())
    out = run_alone(alone / "hw1_1234_q2_train.py")
    assert f"training loss {memorised['train_loss']:.4g}" in out
    assert f"test loss {memorised['test_loss']:.4f}" in out
    assert f"mean over the epochs {memorised['mean_test_loss']:.4f}" in out


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The three scripts, unpacked, with the shipped network and short trainings."""
    alone = tmp_path / "alone"
    alone.mkdir()
    names = {"ID": "hw1_1", "PLACES": ""}
    for script in ("train", "q2_train", "eval"):
        (alone / f"hw1_1_{script}.py").write_text(packing._fill(packing.SCRIPTS[script], names))
    short = ["train.epochs=1", "data.train_samples=100", "train.batch_size=50"]
    for script, name in (("train", "mnist-mlp"), ("q2_train", "mnist-random-labels")):
        (alone / f"hw1_1_{script}.toml").write_text(load_config(name, short).to_toml())
    shutil.copy(shipped("weights") / "mnist-mlp.pkl", alone / "hw1_1_weights.pkl")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return alone


def test_all_scripts_take_the_data_from_the_same_places(scripts, tmp_path, capsys):
    """The files beside them, MNIST/raw, data/MNIST/raw, what is packed: the first that holds what
    the script needs, of which the evaluation needs two."""

    def used(script, function="main"):
        names = runpy.run_path(str(scripts / f"hw1_1_{script}.py"))
        result = names[function]()
        err = capsys.readouterr().err.splitlines()
        [line] = [line for line in err if line.startswith("data: ")]
        return result, line.removeprefix("data: "), [x for x in err if x.startswith("note: ")]

    other = [write_folder(tmp_path / str(n), 200, 20 + n, 10, side=28) for n in range(3)]
    for place, source in (("data/MNIST/raw", other[0]), ("MNIST/raw", other[1])):
        shutil.copytree(source, scripts / place)
        for script in ("train", "q2_train"):
            assert used(script)[1] == str(scripts / place)
        accuracy, where, _ = used("eval", "evaluate_hw1")
        assert where == str(scripts / place)
        expected = evaluate_weights(scripts / "hw1_1_weights.pkl", "mnist", source).evaluation
        assert accuracy == expected.accuracy and len(expected.targets) == 20 + other.index(source)
    write_folder(tmp_path / "packed", 200, 25, 10, side=28, gz=True)
    for path in (tmp_path / "packed").glob("t10k-*"):  # half of the files, which evaluation needs
        shutil.copy(path, scripts)
    accuracy, where, _ = used("eval", "evaluate_hw1")
    own = evaluate_weights(scripts / "hw1_1_weights.pkl", "mnist", tmp_path / "packed").evaluation
    assert (accuracy, where) == (own.accuracy, str(scripts)) and len(own.targets) == 25
    _, where, notes = used("q2_train")
    assert where == str(scripts / "MNIST/raw") and "lacks train-images" in notes[0]
    for path in (tmp_path / "packed").glob("train-*"):
        shutil.copy(path, scripts)
    assert used("q2_train")[1:] == (str(scripts), [])


def test_the_csv_exercise_from_another_folder(run, tmp_path, monkeypatch):
    """Its tables, named from where it was trained, are found; or given where they are now."""
    write_folder(tmp_path / "data", side=8)
    run("data", "export-csv", "idx", "--data-dir", "data", "--out", "csv")
    small = ["--data", "csv", "--epochs", 1, "--device", "cpu"]
    for config in ("fashion-logistic", "fashion-nn"):
        assert run("train", config, *small, "--set", "train.batch_size=16")[0] == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    both = [tmp_path / "runs" / name for name in ("fashion-logistic", "fashion-nn")]
    arguments = ["hand-in", *both, "--exercise", "fashion", "--id", "1", "--out", "1.zip"]
    code, _, err = run(*arguments)
    assert code == 0, err
    (tmp_path / "csv").rename(tmp_path / "moved")
    code, _, err = run(*arguments)
    assert code == 2 and "its data are not at csv: give --data-dir" in err.splitlines()[-1]
    code, _, err = run(*arguments, "--data-dir", tmp_path / "moved")
    assert code == 0, err
    with zipfile.ZipFile("1.zip") as archive:
        assert len(archive.read("NN_pred.csv").split()) == 72


def test_the_archive_of_the_csv_exercise(run, tmp_path):
    write_folder(tmp_path / "data", side=8)
    run("data", "export-csv", "idx", "--data-dir", "data", "--out", "csv")
    sets = ["--set", "train.epochs=2", "--set", "train.batch_size=16", "--device", "cpu"]
    train_it = ["train", "fashion-logistic", "--data", tmp_path / "csv"]
    assert run(*train_it, "--epochs", 1)[0] == 0  # an attempt, of which the next takes the place
    assert run(*train_it, *sets)[0] == 0
    train_it = ["train", "fashion-nn", "--data", tmp_path / "csv", "--set", "train.seeds=[0, 1]"]
    assert run(*train_it, *sets)[0] == 0  # the better of the two is handed in
    two = ["--set", "train.l2=[0, 0.1]"]
    assert run(*train_it[:4], *two, *sets)[0] == 0  # the newest, but of two networks
    (tmp_path / "notes.md").write_text("# Tried\nThis and that.\n")
    arguments = ["--exercise", "fashion", "--id", "12_34", "--notes", "notes.md"]
    code, out, err = run("hand-in", *arguments)
    assert code == 0, err
    assert out.endswith("\n12_34.zip: runs/fashion-logistic-2, runs/fashion-nn\n")
    for line in (
        "\u2717 findings of a sweep for runs/fashion-nn: none of fashion-nn on these data;",
        "\u2717 author: none; give --author",
        "\u2713 summary of attempts and conclusions: notes.md\n",
        "\u2713 at most 2 pages: 2, the derivation included\n",
        "\u2717 names of the classes: numbers; give --class-names",
        "\u2713 file names: 12_34.zip, train.py, lr_pred.csv, NN_pred.csv, 12_34_report.pdf\n",
    ):  # fmt: skip
        assert line in out
    alone = tmp_path / "alone"
    with zipfile.ZipFile(tmp_path / "12_34.zip") as archive:
        archive.extractall(alone)
    with gzip.open(tmp_path / "csv" / "test.csv.gz", "wb") as packed:
        packed.write((tmp_path / "csv" / "test.csv").read_bytes())
    (tmp_path / "csv" / "test.csv").unlink()
    for arguments, text in (
        ((), "python train.py lr|NN FOLDER"),
        (("lr", "no"), "error: lr: no is not a folder"),
    ):
        with pytest.raises(AssertionError, match=re.escape(text)) as caught:
            run_alone(alone / "train.py", *arguments)
        assert "Traceback" not in str(caught.value)
    for name in ("lr", "NN"):
        before = (alone / f"{name}_pred.csv").read_text()
        assert len(before.split()) == 72 and set(before.split()) <= set("0123")
        assert str(tmp_path) not in (alone / f"{name}.toml").read_text()
        (alone / f"{name}_pred.csv").unlink()
        run_alone(alone / "train.py", name, tmp_path / "csv")
        assert (alone / f"{name}_pred.csv").read_text() == before
    assert (alone / "12_34_report.pdf").read_bytes().startswith(b"%PDF")


def test_the_assignment_is_checked_before_it_is_packed(runs, run, tmp_path, monkeypatch):
    asked = ["--id", "1", *runs, "--strict"]
    result = json.loads((runs[1] / "random-labels.json").read_text())
    (runs[1] / "random-labels.json").write_text(json.dumps(result | {"train_loss": 0.02}))
    code, out, err = run("hand-in", *asked, "--out", "other.zip")
    ticks = {line[2:].partition(":")[0]: line[0] for line in out.splitlines()}
    assert (code, err) == (1, "error: 4 of 6 missed; nothing is packed\n")
    assert not list(tmp_path.glob("*.zip"))
    assert ticks == {
        "test accuracy at least 75 %": "\u2713",
        "training loss on random labels below 0.01": "\u2717",
        "author": "\u2717",
        "summary of attempts and conclusions": "\u2717",
        "at most 2 pages": "\u2713",
        "file names": "\u2717",
    }
    assert "the archive is called other.zip, not hw1_1.zip" in out
    assert "summary of attempts and conclusions: none; give --notes FILE.md" in out
    (runs[1] / "random-labels.json").write_text(json.dumps(result | {"train_loss": 0.009}))
    (tmp_path / "notes.md").write_text("Tried $x$.\n")
    code, out, err = run("hand-in", *asked, "--author", "Ada", "--notes", "notes.md")
    assert (code, err) == (0, "") and "\u2717" not in out and out.count("\u2713") == 6
    with zipfile.ZipFile(tmp_path / "hw1_1.zip") as archive:
        assert pages(archive.read("hw1_1_report.pdf")) == 2  # the derivation included
    code, out, _ = run("hand-in", *asked[:-1], "--derivation-page", "--title", "By hand")
    assert code == 0 and "\u2713 at most 2 pages: 2, and one with the derivation" in out
    with zipfile.ZipFile(tmp_path / "hw1_1.zip") as archive:
        assert pages(archive.read("hw1_1_report.pdf")) == 3
    (tmp_path / "notes.md").write_text(" \n")
    assert "notes.md is empty" in run("hand-in", *asked, "--notes", "notes.md")[1]
    monkeypatch.setattr(checklist.sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    lines = [checklist.line(checklist.Check("a", passed, "b")) for passed in (True, False)]
    assert lines == ["ok a: b", "NO a: b"]


def pages(content):
    return len(re.findall(rb"/Type\s*/Page\b", content))


def test_what_is_refused(runs, tmp_path, run):
    for arguments, text in (
        (["--id", "1"], "no finished run there; first: manualnn train"),
        (["--id", "1", runs[0]], "a hand-in has two runs, not 1: a run of train, and one of"),
        (["--id", "../x", *runs], "--id ../x: letters, digits and _ only"),
        (["--id", "1", "--exercise", "art", *runs], "--exercise art: use mnist or fashion"),
        (["--id", "1", *runs, "--out", "net/metrics.json/x.zip"], "cannot be written"),
    ):
        code, out, err = run("hand-in", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err
    write_folder(tmp_path / "data")
    run("train", "--data", "data/", "--epochs", 1, "--device", "cpu", "--out", "other")
    for layers in ("[['linear', 'classes']]", "[['linear', 8], ['relu'], ['linear', 'classes']]"):
        sets = ["--set", f"model.layers={layers}", "--epochs", 1, "--device", "cpu"]
        run("train", "--data", "data/", *sets, "--out", "linear" if "8" not in layers else "deep")
    for first, second, exercise, text in (
        (*runs, "mnist", "no.md: cannot be read"),
        ("other", "other", "mnist", "a hand-in has a run of train, and one of random-labels"),
        ("deep", "other", "fashion", "has a softmax regression, and a network with a hidden layer"),
        ("deep", "linear", "fashion", "linear: not trained on CSV files"),
    ):
        arguments = ["--id", "1", "--exercise", exercise, "--notes", "no.md"]
        code, out, err = run("hand-in", first, second, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err
    code, out, err = run("hand-in", "other", runs[1], "--id", "1")
    assert (code, out) == (2, "") and "not measured on MNIST's test set" in err
    config = load_config("mnist-mlp", ["train.epochs=1", "data.train_samples=640"])
    tree = config.to_dict()
    tree["train"]["l2"] = [0.0, 0.1]
    from manualnn.config import parse_config

    train(parse_config(tree, "two"), tmp_path / "two", device="cpu")
    with pytest.raises(InputError, match="holds 2 networks; hand in a run of one, or of its seeds"):
        hand_in("1", runs=[tmp_path / "two", runs[1]])
    assert not list(tmp_path.glob("*.zip"))
