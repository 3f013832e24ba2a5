"""Predictions of CSV and idx files, summaries, and the doctor."""

import gzip
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn import doctor, load_config, load_weights, network, predict_file
from manualnn.data import Asked, Normalization, load, open_table, read_examples, read_table
from manualnn.errors import InputError
from manualnn.experiment import Run

from .conftest import write_folder, write_idx


def pixels(path: Path) -> np.ndarray:
    return read_examples(path).flatten(1).numpy()


def write_csv(path: Path, rows: np.ndarray, header: str = "") -> Path:
    np.savetxt(path, rows, fmt="%g", delimiter=",", header=header, comments="")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of data and a run that was trained on it."""
    root = tmp_path_factory.mktemp("predict")
    folder = write_folder(root / "data")
    layers = 'model.layers=[["linear", 8], ["relu"], ["linear", "classes"]]'
    sets = [layers, "train.epochs=3", "train.batch_size=32", "data.valid=0"]
    run = Run(load_config("mnist-mlp", sets, {"data.dir": str(folder)}), root / "run", "cpu")
    for _ in run.train():
        pass
    return root


def test_csv_and_idx_give_the_same_lines_and_evaluates_accuracy(trained, run, tmp_path):
    idx = trained / "data" / "t10k-images-idx3-ubyte"
    rows = pixels(idx)
    labels = load("idx", trained / "data").test.labels.numpy()
    write_csv(tmp_path / "plain.csv", rows)
    write_csv(tmp_path / "header.csv", rows, ",".join(f"pixel{i}" for i in range(36)))
    write_csv(tmp_path / "labels.csv", np.c_[labels, rows], "label," + ",".join(["p"] * 36))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx.read_bytes()))
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress((tmp_path / "plain.csv").read_bytes()))
    (tmp_path / "windows.csv").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "plain.csv").read_bytes().replace(b"\n", b"\r\n") + b"\r\n"
    )
    code, expected, err = run("predict", trained / "run", idx)
    assert code == 0, err
    assert len(expected.splitlines()) == 60
    for name in (
        "plain.csv",
        "header.csv",
        "labels.csv",
        "packed.gz",
        "table.csv.gz",
        "windows.csv",
    ):
        code, out, err = run("predict", trained / "run" / "weights.pkl", name, "--out", "p.txt")
        assert (code, out) == (0, f"p.txt: 60 predictions of {trained}/run/weights.pkl\n"), err
        assert Path("p.txt").read_text() == expected, name
        assert ("is the label; it is ignored" in err) == (name == "labels.csv")
    code, out, _ = run("evaluate", trained / "run", "--json")
    found = np.array([int(line) for line in expected.split()])
    assert (found == labels).mean() == json.loads(out)["accuracy"]


def test_probabilities(trained, run):
    idx = trained / "data" / "t10k-images-idx3-ubyte"
    _, out, _ = run("predict", trained / "run", idx, "--probabilities")
    table = np.array([[float(v) for v in line.split(",")] for line in out.splitlines()])
    classes, p = predict_file(trained / "run", idx)
    assert table.shape == (60, 5)
    assert np.array_equal(table[:, 0], classes.numpy())
    assert np.array_equal(table[:, 1:].astype(np.float32), p.float().numpy())
    np.testing.assert_allclose(table[:, 1:].sum(1), 1, rtol=1e-6)
    assert np.array_equal(table[:, 1:].argmax(1), table[:, 0])


def test_logistic_predictions_have_two_probabilities(tmp_path):
    folder = write_folder(tmp_path / "two", classes=2)
    sets = ["data.valid=0", "train.epochs=2", 'model.layers=[["linear", 1]]', "train.loss=logistic"]
    config = load_config("mnist-mlp", sets, {"data.dir": str(folder)})
    for _ in Run(config, tmp_path / "run", "cpu").train():
        pass
    classes, p = predict_file(tmp_path / "run", folder / "t10k-images-idx3-ubyte")
    assert p.shape == (60, 2) and classes.equal((p[:, 1] > 0.5).long())
    assert set(classes.tolist()) == {0, 1}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    header=st.booleans(),
    whole=st.booleans(),
    data=st.data(),
)
def test_a_table_is_read_as_it_was_written(tmp_path_factory, rows, columns, header, whole, data):
    number = st.integers(0, 255) if whole else st.floats(-1e6, 1e6, width=32)
    size = rows * columns
    values = np.array(data.draw(st.lists(number, min_size=size, max_size=size)))
    values = values.reshape(rows, columns)
    path = tmp_path_factory.getbasetemp() / "table.csv"
    text = "\n".join(",".join(repr(v) for v in row) for row in values.tolist())
    path.write_text((",".join(["name"] * columns) + "\n" if header else "") + text)
    asked = Asked(header="yes" if header else "no")  # as 0,1,2 could be either
    found, names = open_table(path, asked).values, open_table(path, asked).header
    assert np.array_equal(found.numpy().astype(np.float32), values.astype(np.float32))
    assert names == (["name"] * columns if header else None)
    if whole:
        assert found.dtype == torch.uint8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no examples"),
        ("a,b,c\n", "holds no examples"),
        ("1,2,3\n4,5\n", "line 2: has 2 columns, the first line has 3"),
        ("a,b\n\n1,2\n3,x\n", "line 4, column 2: 'x' is not a finite number"),
        ("1,2\n3,nan\n", "line 2, column 2: 'nan' is not a finite number"),
        ("1,2\n3,1e99\n", "line 2, column 2: '1e99' is not a finite number"),
        ("1,2\n3,\n", "line 2, column 2: a value is missing"),
        ("a,b,c\n1,2\n", "line 2: has 2 columns, the first line has 3"),
        ("1,x,2\n3,4,5\n", "line 1, column 2: 'x' is not a finite number"),
        ("x,7,2\n3,4,5\n", "line 1, column 1: 'x' is not a finite number"),
        ("1,2\n1_0,3\n", "line 2, column 1: '1_0' is not a finite number"),
        ("1,2\n\uff11,3\n", "line 2, column 1: '\uff11' is not a finite number"),
        ('1,2\n"3,4\n', "line 2: has 1 columns, the first line has 2"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=f"t.csv: {message}"):
        read_examples(tmp_path / "t.csv")


def test_blank_lines_are_no_examples(tmp_path):
    (tmp_path / "t.csv").write_text("\n \na,b\n\n1,2\n\t\n3,4\n   \n")
    values, names = read_table(tmp_path / "t.csv")
    assert values.tolist() == [[1, 2], [3, 4]] and names == ["a", "b"]


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    (tmp_path / "packed.csv").write_bytes(gzip.compress(b"1,2\n3,4\n"))
    (tmp_path / "plain.gz").write_bytes(b"1,2\n3,4\n")
    for name in ("packed.csv", "plain.gz"):
        assert read_examples(tmp_path / name).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("at", [0, 3000])
def test_a_damaged_gzip_stream_is_one_line(tmp_path, at):
    numbers = np.random.default_rng(0).integers(0, 255, (500, 30))
    packed = bytearray(gzip.compress(write_csv(tmp_path / "t.csv", numbers).read_bytes()))
    packed[10 + at : 14 + at] = b"\xff" * 4
    (tmp_path / "t.gz").write_bytes(packed)
    with pytest.raises(InputError, match=r"t\.gz: "):
        read_examples(tmp_path / "t.gz")


@pytest.mark.parametrize(("value", "kind", "code"), [(np.nan, ">f4", 13), (1e300, ">f8", 14)])
def test_an_idx_value_that_is_not_finite(tmp_path, value, kind, code):
    images = np.zeros((3, 2, 2), kind)
    (tmp_path / "good").write_bytes(struct.pack(">4B3I", 0, 0, code, 3, 3, 2, 2) + images.tobytes())
    assert read_examples(tmp_path / "good").shape == (3, 2, 2)
    images[1, 0, 1] = value
    (tmp_path / "bad").write_bytes(struct.pack(">4B3I", 0, 0, code, 3, 3, 2, 2) + images.tobytes())
    with pytest.raises(InputError, match="bad: example 1 holds a value that is not finite"):
        read_examples(tmp_path / "bad")


def test_few_examples_are_normalised_at_a_time(trained, monkeypatch):
    idx = trained / "data" / "t10k-images-idx3-ubyte"
    expected, _ = predict_file(trained / "run", idx)
    sizes, apply = [], Normalization.apply
    monkeypatch.setattr(network, "CHUNK", 2)
    monkeypatch.setattr(
        Normalization, "apply", lambda self, x, dtype: sizes.append(len(x)) or apply(self, x, dtype)
    )
    classes, _ = predict_file(trained / "run", idx)
    assert classes.equal(expected)
    assert sizes == [16, 16, 16, 12]


def test_a_header_of_column_numbers(tmp_path):
    for header in ("label,1,2", "label,0,1", '"a","b","c"', " a , b , c "):
        (tmp_path / "t.csv").write_text(f"{header}\n7,8,9\n")
        values, names = read_table(tmp_path / "t.csv")
        assert values.tolist() == [[7, 8, 9]] and len(names) == 3


def test_bad_input_of_predict(trained, run, tmp_path):
    idx = trained / "data" / "t10k-images-idx3-ubyte"
    rows = pixels(idx)
    write_csv(tmp_path / "short.csv", rows[:, :35])
    write_csv(tmp_path / "good.csv", rows)
    write_idx(tmp_path / "large", np.zeros((3, 7, 7)))
    write_idx(tmp_path / "labels", np.zeros(3))
    (tmp_path / "cut").write_bytes(idx.read_bytes()[:-5])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(idx.read_bytes())[:-40])
    (tmp_path / "binary").write_bytes(os.urandom(64) + b"\xff\xfe")
    weights = trained / "run"
    for name, message in (
        ("short.csv", "has 35 columns, but"),
        ("large", "takes examples of shape (1, 6, 6), but those of large have shape (7, 7)"),
        ("labels", "holds no examples of one or more values each"),
        ("cut", "truncated"),
        ("cut.gz", "truncated or damaged gzip file"),
        ("binary", "binary"),
        ("nothing", "nothing: cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
    ):
        code, out, err = run("predict", weights, name, "--out", "new/p.txt")
        assert (code, out) == (2, ""), name
        assert message in err and len(err.strip().splitlines()) == 1, err
        assert not Path("new").exists()
    code, _, err = run("predict", weights, "good.csv", "--out", "good.csv/p.txt")
    assert code == 2 and "--out good.csv/p.txt: cannot be written" in err
    code, _, err = run("predict", "mnist-mlp", "good.csv")
    assert code == 2 and "has 36 columns, but" in err and "takes 784, or 785" in err
    code, _, err = run("predict", "mnist-mpl", "good.csv")
    assert code == 2 and "did you mean 'mnist-mlp'?" in err


def test_summary(trained, run):
    code, out, _ = run("summary", trained / "run", "--json")
    found = json.loads(out)
    assert [(row["name"], row["output_shape"], row["parameters"]) for row in found["layers"]] == [
        ("flatten", [36], 0), ("linear", [8], 36 * 8 + 8), ("relu", [8], 0), ("linear", [4], 36),
    ]  # fmt: skip
    count = sum(
        p.numel() for p in torch.load(trained / "run/weights.pkl").values() if torch.is_tensor(p)
    )
    assert found["parameters"] == 332 == count
    code, out, _ = run("summary", "mnist-student")
    assert code == 0 and "109,386" in out and "1 x 28 x 28" in out
    code, out, _ = run("summary", trained / "run")
    rows = [line.split() for line in out.splitlines()]
    assert ["2", "linear", "8", "296"] in rows and ["4", "linear", "4", "36"] in rows
    kind = load_weights(trained / "run/weights.pkl").meta["normalization"]["kind"]
    assert ["classes", "4"] in rows and ["normalization", kind] in rows
    code, out, _ = run("summary", trained / "run/config.toml")
    assert code == 0 and "332" in out
    code, _, err = run("summary", "mnist-studnt")
    assert code == 2 and "did you mean 'mnist-student'?" in err


def test_summary_of_every_shipped_weights_file():
    from manualnn.evaluation import summarise
    from manualnn.files import shipped

    for path in shipped("weights").glob("*.pkl"):
        layout = load_weights(path).network.layout
        assert summarise(path)["parameters"] == summarise(path.stem)["parameters"] == layout.count


def test_the_doctor(run, monkeypatch, tmp_path):
    code, out, _ = run("doctor")
    assert code == 0 and "all is well" in out
    assert f"torch          {torch.__version__}" in out and "a step works on" in out
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert report["problems"] == [] and "md5 right" in report["data"]["mnist"]
    assert "downloaded when it is asked for" in report["data"]["kmnist"]
    monkeypatch.setenv("MANUALNN_DATA", str(write_folder(tmp_path / "mine")))
    assert "(MANUALNN_DATA)" in json.loads(run("doctor", "--json")[1])["data"]["mnist"]


def test_the_doctor_finds_what_is_broken(run, monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "_torchvision", fail)
    monkeypatch.setattr(doctor, "local_folder", lambda name: tmp_path)
    report = doctor.examine()
    assert "operator torchvision::nms does not exist" in report["versions"]["torchvision"]
    assert "nothing here needs it" in report["versions"]["torchvision"]
    [problem] = report["problems"]
    assert problem.startswith("mnist: train-images-idx3-ubyte.gz")
    for path in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{path}-ubyte.gz").write_bytes(b"damaged")
    assert len(doctor.examine()["problems"]) == 3
    code, out, _ = run("doctor")
    assert code == 1 and "problem: mnist: " in out and "all is well" not in out
    monkeypatch.setattr(doctor, "find_weights", lambda name: Path("nowhere.pkl"))
    assert any(line.startswith("training: ") for line in doctor.examine()["problems"])


def test_the_doctor_on_a_damaged_folder_of_the_user(run, monkeypatch, tmp_path):
    folder = write_folder(tmp_path / "mine")
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    monkeypatch.setenv("MANUALNN_DATA", str(folder))
    report = doctor.examine()
    assert "truncated" in report["data"]["mnist"] and "otherwise" not in report["data"]["mnist"]
    assert sum(line.startswith("MANUALNN_DATA: ") for line in report["problems"]) == 1
    assert "mend the file or unset MANUALNN_DATA" in report["problems"][0]
    monkeypatch.setenv("MANUALNN_DATA", str(tmp_path / "nowhere"))
    assert doctor.examine()["problems"] == []


def test_the_doctor_without_matplotlib_and_with_an_error_of_many_lines(run, monkeypatch):
    def fail(*_, **__):
        raise ImportError("first\nsecond")

    monkeypatch.setattr(doctor, "_matplotlib", fail)
    monkeypatch.setattr(doctor, "dry_run", fail)
    code, out, _ = run("doctor")
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 1
    assert problems == [
        "problem: matplotlib cannot be imported (ImportError: first second); install it again",
        "problem: training: ImportError: first second",
    ]
