"""Limits of memory as control groups set them, and what a lost process is told from."""

import builtins

import pytest
import torch
import torch.distributed as dist

from manualnn import distributed, memory
from manualnn.data import limits
from manualnn.distributed import LostPeerError
from manualnn.errors import InputError

GIB = 2**30


def groups(tmp_path, monkeypatch, lines, files):
    """A tree of control groups, and this process's place in it."""
    for name, value in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    (tmp_path / "self").write_text(lines)
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "SELF", tmp_path / "self")


@pytest.mark.parametrize("limited", ["slurm/job/step", "slurm/job", "slurm", ""])
def test_the_limit_of_a_nested_group_holds(tmp_path, monkeypatch, limited):
    files = {}
    for folder in ("", "slurm", "slurm/job", "slurm/job/step"):
        files[f"{folder}/memory.max".lstrip("/")] = GIB if folder == limited else "max"
        files[f"{folder}/memory.current".lstrip("/")] = GIB // 2
        files[f"{folder}/memory.stat".lstrip("/")] = f"anon 1\ninactive_file {GIB // 4}"
    groups(tmp_path, monkeypatch, "0::/slurm/job/step\n", files)
    assert memory.total_memory() == GIB
    assert memory.available_memory() == 3 * GIB // 4
    assert limits.most_bytes() == GIB // 2


@pytest.mark.parametrize("place", ["memory", "cpu,memory"])
def test_version_1_of_the_interface(tmp_path, monkeypatch, place):
    files = {
        f"{place}/docker/abc/memory.limit_in_bytes": GIB,
        f"{place}/docker/abc/memory.usage_in_bytes": GIB // 4,
        f"{place}/memory.limit_in_bytes": 2**63 - 4096,
        f"{place}/memory.usage_in_bytes": 5 * GIB,
    }
    lines = f"9:{place}:/docker/abc\n3:cpuset:/docker/abc\n0::/\n"
    groups(tmp_path, monkeypatch, lines, files)
    assert memory.total_memory() == GIB and memory.available_memory() == 3 * GIB // 4


def test_a_container_sees_its_group_as_the_root(tmp_path, monkeypatch):
    files = {"memory.max": GIB, "memory.current": 0}
    groups(tmp_path, monkeypatch, "0::/docker/which/is/not/there\n", files)
    assert memory.total_memory() == GIB


@pytest.mark.parametrize("psutil", [True, False])
def test_without_proc_there_is_a_limit_all_the_same(tmp_path, monkeypatch, psutil):
    """As on macOS and Windows; a handed-in copy has no psutil."""
    monkeypatch.setattr(memory, "SELF", tmp_path / "absent")
    found = builtins.__import__

    def without(name, *args):
        if name == "psutil" and not psutil:
            raise ImportError
        return found(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert 2**28 < memory.total_memory() < 2**46
    assert 2**20 < memory.available_memory() <= memory.total_memory()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            RuntimeError("[pair.cc:534] Connection closed by peer"),
            LostPeerError,
            "lost",
        ),
        (RuntimeError("Socket Timeout"), LostPeerError, "no answer within"),
        (dist.DistNetworkError("failed to recv"), LostPeerError, "lost another process"),
        (dist.DistStoreError("wait for key"), LostPeerError, "lost another process"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), InputError, "out of mem"),
        (RuntimeError("Duplicate GPU detected : rank 0 and rank 1"), InputError, "use one GPU"),
        (RuntimeError("Tensors must have the same shape"), RuntimeError, "the same shape"),
    ],
)
def test_only_a_lost_connection_is_a_lost_process(error, kind, text):
    with pytest.raises(kind, match=text) as caught, distributed._peers():
        raise error
    assert isinstance(caught.value, LostPeerError) == (kind is LostPeerError)


@pytest.mark.parametrize(
    "where",
    [
        "mysql:user:secret@host/db",
        "postgres//user:secret@host/db",
        "user:secret@host/db",
        "//user:secret@host",
        "mysql://user:secret@host/db",
        "postgresql:user:secret@host/db",
    ],
)
def test_a_url_without_its_slashes_makes_no_folder(tmp_path, monkeypatch, where):
    storage = pytest.importorskip("manualnn.study.storage")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        storage.Storage(where, 30)
    assert "secret" not in str(caught.value) and not list(tmp_path.iterdir())
