"""Other targets for the same examples: their parity, coin flips, a share of random labels.

Shapes: N samples, K classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..workspace import generator
from .sources import Dataset, Examples

CORRUPTION_STREAM, COIN_STREAM = 0xC0AA, 0xC014


def relabel(
    dataset: Dataset,
    labels: str = "given",
    test_labels: str = "same",
    seed: int = 0,
    classes: int | None = None,
) -> Dataset:
    """The data set with labels as "given", or their "parity" (0 even, 1 odd; see `label_names`).

    `test_labels` may differ for the test part: "given", "parity", or "random", uniform over
    `classes` (default those of `labels`), independent of the examples and a function of `seed`.
    """
    names = ("even", "odd") if labels == "parity" else dataset.class_names
    test_labels = labels if test_labels == "same" else test_labels

    def changed(examples: Examples | None, kind: str) -> Examples | None:
        if examples is None or kind == "given":
            return examples
        if kind == "parity":
            return replace(examples, labels=examples.labels % 2)
        draw = generator(seed, COIN_STREAM)
        count = classes or len(names or ())
        coins = torch.randint(count, examples.labels.shape, generator=draw, device="cpu")
        return replace(examples, labels=coins)

    train, test = changed(dataset.train, labels), changed(dataset.test, test_labels)
    return replace(dataset, train=train, test=test, class_names=names)


def label_names(
    names: Sequence[str],
    labels: str = "given",
    test_labels: str = "same",
    corruption: float = 0.0,
) -> list[str]:
    """The names of the classes, where labels are what these say: "even" and "odd" only for the
    parity of uncorrupted examples, and none of another kind where all labels are drawn at random.
    Classes without a name are called by their numbers."""
    if labels == "parity":
        meant = not corruption and test_labels in ("same", "parity")
        names = [*(("even", "odd") if meant else ("0", "1")), *names[2:]][: len(names)]
    elif corruption == 1:
        names = [str(k) for k in range(len(names))]
    return list(names)


def corrupt(labels: Tensor, fraction: float, classes: int, seed: int) -> Tensor:
    """Labels (N,) of which round(fraction N), chosen by `seed`, are drawn anew, uniformly over
    `classes` (Zhang et al. 2017, section 2.2). What a smaller fraction replaces, a larger one does
    too, by the same labels."""
    draw = generator(seed, CORRUPTION_STREAM)
    chosen = torch.randperm(len(labels), generator=draw, device="cpu")[
        : round(fraction * len(labels))
    ]
    drawn = torch.randint(classes, labels.shape, generator=draw, device="cpu")
    return labels.scatter(0, chosen, drawn[chosen])
