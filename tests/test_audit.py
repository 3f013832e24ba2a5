"""The audit: a zoo of honest programs and of ways to cheat, and which check sees which.

docs/audit.md has the zoo as a table, which a test here compares with what is measured.
"""

import ast
import json
import textwrap
import time
from pathlib import Path

import pytest
import torch

from manualnn import audit
from manualnn.audit.record import Record
from manualnn.audit.source import check_source
from manualnn.audit.watch import Watch, observing
from manualnn.config import load_config
from manualnn.errors import InputError
from manualnn.layers import ReLU

ROOT = Path(__file__).parent.parent
ZOO = Path(__file__).parent / "zoo"
# Files that others import.
HELPERS = ("helper", "optim")
ZOO_NAMES = sorted(path.stem for path in ZOO.glob("*.py") if path.stem not in HELPERS)

# Which checks find each cheat.
EXPECTED = {
    "alias_linear": "source functions traps",
    "at_exit": "functions operations",
    "aten_relu": "source functions operations",
    "autograd_function": "source traps",
    "bare_thread": "functions operations",
    "compiled": "source functions operations tensors traps",
    "detach": "source functions tensors traps",
    "exec_string": "functions operations traps",
    "expit": "source functions operations",
    "forked": "functions operations",
    "func_grad": "source functions traps",
    "getattr_relu": "functions operations",
    "hardtanh": "source functions operations traps",
    "hidden_optimizer": "source traps",
    "importlib_nn": "source functions operations traps",
    "jit_function": "source functions operations",
    "nn_linear": "source functions tensors traps",
    "other_framework": "source",
    "pickled": "source traps",
    "relu_method": "functions operations",
    "requires_grad_later": "source functions tensors traps",
    "spectator": "source operations traps",
    "sys_modules": "source functions operations traps",
    "thread": "source functions operations traps",
    "transform": "functions operations",
}
# Nobody is accused, but the audit says that it has not seen everything: exit code 2.
UNOBSERVED = {"native", "spawned", "subprocess_python"}
# Cheats, and possible cheats, that pass.
ESCAPED = {"loaded_weights", "when_unobserved"}
HONEST = {"honest_numpy", "honest_torch", "honest_names"}


@pytest.fixture(scope="module")
def zoo(forking):
    """The report of every program in the zoo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "_run", forking)
        return {name: audit.audit_file(ZOO / f"{name}.py") for name in ZOO_NAMES}


@pytest.fixture
def audited(forking, monkeypatch, tmp_path):
    """Audit a text as a script."""
    monkeypatch.setattr(audit, "_run", forking)

    def run(text, **options):
        (tmp_path / "script.py").write_text(textwrap.dedent(text))
        return audit.audit_file(tmp_path / "script.py", **options)

    return run


def found(report):
    return " ".join(check for check in audit.CHECKS if report.of(check))


def test_every_program_of_the_zoo_has_its_verdict():
    assert {*EXPECTED, *UNOBSERVED, *ESCAPED, *HONEST} == set(ZOO_NAMES)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_what_sees_which_cheat(zoo, name):
    report = zoo[name]
    assert found(report) == EXPECTED.get(name, ""), report
    code = 2 if name in UNOBSERVED else int(name in EXPECTED)
    assert report.code == code, (report.error, report.tail)
    for finding in report.all_of("finding"):
        file = finding.where.split(":")[0]
        assert file in (f"{name}.py", "helper.py", "<string>", ""), finding


def test_the_table_in_the_docs_is_what_is_measured(zoo):
    rows = ["| program | what it does | " + " | ".join(audit.CHECKS) + " | verdict |"]
    rows.append("|---" * (len(audit.CHECKS) + 3) + "|")
    verdicts = ("no forbidden call observed", "found", "could not be judged")
    order = (HONEST, EXPECTED, UNOBSERVED, ESCAPED)
    for name in (name for group in order for name in sorted(group)):
        what = ast.get_docstring(ast.parse((ZOO / f"{name}.py").read_text()))
        cells = ["x" if zoo[name].of(check) else "" for check in audit.CHECKS]
        cells = [f"`{name}`", " ".join(what.split()), *cells, verdicts[zoo[name].code]]
        rows.append("| " + " | ".join(cells) + " |")
    assert "\n".join(rows) in (ROOT / "docs" / "audit.md").read_text(), "\n".join(rows)


@pytest.mark.parametrize(
    "line",
    [
        "y = np.tanh(x)",
        "y = math.tanh(1)",
        "def softmax(z): return z.exp()\ny = softmax(x)",
        "with torch.no_grad(): pass",
        "torch.set_grad_enabled(False)",
        "torch.autograd.set_grad_enabled(False)",
        "x = torch.zeros(3, requires_grad=False)",
        "x.requires_grad_(False)",
        "x.requires_grad = False",
        "assert not x.requires_grad and x.grad_fn is None",
        "from torch.utils.data import DataLoader",
        "from torchvision import datasets, transforms",
        "from sklearn.metrics import confusion_matrix",
        "from sklearn.datasets import load_digits",
        "import torch.nn as nn",
        "eval('1 + 1')",
        "class A:\n    def backward(self): self.sigmoid = 1\nA().backward()",
        "y = x.relu()",  # of a tensor or not: a note
        "loss.backward()",
    ],
)
def test_a_line_that_accuses_nobody(line):
    text = f"import math\nimport numpy as np\nimport torch\n{line}\n"
    assert [x for x in check_source(text) if x.kind == "finding"] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.autograd.grad(y, x)",
        "a, b = 1, torch\nb.optim.SGD([x], 0.1)",
        "getattr(torch, 'n' + 'n').Linear(2, 3)",
        "getattr(torch, ''.join(['n', 'n']))",
        "torch.__dict__['nn'].Linear",
        "vars(torch)['relu'](x)",
        "globals()['torch'].nn.Linear",
        "__import__('torch.nn', fromlist=['nn'])",
        "exec('torch.relu(x)')",
        "from torch import *\ny = relu(x)",
        "self.torch.nn.Linear(2, 3)",
        "x.requires_grad = True",
        "x.requires_grad_()",
        "torch.enable_grad()",
        "torch.set_grad_enabled(True)",
        "import jax",
        "from scipy.special import expit\nexpit(0)",
        "import torchvision.models as zoo\nzoo.resnet18()",
        "from manualnn.audit import watch\nwatch.ALLOWED",
    ],
)
def test_a_line_that_is_found(line):
    line = line if "import jax" not in line else "import jax\njax.grad(f)"
    assert [x for x in check_source(f"import torch\n{line}\n") if x.kind == "finding"]


def test_the_sums_of_arithmetic_and_bytes():
    record = Record()
    with observing(Watch(record)):
        x, w = torch.ones(5, 3), torch.ones(3, 4)
        (x @ w).add_(1)
        torch.ones(2, 5, 3) @ torch.ones(2, 3, 4)
    operations = record.operations()
    assert operations["mm"] == [1, 2 * 5 * 3 * 4, 4 * (15 + 12 + 20)]
    assert operations["bmm"] == [1, 2 * 2 * 5 * 3 * 4, 2 * 4 * (15 + 12 + 20)]
    assert operations["add"] == [1, 20, 2 * 4 * 20]
    assert operations["ones"][1] == 0


def test_all_traps_are_taken_away_again():
    before = torch.nn.Module.__init__, torch.autograd.grad, dict(vars(torch.nn.functional))
    with observing(Watch(Record())):
        assert torch.autograd.grad is not before[1]
    assert before == (
        torch.nn.Module.__init__, torch.autograd.grad, dict(vars(torch.nn.functional))
    )  # fmt: skip


def test_whose_file_it_is(tmp_path):
    watch = Watch(Record(), root=Path("/"))  # with the environment's libraries below it
    assert watch.kind(torch.__file__) == "installed"
    assert watch.kind(torch.utils.data.__file__) == "data"
    assert watch.kind(json.__file__) == "standard"
    assert watch.kind(audit.__file__) == "watch"
    assert watch.kind(str(tmp_path / "script.py")) == "user"
    assert watch.kind("<string>") == "user"


def test_a_cheat_in_a_populations_threads_is_found(monkeypatch):
    def forward(self, params, x, workspace):
        return torch.relu(x), x

    monkeypatch.setattr(ReLU, "forward", forward)
    report = audit.audit_config(load_config("mnist-mlp", ["train.seeds=[0, 1]"]))
    assert report.code == 1
    assert found(report) == "functions operations"
    # Where it was called, and where it is played.
    assert {x.where.split(":")[0] for x in report.findings} == {__file__, "capture.py"}


def test_what_cannot_be_judged(audited):
    assert audited("import torch\ntorch.ones(3)\n1 / 0").code == 2
    report = audited("import torch\n\nx = torch.ones(3)\n1 / 0")
    assert report.error == "script.py:4: ZeroDivisionError: division by zero"
    assert report.operations["ones"][0] == 1
    assert "its last output:" in list(audit.lines(report))
    assert audited("import os; os._exit(0)").error == "it ended without a last word"
    assert audited("raise SystemExit(3)").verdict == "could not be judged: ended with 3"
    assert audited("x = (").all_of("unobserved")[0].where == "script.py:1"
    deep = "x" + ".y" * 3000
    assert audited(deep).code == audited("-" * 100_000 + "1").code == 2
    # What was found before is found.
    assert audited("import torch\ntorch.relu(torch.ones(3))\n1 / 0").code == 1


def test_a_function_is_called_and_names_are_allowed(audited):
    text = """
        import torch
        def answer():
            return torch.ones(2).softmax(0)[0]
        if __name__ == "__main__":
            raise SystemExit("imported, not run")
    """
    report = audited(text, call="answer", allow=["softmax"])
    assert (report.code, report.result) == (0, 0.5)
    assert audited(text, call="answer").code == 1
    text = """
        import torch
        import torch.nn.functional as F
        print(F.one_hot(torch.arange(3)))
    """
    assert audited(text, allow=["one_hot"]).code == 0
    assert found(audited(text, allow=["softmax"])) == "source functions traps"
    assert "defines no function other" in audited(text, call="other").error


def test_limits_hold(tmp_path):
    """In the real child: time, memory, and what a script leaves running."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "os.fork()\n"
        "while True:\n"
        "    open('alive', 'a').write('.')\n"
        "    time.sleep(0.05)\n"
    )
    report = audit.audit_file(script, seconds=10)
    assert (report.code, report.error) == (2, "stopped after 10 s")
    size = (tmp_path / "alive").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "alive").stat().st_size == size
    script.write_text("data = bytearray(2**31)\n")
    assert "MemoryError" in audit.audit_file(script, memory=1024).error


def test_the_command(run, tmp_path):
    code, out, err = run("audit")
    assert (code, err) == (0, "")
    assert out.startswith("mnist-mlp: no forbidden call observed\n")
    assert out.count(" passed\n") == 5
    code, out, _ = run("audit", ZOO / "nn_linear.py", "--json")
    report = json.loads(out)
    assert (code, report["code"]) == (1, 1)
    assert not report["checks"]["traps"]["passed"]
    assert {"where": "nn_linear.py:7", "what": "nn.Module"} in report["checks"]["traps"]["findings"]
    assert report["operations"]["addmm"] == {"calls": 1, "flops": 48, "bytes": 116}
    assert "not a sandbox" in report["notes"][0]
    for arguments in (["no.py"], ["no-config"], ["--call", "f"]):
        code, out, err = run("audit", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(InputError, match="no such file"):
        audit.audit_file(tmp_path / "no.py")
