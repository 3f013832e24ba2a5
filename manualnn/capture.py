"""A sequence of operations recorded once and played again.

A training step does the same to the same buffers every time; what differs, samples and rates, is
written into buffers before it. So the calls that write are recorded while it runs, and played again
without the Python that chose them: layers, views, shapes. The mathematics stays in one place, and
what is played is, bit for bit, what it does. On a GPU the kernels are recorded instead, as a CUDA
graph; torch.compile is the third way.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READ = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "is_nonzero"}


class Recording(TorchFunctionMode):
    """Inside `with recording:` the calls that write are noted; `recording()` plays them again.

    `obstacle` names the first call that cannot be played: one that makes a tensor with memory of
    its own, which the next call would make elsewhere, or that reads a number out of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.obstacle = ""
        self._calls: list[Callable[[], Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.__name__
        writes = name.endswith("_") and not name.endswith("__")
        if writes or "out" in kwargs or name == "__setitem__":
            self._calls.append(partial(func, *args, **kwargs))
        elif name in READ or not _memory(result) <= _memory((args, kwargs)):
            self.obstacle = self.obstacle or name
        return result

    def __call__(self) -> None:
        for call in self._calls:
            call()


class Replay:
    """A function that does the same to the same buffers whenever it is called.

    The first call may make them, the second records, the others play. `how`: "calls" plays the
    calls that write, or computes where something is in the way; "graph" a CUDA graph; "compile" is
    torch.compile, to which the buffers must be new memory.
    """

    def __init__(self, work: Callable[[], Any], how: str = "calls") -> None:
        self.work, self.how = work, how
        self.recording: Recording | None = None
        self._made = False
        self._play: Callable[[], Any] | None = None

    def __call__(self) -> None:
        if not self._made:
            self.work()
            self._made = True
        elif self._play is not None:
            self._play()
        elif self.how == "compile":
            self._play = torch.compile(self.work, fullgraph=True, dynamic=False)
            self._play()
        elif self.how == "graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.work()
            self._play = graph.replay
            self._play()
        else:
            self.recording = Recording()
            with self.recording:
                self.work()
            self._play = self.work if self.recording.obstacle else self.recording


def _memory(value: Any) -> set[int]:
    """Where the storages of all tensors in nested tuples, lists and dicts begin."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(value)}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
