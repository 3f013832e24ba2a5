"""Mutation testing: one small fault at a time in the source; some test has to fail.

`python -m benchmarks.mutate` plants every fault that `variants` and `calls` know in layers.py,
losses.py and optimizers.py, 1,900 of them, and writes a line of JSON for each: killed by a failing
test, by the time-out, by a crash or at import, or survived. A run that was broken off goes on where
it stopped; `--again` tries the survivors of the file anew, after tests were added. Those left over
are listed in benchmarks/mutants.md.

mutmut and cosmic-ray do this for any project, but know nothing of tensors: `sub_` for `add_`,
`amin` for `amax`, a lost `neg_()`, dimensions that change places. And a process for each mutant
spends seconds on importing torch. Here one session of pytest collects the tests, and each mutant is
a fork of it, in which the functions get the mutated code; of the tests only those that call the
function run, the fastest first, until one fails. That takes a twentieth of a second for most. What
is done at import, such as a constant, takes an import of the package and the tests in the fork.

Not mutated: annotations, docstrings, bodies of protocols, what is inside an InputError, assertions,
zip's `strict`, defaults of parameters that the function does not use.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import importlib.abc
import importlib.util
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = ("layers", "losses", "optimizers")
TESTS = ("layers", "losses", "optimizers", "properties", "network", "steps")  # tests/test_*.py
# A compiler, a process of its own, a profiler whose threads do not outlive a fork: left out.
LEFT_OUT = (
    "test_a_compiled_step_gives_the_same",
    "test_weights_file_is_plain_for_torch_load",
    "test_a_step_allocates_nothing_of_a_kilobyte",
)
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
# Whose first two arguments may change places, or may never.
UNSWAPPED = {
    "add", "mul", "eq", "max", "min", "maximum", "bitwise_xor", "addcmul_", "transpose",
    "isinstance",
}  # fmt: skip


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
    """Every (operator, replacement) for a node; None deletes a statement."""
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
        for value in (False,) if isinstance(node, ast.While) else (True, False):
            fields = {**dict(ast.iter_fields(node)), "test": ast.Constant(value)}
            yield "condition", type(node)(**fields)


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
    if len(args) > 1 and name not in UNSWAPPED:
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
        execute(self.tree, self.path, module.__dict__)


def execute(tree: ast.Module, path: Path, namespace: dict[str, Any]) -> None:
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), namespace)


def give_code(old: Any, new: dict[str, Any], path: Path) -> None:
    """Functions and methods of `path` in a module or class get the code of those in `new`."""
    for name, value in list(vars(old).items()):
        other = new.get(name)
        if isinstance(value, types.FunctionType) and value.__code__.co_filename == str(path):
            value.__code__, value.__defaults__ = other.__code__, other.__defaults__
            value.__kwdefaults__ = other.__kwdefaults__
        elif isinstance(value, type) and value.__module__ == new.get("__name__"):
            give_code(value, {**vars(other)}, path)


@dataclass
class Report:
    """What came of a mutant, or of no fault: `by` is the first test that failed; for each test how
    long it took, and the first lines of the functions of the module that it called."""

    outcome: str = "survived"
    by: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    called: dict[str, list[int]] = field(default_factory=dict)


class Watch:
    """A plugin of pytest that runs the tests `chosen` in that order. `seconds` are what each takes
    without a fault: with ten times that, and ten more, SIGALRM ends the process."""

    def __init__(self, chosen: list[str] | None = None, seconds: dict[str, float] | None = None):
        self.chosen, self.seconds, self.report = chosen, seconds, Report()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.chosen is not None:
            named = {item.nodeid: item for item in items}
            items[:] = [named[name] for name in self.chosen]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.report.outcome, self.report.by = "import", report.nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.report.outcome == "survived":
            self.report.outcome, self.report.by = "test", report.nodeid

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.seconds is not None:
            signal.alarm(int(10 + 10 * self.seconds[item.nodeid]))
        torch.manual_seed(0)  # of tests that draw without a generator, in any order


class Laboratory(Watch):
    """A session of pytest that has collected the tests, and in which processes are forked."""

    def __init__(self, module: str, tree: ast.Module, todo: list[Mutant], workers: int,
                 write: Callable[[str], None]) -> None:  # fmt: skip
        super().__init__()
        self.module, self.tree, self.todo = module, tree, todo
        self.workers, self.write = workers, write
        self.path = ROOT / "manualnn" / f"{module}.py"
        self.base = Report()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {i.nodeid: i for i in session.items if i.originalname not in LEFT_OUT}
        self.base = self.measure()
        self.seconds = self.base.seconds
        gc.collect()
        gc.freeze()  # processes share what is there now
        # The two ways to plant a fault, without one: what fails then proves nothing.
        for scope in {m.scope if m.scope == (0, 0) else (1, sys.maxsize) for m in self.todo}:
            nothing = Mutant("", 0, 0, "", "", scope, lambda: None, lambda: None)
            if self.base.outcome == "survived":
                [(_, self.base.outcome, self.base.by, _)] = self.results([nothing])
        for mutant, outcome, by, seconds in self.results(self.todo if self.sound else []):
            record = {"id": mutant.id, "operator": mutant.operator, "outcome": outcome, "by": by}
            self.write(json.dumps({**record, "seconds": round(seconds, 2)}))
        gc.unfreeze()
        return True

    @property
    def sound(self) -> bool:
        """Whether the tests pass where there is no fault."""
        return self.base.outcome == "survived" and bool(self.base.called)

    def results(self, todo: list[Mutant]) -> Iterator[tuple[Mutant, str, str, float]]:
        """(mutant, outcome, by, seconds), as they end."""
        waiting = todo[::-1]
        running: dict[Connection, tuple[Any, float, Mutant]] = {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                mutant = waiting.pop()
                start = time.perf_counter()
                connection, process = self.start(mutant)
                running[connection] = process, start, mutant
            for connection in wait(list(running)):
                process, start, mutant = running.pop(connection)  # type: ignore[index]
                report = self.finish(connection, process)  # type: ignore[arg-type]
                yield mutant, report.outcome, report.by, time.perf_counter() - start

    def start(self, mutant: Mutant) -> tuple[Connection, Any]:
        """A process that will send what comes of a mutant."""
        ours, theirs = FORK.Pipe(duplex=False)

        def run() -> None:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            theirs.send(self.with_fault(mutant, self.tests(mutant.scope)))
            theirs.close()
            os._exit(0)

        process = FORK.Process(target=run)
        process.start()
        theirs.close()
        return ours, process

    def finish(self, connection: Connection, process: Any) -> Report:
        """What a process sent, or how it ended without."""
        with contextlib.suppress(EOFError):
            report: Report = connection.recv()
            process.join()
            return report
        process.join()
        return Report("time-out" if process.exitcode == -signal.SIGALRM else "crash")

    def measure(self) -> Report:
        for _ in range(2):  # the second time nothing is imported any more
            for name, item in self.items.items():
                lines: set[int] = set()

                def note(frame: Any, event: str, _: Any, lines: set[int] = lines) -> None:
                    if event == "call" and frame.f_code.co_filename == str(self.path):
                        lines.add(frame.f_code.co_firstlineno)

                start = time.perf_counter()
                threading.setprofile(note)
                sys.setprofile(note)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                sys.setprofile(None)
                threading.setprofile(None)  # type: ignore[arg-type]
                self.report.seconds[name] = time.perf_counter() - start
                self.report.called[name] = sorted(lines)
        return self.report

    def tests(self, scope: tuple[int, int]) -> list[str]:
        """Those that call what lies between these lines, the fastest first; all for (0, 0)."""
        first, last = scope
        names = [
            name for name, lines in self.base.called.items()
            if any(first <= line <= last or not last for line in lines)
        ]  # fmt: skip
        return sorted(names, key=self.base.seconds.__getitem__)

    def with_fault(self, mutant: Mutant, tests: list[str]) -> Report:
        mutant.plant()
        if mutant.scope == (0, 0):
            return self.anew(tests)
        module = sys.modules[f"manualnn.{self.module}"]
        namespace = {"__name__": module.__name__, "__package__": module.__package__}
        try:
            execute(self.tree, self.path, namespace)
        except Exception as error:
            return Report("import", repr(error))
        give_code(module, namespace, self.path)
        for name in tests:
            item = self.items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.report.outcome != "survived":
                break
        return self.report

    def anew(self, tests: list[str]) -> Report:
        """What is done at import, such as a constant, others have from there: all is imported."""
        for name in list(sys.modules):
            if name.partition(".")[0] in ("manualnn", "tests", "benchmarks"):
                del sys.modules[name]
        sys.meta_path.insert(0, Finder(self.module, self.tree, self.path))
        watch = Watch(tests, self.seconds)
        files = sorted({name.partition("::")[0] for name in tests})
        code = pytest.main([*OPTIONS, "-x", *files], plugins=[watch])
        if code != pytest.ExitCode.OK and watch.report.outcome == "survived":
            watch.report.outcome = "import"
        return watch.report


FORK = multiprocessing.get_context("fork")
OPTIONS = ("-q", "-s", "--tb=no", "--assert=plain", "-p", "no:cacheprovider")


def experiment(
    module: str, tree: ast.Module, todo: list[Mutant], tests: list[str], workers: int,
    write: Callable[[str], None],
) -> None:  # fmt: skip
    """Give `write` a line of JSON for each mutant."""
    torch.set_num_threads(1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # looking for them takes long
    profile = hypothesis.settings(
        derandomize=True, database=None, deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    hypothesis.settings.register_profile("mutation", profile)
    hypothesis.settings.load_profile("mutation")
    laboratory = Laboratory(module, tree, todo, workers, write)
    files = [re.sub(r"^\w+", r"tests/test_\g<0>.py", name) for name in tests]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        pytest.main([*OPTIONS, *files], plugins=[laboratory])
    if not laboratory.sound:
        raise SystemExit(f"{output.getvalue()}\nwithout a fault: {laboratory.base}")


def summary(module: str, records: list[dict[str, Any]]) -> str:
    """Counts and the score, and the survivors."""
    outcomes = Counter(r["outcome"] for r in records)
    survivors = [r for r in records if r["outcome"] == "survived"]
    score = 1 - len(survivors) / max(len(records), 1)
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    lines = [f"{module}: {len(records)} mutants: {counts}; killed {score:.1%}"]
    lines += [f"  survived  {r['id']}" for r in survivors]
    return "\n".join(lines)


def read(log: Path) -> dict[str, dict[str, Any]]:
    """The records of a file, of each mutant the last one."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {record["id"]: record for record in map(json.loads, lines)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--module", choices=MODULES, action="append")
    parser.add_argument("--only", action="append", help="whose id contains this: layers.py:54:")
    parser.add_argument("--every", type=int, default=1, help="each so many-th mutant: a sample")
    parser.add_argument(
        "--tests", default=",".join(TESTS), help="NAME or NAME::TEST of tests/test_NAME.py"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/mutation"), help="a folder")
    parser.add_argument("--again", action="store_true", help="try survivors anew")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for module in options.module or MODULES:
        path = ROOT / "manualnn" / f"{module}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = options.only or [""]
        planned = [m for m in mutants(tree, path.name) if any(part in m.id for part in parts)]
        planned = planned[:: options.every]
        if options.list:
            print(*(m.id for m in planned), sep="\n")
            continue
        log = options.out / f"{module}.jsonl"
        done = read(log)
        todo = [
            m for m in planned
            if m.id not in done or (options.again and done[m.id]["outcome"] == "survived")
        ]  # fmt: skip
        if todo:
            with log.open("a") as file:
                write = partial(print, file=file, flush=True)
                experiment(module, tree, todo, options.tests.split(","), options.workers, write)
            done = read(log)
        print(summary(module, [done[m.id] for m in planned]))


if __name__ == "__main__":
    main()
