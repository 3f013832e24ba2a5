"""The benchmarks run, and both sides of a pair reach the same accuracy. No time is judged here."""

import re

import pytest

from benchmarks import against_singles, against_torch


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
