"""Surroundings that are not the usual: no home, closed or full output, names that are none."""

import errno
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from manualnn import cli, config, files, plots
from manualnn.errors import InputError
from manualnn.experiment import Run

SMALL = "--epochs 1 --set data.train_samples=100 --set data.valid=20 -q".split()


def start(*arguments, shell="", **environment):
    """The command in a process of its own, with environment variables changed or taken away."""
    env = {key: x for key, x in {**os.environ, **environment}.items() if x is not None}
    command = [sys.executable, "-m", "manualnn", *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 120}
    return subprocess.run(command, env=env, **options)


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    for name in ("MANUALNN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    folder = files.cache_folder()
    assert folder.is_dir() and folder == files.cache_folder()
    assert folder.stat().st_mode & 0o077 == 0  # nobody else can put files there


def test_the_home_of_nobody(run):
    code, out, err = run("train", "--data", "~nobody-of-that-name/x")
    assert (code, out) == (2, "")
    assert err == "error: ~nobody-of-that-name/x: the home that ~ stands for is unknown\n"


def test_an_unknown_backend_of_matplotlib_and_a_plain_terminal(folder, tmp_path):
    """Class names are escaped where they cannot be shown."""
    names = '["\u00e9", "\u00df", "2", "3"]'
    arguments = [
        "train",
        "--data-dir",
        folder,
        *SMALL,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    more = {"MPLBACKEND": "of a notebook", "PYTHONIOENCODING": "ascii"}
    done = start(*arguments, "--set", f"data.class_names={names}", **more)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "curves.png").exists()
    done = start("evaluate", tmp_path / "out", **more)
    assert done.returncode == 0 and "\\xe9" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("> /dev/full", 1, "error: the output: No space left on device\n"),
    ],
)
def test_output_that_is_closed_or_full(shell, code, said):
    if "full" in shell and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    done = start("summary", "mnist-student", shell=shell)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", LONG],
        ["train", "--out", LONG],
        ["train", "--data", f"{LONG}.csv"],
        ["train", "--data-dir", LONG],
        ["evaluate", LONG],
        ["evaluate", "--out", LONG],
        ["predict", "mnist-mlp", LONG],
        ["summary", LONG],
        ["show", LONG],
        ["report", LONG],
        ["inspect", LONG],
        ["gradcheck", LONG],
        ["grade", LONG],
        ["reproduce", LONG],
        ["hand-in", "--id", "1", LONG, LONG],
        ["data", "convert", f"{LONG}.csv", "--out", "shards"],
    ],
)
def test_a_name_that_is_too_long(run, arguments):
    code, out, err = run(*arguments)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: "), err
    assert "File name too long" in last or "no such file" in last.lower() or LONG[:99] in last


def test_a_file_with_a_name_of_the_greatest_length_is_written(tmp_path):
    path = tmp_path / ("y" * 251 + ".txt")
    files.write_text(path, "whole")
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_names_that_are_not_utf_8(run, folder, tmp_path):
    out = os.fsdecode(b"r\xff")
    common = ["--data-dir", folder, "--device", "cpu"]
    assert run("train", *common, *SMALL, "--out", out)[0] == 0
    code, _, err = run("evaluate", out)
    assert code == 0, err
    assert run("report", out)[0] == 0
    strange = os.fsdecode(b"d\xff")
    Path(folder).rename(strange)
    code, _, err = run("train", "--data-dir", strange, *SMALL, "--out", "new")
    assert code == 2 and "is not UTF-8; rename the file" in err.splitlines()[-1]
    assert not Path("new").exists()


def test_a_picture_of_a_name_that_is_not_utf_8(tmp_path):
    figure = plots.confusion(np.eye(2), ["a", os.fsdecode(b"\xff")], "t\udcff")
    plots.save(figure, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    strange = os.fsdecode(b"$\xff.csv")  # one value of data.train in a grid
    level = {"value": strange, "mean": 0.5, "std": None, "best": 0.5}
    plots.save(plots.marginals({"train": [level]}, "t"), tmp_path / "m.png")
    maps = [("train", "l2", [[0.5]], [strange], ["$"])]
    plots.save(plots.heat_maps(maps, "t"), tmp_path / "h.png")


@pytest.mark.parametrize("units", [10**15, 10**18, 2**62])
def test_a_layer_that_fits_into_no_memory(folder, units):
    sets = [f'data.dir="{folder}"', f'model.layers=[["linear", {units}], ["linear", "classes"]]']
    with pytest.raises(InputError, match="not fit into"):
        Run(config.load_config("mnist-mlp", sets), device="cpu")


def test_ctrl_c_while_the_command_is_imported(monkeypatch, capsys):
    from manualnn import __main__

    class Interrupted:
        def find_spec(self, name, *_):
            if name == "manualnn.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "manualnn.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delattr("manualnn.cli", raising=False)
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_an_error_of_the_system_is_one_line(run, monkeypatch):
    from manualnn import evaluation

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "weights\n.pkl")

    monkeypatch.setattr(evaluation, "summarise", fail)
    code, out, err = run("summary")
    assert (code, out, err) == (2, "", "error: weights\\n.pkl: Input/output error\n")


def test_the_package_says_that_it_has_types():
    assert resources.files("manualnn").joinpath("py.typed").is_file()
    assert cli.main
