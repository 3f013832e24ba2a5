"""Memory that is made once and handed out again; random numbers that are no state.

Shapes: R replicas, B samples of a batch, n units of one sample.
"""

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .parameters import aligned, arrange


def mix(*keys: int) -> int:
    """One well-mixed integer in [0, 2**63) from several: splitmix64 (Steele et al. 2014)."""
    state = 0
    for key in keys:
        state = (state ^ key) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends on `keys` alone, so nothing about it needs to be saved."""
    return torch.Generator().manual_seed(mix(*keys))


def clock(step: int = 0) -> Tensor:
    """() int64: the step of the whole run as `Noise` has it, in the upper 32 bits."""
    return torch.tensor(step << 32, device="cpu")


@dataclass(frozen=True)
class Noise:
    """What the random numbers of one training step depend on.

    seeds: (R, 1) int64, one mixed seed per replica; step: a `clock`, a number in memory so that a
    recorded step reads the present one; first: position of the first sample in the global batch.
    """

    seeds: Tensor
    step: Tensor
    first: int = 0


@dataclass
class Workspace:
    """Hands out buffers in the order of the calls, the same ones for every step of the same shape.

    `begin(key)` starts a step; results of the step before with that key are then overwritten.
    `noise` is None in evaluation, which turns dropout off. `low` is the type that large products
    are computed in, None for `dtype` itself. With `fresh` every buffer is new memory, as
    torch.compile wants it, which plans memory itself.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    low: torch.dtype | None = None
    fresh: bool = False
    noise: Noise | None = None
    _pools: dict[Hashable, list[Tensor]] = field(default_factory=dict, repr=False)
    _constants: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)
    _pool: list[Tensor] = field(default_factory=list, repr=False)
    _next: int = 0

    def begin(self, key: Hashable, noise: Noise | None = None) -> None:
        """Start a step over batches of the shape that `key` stands for."""
        self.noise = noise
        if not self.fresh:
            self._pool = self._pools.setdefault(key, [])
            self._next = 0

    @contextmanager
    def within(self, key: Hashable) -> Iterator[None]:
        """A step inside a step: buffers of their own, the same ones every time with that key."""
        before = self._pool, self._next
        self.begin(key, self.noise)
        try:
            yield
        finally:
            self._pool, self._next = before

    def empty(
        self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The next buffer of this step, its contents undefined.

        Each shape[0] part of it lies together and starts aligned, as the parameters do, narrow
        matrices column by column.
        """
        dtype = dtype or self.dtype
        if self.fresh:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        if self._next == len(self._pool):
            self._pool.append(self._make(shape, dtype))
        buffer = self._pool[self._next]
        if buffer.shape != shape or buffer.dtype != dtype:
            buffer = self._pool[self._next] = self._make(shape, dtype)
        self._next += 1
        return buffer

    def zeros(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """The next buffer, 0 when it is made: what nobody writes to stays 0 in every step."""
        before = self._pool[self._next] if self._next < len(self._pool) else None
        buffer = self.empty(shape)
        return buffer if buffer is before else buffer.zero_()

    def constant(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gave when `key` was first asked for. Nobody may write to it."""
        if key not in self._constants:
            with torch.inference_mode(False):
                self._constants[key] = make().to(self.device)
        return self._constants[key]

    def ones(self, *shape: int) -> Tensor:
        """A constant tensor of ones in the workspace's dtype."""
        return self.constant(
            ("ones", shape), lambda: torch.ones(shape, dtype=self.dtype, device="cpu")
        )

    def _make(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        # An ordinary tensor also under inference_mode: torch.compile cannot take inference tensors.
        with torch.inference_mode(False):
            size = math.prod(shape[1:])
            buffer = torch.empty(shape[0], aligned(size), dtype=dtype, device=self.device)
            return arrange(buffer[:, :size], tuple(shape[1:]))


def random_bits(
    workspace: Workspace, noise: Noise, shape: tuple[int, int, int], stream: int
) -> Tensor:
    """int32 of `shape` (R, B, n), evenly distributed: a hash of (seed, stream, step, position of
    the sample, unit), the same on every device and for every split of the work. `stream` tells
    apart what they are for."""
    replicas, batch, units = shape
    # Constants of splitmix64 and murmur3 as signed integers; products wrap around.
    first, last = noise.first, noise.first + batch
    position = workspace.constant(
        ("position", first, last), lambda: torch.arange(first, last, device="cpu").view(1, -1)
    )
    rows = workspace.empty((replicas, batch), torch.int64)
    shifted = workspace.empty(rows.shape, torch.int64)
    rows.copy_(position).add_(noise.step).mul_(-0x61C8864680B583EB)
    rows.add_(noise.seeds).add_(mix(stream))
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        torch.bitwise_right_shift(rows, 30, out=shifted)
        rows.bitwise_xor_(shifted).mul_(multiplier)
    torch.bitwise_right_shift(rows, 32, out=shifted)
    row_keys = workspace.empty(rows.shape, torch.int32).copy_(shifted).unsqueeze(-1)
    columns = workspace.constant(
        ("unit", units), lambda: (torch.arange(units, device="cpu") * 0x9E3779B1).to(torch.int32)
    )
    h = workspace.empty(shape, torch.int32)
    low = workspace.empty(h.shape, torch.int32)
    torch.bitwise_xor(row_keys, columns, out=h).mul_(-0x7A143595)
    torch.bitwise_right_shift(h, 15, out=low)
    return h.bitwise_xor_(low).mul_(-0x3D4D51CB)
