"""The project's rule, import floors, shipped configs; and that planted violations are caught."""

import subprocess
import sys

import pytest
import torch

import manualnn
from manualnn.audit import few_steps, trainings
from manualnn.config import load_config
from manualnn.layers import Linear, ReLU

from . import rules
from .test_config import SHIPPED

MODULES = rules.modules()


@pytest.mark.parametrize("module", MODULES)
def test_the_source_names_nothing_forbidden(module):
    assert rules.source_violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_lower_floors(module):
    assert list(rules.floor_violations(module, MODULES[module].read_text())) == []


PLANTED = [
    "import torch.nn",
    "import torch.nn.functional as F",
    "from torch import nn",
    "from torch.nn import functional",
    "from torch import relu",
    "from torch import *",
    "from torch.optim import SGD",
    "import torch.autograd.functional",
    "import functorch",
    "import importlib",
    "x = torch.nn.Linear(2, 3)",
    "y = torch.relu(x)",
    "y = x.sigmoid()",
    "y = x.softmax(-1)",
    "y = torch.special.log_softmax(x, 0)",
    "y = x.logsumexp(0)",
    "torch.optim.SGD([x], 0.1)",
    "torch.ops.aten.relu(x)",
    "torch._C._nn.linear(x, w)",
    "x.requires_grad_()",
    "x = torch.zeros(3, requires_grad=True)",
    "x.requires_grad = True",
    "loss.backward()",
    "y.backward(dy)",
    "torch.autograd.grad(y, x)",
    "torch.func.grad(f)",
    "f = getattr(torch, 're' + 'lu')",
    "f = getattr(torch.special, name)",
    "f = vars(torch)['relu']",
    "exec('import torch.nn')",
    "nn = __import__('torch.nn')",
]


@pytest.mark.parametrize("line", PLANTED)
def test_a_planted_name_is_caught(line):
    honest = "import torch\n\ndef f(layer, x):\n    return layer.backward(x, x, x, x).exp()\n"
    assert rules.source_violations("layers", honest) == []
    assert rules.source_violations("layers", honest + line)


def test_a_planted_import_is_caught():
    assert list(rules.floor_violations("layers", "from .network import Network"))
    assert list(rules.floor_violations("layers", "from . import training"))
    assert list(rules.floor_violations("layers", "from .losses import decide"))
    assert list(rules.floor_violations("errors", "from .files import replacing"))
    assert list(rules.floor_violations("data.idx", "from ..network import Network"))
    assert list(rules.floor_violations("new_module", ""))
    assert not list(rules.floor_violations("data.idx", "from .prepare import split"))
    assert not list(rules.floor_violations("network", "from .layers import Linear"))


def shipped_trainings(name):
    """The trainings of a shipped config on the first samples of a bundled data set."""
    sets = ["data.valid=0", "data.train_samples=0", "train.early_stopping.patience=0"]
    return trainings(load_config(name, sets))


def shipped_training(name):
    return next(shipped_trainings(name))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_trains_three_steps_by_the_rules(name):
    """Every operation is on the allow-list, none is a built-in layer, no tensor requires grad. The
    second step is recorded, the third played."""
    for training in shipped_trainings(name):
        before = training.network.theta.clone()

        assert rules.runtime_violations(lambda t=training: few_steps(t, 3)) == set()
        assert training.network.theta.isfinite().all()
        assert not training.network.theta.equal(before)


def plant_relu(self, params, x, workspace):
    y = torch.relu(x)
    return y, y


def plant_method(self, params, x, workspace):
    y = getattr(x, "re" + "lu")()
    return y, y


def plant_linear(self, params, x, workspace):
    y = torch.nn.functional.linear(x, params["weight"][0].T, params["bias"][0])
    return y, x


def plant_module(self, params, x, workspace):
    module = torch.nn.Linear(*params["weight"].shape[1:])
    return module(x), x


def plant_grad(self, params, x, workspace):
    with torch.inference_mode(False):
        y = torch.zeros(x.shape, requires_grad=True)
    return y.mul(1), y


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (ReLU, plant_relu),
        (ReLU, plant_method),
        (Linear, plant_linear),
        (Linear, plant_module),
        (ReLU, plant_grad),
    ],
)
def test_a_planted_call_is_caught_while_it_runs(monkeypatch, layer, forward):
    training = shipped_training("mnist-mlp")
    index = next(training.batches(1))
    monkeypatch.setattr(layer, "forward", forward)
    violations = set()

    def work():
        try:
            training.step(index)
        except RuntimeError as error:  # inference mode itself may refuse
            violations.add(str(error))

    assert rules.runtime_violations(work) | violations


def test_a_step_outside_inference_mode_is_caught():
    training = shipped_training("mnist-mlp")
    index = next(training.batches(1))
    shard = training.shards[0]
    train = type(shard).train.__wrapped__
    assert rules.runtime_violations(lambda: shard.train([index], 0)) == set()
    assert any("inference" in v for v in rules.runtime_violations(lambda: train(shard, [index], 1)))


def test_a_step_allocates_no_new_buffers():
    """In steady state a step hands out the buffers of the step before."""
    training = shipped_training("mnist-mlp")
    batches = list(training.batches(1))
    for index in [*batches, *batches]:
        training.step(index)
    pools = training.shards[0].hands[0].workspace._pools
    before = {key: [b.data_ptr() for b in pool] for key, pool in pools.items()}
    for index in batches:
        training.step(index)
    assert {key: [b.data_ptr() for b in pool] for key, pool in pools.items()} == before


def test_public_names():
    assert set(manualnn.__all__) <= set(dir(manualnn))
    for name in manualnn.__all__:
        assert getattr(manualnn, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        manualnn.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import manualnn", ["torch", "torchvision", "matplotlib"]),
        ("import manualnn.cli", ["torch", "torchvision", "matplotlib"]),
        ("from manualnn import evaluate_hw1; evaluate_hw1()", ["torchvision", "matplotlib"]),
    ],
)
def test_what_is_not_imported(code, absent):
    code += f"; import sys; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stderr
