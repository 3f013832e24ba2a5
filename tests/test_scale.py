"""Inputs on another scale than trained on: rescaled where that is certain, else said."""

import numpy as np
import pytest
import torch

from manualnn import InputError, evaluate_hw1, evaluate_weights, load_config, load_weights
from manualnn import predict_file as predict
from manualnn.data import load
from manualnn.data.ranges import Range
from manualnn.experiment import Run
from manualnn.network import Network, save_weights
from manualnn.scale import trained_range

from .conftest import write_folder


def table(path, values, labels=None):
    np.savetxt(path, values if labels is None else np.c_[labels, values], "%.7g", ",")
    return path


def notes(capsys):
    """What was said since the last time, without what was read."""
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("read "))


def trained_on(folder, out, *sets):
    flags = {"data.name": "csv", "data.dir": str(folder)}
    small = ["data.valid=0", "data.stratify=false", "train.epochs=4", "train.batch_size=32"]
    layers = 'model.layers=[["linear", 16], ["relu"], ["linear", "classes"]]'
    for _ in Run(load_config("mnist-mlp", [layers, *small, *sets], flags), out, "cpu").train():
        pass
    return out


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A run on images of bytes, 8 x 8, and its test examples and labels."""
    root = tmp_path_factory.mktemp("scale")
    data = load("idx", write_folder(root / "idx", train=200, side=8))
    (root / "csv").mkdir()
    for part, examples in (("train", data.train), ("test", data.test)):
        rows, labels = examples.images.flatten(1).double().numpy(), examples.labels.numpy()
        table(root / "csv" / f"{part}.csv", rows, labels)
    return trained_on(root / "csv", root / "run"), rows, labels


def older(run, path, **changes):
    """The weights of a run, without what newer files hold."""
    content = torch.load(run / "weights.pkl")
    content["meta"] = {k: v for k, v in content["meta"].items() if k != "range"} | changes
    torch.save(content, path)
    return path


def test_the_file_holds_the_range_of_its_training_data(pixels):
    run, _, _ = pixels
    meta = load_weights(run).meta
    train = load("csv", run.parent / "csv", ("train",)).train.images
    assert meta["range"] == {"min": 0.0, "max": float(train.max()), "bytes": True}


def test_pixels_divided_by_255_are_noticed_and_read_as_such(pixels, tmp_path, capsys):
    run, rows, labels = pixels
    expected, p = predict(run, table(tmp_path / "bytes.csv", rows))
    assert notes(capsys) == ""
    for file in (run, older(run, tmp_path / "older.pkl")):
        found, q = predict(file, table(tmp_path / "unit.csv", rows / 255))
        assert found.equal(expected) and torch.allclose(p, q, atol=1e-5)
        err = notes(capsys)
        assert "its values are from 0 to" in err and "taken as pixels / 255" in err
        assert err.count("\n") == 1
    labelled = table(tmp_path / "labelled.csv", rows / 255, labels)
    accuracy = float((expected.numpy() == labels).mean())
    assert accuracy > 0.8
    assert evaluate_weights(run, str(labelled)).evaluation.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.where(x == x.max(), 300, x), "from 0 to 300, but .* give raw pixels"),
        (lambda x: np.where(x == 0, -4, x), "from -4 to .*give raw pixels"),
        (lambda x: (x / 255 - 0.1307) / 0.3081, "from -0.42.*--normalize"),
        (lambda x: (x > 100) * 1.0, r"whole numbers from 0 to 1, .* --normalize [\d.,]+ takes 1"),
    ],
)
def test_what_cannot_be_pixels_is_an_error_unless_its_scale_is_given(
    pixels, tmp_path, change, message
):
    run, rows, _ = pixels
    file = table(tmp_path / "t.csv", change(rows))
    with pytest.raises(InputError, match=message):
        predict(run, file)
    predict(run, file, normalize="0,1")


def test_a_scale_that_is_given(pixels, tmp_path, capsys):
    run, rows, labels = pixels
    raw, unit = table(tmp_path / "raw.csv", rows), table(tmp_path / "unit.csv", rows / 255)
    _, expected = predict(run, raw)
    own = load_weights(run).meta["normalization"]
    mean, std = own["mean"], own["std"]
    capsys.readouterr()
    for file, given in ((raw, f"{mean},{std}"), (unit, f"{mean / 255},{std / 255}")):
        assert torch.allclose(predict(run, file, normalize=given)[1], expected, atol=1e-5)
    assert notes(capsys) == ""
    # As torchvision's Normalize has them, of pixels in [0, 1].
    found = predict(run, raw, normalize=f"{mean / 255},{std / 255}")[1]
    assert torch.allclose(found, expected, atol=1e-5)
    assert "taken as those of pixels / 255" in notes(capsys)
    found = evaluate_weights(run, normalize="standard").evaluation
    assert found.accuracy == evaluate_weights(run).evaluation.accuracy
    for given, file, message in (
        ("standard", raw, "has no training part"),
        ("unit", unit, "without a division by 255; use none"),
        ("33,78", unit, "give the mean and deviation of these"),
        ("x", raw, "use none, unit"),
        ("1,0", raw, "above 0"),
        ("nan,1", raw, "above 0"),
        ("1,2,3", raw, "use none, unit"),
    ):
        with pytest.raises(InputError, match=message):
            predict(run, file, normalize=given)
    labelled = str(table(tmp_path / "labelled.csv", rows, labels))
    for measure in (
        lambda: evaluate_weights(run, labelled, normalize="standard"),
        lambda: predict(run, None, data=labelled, normalize="standard"),
    ):
        with pytest.raises(InputError, match="have no training part"):
            measure()


def test_older_files_show_their_scale_by_their_normalization():
    image = {"shape": [1, 28, 28], "dataset": "mnist"}
    standard = {"kind": "standard", "mean": 33.3, "std": 78.6}
    pixels = Range(0, 255, True)
    for meta, expected in (
        (image | {"normalization": standard}, pixels),
        (image | {"normalization": standard, "dataset": "idx"}, None),
        (image | {"normalization": standard | {"mean": 0.13, "std": 0.31}}, None),
        (image | {"normalization": standard | {"mean": 8000.0, "std": 900.0}}, None),
        (image | {"normalization": {"kind": "unit", "mean": 0.0, "std": 255.0}}, pixels),
        (image | {"normalization": {"kind": "feature", "mean": [9.0, 99.0], "std": [1.0]}}, pixels),
        (image | {"normalization": {"kind": "none"}}, pixels),
        (image | {"normalization": {"kind": "none"}, "dataset": "csv"}, None),
        ({"shape": [30], "normalization": standard, "dataset": "csv"}, None),
        ({}, None),
        ({"range": {"min": -1, "max": 2, "bytes": False}}, Range(-1, 2, False)),
    ):
        assert trained_range(meta) == expected, meta


def test_other_data_of_another_scale_are_said(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    values = rng.normal(size=(90, 4)) * 0.3 + labels[:, None] * 2 + 1
    (tmp_path / "csv").mkdir()
    table(tmp_path / "csv" / "train.csv", values, labels)
    run = trained_on(tmp_path / "csv", tmp_path / "run")
    capsys.readouterr()
    predict(run, table(tmp_path / "same.csv", values[::3]))
    assert notes(capsys) == ""
    for other in ((values - values.mean()) / values.std(), values * 10, values / 99):
        predict(run, table(tmp_path / "other.csv", other))
        err = notes(capsys)
        assert "is that the same scale? --normalize sets it" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("trained", "factor", "message"),
    [
        (16, 1 / 16, "from 0 to 1, but .* takes 1 as 16"),
        (16, 255, "give raw pixels"),
        (1, 255, "from 0 to 1; .* takes 255 as 1"),
        (0.5, 255, "from 0 to 0.5; .* takes 255 as 1"),
    ],
)
def test_images_of_other_ranges(tmp_path, capsys, trained, factor, message):
    """As scikit-learn's digits, from 0 to 16; black and white; or fractions."""
    rows = np.random.default_rng(2).integers(0, 2, (60, 64)) * float(trained)
    labels = np.arange(60) % 3
    rows[np.arange(60), labels] = trained
    (tmp_path / "csv").mkdir()
    table(tmp_path / "csv" / "train.csv", rows, labels)
    run = trained_on(tmp_path / "csv", tmp_path / "run", "data.label=first")
    if trained == 0.5:  # only whole numbers are images in a table
        content = torch.load(run / "weights.pkl")
        content["meta"]["shape"] = [1, 8, 8]
        torch.save(content, run / "weights.pkl")
    predict(run, table(tmp_path / "same.csv", rows))
    assert notes(capsys) == "" or trained == 0.5
    other = rows * factor
    if factor < 1:
        other[0] /= 2  # so that not all are whole numbers
    with pytest.raises(InputError, match=message):
        predict(run, table(tmp_path / "other.csv", np.ceil(other) if factor > 1 else other))


def test_training_and_test_examples_of_different_scales_are_an_error(pixels, tmp_path):
    _, rows, labels = pixels
    for train, test in ((255, 1), (1, 255)):
        folder = tmp_path / str(train)
        folder.mkdir()
        table(folder / "train.csv", rows if train == 255 else rows / 255, labels)
        table(folder / "test.csv", rows if test == 255 else rows / 255, labels)
        with pytest.raises(InputError, match="give both on one scale"):
            trained_on(folder, tmp_path / f"run{train}")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A network of plain tensors w1, b1, ... with sigmoids, its logits, and bytes to try it on."""
    path = tmp_path_factory.mktemp("foreign") / "w.pkl"
    draw = torch.Generator().manual_seed(3)
    w1 = torch.randn(64, 12, generator=draw)
    w2 = torch.randn(12, 3, generator=draw)
    torch.save({"w1": w1, "w2": w2}, path)
    return path, lambda x: (x @ w1).sigmoid() @ w2, lambda x: (x @ w1).relu() @ w2


def test_foreign_weights_say_how_they_are_read(foreign, tmp_path, capsys):
    path, sigmoid, relu = foreign
    rows = np.random.default_rng(1).integers(0, 256, (40, 64)).astype(float)
    x = torch.tensor(rows, dtype=torch.float32)
    raw, unit = table(tmp_path / "raw.csv", rows), table(tmp_path / "unit.csv", rows / 255)
    free = table(tmp_path / "free.csv", (rows - 99) / 70)
    for file, network, inputs, given, said in (
        (raw, relu, x / 255, {}, "read as a relu network on x / 255 of"),
        (unit, relu, x / 255, {}, f"read as a relu network on {unit} as it is"),
        (free, relu, (x - 99) / 70, {}, f"read as a relu network on {free} as it is"),
        (raw, sigmoid, x / 255, {"activation": "sigmoid"}, "read as a sigmoid network on x / 255"),
        (raw, relu, (x - 99) / 70, {"normalize": "99,70"}, "relu network on (x - 99) / 70 of"),
        (raw, relu, x, {"normalize": "none"}, "relu network on (x - 0) / 1 of"),
    ):
        _, p = predict(path, file, **given)
        assert torch.allclose(p.float(), network(inputs).softmax(1), atol=1e-4)
        err = notes(capsys)
        assert said in err and err.count("\n") == 1
        assert "--activation and --normalize change that" in err
    with pytest.raises(InputError, match="--activation x: use relu, sigmoid, tanh"):
        predict(path, raw, activation="x")


def test_flags_of_evaluate_and_predict(foreign, run, tmp_path):
    path, sigmoid, _ = foreign
    rows = np.random.default_rng(1).integers(0, 256, (40, 64)).astype(float)
    classes = sigmoid((torch.tensor(rows, dtype=torch.float32) - 99) / 70).argmax(1).numpy()
    table(tmp_path / "raw.csv", rows)
    table(tmp_path / "labelled.csv", rows, classes)
    flags = ["--activation", "sigmoid", "--normalize", "99,70"]
    code, out, _ = run("predict", path, "raw.csv", *flags)
    assert code == 0 and list(map(int, out.split())) == classes.tolist()
    code, out, err = run("evaluate", path, "--data", "labelled.csv", *flags)
    assert code == 0 and "accuracy 100.00 %" in out and "of other origin" in err
    code, _, err = run("predict", "shipped:mnist-mlp", "raw.csv", "--activation", "tanh")
    assert code == 2 and "says what its layers are" in err


def test_own_weights_without_a_normalization_say_so(pixels, tmp_path, capsys):
    _, rows, _ = pixels
    network = Network([["linear", 2]], (64,), 2)
    save_weights(tmp_path / "w.pkl", network, {})
    predict(tmp_path / "w.pkl", table(tmp_path / "t.csv", rows))
    assert "has no normalization" in notes(capsys)


def test_weights_that_are_not_finite_predict_nothing(pixels, run, tmp_path):
    trained, rows, _ = pixels
    content = torch.load(trained / "weights.pkl")
    content["w2"][1, 0] = torch.nan
    torch.save(content, tmp_path / "w.pkl")
    table(tmp_path / "t.csv", rows)
    message = "w2 is not finite: 1 of its 64 numbers are nan or inf"
    for command in (["predict", "w.pkl", "t.csv"], ["evaluate", "w.pkl"]):
        code, out, err = run(*command)
        assert (code, out) == (2, "") and message in err
    with pytest.raises(InputError, match=message):
        evaluate_hw1(weights=tmp_path / "w.pkl")
    assert "1 nan" in run("inspect", "w.pkl")[1]


def test_training_examples_of_one_class(pixels, tmp_path, capsys):
    _, rows, labels = pixels
    folder = tmp_path / "csv"
    folder.mkdir()
    table(folder / "train.csv", rows, np.full(len(rows), 3))
    with pytest.raises(InputError, match="all 60 training labels are 3: of one class there is"):
        trained_on(folder, tmp_path / "run", "data.label=first")
    order = labels.argsort(kind="stable")
    table(folder / "train.csv", rows[order], labels[order])
    trained_on(folder, tmp_path / "run", "data.train_samples=9", "data.label=first")
    assert "all 9 of the training labels that are used are 0" in notes(capsys)
