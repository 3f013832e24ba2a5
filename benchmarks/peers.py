"""What a user could train with instead, each as `train(order)` for an epoch and `accuracies()`.

A peer is made for a work and its data; `order` (steps, R or 1, B) are the sample indices of each
batch. Raises UnfitError where it cannot do a work, ImportError where it is not installed. Every
peer starts from its own random weights (He et al. 2015) and gets the data as tensors in memory.
"""

import os
import warnings
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional

from .works import Tensors, Work


class UnfitError(Exception):
    """This peer does not do that work; the message says why."""


class Manualnn:
    """This project: the steps of a `Training`, without evaluation."""

    def __init__(self, work: Work, device: str, precision: str = "fp32") -> None:
        from manualnn.experiment import build  # no other peer has what it sets

        population = work.config(precision).populations()[0]
        self.training, _ = build(population, torch.device(device))

    def train(self, order: Tensor) -> None:
        for _ in self.training.walk(list(order)):
            pass

    def accuracies(self) -> list[float]:
        found = self.training.measure(self.training.data.test)
        return [accuracy or 0.0 for _, accuracy in found]


class Bf16(Manualnn):
    """This project with `train.precision = "bf16"`."""

    def __init__(self, work: Work, device: str) -> None:
        super().__init__(work, device, "bf16")


class Tf32(Manualnn):
    """This project with `train.precision = "tf32"`."""

    def __init__(self, work: Work, device: str) -> None:
        super().__init__(work, device, "tf32")


def module(work: Work) -> torch.nn.Sequential:
    """The network in torch.nn."""
    layers: list[torch.nn.Module] = [] if work.convolutional else [torch.nn.Flatten()]
    channels, side, flat = 1, 28, 784
    for name, *arguments in work.layers:
        if name == "conv2d":
            layers.append(torch.nn.Conv2d(channels, arguments[0], 3, padding=1))
            channels = arguments[0]
        elif name == "max_pool2d":
            layers.append(torch.nn.MaxPool2d(2))
            side //= 2
            flat = channels * side**2
        elif name == "relu":
            layers.append(torch.nn.ReLU())
        else:
            if work.convolutional:
                layers.append(torch.nn.Flatten())
            units = 10 if arguments[0] == "classes" else arguments[0]
            layers.append(torch.nn.Linear(flat, units))
            flat = units
        if name in ("conv2d", "linear"):
            torch.nn.init.kaiming_normal_(layers[-1].weight)
            torch.nn.init.zeros_(layers[-1].bias)
    return torch.nn.Sequential(*layers)


def optimizer(work: Work, parameters: Any) -> torch.optim.Optimizer:
    """The work's optimizer of torch.optim, fused."""
    options = {"lr": work.learning_rate, "weight_decay": work.l2, "fused": True}
    if work.optimizer == "adam":
        return torch.optim.Adam(parameters, **options)
    nesterov = work.momentum > 0
    return torch.optim.SGD(parameters, momentum=work.momentum, nesterov=nesterov, **options)


class TorchEager:
    """torch.nn with autograd and a fused optimizer, data in memory: the usual loop at its best."""

    def __init__(self, work: Work, device: str) -> None:
        if work.networks > 1:
            raise UnfitError("one network at a time")
        self.data = Tensors.of(work, device)
        self.model = module(work).to(device)
        self.optimizer = optimizer(work, self.model.parameters())

    def train(self, order: Tensor) -> None:
        for index in order[:, 0].to(self.data.x.device):
            self.optimizer.zero_grad()
            logits = self.model(self.data.x[index])
            functional.cross_entropy(logits, self.data.y[index]).backward()
            self.optimizer.step()

    @torch.no_grad()
    def accuracies(self) -> list[float]:
        right = self.model(self.data.test_x).argmax(1) == self.data.test_y
        return [float(right.double().mean())]


class TorchCompile:
    """The whole step, with the optimizer, under torch.compile; several networks by vmap."""

    mode = "default"

    def __init__(self, work: Work, device: str) -> None:
        self.work, self.several = work, work.networks > 1
        self.data = Tensors.of(work, device)
        models = [module(work).to(device) for _ in range(work.networks)]
        self.model = models[0]
        if self.several:
            self.parameters, _ = stack_module_state(models)
        else:
            self.parameters = dict(self.model.named_parameters())
        self.parameters = {name: p.detach().clone() for name, p in self.parameters.items()}
        shape = (work.networks,) + (1,) * 4
        self.rates = {
            name: torch.tensor(work.rates, device=device).view(shape[: p.dim()])
            if self.several
            else work.learning_rate
            for name, p in self.parameters.items()
        }
        zeros = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.state = [zeros, {name: z.clone() for name, z in zeros.items()}]
        self.t = torch.zeros((), device=device)
        options = {"mode": self.mode} if self.mode != "default" else {}
        self.step = torch.compile(self._step, dynamic=False, fullgraph=True, **options)

    def _loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(self.model, parameters, (x,)), y)

    def _step(self, x: Tensor, y: Tensor) -> None:
        gradient = grad(self._loss)
        if self.several:
            own = None if self.work.shared else 0
            gradient = vmap(gradient, in_dims=(0, own, own))
        found = gradient(self.parameters, x, y)
        first, second = self.state
        self.t.add_(1)
        for name, p in self.parameters.items():
            g, rate = found[name], self.rates[name]
            if self.work.l2:
                g = g + self.work.l2 * p
            if self.work.optimizer == "adam":
                m, v = first[name], second[name]
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                root = (v / (1 - 0.999**self.t)).sqrt() + 1e-8
                p.sub_(rate * (m / (1 - 0.9**self.t)) / root)
            elif self.work.momentum:
                v = first[name].mul_(self.work.momentum).add_(g)
                p.sub_(rate * (g + self.work.momentum * v))
            else:
                p.sub_(rate * g)

    def train(self, order: Tensor) -> None:
        order = order.to(self.data.x.device)
        with torch.no_grad():
            for index in order if self.several and not self.work.shared else order[:, 0]:
                self.step(self.data.x[index], self.data.y[index])

    @torch.no_grad()
    def accuracies(self) -> list[float]:
        parameters, x = self.parameters, self.data.test_x
        call = lambda p: functional_call(self.model, p, (x,))  # noqa: E731
        logits = vmap(call)(parameters) if self.several else call(parameters).unsqueeze(0)
        return (logits.argmax(-1) == self.data.test_y).double().mean(1).tolist()


class TorchGraphs(TorchCompile):
    """The same, replayed as a CUDA graph."""

    mode = "reduce-overhead"

    def __init__(self, work: Work, device: str) -> None:
        if device == "cpu":
            raise UnfitError("CUDA graphs need a GPU")
        super().__init__(work, device)


class TorchEnsemble:
    """R networks as batched products (baddbmm) under autograd."""

    def __init__(self, work: Work, device: str) -> None:
        if work.networks == 1:
            raise UnfitError("several networks at once")
        self.work = work
        self.data = Tensors.of(work, device)
        width, self.parameters = 784, []
        for name, *arguments in work.layers:
            if name == "linear":
                units = 10 if arguments[0] == "classes" else arguments[0]
                weight = torch.randn(work.networks, width, units) * (2 / width) ** 0.5
                self.parameters += [weight.to(device), torch.zeros(work.networks, 1, units)]
                width = units
        self.parameters = [p.to(device).requires_grad_() for p in self.parameters]
        self.rates = torch.tensor(work.rates, device=device).view(-1, 1, 1)

    def _logits(self, x: Tensor) -> Tensor:
        last = len(self.parameters) - 2
        for i in range(0, last + 2, 2):
            x = torch.baddbmm(self.parameters[i + 1], x, self.parameters[i])
            x = functional.relu(x) if i < last else x
        return x

    def train(self, order: Tensor) -> None:
        size = (self.work.networks, self.work.batch_size)
        for index in order.to(self.data.x.device):
            x = self.data.x.flatten(1)[index].expand(*size, -1)
            y = self.data.y[index].expand(size).reshape(-1)
            logits = self._logits(x).flatten(0, 1)
            loss = functional.cross_entropy(logits, y, reduction="sum") / self.work.batch_size
            gradients = torch.autograd.grad(loss, self.parameters)
            with torch.no_grad():
                for p, g in zip(self.parameters, gradients, strict=True):
                    p.addcmul_(g, self.rates, value=-1)

    @torch.no_grad()
    def accuracies(self) -> list[float]:
        x = self.data.test_x.flatten(1).expand(self.work.networks, -1, -1)
        return (self._logits(x).argmax(-1) == self.data.test_y).double().mean(1).tolist()


class Products:
    """Only the matrix products of the work, into given tensors: no training at all."""

    def __init__(self, work: Work, device: str) -> None:
        if work.convolutional:
            raise UnfitError("dense layers only")
        units = [784]
        units += [10 if a[0] == "classes" else a[0] for k, *a in work.layers if k == "linear"]
        size = (work.networks, work.batch_size)
        self.x = [torch.randn(*size, n, device=device) for n in units]
        self.w = [torch.randn(size[0], k, n, device=device) * 0.01 for k, n in pairwise(units)]
        self.dw = [torch.empty_like(w) for w in self.w]

    @torch.inference_mode()
    def train(self, order: Tensor) -> None:
        x, w, dw = self.x, self.w, self.dw
        for _ in order:
            for r in range(len(x[0])):
                for i in range(len(w)):
                    torch.mm(x[i][r], w[i][r], out=x[i + 1][r])
                for i in range(len(w)):
                    torch.mm(x[i][r].T, x[i + 1][r], out=dw[i][r])
                    if i:
                        torch.mm(x[i + 1][r], w[i][r].T, out=x[i][r])

    def accuracies(self) -> list[float]:
        return []


class Jax:
    """JAX: the epoch as one compiled lax.scan; several networks by vmap."""

    def __init__(self, work: Work, device: str) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu" if device == "cpu" else "cuda")
        import jax
        import jax.numpy as jnp

        self.work, self.jnp, self.several = work, jnp, work.networks > 1
        data = Tensors.of(work)
        order = (0, 2, 3, 1) if work.convolutional else (0,)
        images = data.x.permute(order) if work.convolutional else data.x.flatten(1)
        tests = data.test_x.permute(order) if work.convolutional else data.test_x.flatten(1)
        self.x, self.y = jnp.asarray(images.numpy()), jnp.asarray(data.y.numpy().astype("int32"))
        self.test_x, self.test_y = jnp.asarray(tests.numpy()), data.test_y.numpy()
        keys = jax.random.split(jax.random.key(0), work.networks)
        parameters = [self._initial(jax, key) for key in keys]
        rates = jnp.asarray(work.rates)
        if self.several:
            self.parameters = jax.tree.map(lambda *rows: jnp.stack(rows), *parameters)
            self.rate = rates
        else:
            self.parameters, self.rate = parameters[0], work.learning_rate
        first, second = (jax.tree.map(jnp.zeros_like, self.parameters) for _ in range(2))
        self.carry = (self.parameters, first, second, jnp.zeros(()))
        gradient = jax.grad(self._loss)

        def step(images: Any, labels: Any, carry: Any, index: Any) -> Any:
            parameters, m, v, t = carry
            t = t + 1
            x, y = images[index], labels[index]
            if self.several:
                own = None if work.shared else 0
                x, y = (x[0], y[0]) if work.shared else (x, y)
                g = jax.vmap(gradient, in_axes=(0, own, own))(parameters, x, y)
            else:
                g = gradient(parameters, x[0], y[0])
            if work.l2:
                g = jax.tree.map(lambda a, p: a + work.l2 * p, g, parameters)
            if work.optimizer == "adam":
                m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
                v = jax.tree.map(lambda a, b: 0.999 * a + 0.001 * b * b, v, g)
                c1, c2 = 1 - 0.9**t, 1 - 0.999**t
                new = lambda p, a, b: p - self.rate * (a / c1) / (jnp.sqrt(b / c2) + 1e-8)  # noqa: E731
                parameters = jax.tree.map(new, parameters, m, v)
            elif work.momentum:
                m = jax.tree.map(lambda a, b: work.momentum * a + b, m, g)
                new = lambda p, a, b: p - self.rate * (b + work.momentum * a)  # noqa: E731
                parameters = jax.tree.map(new, parameters, m, g)
            else:
                parameters = jax.tree.map(lambda p, b: p - self._column(p) * b, parameters, g)
            return (parameters, m, v, t), None

        def epoch(carry: Any, images: Any, labels: Any, order: Any) -> Any:
            return jax.lax.scan(partial(step, images, labels), carry, order)[0]

        self.epoch = jax.jit(epoch, donate_argnums=0)

    def _column(self, p: Any) -> Any:
        return self.rate.reshape((-1,) + (1,) * (p.ndim - 1)) if self.several else self.rate

    def _initial(self, jax: Any, key: Any) -> list[Any]:
        parameters, width, side, channels = [], 784, 28, 1
        for name, *arguments in self.work.layers:
            key, own = jax.random.split(key)
            if name == "conv2d":
                shape = (3, 3, channels, arguments[0])
                std = (2 / (9 * channels)) ** 0.5
                channels = arguments[0]
            elif name == "linear":
                shape = (width, 10 if arguments[0] == "classes" else arguments[0])
                std = (2 / width) ** 0.5
                width = shape[1]
            else:
                if name == "max_pool2d":
                    side //= 2
                    width = side**2 * channels
                continue
            weight = jax.random.normal(own, shape) * std
            parameters.append((weight, self.jnp.zeros(shape[-1])))
        return parameters

    def _logits(self, parameters: Any, x: Any) -> Any:
        import jax

        rest = iter(parameters)
        for name, *_ in self.work.layers:
            if name == "relu":
                x = jax.nn.relu(x)
            elif name == "max_pool2d":
                x = jax.lax.reduce_window(
                    x, -self.jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                )
            elif name == "conv2d":
                weight, bias = next(rest)
                layout = ("NHWC", "HWIO", "NHWC")
                x = bias + jax.lax.conv_general_dilated(
                    x, weight, (1, 1), "SAME", dimension_numbers=layout
                )
            else:
                weight, bias = next(rest)
                x = x.reshape(len(x), -1) @ weight + bias
        return x

    def _loss(self, parameters: Any, x: Any, y: Any) -> Any:
        import jax

        log_p = jax.nn.log_softmax(self._logits(parameters, x))
        return -self.jnp.take_along_axis(log_p, y[:, None], 1).mean()

    def train(self, order: Tensor) -> None:
        import jax

        self.carry = jax.block_until_ready(
            self.epoch(self.carry, self.x, self.y, order.int().numpy())
        )

    def accuracies(self) -> list[float]:
        import jax

        logits = lambda p: self._logits(p, self.test_x)  # noqa: E731
        rows = jax.vmap(logits)(self.carry[0]) if self.several else logits(self.carry[0])[None]
        return [float(a) for a in (rows.argmax(-1) == self.test_y).mean(1)]


class Sklearn:
    """scikit-learn's MLPClassifier, an epoch as one `fit` with warm_start; it shuffles itself."""

    whole = True  # always trains for an epoch

    def __init__(self, work: Work, device: str) -> None:
        from sklearn.neural_network import MLPClassifier

        if work.convolutional or work.networks > 1 or device != "cpu":
            raise UnfitError("one MLP on the CPU")
        hidden = [a[0] for k, *a in work.layers if k == "linear"][:-1]
        self.data = data = Tensors.of(work)
        self.model = MLPClassifier(
            hidden,
            solver=work.optimizer,
            learning_rate_init=work.learning_rate,
            momentum=work.momentum,
            nesterovs_momentum=work.momentum > 0,
            alpha=work.l2,
            batch_size=work.batch_size,
            max_iter=1,
            warm_start=True,
            random_state=0,
        )
        self.x, self.y = data.x.flatten(1).numpy(), data.y.numpy()

    def train(self, order: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one epoch did not converge
            self.model.fit(self.x, self.y)

    def accuracies(self) -> list[float]:
        return [self.model.score(self.data.test_x.flatten(1).numpy(), self.data.test_y.numpy())]


PEERS = {
    "manualnn": Manualnn,
    "manualnn bf16": Bf16,
    "manualnn tf32": Tf32,
    "torch eager": TorchEager,
    "torch compile": TorchCompile,
    "torch compile, graphs": TorchGraphs,
    "torch ensemble": TorchEnsemble,
    "JAX": Jax,
    "scikit-learn": Sklearn,
    "only products": Products,
}
