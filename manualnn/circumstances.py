"""What a result depends on: config, data, device, threads, processor, versions, commit."""

import hashlib
import json
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .config import Config, parse_config
from .data import Dataset, Rows
from .files import PACKAGE, package_version


def circumstances(config: Config, data: list[str], device: torch.device) -> dict[str, Any]:
    """As metrics.json records them; equal ones give equal numbers, to the bit. `data` are the
    digests of the data sets, in the order of their use."""
    cuda = device.type == "cuda"
    versions = {
        "manualnn": package_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": versions | ({"cuda": torch.version.cuda} if cuda else {}),
        "commit": _commit(),
        "config": config.name,
        "config_sha256": digest(config),
        "data_sha256": data,
    }


def digest(config: Config) -> str:
    """SHA-256 of all that a config says, whatever it is called."""
    text = json.dumps(parse_config(config.to_dict(), config.name).to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def data_digest(dataset: Dataset) -> str:
    """SHA-256 of the examples of a data set, with their types, shapes and order."""
    return list(data_digests(dataset).values())[-1]


def data_digests(dataset: Dataset) -> dict[str, str]:
    """For each part of a data set that there is, in order, the SHA-256 of it and those before."""
    found, digests = hashlib.sha256(), dict[str, str]()
    for part in ("train", "test"):
        examples = getattr(dataset, part)
        for tensor in (examples.images, examples.labels) if examples else ():
            if isinstance(tensor, Rows):  # whose checksums are known
                found.update(tensor.digest().encode())
                continue
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().data)
        if examples:
            digests[part] = found.hexdigest()
    return digests


def _processor() -> str:
    """The model of the CPU: kernels are chosen by it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, if this is one."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(PACKAGE.parent), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=5)
        return found.stdout.strip() if found.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None
