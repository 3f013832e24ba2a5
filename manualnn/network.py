"""R networks of one shape: layers, parameters in one buffer, forward, backward, save and load.

Shapes: R replicas, B samples, P parameters of one network, K outputs.
"""

import copy
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Streamed
from .errors import InputError
from .files import replacing
from .find import WEIGHTS, find_weights
from .layers import ChannelsLast, Conv2d, Dropout, Layer, arrange_pooling, build_layers
from .losses import LOSSES, decide, outputs
from .parameters import Layout
from .safe import read_file, read_tensors, shown
from .workspace import Workspace, generator

INIT_STREAM = 0x1417
CHUNK, LARGEST = 2000, 2**23  # in evaluation: samples at a time, numbers of a layer at a time


class Network:
    """R independent networks with the same layers, for examples of `shape`.

    `theta` (R, P) holds all parameters, `params` its views: for each layer a dict of name -> view.
    `described` are the layers as they were asked for, `layers` those that compute the same faster;
    `activations` is how many numbers forward makes of one sample, about.
    """

    def __init__(
        self,
        specs: list[list[Any]],
        shape: tuple[int, ...],
        classes: int,
        replicas: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.specs, self.shape = specs, tuple(shape)
        self.described: list[Layer] = build_layers(specs, self.shape, classes)
        self.layers = arrange_pooling(self.described)
        named, out, widest = [], self.shape, 1
        self.activations, self.convolutional = math.prod(out), False
        for layer in self.layers:
            out, shapes = layer.build(out)
            named.append(shapes)
            patches = out[0] * out[1] * shapes["weight"][0] if isinstance(layer, Conv2d) else 0
            self.convolutional |= bool(patches)
            widest = max(widest, math.prod(out), patches)
            self.activations += math.prod(out) + patches
        self.chunk = max(1, min(CHUNK, LARGEST // widest))
        if len(out) != 1:
            raise InputError(f"model.layers: the output has shape {out}; end with a linear layer")
        self.outputs = out[0]
        self.classes = max(classes, self.outputs)  # a wider last layer has classes never seen
        self.layout = Layout.of(named)
        if not self.layout.count:
            raise InputError("model.layers: there is no layer with parameters; add a linear layer")
        self.first = self.layout.slots[0].layer  # layers before it need no gradient
        if replicas * self.layout.width >= 2**60:  # more than an address can tell
            raise InputError(
                f"model.layers: {self.layout.count:.2g} parameters do not fit into any memory"
            )
        self.theta = torch.zeros(replicas, self.layout.width, dtype=dtype, device=device)
        self.params = self.layout.views(self.theta)

    @property
    def replicas(self) -> int:
        return len(self.theta)

    def summary(self) -> list[dict[str, Any]]:
        """For each layer its name, the shape of its output, images as (C, H, W), and its number of
        parameters."""
        rows, shape, turned = [], self.shape, False
        for layer in self.described:
            shape, parameters = layer.build(shape)
            if isinstance(layer, ChannelsLast):  # only a view
                turned = True
                continue
            own = sum(math.prod(size) for size in parameters.values())
            out = (shape[-1], *shape[:-1]) if turned and len(shape) == 3 else shape
            name = type(layer).__name__.lower()
            rows.append({"name": name, "output_shape": list(out), "parameters": own})
        return rows

    def first_images(self, r: int = 0) -> Tensor:
        """The weights of each unit of the first layer, (units, C, H, W) or (units, D)."""
        weight = self.params[self.first]["weight"][r].cpu()
        layer = self.layers[self.first]
        if isinstance(layer, Conv2d):
            return layer.to_torch(weight)
        return weight.t().reshape(-1, *self.shape)

    def initialize(self, seeds: list[int], init: str = "he") -> None:
        """Draw the weights of replica r from seeds[r]; biases become 0.

        he: N(0, 2 / fan_in) (He et al. 2015, eq. 10); xavier: N(0, 2 / (fan_in + fan_out)) (Glorot
        and Bengio 2010, eq. 12). A convolution has fan_in = kh kw C and fan_out = kh kw O.
        """
        for r, seed in zip(range(self.replicas), seeds, strict=True):
            draw = generator(seed, INIT_STREAM)
            for slot in self.layout.slots:
                part = self.params[slot.layer][slot.name][r]
                if slot.name == "bias":
                    part.zero_()
                    continue
                fan_in, fan_out = slot.shape
                if isinstance(layer := self.layers[slot.layer], Conv2d):
                    fan_out *= math.prod(layer.kernel)
                std = math.sqrt(2 / (fan_in if init == "he" else fan_in + fan_out))
                # Drawn in float64 so that fp32 and fp64 runs start from the same numbers.
                part.copy_(
                    torch.randn(slot.shape, generator=draw, dtype=torch.float64, device="cpu") * std
                )

    def forward(self, x: Tensor, workspace: Workspace) -> tuple[Tensor, list[Any]]:
        """Logits (R, B, K) of x (R, B, ...), and what backward needs."""
        caches = []
        for layer, params in zip(self.layers, self.params, strict=True):
            x, cache = layer.forward(params, x, workspace)
            caches.append(cache)
        return x, caches

    def backward(
        self,
        dlogits: Tensor,
        caches: list[Any],
        grads: list[dict[str, Tensor]],
        workspace: Workspace,
        need_dx: bool = False,
        beta: int = 0,
    ) -> Tensor | None:
        """Make the views `grads` beta times themselves plus the gradient; the gradient at x, if
        asked for."""
        dy: Tensor | None = dlogits
        for i in range(len(self.layers) - 1, -1 if need_dx else self.first - 1, -1):
            assert dy is not None
            wanted = need_dx or i > self.first
            dy = self.layers[i].backward(
                self.params[i], grads[i], caches[i], dy, workspace, wanted, beta
            )
        return dy

    def chunks(
        self, x: Tensor | Streamed, workspace: Workspace, rows: slice | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(start, logits (R, b, K)) for the samples x (N, ...), or those of `rows`, in evaluation
        mode, in chunks. The logits are valid until the next chunk.
        """
        rows = rows or slice(0, len(x))
        chunk = max(1, self.chunk // -(-self.replicas // 8))
        for start in range(rows.start, rows.stop, chunk):
            end = min(start + chunk, rows.stop)
            yield start, self._evaluate(x[start:end], workspace)

    @torch.inference_mode()
    def _evaluate(self, x: Tensor, workspace: Workspace) -> Tensor:
        workspace.begin(("evaluate", self.replicas, len(x)))
        return self.forward(x.expand(self.replicas, *x.shape), workspace)[0]

    def logits(self, x: Tensor | Streamed) -> Tensor:
        """Logits (R, N, K) of normalised samples x (N, ...), in evaluation mode."""
        workspace = Workspace(self.theta.dtype, self.theta.device)
        parts = [logits.clone() for _, logits in self.chunks(x, workspace)]
        return torch.cat(parts, 1)

    def predict(self, x: Tensor) -> Tensor:
        """Predicted classes (R, N) of normalised samples x (N, ...)."""
        return decide(self.logits(x))

    def numbers(self, batch_size: int) -> int:
        """How many numbers of one network a step on a batch goes through, about."""
        return self.layout.width + batch_size * self.activations

    def part(self, replicas: slice) -> "Network":
        """Some of the networks; their parameters are views of these."""
        own = copy.copy(self)
        own.theta = self.theta[replicas]
        own.params = self.layout.views(own.theta)
        own.layers = [
            replace(layer, p=layer.p[replicas])
            if isinstance(layer, Dropout) and isinstance(layer.p, tuple)
            else layer
            for layer in self.layers
        ]
        return own

    def select(self, row: Tensor) -> "Network":
        """A network of one replica with the parameters `row` (P,)."""
        one = Network(self.specs, self.shape, self.classes, 1, row.dtype, row.device)
        one.theta[0].copy_(row)
        return one


@dataclass(frozen=True)
class Weights:
    """What a weights file holds: one network on the CPU, and its `meta`; `foreign` where that is
    guessed, as the file says nothing of its layers."""

    network: Network
    meta: dict[str, Any]
    foreign: bool = False


def save_weights(
    path: Path | str, network: Network, meta: dict[str, Any], replica: int = 0
) -> None:
    """Write one replica as a dict of tensors w1, b1, w2, ... and `meta`, readable by `torch.load`.

    `meta` may hold only str, int, float, bool, None, list and dict. Layers, shape and classes are
    added to it. Raises InputError where `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the file to write, as in {path / WEIGHTS}")
    meta = {
        "layers": network.specs,
        "shape": list(network.shape),
        "classes": network.classes,
        "torch": str(torch.__version__),
        **meta,
    }
    tensors = network.layout.to_dict(network.theta[replica])
    for key, slot in zip(network.layout.keys(), network.layout.slots, strict=True):
        stored = _to_file(network.layers[slot.layer], slot.name, tensors[key])
        tensors[key] = stored.contiguous()
    content = io.BytesIO()  # torch's own writer says no more than that it failed
    torch.save({**tensors, "meta": meta}, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())  # no view, which a failure would keep alive


def load_weights(path: Path | str, activation: str | None = None) -> Weights:
    """Read a weights file (a path, a run's folder, or a name as `find_weights` takes it), or a
    foreign dict of w1, b1, w2, ... with `activation` ("relu" by default, "sigmoid" or "tanh")
    between its layers.

    Nothing in the file is executed, and no more memory taken than a few times its size. Raises
    InputError when it is no weights file, or its tensors do not fit its layers.
    """
    named = (Path(path).name == str(path) and not Path(path).suffix) or Path(path).is_dir()
    path = find_weights(path) if named else Path(path)
    content = read_file(path, "weights file")
    return to_weights(read_tensors(path, "weights file", content), path, len(content), activation)


def to_weights(content: Any, path: Path, size: int, activation: str | None = None) -> Weights:
    """The network in what was read from a file of `size` bytes, as `load_weights` reads it."""
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: not a weights file: it holds a {type(content).__name__}, no dict"
        )
    if "training" in content:
        raise InputError(
            f"{path}: a checkpoint, not a weights file: give the weights.pkl beside it"
        )
    tensors = {
        key: value.detach()
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    stored = content.get("meta")
    foreign = not isinstance(stored, dict)
    meta: dict[str, Any] = stored if isinstance(stored, dict) else {}
    if foreign:
        tensors, meta = _adopt(tensors, path, activation or "relu")
    elif activation is not None:
        raise InputError(
            f"--activation {activation}: {path} says what its layers are; it is for foreign weights"
        )
    try:
        network = _outline(meta, tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a meta of any content: little in it was checked before
        why = shown(repr(error))
        raise InputError(f"{path}: its meta is incomplete or unusable ({why})") from None
    keys = network.layout.keys()
    for key, slot in zip(keys, network.layout.slots, strict=True):
        layer = network.layers[slot.layer]
        like = torch.empty(slot.shape, device="meta")
        expected = tuple(_to_file(layer, slot.name, like).shape)
        found = tuple(tensors[key].shape) if key in tensors else None
        if found != expected:
            raise InputError(f"{path}: {key} should have shape {expected}, found {found}")
        if not tensors[key].is_floating_point():
            raise InputError(f"{path}: {key} is {tensors[key].dtype}, not floating-point")
    if network.layout.count > size:  # tensors may be views of the same numbers
        raise InputError(
            f"{path}: its tensors have more numbers than the file has bytes ({size:,})"
        )
    network = Network(network.specs, network.shape, network.classes, dtype=network.theta.dtype)
    for key, slot in zip(keys, network.layout.slots, strict=True):
        values = _from_file(network.layers[slot.layer], slot.name, tensors[key])
        network.params[slot.layer][slot.name].copy_(values)
    return Weights(network, meta, foreign)


ACTIVATIONS = ("relu", "sigmoid", "tanh")  # that foreign weights may be read with
MOST_LAYERS, MOST_NUMBERS = 10**4, 2**31  # of a network; that forward makes of one sample
NUMBER = int | float
# What evaluate and predict go by, in meta, its normalization and its split, where it is not None.
META: dict[str, dict[str, Any]] = {
    "meta": {
        **dict.fromkeys(("run", "dataset", "loss", "torch", "manualnn"), str),
        "class_names": list,
        **dict.fromkeys(("normalization", "range", "split"), dict),
    },
    "range": {"min": NUMBER, "max": NUMBER, "bytes": bool},
    "normalization": {
        "kind": str,
        **dict.fromkeys(("mean", "std"), NUMBER | list),
        "permute_seed": int,
    },
    "split": {
        **dict.fromkeys(("source", "labels", "test_labels"), str),
        **dict.fromkeys(("train_samples", "seed", "classes", "corruption_seed"), int),
        **dict.fromkeys(("valid", "corruption"), NUMBER),
        "stratify": bool,
    },
}


def _outline(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Network:
    """The network that a meta describes, its parameters without memory. Raises whatever a meta of
    any content leads to."""
    specs, shape, classes = meta["layers"], tuple(meta["shape"]), meta["classes"]
    sizes = (*shape, classes)
    if not 1 <= len(shape) <= 3 or any(type(n) is not int or n < 1 for n in sizes):
        raise InputError(f"shape {shape} and classes {classes!r} are no sizes")
    if not isinstance(specs, list) or len(specs) > MOST_LAYERS:
        raise InputError(f"layers is no list of at most {MOST_LAYERS:,} layers")
    if not _is_plain(meta):
        raise InputError("its meta holds other things than plain numbers, texts, lists and dicts")
    _check_meta(meta, math.prod(shape))
    # Half precision is enough to store weights, not to compute with them.
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if double else torch.float32
    network = Network(specs, shape, classes, dtype=dtype, device="meta")
    loss = meta.get("loss") or "cross_entropy"
    if loss not in LOSSES or network.outputs != outputs(loss, classes):
        raise InputError(f"{network.outputs} outputs, {classes} classes and {loss} do not fit")
    if network.activations > MOST_NUMBERS:
        raise InputError(f"one example takes {network.activations:.1e} numbers: too many")
    return network


def _check_meta(meta: dict[str, Any], inputs: int) -> None:
    """Raise InputError where `meta` is of no use for examples of so many inputs."""
    tables = {name: meta if name == "meta" else meta.get(name) or {} for name in META}
    for name, kinds in META.items():
        for key, kind in kinds.items():
            value = tables[name].get(key)
            fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            if name == "split" and isinstance(value, NUMBER):
                fits = fits and 0 <= value < 2**63
            if value is not None and not fits:
                raise InputError(f"its meta has an unusable {name}: {key} is {shown(repr(value))}")
    normalization, split = tables["normalization"], tables["split"]
    for key in ("mean", "std"):
        values = normalization.get(key, 0.0)
        if isinstance(values, list) and len(values) != inputs:
            raise InputError(f"its meta has {len(values)} numbers in {key}, but {inputs} inputs")
        for value in values if isinstance(values, list) else (values,):
            if not isinstance(value, NUMBER) or not abs(value) < 2**1000:
                raise InputError(
                    f"its meta has an unusable normalization: {key} {shown(repr(value))}"
                )
    if (found := tables["range"]) and (
        set(found) != set(META["range"])
        or not all(v is not None and abs(v) < 2**1000 for v in found.values())
    ):
        raise InputError("its meta has an unusable range: it needs min, max and bytes, all finite")
    if unknown := set(normalization) - set(META["normalization"]):
        raise InputError(f"its meta has an unusable normalization: {shown(str(min(unknown)))}")
    if normalization and not isinstance(normalization.get("kind"), str):
        raise InputError("its meta has an unusable normalization: it has no kind")
    if split.get("corruption") and not {"classes", "corruption_seed"} <= set(split):
        raise InputError("its meta has a split with corruption, but without classes or seed")
    if not all(isinstance(name, str) for name in meta.get("class_names") or ()):
        raise InputError("its meta has class_names that are not all texts")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _to_file(layer: Layer, name: str, tensor: Tensor) -> Tensor:
    """A parameter as a weights file holds it: convolution weights in torch's order."""
    return layer.to_torch(tensor) if isinstance(layer, Conv2d) and name == "weight" else tensor


def _from_file(layer: Layer, name: str, tensor: Tensor) -> Tensor:
    return layer.from_torch(tensor) if isinstance(layer, Conv2d) and name == "weight" else tensor


def _adopt(
    tensors: dict[str, Tensor], path: Path, activation: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read w1, b1, w2, ... of an unknown author: the chain of shapes tells the orientation."""
    if activation not in ACTIVATIONS:
        raise InputError(f"--activation {activation}: use {', '.join(ACTIVATIONS)}")
    weights = sorted((k for k in tensors if re.fullmatch(r"[wW]_?[0-9]{1,6}", k)), key=_number)
    if not weights or any(tensors[k].dim() != 2 or not tensors[k].numel() for k in weights):
        module = any(re.search(r"\.(weight|bias)$", key) for key in tensors)
        raise InputError(
            f"{path}: not a weights file: it has neither meta nor matrices w1, w2, ..."
            + ("; it is a module's state_dict: call its tensors w1, b1, ..." if module else "")
        )
    shapes = [tuple(tensors[k].shape) for k in weights]

    def chained(shapes: list[tuple[int, ...]]) -> bool:
        return all(a[1] == b[0] for a, b in pairwise(shapes))

    flip = not chained(shapes)
    if flip:
        shapes = [shape[::-1] for shape in shapes]
        if not chained(shapes):
            raise InputError(f"{path}: the shapes of {', '.join(weights)} do not form a network")
    elif len(shapes) == 1 and shapes[0][0] < shapes[0][1]:
        flip, shapes = True, [shapes[0][::-1]]  # one matrix: more inputs than classes
    renamed = {}
    for number, (key, shape) in enumerate(zip(weights, shapes, strict=True), 1):
        renamed[f"w{number}"] = tensors[key].t() if flip else tensors[key]
        bias = next(
            (tensors[k] for k in (f"b{_number(key)}", f"b_{_number(key)}") if k in tensors), None
        )
        if bias is None:
            bias = torch.zeros(shape[1], dtype=tensors[key].dtype, device="cpu")
        renamed[f"b{number}"] = bias.flatten()
    specs: list[list[Any]] = []
    for shape in shapes:
        specs += [["linear", shape[1]], [activation]]
    size = shapes[0][0]
    side = math.isqrt(size)
    return renamed, {
        "layers": specs[:-1],
        "shape": [1, side, side] if side * side == size else [size],
        "classes": shapes[-1][1],
        "normalization": {"kind": "unit", "mean": 0.0, "std": 255.0},
        "loss": "cross_entropy",
    }


def _number(key: str) -> int:
    return int(key.lstrip("wWb_"))
