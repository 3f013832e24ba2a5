"""What each process of tests/test_distributed.py does: python -m tests.together FILE, by torchrun.

Trains some networks for 200 steps and writes, from rank 0, what came of each: the losses of every
step, the parameters of every process, and how many bytes it sent for a step.
"""

import atexit
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from manualnn import distributed
from manualnn.data import Prepared, Samples, ShardWriter, Streamed, open_shards, prepare
from manualnn.data.augment import Augment
from manualnn.training import Training

from .conftest import config_of, random_data, training_of

STEPS = 200
MLP = [["linear", 20], ["relu"], ["dropout", 0.3], ["linear", 9], ["tanh"], ["linear", "classes"]]
CNN = [
    ["conv2d", 4, 3], ["relu"], ["max_pool2d", 2], ["dropout", 0.2], ["linear", "classes"],
]  # fmt: skip
MOMENTUM = {"momentum": 0.9, "nesterov": True, "learning_rate": 0.05}


def cases() -> dict[str, Training]:
    """97 samples in batches of 32 leave a batch of one; portions of 7 and 3 differ or are empty."""
    data = random_data(samples=97)
    pixels = torch.randn(97, 2, 8, 9, generator=torch.Generator().manual_seed(1)).double()
    images = replace(data, train=replace(data.train, x=pixels), test=None, shape=(2, 8, 9))
    single = random_data(samples=97, dtype="fp32")
    penalties = {"train__l1": 1e-4, "train__l2": 1e-3, "train__label_smoothing": 0.1}
    weights = {"train__class_weights": "balanced"}
    settings = {
        "momentum": (data, {"train__optimizer": MOMENTUM, **penalties}),
        "float32": (single, {"train__optimizer": MOMENTUM, "train__precision": "fp32"}),
        "adam": (data, {"train__optimizer": {"name": "adam"}, "train__batch_size": 7, **weights}),
        "plain": (data, {"train__batch_size": 3, "train__drop_last": True}),
        "convolution": (images, {"model__layers": CNN, "train__optimizer": {"name": "adam"}}),
        "augmented": (
            replace(images, augment=Augment.parse(("elastic:9", "hflip", "shift:2", "cutout:3"))),
            {"model__layers": CNN, "train__batch_size": 10},
        ),
        "population": (data, {"train__seeds": [1, 2, 3], "train__optimizer": {"name": "adam"}}),
        "streamed": (streamed(), {"train__optimizer": {"name": "adam"}}),
    }
    return {
        name: training_of(
            config_of(**({"model__layers": MLP, "train__epochs": 99} | changes)), chosen
        )
        for name, (chosen, changes) in settings.items()
    }


def streamed() -> Prepared:
    """97 examples in files, of which 12 at a time are in memory."""
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(256, (97, 1, 4, 4), generator=draw, dtype=torch.uint8)
    labels = torch.randint(3, (97,), generator=draw)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    with ShardWriter(folder / "own", "own", (1, 4, 4), torch.uint8, ("a", "b", "c")) as writer:
        writer.add("train", images, labels)
    rows = open_shards(folder / "own").images["train"]
    prepared = prepare((rows, labels), None, dtype=torch.float64)
    x = Streamed(rows, prepared.normalization, torch.float64, "cpu", memory=12 * 16)
    assert not x.whole
    return replace(prepared, train=Samples(x, labels))


def train(training: Training) -> dict[str, Tensor]:
    """`STEPS` steps: the mean loss of each batch (STEPS, R), the parameters, test measures."""
    losses: list[Tensor] = []
    epoch = 0
    while len(losses) < STEPS:
        epoch += 1
        for index in list(training.batches(epoch))[: STEPS - len(losses)]:
            for shard in training.shards:
                shard.tally.clear()
            training.step(index)
            losses.append(training.totals()[0] / index.shape[1])
    state = training.state()
    measured = torch.tensor(training.measure(training.data.train))
    return {"losses": torch.stack(losses), "theta": state["theta"].clone(), "measured": measured}


def main() -> None:
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    results = {}
    for name, training in cases().items():
        sent: list[int] = []
        add_up = distributed.add_up

        def counted(tensor: Tensor, add_up=add_up, sent=sent) -> Tensor:
            sent.append(tensor.numel() * tensor.element_size())
            return add_up(tensor)

        distributed.add_up = counted
        result = train(training)
        distributed.add_up = add_up
        everywhere = distributed.gathered(result)
        result["same"] = all(
            other[key].equal(result[key]) for other in everywhere for key in result
        )
        result["sent"] = sent[:-1]  # the last is of the measurement
        result["apart"] = training.apart
        results[name] = result
    if distributed.is_main():
        torch.save(results, Path(sys.argv[1]))
    distributed.end()


if __name__ == "__main__":
    main()
