"""The first check: what the source of a module imports and names.

Names are followed from imports and plain assignments: after `import torch as t; m = t.special` the
expression `m.expit` is `torch.special.expit`; so are `getattr(t, "special").expit` and
`t.__dict__["special"].expit`. `strict` is the form that this package holds itself to: the names
are forbidden on whatever object. In a user's script a name may be his own, so there only names of
torch are findings, and what could be either is a note.
"""

import ast
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .record import Finding

# Submodules of torch.
CORE = set("nn optim autograd func functorch _functorch".split())
INSIDE = set("_C _VF fx jit ops library overrides _python_dispatch".split())
MODULES = CORE | INSIDE - {"overrides", "_python_dispatch"}
BUILT_IN = set(
    """
    relu relu_ relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardtanh hardsigmoid
    hardswish softplus softsign threshold threshold_ sigmoid sigmoid_ logsigmoid expit tanh tanh_
    softmax log_softmax logsumexp logit logaddexp cross_entropy nll_loss mse_loss l1_loss kl_div
    binary_cross_entropy binary_cross_entropy_with_logits huber_loss smooth_l1_loss linear bilinear
    conv1d conv2d conv3d convolution conv_transpose2d im2col col2im fold max_pool1d max_pool2d
    avg_pool2d adaptive_avg_pool2d dropout dropout_ alpha_dropout feature_dropout layer_norm
    batch_norm group_norm instance_norm rms_norm embedding one_hot scaled_dot_product_attention
    glu hardshrink softshrink tanhshrink softmin gumbel_softmax log_sigmoid log_sigmoid_forward
    conv_tbc conv_transpose1d conv_transpose3d max_pool3d avg_pool1d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    feature_alpha_dropout embedding_bag ctc_loss hinge_embedding_loss cosine_embedding_loss
    margin_ranking_loss poisson_nll_loss triplet_margin_loss gru gru_cell lstm lstm_cell rnn_relu
    rnn_tanh
    """.split()
)
AUTOGRAD = set(
    "requires_grad requires_grad_ grad_fn enable_grad set_grad_enabled retain_grad".split()
)
TAMPERING = set(
    """
    DisableTorchFunction DisableTorchFunctionSubclass _disable_current_modes _pop_mode
    _len_torch_function_stack _len_torch_dispatch_stack _pop_torch_function_stack
    _get_current_dispatch_mode _get_current_dispatch_mode_stack
    _get_current_function_mode _get_current_function_mode_stack
    """.split()
)
# Libraries that differentiate or hold layers, losses and optimizers; and what is harmless in them.
FRAMEWORKS = set(
    """
    jax jaxlib flax haiku optax equinox tensorflow keras autograd tinygrad mxnet paddle theano
    chainer mlx functorch sklearn lightning pytorch_lightning fastai transformers timm skorch
    torchvision.models torchvision.ops scipy.optimize scipy.special.expit scipy.special.softmax
    scipy.special.log_softmax scipy.special.logsumexp scipy.special.logit
    """.split()
)
HARMLESS = set(
    """
    sklearn.datasets sklearn.metrics sklearn.model_selection sklearn.preprocessing sklearn.utils
    torch.autograd.no_grad torch.autograd.inference_mode
    """.split()
)
# What reading and parsing a user's file may raise.
UNREADABLE = (OSError, SyntaxError, ValueError, RecursionError, MemoryError)
# The one file of this package that must name what is forbidden, to set traps on it.
EXEMPT = "audit/watch.py"


def check_source(
    text: str,
    where: str = "",
    strict: bool = False,
    own: Collection[str] = (),
    allow: Collection[str] = (),
) -> Iterator[Finding]:
    """What the text of a module says against the rule.

    `where` is its file; `own` are names that its program defines, `allow` names that are permitted.
    Raises SyntaxError, or ValueError for null bytes.
    """
    seen = set()
    for finding in _Source(ast.parse(text), strict, set(own), set(allow)).findings():
        line = finding.where if not where else f"{where}:{finding.where}"
        if (line, finding.what) not in seen:
            seen.add((line, finding.what))
            yield replace(finding, where=line)


def check_package(folder: Path) -> Iterator[Finding]:
    """What all modules of this package but EXEMPT say, in the strict form."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name != EXEMPT:
            yield from check_source(path.read_text(encoding="utf-8"), name, strict=True)


def check_files(files: Iterable[Path], root: Path, allow: Collection[str]) -> Iterator[Finding]:
    """What the files of one program say; a file that cannot be parsed is `unobserved`."""
    texts, own = {}, set[str]()
    for path in files:
        name = path.relative_to(root).as_posix()
        own |= set(Path(name).with_suffix("").parts)  # a module of his own may be called autograd
        try:
            texts[name] = path.read_text(encoding="utf-8-sig")
            own |= set(defined(ast.parse(texts[name])))
        except UNREADABLE as error:
            texts.pop(name, None)
            yield _unread(name, error)
    for name, text in texts.items():
        try:
            yield from check_source(text, name, own=own, allow=allow)
        except UNREADABLE as error:
            yield _unread(name, error)


def _unread(name: str, error: Exception) -> Finding:
    line = getattr(error, "lineno", None)
    why = str(getattr(error, "msg", error)).partition("\n")[0] or type(error).__name__
    place = f"{name}:{line}" if line else name
    return Finding("source", f"cannot be read: {why}", place, "unobserved")


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines: functions, classes, parameters, attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


def local_files(script: Path, root: Path) -> list[Path]:
    """A script and the files below `root` that it imports, directly or not."""
    found, waiting = list[Path](), [script]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8-sig"))
        except UNREADABLE:
            continue  # check_files says so
        for name, level in _imported(tree):
            base = path.parents[level - 1] if level else None
            for folder in [base] if base else dict.fromkeys((path.parent, root)):
                waiting += _module_files(folder, name)
    return found


def _imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, level) of all imports; of `from a import b` also a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = f"{node.module}." if node.module else ""
            yield (start.rstrip("."), node.level)
            yield from ((start + alias.name, node.level) for alias in node.names)


def _module_files(folder: Path, name: str) -> Iterator[Path]:
    """The files that an import of the dotted `name` from `folder` runs."""
    parts = name.split(".") if name else []
    for i in range(len(parts) + 1):
        place = folder.joinpath(*parts[:i])
        choices = [place / "__init__.py", place.with_suffix(".py")] if i else []
        yield from [path for path in choices if path.is_file()][:1]


class _Source:
    def __init__(self, tree: ast.AST, strict: bool, own: set[str], allow: set[str]) -> None:
        self.strict, self.allow = strict, allow
        self.own = own | set(defined(tree))
        self.nodes = list(ast.walk(tree))
        self.read = {x.id for x in self.nodes if isinstance(x, ast.Name)}
        self.stars: set[str] = set()
        self.aliases: dict[str, str] = {}
        self._bind()

    def _bind(self) -> None:
        """Follow names from imports and from assignments of what is known already."""
        values: list[tuple[str, ast.expr]] = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.split(".")[0]
                    self.aliases[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    if alias.name == "*" and node.module == "torch":
                        self.stars |= (BUILT_IN | CORE | AUTOGRAD) - self.own
                    self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    values += _pairs(target, node.value)
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                values += _pairs(node.target, node.value)
        self.aliases |= {name: f"torch.{name}" for name in self.stars - set(self.aliases)}
        before = -1
        while before != len(self.aliases):
            before = len(self.aliases)
            for name, value in values:
                if name not in self.aliases and (path := self.path(value)):
                    self.aliases[name] = path

    def path(self, node: ast.AST) -> str:
        """The dotted name that an expression stands for, from an import on; "" if not known."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, "")
        if isinstance(node, ast.Attribute):
            base = self.path(node.value)
            if not base and node.attr == "torch":
                return "torch"  # self.torch, helper.torch
            return f"{base}.{node.attr}" if base else ""
        if isinstance(node, ast.Subscript) and (key := text_of(node.slice)):
            holder = node.value
            if self.path(holder) == "sys.modules":
                return key
            if isinstance(holder, ast.Attribute) and holder.attr == "__dict__":
                return _join(self.path(holder.value), key)
            if isinstance(holder, ast.Call) and isinstance(holder.func, ast.Name):
                if holder.func.id in ("globals", "locals") or not holder.args:
                    return self.aliases.get(key, "")
                if holder.func.id == "vars":
                    return _join(self.path(holder.args[0]), key)
        if isinstance(node, ast.Call) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else self.path(node.func)
            if name == "getattr" and len(node.args) > 1:
                return _join(self.path(node.args[0]), text_of(node.args[1]))
            if name in IMPORTERS and (module := text_of(node.args[0])):
                whole = name != "__import__" or len(node.args) > 3 or node.keywords
                return module if whole else module.split(".")[0]
        return ""

    def against(self, path: str) -> str:
        """The kind of finding that a dotted name is, or ""."""
        parts = path.split(".")
        if any(_below(path, name) for name in HARMLESS) and not self.strict:
            return ""
        if path in self.allow or set(parts) & self.allow:
            return ""
        if any(_below(path, name) for name in FRAMEWORKS) and parts[0] not in self.own:
            return "finding" if path != "sklearn" or self.strict else ""
        if _below(path, "manualnn.audit") and not self.strict:
            return "finding"
        if parts[0] != "torch":
            return ""
        if set(parts) & (CORE | BUILT_IN | TAMPERING) or parts[-1] in AUTOGRAD:
            return "finding"
        if self.strict:
            return "finding" if set(parts) & MODULES else ""
        return "note" if set(parts) & INSIDE else ""

    def findings(self) -> Iterator[Finding]:
        inner: set[int] = set()  # parts of an expression that has been judged as a whole
        for node in self.nodes:
            line = str(getattr(node, "lineno", 0))
            for what, kind in self._judge(node, inner):
                yield Finding("source", what, line, kind)

    def _judge(self, node: ast.AST, inner: set[int]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from self._judge_import(node)
        elif isinstance(node, ast.Attribute | ast.Subscript | ast.Name) and id(node) not in inner:
            yield from self._judge_name(node)
            inner.update(id(x) for x in _chain(node))
        elif isinstance(node, ast.Assign) and not (self.strict or _is_false(node.value)):
            names = {x.attr for x in node.targets if isinstance(x, ast.Attribute)}
            if "requires_grad" in names - self.own:
                yield ".requires_grad =", "finding"
        elif isinstance(node, ast.keyword) and node.arg in AUTOGRAD:
            if self.strict or (not _is_false(node.value) and node.arg not in self.own):
                yield f"{node.arg}=", "finding"
        elif isinstance(node, ast.Call):
            yield from self._judge_call(node, inner)

    def _judge_import(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.ImportFrom) and node.level:
            return
        for alias in node.names:
            if isinstance(node, ast.Import):
                path, what, bound = alias.name, f"import {alias.name}", alias.asname
                bound = bound or path.split(".")[0]
            else:
                path, bound = f"{node.module}.{alias.name}", alias.asname or alias.name
                what = f"from {node.module} import {alias.name}"
            if path == "torch.*" and self.strict:
                yield what, "finding"
            elif self.strict and _below(path, "importlib"):
                if not any(_below(path, f"importlib.{ok}") for ok in ("metadata", "resources")):
                    yield what, "finding"
            elif kind := self.against(path):
                used = self.strict or bound in self.read or alias.name == "*"
                if self.allow and path.split(".")[-1] in CORE | {"functional"}:
                    yield what, "note"  # what is used of it may be allowed, and is judged itself
                elif used:
                    yield what, kind
                else:  # a line of boilerplate is no accusation
                    yield f"{what}, which is not used", "note"

    def _judge_name(self, node: ast.expr) -> Iterator[tuple[str, str]]:
        path = self.path(node)
        if isinstance(node, ast.Name):
            if node.id in self.stars and isinstance(node.ctx, ast.Load):
                yield path, self.against(path) or "note"
            return
        if path and (kind := self.against(path)):
            yield path, kind
            return
        if not isinstance(node, ast.Attribute):
            return
        for attribute in _chain(node):
            name = attribute.attr if isinstance(attribute, ast.Attribute) else ""
            if self.strict and name in BUILT_IN | AUTOGRAD:
                yield f".{name}", "finding"
            elif path or name in self.own or name in self.allow or self.strict:
                continue
            elif name in TAMPERING:
                yield f".{name}", "finding"
            elif name in BUILT_IN | {"retain_grad"}:
                yield f".{name}: of a tensor, or its own?", "note"

    def _judge_call(self, node: ast.Call, inner: set[int]) -> Iterator[tuple[str, str]]:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        path = self.path(node.func)
        first = node.args[0] if node.args else None
        text = text_of(first) if first else ""
        if not self.strict and first and (kind := self.against(made := self.path(node))):
            yield made, kind  # getattr(torch, "relu"), import_module("torch.nn")
        if name in ("exec", "eval", "compile", "__import__"):
            if self.strict:
                yield f"{name}()", "finding"
            elif name != "__import__" and text:
                try:
                    inside = _Source(ast.parse(text), False, self.own, self.allow)
                except (SyntaxError, ValueError):
                    return
                inside.aliases = self.aliases | inside.aliases
                found = list(inside.findings())
                yield from ((f"{name} of text: {x.what}", x.kind) for x in found)
        if first is not None and not text and name in ("exec", "eval") and not self.strict:
            yield f"{name} of text that is not written there", "note"
        if first is not None and not text and (name or path) in IMPORTERS and not self.strict:
            yield "imports a module whose name is not written there", "note"
        if name in ("getattr", "vars") and first is not None and _below(self.path(first), "torch"):
            if self.strict:
                yield f"{name}(torch...)", "finding"
            elif name == "getattr" and not text_of(node.args[-1]):
                yield "getattr of torch by a name that is not written there", "note"
        # A layer's own backward takes what it needs; autograd's takes nothing, or one gradient.
        if method == "backward" and len(node.args) < 2:
            if self.strict:
                yield ".backward()", "finding"
            elif not path and "backward" not in self.own | self.allow:
                yield ".backward(): of a tensor, or its own?", "note"
        off = first is not None and _is_false(first) and not self.strict
        if method == "requires_grad_" and not (off or self.strict or method in self.own):
            yield ".requires_grad_()", "finding"
        if off and path.split(".")[-1] == "set_grad_enabled":
            inner.update(id(x) for x in _chain(node.func))  # turned off, as by no_grad


IMPORTERS = ("__import__", "importlib.import_module", "importlib.__import__")


def text_of(node: ast.AST) -> str:
    """The string that an expression of constants is; "" if it is not."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return left + right if left and right else ""
    if isinstance(node, ast.JoinedStr):
        parts = [text_of(x.value if isinstance(x, ast.FormattedValue) else x) for x in node.values]
        return "".join(parts) if all(parts) else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        items = node.args[0]
        if node.func.attr == "join" and isinstance(items, ast.List | ast.Tuple):
            separator = node.func.value
            if isinstance(separator, ast.Constant) and isinstance(separator.value, str):
                return separator.value.join(map(text_of, items.elts))
    return ""


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=False):
            yield from _pairs(one, other)


def _chain(node: ast.AST) -> Iterator[ast.AST]:
    """An expression a.b["c"].d and what it is of, outermost first."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        yield node
        node = node.value
    if isinstance(node, ast.Name):
        yield node


def _join(base: str, name: str) -> str:
    return f"{base}.{name}" if base and name else ""


def _below(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False
