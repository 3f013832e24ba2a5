"""Training examples larger than memory: read ahead in a random order of two levels.

An epoch goes through blocks, rows that lie together in the files, in random order; a window is the
blocks that fit into half of the memory that is given, and within it the rows are in random order.
While the steps go through one window a thread reads the next into the other half. A data set that
fits into that memory is one window, read once: its order is that of data in memory.

Shapes: N samples, B of a batch, M blocks.
"""

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .rows import Rows

if TYPE_CHECKING:
    from .prepare import Normalization

BLOCK = 2**18  # bytes of a block at most
BLOCKS = 64  # in a window, where the memory is small, at least
ABSENT = -(2**62)


class Plan:
    """How `count` rows of files are read: `blocks` blocks of 2**shift rows, `window` of them at a
    time; `whole` where both windows together hold all, and then are one.

    `edges` (M + 1,) are the first examples of the blocks: where only some rows, those in `chosen`,
    are examples, they are fewer. Raises InputError where `memory` bytes hold no two rows.
    """

    def __init__(
        self, count: int, row_bytes: int, memory: int, chosen: Tensor | None = None
    ) -> None:
        most = memory // row_bytes
        if count > most < 2:
            raise InputError(
                f"data.memory_mb = {memory >> 20} holds no two examples of {row_bytes} bytes"
            )
        self.shift = max(1, min(BLOCK // row_bytes, most // 2 // BLOCKS)).bit_length() - 1
        self.whole = count <= most
        self.blocks = (count - 1 >> self.shift) + 1
        self.window = self.blocks if self.whole else most // 2 >> self.shift
        self.edges = torch.arange(self.blocks + 1, device="cpu") << self.shift
        if chosen is not None:
            self.edges = torch.searchsorted(chosen, self.edges)
        else:
            self.edges.clamp_(max=count)

    def windows(self, draw: torch.Generator | None) -> list[Tensor]:
        """The blocks of each window, all of about the same size; without a generator in the order
        of the files."""
        blocks = torch.arange(self.blocks, device="cpu")
        if draw is not None and not self.whole:
            blocks = torch.randperm(self.blocks, generator=draw, device="cpu")
        return list(blocks.tensor_split(-(-self.blocks // self.window)))

    def order(self, draw: torch.Generator | None) -> tuple[Tensor, list[Tensor]]:
        """The order of the examples (N,), and the windows that it goes through."""
        windows, start = self.windows(draw), 0
        order = torch.arange(int(self.edges[-1]), device="cpu")
        if draw is None:
            return order, windows
        for blocks in windows:
            first, lengths = self.edges[blocks], self.edges[blocks + 1] - self.edges[blocks]
            count = int(lengths.sum())
            before = lengths.cumsum(0) - lengths
            examples = torch.arange(count, device="cpu") + (first - before).repeat_interleave(
                lengths
            )
            # Of a single window that of all.
            mixed = torch.randperm(count, generator=draw, device="cpu")
            order[start : start + count] = examples[mixed]
            start += count
        return order, windows


class Ring:
    """The memory of two windows, and the thread that fills it. Raises InputError, in the thread
    that asks for rows, where they cannot be read."""

    def __init__(self, rows: Rows, memory: int) -> None:
        self.rows = rows
        self.plan = Plan(rows.count, rows.row_bytes, memory, rows.rows)
        self._lock = threading.Lock()
        self._reader: ThreadPoolExecutor | None = None
        with torch.inference_mode(False):
            # Where in `memory` each block begins.
            self._places = torch.full((self.plan.blocks,), ABSENT, device="cpu")
            self._windows: list[Tensor] = []
            self._window_of = torch.full((self.plan.blocks,), -1, device="cpu")
        self._memory: Tensor | None = None  # made when it is first needed
        self._half = self.plan.window << self.plan.shift
        self._current = -1  # the window that the steps go through
        self._held = [-1, -1]  # the window in each half
        self._coming: dict[int, Future[None]] = {}

    def follow(self, windows: list[Tensor]) -> None:
        """From here on these windows are asked for, one after another."""
        with self._lock:
            if self.plan.whole and self._windows:
                return
            self._windows = windows
            for number, blocks in enumerate(windows):
                self._window_of[blocks] = number
            self._places.fill_(ABSENT)
            self._current, self._held, self._coming = -1, [-1, -1], {}

    def take(self, index: Tensor, out: Tensor) -> None:
        """Copy the rows `index` (B,) to `out`: from memory where they are in the windows that come
        in turn, which may have to be waited for; else from the files."""
        rows = index if self.rows.rows is None else self.rows.rows[index]
        shift = self.plan.shift
        blocks, within = rows >> shift, rows & (1 << shift) - 1
        while True:
            with self._lock:
                places = self._places.index_select(0, blocks).add_(within)
                low, high = (int(x) for x in places.aminmax())
                if low >= 0:
                    assert self._memory is not None
                    torch.index_select(self._memory, 0, places, out=out)
                    self._advance(low // self._half, high // self._half)
                    return
                coming = self._awaited(blocks)
            if coming is None:
                break
            coming.result()
        self.rows.read(index, out)

    def _advance(self, low: int, high: int) -> None:
        """After a batch in these halves: once all of one is in the next window, the half of the
        window before may be filled again."""
        if low == high and self._held[low] > self._current:
            self._coming.pop(self._current, None)
            self._current = self._held[low]
            self._begin(self._current + 1)

    def _awaited(self, blocks: Tensor) -> "Future[None] | None":
        """What to wait for until all of `blocks` are there; None where that will not be, as they
        are of a window that has passed, or of too many."""
        low, high = (int(x) for x in self._window_of[blocks].aminmax())
        if low < max(0, self._current) or high - low > 1:
            return None
        if high not in self._coming:  # at the beginning, or after some steps were left out
            self._coming, self._current = {}, low
            self._begin(low)
            self._begin(low + 1)
        return self._coming[high]

    def _begin(self, number: int) -> None:
        """Have a window read, after those that are being read."""
        if number < len(self._windows) and number not in self._coming:
            self._reader = self._reader or ThreadPoolExecutor(1, "reader")
            self._coming[number] = self._reader.submit(self._load, self._windows, number)

    def _load(self, windows: list[Tensor], number: int) -> None:
        half, shift = number % 2, self.plan.shift
        first = half * self._half
        with self._lock:
            if windows is not self._windows:
                return
            if self._memory is None:
                size = self._half * (1 if self.plan.whole else 2)
                try:
                    self._memory = torch.empty(
                        (size, *self.rows.example), dtype=self.rows.dtype, device="cpu"
                    )
                except RuntimeError as error:
                    raise InputError(
                        f"data.memory_mb: is too much for this machine ({error})"
                    ) from None
            gone = (self._places >= first) & (self._places < first + self._half)
            self._places[gone] = ABSENT
            self._held[half] = -1
        blocks = windows[number].sort().values  # as they lie in the files
        starts, count = blocks << shift, self.rows.count
        ranges = [
            (start, min(start + (1 << shift), count), first + (place << shift))
            for place, start in enumerate(starts.tolist())
        ]
        self.rows.read_ranges(ranges, self._memory)
        with self._lock:
            if windows is self._windows:
                places = torch.arange(len(blocks), device="cpu") << shift
                self._places[blocks] = places + first
                self._held[half] = number


class Streamed:
    """Normalised examples (N, ...) that stay in their files, in the place of a tensor of them.

    `order` draws that of an epoch, `gather` takes a batch. Rows that are asked for by a slice or by
    indices are read, normalised and put on the device. The numbers are, bit for bit, those of
    `Normalization.apply`.
    """

    def __init__(
        self,
        rows: Rows,
        normalization: "Normalization",
        dtype: torch.dtype,
        device: torch.device | str,
        memory: int = 2**29,
    ) -> None:
        self.rows, self.normalization, self.device = rows, normalization, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # The current GPU is a matter of each thread, and of this one now.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.compute = self.dtype = dtype  # that of the normalisation, and of the result
        self.ring = Ring(rows, memory)
        self._own = threading.local()  # buffers of each thread
        with torch.inference_mode(False):
            mean, std, self._moved = normalization.values(rows.example, dtype)
            self._mean, self._std = mean.to(self.device), std.to(self.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    @property
    def whole(self) -> bool:
        """Whether all fit into the memory that is given."""
        return self.ring.plan.whole

    def to(self, dtype: torch.dtype) -> "Streamed":
        """The same, rounded to another type."""
        other = copy.copy(self)
        other.dtype, other._own = dtype, threading.local()
        return other

    def new_empty(self, *size: Any) -> Tensor:
        return torch.empty(*size, dtype=self.dtype, device=self.device)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        x = self.normalization.apply(self.rows[index], self.compute)
        return x.to(self.device, self.dtype)

    def split(self, size: int) -> Iterator[Tensor]:
        """All examples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def order(self, draw: torch.Generator | None) -> Tensor:
        """As `epoch_order`, and that of the epoch which comes now: it is read ahead."""
        order, windows = self.ring.plan.order(draw)
        self.ring.follow(windows)
        return order

    def gather(self, index: Tensor, out: Tensor) -> None:
        """Normalise the examples `index` (B,) into `out` (B, ...)."""
        raw, low = self._buffers(len(index))
        self.ring.take(index.cpu(), raw)
        if self._moved is not None:
            raw = raw.flatten(1)[:, self._moved].view(raw.shape)
        x = out if low is None else low
        # `raw` is not overwritten too early: the copy of the next index waits for this one.
        x.copy_(raw.to(self.device, non_blocking=True))
        x.sub_(self._mean).div_(self._std)
        if low is not None:
            out.copy_(low)

    def _buffers(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Of this thread: for raw examples, and for those that are to be rounded."""
        known = self._own.__dict__.setdefault("buffers", {})
        if count not in known:
            cuda, shape = self.device.type == "cuda", (count, *self.rows.example)
            with torch.inference_mode(False):
                raw = torch.empty(shape, dtype=self.rows.dtype, pin_memory=cuda, device="cpu")
                low = None
                if self.dtype != self.compute:
                    low = torch.empty(shape, dtype=self.compute, device=self.device)
            known[count] = raw, low
        return known[count]


def epoch_order(x: Tensor | Streamed, draw: torch.Generator | None) -> Tensor:
    """The order (N,) in which an epoch goes through x, of a generator of its own; without one that
    of the samples."""
    if isinstance(x, Streamed):
        return x.order(draw)
    return (
        torch.arange(len(x), device="cpu")
        if draw is None
        else torch.randperm(len(x), generator=draw, device="cpu")
    )


def quality(order: Tensor, labels: Tensor, batch_size: int = 64) -> tuple[float, float]:
    """What an order (N,) of samples in files is like, by two figures.

    The correlation of a sample's place in the files with its place in the order: 1 for none, and
    for a full shuffle 0 with a standard deviation of 1/sqrt(N), for M shuffled blocks of 1/sqrt(M).

    And Pearson's chi-square of the label counts of a batch against those of all, over its degrees
    of freedom, the mean over the batches: 1 for a full shuffle, n for batches of n equal labels.
    With labels sorted, m blocks in a window, M in all, and batches of n, it is
    1 + (n - 1)(1/m - 1/M): the labels of a window are a sample, too.
    """
    turn = torch.arange(len(order), dtype=torch.float64, device="cpu")
    middle = (len(order) - 1) / 2
    covariance = (order.double() - middle) @ (turn - middle)
    correlation = covariance / (turn - middle).square().sum()
    batches = len(order) // batch_size
    found = labels[order[: batches * batch_size]].view(batches, batch_size)
    shares = labels.bincount().double() / len(labels)
    classes = len(shares)
    cells = found + classes * torch.arange(batches, device="cpu").unsqueeze(1)
    counts = cells.flatten().bincount(minlength=batches * classes).view(batches, classes)
    expected = shares[shares > 0] * batch_size
    chi = ((counts[:, shares > 0] - expected).square() / expected).sum(1)
    return float(correlation), float(chi.mean()) / max(1, len(expected) - 1)
