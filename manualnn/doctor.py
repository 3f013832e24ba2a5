"""What this machine offers: torch's build, devices, data sets, versions; and what is broken."""

import hashlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .config import load_config
from .data import DATASETS, load
from .data.sources import canonical, local_folder, search
from .errors import InputError
from .evaluation import choose_device
from .experiment import dry_run
from .files import cache_folder, package_version, user_path, write_text
from .find import find_weights
from .network import load_weights


def examine() -> dict[str, Any]:
    """All that `manualnn doctor` prints: plain values, with `problems`, one line each, that keep
    `manualnn train` from working."""
    problems: list[str] = []
    report = {
        "versions": _versions(problems),
        "device": _device(),
        "data": {name: _data(name, problems) for name in DATASETS},
        "cache": _cache(),
        "training": _training(problems),
    }
    return report | {"problems": problems}


def _versions(problems: list[str]) -> dict[str, str]:
    """Versions of all that takes part, or why it cannot be imported."""
    found = {"manualnn": package_version(), "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    for name, load_module in (
        ("torchvision", _torchvision),
        ("numpy", _numpy),
        ("matplotlib", _matplotlib),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = load_module()
        except Exception as error:  # a torchvision of another torch fails in many ways
            reason = " ".join(str(error).split())[:200]
            found[name] = f"cannot be imported ({type(error).__name__}: {reason})"
            if name == "torchvision":
                found[name] += "; nothing here needs it"
            else:
                problems.append(f"{name} {found[name]}; install it again")
    return found


def _torchvision() -> str:
    import torchvision

    return torchvision.__version__


def _numpy() -> str:
    import numpy

    return numpy.__version__


def _matplotlib() -> str:
    import matplotlib

    return matplotlib.__version__


def _device() -> dict[str, Any]:
    """The device that "auto" chooses, and why."""
    chosen = choose_device("auto")
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if torch.backends.cuda.is_built() else "built without CUDA"
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        memory = properties.total_memory / 2**30
        why = f"torch is {build} and finds {properties.name} with {memory:.0f} GiB"
    elif torch.backends.cuda.is_built():
        why = f"torch is {build}, but finds no NVIDIA driver or no GPU"
    else:
        why = f"torch is {build}"
    return {
        "auto": chosen.type,
        "why": why,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _data(name: str, problems: list[str]) -> str:
    """Where a data set is and whether its files are whole, or which are missing."""
    folder, md5 = local_folder(name), DATASETS[name].md5
    note = ""
    if (environment := os.environ.get("MANUALNN_DATA")) is not None:
        keys = list(md5)
        files = search(user_path(environment), name, keys, [k for k in keys if "train" in k])
        if isinstance(files, str):  # what is not there is looked for elsewhere; what is, is used
            note = f"MANUALNN_DATA: {files}; otherwise "
        else:
            return _own_data(name, environment, problems)
    missing = [key for key in md5 if not (folder / canonical(*key)).is_file()]
    wrong = [canonical(*key) for key in md5 if key not in missing and _md5(folder, key) != md5[key]]
    if wrong:
        problems.append(f"{name}: {', '.join(wrong)} in {folder} damaged; delete and get it again")
        return f"{note}{folder}: wrong md5 of {', '.join(wrong)}"
    if missing:
        names = ", ".join(canonical(*key) for key in missing)
        if name == "mnist":
            problems.append(f"mnist: {names} missing in {folder}; install the package again")
        return f"{note}{folder} lacks {names}: downloaded when it is asked for, or put it there"
    return f"{note}{folder} (md5 right)"


def _own_data(name: str, environment: str, problems: list[str]) -> str:
    """Where the user's own files of a data set are, or what is wrong with them."""
    try:
        return f"{load(name, environment, optional=('test',)).where} (MANUALNN_DATA)"
    except InputError as error:
        problem = f"MANUALNN_DATA: {error}"
        if (line := f"{problem}; mend the file or unset MANUALNN_DATA") not in problems:
            problems.append(line)  # one folder may be read as several data sets
        return problem


def _md5(folder: Path, key: tuple[str, str]) -> str:
    content = (folder / canonical(*key)).read_bytes()
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _cache() -> str:
    folder = cache_folder()
    probe = folder / "doctor"
    try:
        write_text(probe, "")
        probe.unlink()
    except OSError as error:
        return f"{folder}: cannot be written ({error.strerror or error}); data is decoded each time"
    return str(folder)


def _training(problems: list[str]) -> str:
    """Whether the shipped weights load and the default config trains a step."""
    try:
        load_weights(find_weights("shipped:mnist-mlp"))
        [training] = dry_run(load_config(), steps=1)
        if not bool(training.network.theta.isfinite().all()):
            raise InputError("a training step gave weights that are not finite")
        return f"the shipped weights load, and a step works on {training.device}"
    except Exception as error:  # whatever keeps a step from working is what is looked for
        reason = " ".join(str(error).split())  # torch's own errors have many lines
        problems.append(f"training: {type(error).__name__}: {reason}")
        return f"fails: {reason}"


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for a reader."""
    device = report["device"]
    yield f"{'device':<14} {device['auto']}: {device['why']}"
    yield f"{'threads':<14} {device['threads']} of {device['cores']} cores"
    for kind in ("versions", "data"):
        for name, value in report[kind].items():
            yield f"{name:<14} {value}"
    yield f"{'cache':<14} {report['cache']}"
    yield f"{'training':<14} {report['training']}"
    for problem in report["problems"]:
        yield f"problem: {problem}"
    yield "all is well" if not report["problems"] else ""
