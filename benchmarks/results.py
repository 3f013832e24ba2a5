"""RESULTS.md: a section for each benchmark, with the machine, the versions and the commit."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = """# Results

Written by `python -m benchmarks NAME`, each section by its own command on the machine it names.
"""


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device: str = "cpu") -> str:
    """One line: processor, versions, commit."""
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    except OSError:
        pass
    if device != "cpu":
        model = torch.cuda.get_device_name()
    versions = []
    for package in ("torch", "jax", "scikit-learn"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    root = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=7"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    commit = git.stdout.strip() or "unknown"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{model}, {cores}; Python {platform.python_version()}, {', '.join(versions)}; {commit}"


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put a section into the file in place of the one of that name."""
    before = path.read_text(encoding="utf-8") if path.exists() else TITLE
    section = f"## {name}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(before):
        after = pattern.sub(lambda _: section + "\n", before)
    else:
        after = f"{before.rstrip()}\n\n{section}"
    path.write_text(after.rstrip() + "\n", encoding="utf-8")
