"""Schedules that end where they should, rates that are safe to recommend, weights of the right
size, and a training that leaves torch's global settings alone."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manualnn import lr_find, reproduce
from manualnn.config import load_config
from manualnn.data import Streamed
from manualnn.errors import InputError
from manualnn.evaluation import choose_device
from manualnn.experiment import Run
from manualnn.network import Network
from manualnn.optimizers import SCHEDULES, schedule
from manualnn.steps import products_in

from .conftest import config_of, random_data, training_of
from .rules import calls_without_device


@pytest.mark.parametrize("steps", [2, 3, 4, 10])
@pytest.mark.parametrize("name", ["linear", "cosine", "one_cycle"])
def test_a_schedule_ends_at_its_final_fraction(name, steps):
    last = schedule(name, steps - 1, steps, steps_per_epoch=1, final_fraction=0.01)
    assert last == pytest.approx(0.01)
    rates = [schedule(name, i, steps, steps_per_epoch=1) for i in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates) and max(rates) > 0.03


def test_schedules_of_a_single_step():
    assert all(0 < schedule(name, 0, 1, steps_per_epoch=1) <= 1 for name in SCHEDULES)


@pytest.mark.parametrize(("name", "most"), [("constant", 10), ("cosine", 10), ("one_cycle", 9)])
def test_a_warm_up_longer_than_the_run_is_refused(name, most):
    """It would never reach the learning rate."""
    for steps, works in ((most, True), (most + 1, False)):
        settings = {"name": name, "warmup_steps": steps}
        config = config_of(train__epochs=2, train__batch_size=4, train__schedule=settings)
        if works:
            training = training_of(config, random_data(20))
            assert max(training.rate_fraction(i) for i in range(10)) == 1
        else:
            with pytest.raises(InputError, match=f"warmup_steps = {steps}, but the run has 10"):
                training_of(config, random_data(20))


def test_an_epsilon_that_is_no_normal_float32_is_refused():
    with pytest.raises(InputError, match="epsilon = 1e-45: must be at least 1e-37"):
        load_config("mnist-mlp", ["train.optimizer.epsilon=1e-45"])
    assert load_config("mnist-mlp", ["train.optimizer.epsilon=1e-12"])


@pytest.mark.parametrize(("channels", "outputs"), [(1, 16), (8, 64)])
def test_xavier_of_a_convolution_is_that_of_torch(channels, outputs):
    layers = [["conv2d", outputs, 3], ["flatten"], ["linear", 3]]
    network = Network(layers, (channels, 8, 8), 3, 40)
    network.initialize(list(range(40)), "xavier")
    weights = network.params[network.first]["weight"]
    oracle = torch.nn.init.xavier_normal_(torch.empty(outputs, channels, 3, 3))
    expected = math.sqrt(2 / (9 * channels + 9 * outputs))
    assert float(weights.std()) == pytest.approx(expected, rel=0.05)
    assert float(oracle.std()) == pytest.approx(expected, rel=0.25)


def test_lr_find_recommends_no_rate_that_ever_diverged(folder):
    """A huge loss in the running total hid what came after: the last quarter's was 0."""
    layers = 'model.layers=[["linear", 64], ["relu"], ["linear", "classes"]]'
    sets = [layers, "data.valid=60", "train.batch_size=16", "train.loss=squared_error"]
    config = load_config("mnist-mlp", sets, {"data.dir": str(folder)})
    result = lr_find.find(config, 1e-3, 1e12, networks=9, steps=40, device="cpu")
    worst = [row for row in result["rates"] if row["learning_rate"] > 100]
    assert worst and not any(row["stable"] for row in worst)
    assert all(row["loss"] is None or row["loss"] > result["start_loss"] for row in worst)
    assert result["best"] < 100 and result["good"][1] < 100
    assert min(row["loss"] for row in result["rates"] if row["stable"]) > 0


def test_the_precision_of_products_is_set_by_the_newer_interface_and_put_back():
    backend = torch.backends.cuda.matmul
    assert backend.fp32_precision != "tf32"
    with products_in("tf32"):
        assert backend.fp32_precision == "tf32"
        with products_in("ieee"):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    assert backend.fp32_precision != "tf32"


@pytest.mark.parametrize("setting", ["fp32_precision = 'tf32'", "fp32_precision = 'ieee'"])
def test_a_program_may_use_torchs_precision_interface(folder, tmp_path, setting):
    script = (
        "import torch; from manualnn import load_config, train\n"
        f"torch.backends.cuda.matmul.{setting}\n"
        f"sets = ['train.epochs=1', 'train.precision=tf32', 'data.dir={folder}']\n"
        f"train(load_config('mnist-mlp', sets), {str(tmp_path / 'out')!r})\n"
        f"assert torch.backends.cuda.matmul.{setting.replace('=', '==')}\n"
    )
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", script], **options)
    assert done.returncode == 0 and "legacy" not in done.stderr, done.stderr


def test_tf32_does_not_round_the_places_of_pixels(monkeypatch):
    seen = []
    data = random_data(20)
    config = config_of(train__precision="tf32", train__epochs=1)
    training = training_of(config, data)

    class Augment:
        def apply(self, x, *_):
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return x

    shard = training.shards[0]
    monkeypatch.setattr(shard, "data", type(data)(**{**vars(data), "augment": Augment()}))
    for batch in training.batches(1):
        training.step(batch)
    assert seen and set(seen) == {"ieee"}


def test_every_tensor_says_its_device():
    """torch.set_default_device would move those that do not, beside generators of the CPU."""
    package = Path(lr_find.__file__).parent
    found = [f"{p.name}:{line}" for p in package.rglob("*.py") for line in calls_without_device(p)]
    assert not found
    assert calls_without_device("import torch\nx = torch.zeros(3)\ny = torch.ones(3, device=d)\n")


def test_a_default_device_changes_nothing(folder, tmp_path):
    config = load_config("mnist-mlp", [f'data.dir="{folder}"', "train.epochs=1", "data.valid=0.2"])
    thetas = []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            run = Run(config, tmp_path / device, "cpu")
            for _ in run.train():
                pass
        finally:
            torch.set_default_device(None)
        thetas.append(run.training.network.theta)
    assert thetas[0].equal(thetas[1])


def test_auto_takes_a_gpu_that_computes_alone(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ones = torch.ones

    def fail(*size, device=None, **kwargs):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nfor execution")
        return ones(*size, **kwargs)

    monkeypatch.setattr(torch, "ones", fail)
    assert choose_device("auto").type == "cpu"
    assert "does not work (CUDA error: no kernel image is available); using" in (
        capsys.readouterr().err
    )


def test_a_gpu_is_known_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["A", "B", "C"][i])
    assert choose_device("cuda") == torch.device("cuda", 2)
    assert reproduce._device_called("B") == "cuda:1"
    assert reproduce._device_called("D") == "cuda"
    assert reproduce._device_called("cpu") == "cpu"


def test_a_stream_keeps_the_gpu_of_the_thread_that_made_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    made = Streamed.__new__(Streamed)
    with pytest.raises(AttributeError):  # there are no rows; the device comes first
        made.__init__(None, None, torch.float32, "cuda")
    assert made.device == torch.device("cuda", 1)
