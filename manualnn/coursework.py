"""The functions that an assignment asks for by name."""

from pathlib import Path

from .evaluation import evaluate_weights


def evaluate_hw1(data_dir: Path | str | None = None, weights: Path | str | None = None) -> float:
    """The accuracy in [0, 1] of a trained network over the MNIST test set.

    Without arguments both come with the package, so it works offline and from any folder; only
    `MANUALNN_DATA`, where it is set, comes before the bundled data.
    `data_dir` is another folder of idx files (torchvision's layout, or the files themselves, plain
    or .gz) with examples of the same size; `weights` another weights file or run folder. Raises
    manualnn.InputError, a ValueError, when they cannot be read or do not fit together.
    """
    return evaluate_weights(weights, data_dir=data_dir).evaluation.accuracy
