"""The memory that this process may have: of the machine, and within the limits of its control
groups, as containers, systemd and SLURM set them."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def total_memory() -> int:
    """Bytes of this machine, or of the smallest limit that holds for this process."""
    return min([_machine()[0], *(limit for limit, _ in _limits())])


def available_memory() -> int:
    """Bytes that can be had now."""
    return max(0, min([_machine()[1], *(limit - used for limit, used in _limits())]))


def _machine() -> tuple[int, int]:
    """Bytes in all, and those that are available; without psutil, which a handed-in copy goes
    without, as the system's configuration has them."""
    try:
        import psutil

        memory = psutil.virtual_memory()
        return memory.total, memory.available
    except (ImportError, OSError, RuntimeError):
        page = _configured("SC_PAGE_SIZE", 1)
        total = page * _configured("SC_PHYS_PAGES", 2**40)
        return total, page * _configured("SC_AVPHYS_PAGES", total // page)


def _configured(name: str, default: int) -> int:
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf(name)
    return default


def _limits() -> Iterator[tuple[int, int]]:
    """The limit and the use, without caches that give way, of each control group that this process
    is in, and of those above it, in both versions of the interface."""
    with suppress(OSError, ValueError):
        for line in SELF.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers:  # version 2; beside version 1 it lies in a folder of its own
                roots = [GROUPS, GROUPS / "unified"]
                files = ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                roots = [GROUPS / controllers, GROUPS / "memory"]
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            for root in roots:
                own = root / name.lstrip("/")
                for folder in (own, *own.parents):
                    yield from _limit(folder, *files)
                    if folder == root:
                        break


def _limit(folder: Path, limit: str, current: str, cache: str) -> Iterator[tuple[int, int]]:
    with suppress(OSError, ValueError):  # "max" where there is no limit
        most = int((folder / limit).read_text())
        used = int((folder / current).read_text())
        with suppress(OSError, ValueError):
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used -= int(dict(lines).get(cache, 0))
        yield most, max(0, used)
