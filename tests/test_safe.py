"""Files that would execute code, ask for terabytes or are damaged: one line, nothing happens."""

import collections
import io
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch

from manualnn import safe
from manualnn.errors import InputError
from manualnn.network import Network, load_weights, save_weights
from manualnn.safe import read_tensors, scan


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.pkl"


@pytest.fixture
def good(path):
    """A weights file's content."""
    network = Network([["linear", 4], ["relu"], ["linear", 2]], (3,), 2)
    network.initialize([0])
    save_weights(path, network, {"normalization": {"kind": "unit", "mean": 0.0, "std": 255.0}})
    return torch.load(path)


def refused(path, message):
    """That neither reader reads the file, and says so in one short line."""
    for read in (lambda: read_tensors(path, "file"), lambda: load_weights(path)):
        with pytest.raises(InputError, match=message) as error:
            read()
        assert str(error.value).isprintable() and len(str(error.value)) < 600


def records(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path, contents, kind=zipfile.ZIP_STORED):
    """An archive of these records, with checksums that are right."""
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in contents:
            archive.writestr(name, content)


def repickle(path, pickled):
    """The archive with another pickle."""
    found = records(path)
    [name] = [name for name in found if name.endswith("/data.pkl")]
    rewrite(path, (found | {name: pickled}).items())


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("bare", [False, True])
def test_what_would_execute_code_is_named(path, capfd, protocol, bare):
    calls = [
        (Call(os.system, "echo executed"), r"would execute posix\.system"),
        (Call(eval, "print('executed')"), r"would execute (__builtin__|builtins)\.eval"),
        (Call(getattr(io, "open"), str(path) + "2", "w"), r"would execute _?io\.open"),  # noqa: B009
    ]
    for call, message in calls:
        content = {"w1": torch.ones(2, 2), "meta": call}
        if bare:
            path.write_bytes(pickle.dumps({"w1": 1, "meta": call}, protocol))
        else:
            torch.save(content, path, pickle_protocol=max(protocol, 2))
        refused(path, message)
    assert not path.with_name("w.pkl2").exists()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("protocol", range(6))
def test_what_would_execute_code_in_an_archive_of_any_protocol(path, good, protocol):
    repickle(path, pickle.dumps({"w1": Call(os.system, "true")}, protocol))
    refused(path, r"would execute posix\.system")


def test_damaged_archives(path, good):
    content, found = path.read_bytes(), records(path)
    names = list(found)
    cases = {
        "empty": (b"", "it is empty"),
        "text": (b"no weights", "no zip archive of torch.save"),
        "cut": (content[: len(content) // 2], "File is not a zip file"),
        "cut at the end": (content[:-1], "File is not a zip file"),
        "behind": (content + b"x", "not a zip file|behind its zip archive"),
        "before": (b"PK\3\4" + content, "before or behind its zip archive"),
        "polyglot": (content + content, "before or behind its zip archive"),
    }
    for name, (changed, message) in cases.items():
        path.write_bytes(changed)
        refused(path, f"not a .*{message}")
        assert name
    rewrite(path, found.items(), zipfile.ZIP_DEFLATED)
    refused(path, "its records are compressed")
    rewrite(path, [*found.items(), (names[0].replace("data", "DATA"), b"")])
    refused(path, "a zip archive, but not of torch.save")
    rewrite(path, [("w/readme", b"")])
    refused(path, r"it has no data\.pkl")
    rewrite(path, [("w/data.pkl", b"\x80\x02}K")])
    refused(path, "its pickle is damaged")
    path.unlink()
    path.mkdir()
    refused(path, r"cannot be read: it is no file|the folder holds no weights\.pkl")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_tensors(path / "absent", "file")


def test_a_zip_bomb_is_not_unpacked(path, good):
    """64 MiB packed into as many KiB; and records that overlap, so that none needs to be packed."""
    found = {f"w/{name.partition('/')[2]}": content for name, content in records(path).items()}
    rewrite(path, [("w/data.pkl", bytes(2**26))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**17
    refused(path, "its records are compressed")
    # Fifty entries of the central directory for the record that a good archive ends with.
    rewrite(path, [*found.items(), ("w/data/9", bytes(5000))])
    content = path.read_bytes()
    last, end = content.rindex(b"PK\1\2"), content.rindex(b"PK\5\6")
    entry = content[last:end]
    more = b"".join(entry.replace(b"w/data/9", b"w/data/%c" % i) for i in range(65, 90))
    count, size = struct.unpack("<HI", content[end + 10 : end + 16])
    counts = struct.pack("<HHI", count + 25, count + 25, size + len(more))
    path.write_bytes(content[:end] + more + content[end:][:8] + counts + content[end + 16 :])
    refused(path, r"its records claim more than the [\d,]+ bytes of the file")


def test_every_flipped_bit_is_noticed(path, good):
    """torch.load itself compares no checksum."""
    content = bytearray(path.read_bytes())
    at = content.index(good["w1"].numpy().tobytes()) + 9
    content[at] ^= 4
    path.write_bytes(content)
    assert not torch.load(path)["w1"].equal(good["w1"])
    refused(path, r"Bad CRC-32 for file .*/data/0")


def test_amounts_of_memory_that_a_file_does_not_hold(path):
    vast = 10**12
    cases = [
        ({"w1": Call(bytearray, vast)}, r"it holds __builtin__\.bytearray"),
        ({"w1": torch.ones(1).expand(10**6, 10**6)}, "repeats its 1 numbers; store a contiguous"),
        ({"w1": torch.empty(10**6, 10**6, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"w1": torch.zeros(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w1": torch.zeros(0, vast)}, "neither meta nor matrices"),
        ({f"w{i}": torch.zeros(0, 10**9) for i in range(9)}, "neither meta nor matrices"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            load_weights(path)


def tensor_pickle(count=6, offset=0, shape=(2, 3), stride=(3, 1), kind="FloatStorage", key="0"):
    """{"w1": a tensor} as a pickle says it."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return value.parts if isinstance(value, Persistent) else None

    class Persistent:
        def __init__(self, *parts):
            self.parts = parts

    class Rebuilt:
        def __reduce__(self):
            storage = Persistent("storage", getattr(torch, kind), key, "cpu", count)
            hooks = collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, hooks)

    out = io.BytesIO()
    Pickler(out, 2).dump({"w1": Rebuilt()})
    return out.getvalue()


def test_tensors_that_reach_beyond_their_records(path):
    torch.save({"w1": torch.arange(6.0).view(2, 3)}, path)
    repickle(path, tensor_pickle())
    assert read_tensors(path, "file")["w1"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert scan(path).problem == "" and scan(path).unsafe == []
    cases = [
        (dict(count=10**12), "record 0 has not the size of 1,000,000,000,000 float32"),
        (dict(kind="DoubleStorage"), "record 0 has not the size of 6 float64"),
        (dict(key="1"), "record 1 has not the size of"),
        (dict(offset=1), "reaches beyond its record"),
        (dict(stride=(4, 1)), "reaches beyond its record"),
        (dict(shape=(10**9, 10**9)), "reaches beyond its record"),
        (dict(shape=(10**9, 10**9), stride=(0, 0)), "repeats its 6 numbers"),
        (dict(shape=(-2, 3)), "a shape, stride or offset that is none"),
        (dict(stride=(-3, 1)), "a shape, stride or offset that is none"),
        (dict(shape=(6,)), "a shape of 1 and strides of 2"),
        (dict(shape=(0, 2**70)), "an absurd shape"),
        (dict(kind="QInt8Storage"), r"it holds torch\.QInt8Storage"),
    ]
    for changes, message in cases:
        repickle(path, tensor_pickle(**changes))
        refused(path, message)


def test_containers_without_end(path, good, monkeypatch):
    itself: list = []
    itself.append(itself)
    often: list = [0]
    for _ in range(60):
        often = [often, often]
    for content, message in (
        (itself, "holds itself"),
        (often, "too many entries"),
    ):
        repickle(path, pickle.dumps({"w1": content}, 2))
        refused(path, message)
    for depth in (150, 10**5):
        repickle(path, b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
        refused(path, "nested too deep")
    with monkeypatch.context() as patched:
        patched.setattr(safe, "WAITING", 1000)
        repickle(path, b"\x80\x02" + b"]" * 2000 + b".")
        refused(path, "too many values wait")
    repickle(path, b"\x80\x02" + b"(" * 100_000 + b".")
    refused(path, "its pickle is damaged")
    repickle(path, b"\x80\x02}(" + b"X\2\0\0\0w1K\1" * 2 + b"u.")
    refused(path, "it holds 'w1' twice")
    repickle(path, b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\1s.")  # hashed, it would overflow
    refused(path, "a key of a dict is neither text nor number")


def test_pickles_of_other_formats(path):
    torch.save({"w1": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    refused(path, r"in the format of torch before 1\.6; where it is trusted")
    path.write_bytes(pickle.dumps({"w1": [[1.0]]}))
    refused(path, "a bare pickle; where it is trusted, load it")


def test_a_state_dict_of_a_module_loads_and_says_what_lacks(path):
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), path)
    assert read_tensors(path, "file").keys() == {"weight", "bias"}
    torch.save(torch.nn.Sequential(module).state_dict(), path)
    with pytest.raises(InputError, match=r"a module's state_dict: call its tensors w1, b1"):
        load_weights(path)
    weight, bias = torch.nn.Parameter(torch.ones(3, 2)), torch.ones(2, requires_grad=True)
    torch.save({"w1": weight, "b1": bias}, path)
    theta = load_weights(path).network.theta
    assert not theta.requires_grad and float(theta.detach().sum()) == 8


def test_types_of_weights(path, good):
    for dtype in (torch.int64, torch.bool, torch.complex64):
        torch.save({**good, "w2": good["w2"].to(dtype)}, path)
        with pytest.raises(InputError, match=f"w2 is {dtype}, not floating-point"):
            load_weights(path)
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({k: v if k == "meta" else v.to(dtype) for k, v in good.items()}, path)
        network = load_weights(path).network
        assert network.theta.dtype == torch.float32
        assert network.params[0]["weight"][0].equal(good["w1"].to(dtype).float())
    torch.save({**good, "w1": torch.full((3, 4), torch.nan)}, path)
    assert load_weights(path).network.theta.isnan().sum() == 12
    torch.save({**good, "training": {}}, path)
    with pytest.raises(
        InputError, match=r"a checkpoint, not a weights file: give the weights\.pkl"
    ):
        load_weights(path)


METAS = [
    ({"classes": 10**12}, "do not fit"),
    ({"classes": True}, "are no sizes"),
    ({"classes": -1}, "are no sizes"),
    ({"classes": "2"}, "are no sizes"),
    ({"shape": [0]}, "are no sizes"),
    ({"shape": [3.0]}, "are no sizes"),
    ({"shape": 3}, "unusable"),
    ({"shape": [1, 1, 1, 3]}, "are no sizes"),
    ({"shape": [10**9, 10**9, 3]}, "parameters do not fit into any memory"),
    ({"layers": [["relu"]] * 10**5}, "no list of at most"),
    ({"layers": [["linear", 10**9], ["linear", 2]]}, r"w1 should have shape \(3, 1000000000\)"),
    ({"layers": [["linear", 10**200], ["linear", 2]]}, "parameters do not fit"),
    ({"layers": [["linear", 10**4000], ["linear", 2]]}, "opcode LONG4"),
    ({"layers": [[]]}, "unusable"),
    ({"layers": [[["linear"]]]}, "unknown layer"),
    ({"layers": "linear"}, "no list of at most"),
    ({"layers": [["conv2d", 1, 1, {"padding": 10**9}], ["linear", 2]], "shape": [1, 1, 3]},
     "parameters do not fit into any memory"),
    ({"loss": ["x"]}, "unusable meta: loss"),
    ({"loss": "x"}, "do not fit"),
    ({"dataset": 5}, "unusable meta: dataset"),
    ({"class_names": 3}, "unusable meta: class_names"),
    ({"class_names": [1, 2]}, "class_names that are not all texts"),
    ({"x": torch.float32}, "other things than plain"),
    ({"normalization": "unit"}, "unusable meta: normalization"),
    ({"normalization": {"mean": 0.0}}, "it has no kind"),
    ({"normalization": {"kind": "x", "std": [1.0]}}, "1 numbers in std, but 3 inputs"),
    ({"normalization": {"kind": "x", "mean": [[1.0]] * 3}}, "mean"),
    ({"normalization": {"kind": "x", "mean": 10**400}}, "unusable"),
    ({"normalization": {"kind": "x", "permute_seed": "a"}}, "permute_seed is 'a'"),
    ({"normalization": {"kind": "x", "other": 1}}, "normalization: other"),
    ({"split": [1]}, "unusable meta: split"),
    ({"split": {"seed": -1}}, "unusable split: seed is -1"),
    ({"split": {"valid": float("nan")}}, "unusable split: valid is nan"),
    ({"split": {"stratify": 1}}, "unusable split: stratify is 1"),
    ({"split": {"corruption": 0.5}}, "without classes or seed"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), METAS, ids=range(len(METAS)))
def test_a_meta_of_any_content(path, good, changes, message):
    content = {**good, "meta": good["meta"] | changes}
    torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        load_weights(path)
    assert len(str(error.value)) < 600


def test_cve_2025_32434_a_tar_archive_never_comes_to_torch(path, monkeypatch):
    """torch.load of torch <= 2.5.1 executed code of a tar archive, despite weights_only=True."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(Call(os.system, "true"))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    refused(path, "it is a tar archive")
    # The older format without an archive, whose storages are read by a pickle of their own.
    torch.save({"w1": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    refused(path, r"in the format of torch before 1\.6")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        # SETITEM and SETITEMS on what is no dict: torch < 2.10 wrote to the memory of a tensor.
        (lambda tensor: tensor + b"K\0K\1s.", "its pickle is damaged"),
        (lambda tensor: tensor + b"(K\0K\1u.", "its pickle is damaged"),
        (lambda tensor: b"\x80\x02](K\0K\1u.", "its pickle is damaged"),
        (lambda tensor: b"\x80\x02]K\0K\1s.", "its pickle is damaged"),
        # A storage that says it has other numbers than its record.
        (lambda tensor: tensor_pickle(count=7), "has not the size of 7 float32"),
        (lambda tensor: tensor_pickle(count=5), "has not the size of 5 float32"),
        (lambda tensor: tensor_pickle(kind="HalfStorage"), "has not the size of 6 float16"),
    ],
)
def test_cve_2026_24747_what_corrupts_memory_never_comes_to_torch(
    path, monkeypatch, pickled, message
):
    torch.save({"w1": torch.arange(6.0).view(2, 3)}, path)
    # {"w1": tensor}, cut before the dict is filled: the tensor is on top of the stack.
    whole = tensor_pickle()
    assert whole.endswith(b"s.")
    repickle(path, pickled(whole[:-2]))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    refused(path, message)
