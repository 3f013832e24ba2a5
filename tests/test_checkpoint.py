"""Checkpoints: what is written is what is read, and of data that are still the same."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn import checkpoint
from manualnn.checkpoint import LAST, PREVIOUS, Saver
from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.experiment import Run
from manualnn.training import Progress

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def view(data, rows, columns, dtype):
    """A tensor that is not all of its storage in its order, or is."""
    whole = torch.arange(rows * columns).view(rows, columns).to(dtype)
    kind = data.draw(st.sampled_from(["whole", "expanded", "transposed", "part", "strided", "row"]))
    return {
        "whole": whole,
        "expanded": whole[:1].expand(5, columns),
        "transposed": whole.T,
        "part": whole[1:],
        "strided": whole[:, ::2],
        "row": whole[0].expand(3, 2, columns),
    }[kind]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_state_is_read_as_it_was_saved(tmp_path_factory, data):
    tensors = st.builds(
        lambda r, c, d: view(data, r, c, d),
        st.integers(1, 4),
        st.integers(1, 4),
        st.sampled_from(DTYPES),
    )
    plain = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.text())
    trees = st.recursive(
        tensors | plain,
        lambda inside: (
            st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3)
        ),
        max_leaves=8,
    )
    state = {"state": data.draw(trees)}
    folder = tmp_path_factory.mktemp("states")
    saver = Saver(folder)
    saver.save(state, lambda: None)
    saver.flush()
    _, found = checkpoint.read(folder)
    assert alike(found, state)


def alike(a, b):
    if isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b or (a != a and b != b)


def test_a_checkpoint_that_would_be_refused_replaces_none(tmp_path):
    saver = Saver(tmp_path)
    saver.save({"step": 1}, lambda: None)
    saver.flush()
    saver.save({"step": 2, "set": {1, 2}}, lambda: None)
    with pytest.raises(OSError, match="its checkpoint would be refused"):
        saver.flush()
    assert checkpoint.read(tmp_path)[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [LAST] and PREVIOUS != LAST


def small(folder, *sets):
    common = ["train.epochs=2", "train.batch_size=16", "train.seeds=[0, 1, 2]"]
    return load_config("mnist-mlp", [f'data.dir="{folder}"', *common, *sets])


def interrupted(config, out):
    """A run that was stopped within its first epoch."""
    run = Run(config, out, "cpu")
    for event in itertools.islice(run.train(), 200):
        if isinstance(event, Progress) and run.training.epoch_step > 1:
            run.stop()
    assert run.stopped and run.training.epoch_step
    return run


@pytest.mark.parametrize("how", ["train.shared_batches=true", "train.shuffle=false"])
def test_several_networks_with_one_row_of_labels_go_on(folder, tmp_path, how):
    """All in one group, as with one thread or on a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = small(folder, how, "train.batch_size=4", "data.valid=60")
        whole = Run(config, tmp_path / "whole", "cpu")
        for _ in whole.train():
            pass
        interrupted(config, tmp_path / "out")
        run = Run(config, tmp_path / "out", "cpu", resume=True)
        assert run.training.epoch_step
        for _ in run.train():
            pass
        assert run.training.network.theta.equal(whole.training.network.theta)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("file", "part"), [("train", "train"), ("t10k", "test")])
def test_data_that_changed_are_refused(folder, tmp_path, file, part):
    config = small(folder, "train.batch_size=4", "data.valid=60")
    interrupted(config, tmp_path / "out")
    path = folder / f"{file}-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path.name}: the {part} examples have changed since"):
        Run(config, tmp_path / "out", "cpu", resume=True)
    content[100] ^= 1
    path.write_bytes(content)
    run = Run(config, tmp_path / "out", "cpu", resume=True)
    for _ in run.train():
        pass
    assert run.metrics["data_sha256"]
