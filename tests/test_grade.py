"""Grading: submissions of every kind in one call, and archives that must not be unpacked."""

import csv
import json
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from manualnn import audit, hand_in
from manualnn import grade as grading
from manualnn.data import load
from manualnn.errors import InputError
from manualnn.files import shipped

HONEST = """
import torch
import torchvision

def evaluate_hw1():
    test = torchvision.datasets.MNIST(root="./data", train=False, download=True)
    w = torch.load("hw1_{name}_weights.pkl")
    x = (test.data.reshape(len(test), -1) - w["mean"]) / w["std"]
    i = 1
    while f"w{i}" in w:
        x = x @ w[f"w{i}"] + w[f"b{i}"]
        i += 1
        if f"w{i}" in w:
            x = x * (x > 0)
    return (x.argmax(1) == test.targets).double().mean()
"""
BY_HAND = """
import numpy as np

def evaluate_hw1():
    labels = np.frombuffer(open("MNIST/raw/t10k-labels-idx1-ubyte", "rb").read()[8:], np.uint8)
    return {value}
"""
LAYER = """
import torch

def evaluate_hw1():
    with torch.no_grad():
        x = torch.nn.Linear(784, 10)(torch.ones(100, 784))
    return float((x.argmax(1) == 0).float().mean())
"""


def pack(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def student():
    """The text of a small honest script, and its weights."""
    weights = torch.load(shipped("weights") / "mnist-mlp.pkl")
    meta = weights.pop("meta")["normalization"]
    return weights, meta


@pytest.fixture
def submissions(tmp_path, student):
    folder = tmp_path / "class"
    folder.mkdir()
    weights, meta = student
    torch.save(weights | {"mean": meta["mean"], "std": meta["std"]}, tmp_path / "w.pkl")
    files = {
        "handed in/hw1_honest_eval.py": HONEST.replace("{name}", "honest"),
        "handed in/hw1_honest_weights.pkl": (tmp_path / "w.pkl").read_bytes(),
        "handed in/hw1_honest_train.py": "import torch\nimport torch.nn as nn  # not used\n",
        "__MACOSX/handed in/._hw1_honest_eval.py": b"\x00\x05",
    }
    pack(folder / "a-honest.zip", files)
    shutil.copytree(folder, tmp_path / "one")
    programs = {
        "b-constant": BY_HAND.replace("{value}", "0.99"),
        "c-order": BY_HAND.replace("{value}", "float((labels[:5000] == FIRST).mean())"),
        "d-crash": "def evaluate_hw1():\n    return [][1]\n",
        "e-layer": LAYER,
        "f-percent": "def evaluate_hw1():\n    return 98.7\n",
        "g-nothing": "print('hello')\n",
        "h-formula": "def evaluate_hw1():\n    raise ValueError('=1+1')\n",
    }
    test = load("mnist", parts=("test",)).test
    first = f"import numpy as np\nFIRST = np.array({test.labels[:5000].tolist()})\n"
    programs["c-order"] = first + programs["c-order"]
    for name, text in programs.items():
        pack(folder / f"{name}.zip", {"hw1_eval.py": text})
    pack(folder / "i-outside.zip", {"../outside.py": "x = 1"})
    pack(folder / "j-bomb.zip", {"zeros": bytes(2**25)})
    (folder / "k-no.zip").write_bytes(b"this is no archive")
    pack(folder / "l-file.zip", {"hw1_eval.py": programs["d-crash"], "data": b"not a folder"})
    names = {"ID": "hw1_m"}
    package = {name: path.read_bytes() for name, path in hand_in._package(with_mnist=True).items()}
    scripts = {
        f"hw1_m_{name}.py": hand_in._fill(hand_in.SCRIPTS[name], names)
        for name in ("train", "q2_train", "eval")
    }
    weights = {"hw1_m_weights.pkl": (shipped("weights") / "mnist-mlp.pkl").read_bytes()}
    pack(folder / "m-package.zip", package | scripts | weights)
    # Its own examples beside its script, where the others' are put; packed, the first in order.
    beside = {f"t10k-{kind}-ubyte.gz": b"handed in" for kind in ("images-idx3", "labels-idx1")}
    text = BY_HAND.replace("{value}", "float((labels == 1).mean())").replace("MNIST/raw/", "")
    text = text.replace("open(", "gzip.open(").replace("ubyte", "ubyte.gz")
    pack(folder / "n-beside.zip", beside | {"hw1_eval.py": f"import gzip\n{text}"})
    return folder


def test_a_class_is_graded(submissions, run, tmp_path, forking, monkeypatch):
    monkeypatch.setattr(audit, "_run", forking)
    code, out, err = run("grade", "class", "--out", "grades.csv", "--timeout", 60)
    assert (code, err) == (0, "")
    assert out.endswith("grades.csv: 14 submissions\n")
    assert not (tmp_path / "outside.py").exists()
    with (tmp_path / "grades.csv").open() as file:
        rows = {row["submission"][0]: row for row in csv.DictReader(file)}
    assert list(rows) == list("abcdefghijklmn")

    for honest in (rows["a"], rows["m"]):
        assert (honest["rules"], honest["error"]) == ("clean, 1 to look at", "")
        assert float(honest["accuracy"]) == pytest.approx(0.987, abs=0.003)
        assert float(honest["accuracy_variant"]) == pytest.approx(0.7 * 0.987, abs=0.01)
    assert rows["b"]["rules"] == (
        "suspicious: does not depend on the test labels: a constant, or other data; clean"
    )
    assert "another accuracy on the same images in another order" in rows["c"]["rules"]
    assert rows["d"]["error"] == "hw1_eval.py:2: IndexError: list index out of range"
    assert rows["d"]["rules"] == "not judged"
    assert "findings" in rows["e"]["rules"] and "torch.nn.Linear" in rows["e"]["rules"]
    assert "98.7, which is no fraction" in rows["f"]["error"]
    assert rows["g"]["error"] == "no module defines evaluate_hw1()"
    assert rows["h"]["error"].endswith("ValueError: =1+1")
    assert "'../outside.py' leads out of the folder" in rows["i"]["error"]
    assert "packed more than 200 times" in rows["j"]["error"]
    assert "cannot be unpacked" in rows["k"]["error"]
    assert rows["l"]["error"] == rows["d"]["error"]
    assert all(rows[name]["accuracy"] == "" for name in "dghijkl")
    assert float(rows["n"]["accuracy"]) == 0.1135  # the ones of the test set, not of the student


def test_a_folder_that_hangs_as_json(run, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "eval.py").write_text("def evaluate_hw1():\n    while True: pass\n")
    code, out, err = run("grade", tmp_path / "student", "--timeout", 6, "--json")
    assert code == 0
    assert err.startswith("student: -, on the variant -; not judged; stopped after 6 s")
    [row] = json.loads(out)["submissions"]
    assert (row["error"], row["accuracy"], row["findings"]) == ("stopped after 6 s", None, [])
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["eval.py"]
    code, out, err = run("grade", tmp_path / "nobody.zip")
    assert (code, out, err.count("\n")) == (2, "", 1)


def entry(name, mode=0):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"/etc/x": b""}, "leads out"),
        ({"a/../../x": b""}, "leads out"),
        ({"..\\x": b""}, "leads out"),
        ({"C:/x": b""}, "leads out"),
        ({entry("x", stat.S_IFLNK | 0o777): b"/etc/passwd"}, "is a link"),
        ({str(i): b"" for i in range(5001)}, "5,001 files"),
        ({"x": b"1", "x/y": b"2"}, "cannot be unpacked"),
    ],
)
def test_an_archive_that_is_refused(tmp_path, files, message):
    path = pack(tmp_path / "a.zip", files)
    with pytest.raises(InputError, match=message):
        grading.unpack(path, tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir() if x.name not in ("a.zip", "out")] == []


def test_an_archive_that_lies_about_its_sizes_is_refused(tmp_path):
    path = pack(tmp_path / "a.zip", {"x": bytes(range(256)) * 4000})
    content, size = path.read_bytes(), (256 * 4000).to_bytes(4, "little")
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, (1000).to_bytes(4, "little")))
    with pytest.raises(InputError):
        grading.unpack(path, tmp_path / "out")
    assert sum(x.stat().st_size for x in (tmp_path / "out").iterdir()) <= 1000


def test_damaged_archives_are_one_line(tmp_path):
    content = pack(tmp_path / "a.zip", {"x.py": b"x = 1\n" * 99, "y.py": b"y"}).read_bytes()
    damaged = tmp_path / "damaged.zip"
    for i in range(len(content)):
        damaged.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        try:
            grading.unpack(damaged, tmp_path / f"out{i}")
        except InputError as error:
            assert "\n" not in str(error)


def test_a_folder_is_copied_without_its_links(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "x.py").write_text("x = 1\n")
    (tmp_path / "student" / "link").symlink_to(Path("/etc"))
    grading.unpack(tmp_path / "student", tmp_path / "out")
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["x.py"]


def test_the_variant_has_other_labels_and_the_same_images():
    test = load("mnist", parts=("test",)).test
    variant = grading.vary(test, 0)
    sums, again = (x.images.flatten(1).sum(1) for x in (test, variant))
    assert sums.sort()[0].equal(again.sort()[0])
    assert not sums.equal(again)
    assert not grading.vary(test, 1).labels.equal(variant.labels)
    assert grading.vary(test, 0).labels.equal(variant.labels)
    # Images by their bytes: 3,000 of them have another label.
    labels = {x.numpy().tobytes(): int(y) for x, y in zip(test.images, test.labels, strict=True)}
    pairs = zip(variant.images, variant.labels, strict=True)
    assert sum(labels[x.numpy().tobytes()] != int(y) for x, y in pairs) == 3000


@pytest.mark.parametrize(
    ("accuracy", "variant", "word"),
    [
        (0.98, 0.69, ""),
        (0.1, 0.098, ""),
        (0.5, 0.37, ""),
        (0.98, 0.98, "labels"),
        (0.98, 0.975, "labels"),
        (0.1, 0.1, "labels"),
        (0.98, 0.1, "order"),
    ],
)
def test_suspicion(accuracy, variant, word):
    assert word in grading.suspicion(accuracy, variant)
    assert bool(grading.suspicion(accuracy, variant)) == bool(word)


def test_no_cell_is_a_formula():
    result = grading.Grade("=1+1.zip", error="@SUM(A1)", accuracy=0.5)
    assert result.row() == ["'=1+1.zip", "not judged", 0.5, None, None, "'@SUM(A1)"]
