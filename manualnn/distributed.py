"""The torchrun seam: several processes train as one. Without torchrun there is one, rank 0 of 1,
and everything here is what it would be alone.

torchrun starts the processes and says in the environment which one this is; torch.distributed moves
the numbers, by gloo between CPUs and by nccl between GPUs. Nothing else knows of either.
"""

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from .errors import InputError

Result = TypeVar("Result")
# Of a message by gloo or nccl where a process has gone.
LOST = re.compile(r"connect|closed|peer|socket|broken pipe|reset|remote|time ?d? ?out|time is over")
TIMEOUT = 300.0  # seconds that the others wait for a process, MANUALNN_TIMEOUT

_store: dist.Store | None = None
_seconds = TIMEOUT


class LostPeerError(RuntimeError):
    """Another process of the group has ended or does not answer."""


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun started this process in the place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def take(folder: Path) -> None:
    """Note, for after a restart, that what torchrun started here works in this folder."""
    notes = _notes()
    if notes is not None and local_rank() == 0:
        with suppress(OSError), notes.open("a", encoding="utf-8") as file:
            file.write(f"{folder.absolute()}\n")


def took(folder: Path) -> bool:
    """Whether this is a restart, and those before it worked in this folder."""
    notes = _notes()
    if not restarted() or notes is None:
        return restarted()
    with suppress(OSError):
        return str(folder.absolute()) in notes.read_text(encoding="utf-8").splitlines()
    return False


def _notes() -> Path | None:
    """A file where torchrun has those of this start, LOGS/attempt_N/RANK/error.json."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[2] / "manualnn-folders" if error_file else None


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _store is not None else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if _store is not None else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Join the group that torchrun started, unless this process is alone or has done so.

    Raises InputError for a wrong MANUALNN_TIMEOUT, LostPeerError where the others do not come.
    """
    global _store, _seconds
    if not launched() or _store is not None:
        return
    text = os.environ.get("MANUALNN_TIMEOUT", str(TIMEOUT))
    try:
        _seconds = float(text)
        if not 0 < _seconds < 1e6:
            raise ValueError
    except ValueError:
        raise InputError(f"MANUALNN_TIMEOUT = {text!r}: give a number of seconds") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=_seconds)
    with _peers("while the processes find each other"):
        shared, number, count = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(_meeting(shared, number, count), shared)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=number,
            world_size=count,
            timeout=timeout,
        )
    _store = store


def _meeting(store: dist.Store, number: int, count: int) -> str:
    """A name that only the processes of this start agree on: torchrun's store may still hold what
    those before a restart left there, as the addresses that they had.

    Each process leaves a fresh word, and the name is made of all of them, once all see the same.
    """
    words = [f"manualnn/word/{other}" for other in range(count)]
    store.set(words[number], uuid4().hex)
    end = time.monotonic() + _seconds
    while time.monotonic() < end:
        if store.check(words):
            found = b"".join(store.get(word) for word in words)
            name = f"manualnn/{sha256(found).hexdigest()[:16]}"
            seen = [f"{name}/seen/{other}" for other in range(count)]
            store.set(seen[number], "")
            if store.check(seen):
                return name
        time.sleep(0.02)
    raise RuntimeError("time is over")


def end() -> None:
    """Leave the group."""
    global _store
    if _store is not None:
        _store = None
        dist.destroy_process_group()


def portions(count: int) -> list[slice]:
    """range(count) in as many consecutive parts as there are processes, as equal as can be; of
    fewer than there are processes some are empty."""
    edges = [i * count // world() for i in range(world() + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def portion(count: int) -> slice:
    """The part of range(count) that is this process's."""
    return portions(count)[rank()]


def add_up(tensor: Tensor) -> Tensor:
    """Replace `tensor` in every process by the sum over all processes, the same bits in each."""
    if world() > 1:
        with _peers():
            dist.all_reduce(tensor)
    return tensor


def most(value: float) -> float:
    """The largest of the processes' values, in each."""
    if world() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=_device())
    with _peers():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def spread(tensor: Tensor, source: int = 0) -> None:
    """Copy a contiguous `tensor` of process `source` over that of the others."""
    if world() > 1:
        with _peers():
            dist.broadcast(tensor, source)


def gathered(value: Result) -> list[Result]:
    """Each process's value, by rank, in every process, tensors on its own device. Costs a message
    of its bytes as torch.save has them."""
    if world() == 1:
        return [value]
    saved, found = io.BytesIO(), [b""] * world()
    torch.save(value, saved)
    with _peers():
        dist.all_gather_object(found, saved.getvalue())
    return [torch.load(io.BytesIO(one), map_location=_device(), weights_only=True) for one in found]


def on_main(work: Callable[[], Result]) -> Result:
    """What `work` gives in rank 0, the only one to call it, in every process; an InputError
    there is raised in all."""
    if world() == 1:
        return work()
    found: list[Any] = [None, None]
    if is_main():
        try:
            found[0] = work()
        except InputError as error:
            found[1] = error
    with _peers():
        dist.broadcast_object_list(found, 0)
    result, failed = found
    if failed is not None:
        raise _everywhere(failed)
    return result


def together(work: Callable[[], Result]) -> Result:
    """What `work` gives; InputError in all processes if it raises one in any, which says where
    unless it was the same in all."""
    if world() == 1:
        return work()
    result, failed = None, None
    try:
        result = work()
    except InputError as error:
        failed = str(error)
    errors = gathered(failed)
    found = [(number, error) for number, error in enumerate(errors) if error is not None]
    if found:
        number, line = found[0]
        same = len(set(errors)) == 1
        raise _everywhere(InputError(line if same else f"rank {number}: {line}"))
    return result  # type: ignore[return-value]


def agree(facts: dict[str, str]) -> None:
    """Raise InputError unless all processes have the same facts; it names the first that differs
    from rank 0."""
    others = gathered(facts)
    for number, found in enumerate(others):
        for name, value in others[0].items():
            if found.get(name) != value:
                line = (
                    f"rank {number} has another {name} ({found.get(name)}) than rank 0 ({value});"
                    " all need the same files, package and kind of processor"
                )
                raise _everywhere(InputError(line))


def _everywhere(error: InputError) -> InputError:
    """The error, marked as one that all processes raise: rank 0 prints it for all."""
    error.everywhere = True
    return error


def _device() -> torch.device:
    """Where a message to the others must lie."""
    cuda = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


@contextmanager
def _peers(when: str = "") -> Iterator[None]:
    """Turn what a collective raises into one line that names who is missing."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
            raise InputError(
                "out of memory while numbers are exchanged; train smaller batches or fewer networks"
            ) from None
        if "duplicate gpu" in text:
            raise InputError(
                "two processes use one GPU: start as many on a machine as it has, without --device"
            ) from None
        lost = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        if not lost and not LOST.search(text):
            raise  # not foreseen
        slow = "time" in text
        reason = f"no answer within {_seconds:g} s" if slow else "the connection is closed"
        raise LostPeerError(f"lost {_missing()}: {reason}{when and f', {when}'}") from error


def _missing() -> str:
    """The processes that do not notice, as this one does, that one is missing."""
    if _store is None:
        return "another process"
    names = [f"noticed/{number}" for number in range(world())]
    try:
        _store.set(names[rank()], "")
        time.sleep(min(1.0, _seconds))  # as the others notice at about the same time
        silent = [number for number, name in enumerate(names) if not _store.check([name])]
    except RuntimeError:  # the store has ended, too
        silent = []
    return f"rank {', '.join(map(str, silent))}" if silent else "another process"


def as_one(work: Callable[[], Result]) -> Result:
    """What `work`, the whole of a command, gives. Of several processes only rank 0 prints.

    Bad input that all of them see is one line, and of one rank a line that names it. What nobody
    foresaw goes into torchrun's error file, so that its summary has the traceback.
    """
    expected: list[Exception] = []

    @record
    def recorded() -> Result | None:
        try:
            return work()
        except Exception as error:
            # Usage errors of typer's parser are told by their interface.
            foreseen = isinstance(error, InputError | LostPeerError)
            if not foreseen and not hasattr(error, "format_message"):
                raise
            expected.append(error)
        return None

    with ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        try:
            result = recorded()
        finally:  # an interpreter that ends while the group's threads run may abort
            number, joined = rank(), _store is not None
            end()
    if not expected:
        return result  # type: ignore[return-value]
    [error] = expected
    if isinstance(error, LostPeerError):
        remedy = "what was saved before is kept, and --resume goes on from it"
        print(f"error: rank {number}: {error}; {remedy}", file=sys.stderr)
        sys.exit(1)
    if not joined:  # each sees the same of what is given; one of each machine says so
        speaks = local_rank() == 0
    elif isinstance(error, InputError) and error.everywhere:
        speaks = number == 0
    else:
        raise InputError(f"rank {number}: {error}") from error
    if speaks:
        raise error
    sys.exit(2)
