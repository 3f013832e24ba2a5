"""The README is true: its commands run, and its files, keys and names exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from manualnn.config import DEFAULT, load_config
from manualnn.files import shipped

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


INSTALLS = [block.strip() for block in blocks("sh") if "pip install" in block]
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in blocks("sh")
    if "pip install" not in block
    for line in block.strip().splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, folder):
    """In order, in one folder; a training is cut to one epoch, which is what a reader waits for."""
    if command.startswith("manualnn train"):
        command += " --epochs 1"
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, arguments in (("manualnn", "-m manualnn"), ("python", "")):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or ">" in command


def test_the_python_example_runs(folder):
    [code] = blocks("python")
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/mnist-mlp" in done.stdout


def test_there_are_two_commands_for_a_fresh_machine():
    """What .ci/run copies and runs is the second; the first ends in a training."""
    assert len(INSTALLS) == 2
    assert INSTALLS[0].endswith("manualnn train")
    assert INSTALLS[1].endswith("python -m pytest")


def test_the_default_config_is_shown_as_it_is(tmp_path):
    [toml] = blocks("toml")
    (tmp_path / "shown.toml").write_text(toml)
    assert load_config(tmp_path / "shown.toml").to_dict() == load_config(DEFAULT).to_dict()


def test_files_that_are_named_exist():
    for target in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(mnist-[\w-]+)`", TEXT):
        assert (shipped("configs") / f"{name}.toml").exists(), name


def test_the_hidden_layers_of_the_default_are_linear_and_relu_only():
    assert {layer[0] for layer in load_config(DEFAULT).model.layers} == {"linear", "relu"}
