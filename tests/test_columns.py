"""Which column of a table is what: headers, index columns, labels. Each of these files was once
read wrongly without a word, or is one that has to stay readable."""

import hashlib
import shutil
import struct

import numpy as np
import pytest
import torch

from manualnn.config import data_flags, load_config
from manualnn.data import Asked, convert, load, table
from manualnn.errors import InputError
from manualnn.evaluation import predict_file, score_predictions
from manualnn.experiment import Run
from manualnn.files import cache_folder

RANDOM = np.random.default_rng(0)
N = 60
FLOWERS = RANDOM.normal(5, 1, (N, 3)).round(1)  # features of a table that is no image
CLASSES = np.arange(N) % 3
PIXELS = RANDOM.integers(0, 256, (N, 64))


def write(path, rows, header=None):
    lines = [",".join(map(str, header))] if header is not None else []
    lines += [",".join(f"{v:g}" if not isinstance(v, str) else v for v in row) for row in rows]
    path.write_text("\n".join([*lines, ""]))
    return path


def columns(*parts):
    """Rows of these columns and tables, side by side."""
    return np.column_stack(parts).tolist()


def read(path, **asked):
    return load("csv", {"train": str(path), **asked}, ("train",))


def check(dataset, labels=CLASSES, features=FLOWERS):
    assert dataset.train.labels.tolist() == labels.tolist()
    found = dataset.train.images.flatten(1).double().numpy()
    assert np.allclose(found, features, atol=1e-5)


@pytest.fixture(params=["memory", "blocks"])
def reading(request, tmp_path):
    """A function that reads a training file, whole or some lines at a time into a shard folder."""
    if request.param == "memory":
        return read

    def converted(path, **asked):
        convert("csv", {"train": str(path), **asked}, tmp_path / "shards")
        found = load("shards", tmp_path / "shards", ("train",))
        examples = found.train
        return type(found)("s", "", type(examples)(examples.images[:], examples.labels), None, None)

    return converted


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "id", "Id", "index"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_an_index_column_is_no_feature(reading, tmp_path, capsys, name, shuffled):
    index = RANDOM.permutation(N) + 7 if shuffled else np.arange(N)
    rows = columns(index, FLOWERS, CLASSES)
    check(reading(write(tmp_path / "t.csv", rows, [name, "a", "b", "c", "species"])))
    assert "column 1" in (err := capsys.readouterr().err) and "is left out" in err


def test_an_index_without_a_header_and_one_between(reading, tmp_path, capsys):
    check(reading(write(tmp_path / "t.csv", columns(np.arange(1, N + 1), CLASSES, FLOWERS))))
    assert "column 1 counts the examples; it is left out" in capsys.readouterr().err


def test_an_id_that_repeats_is_a_feature(reading, tmp_path):
    group = np.arange(N) // 2
    rows = columns(CLASSES, group, FLOWERS)
    found = reading(write(tmp_path / "t.csv", rows, ["label", "id", "a", "b", "c"]))
    check(found, features=np.column_stack((group, FLOWERS)))


def test_row_names_of_r(reading, tmp_path):
    rows = [[f'"flower, {i}"', *row] for i, row in enumerate(columns(FLOWERS, CLASSES))]
    check(reading(write(tmp_path / "t.csv", rows, ['""', "a", "b", "c", "class"])))
    # write.table: the header has one field less
    rows = columns(np.arange(1, N + 1), FLOWERS, CLASSES)
    (tmp_path / "shards").exists() and shutil.rmtree(tmp_path / "shards")
    check(reading(write(tmp_path / "t.csv", rows, ["a", "b", "c", "class"])))


@pytest.mark.parametrize("name", ["Outcome", "y", "species", "TARGET", "diagnosis", "Class"])
def test_a_label_is_known_by_its_name_wherever_it_is(reading, tmp_path, name):
    rows = columns(FLOWERS[:, :2], CLASSES, FLOWERS[:, 2:])
    check(reading(write(tmp_path / "t.csv", rows, ["a", "b", name, "c"])))


@pytest.mark.parametrize("label", ["last", "4", "kind", "KIND"])
def test_the_user_says_which_column_is_the_label(reading, tmp_path, label):
    path = write(tmp_path / "t.csv", columns(FLOWERS, CLASSES), ["a", "b", "c", "kind"])
    check(reading(path, label=label))
    if label in ("last", "4"):
        other = write(tmp_path / "t2.csv", columns(FLOWERS, CLASSES))
        check(read(other, label=label))


def test_a_label_that_is_asked_for_and_not_there(tmp_path):
    path = write(tmp_path / "t.csv", columns(FLOWERS, CLASSES), ["a", "b", "c", "kind"])
    for label, text in (("knd", "no such column; .*kind"), ("9", "it has 4 columns, counted")):
        with pytest.raises(InputError, match=text):
            read(path, label=label)


DOUBTFUL = {
    # Pima: counts first, the outcome last under a name that is not known
    "counts": (columns(RANDOM.integers(0, 18, N), FLOWERS, CLASSES % 2), "nabcz"),
    "last": (columns(CLASSES, FLOWERS, CLASSES % 2), None),
    "constant": (columns(np.zeros(N), FLOWERS), None),
    "one-hot first": (columns(np.eye(3)[CLASSES], FLOWERS), None),
    "one-hot last": (columns(CLASSES * 7 % 5, FLOWERS, np.eye(3)[CLASSES]), None),
    "several": (columns(CLASSES, FLOWERS, CLASSES), ["class", "a", "b", "c", "label"]),
    # MNIST with its label last: the first pixel is always 0
    "first pixel": (columns(np.zeros(N), PIXELS[:, 1:], CLASSES), None),
    "first pixel, mostly 0": (columns(np.arange(N) == 7, PIXELS[:, 1:], CLASSES), None),
}


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_doubt_about_the_label_is_an_error_that_asks(reading, tmp_path, kind):
    rows, header = DOUBTFUL[kind]
    path = write(tmp_path / "t.csv", rows, header)
    with pytest.raises(InputError) as caught:
        reading(path)
    assert "--label" in str(caught.value) and "t.csv" in str(caught.value)
    if "one-hot" not in kind:
        first = ",".join(map(str, header)) if header else f"{rows[0][0]:g},"
        assert f"its first line is {first}" in str(caught.value)
    (tmp_path / "shards").exists() and shutil.rmtree(tmp_path / "shards")
    last = np.array(rows)[:, -1]
    if (last != last.round()).any():
        return
    assert reading(path, label="last").train.labels.tolist() == last.tolist()


@pytest.mark.parametrize("header", [None, ["label", *(f"p{i}" for i in range(64))]])
def test_images_with_their_label_first_are_never_in_doubt(reading, tmp_path, header):
    """Also where the last pixel looks like a label."""
    pixels = PIXELS.copy()
    pixels[:, -1] = CLASSES % 2
    found = reading(write(tmp_path / "t.csv", columns(CLASSES, pixels), header))
    assert found.train.images.shape == (N, 1, 8, 8) and found.train.images.dtype == torch.uint8
    check(found, features=pixels)


@pytest.mark.parametrize(
    "header",
    [list(range(4)), ["0", "0.1", "0.2", "0.3"], ["5", "0", "0.1", "0.2"], ["", 0, 1, 2]],
)
def test_a_numeric_header_is_no_example(reading, tmp_path, header):
    rows = columns(CLASSES, FLOWERS)
    assert len(reading(write(tmp_path / "t.csv", rows, header)).train.labels) == N


def test_many_renamed_duplicates(reading, tmp_path):
    """The first example of a file became its header: 0 eleven times is 0, 0.1, ..., 0.10."""
    header = ["3", "0", *(f"0.{i}" for i in range(1, 64))]
    check(reading(write(tmp_path / "t.csv", columns(CLASSES, PIXELS), header)), features=PIXELS)


def test_a_first_line_in_doubt(reading, tmp_path):
    for first in ([1, 2, 3, 4], [0, 1, 2]):
        width = len(first) - 1
        path = write(tmp_path / "t.csv", columns(CLASSES, FLOWERS[:, :width]), first)
        with pytest.raises(InputError, match=r"a header or an example\? give --header yes or"):
            reading(path)
        assert len(read(path, header="yes").train.labels) == N
        assert len(read(path, header="no").train.labels) == N + 1
    path = write(tmp_path / "t.csv", columns(CLASSES, PIXELS), ["1", *["7"] * 64])
    assert len(reading(path).train.labels) == N + 1  # an image, as others


def test_a_test_file_has_the_training_files_columns(tmp_path, capsys):
    """By name where both have a header, also in another order; by place elsewhere."""
    names = ["", "a", "b", "c", "species"]
    write(tmp_path / "train.csv", columns(np.arange(N), FLOWERS, CLASSES), names)
    write(tmp_path / "test.csv", columns(CLASSES, FLOWERS[:, ::-1]), ["species", "c", "b", "a"])
    found = load("csv", tmp_path)
    assert np.allclose(found.test.images, FLOWERS, atol=1e-5)
    assert found.test.labels.tolist() == CLASSES.tolist()
    write(tmp_path / "test.csv", columns(np.arange(N) + N, FLOWERS), names[:-1])
    assert load("csv", tmp_path).test is None and "holds no labels" in capsys.readouterr().err
    write(tmp_path / "train.csv", columns(np.arange(N), CLASSES, FLOWERS))
    write(tmp_path / "test.csv", columns(np.arange(N) + N, CLASSES, FLOWERS))
    found = load("csv", tmp_path)
    assert np.allclose(found.test.images, FLOWERS, atol=1e-5)


def test_what_was_read_is_said(tmp_path, run):
    rows = columns(FLOWERS, CLASSES)
    write(tmp_path / "t.csv", rows, ["a", "b", "c", "Outcome"])
    said = "t.csv: 60 examples of 3 features, label column 4 'Outcome', 3 classes (20 20 20)"
    assert read(tmp_path / "t.csv").read.endswith(said)
    common = ["--set", "model.layers=[['linear', 'classes']]", "--set", "data.valid=9"]
    for command in (
        ["train", "mnist-mlp", "--data", "t.csv", "--epochs", 1, *common, "--out", "r"],
        ["evaluate", "r", "--data", "t.csv"],
        ["lr-find", "--data", "t.csv", "--steps", 9, "--networks", 3, *common],
    ):
        code, _, err = run(*command)
        assert code == 0 and f"read {said}" in err.splitlines(), err
    assert said not in run("train", "r/config.toml", "--epochs", 1, "-q")[2]
    code, _, err = run("show", "t.csv")
    assert code == 2 and "are no images" in err


def test_a_network_remembers_its_label_column(tmp_path, monkeypatch):
    """Files to evaluate or predict are read as the training file was."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.csv", columns(FLOWERS, CLASSES))
    sets = ["model.layers=[['linear', 'classes']]", "train.epochs=1"]
    flags = data_flags("t.csv", None, "last")
    folder = Run(config := load_config("fashion-logistic", sets, flags), device="cpu")
    assert config.data.place == {"train": "t.csv", "label": "last"}
    for _ in folder.train():
        pass
    plain = write(tmp_path / "plain.csv", rows := columns(FLOWERS))
    expected, _ = predict_file(folder.folder, plain)
    assert len(rows) == len(expected)
    for name, table_rows, header in (
        ("last", columns(FLOWERS, CLASSES), None),
        ("first", columns(CLASSES, FLOWERS), ["species", "a", "b", "c"]),
        ("index", columns(np.arange(N), FLOWERS), ["", "a", "b", "c"]),
        ("both", columns(np.arange(N), FLOWERS, CLASSES), ["id", "a", "b", "c", "y"]),
    ):
        path = write(tmp_path / f"{name}.csv", table_rows, header)
        assert predict_file(folder.folder, path)[0].equal(expected), name
    path = write(tmp_path / "first2.csv", columns(CLASSES, FLOWERS))
    assert predict_file(folder.folder, path, label="first")[0].equal(expected)


def test_predictions_are_scored_by_the_right_column(tmp_path):
    write(tmp_path / "p.csv", columns(np.arange(N), CLASSES), ["", "class"])  # to_csv of a Series
    write(tmp_path / "l.csv", columns(np.arange(N) + 5, CLASSES), ["id", "species"])
    assert score_predictions(tmp_path / "p.csv", tmp_path / "l.csv") == (N, N)
    write(tmp_path / "l.csv", columns(CLASSES, CLASSES * 0 + 3), ["a", "b"])
    with pytest.raises(InputError, match=r"which of its 2 columns is it\? .*--label"):
        score_predictions(tmp_path / "p.csv", tmp_path / "l.csv")


def test_a_flipped_bit_in_the_cache_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "CACHED", 1)
    monkeypatch.setenv("MANUALNN_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "t.csv", columns(CLASSES, PIXELS))
    first = read(path)
    [cached] = cache_folder().rglob("*.npy")
    content = bytearray(cached.read_bytes())
    content[128] ^= 64  # the first label, by 64
    cached.write_bytes(content)
    assert read(path).train.labels.equal(first.train.labels)
    assert table.open_table(path, Asked(header="yes")).values.shape == (N - 1, 65)


def test_images_with_their_channels_last(tmp_path):
    images = RANDOM.integers(0, 256, (6, 9, 9, 3)).astype(np.uint8)
    folder = tmp_path / "idx"
    folder.mkdir()
    for part in ("train", "t10k"):
        header = struct.pack(">4B4I", 0, 0, 8, 4, *images.shape)
        (folder / f"{part}-images-idx4-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, 6) + bytes([0, 1, 2, 0, 1, 2])
        )
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert load("idx", folder).train.images.equal(expected)
    convert("idx", folder, tmp_path / "shards")
    assert load("shards", tmp_path / "shards").train.images[:].equal(expected)
    assert table.read_examples(folder / "t10k-images-idx4-ubyte").equal(expected)


def test_another_known_set_under_the_name_of_mnist(tmp_path, monkeypatch, capsys):
    from manualnn.data import sources

    from .conftest import write_folder

    folder = write_folder(tmp_path / "data", side=8)
    labels = (folder / "train-labels-idx1-ubyte").read_bytes()
    digest = hashlib.md5(labels).hexdigest()
    monkeypatch.setitem(sources.LABELS_MD5, "fashion-mnist", (digest, ""))
    with pytest.raises(InputError, match="holds fashion-mnist by its checksums, not mnist: give"):
        load("mnist", folder)
    assert load("fashion-mnist", folder).train is not None
    monkeypatch.setenv("MANUALNN_DATA", str(folder))
    assert len(load("mnist").train.labels) == 60000  # the one that comes with the package
    assert "holds fashion-mnist, not mnist; looking elsewhere" in capsys.readouterr().err


def test_a_folder_without_idx_files_says_what_it_holds(tmp_path):
    (tmp_path / "train.csv").write_text("0,1\n")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"it holds a.png, train.csv: for CSV files give --data"):
        load("mnist", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="; it is empty"):
        load("idx", tmp_path / "empty")


@pytest.mark.parametrize("first", [",1,2", "NA,1,2", "1,,2", ",,"])
def test_a_missing_value_in_the_first_line_is_named_there(tmp_path, first):
    (tmp_path / "t.csv").write_text(f"{first}\n1,2,3\n0,1,2\n")
    with pytest.raises(InputError, match=r"t.csv: line 1, column [12]: "):
        read(tmp_path / "t.csv")
