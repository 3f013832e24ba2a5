"""The project's rules: what the source may import and name, and what a step may run."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parent.parent / "manualnn"

# A module imports only modules of lower floors.
FLOORS = {
    "errors": 0, "files": 0, "parameters": 0, "workspace": 0,
    "capture": 1, "layers": 1, "losses": 1, "optimizers": 1, "data": 1, "config": 1, "plots": 1,
    "differences": 1, "own_function": 1, "safe": 1,
    "results": 2, "network": 2, "show": 2,
    "diagnosis": 3, "steps": 3, "checkpoint": 3, "circumstances": 3, "training": 4, "evaluation": 5,
    "experiment": 6,
    "random_labels": 7, "compare": 7, "lr_find": 7, "sweep": 7, "doctor": 7, "coursework": 7,
    "gradcheck": 7, "audit": 7, "grade": 8, "inspection": 7, "reproduce": 7,
    "report": 8, "own_gradient": 8, "hand_in": 9, "cli_checks": 10, "cli": 11, "__main__": 12,
}  # fmt: skip
# Within floor 0 these build on each other, in this order.
GROUND = ["errors", "files", "parameters", "workspace"]

MODULES = set("nn optim autograd func functorch _C _VF fx jit ops library".split())
BUILT_IN = set(
    """
    relu relu_ relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardtanh hardsigmoid
    hardswish softplus softsign threshold threshold_ sigmoid sigmoid_ logsigmoid expit tanh tanh_
    softmax log_softmax logsumexp logit logaddexp cross_entropy nll_loss mse_loss l1_loss kl_div
    binary_cross_entropy binary_cross_entropy_with_logits huber_loss smooth_l1_loss linear bilinear
    conv1d conv2d conv3d convolution conv_transpose2d im2col col2im fold max_pool1d max_pool2d
    avg_pool2d adaptive_avg_pool2d dropout dropout_ alpha_dropout feature_dropout layer_norm
    batch_norm group_norm instance_norm rms_norm embedding one_hot scaled_dot_product_attention
    """.split()
)
AUTOGRAD = set(
    "requires_grad requires_grad_ grad_fn enable_grad set_grad_enabled retain_grad".split()
)


def source_violations(source: str) -> Iterator[str]:
    """What the source of a module names or imports against the rule, one line each."""
    for node in ast.walk(ast.parse(source)):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _bad_module(alias.name, line)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            yield from _bad_module(module, line)
            for alias in node.names if module.split(".")[0] == "torch" else ():
                if alias.name in MODULES | BUILT_IN | AUTOGRAD | {"*"}:
                    yield f"{line}: from {module} import {alias.name}"
        elif isinstance(node, ast.Attribute):
            if node.attr in BUILT_IN | AUTOGRAD:
                yield f"{line}: .{node.attr}"
            elif node.attr in MODULES and _root(node) == "torch":
                yield f"{line}: torch.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in AUTOGRAD:
            yield f"{line}: {node.arg}="
        elif isinstance(node, ast.Call):
            yield from _bad_call(node, line)


def _bad_module(name: str, line: str) -> Iterator[str]:
    parts = name.split(".")
    if (parts[0] == "torch" and set(parts[1:]) & MODULES) or parts[0] == "functorch":
        yield f"{line}: import {name}"
    if parts[0] == "importlib" and name not in ("importlib.metadata", "importlib.resources"):
        yield f"{line}: import {name}"


def _bad_call(node: ast.Call, line: str) -> Iterator[str]:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in ("exec", "eval", "compile", "__import__"):
        yield f"{line}: {name}()"
    if name in ("getattr", "vars") and node.args and _root(node.args[0]) == "torch":
        yield f"{line}: {name}(torch...)"
    # A layer's own backward takes what it needs; autograd's takes nothing, or one gradient.
    if isinstance(node.func, ast.Attribute) and node.func.attr == "backward" and len(node.args) < 2:
        yield f"{line}: .backward()"


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


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


# What a training step may run: creation, views, indexing, elementwise arithmetic, exp / log / sqrt,
# comparisons, clamp, reductions and matrix products.
ALLOWED = set(
    """
    empty new_empty zeros ones full arange randperm scalar_tensor zero fill copy clone _to_copy
    detach lift_fresh alias
    view _unsafe_view unflatten reshape expand unsqueeze squeeze transpose t select slice
    as_strided unfold flatten movedim
    unbind permute stack cat
    index_select gather scatter index
    add sub mul div lerp neg abs sign reciprocal addcmul addcdiv
    exp exp2 expm1 log log1p sqrt rsqrt
    bitwise_xor bitwise_right_shift __rshift__
    eq ne lt le gt ge isfinite clamp maximum minimum where
    sum amax argmax all any item _local_scalar_dense is_nonzero
    mm addmm bmm baddbmm
    """.split()
)


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach the dispatcher and notes what is not allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.violations: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        base = name if name.startswith("_") else name.rstrip("_")
        self.counts[base] += 1
        if base not in ALLOWED:
            self.violations.add(f"operation {name}")
        out = func(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values(), out):
            if isinstance(value, torch.Tensor) and (
                value.requires_grad or value.grad_fn is not None
            ):
                self.violations.add(f"a tensor of {name} requires grad")
        return out


class Called(TorchFunctionMode):
    """Sees the Python-level calls: `torch.nn.functional.linear` dispatches like an honest addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.violations: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = resolve_name(func) or getattr(func, "__qualname__", str(func))
        parts = name.replace("torch._C._nn", "torch.nn").split(".")
        if set(parts[:-1]) & MODULES or parts[-1].rstrip("_") in BUILT_IN:
            self.violations.add(f"call {name}")
        if parts[-1] == "backward" or parts[-1] in ("requires_grad_",):
            self.violations.add(f"call {name}")
        if (
            parts[-1] in ("addmm_", "baddbmm_", "exp_", "mul_")
            and not torch.is_inference_mode_enabled()
        ):
            self.violations.add(f"{name} outside inference_mode")
        return func(*args, **(kwargs or {}))


def runtime_violations(work) -> set[str]:
    """What a call of `work` runs against the rule."""
    called, dispatched = Called(), Dispatched()
    with called, dispatched:
        work()
    return called.violations | dispatched.violations
