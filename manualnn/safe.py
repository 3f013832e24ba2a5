"""Files of torch.save, looked through before they are read: nothing in them is ever executed.

`torch.load(weights_only=True)` calls nothing but what rebuilds tensors. But it compares no
checksums, so that a flipped bit goes unnoticed, and what it calls may be asked for any amount of
memory. Here the zip archive is checked first, then its pickle is followed with stand-ins for
tensors.
"""

import io
import math
import os
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, printable
from .formats import START, recognise, recognise_archive

LARGEST_PICKLE = 2**30  # bytes of structure; the numbers of tensors lie outside of it
DEEPEST, LONGEST = 100, 10**8  # containers within each other; entries, each as often as it is held
WAITING = 10**6  # values that are not yet in a container; picklers put in a thousand at a time
CHUNK = 2**20
ARCHIVE, END = b"PK\x03\x04", b"PK\x05\x06"  # of a zip archive: first and 22 before its end
LEGACY = 0x1950A86A20F9469CFC6C  # what files of torch before 1.6 begin with

# Storages by their name in a pickle: bytes of a number, and its type.
STORAGES = {
    "torch.DoubleStorage": (8, "float64"),
    "torch.FloatStorage": (4, "float32"),
    "torch.HalfStorage": (2, "float16"),
    "torch.BFloat16Storage": (2, "bfloat16"),
    "torch.LongStorage": (8, "int64"),
    "torch.IntStorage": (4, "int32"),
    "torch.ShortStorage": (2, "int16"),
    "torch.CharStorage": (1, "int8"),
    "torch.ByteStorage": (1, "uint8"),
    "torch.BoolStorage": (1, "bool"),
    "torch.ComplexFloatStorage": (8, "complex64"),
    "torch.ComplexDoubleStorage": (16, "complex128"),
}
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
DICT, SHAPE, DEVICE = "collections.OrderedDict", "torch.Size", "torch.device"
READ = {TENSOR, PARAMETER, DICT, SHAPE, DEVICE, *STORAGES}
# These make data and nothing else, but none that is needed here.
DATA = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w+Storage|torch\.(Tensor|nn\.parameter"
    r"\.Parameter|serialization\._get_layout)|torch\.(b?float|complex|u?int|q)\w*\d\w*|torch\.bool"
    r"|collections\.Counter|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray|complex)"
    r"|numpy\.(ndarray|dtype|_?core\.multiarray\.(_reconstruct|scalar))"
)


@dataclass(frozen=True)
class Global:
    """Something that a pickle names, as `module.name`; it is never imported."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Where numbers of a tensor lie: the record `key` of the archive, `count` of them."""

    key: str
    count: int
    itemsize: int
    dtype: str


@dataclass(frozen=True)
class Stored:
    """A tensor as its pickle describes it."""

    storage: Storage
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Scan:
    """What was found in a file of `size` bytes: the names that its pickle asks for, in `problem`
    why it is not read, "" where it is, and the `format` where it is a known one of others."""

    size: int
    globals: tuple[str, ...]
    problem: str = ""
    format: str = ""

    @property
    def unsafe(self) -> list[str]:
        """The names that are not known to make mere data."""
        return [name for name in self.globals if name not in READ and not DATA.fullmatch(name)]


class RefusedError(Exception):
    """Content that is not read; the message says why."""


def read_tensors(path: Path | str, what: str, content: bytes | None = None) -> Any:
    """`torch.load` with weights_only of a file that `scan` finds nothing against.

    The file is read once, unless its `content` is given: what was looked through is what is
    loaded. Raises InputError where it is damaged, or holds what is not read.
    """
    content = read_file(path, what) if content is None else content
    found = scan(path, what, content)
    if found.unsafe:
        names = ", ".join(map(shown, found.unsafe[:3]))
        raise InputError(f"{path}: not a {what} that can be read safely: it would execute {names}")
    if found.problem:
        raise InputError(f"{path}: not a {what}: {found.problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle: what matters is raised
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever broken bytes lead it to
        raise InputError(f"{path}: not a {what}, or damaged ({type(error).__name__})") from None


def read_file(path: Path | str, what: str = "file of torch.save") -> bytes:
    """All bytes of a file that may be one of torch.save, read once.

    Raises InputError where it cannot be read, or is larger than anything that would be read here.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: cannot be read: it is no file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(START)
            if size > LARGEST_PICKLE and not start.startswith(ARCHIVE):
                kind = recognise(start, size)
                why = f"it is {kind}" if kind else f"its {size:,} bytes are too many"
                raise InputError(f"{path}: not a {what}: {why}")
            file.seek(0)
            return file.read()
    except MemoryError:
        raise InputError(f"{path}: its {size:,} bytes do not fit into memory") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def scan(path: Path | str, what: str = "file of torch.save", content: bytes | None = None) -> Scan:
    """Look through a file, or the `content` that was read from it, without executing it or making
    its tensors; checksums are compared.

    Raises InputError where it cannot be read, is damaged, or is neither a zip archive as torch.save
    writes it, nor a pickle, nor of another known format.
    """
    content = read_file(path, what) if content is None else content
    size = len(content)
    try:
        if not content.startswith(ARCHIVE):
            if kind := recognise(content[:START], size):
                return Scan(size, (), f"it is {kind}", kind)
            return _scan_bare(content)
        ends = size >= 22 and content[-22:].startswith(END)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if kind := recognise_archive(archive.namelist()):
                return Scan(size, (), f"it is {kind}", kind)
            return _scan_archive(archive, size, ends)
    except (RefusedError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a {what}, or truncated: {shown(str(error))}") from None
    except Exception as error:  # zipfile raises whatever broken bytes lead it to
        raise InputError(f"{path}: not a {what}, or damaged ({type(error).__name__})") from None


def shown(text: str) -> str:
    """Text from a file for a terminal: short, and without control characters."""
    plain = printable(text)
    return plain if len(plain) <= 120 else f"{plain[:117]}..."


def _scan_archive(archive: zipfile.ZipFile, size: int, ends: bool) -> Scan:
    records = _records(archive, size, ends)
    if "data.pkl" not in records:
        raise RefusedError("a zip archive, but not of torch.save: it has no data.pkl")
    if records["data.pkl"].file_size > LARGEST_PICKLE:
        raise RefusedError(f"its structure alone takes {records['data.pkl'].file_size:,} bytes")
    data = archive.read(records["data.pkl"])
    sizes = {key[5:]: info.file_size for key, info in records.items() if key.startswith("data/")}
    machine = _Machine(sizes)
    try:
        _check_size(machine.run(data))
        return Scan(size, tuple(machine.names))
    except RefusedError as error:
        problem = str(error)
    except Exception as error:  # whatever a pickle leads it to that was not made by a pickler
        problem = f"its pickle is damaged ({type(error).__name__})"
    names, _, whole = _globals(data)
    if not whole and not names:
        raise RefusedError(problem)
    return Scan(size, names, problem)


def _records(archive: zipfile.ZipFile, size: int, ends: bool) -> dict[str, zipfile.ZipInfo]:
    """The records by their name below the archive's one folder, their checksums compared.

    torch.save stores records without packing them, each name once, nothing before them or behind
    the archive's end (`ends`). What is written otherwise might be read otherwise by torch.
    """
    infos = archive.infolist()
    names = {info.filename.lower() for info in infos}  # torch does not tell cases apart
    folders = {info.filename.partition("/")[0] for info in infos}
    if len(folders) != 1 or len(names) != len(infos):
        raise RefusedError("a zip archive, but not of torch.save")
    if any(info.compress_type or info.file_size != info.compress_size for info in infos):
        raise RefusedError("its records are compressed, which torch.save never does")
    if sum(info.file_size for info in infos) > size:
        raise RefusedError(f"its records claim more than the {size:,} bytes of the file")
    if not ends or min(info.header_offset for info in infos):
        raise RefusedError("there are bytes before or behind its zip archive")
    for info in infos:
        with archive.open(info) as record:  # which compares the CRC-32 at the end
            while record.read(CHUNK):
                pass
    return {info.filename.partition("/")[2]: info for info in infos}


def _scan_bare(content: bytes) -> Scan:
    """A file that is no zip archive: the names that its pickles ask for, if it holds any."""
    if not content:
        raise RefusedError("it is empty")
    names, first, whole = _globals(content)
    if not whole and not names:
        raise RefusedError("no zip archive of torch.save")
    kind = "a bare pickle" if first != LEGACY else "in the format of torch before 1.6"
    return Scan(len(content), names, f"{kind}; where it is trusted, load it and torch.save it anew")


def _globals(data: bytes) -> tuple[tuple[str, ...], Any, bool]:
    """The names that pickles ask for, the first value in them, and whether the first is whole.

    Several may follow each other, as in files of torch before 1.6.
    """
    names: dict[str, None] = {}
    memo: dict[int, Any] = {}
    stream, first, whole = io.BytesIO(data), None, False
    texts: list[Any] = []  # what was pushed last, where that is text
    try:
        while not whole or data[stream.tell() : stream.tell() + 1] == b"\x80":
            for name, argument in _operations(stream):
                first = argument if first is None and name.startswith("LONG") else first
                if name in ("GLOBAL", "INST"):
                    names[argument.replace(" ", ".", 1)] = None
                elif name == "STACK_GLOBAL":
                    found = [text for text in texts[-2:] if isinstance(text, str)]
                    names[".".join(found) if len(found) == 2 else "a hidden name"] = None
                elif name in ("EXT1", "EXT2", "EXT4"):
                    names["a hidden name"] = None
                if name == "MEMOIZE":
                    memo[len(memo)] = texts[-1] if texts else None
                elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                    memo[argument] = texts[-1] if texts else None
                elif name in ("GET", "BINGET", "LONG_BINGET"):
                    texts = [*texts[-1:], memo.get(argument)]
                else:
                    texts = [*texts[-1:], argument]
            whole = True
    except Exception:  # genops raises whatever broken bytes lead it to
        pass
    return tuple(names), first, whole


def _operations(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """The opcodes of a pickle until it stops, by name, each with its argument."""
    for code, argument, _ in pickletools.genops(stream):
        yield code.name, argument


class _Machine:
    """Follows the pickle in an archive: containers and plain values are made, tensors described.

    It knows the opcodes that torch.load knows, and those globals alone that are in READ.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes  # bytes of each record of numbers
        self.names: dict[str, None] = {}  # the globals, in their order
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, data: bytes) -> Any:
        """The object that the pickle makes. Raises RefusedError, or what broken bytes lead to."""
        for name, argument in _operations(io.BytesIO(data)):
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _MADE:
                self.stack.append(_MADE[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(self._global(argument.replace(" ", ".", 1)))
            elif name == "MARK":
                self.marks.append(self.stack)
                self.stack = []
            elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                items = self._to_mark() if name == "TUPLE" else self._pop(int(name[5:]))
                self.stack.append(tuple(items))
            elif name in ("APPENDS", "APPEND"):
                items = self._to_mark() if name == "APPENDS" else self._pop(1)
                _of(self.stack[-1], list).extend(items)
            elif name in ("SETITEMS", "SETITEM"):
                items = self._to_mark() if name == "SETITEMS" else self._pop(2)
                self._set(_of(self.stack[-1], dict), items)
            elif name == "BINPERSID":
                self.stack.append(self._storage(*_of(self.stack.pop(), tuple)))
            elif name == "REDUCE":
                function, arguments = self._pop(2)
                self.stack.append(self._call(_of(function, Global).name, _of(arguments, tuple)))
            elif name == "BUILD":  # attributes of an OrderedDict, as state_dict has them
                target, state = self._pop(2)
                _of(target, dict), _of(state, dict)
                self.stack.append(target)
            elif name not in ("PROTO", "STOP"):
                raise RefusedError(f"its pickle has the opcode {name}")
            if len(self.stack) + len(self.marks) > WAITING:
                raise RefusedError("too many values wait to be put together")
        [result] = self.stack
        return result

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _set(self, target: dict[Any, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            parts = key if isinstance(key, tuple) else (key,)  # which is hashed: no nested one
            if not all(isinstance(part, str | int | float | None) for part in parts):
                raise RefusedError("a key of a dict is neither text nor number")
            if key in target:
                raise RefusedError(f"it holds {shown(repr(key))} twice")
            target[key] = value

    def _global(self, name: str) -> Global:
        if name not in READ and not (name[6:] in _DTYPES and name.startswith("torch.")):
            raise RefusedError(
                f"it holds {shown(name)}; store plain, dense tensors and plain values"
            )
        self.names[name] = None
        return Global(name)

    def _storage(self, kind: str, of: Global, key: str, where: str, count: int) -> Storage:
        """What a persistent id stands for: ("storage", type, record, device, count)."""
        if _of(of, Global).name not in STORAGES or kind != "storage":
            raise RefusedError("it holds a storage of unknown type")
        storage = Storage(_of(key, str), _of(count, int), *STORAGES[of.name])
        _of(where, str)
        if self.storages.setdefault(key, storage) != storage:
            raise RefusedError(f"record {shown(key)} is used as two types")
        if count * storage.itemsize != self.sizes.get(key):
            raise RefusedError(f"record {shown(key)} has not the size of {count:,} {storage.dtype}")
        return storage

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == DICT and not arguments:
            return {}
        if name == SHAPE and len(arguments) == 1:
            return tuple(_sizes(arguments[0]))
        if name == DEVICE and arguments and isinstance(arguments[0], str):
            return Global(DEVICE)
        if name == PARAMETER and len(arguments) == 3:
            return _of(arguments[0], Stored)
        if name == TENSOR and len(arguments) in (6, 7):
            return self._tensor(*arguments[:4])
        raise RefusedError(f"it calls {name} in an unknown way")

    def _tensor(self, storage: Storage, offset: int, shape: Any, stride: Any) -> Stored:
        _of(storage, Storage)
        shape, stride = _sizes(shape), _sizes(stride)
        if len(shape) != len(stride) or len(shape) > 64 or _sizes((offset,))[0] > storage.count:
            raise RefusedError(f"a tensor has a shape of {len(shape)} and strides of {len(stride)}")
        stored = Stored(storage, shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= storage.count:
            raise RefusedError(f"a tensor of shape {_brief(shape)} reaches beyond its record")
        if math.prod(shape) > storage.count:
            raise RefusedError(
                f"a tensor of shape {_brief(shape)} repeats its {storage.count:,} numbers; store a"
                " contiguous one"
            )
        if max(shape, default=0) > 2**62 or max(stride, default=0) > 2**62:
            raise RefusedError("a tensor of an absurd shape")
        return stored


_PUSHED = set("BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT".split())
_MADE: dict[str, Any] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_DTYPES = {dtype for _, dtype in STORAGES.values()}


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or any(_of(n, int) < 0 for n in values):
        raise RefusedError("a tensor has a shape, stride or offset that is none")
    return tuple(values)


def _brief(shape: tuple[int, ...]) -> str:
    return shown(" x ".join(map(str, shape)) or "()")


def _check_size(tree: Any) -> None:
    """Refuse containers that hold themselves, lie too deep, or hold each other so often that what
    goes through all of them would never end."""
    known: dict[int, tuple[int, int]] = {}  # depth and entries below each container
    path: set[int] = set()
    stack = [tree]
    while stack:
        node = stack[-1]
        if not isinstance(node, dict | list | tuple) or id(node) in known:
            stack.pop()
            continue
        children = [
            child
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list | tuple)
        ]
        missing = [child for child in children if id(child) not in known]
        if missing:
            path.add(id(node))
            if any(id(child) in path for child in missing):
                raise RefusedError("a list or dict in it holds itself")
            stack += missing
            continue
        path.discard(id(node))
        below = [known[id(child)] for child in children]
        depth = 1 + max((depth for depth, _ in below), default=0)
        entries = len(node) + sum(count for _, count in below)
        if depth > DEEPEST or entries > LONGEST:
            raise RefusedError(
                f"it is nested too deep, or has too many entries ({depth}, {entries:,})"
            )
        known[id(node)] = depth, entries
        stack.pop()
