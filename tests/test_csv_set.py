"""CSV data sets: exported, read, cached, trained on, and what is wrong with them named."""

import json

import numpy as np
import pytest
import torch

from manualnn.config import load_config
from manualnn.data import export_csv, load, table
from manualnn.errors import InputError
from manualnn.files import cache_folder

from .conftest import write_folder


@pytest.fixture
def exported(tmp_path):
    """A data set of 300 + 60 images of 8 x 8, and its files as CSV."""
    dataset = load("idx", write_folder(tmp_path / "data", side=8))
    assert export_csv(dataset, tmp_path / "csv", seed=3) == {
        "train.csv": 288, "test.csv": 72, "test_labels.csv": 72,
    }  # fmt: skip
    return dataset, tmp_path / "csv"


def test_an_export_holds_every_example_once(exported, capsys):
    dataset, folder = exported
    read = load("csv", folder)
    assert read.test is None and "test.csv: holds no labels" in capsys.readouterr().err
    assert read.train.images.shape == (288, 1, 8, 8) and read.train.images.dtype == torch.uint8
    features, header = table.read_table(folder / "test.csv")
    labels, _ = table.read_table(folder / "test_labels.csv")
    assert header[:2] == ["pixel1", "pixel2"] and features.shape == (72, 64)

    def lines(images, labels):
        return sorted(map(tuple, torch.cat([labels.view(-1, 1), images.flatten(1)], 1).tolist()))

    joined = lines(read.train.images, read.train.labels) + lines(features, labels)
    original = [
        p for part in (dataset.train, dataset.test) for p in lines(part.images, part.labels)
    ]
    assert sorted(joined) == sorted(original)
    assert not read.train.labels[:200].equal(dataset.train.labels[:200])  # in another order


def test_an_export_that_keeps_the_split(exported, tmp_path):
    dataset, _ = exported
    folder = tmp_path / "split"
    assert export_csv(dataset, folder, test=None)["test.csv"] == 60
    read, (features, _) = load("csv", folder), table.read_table(folder / "test.csv")
    assert read.train.images.sum() == dataset.train.images.sum()
    assert sorted(features.tolist()) == sorted(dataset.test.images.flatten(1).tolist())
    with pytest.raises(InputError, match="has no training and test part to keep apart"):
        export_csv(read, tmp_path / "again", test=None)


def test_an_exports_order_depends_on_its_seed(exported, tmp_path):
    dataset, folder = exported
    for seed, same in ((3, True), (4, False)):
        export_csv(dataset, tmp_path / str(seed), seed=seed)
        again = (tmp_path / str(seed) / "train.csv").read_bytes()
        assert (again == (folder / "train.csv").read_bytes()) == same
    with pytest.raises(InputError, match=r"--test 0.001 of 360 examples leaves test.csv empty"):
        export_csv(dataset, tmp_path / "e", test=0.001)


def test_the_header_says_where_the_label_is(exported, run, capsys):
    _, folder = exported
    first = load("csv", folder)
    lines = (folder / "train.csv").read_text().splitlines()
    moved = [line.split(",", 1) for line in lines]
    (folder / "train.csv").write_text("".join(f"{rest},{label}\n" for label, rest in moved))
    last = load("csv", folder)
    assert last.train.labels.equal(first.train.labels)
    assert last.train.images.equal(first.train.images)
    (folder / "test_labels.csv").write_text("id,label\n" + "".join(f"{i},3\n" for i in range(9)))
    (folder / "p.csv").write_text("id,Class\n" + "".join(f"{i},{i % 3 * 3}\n" for i in range(9)))
    score = ["evaluate", "--predictions", folder / "p.csv", "--labels"]
    code, out, _ = run(*score, folder / "test_labels.csv")
    assert code == 0 and "3 of 9 are right" in out
    code, _, err = run(*score, folder / "test.csv")
    assert code == 2 and "test.csv: which of its 64 columns is it? call one label" in err
    change(folder, "train.csv", 11, 65, "1.5")
    with pytest.raises(InputError, match=r"line 11, column 65: label 1.5 is no whole number"):
        load("csv", folder)


def test_what_a_field_is_instead_of_a_number(tmp_path):
    for line, text in (
        ("cat,1,2", "column 1: 'cat' is not a finite number; a label is a whole number from 0"),
        ("1,cat,2", "column 2: 'cat' is not a finite number"),
        ("0;1;2,3,4", "column 1: '0;1;2' is not one number; separate the columns by commas"),
    ):
        (tmp_path / "train.csv").write_text(f"1,2,3\n{line}\n")
        with pytest.raises(InputError) as caught:
            load("csv", tmp_path, ("train",))
        assert str(caught.value).endswith(f"train.csv: line 2, {text}")
    (tmp_path / "train.csv").write_bytes("1,2\n\u00e4,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"cannot be read as text: byte 5 is not UTF-8"):
        load("csv", tmp_path, ("train",))


def test_a_test_file_of_other_features(exported):
    _, folder = exported
    rows = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("".join(f"{row.rpartition(',')[0]}\n" for row in rows))
    with pytest.raises(InputError, match=r"test.csv: has 64 features, but the training file 63"):
        load("csv", folder)


def test_labels_of_few_examples_and_from_one(tmp_path, capsys):
    rows = "".join(f"{i % 26},{i},{i * i}.5\n" for i in range(520))
    (tmp_path / "train.csv").write_text(rows)
    (tmp_path / "test.csv").write_text("".join(rows.splitlines(keepends=True)[20:26]))
    assert load("csv", tmp_path).test.labels.tolist() == list(range(20, 26))
    assert not capsys.readouterr().err
    (tmp_path / "train.csv").write_text("1,2\n2,3\n")
    load("csv", {"train": str(tmp_path / "train.csv")}, ("train",))
    assert "labels begin at 1, so that classes below it have no" in capsys.readouterr().err


@pytest.mark.parametrize("pixels", [64, 256, 784, 1024])
def test_features_without_a_label_are_told_by_their_number(tmp_path, pixels):
    (tmp_path / "train.csv").write_text((",".join(["1"] * pixels) + "\n") * 3)
    with pytest.raises(InputError, match=f"has {pixels} columns, as features without a label"):
        load("csv", tmp_path, ("train",))
    (tmp_path / "train.csv").write_text((",".join(["1"] * (pixels + 1)) + "\n") * 3)
    assert load("csv", tmp_path, ("train",)).train.images[0].numel() == pixels


def test_labels_in_a_test_file_are_used(exported):
    _, folder = exported
    (folder / "test.csv").write_bytes((folder / "train.csv").read_bytes())
    read = load("csv", folder)
    assert read.test.images.equal(read.train.images) and read.class_names == tuple("0123")
    named = load("csv", {"train": str(folder / "train.csv")}, optional=("test",))
    assert named.test is None and named.train.labels.equal(read.train.labels)


def test_features_that_are_no_image(tmp_path):
    (tmp_path / "train.csv").write_text("0,1.5,2\n1,3,4e2\n\n0,5,-6\n")
    read = load("csv", tmp_path, optional=("test",))
    assert read.train.images.tolist() == [[1.5, 2], [3, 400], [5, -6]]
    assert read.train.labels.tolist() == [0, 1, 0]


def test_tables_of_any_width_are_labelled(tmp_path):
    """100 columns are a label and 99 features, although 10 x 10 would be an image."""
    (tmp_path / "train.csv").write_text("".join(f"{k % 3}{',7' * 99}\n" for k in range(9)))
    assert load("csv", tmp_path, optional=("test",)).train.images.shape == (9, 99)


def test_images_of_all_parts_have_one_shape(tmp_path):
    """One value above 255 in either file, or a label there: no bytes, or not only."""
    (tmp_path / "train.csv").write_text("".join(f"{k % 3}{',7' * 64}\n" for k in range(9)))
    (tmp_path / "test.csv").write_text(f"1,300{',7' * 63}\n")
    read = load("csv", tmp_path)
    assert read.train.images.shape == (9, 64) and read.test.images.shape == (1, 64)
    (tmp_path / "test.csv").write_text(f"1,255{',7' * 63}\n")
    read = load("csv", tmp_path)
    assert read.train.images.shape == (9, 1, 8, 8) and read.test.images.shape == (1, 1, 8, 8)


def test_a_column_that_is_no_label(tmp_path):
    (tmp_path / "train.csv").write_text("".join(f"{2 * k},1,5\n" for k in range(40)))
    with pytest.raises(InputError, match=r"line 11, column 1: label 20 is too large for 40"):
        load("csv", tmp_path, optional=("test",))
    (tmp_path / "train.csv").write_text("4000000000,1,2\n")
    with pytest.raises(InputError, match=r"label 4e\+09 is too large for 1 examples"):
        load("csv", tmp_path, optional=("test",))


def test_a_large_file_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "CACHED", 10)
    path = tmp_path / "t.csv"
    path.write_text("label,a\n1,2\n3,4\n")
    first = table.read_table(path)
    monkeypatch.setattr(table, "_parse", None)  # what would read the text
    again = table.read_table(path)
    assert again[0].equal(first[0]) and again[1] == first[1] == ["label", "a"]
    monkeypatch.undo()
    monkeypatch.setattr(table, "CACHED", 10)
    path.write_text("label,a\n1,2\n3,5\n")  # the same size, perhaps the same second
    assert table.read_table(path)[0].tolist() == [[1, 2], [3, 5]]


def test_a_damaged_cache_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "CACHED", 1)
    monkeypatch.setenv("MANUALNN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "t.csv"
    path.write_text("1,2\n3,4\n")
    table.read_table(path)
    [cached] = cache_folder().rglob("*.npy")
    for content in (b"", cached.read_bytes()[:-1], b"no array"):
        cached.write_bytes(content)
        assert table.read_table(path)[0].tolist() == [[1, 2], [3, 4]]
    np.save(cached, np.array([{}], dtype=object))  # a pickle is not opened
    assert table.read_table(path)[0].tolist() == [[1, 2], [3, 4]]


def change(folder, name, line, column, text):
    lines = (folder / name).read_text().splitlines()
    cells = lines[line - 1].split(",")
    cells[column - 1] = text
    lines[line - 1] = ",".join(cells)
    (folder / name).write_text("\n".join([*lines, ""]))


def test_bad_files_name_the_place(exported):
    _, folder = exported
    train = folder / "train.csv"
    whole = train.read_text()

    def fails(text, names=None):
        with pytest.raises(InputError) as caught:
            load("csv", folder, optional=("test",), class_names=names)
        assert text in str(caught.value).replace(str(folder), "DIR")
        train.write_text(whole)

    change(folder, "train.csv", 5, 64, "7,7")
    fails("DIR/train.csv: line 5: has 66 columns, the first line has 65")
    change(folder, "train.csv", 7, 3, "dark")
    fails("DIR/train.csv: line 7, column 3: 'dark' is not a finite number")
    change(folder, "train.csv", 9, 1, "10")
    fails(
        "DIR/train.csv, line 9, column 1: label 10 is outside the 10 classes", tuple("0123456789")
    )
    change(folder, "train.csv", 11, 1, "1.5")
    fails("DIR/train.csv: line 11, column 1: label 1.5 is no whole number from 0")
    train.write_text((folder / "test.csv").read_text())
    fails("DIR/train.csv: has 64 columns, as features without a label; labels are needed")
    train.write_text("")
    fails("DIR/train.csv: holds no examples")
    rows = [line.rpartition(",")[0] for line in (folder / "test.csv").read_text().splitlines()]
    (folder / "test.csv").write_text("\n".join([*rows, ""]))
    fails("DIR/test.csv: has 63 columns, but the training file has 65: a label and 64 features")
    train.unlink()
    with pytest.raises(InputError, match=r"lacks train.csv \(plain or .gz\)"):
        load("csv", folder)
    with pytest.raises(InputError, match="needs files: give --data FILE or FOLDER"):
        load("csv")


def test_the_whole_exercise(exported, run, tmp_path):
    """Train on CSV files, predict the ones without labels, compare with those kept back."""
    _, folder = exported
    sets = ["--set", "train.epochs=12", "--set", "data.valid=40", "--device", "cpu"]
    code, out, err = run("train", "mnist-mlp", "--data", folder, *sets, "--json")
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics["test_accuracy"] is None and metrics["valid_accuracy"] > 0.8
    assert "csv-mlp" in metrics["out"]
    lines = (tmp_path / metrics["out"] / "history.csv").read_text().splitlines()
    assert all(line.endswith(",,") for line in lines[1:])  # the test columns stay empty

    code, out, err = run("predict", "csv-mlp", "--data", folder, "--out", "NN_pred.csv")
    assert code == 0 and "72 predictions" in out, err
    code, same, _ = run("predict", "csv-mlp", folder / "test.csv")
    assert same == (tmp_path / "NN_pred.csv").read_text()
    assert all(line in "0123" for line in same.split())

    score = ["evaluate", "--predictions", "NN_pred.csv", "--labels", folder / "test_labels.csv"]
    code, out, err = run(*score, "--json")
    accuracy = json.loads(out)["accuracy"]
    truth = table.read_table(folder / "test_labels.csv")[0][:, 0].tolist()
    assert accuracy == np.mean([int(a) == b for a, b in zip(same.split(), truth, strict=True)])
    assert accuracy > 0.75
    _, out, _ = run(*score)
    assert f"accuracy {100 * accuracy:.2f} %" in out and "of 72 are right" in out

    valid = json.loads(run("evaluate", "csv-mlp", "--split", "valid", "--json")[1])
    assert valid["accuracy"] == metrics["valid_accuracy"]
    (tmp_path / "labelled.csv").write_text(
        "".join(
            f"{label},{row}\n"
            for label, row in zip(
                truth, (folder / "test.csv").read_text().splitlines()[1:], strict=True
            )
        )
    )
    assert "on labelled (72" in run("evaluate", "csv-mlp", "--data", "labelled.csv")[1]
    found = json.loads(run("evaluate", "csv-mlp", "--data", "labelled.csv", "--json")[1])
    assert found["accuracy"] == accuracy and found["n"] == 72


def test_bad_arguments(exported, run, tmp_path):
    _, folder = exported
    run("train", "--data", folder, "--epochs", 1, "--device", "cpu")
    (tmp_path / "short.csv").write_text("1\n2\n")
    for arguments, text in (
        (["evaluate", "csv-mlp"], "test.csv: has 64 columns, as features without a label"),
        (["evaluate", "--predictions", "short.csv"], "--predictions and --labels go together"),
        (
            ["evaluate", "--predictions", "short.csv", "--labels", folder / "test_labels.csv"],
            "short.csv has 2 predictions, but",
        ),
        (["predict", "csv-mlp"], "give either INPUT"),
        (["train", "--data", "absent.csv"], "--data absent.csv: neither a data set nor a file"),
        (["train", "--data", folder, "--data-dir", folder], "is a path; leave out --data-dir"),
        (
            ["train", "--set", "data.train=x.csv"],
            "data.train is for data.name = 'csv', not",
        ),
        (
            ["train", "--set", "data.name=csv", "--set", "data.dir=x", "--set", "data.train=y"],
            "data.train and data.dir do not go together",
        ),
        (["train", "--set", "data.name=csv"], "data set 'csv' needs files"),
        (["data", "export-csv", "idx", "--data-dir", "data", "--out", folder], "train.csv exists"),
        (["data", "export-csv", "mnist", "--test", "0.1", "--keep-split"], "give one of them"),
        (["data", "export-csv", "mnist", "--test", "1.5"], "--test 1.5: must be between 0 and 1"),
    ):
        code, out, err = run(*arguments)
        *_, said = err.splitlines()  # before it which run a name means
        assert (code, out) == (2, "") and said.startswith("error: ") and text in said, (err, text)
        assert err.count("\n") == 1 + ("csv-mlp is the run" in err)


def test_data_as_a_name_or_a_path(exported, tmp_path):
    from manualnn.config import data_flags

    _, folder = exported
    assert data_flags("kmnist", "d") == {"data.name": "kmnist", "data.dir": "d"}
    assert data_flags(None, None) == {"data.name": None, "data.dir": None}
    assert data_flags(str(folder), None) == {"data.name": "csv", "data.dir": str(folder)}
    idx = str(tmp_path / "data")
    assert data_flags(idx, None) == {"data.name": "idx", "data.dir": idx}
    file = str(folder / "train.csv")
    written = tmp_path / "c.toml"
    written.write_text('[data]\nname = "csv"\ntrain = "a.csv"\ntest = "b.csv"\n')
    assert load_config(written).data.place == {"train": "a.csv", "test": "b.csv"}
    for value, place in ((folder, str(folder)), (file, {"train": file})):
        flags = data_flags(str(value), None)
        assert load_config(written, flags=flags).data.place == place
    assert load_config(written, flags=data_flags("mnist", None)).data.place is None
    kept = load_config("mnist-mlp", ["data.train=a.csv"], data_flags("csv", None))
    assert kept.data.place == {"train": "a.csv"}
    assert load_config("mnist-mlp", flags=data_flags(file, None)).data.place == {"train": file}
