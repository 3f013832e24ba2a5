"""The benchmarks run, and both sides of a pair reach the same accuracy. No time is judged here."""

import re

import pytest
import torch

from benchmarks import (
    accuracy,
    against_peers,
    against_singles,
    against_torch,
    gpu,
    growth,
    results,
    stream,
)
from benchmarks.works import WORKS, find


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_against_torch(capsys):
    against_torch.main(["--rounds", "1", "--epochs", "2", "--samples", "3000"])
    out = capsys.readouterr().out
    ours, theirs = (float(value) for value in re.findall(r"test (0\.\d+)", out))
    assert abs(ours - theirs) < 0.01 and ours > 0.5
    assert re.search(r"ratio \d\.\d+ \(", out)


def test_against_singles(capsys):
    sets = ["--set", "data.train_samples=500", "--set", 'grid={"train.l2" = [0, 0.01]}']
    against_singles.main(["fashion-logistic", "--data", "mnist", "--epochs", "2", *sets])
    out = capsys.readouterr().out
    assert re.search(
        r"2 networks: together .* ratio \d+\.\d\d; losses .* at most (0.0e\+00|\d\.\de-\d\d)\n", out
    )
    assert re.search(r"all: .* ratio \d+\.\d\d\n$", out)


def test_peers_take_turns_and_are_put_beside_each_other():
    name = "W1:samples=6400"
    workers = against_peers.measure(name, ["manualnn", "torch eager", "torch ensemble"], 2, 0.01)
    ours, eager, ensemble = workers
    assert ensemble.unfit == "several networks at once"
    assert all(len(worker.seconds) == 2 and min(worker.seconds) > 0 for worker in (ours, eager))
    assert all(len(worker.end["accuracies"]) == 1 for worker in (ours, eager))
    text, ratios = against_peers.summarize(name, workers, peak=1e11)
    assert ratios["manualnn"] == 1 and ratios["torch eager"] > 0
    assert "| torch eager |" in text and "Not run: torch ensemble: several networks" in text


def test_a_peer_that_fails_says_so():
    worker = against_peers.Worker.start("manualnn", "W1:samples=70000", "cpu")
    assert worker.unfit.startswith("failed: manualnn.errors.InputError: run: data.train_samples")
    worker.finish()


def test_every_work_is_the_same_for_all():
    """The parameters that manualnn counts are those of torch.nn; products by hand."""
    from benchmarks.peers import module
    from manualnn.coursework import count_parameters

    for name in ("W1", "W3", "W4", "W5"):
        work = WORKS[name]
        torch_count = sum(p.numel() for p in module(work).parameters())
        assert count_parameters(work.config()) == torch_count, name
    first, rest = 784 * 128, 128 * 64 + 64 * 10
    assert WORKS["W1"].flops() == 2 * (2 * first + 3 * rest) * 937 * 64
    assert find("W1:width=32:depth=3").layers[0] == ["linear", 128]
    assert WORKS["W6"].rates[-1] == pytest.approx(0.1) and len(set(WORKS["W6"].rates)) == 16


def test_the_other_benchmarks(monkeypatch, tmp_path):
    assert growth.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    layers = (["linear", 32], ["relu"], ["linear", "classes"])
    monkeypatch.setitem(accuracy.GOALS, "test", (0.5, layers, 1, 256, 0.1))
    seconds, best = accuracy.seconds_to("test", 0)
    assert seconds > 0 and best > 0.5
    path = tmp_path / "RESULTS.md"
    results.write_section("A", "first", path)
    results.write_section("B", "second", path)
    results.write_section("A", results.table(("x", "y"), [(1, 2)]), path)
    text = path.read_text()
    assert text.count("## A") == text.count("## B") == 1 and "first" not in text
    assert "| 1 | 2 |" in text and text.index("## A") < text.index("## B")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            gpu.main(quick=True)


def test_stream(capsys):
    arguments = ["--samples", "20000", "--in-memory", "4000", "--memory-mb", "2", "--rounds", "1"]
    stream.main(arguments)
    out = capsys.readouterr().out
    assert re.search(r"resident at most [\d,]+ MB", out)
    assert re.search(r"\| stream \| 20,000 \| [\d,]+ \| [\d,]+ to [\d,]+ \| \d+\.\d+ \|", out)
    assert re.search(r"\| 2 MB \| 16 \| 83 \| 16 \| [+-]0\.\d+ \| [12]\.\d+ \|", out)
