"""Damaged and absurd files: each reader reads them soundly, or says with one line why it does not.

The long run is `python -m benchmarks.fuzz`.
"""

import random
import warnings

import pytest

from benchmarks import fuzz
from manualnn.errors import InputError

COUNT, PARTS = 2000, 4
# Of every reader some inputs must be read: otherwise what follows its first check is never reached.
LEAST = {"idx": 0.25, "csv": 0.15, "toml": 0.08, "pkl": 0.06}


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("reader", fuzz.READERS)
def test_a_reader_is_sound_on_any_input(reader, part):
    count = COUNT // PARTS
    result = fuzz.fuzz(reader, seed=1, first=part * count, count=count)
    assert not result["failures"], result["failures"][0]["trace"]
    assert result["accepted"] >= LEAST[reader] * count
    assert result["refused"] >= count // 4


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_an_input_depends_on_its_number_alone(reader):
    make, _ = fuzz.READERS[reader]
    first, again, other = (make(random.Random(f"{reader} {seed}")) for seed in (3, 3, 4))
    assert first == again != other


def complain(*_):
    warnings.warn("odd", stacklevel=1)


@pytest.mark.parametrize(
    ("check", "error"),
    [
        (lambda *_: 1 // 0, "ZeroDivisionError"),
        (complain, "UserWarning"),
        (lambda *_: print("executed"), "something printed 'executed'"),
        (lambda *_: fuzz.time.sleep(5), "no answer in"),
    ],
)
def test_what_is_a_failure(monkeypatch, tmp_path, check, error):
    monkeypatch.setitem(fuzz.READERS, "idx", (fuzz.make_idx, check))
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    result = fuzz.fuzz("idx", 0, 7, 1, tmp_path / "kept")
    [failure] = result["failures"]
    assert error in failure["error"] and failure["input"] == 7 and result["accepted"] == 0
    [kept] = (tmp_path / "kept").iterdir()
    assert kept.name == "idx-0-7"
    assert kept.read_bytes() == fuzz.make_idx(random.Random("idx 0 7"))


def test_a_message_is_short_and_obeys_no_terminal():
    text = str(InputError(f"key = {'x' * 5000}\n\x1b[31m\u2028 {'y' * 5000}"))
    assert text.isprintable() and len(text) <= 1000 and text.startswith("key = xxx")
