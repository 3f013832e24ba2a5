"""What is observed while a program runs: torch modes, and traps on what must not be called.

The one file of the package that names what is forbidden, because it must.

A function mode sees the calls of Python: `torch.nn.functional.linear` and an honest product reach
the dispatcher as the same `addmm`. A dispatch mode sees the operations, from wherever they come,
and their tensors. Modes hold in one thread; a thread that is begun meanwhile enters its own. Traps
stand in for functions for a while, note who called, and let the call go on.

What a library does for a user's file is the file's doing; but not what it does while it is being
imported, nor how it loads and transforms data, as torchvision's transforms are modules of nn.
"""

import _thread
import contextlib
import functools
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from .record import Record
from .source import BUILT_IN, CORE

# What a training step of this package may run: creation, views, indexing, elementwise arithmetic,
# exp / log / sqrt, comparisons, clamp, reductions and matrix products.
ALLOWED = set(
    """
    empty new_empty zeros ones full arange randperm scalar_tensor zero fill copy clone _to_copy
    detach lift_fresh alias
    view _unsafe_view unflatten reshape expand unsqueeze squeeze transpose t select slice
    as_strided unfold flatten movedim
    unbind permute stack cat
    index_select gather scatter index
    add sub mul div lerp neg abs sign frac reciprocal addcmul addcdiv
    exp exp2 expm1 log log1p sqrt rsqrt
    bitwise_xor bitwise_right_shift __rshift__
    eq ne lt le gt ge isfinite clamp maximum minimum where
    sum amax argmax all any item _local_scalar_dense is_nonzero
    mm addmm bmm baddbmm
    """.split()
)
# What other honest programs run besides.
COMMON = set(
    """
    empty_like empty_strided new_zeros new_ones new_full new_empty_strided zeros_like ones_like
    full_like rand randn randint rand_like randn_like randint_like uniform normal random bernoulli
    multinomial eye linspace logspace tril triu tril_indices triu_indices diag diagonal
    diagonal_copy diag_embed set_ set resize resize_ _reshape_alias view_as_real split
    split_with_sizes chunk narrow swapaxes flip roll repeat repeat_interleave tile constant_pad_nd
    index_put _index_put_impl index_add index_fill index_copy scatter_add scatter_reduce
    masked_fill masked_select masked_scatter take put nonzero sort topk kthvalue unique _unique
    _unique2 unique_dim unique_consecutive searchsorted bucketize bincount histc
    rsub pow square remainder fmod floor ceil round trunc floor_divide log2 log10 sin cos tan asin
    acos atan atan2 sinh cosh hypot erf sgn frac reciprocal heaviside nan_to_num
    bitwise_and bitwise_or bitwise_not bitwise_left_shift __and__ __or__ __xor__ __lshift__
    logical_and logical_or logical_not logical_xor isnan isinf equal isclose allclose isin
    clamp_min clamp_max fmax fmin mean std var var_mean std_mean std_var median nanmedian mode
    prod cumsum cumprod max min amin aminmax argmin argsort norm linalg_vector_norm nansum
    count_nonzero dot vdot mv addmv addr ger outer matmul einsum tensordot trace cross
    linalg_inv_ex linalg_solve_ex linalg_qr linalg_svd _linalg_svd _linalg_solve_ex
    _record_function_enter_new _record_function_exit _pin_memory is_pinned lift
    """.split()
)
# No arithmetic, and only new memory.
MOVES = set(
    """
    copy clone _to_copy fill zero zeros ones full arange randperm scalar_tensor lift_fresh detach
    index_select gather scatter index stack cat index_put masked_fill constant_pad_nd
    set resize
    """.split()
)
LAYERS = ("_fused", "native_", "cudnn_", "mkldnn_", "max_pool", "_scaled", "nll_loss", "_thnn")
MAKES = ("empty", "new_empty")
# Where an operand of a product has its inner dimension last.
INNER = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
OUTER_IN_PLACE = ("addmm_", "baddbmm_", "exp_", "mul_")
HERE = str(Path(__file__).parent)
LIBRARIES = tuple(
    {
        *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(torch.__file__).parent.parent),
    }
)
DATA = ("torchvision/transforms", "torchvision/datasets", "torchvision/io", "torch/utils/data")
# Where these call what they were given.
RUNNING = ("__call__", "__getitem__", "forward", "transform", "fetch")
SPAWNING = ("torch/multiprocessing",)


@dataclass
class Watch:
    """What is watched for, and whose files count: `root`, besides all that is no library's."""

    record: Record
    strict: bool = False
    allow: Collection[str] = ()
    root: Path | None = None
    restore: list[Callable[[], None]] = field(default_factory=list)

    def note(self, check: str, what: str, kind: str = "finding", through: str = "library") -> None:
        """Add a finding, unless a library did this on its own account."""
        where = self.caller(through)
        if where is not None:
            self.record.add(check, what, where, kind)

    def caller(self, through: str = "library") -> str | None:
        """file:line of the innermost frame of the user's; "" if there is none; None if a library
        has done this on its own account: an import, a data set; or, with `through` "standard", any
        installed one; with "nothing", anything in between."""
        frame, given = sys._getframe(1), False
        while frame is not None:
            kind = self.kind(frame.f_code.co_filename)
            if kind == "user":
                return f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if kind == "data":
                given = given or frame.f_code.co_name in RUNNING  # transforms.Lambda(torch.relu)
                kind = "standard" if given else "own account"
            if kind == "own account" or (kind != "watch" and through == "nothing"):
                return None
            if kind == "installed" and through == "standard":
                return None
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    def kind(self, file: str) -> str:
        return _kind(file, str(self.root) if self.root else "")

    def allows(self, name: str) -> bool:
        parts = name.split(".")
        return name in self.allow or any(
            part in self.allow or part.strip("_") in self.allow for part in parts
        )


@functools.cache
def _kind(file: str, root: str) -> str:
    """Whose file it is: of the watch, the user, a library; of an import or of loading data."""
    if file.startswith(HERE):
        return "watch"
    if file.startswith("<frozen importlib"):
        return "own account"
    if file.startswith("<frozen"):
        return "standard"
    # A virtual environment may lie in the user's folder; and this package in one, audited itself.
    if root and file.startswith(root) and root.startswith(LIBRARIES):
        return "user"
    if not file.startswith(LIBRARIES):
        return "user"  # <string>, which exec ran, too
    plain = file.replace(os.sep, "/")
    if any(f"/{part}/" in plain for part in DATA):
        return "data"
    installed = "-packages/" in plain and not any(f"/{part}/" in plain for part in SPAWNING)
    return "installed" if installed else "standard"


class Called(TorchFunctionMode):
    """Sees the calls of Python functions and methods of torch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        watch, kwargs = self.watch, kwargs or {}
        name, bad = _judged(func)
        last = name.split(".")[-1]
        if bad and not watch.allows(name):
            watch.note("functions", name)
        if kwargs.get("requires_grad") or (last in SWITCHES and _turned_on(last, name, args)):
            watch.note("functions", f"{name}: requires_grad")
        if watch.strict and last in OUTER_IN_PLACE and not torch.is_inference_mode_enabled():
            watch.note("functions", f"{name} outside inference_mode")
        return func(*args, **kwargs)


SWITCHES = ("requires_grad_", "__set__")


def _turned_on(last: str, name: str, args: Any) -> bool:
    value = args[1] if len(args) > 1 else True
    return bool(last == "requires_grad_" or "requires_grad" in name) and value is not False


@functools.cache
def _judged(func: Any) -> tuple[str, bool]:
    """The dotted name of a function of torch, and whether it is one that is forbidden."""
    func = getattr(func, "_trapped", func)
    name = resolve_name(func)
    if not name:
        of = getattr(func, "__module__", None)
        name = f"{of}." * bool(of) + getattr(func, "__qualname__", str(func))
    parts = name.replace("torch._C._nn", "torch.nn").split(".")
    bad = bool(set(parts[:-1]) & CORE) or parts[-1].rstrip("_") in BUILT_IN
    return name, bad or parts[-1] == "backward"


class Dispatched(TorchDispatchMode):
    """Sums the operations that reach the dispatcher, and sees those that are not allowed, and
    tensors that autograd follows."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch, self.table = watch, watch.record.table()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own hook: no import of the compiler, which takes a second, to be skipped by."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        base = name if name.startswith("_") else name.rstrip("_")
        if base not in ALLOWED:
            self._judge(name, base)
        out = func(*args, **kwargs)
        tensors = list(_tensors((args, list(kwargs.values()), out)))
        if any(t.requires_grad or t.grad_fn is not None for t in tensors):
            self.watch.note("tensors", f"a tensor of {name} requires grad")
        row = self.table.setdefault(base, [0, 0, 0])
        row[0] += 1
        if not (func.is_view or base.startswith(MAKES)) and tensors:
            row[1] += _flops(base, args, out, tensors)
            row[2] += sum(t.numel() * t.element_size() for t in tensors)
        return out

    def _judge(self, name: str, base: str) -> None:
        watch = self.watch
        if watch.allows(base):
            return
        built_in = base.lstrip("_") in BUILT_IN or "backward" in base
        layer = base.startswith(LAYERS)
        if watch.strict or built_in or layer:
            watch.note("operations", name)
        elif base not in COMMON:
            watch.note("operations", f"{name}: not a common operation", "note")


def _flops(base: str, args: Any, out: Any, tensors: list[torch.Tensor]) -> int:
    """Arithmetic of an operation: 2 M K N of a product, else one for each element of the largest
    tensor."""
    if base in INNER and isinstance(out, torch.Tensor):
        return 2 * out.numel() * int(args[INNER[base]].shape[-1])
    return 0 if base in MOVES else max(t.numel() for t in tensors)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


@contextlib.contextmanager
def observing(watch: Watch) -> Iterator[None]:
    """Watch what runs inside, in this thread and in those that it begins."""
    _set_traps(watch)
    try:
        with Called(watch), Dispatched(watch):
            yield
    finally:
        while watch.restore:
            watch.restore.pop()()


def _set_traps(watch: Watch) -> None:
    start, start_bare = threading.Thread.start, _thread.start_new_thread

    def watched(run: Callable[..., Any]) -> Callable[..., None]:
        def watched_run(*args: Any, **kwargs: Any) -> None:
            with Called(watch), Dispatched(watch):
                run(*args, **kwargs)

        return watched_run

    def start_watched(thread: threading.Thread) -> None:
        thread.run = watched(thread.run)  # type: ignore[method-assign]
        start(thread)

    def start_bare_watched(function: Callable[..., Any], *rest: Any) -> int:
        return start_bare(watched(function), *rest)

    _replace(watch, threading.Thread, "start", start_watched)
    _replace(watch, _thread, "start_new_thread", start_bare_watched)
    from torch.autograd import forward_ad, functional

    for owner, label, names in (
        (torch.autograd, "torch.autograd", ("grad", "backward")),
        (functional, "torch.autograd.functional", ("jacobian", "hessian", "vjp", "jvp", "hvp")),
        (forward_ad, "torch.autograd.forward_ad", ("make_dual",)),
        (torch.Tensor, "Tensor", ("backward",)),
        (torch.autograd.Function, "autograd.Function", ("apply",)),
        (torch.nn.Module, "nn.Module", ("__init__",)),
        (torch.optim.Optimizer, "optim.Optimizer", ("__init__",)),
        (torch.func, "torch.func", FUNC),
        (torch.nn.functional, "torch.nn.functional", _functions(torch.nn.functional)),
    ):
        for name in names:
            _trap(watch, owner, name, f"{label}.{name}".removesuffix(".__init__"))
    _trap(watch, torch.enable_grad, "__enter__", "torch.enable_grad", "nothing")


FUNC = ("grad", "grad_and_value", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "linearize")


def _functions(module: Any) -> list[str]:
    """The public functions of torch in a module, but for those that serve function modes."""
    homes = {name: getattr(value, "__module__", None) or "" for name, value in vars(module).items()}
    return [
        name
        for name, home in homes.items()
        if home.startswith("torch")
        and home not in ("torch.overrides", "torch._C")
        and callable(getattr(module, name))
        and not isinstance(getattr(module, name), type)
        and not name.startswith(("_", "boolean_dispatch"))
    ]


def _trap(watch: Watch, owner: Any, name: str, label: str, through: str = "library") -> None:
    raw = vars(owner)[name]

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not watch.allows(label):
            watch.note("traps", label, through=through)
        return function(*args, **kwargs)

    trap: Any
    if "classmethod" in type(raw).__name__:
        trap = classmethod(lambda cls, *args, **kw: call(raw.__get__(None, cls), *args, **kw))
    else:
        trap = functools.wraps(raw)(lambda *args, **kwargs: call(raw, *args, **kwargs))
        trap._trapped = raw
    _replace(watch, owner, name, trap)


def _replace(watch: Watch, owner: Any, name: str, value: Any) -> None:
    watch.restore.append(functools.partial(setattr, owner, name, vars(owner)[name]))
    setattr(owner, name, value)


# What the interpreter tells of itself: a process that begins, a library of machine code, a pickle.
PROCESSES = set(
    "subprocess.Popen os.system os.exec os.posix_spawn os.spawn os.startfile pty.spawn".split()
)
CALLABLES = set("eval exec compile __import__ open".split())


def observe_for_good(watch: Watch) -> None:
    """Watch this thread and what it begins until the process ends, with what atexit calls; hear
    the interpreter's audit events, too, which cannot be undone."""
    _set_traps(watch)
    _trap_spawn(watch)
    Called(watch).__enter__()
    Dispatched(watch).__enter__()

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in PROCESSES:
            watch.note("traps", f"{event}: starts a process", "unobserved", "standard")
        elif event == "ctypes.dlopen" and args[0]:
            watch.note("traps", f"ctypes loads {args[0]}", "unobserved", "standard")
        elif event == "import" and args[1] and watch.kind(str(args[1])) == "user":
            watch.record.add("traps", f"loads machine code: {args[1]}", "", "unobserved")
        elif event == "pickle.find_class":
            module, name = map(str, args)
            top = module.split(".")[0]
            program = top in ("os", "posix", "nt", "subprocess", "sys", "runpy", "importlib")
            if program or (top == "builtins" and name in CALLABLES):
                watch.note("traps", f"a pickle that calls {module}.{name}")
            elif top == "torch" and set(module.split(".")) & CORE:
                watch.note("traps", f"a pickle of {module}.{name}")

    sys.addaudithook(hear)


def _trap_spawn(watch: Watch) -> None:
    """Say so where multiprocessing begins a process that is no copy of this one."""
    from multiprocessing import util

    original = getattr(util, "spawnv_passfds", None)
    if original is None:
        return

    def spawn(*args: Any) -> Any:
        if "resource_tracker" not in str(args):
            watch.note("traps", "multiprocessing: starts a process", "unobserved", "standard")
        return original(*args)

    _replace(watch, util, "spawnv_passfds", spawn)
