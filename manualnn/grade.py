"""Submissions of a class: unpacked safely, audited, measured; one row each.

A submission is a zip or a folder with a module that defines `evaluate_hw1()`. It is called in a
process of its own on MNIST's test set, and on a variant of it: the same images in another order, of
which a share has a wrong label. What measures falls by just that share; what does not was not
measured.
"""

import ast
import gzip
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .audit import Report, audit_file
from .audit.record import Finding
from .audit.source import UNREADABLE, check_files, local_files
from .data import Examples, load
from .data.beside import PLACES, RAW
from .data.sources import IDX_NAME
from .errors import InputError
from .files import PACKAGE
from .workspace import generator

FUNCTION = "evaluate_hw1"
VARIANT_STREAM = 0x64AD
WRONG = 0.3  # the share of the variant's labels that is wrong
TOLERANCE = 0.05
FILES = 5_000
LARGEST = 2**29  # bytes of an unpacked submission
RATIO = 200  # of a file that is larger than 1 MiB
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError),
    *(NotImplementedError, RuntimeError, UnicodeError),
)
HEADER = ("submission", "rules", "accuracy", "accuracy_variant", "seconds", "error")


@dataclass
class Grade:
    """One submission. `rules`: "clean", with the number of notes in `findings` for a person to look
    at; what was found; or "not judged". `suspicious` says why the accuracies may not be measured,
    `error` what went wrong, whether or not there is an accuracy."""

    submission: str
    rules: str = "not judged"
    accuracy: float | None = None
    accuracy_variant: float | None = None
    seconds: float | None = None
    error: str = ""
    suspicious: str = ""
    findings: list[Finding] = field(default_factory=list)

    def row(self) -> list[Any]:
        rules = "; ".join(x for x in (self.suspicious, self.rules) if x)
        accuracies = (self.accuracy, self.accuracy_variant)
        seconds = None if self.seconds is None else round(self.seconds, 2)
        row = [self.submission, rules, *accuracies, seconds, self.error]
        # A spreadsheet would compute a text that begins so, and students write some of these.
        return [f"'{x}" if str(x)[:1] in ("=", "+", "-", "@") else x for x in row]

    def to_dict(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in HEADER}
        found = [asdict(finding) for finding in self.findings]
        return row | {"suspicious": self.suspicious or None, "findings": found}


def grade(
    submissions: Sequence[Path | str],
    seconds: float = 120,
    memory: int = 4096,
    allow: Collection[str] = (),
    seed: int = 0,
) -> Iterator[Grade]:
    """Grade each submission, in order; a failure is an entry of its own.

    `seconds` and `memory` (MB) limit each of the two measurements, `allow` permits names, `seed`
    is that of the variant. Raises InputError where a path is neither a zip nor a folder.
    """
    found = [path for given in submissions for path in _expand(Path(given))]
    with tempfile.TemporaryDirectory() as temporary:
        given, variant = Path(temporary) / "mnist", Path(temporary) / "variant"
        mnist = load("mnist", PACKAGE / "data" / "mnist")
        assert mnist.train is not None and mnist.test is not None
        write_mnist(given, mnist.train, mnist.test)
        write_mnist(variant, mnist.train, vary(mnist.test, seed))
        for path in found:
            result = Grade(path.name)
            try:
                _grade(result, path, (given, variant), seconds, memory, allow)
            except InputError as error:
                result.error = str(error)
            except Exception as error:  # whatever one submission does, the others are graded
                result.error = " ".join(f"{type(error).__name__}: {error}".split())
            yield result


def _expand(path: Path) -> list[Path]:
    """A submission, or those in a folder that holds only zips."""
    if path.is_dir():
        zips = sorted(path.glob("*.zip"))
        return zips if zips and not any(path.glob("*.py")) else [path]
    if path.is_file():
        return [path]
    raise InputError(f"{path}: neither a zip nor a folder")


def _grade(
    result: Grade,
    path: Path,
    data: tuple[Path, Path],
    seconds: float,
    memory: int,
    allow: Collection[str],
) -> None:
    reports = list[Report]()
    for raw in data:  # each in a fresh copy, so that nothing is left for the second
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary).resolve() / "submission"
            unpack(path, root)
            if not reports:
                result.findings += _read(root, allow)
            module = find_module(root)
            _place(raw, module.parent)
            reports.append(
                audit_file(module, FUNCTION, seconds, memory, allow, root, module.parent / RAW)
            )
            if _wrong(reports[-1].result):
                break  # nothing to compare
    first = reports[0]
    all_findings = [*result.findings, *(x for report in reports for x in report.findings)]
    result.findings = list(dict.fromkeys(all_findings))
    result.seconds, result.accuracy = first.seconds, _accuracy(first)
    result.error = first.error or _wrong(first.result)
    if len(reports) > 1:
        result.accuracy_variant = _accuracy(reports[1])
        if error := reports[1].error or _wrong(reports[1].result):
            result.error = result.error or f"on the variant: {error}"
    bad = [x for x in result.findings if x.kind == "finding"]
    unobserved = [x for x in result.findings if x.kind == "unobserved"]
    if bad:
        some = ", ".join(f"{x.check}: {x}" for x in bad[:3])
        result.rules = f"{len(bad)} finding{'s' * (len(bad) > 1)}: {some}{', ...' * (len(bad) > 3)}"
    elif unobserved:
        result.rules = f"not judged: {unobserved[0]}"
    elif not any(r.error for r in reports):
        notes = len(result.findings)
        result.rules = "clean" + f", {notes} to look at" * bool(notes)
    if result.accuracy is not None and result.accuracy_variant is not None:
        result.suspicious = suspicion(result.accuracy, result.accuracy_variant)


def line(result: Grade) -> str:
    """A submission for a reader."""
    shown = ["-" if x is None else f"{x:.4f}" for x in (result.accuracy, result.accuracy_variant)]
    rest = "; ".join(x for x in (result.suspicious, result.rules, result.error) if x)
    return f"{result.submission}: {shown[0]}, on the variant {shown[1]}; {rest}"


def suspicion(accuracy: float, variant: float) -> str:
    """Why two accuracies cannot both be measured on these data, or "".

    With a share WRONG of the labels wrong, an accuracy a falls to (1 - WRONG) a, or not so far
    where mistakes agree with wrong labels: at most to (1 - WRONG) a + WRONG (1 - a).
    """
    kept = (1 - WRONG) * accuracy
    if variant == accuracy or variant > kept + WRONG * (1 - accuracy) + TOLERANCE:
        return "suspicious: does not depend on the test labels: a constant, or other data"
    if variant < kept - TOLERANCE:
        return "suspicious: another accuracy on the same images in another order"
    return ""


def _accuracy(report: Report) -> float | None:
    return round(report.result, 6) if isinstance(report.result, float) else None


def _wrong(result: Any) -> str:
    """What is wrong with what the function returned."""
    if isinstance(result, float) and 0 <= result <= 1:
        return ""
    return f"{FUNCTION} returned {result}, which is no fraction in [0, 1]"


def _read(root: Path, allow: Collection[str]) -> list[Finding]:
    """What the source of the scripts says, whether they run or not; of a package only the modules
    that they import."""
    scripts = [x for x in sorted(root.rglob("*.py")) if not (x.parent / "__init__.py").exists()]
    files = dict.fromkeys(file for script in scripts for file in local_files(script, root))
    return list(check_files(files, root, allow))


def find_module(root: Path) -> Path:
    """The module that defines FUNCTION: nearest to the top, named as an evaluation. Raises
    InputError."""
    found = []
    for path in root.rglob("*.py"):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8-sig"))
        except UNREADABLE:
            continue
        if any(isinstance(x, ast.FunctionDef) and x.name == FUNCTION for x in tree.body):
            found.append((len(path.parts), "eval" not in path.stem.lower(), path))
    if not found:
        raise InputError(f"no module defines {FUNCTION}()")
    return min(found)[2]


def unpack(path: Path, folder: Path) -> None:
    """Unpack a zip, or copy a folder, into the new `folder`; links are left out of a folder.

    Raises InputError, before anything is written, where an archive has a name that leads out of the
    folder, a link, an encrypted file, more than FILES files or LARGEST bytes, or a file that is
    packed more than RATIO times; and where its sizes are not true.
    """
    if path.is_dir():
        left_out = shutil.ignore_patterns("__pycache__", ".git", ".venv")
        shutil.copytree(path, folder, ignore=left_out, symlinks=True)
        for link in [x for x in folder.rglob("*") if x.is_symlink()]:
            link.unlink()
        return
    folder.mkdir()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [x for x in archive.infolist() if not x.filename.startswith("__MACOSX/")]
            _check(entries, path.name)
            for entry in entries:
                target = folder.joinpath(*PurePosixPath(entry.filename).parts)
                if entry.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, target.open("xb") as file:
                    _copy(packed, file, entry.file_size)
    except DAMAGED as error:
        raise InputError(f"{path.name}: cannot be unpacked: {error}") from None


def _check(entries: list[zipfile.ZipInfo], name: str) -> None:
    for entry in entries:
        inside = PurePosixPath(entry.filename.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or ":" in entry.filename:
            raise InputError(f"{name}: {entry.filename!r} leads out of the folder")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise InputError(f"{name}: {entry.filename!r} is a link")
        if entry.flag_bits & 1:
            raise InputError(f"{name}: {entry.filename!r} is encrypted")
        if entry.file_size > max(2**20, RATIO * entry.compress_size):
            raise InputError(f"{name}: {entry.filename!r} is packed more than {RATIO} times")
    total = sum(entry.file_size for entry in entries)
    if len(entries) > FILES or total > LARGEST:
        raise InputError(
            f"{name}: {len(entries):,} files of {total / 2**20:,.0f} MiB; at most {FILES:,} files"
            f" and {LARGEST / 2**20:,.0f} MiB are unpacked"
        )


def _copy(packed: Any, file: Any, size: int) -> None:
    """Copy just `size` bytes; a file that holds more lied about it."""
    left = size
    while block := packed.read(min(left + 1, 2**20)):
        left -= len(block)
        if left < 0:
            raise InputError("an archive whose files are larger than it says")
        file.write(block)


NAMES = {"train": "train", "test": "t10k"}


def write_mnist(folder: Path, train: Examples, test: Examples) -> None:
    """The four idx files, plain and packed, as torchvision leaves them."""
    folder.mkdir(parents=True)
    for name, part in (("train", train), ("test", test)):
        assert isinstance(part.images, torch.Tensor)
        for kind, array in (("images-idx3", part.images[:, 0]), ("labels-idx1", part.labels)):
            header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
            values = array.to(torch.uint8).contiguous().numpy().tobytes()
            (folder / f"{NAMES[name]}-{kind}-ubyte").write_bytes(header + values)
            packed = gzip.compress(header + values, 1)
            (folder / f"{NAMES[name]}-{kind}-ubyte.gz").write_bytes(packed)


def vary(test: Examples, seed: int) -> Examples:
    """The examples in another order, of which WRONG have another label."""
    order = torch.randperm(
        len(test.labels), generator=generator(seed, VARIANT_STREAM), device="cpu"
    )
    labels = test.labels[order].clone()
    count = round(WRONG * len(labels))
    shift = torch.randint(
        1, 10, (count,), generator=generator(seed, VARIANT_STREAM, 1), device="cpu"
    )
    labels[:count] = (labels[:count] + shift) % 10
    again = torch.randperm(len(labels), generator=generator(seed, VARIANT_STREAM, 2), device="cpu")
    return Examples(test.images[order[again]], labels[again])


def _place(raw: Path, folder: Path) -> None:
    """Put MNIST where scripts look for it, in place of what was handed in: the files themselves
    beside the script, and in the folders of torchvision's layout."""
    for path in list(folder.iterdir()):
        if IDX_NAME.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for place in PLACES:
        if place.name:
            shutil.rmtree(folder / place, ignore_errors=True)
        with suppress(FileExistsError, NotADirectoryError):  # a file has this name
            shutil.copytree(raw, folder / place, dirs_exist_ok=not place.name)
