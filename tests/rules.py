"""The project's own rules: its modules and their floors, held to what manualnn.audit checks."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from manualnn.audit.record import Record
from manualnn.audit.source import EXEMPT, check_source
from manualnn.audit.watch import Watch, observing

PACKAGE = Path(__file__).parent.parent / "manualnn"

# A module imports only modules of lower floors.
FLOORS = {
    "errors": 0, "memory": 0, "distributed": 0, "files": 0, "parameters": 0, "workspace": 0,
    "formats": 0,
    "capture": 1, "layers": 1, "losses": 1, "optimizers": 1, "data": 1, "config": 1, "plots": 1,
    "pages": 1, "markdown": 2, "derivation": 3, "classes": 6, "checklist": 7, "report_parts": 8,
    "differences": 1, "own_function": 1, "safe": 1, "find": 1,
    "places": 2, "results": 3, "network": 2, "show": 2,
    "diagnosis": 3, "steps": 3, "checkpoint": 3, "circumstances": 3, "training": 4, "evaluation": 5,
    "scale": 3,
    "experiment": 6,
    "random_labels": 7, "compare": 7, "lr_find": 7, "sweep": 7, "doctor": 7, "coursework": 7,
    "gradcheck": 7, "audit": 7, "grade": 8, "inspection": 7, "reproduce": 7,
    "report": 9, "study": 8, "own_gradient": 8, "hand_in": 10, "cli_checks": 10, "cli": 11,
    "__main__": 12,
}  # fmt: skip
# Within floor 0 these build on each other, in this order.
GROUND = ["errors", "memory", "distributed", "files", "parameters", "workspace", "formats"]


def source_violations(module: str, source: str) -> list[str]:
    """What the source of a module names or imports against the rule, one line each."""
    if module.replace(".", "/") + ".py" == EXEMPT:
        return []  # it names what is forbidden, to set traps on it
    return [str(finding) for finding in check_source(source, strict=True)]


FACTORIES = set(
    "arange empty empty_strided zeros ones full tensor as_tensor asarray scalar_tensor eye linspace"
    " logspace randperm rand randint randn".split()
)


def calls_without_device(source: Path | str) -> list[int]:
    """The lines where torch makes a tensor on whatever its default device is."""
    text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and "device" not in [keyword.arg for keyword in node.keywords]
    ]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def floor_violations(module: str, source: str) -> Iterator[str]:
    """Imports of a module from its own floor or a higher one, and modules that have no floor."""
    top = module.split(".")[0]
    if top == "__init__":
        return
    if top not in FLOORS:
        yield f"{module} has no floor"
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        inside = module.count(".") + 1 - node.level
        if inside > 0:
            continue  # within the same subpackage
        names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        for name in names:
            if FLOORS.get(name, 99) < FLOORS[top]:
                continue
            ground = top in GROUND and name in GROUND and GROUND.index(name) < GROUND.index(top)
            if not ground:
                yield f"line {node.lineno}: {module} imports {name}"


def runtime_violations(work: Callable[[], object]) -> set[str]:
    """What a call of `work` runs against the rule, in this thread or in others."""
    record = Record()
    with observing(Watch(record, strict=True)):
        work()
    return {finding.what for finding in record.findings}
