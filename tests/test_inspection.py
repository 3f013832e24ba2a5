"""manualnn inspect: what a file holds, and that none of it is executed."""

import gzip
import hashlib
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch

from manualnn import InputError, inspection, load_weights, safe
from manualnn import network as network_module
from manualnn.formats import recognise
from manualnn.inspection import inspect
from manualnn.network import Network, save_weights
from manualnn.safe import read_tensors

from .conftest import write_idx


@pytest.fixture
def weights(tmp_path):
    network = Network([["linear", 4], ["relu"], ["linear", 2]], (1, 3, 3), 2)
    network.initialize([0])
    save_weights(tmp_path / "weights.pkl", network, {"dataset": "mine", "loss": "cross_entropy"})
    return tmp_path / "weights.pkl"


def test_weights(run, weights):
    content = torch.load(weights)
    code, out, err = run("inspect", weights, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "") and report["kind"] == "weights" and report["problem"] == ""
    assert report["bytes"] == weights.stat().st_size
    assert report["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert all(named["safe"] for named in report["globals"])
    assert [tensor["name"] for tensor in report["tensors"]] == ["w1", "b1", "w2", "b2"]
    for tensor in report["tensors"]:
        values = content[tensor["name"]]
        assert tensor["shape"] == list(values.shape) and tensor["dtype"] == "float32"
        assert (tensor["nan"], tensor["inf"]) == (0, 0)
        figures = [tensor[key] for key in ("min", "max", "mean")]
        expected = [float(values.min()), float(values.max()), float(values.double().mean())]
        assert figures == pytest.approx(expected)
    network = report["network"]
    assert network["input_shape"] == [1, 3, 3] and network["parameters"] == 9 * 4 + 4 + 4 * 2 + 2
    assert report["meta"]["dataset"] == "mine"
    code, out, _ = run("inspect", weights.parent)  # a run folder
    assert code == 0 and f"{weights}: weights, " in out
    assert "input 1 x 3 x 3, flatten, linear 4, relu, linear 2; 50 parameters" in out
    assert "w1      9 x 4  float32" in out and "UNSAFE" not in out


def test_numbers_that_are_not_finite_and_names_that_a_terminal_would_obey(run, tmp_path):
    inf, nan = torch.inf, torch.nan
    content = {
        "\x1b[31mred": {"x": [torch.tensor([1.0, nan, 3.0, inf, -inf])]},
        "none": torch.full((2,), nan),
        "whole": torch.tensor([[1, 2], [3, 6]]),
        "complex": torch.tensor([1j]),
        "text": "\x07" + "a" * 500,
    }
    torch.save(content, tmp_path / "x.pkl")
    code, out, _ = run("inspect", "x.pkl")
    assert (
        code == 0 and out.replace("\n", "").isprintable() and max(map(len, out.split("\n"))) < 160
    )
    assert r"\x1b[31mred.x.0" in out and "1 nan, 2 inf" in out and r"text           \x07aaa" in out
    red, none, whole, complex_ = inspect(tmp_path / "x.pkl")["tensors"]
    assert [red[key] for key in ("min", "max", "mean", "nan", "inf")] == [1, 3, 2, 1, 2]
    assert [none[key] for key in ("min", "max", "mean", "nan", "inf")] == [None, None, None, 2, 0]
    assert [whole[key] for key in ("min", "max", "mean")] == [1, 6, 3]
    assert complex_["min"] is None and complex_["dtype"] == "complex64"
    assert "neither meta nor matrices" in inspect(tmp_path / "x.pkl")["network"]["problem"]


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed > done",)


def test_a_file_that_would_execute_code(run, tmp_path):
    torch.save({"w1": torch.ones(2), "x": Evil()}, tmp_path / "archive.pkl")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("archive.pkl", "bare.pkl"):
        code, out, err = run("inspect", name)
        assert (code, err) == (1, "") and "posix.system  UNSAFE" in out
        assert "not read       it would execute code where it is unpickled: posix.system" in out
        code, out, _ = run("inspect", name, "--json")
        assert code == 1 and {"name": "posix.system", "safe": False} in json.loads(out)["globals"]
    assert not (tmp_path / "done").exists()


def test_a_pickle_that_is_not_read_here(run, tmp_path):
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w1": [1.0]}))
    code, out, _ = run("inspect", "plain.pkl")
    assert code == 1 and "not read       a bare pickle; where it is trusted" in out
    torch.save({"w1": torch.zeros(2, 2).to_sparse()}, tmp_path / "sparse.pkl")
    code, out, _ = run("inspect", "sparse.pkl")
    assert code == 1 and "UNSAFE" not in out and "_rebuild_sparse_tensor; store plain" in out


def test_damaged_files_are_one_line(run, weights):
    content = weights.read_bytes()
    at = content.index(torch.load(weights)["w2"].numpy().tobytes())
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    for changed in (b"", b"text", content[:-30], flipped):
        weights.write_bytes(changed)
        code, out, err = run("inspect", weights)
        assert (code, out) == (2, "") and err.count("\n") == 1, err
    weights.unlink()
    for name, message in (
        (weights, "no weights file"),
        (weights.parent, "a folder without weights"),
    ):
        code, _, err = run("inspect", name)
        assert code == 2 and message in err


def test_a_checkpoint(run, folder):
    sets = ["--set", "train.epochs=2", "--set", "train.seeds=[0, 1]", "--set", "data.valid=0"]
    run("train", "--data-dir", folder, "--device", "cpu", "--quiet", *sets, "--out", "r")
    report = inspect("r/checkpoint.pt")
    assert report["kind"] == "checkpoint"
    steps = -(-300 // 128) * 2
    assert report["checkpoint"] == {"epoch": 2, "step": steps, "networks": 2}
    assert "training.theta" in [tensor["name"] for tensor in report["tensors"]]
    code, out, _ = run("inspect", "r/checkpoint.pt")
    assert code == 0 and "epoch          2\n" in out and "networks       2\n" in out
    assert inspect("r")["kind"] == "weights"


def npy(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def npz(path):
    with path.open("wb") as file:
        np.savez(file, w1=np.ones((2, 2)))


def script(path):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Twice()).save(str(path))


def onnx(path):
    """The first fields of a ModelProto: ir_version 8, producer_name, the graph."""
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x3a\x04\x0a\x02ab")


def safetensors(path):
    header = json.dumps({"w1": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def starting(start):
    return lambda path: path.write_bytes(start + bytes(300))


FORMATS = {
    "npy": (npy, "a NumPy array"),
    "npz": (npz, "NumPy arrays"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").close(), "an empty zip archive"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "a gzip file; unpack"),
    "hdf5": (starting(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    "png": (starting(b"\x89PNG\r\n\x1a\n"), "a PNG image"),
    "onnx": (onnx, "an ONNX model"),
    "safetensors": (safetensors, "a safetensors file"),
    "torchscript": (script, "a TorchScript module"),
    "idx": (lambda path: write_idx(path, np.zeros((2, 3, 3))), "an idx file"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_told_by_how_they_begin(run, tmp_path, name):
    write, what = FORMATS[name]
    write(tmp_path / "x.pkl")
    code, out, err = run("inspect", "x.pkl")
    assert (code, err) == (1, "") and "UNSAFE" not in out
    assert f"not read       it is {what}" in out and out.startswith("x.pkl: other, ")
    for read in (load_weights, lambda path: read_tensors(path, "weights file")):
        with pytest.raises(InputError, match=f"x.pkl: not a weights file: it is {what}"):
            read(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_and_no_file_of_torch_is_taken_for_another_format(tmp_path, protocol):
    values = (8, b"\x12\x07pytorch", {"x": 1.0}, (1, 2), "\x08\x08", [None])
    for value in values:
        data = pickle.dumps(value, protocol)
        assert recognise(data, len(data)) == ""
    for value in ({"w1": torch.ones(2, 2)}, torch.nn.Linear(2, 2).state_dict(), values[2]):
        torch.save(value, tmp_path / "constants.pkl", pickle_protocol=max(2, protocol))
        assert inspect(tmp_path / "constants.pkl")["problem"] in ("",) or protocol > 3
        assert inspect(tmp_path / "constants.pkl")["kind"] != "other"


def test_a_file_is_read_once(weights, monkeypatch):
    """What was looked through is what is loaded, whatever becomes of the file in between."""
    expected, reads = load_weights(weights).network.theta, []
    read = safe.read_file

    def swapped(path, what="file"):
        content = read(path, what)
        reads.append(path)
        path.write_bytes(pickle.dumps(Evil()))
        return content

    content = weights.read_bytes()
    for module in (safe, network_module, inspection):
        monkeypatch.setattr(module, "read_file", swapped)
    assert load_weights(weights).network.theta.equal(expected)
    weights.write_bytes(content)
    assert read_tensors(weights, "file")["w1"].shape == (9, 4)
    weights.write_bytes(content)
    assert inspect(weights)["kind"] == "weights" and len(reads) == 3
