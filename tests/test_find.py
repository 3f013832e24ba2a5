"""Which file a name means: one rule for every command."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from manualnn import count_parameters, evaluate_hw1, evaluate_weights, load_config, load_weights
from manualnn import predict_file as predict
from manualnn.compare import compare
from manualnn.data import (
    convert,
    export_csv,
    load,
    open_shards,
    read_examples,
    read_idx,
    verify_shards,
)
from manualnn.errors import InputError
from manualnn.evaluation import score_predictions
from manualnn.experiment import Run, train_single
from manualnn.files import shipped
from manualnn.find import find_described, find_weights
from manualnn.network import save_weights
from manualnn.report import report
from manualnn.reproduce import reproduce
from manualnn.results import read_run
from manualnn.safe import scan
from manualnn.show import save, show

from .conftest import write_folder, write_idx


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs called mnist-mlp, the newer one mnist-mlp-2, which predict 7 whatever comes in."""
    monkeypatch.chdir(tmp_path)
    loaded = load_weights(shipped("weights") / "mnist-mlp.pkl")
    loaded.network.theta.zero_()
    loaded.network.params[-1]["bias"][0, 7] = 1
    for time, name in enumerate(("mnist-mlp", "mnist-mlp-2"), 1):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(load_config("mnist-mlp").to_toml())
        save_weights(folder / "weights.pkl", loaded.network, loaded.meta)
        os.utime(folder / "weights.pkl", (time, time))
    return tmp_path / "runs"


def test_a_bare_name_is_the_newest_run_before_the_shipped_file(runs, run, capsys, tmp_path):
    newest = Path("runs/mnist-mlp-2/weights.pkl")
    own = shipped("weights") / "mnist-mlp.pkl"
    assert find_weights("mnist-mlp") == newest
    assert capsys.readouterr().err == (
        f"note: mnist-mlp is the run {newest} (shipped:mnist-mlp is the one of the package)\n"
    )
    for path in ("runs/mnist-mlp", runs / "mnist-mlp", "runs/mnist-mlp/weights.pkl"):
        assert find_weights(path) == Path("runs/mnist-mlp/weights.pkl").absolute() or (
            find_weights(path) == Path("runs/mnist-mlp/weights.pkl")
        )
    assert find_weights("shipped:mnist-mlp") == own and find_weights(str(own)) == own
    assert capsys.readouterr().err == ""
    shutil.copytree("runs/mnist-mlp", "mnist-mlp")  # a folder of that name comes first
    assert find_weights("mnist-mlp") == Path("mnist-mlp/weights.pkl")
    shutil.rmtree("mnist-mlp")
    write_idx(tmp_path / "images", load("mnist", None, ("test",)).test.images[:20].reshape(20, -1))
    for command in (["predict", "mnist-mlp", "images"], ["predict", "runs/mnist-mlp", "images"]):
        code, out, err = run(*command)
        assert (code, set(out.split())) == (0, {"7"})
        assert ("mnist-mlp is the run" in err) == (command[1] == "mnist-mlp")
    code, out, err = run("predict", "shipped:mnist-mlp", "images")
    assert code == 0 and len(set(out.split())) > 5 and "note" not in err
    _, out, err = run("inspect", "mnist-mlp")
    assert f"{newest}: weights" in out and "mnist-mlp is the run" in err


def test_without_a_name_python_takes_the_shipped_network_and_the_command_the_newest_run(
    runs, run, tmp_path, monkeypatch
):
    data = write_folder(tmp_path / "data", train=20, test=30, classes=10, side=28)
    monkeypatch.setenv("MANUALNN_DATA", str(data))
    own = evaluate_weights(shipped("weights") / "mnist-mlp.pkl").evaluation
    assert evaluate_weights().path == shipped("weights") / "mnist-mlp.pkl"
    assert evaluate_hw1() == own.accuracy and len(set(own.predictions.tolist())) > 1
    code, out, err = run("evaluate", "--out", "o")
    assert code == 0 and "note: the newest run, runs/mnist-mlp-2" in err
    assert out.startswith("runs/mnist-mlp-2/weights.pkl on mnist test (30 samples")
    (runs / "unfinished").mkdir()
    (runs / "unfinished" / "config.toml").write_text("")
    assert "runs/mnist-mlp-2" in run("evaluate", "--out", "o")[1]
    shutil.rmtree(runs)
    code, out, err = run("evaluate", "--out", "o", "--json")
    assert "note: no run here: the network of the package" in err and json.loads(out)["n"] == 30


def test_a_config_comes_first_where_a_command_takes_either(runs, run):
    assert find_described("mnist-mlp") == shipped("configs") / "mnist-mlp.toml"
    assert find_described("shipped:mnist-mlp") == shipped("weights") / "mnist-mlp.pkl"
    assert find_described("mnist-mlp-2") == Path("runs/mnist-mlp-2/weights.pkl")


def test_a_folder_without_weights_is_said(run, tmp_path):
    (tmp_path / "half").mkdir()
    code, _, err = run("predict", tmp_path / "half", "x.csv")
    assert code == 2 and f"{tmp_path}/half: the folder holds no weights.pkl" in err
    assert "did you mean 'mnist-mlp'" in run("predict", "mnist-mpl", "x.csv")[2]
    assert "did you mean 'mnist-mlp'" in run("predict", "shipped:mnist-mpl", "x.csv")[2]


def test_public_functions_take_text_paths_and_run_folders_alike(runs, tmp_path):
    folder, file = runs / "mnist-mlp", runs / "mnist-mlp" / "weights.pkl"
    expected = load_weights(file).network.theta
    for name in (folder, str(folder), str(file), "runs/mnist-mlp", "mnist-mlp"):
        assert load_weights(name).network.theta.equal(expected)
        assert count_parameters(name) == 235_146
    images = tmp_path / "images"
    write_idx(images, torch.zeros(2, 28, 28).numpy())
    for name in (folder, str(folder), file, str(file)):
        for examples in (images, str(images)):
            assert predict(name, examples)[0].tolist() == [7, 7]
    for name in (folder, str(folder), folder / "config.toml", str(folder / "config.toml")):
        assert load_config(name).model == load_config("mnist-mlp").model
    save_weights(str(tmp_path / "w.pkl"), load_weights(file).network, {})
    assert load_weights(str(tmp_path / "w.pkl")).network.theta.equal(expected)
    with pytest.raises(InputError, match="is a folder; give the file"):
        save_weights(tmp_path, load_weights(file).network, {})


def test_functions_on_runs_and_files_take_text_as_they_take_paths(tmp_path):
    """In one go, as each of them is tested with paths elsewhere."""
    data = write_folder(tmp_path / "data", train=60, test=20)
    sets = ['model.layers=[["linear", "classes"]]', "train.epochs=1", "data.valid=0"]
    two = ['run=[{label="a"}, {label="b", train.l2=1e-3}]']
    config = load_config("mnist-mlp", [*sets, *two], {"data.dir": str(data)})
    folder = str(tmp_path / "run")
    for _ in Run(config, folder, "cpu").train():
        pass
    assert [network.replica.label for network in read_run(folder)] == ["a", "b"]
    assert len(compare(folder)["rows"]) == 2
    assert reproduce(folder, str(tmp_path / "again")).equal
    assert report([folder], str(tmp_path / "r.pdf")) == tmp_path / "r.pdf"
    file = str(tmp_path / "p.txt")
    Path(file).write_text("1\n2\n")
    assert score_predictions(file, file) == (2, 2)
    assert read_examples(file).tolist() == [[1], [2]]
    images = read_idx(str(data / "t10k-images-idx3-ubyte"))
    assert images.equal(read_examples(str(data / "t10k-images-idx3-ubyte")))
    assert convert("idx", data, str(tmp_path / "shards"))["test"] == 20
    assert len(open_shards(str(tmp_path / "shards")).labels["test"]) == 20
    assert list(verify_shards(str(tmp_path / "shards")))
    assert export_csv(load("idx", data), str(tmp_path / "csv"))["test.csv"] == 16
    save(show(config.data.name, str(data)), str(tmp_path / "s.png"))
    train_single(load_config("mnist-mlp", sets, {"data.dir": str(data)}), str(tmp_path / "w.pkl"))
    assert scan(str(tmp_path / "w.pkl")).problem == ""
