"""Mutation testing: one small fault at a time in the source; some test has to fail.

`python -m benchmarks.mutate` plants every fault of OPERATORS in layers.py, losses.py and
optimizers.py, thousands of them, and writes a line of JSON for each: killed by a failing test, by
the time-out, by a crash or at import, or survived. A run that was broken off goes on where it
stopped; `--again` tries the survivors of the file anew, after tests were added.

mutmut and cosmic-ray do this for any project, but know nothing of tensors: `sub_` for `add_`,
`amin` for `amax`, a lost `neg_()`, dimensions that change places. And a process for each mutant
spends more on importing torch than on its tests. Here a process that has everything imported but
manualnn is forked, and of the tests only those that call the mutated function run, the fastest
first.

Not mutated: annotations, docstrings, bodies of protocols, what is inside an InputError, assertions,
zip's `strict`, defaults of parameters that the function does not use.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = ("layers", "losses", "optimizers")
TESTS = ("layers", "losses", "optimizers", "properties", "network", "steps")  # tests/test_*.py
# Another compiler's work, and a process of its own: seconds each, and nothing that others miss.
SLOW = ("test_a_compiled_step_gives_the_same", "test_weights_file_is_plain_for_torch_load")
MEMORY = 12 * 2**30  # bytes that a mutant may ask for

ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
}  # fmt: skip
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
# Functions with the same arguments; a trailing `_` is kept.
PAIRS = (
    "add sub", "mul div", "addcmul addcdiv", "amax amin", "argmax argmin", "maximum minimum",
    "max min", "exp expm1", "exp2 exp", "sum mean", "zeros ones", "zeros_like ones_like",
    "sign abs", "ge gt", "lt le", "eq ne", "any all", "log1p log", "log exp", "rsqrt sqrt",
    "sqrt exp", "reciprocal neg", "cos sin", "bitwise_xor bitwise_or", "copy add",
)  # fmt: skip
RENAMED: dict[str, list[str]] = {}
for _pair in PAIRS:
    _a, _b = _pair.split()
    RENAMED.setdefault(_a, []).append(_b)
    RENAMED.setdefault(_b, []).append(_a)
COMMUTATIVE = {"add", "mul", "eq", "max", "min", "maximum", "bitwise_xor", "addcmul_", "isinstance"}


@dataclass
class Mutant:
    """One fault: `plant` changes the tree of the module, `undo` changes it back."""

    file: str
    line: int
    column: int
    operator: str
    change: str  # before -> after
    scope: tuple[int, int]  # lines of the outermost function around it, else (0, 0)
    plant: Callable[[], None] = field(repr=False)
    undo: Callable[[], None] = field(repr=False)

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}:{self.column}:{self.operator}: {self.change}"


def is_call(node: ast.AST, *names: str) -> bool:
    """Whether node is a call of one of these functions or methods."""
    if not isinstance(node, ast.Call):
        return False
    return (getattr(node.func, "id", None) or getattr(node.func, "attr", "")) in names


def negated(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), node)


def numbers(value: object) -> list[Any]:
    """What a constant becomes."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1] if value else [1]
    if isinstance(value, float):
        return [value * 2, -value] if value else [1.0]
    return []


def variants(node: ast.AST, parent: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """OPERATORS: every (operator, replacement) for a node; None deletes a statement."""
    match node:
        case ast.BinOp(left, op, right):
            if isinstance(op, ast.BitOr):
                yield from (("union", side) for side in (left, right))
            elif type(op) in ARITHMETIC:
                yield "arithmetic", ast.BinOp(left, ARITHMETIC[type(op)](), right)
                yield "sign", negated(node)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield "sign", operand
        case ast.Compare(left, [op], right):
            for other in COMPARISONS[type(op)]:
                yield "comparison", ast.Compare(left, [other()], right)
        case ast.Compare(left, [first, second], right):
            for other in COMPARISONS[type(first)]:
                yield "comparison", ast.Compare(left, [other(), second], right)
            for other in COMPARISONS[type(second)]:
                yield "comparison", ast.Compare(left, [first, other()], right)
        case ast.BoolOp(op, values):
            yield "boolean", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield "boolean", ast.BoolOp(op, rest) if len(rest) > 1 else rest[0]
        case ast.Constant(value):
            for number in numbers(value):
                yield "constant", ast.Constant(number)
        case ast.Slice(lower, upper, step):
            if lower:
                yield "slice", ast.Slice(None, upper, step)
            if upper:
                yield "slice", ast.Slice(lower, None, step)
            if step:
                yield "slice", ast.Slice(lower, upper, None)
        case ast.Call(func, args, keywords):
            yield from calls(node, func, args, keywords)
        case ast.Tuple([first, second, *rest], ast.Load()):
            names = all(isinstance(getattr(e, "value", 0), str) for e in (first, second))
            unordered = names or isinstance(parent, ast.Compare) or is_call(parent, "constant")
            if ast.dump(first) != ast.dump(second) and not unordered:
                yield "swap", ast.Tuple([second, first, *rest], ast.Load())
        case ast.AugAssign(target, op, value) if type(op) in ARITHMETIC:
            yield "arithmetic", ast.AugAssign(target, ARITHMETIC[type(op)](), value)
            yield "deletion", None
        case ast.Return(value) if value and not isinstance(value, ast.Constant):
            yield "return", ast.Return(ast.Constant(None))
        case ast.Expr(value) if not isinstance(value, ast.Constant):
            yield "deletion", None
        case ast.Raise():
            yield "deletion", None
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        for value in (True, False)[isinstance(node, ast.While) :]:
            yield (
                "condition",
                type(node)(**{**dict(ast.iter_fields(node)), "test": ast.Constant(value)}),
            )


def calls(
    node: ast.Call, func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]
) -> Iterator[tuple[str, ast.AST]]:
    """The variants of a call: another function, no call, arguments swapped or left out."""
    name = getattr(func, "id", None) or getattr(func, "attr", "")
    tail = "_" if name.endswith("_") else ""
    for other in RENAMED.get(name.removesuffix("_"), []):
        if isinstance(func, ast.Attribute):
            renamed: ast.expr = ast.Attribute(func.value, other + tail, ast.Load())
        else:
            renamed = ast.Name(other, ast.Load())
        yield "function", ast.Call(renamed, args, keywords)
    if isinstance(func, ast.Attribute):
        of_module = isinstance(func.value, ast.Name) and func.value.id in ("torch", "math", "self")
        if not of_module and name not in ("empty", "zeros", "ones", "constant"):
            yield "removal", func.value
    if len(args) > 1 and name not in COMMUTATIVE:
        first, second, *rest = args
        if ast.dump(first) != ast.dump(second):
            yield "swap", ast.Call(func, [second, first, *rest], keywords)
    for i, keyword in enumerate(keywords):
        if keyword.arg == "strict":
            continue
        others = keywords[:i] + keywords[i + 1 :]
        yield "keyword", ast.Call(func, args, others)
        if keyword.arg in ("min", "max"):
            turned = ast.keyword({"min": "max", "max": "min"}[keyword.arg], keyword.value)
            yield "keyword", ast.Call(func, args, [*others, turned])


def children(node: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    """(field, index in it, child) of what may be mutated below a node."""
    if is_call(node, "InputError") or isinstance(node, ast.Assert | ast.JoinedStr):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            if isinstance(child, ast.AST):
                yield name, index, child


def left_alone(tree: ast.Module) -> set[ast.AST]:
    """Functions without a body, defaults of parameters that the body does not read, types."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ("tuple", "dict"):
            skipped.add(node)  # an alias of a type
        if not isinstance(node, ast.FunctionDef):
            continue
        if getattr(getattr(node.body[-1], "value", None), "value", None) is ...:
            skipped.add(node)
        read = {n.id for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name)}
        named = [*node.args.posonlyargs, *node.args.args]
        pairs = [*zip(named[::-1], node.args.defaults[::-1], strict=False)]
        pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        skipped |= {default for argument, default in pairs if default and argument.arg not in read}
    return skipped


def mutants(tree: ast.Module, file: str) -> list[Mutant]:
    """All faults that can be planted in a module, in the order of its tree."""
    found: dict[str, Mutant] = {}
    skipped = left_alone(tree)

    def visit(parent: ast.AST, scope: tuple[int, int]) -> None:
        for name, index, node in children(parent):
            if node in skipped:
                continue
            for operator, replacement in variants(node, parent):
                mutant = plan(parent, name, index, node, operator, replacement or ast.Pass(), scope)
                found.setdefault(mutant.id, mutant)
            inner = scope
            if isinstance(node, ast.FunctionDef) and scope == (0, 0):
                start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                inner = (start, node.end_lineno or 0)
            visit(node, inner)

    def plan(
        parent: ast.AST, name: str, index: int | None, node: Any, operator: str, new: ast.AST,
        scope: tuple[int, int],
    ) -> Mutant:  # fmt: skip
        def put(what: ast.AST) -> None:
            if index is None:
                setattr(parent, name, what)
            else:
                getattr(parent, name)[index] = what

        before, after = (" ".join(ast.unparse(part).split())[:90] for part in (node, new))
        return Mutant(
            file, node.lineno, node.col_offset, operator, f"{before} -> {after}", scope,
            lambda: put(ast.copy_location(new, node)), lambda: put(node),
        )  # fmt: skip

    visit(tree, (0, 0))
    return list(found.values())


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module from a tree in place of its file."""

    def __init__(self, module: str, tree: ast.Module, path: Path) -> None:
        self.name, self.tree, self.path = f"manualnn.{module}", tree, path

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self.path))

    def exec_module(self, module: Any) -> None:
        tree = ast.fix_missing_locations(self.tree)
        exec(compile(tree, str(self.path), "exec"), module.__dict__)


class Watch:
    """A plugin of pytest: which tests run in which order, and what comes of them.

    `chosen` are names of tests, fastest first, or None for all, which are then timed, and the first
    lines of the functions of `path` that they call are noted.
    """

    def __init__(self, chosen: list[str] | None, path: Path) -> None:
        self.chosen, self.path = chosen, str(path)
        self.outcome, self.by = "survived", ""
        self.seconds: dict[str, float] = {}
        self.called: dict[str, list[int]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.chosen is None:
            items[:] = [item for item in items if item.originalname not in SLOW]
        else:
            named = {item.nodeid: item for item in items}
            items[:] = [named[name] for name in self.chosen if name in named]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        torch.manual_seed(0)  # of tests that draw without a generator, in any order
        lines: set[int] = set()

        def note(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_filename == self.path:
                lines.add(frame.f_code.co_firstlineno)

        start = time.perf_counter()
        if self.chosen is None:
            threading.setprofile(note)
            sys.setprofile(note)
        try:
            return (yield)
        finally:
            if self.chosen is None:
                sys.setprofile(None)
                threading.setprofile(None)
            self.seconds[item.nodeid] = time.perf_counter() - start
            self.called[item.nodeid] = sorted(lines)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcome, self.by = "import", report.nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.outcome == "survived":
            self.outcome, self.by = "test", report.nodeid


def child(
    module: str, tree: ast.Module, plant: Callable[[], None], chosen: list[str], whole: bool,
    connection: Connection,
) -> None:  # fmt: skip
    """In a forked process: plant the fault, run the tests, send what came of it."""
    path = ROOT / "manualnn" / f"{module}.py"
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # looking for them takes as long as the rest
    plant()
    sys.meta_path.insert(0, Finder(module, tree, path))
    profile = hypothesis.settings(
        derandomize=True, database=None, deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    hypothesis.settings.register_profile("mutation", profile)
    hypothesis.settings.load_profile("mutation")
    files = sorted({name.partition("::")[0] for name in chosen})
    watch = Watch(None if whole else chosen, path)
    options = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *files], plugins=[watch])
    if code != pytest.ExitCode.OK and watch.outcome == "survived":
        watch.outcome = "import"
    loaded = [n for n in sys.modules if n.split(".")[0] not in OWN] if whole else []
    connection.send((watch.outcome, watch.by, watch.seconds, watch.called, loaded))
    connection.close()
    os._exit(0)


OWN = ("manualnn", "tests", "benchmarks", "conftest", "__main__", "__mp_main__")
FORK = multiprocessing.get_context("fork")


@dataclass
class Running:
    """A process at work on a mutant, until `end` at the latest."""

    process: Any
    connection: Connection
    start: float
    end: float

    @classmethod
    def of(
        cls, module: str, tree: ast.Module, plant: Callable[[], None], chosen: list[str],
        limit: float, whole: bool = False,
    ) -> "Running":  # fmt: skip
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=child, args=(module, tree, plant, chosen, whole, theirs))
        process.start()
        theirs.close()
        now = time.perf_counter()
        return cls(process, ours, now, now + limit)

    def result(self) -> tuple[str, str, dict[str, float], dict[str, list[int]], list[str]]:
        """What the process sent, or how it ended without."""
        try:
            sent = self.connection.recv() if self.connection.poll() else None
        except EOFError:
            sent = None
        late = time.perf_counter() > self.end
        if sent is None:
            self.process.kill()
        self.process.join()
        return sent or ("time-out" if late else "crash", "", {}, {}, [])


class Baseline:
    """The tests without a fault: they pass, how long each takes, what it calls."""

    def __init__(self, module: str, tree: ast.Module, tests: list[str]) -> None:
        files = [f"tests/test_{name}.py" for name in tests]
        for attempt in range(2):  # the second is as fast as those with faults
            running = Running.of(module, tree, lambda: None, files, 900, whole=True)
            wait([running.connection], 900)
            outcome, by, self.seconds, self.called, loaded = running.result()
            if outcome != "survived":
                raise SystemExit(f"without a fault: {outcome} {by}")
            if attempt == 0:
                for name in loaded:
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
        torch.set_num_threads(1)

    def tests(self, scope: tuple[int, int]) -> list[str]:
        """Those that call what lies between these lines, the fastest first; all for (0, 0)."""
        first, last = scope
        names = [
            name for name, lines in self.called.items()
            if any(first <= line <= last or not last for line in lines)
        ]  # fmt: skip
        return sorted(names, key=self.seconds.__getitem__)

    def limit(self, tests: list[str]) -> float:
        return 10 + 10 * sum(self.seconds[name] for name in tests)


def test_faults(
    module: str, chosen: list[Mutant], tree: ast.Module, baseline: Baseline, workers: int
) -> Iterator[dict[str, Any]]:
    """A record for each mutant, as they end."""
    waiting, running = chosen[::-1], dict[Connection, tuple[Running, Mutant]]()
    while waiting or running:
        while waiting and len(running) < workers:
            mutant = waiting.pop()
            tests = baseline.tests(mutant.scope)
            if not tests:
                yield record(mutant, "survived", "no test calls it", 0)
                continue
            one = Running.of(module, tree, mutant.plant, tests, baseline.limit(tests))
            running[one.connection] = one, mutant
        soonest = min((one.end for one, _ in running.values()), default=0)
        ready = wait(list(running), max(0, soonest - time.perf_counter()) + 0.01)
        for connection, (one, mutant) in list(running.items()):
            if connection in ready or time.perf_counter() > one.end:
                del running[connection]
                outcome, by, *_ = one.result()
                yield record(mutant, outcome, by, time.perf_counter() - one.start)


def record(mutant: Mutant, outcome: str, by: str, seconds: float) -> dict[str, Any]:
    return {
        "id": mutant.id, "operator": mutant.operator, "outcome": outcome, "by": by,
        "seconds": round(seconds, 2),
    }  # fmt: skip


def summary(module: str, records: list[dict[str, Any]]) -> str:
    """Counts and the score, and the survivors."""
    outcomes = Counter(r["outcome"] for r in records)
    survivors = [r for r in records if r["outcome"] == "survived"]
    score = 1 - len(survivors) / max(len(records), 1)
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    lines = [f"{module}: {len(records)} mutants: {counts}; killed {score:.1%}"]
    lines += [f"  survived  {r['id']}" for r in survivors]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--module", choices=MODULES, action="append")
    parser.add_argument("--only", help="mutants whose id contains this, as layers.py:54:")
    parser.add_argument("--every", type=int, default=1, help="each so many-th mutant: a sample")
    parser.add_argument("--tests", default=",".join(TESTS), help="names of tests/test_NAME.py")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("mutation"), help="a folder for the lines")
    parser.add_argument("--again", action="store_true", help="try survivors and errors anew")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for module in options.module or MODULES:
        path = ROOT / "manualnn" / f"{module}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        planned = [m for m in mutants(tree, path.name) if (options.only or "") in m.id]
        planned = planned[:: options.every]
        if options.list:
            print(*(m.id for m in planned), sep="\n")
            continue
        log = options.out / f"{module}.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        done = {r["id"]: r for r in map(json.loads, lines)}
        todo = [
            m for m in planned
            if m.id not in done or (options.again and done[m.id]["outcome"] == "survived")
        ]  # fmt: skip
        if todo:
            baseline = Baseline(module, tree, options.tests.split(","))
            with log.open("a") as file:
                for result in test_faults(module, todo, tree, baseline, options.workers):
                    print(json.dumps(result), file=file, flush=True)
                    done[result["id"]] = result
        print(summary(module, [done[m.id] for m in planned]))


if __name__ == "__main__":
    main()
