"""As many examples as one likes from those of a data set, each distorted at random.

Shapes: N examples of the data set, n of one block, images (C, H, W).
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..workspace import Workspace, generator
from .augment import Augment
from .shards import ShardWriter
from .sources import Dataset

ORDER_STREAM = 0x6E4E
BLOCK = 1024  # examples that are drawn together


def generate(
    dataset: Dataset,
    folder: Path | str,
    samples: int,
    augment: Augment,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a shard folder of `samples` training examples of bytes, made from the data set's
    training examples, and its test examples as they are.

    Example i depends on the seed and i alone, so fewer are the first of more. Every N of them are
    made from all N examples, in a random order, so that classes are as frequent as in the data set.
    `progress` is told of how many are written. Raises InputError; then, and after an interrupt,
    nothing is left.
    """
    folder = Path(folder)
    assert dataset.train is not None
    images = dataset.train.images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        raise InputError(
            f"{dataset.where}: examples can be generated only from images of bytes in memory"
        )
    shape, dtype = tuple(images.shape[1:]), torch.uint8
    with (
        ShardWriter(folder, dataset.name, shape, dtype, dataset.class_names) as writer,
        closing(_blocks(dataset, samples, augment, seed)) as blocks,
    ):
        count = 0
        for made, labels in blocks:
            writer.add("train", made, labels)
            count += len(made)
            progress(count)
        if dataset.test is not None:
            assert isinstance(dataset.test.images, Tensor)
            writer.add("test", dataset.test.images, dataset.test.labels)


def _blocks(
    dataset: Dataset, samples: int, augment: Augment, seed: int
) -> Generator[tuple[Tensor, Tensor]]:
    """The examples in their order, some at a time; each thread makes a block."""
    assert dataset.train is not None
    images, labels = dataset.train.images, dataset.train.labels
    assert isinstance(images, Tensor)
    threads = torch.get_num_threads()
    spare = [Workspace() for _ in range(threads)]

    @torch.inference_mode()
    def make(start: int) -> tuple[Tensor, Tensor]:
        chosen = _sources(start, min(start + BLOCK, samples), len(images), seed)
        workspace = spare.pop()
        workspace.begin("generate")
        x = images[chosen].float().unsqueeze(0)
        rows = slice(0, len(chosen))
        made = augment.apply(x, [seed], start // BLOCK, workspace, rows, BLOCK)
        made = made[0].round().clamp_(0, 255).to(torch.uint8)
        spare.append(workspace)
        return made, labels[chosen]

    starts = iter(range(0, samples, BLOCK))
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
            ahead.extend(pool.submit(make, start) for start in islice(starts, 2 * threads))
            while ahead:
                block = ahead.popleft().result()
                ahead.extend(pool.submit(make, start) for start in islice(starts, 1))
                yield block
    finally:
        torch.set_num_threads(threads)


def _sources(first: int, last: int, count: int, seed: int) -> Tensor:
    """Which of `count` examples the generated ones `first` to `last` are made from."""
    passes = range(first // count, -(-last // count))
    orders = [
        torch.randperm(count, generator=generator(seed, ORDER_STREAM, k), device="cpu")
        for k in passes
    ]
    return torch.cat(orders)[first - passes.start * count :][: last - first]
