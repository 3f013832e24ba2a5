"""The works that are timed, as values, and the data they train on.

Shapes: N samples, D = 784 features, K = 10 classes, R networks.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manualnn.config import Config, parse_config
from manualnn.data import load, prepare
from manualnn.layers import Conv2d
from manualnn.network import Network

MLP = (["linear", 128], ["relu"], ["linear", 64], ["relu"], ["linear", "classes"])
WIDE = (["linear", 100], ["relu"], ["linear", 100], ["relu"], ["linear", "classes"])
CNN = tuple(
    layer
    for channels in (16, 32, 64)
    for layer in (["conv2d", channels, 3, {"padding": 1}], ["relu"], ["max_pool2d", 2])
)


@dataclass(frozen=True)
class Work:
    """One training: `samples` per epoch; R = `networks`, each with its own rate and seed, on
    `shared` batches or each on its own order."""

    title: str
    layers: tuple = (*MLP,)
    batch_size: int = 64
    samples: int = 60_000
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    l2: float = 0.0
    networks: int = 1
    shared: bool = False
    floor: float = 0.9  # a peer below this test accuracy after an epoch has not learned

    @property
    def rates(self) -> list[float]:
        """The learning rate of each network: from a third of it up to itself."""
        last = max(1, self.networks - 1)
        return [self.learning_rate * 3 ** (i / last - 1) for i in range(self.networks)]

    @property
    def steps(self) -> int:
        """Of an epoch; an incomplete batch is left out everywhere."""
        return self.samples // self.batch_size

    @property
    def convolutional(self) -> bool:
        return any(layer[0] == "conv2d" for layer in self.layers)

    def config(self, precision: str = "fp32", epochs: int = 1000) -> Config:
        """The same work as a config of manualnn."""
        several = {"seeds": list(range(self.networks)), "shared_batches": self.shared}
        optimizer = {
            "name": self.optimizer,
            "learning_rate": self.rates if self.networks > 1 else self.learning_rate,
            "momentum": self.momentum,
            "nesterov": self.momentum > 0,
        }
        train = {
            "epochs": epochs,
            "batch_size": self.batch_size,
            "drop_last": True,
            "l2": self.l2,
            "precision": precision,
            "optimizer": optimizer,
            **(several if self.networks > 1 else {}),
        }
        data = {"train_samples": self.samples}
        return parse_config({"data": data, "model": {"layers": list(self.layers)}, "train": train})

    def flops(self) -> float:
        """Of the matrix products of an epoch: 2 a product of numbers, forward, dW and dx, without
        the first layer's dx."""
        network = Network([list(layer) for layer in self.layers], (1, 28, 28), 10)
        shape, total, first = network.shape, 0, True
        for layer in network.layers:
            shape, named = layer.build(shape)
            if "weight" in named:
                places = shape[0] * shape[1] if isinstance(layer, Conv2d) else 1
                total += (2 if first else 3) * 2 * places * math.prod(named["weight"])
                first = False
        return float(total) * self.steps * self.batch_size * self.networks


WORKS = {
    "W1": Work("MLP 784-128-64-10, SGD, batch 64"),
    "W2": Work("the same, batch 512", batch_size=512, floor=0.85),
    "W3": Work("MLP 784-100-100-10, Adam, batch 64", WIDE, 64, 50_000, "adam", 1e-3),
    "W4": Work(
        "CNN 16-32-64, SGD with Nesterov momentum, batch 64",
        (*CNN, ["linear", "classes"]),
        samples=50_000,
        learning_rate=0.01,
        momentum=0.9,
    ),
    "W5": Work(
        "softmax regression, SGD and L2, batch 256",
        (["linear", "classes"],),
        256,
        56_000,
        l2=1e-4,
        floor=0.85,
    ),
    "W6": Work("16 networks of W1, each its own batches", networks=16, floor=0.85),
    "W6S": Work("16 networks of W1, shared batches", networks=16, shared=True, floor=0.85),
}


def find(name: str) -> Work:
    """A work by name, with changes as in `W1:samples=5000:batch_size=32`."""
    base, *changes = name.split(":")
    work = WORKS[base]
    for change in changes:
        key, _, value = change.partition("=")
        if key == "width":
            width = int(value)
            layers = [[k, width] if k == "linear" and a != ["classes"] else [k, *a]
                      for k, *a in work.layers]  # fmt: skip
            work = replace(work, layers=tuple(layers))
        elif key == "depth":
            hidden = [["linear", 128], ["relu"]] * int(value)
            work = replace(work, layers=(*hidden, ["linear", "classes"]))
        else:
            kind = type(getattr(work, key))
            work = replace(work, **{key: kind(int(value) if kind is bool else value)})
    return work


@dataclass(frozen=True)
class Tensors:
    """MNIST for a work: x (N, 1, 28, 28) float32, standardised; y (N,) int64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, work: Work, device: str = "cpu") -> "Tensors":
        images = load("mnist")
        assert images.train is not None and images.test is not None
        train = (images.train.images, images.train.labels)
        test = (images.test.images, images.test.labels)
        found = prepare(train, test, train_samples=work.samples, classes=10, device=device)
        assert found.test is not None
        return cls(found.train.x, found.train.y, found.test.x, found.test.y)


def orders(work: Work, epoch: int) -> Tensor:
    """Sample indices of each batch of an epoch that are whole, (steps, R or 1, B)."""
    rows = 1 if work.shared else work.networks
    draw = torch.Generator().manual_seed(epoch)
    order = torch.stack([torch.randperm(work.samples, generator=draw) for _ in range(rows)])
    order = order[:, : work.steps * work.batch_size]
    return order.view(rows, work.steps, work.batch_size).transpose(0, 1).contiguous()


def peak_flops(threads: int, device: str = "cpu") -> float:
    """FLOP per second of large float32 products."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size = 1536 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device)
    out, best = torch.empty(size, size, device=device), math.inf
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    torch.set_num_threads(before)
    return 2 * size**3 / best
