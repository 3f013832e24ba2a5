"""The mutation tester itself: which faults it plants, that they are found, and that one which
changes nothing is not."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutate import MODULES, ROOT, mutants

SOURCE = '''
"""Text 1."""
ONE: int = 1

class Promise(Protocol):
    def value(self, x: int = 3) -> int: ...

def f(x: Tensor, unused: int = 5, scale: float = 0.5) -> Tensor:
    """Text 2."""
    assert x > 7
    if x < 2 and not x:
        raise InputError(f"{x + 1}: below 2")
    y = torch.sub(x, scale, out=x[1:])
    y.neg_()
    y.clamp_(min=0)
    y += 1
    return -y
'''
CHANGES = [
    ("constant", "1 -> 2"), ("constant", "1 -> 0"), ("constant", "0.5 -> 1.0"),
    ("constant", "0.5 -> -0.5"),
    ("comparison", "x < 2 -> x <= 2"), ("comparison", "x < 2 -> x >= 2"),
    ("boolean", "x < 2 and (not x) -> x < 2 or not x"), ("boolean", "x < 2 and (not x) -> x < 2"),
    ("boolean", "x < 2 and (not x) -> not x"), ("sign", "not x -> x"), ("constant", "2 -> 3"),
    ("constant", "2 -> 1"),
    ("deletion", "raise InputError(f'{x + 1}: below 2') -> pass"),
    ("function", "torch.sub(x, scale, out=x[1:]) -> torch.add(x, scale, out=x[1:])"),
    ("function", "y.neg_() -> y.reciprocal_()"), ("removal", "y.neg_() -> y"),
    ("deletion", "y.neg_() -> pass"),
    ("swap", "torch.sub(x, scale, out=x[1:]) -> torch.sub(scale, x, out=x[1:])"),
    ("keyword", "torch.sub(x, scale, out=x[1:]) -> torch.sub(x, scale)"), ("slice", "1: -> :"),
    ("deletion", "y.clamp_(min=0) -> pass"), ("removal", "y.clamp_(min=0) -> y"),
    ("keyword", "y.clamp_(min=0) -> y.clamp_()"), ("keyword", "y.clamp_(min=0) -> y.clamp_(max=0)"),
    ("constant", "0 -> 1"), ("arithmetic", "y += 1 -> y -= 1"), ("deletion", "y += 1 -> pass"),
    ("return", "return -y -> return None"), ("sign", "-y -> y"),
]  # fmt: skip


def test_which_faults_are_planted():
    """Those of each operator; none in text, annotations, protocols, assertions, messages."""
    tree = ast.parse(SOURCE)
    found = mutants(tree, "source.py")
    changes = [(m.operator, m.change) for m in found if m.operator != "condition"]
    assert set(changes) == set(CHANGES)
    assert sorted(m.change.split("-> ")[1][:8] for m in found if m.operator == "condition") == [
        "if False", "if True:",
    ]  # fmt: skip
    assert not any(m.line in (2, 5, 6, 9, 10) for m in found)
    scopes = {m.scope for m in found if m.line > 3}
    assert scopes == {(8, 17)} and {m.scope for m in found if m.line == 3} == {(0, 0)}
    before = ast.unparse(tree)
    for mutant in found:
        mutant.plant()
        assert ast.unparse(tree) != before
        mutant.undo()
        assert ast.unparse(tree) == before


@pytest.mark.parametrize("module", MODULES)
def test_every_fault_is_another_program(module):
    tree = ast.parse((ROOT / "manualnn" / f"{module}.py").read_text(encoding="utf-8"))
    found = mutants(tree, f"{module}.py")
    assert len(found) > 250 and len({m.id for m in found}) == len(found)
    before = ast.unparse(tree)
    for mutant in found[::25]:
        mutant.plant()
        assert ast.unparse(tree) != before
        compile(ast.fix_missing_locations(tree), module, "exec")
        mutant.undo()
    assert ast.unparse(tree) == before


def test_faults_are_found(tmp_path: Path):
    """A factor, and a constant that is made at import, are killed; what no test calls survives."""
    command = [sys.executable, "-m", "benchmarks.mutate", "--module", "losses"]
    command += ["--tests", "losses::test_losses_by_hand", "--out", str(tmp_path)]
    for part in ("2 / divisor -> 2 *", "1 / math.log(2) -> -", "p.div_(p.sum(-1"):
        command += ["--only", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    survived = [record["id"] for record in records if record["outcome"] == "survived"]
    assert survived and all("p.div_(p.sum(-1" in name for name in survived)
    killed = [record["id"] for record in records if record["outcome"] == "test"]
    assert len(killed) == 2 and {record["by"] for record in records} == {
        "", "tests/test_losses.py::test_losses_by_hand",
    }  # fmt: skip
    assert all(f"survived  {name}" in done.stdout for name in survived)
    assert f"{len(records)} mutants" in done.stdout
