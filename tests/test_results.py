"""The one rule by which a network is the best of several."""

import json

import pytest
import torch

from manualnn.config import load_config
from manualnn.experiment import Run
from manualnn.results import best_network, chosen_by
from manualnn.sweep import configure, summarise


def rows(*figures):
    """Networks of (label, validation accuracy, validation loss); diverged where that is nan."""
    return [
        {
            "run": label,
            "valid_accuracy": accuracy,
            "valid_loss": loss,
            "diverged": loss != loss,
            "test_accuracy": i / 10,
        }
        for i, (label, accuracy, loss) in enumerate(figures)
    ]


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([("a", 0.7, 1.0), ("b", 0.9, 2.0), ("c", 0.8, 0.1)], 1),
        ([("a", 0.9, 1.0), ("b", 0.9, 0.5), ("c", 0.9, 0.7)], 1),  # a tie: the lowest loss
        ([("a", 0.9, 1.0), ("b", 0.9, 1.0)], 0),  # in order
        ([("a", None, None), ("b", None, None)], 0),  # whatever the test set says
        ([("a", 0.99, float("nan")), ("b", 0.5, 1.0)], 1),
        ([("a", 0.99, float("nan")), ("b", 0.5, float("nan"))], 0),
        ([("a", 0.0, 1.0), ("b", None, None)], 0),
        # the mean over seeds decides, then the best of them
        ([("a", 0.95, 1.0), ("b", 0.90, 1.0), ("a", 0.80, 1.0), ("b", 0.91, 1.0)], 3),
        ([("a", 0.5, None), ("b", 0.5, 3.0)], 1),
        # a loss that overflows, though the weights are finite
        ([("a", 0.5, float("inf")), ("a", 0.5, 0.2)], 1),
    ],
)
def test_the_best_network(figures, best):
    assert best_network(rows(*figures)) == best


def test_why_it_is_the_best():
    assert chosen_by(rows(("a", 0.9, 1.0))) == "the highest validation accuracy"
    assert "the first, as there are no validation data" in chosen_by(rows(("a", None, None)))


def test_findings_and_weights_of_a_tie_are_of_one_combination(folder, tmp_path):
    """Accuracies on four examples tie; the losses do not."""
    sets = [f'data.dir="{folder}"', "train.epochs=1", "data.valid=4", "data.train_samples=80"]
    config = load_config("mnist-mlp", sets, grid=["train.l2=[0.3, 0, 3e-4, 0.1]"])
    run = Run(configure(config, "s"), tmp_path / "sweep", "cpu")
    for _ in run.train():
        pass
    result = summarise(run.folder, config)
    kept = torch.load(tmp_path / "sweep" / "weights.pkl")["meta"]["run"]
    metrics = json.loads((tmp_path / "sweep" / "metrics.json").read_text())
    assert kept == metrics["weights"]["run"] == f"l2 {result['best']['train.l2']:g}"
    assert len({row["valid_accuracy"] for row in result["rows"]}) < 4  # there was a tie


def test_which_network_was_kept_is_said(folder, run):
    options = ["train", "--data-dir", folder, "--device", "cpu", "--epochs", "1"]
    options += ["--set", "train.optimizer.learning_rate=[1e-5, 0.1]"]
    _, out, _ = run(*options, "--set", "data.valid=60")
    [line] = [line for line in out.splitlines() if line.startswith("weights.pkl is")]
    assert "learning_rate 0.1, seed 0: the highest validation accuracy" in line
    _, out, _ = run(*options, "--set", "data.valid=0")
    assert "learning_rate 1e-05, seed 0: the first, as there are no validation data" in out
