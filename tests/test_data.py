"""Reading, finding, splitting and normalising data; every bad file is one line that names it."""

import gzip
import hashlib
import os
import struct
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn.data import (
    Augment,
    Normalization,
    load,
    load_source,
    prepare,
    read_examples,
    read_idx,
    read_table,
    sources,
    split,
    table,
)
from manualnn.data.prepare import permutation
from manualnn.data.sources import DATASETS, canonical
from manualnn.errors import InputError
from manualnn.files import cache_folder
from manualnn.workspace import Workspace

from .conftest import write_folder, write_idx


def idx_bytes(array, code=8):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


def test_bundled_mnist_is_the_real_one():
    data = load("mnist")
    assert data.train.images.shape == (60000, 1, 28, 28)
    assert data.test.images.shape == (10000, 1, 28, 28)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.train.labels.bincount().tolist() == counts
    fitted = Normalization.fit("standard", data.train.images)
    assert fitted.mean / 255 == pytest.approx(0.1307, abs=5e-5)
    assert fitted.std / 255 == pytest.approx(0.3081, abs=5e-5)
    assert data.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_idx_type(tmp_path, code, kind, packed):
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    content = idx_bytes(array, code)
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_idx(path).tolist() == array.tolist()


def test_bad_idx_files(tmp_path):
    good = idx_bytes(np.zeros((3, 2, 2), np.uint8))
    cases = {
        "short": (good[:-1], "truncated: 3x2x2 values need 28 bytes, there are 27"),
        "long": (good + b"\0", "too long"),
        "header": (good[:9], "truncated: its header"),
        "magic": (b"\1" + good[1:], "not an idx file: it starts with 01 00 08 03"),
        "type": (good[:2] + b"\7" + good[3:], "not an idx file"),
        "flat": (good[:3] + b"\0" + good[4:], "not an idx file"),
        "empty": (b"", "not an idx file: it starts with nothing"),
        "huge": (good[:4] + b"\xff" * 12 + good[16:], "its header asks for"),
        "gz-short": (gzip.compress(good)[:-9], "truncated or damaged gzip"),
        "gz-broken": (gzip.compress(good)[:12] + b"garbage" * 5, "truncated or damaged gzip"),
        "gz-long": (gzip.compress(good + b"x" * 10), "too long"),
        "gz-magic": (gzip.compress(b"hello"), "not an idx file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            read_idx(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(tmp_path / "absent")
    (tmp_path / "good").write_bytes(good)
    with pytest.raises(InputError, match=r"md5 is .* should be 00"):
        read_idx(tmp_path / "good", md5="00")


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    """A header of 3 bytes of data in front of 200 MB of zeros: only what it promises is read."""
    content = idx_bytes(np.zeros(3, np.uint8)) + bytes(200_000_000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(content, 1))
    del content
    with pytest.raises(InputError, match="too long"):
        read_idx(tmp_path / "bomb.gz")


def test_a_decoded_file_is_cached_and_a_broken_cache_is_rebuilt(tmp_path):
    array = np.arange(100, dtype=np.uint8).reshape(10, 10)
    write_idx(tmp_path / "a.gz", array)
    folder = cache_folder() / "decoded"
    before = set(folder.glob("*"))
    read_idx(tmp_path / "a.gz")
    [cached] = set(folder.glob("*")) - before
    intact = cached.read_bytes()
    for broken in (intact[:-1] + b"\0", intact[:50], b"", intact + b"\0"):
        cached.write_bytes(broken)
        assert read_idx(tmp_path / "a.gz").tolist() == array.tolist()
        assert cached.read_bytes() == intact


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MANUALNN_CACHE", str(tmp_path / "file" / "cache"))
    write_idx(tmp_path / "a.gz", np.zeros((4, 4)))
    assert read_idx(tmp_path / "a.gz").shape == (4, 4)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("layout", ["bare", "torchvision"])
def test_folders(tmp_path, gz, layout):
    inside = tmp_path / "MNIST" / "raw" if layout == "torchvision" else tmp_path
    write_folder(inside, classes=5, side=9, gz=gz)
    data = load("mnist", tmp_path)
    assert data.train.images.shape == (300, 1, 9, 9)
    assert data.class_names == tuple("01234")
    assert load("idx", inside).train.labels.equal(data.train.labels)


def test_only_the_files_that_are_needed(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    assert load("mnist", tmp_path, parts=("test",)).train is None
    with pytest.raises(InputError, match=r"lacks train-images-idx3-ubyte.gz"):
        load("mnist", tmp_path)
    write_folder(tmp_path)
    for kind in ("images-idx3", "labels-idx1"):
        (tmp_path / f"t10k-{kind}-ubyte").unlink()
    assert load("mnist", tmp_path, optional=("test",)).test is None
    with pytest.raises(InputError, match="lacks t10k-images"):
        load("mnist", tmp_path)
    monkeypatch.setenv("MANUALNN_DATA", str(tmp_path))
    data = load("mnist")  # falls through to the bundled files, and says so
    assert len(data.test.labels) == 10000
    assert "MANUALNN_DATA" in capsys.readouterr().err
    monkeypatch.setenv("MANUALNN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="--data-dir or set MANUALNN_DATA"):
        load("idx")


def test_half_of_an_optional_part_is_an_error(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="lacks t10k-labels"):
        load("mnist", folder, optional=("test",))


def test_data_that_does_not_fit_together(tmp_path):
    def folder(name):
        return write_folder(tmp_path / name)

    one = folder("counts")
    write_idx(one / "train-labels-idx1-ubyte", np.zeros(299))
    with pytest.raises(InputError, match=r"300 images in .* but 299 labels"):
        load("idx", one)
    two = folder("labels")
    write_idx(two / "t10k-labels-idx1-ubyte", np.full(60, 9))
    with pytest.raises(InputError, match="label 9 of example 0 is outside the 4 classes 0 to 3"):
        load("idx", two)
    with pytest.raises(InputError, match=r"label 3 of example .* outside the 3 classes"):
        load("idx", folder("names"), class_names=("a", "b", "c"))
    three = folder("shapes")
    write_idx(three / "t10k-images-idx3-ubyte", np.zeros((60, 5, 6)))
    with pytest.raises(InputError, match="differ in shape"):
        load("idx", three)
    four = folder("empty")
    write_idx(four / "train-images-idx3-ubyte", np.zeros((0, 6, 6)))
    write_idx(four / "train-labels-idx1-ubyte", np.zeros(0))
    with pytest.raises(InputError, match="holds no data"):
        load("idx", four)
    with pytest.raises(InputError, match="is not a folder"):
        load("idx", tmp_path / "absent")
    with pytest.raises(InputError, match="unknown data set 'mnits'; did you mean 'mnist'"):
        load("mnits")


class Server(ThreadingHTTPServer):
    """Answers every request with the same head and bytes."""

    def __init__(self, status, headers, content):
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


def allow_http(monkeypatch):
    opener = sources._opener()
    opener.add_handler(urllib.request.HTTPHandler())
    monkeypatch.setattr(sources, "_opener", lambda: opener)


def place(monkeypatch, name, url, content=None):
    """Have a data set lie at `url`, its files of the md5 of `content`."""
    known = replace(DATASETS[name], url=url)
    if content is not None:
        md5 = hashlib.md5(content).hexdigest()
        known = replace(known, md5=dict.fromkeys(known.md5, md5))
    monkeypatch.setitem(DATASETS, name, known)


def header(*shape, code=8):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)


def test_headers_that_ask_for_too_much(tmp_path):
    cases = {
        "huge": (header(2**32 - 1, 2**32 - 1), "its header asks for 4294967295x4294967295 values"),
        "none": (header(2**32 - 1, 2**32 - 1, 2**32 - 1, 0), "not an idx file"),
        "deep": (header(*[1] * 255) + b"\1", "asks for 1x1x1x1x1x1x1x1x... values; not an idx"),
        "short": (header(2**32 - 1), "values need 4294967303 bytes|half of the memory"),
        "gz-bomb": (gzip.compress(header(2**30) + bytes(100)), "can be unpacked to"),
        "labels": (header(3, code=0x0C) + struct.pack(">3I", 0, 1, 2**31 - 1), None),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        if message:
            with pytest.raises(InputError, match=message):
                read_idx(tmp_path / name)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.ones((3, 2, 2)))
    (tmp_path / "labels").rename(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(InputError, match=r"label 2147483647 is too large for 3 examples"):
        load("idx", tmp_path, parts=("train",))


def test_what_never_ends_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "train.csv")
    for path in (tmp_path / "train.csv", Path("/dev/zero")):
        for read in (read_idx, read_examples, read_table):
            with pytest.raises(InputError, match=r"a device or pipe, not a file"):
                read(path)


def test_a_packed_table_larger_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "most_bytes", lambda: 10_000)
    monkeypatch.setattr(table, "LONGEST", 500)
    for name, line, message in (
        ("rows", b"0,1,2,3\n", "take more than half of the memory"),
        ("line", b"0,1,2,3,", "line 1: is too long to be a line of numbers"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(line * 5000))
        with pytest.raises(InputError, match=message):
            read_table(tmp_path / name)
    (tmp_path / "small").write_bytes(gzip.compress(b"0,1,2,3\n" * 100))
    assert read_table(tmp_path / "small")[0].shape == (100, 4)


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    place(monkeypatch, "kmnist", "https://127.0.0.1:9/")
    with pytest.raises(InputError) as error:
        load("kmnist")
    folder = cache_folder() / "datasets" / "KMNIST" / "raw"
    expected = (
        "kmnist: train-images-idx3-ubyte.gz (md5 bdb82020997e1d708af4cf47b453dcf7) is missing and"
        f" cannot be downloaded (no network); put it into {folder} or give --data-dir"
    )
    assert str(error.value) == expected


CONTENT = gzip.compress(bytes(100))
DOWNLOADS = {
    "whole": (200, {}, CONTENT, None),
    "wrong": (200, {}, b"half of it", r"the md5 of 10 bytes is "),
    "cut": (200, {"Content-Length": str(len(CONTENT))}, CONTENT[:-4], r"the md5 of "),
    "long": (200, {}, CONTENT + bytes(1000), r"not done after "),
    "absent": (404, {}, b"", "HTTP Error 404"),
}


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_wrong_download_is_never_taken(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("MANUALNN_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "LARGEST_DOWNLOAD", 200)
    *answer, message = DOWNLOADS[kind]
    folder = tmp_path / "datasets" / "KMNIST" / "raw"
    with Server(*answer) as server:
        allow_http(monkeypatch)
        place(monkeypatch, "kmnist", server.url, CONTENT)
        with pytest.raises(InputError, match=message or "not an idx file"):
            load("kmnist", parts=("test",))
    names = {path.name for path in folder.iterdir()}
    whole = {"t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"}
    assert names == (set() if message else whole)


def test_downloads_are_by_https_alone(monkeypatch, tmp_path):
    """Also where a server sends on to another address."""
    monkeypatch.setenv("MANUALNN_CACHE", str(tmp_path))
    assert all(known.url.startswith("https://") for known in DATASETS.values())
    with Server(200, {}, CONTENT) as server:
        place(monkeypatch, "kmnist", server.url, CONTENT)
        with pytest.raises(InputError, match="unknown url type: http"):
            load("kmnist")
        with Server(302, {"Location": server.url}, b"") as first:
            # The first address stands for one by https: an opener of its own reads it.
            http, only = urllib.request.HTTPHandler(), sources._opener()
            request = urllib.request.Request(first.url)
            request.timeout = 5
            answer = http.http_open(request)
            with pytest.raises(urllib.error.URLError, match="unknown url type: http"):
                only.error("http", request, answer, answer.code, answer.msg, answer.headers)
    assert not list((tmp_path / "datasets" / "KMNIST" / "raw").iterdir())


def test_the_md5_of_a_file_in_the_cache_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("MANUALNN_CACHE", str(tmp_path))
    write_folder(tmp_path / "datasets" / "KMNIST" / "raw", gz=True)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz: md5 is .*, should be bdb"):
        load("kmnist")


def test_the_pinned_md5s_are_torchvisions():
    import torchvision.datasets

    for known in DATASETS.values():
        theirs = dict(vars(torchvision.datasets)[known.folder].resources)
        assert {canonical(*key): md5 for key, md5 in known.md5.items()} == theirs


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 100),
    stratify=st.booleans(),
)
def test_a_split_is_a_partition(labels, fraction, seed, stratify):
    labels = torch.tensor(labels)
    count = int(fraction * len(labels))
    train, valid = split(labels, count, seed, stratify)
    assert len(valid) == count
    assert torch.cat([train, valid]).sort().values.equal(torch.arange(len(labels)))
    again = split(labels, count, seed, stratify)
    assert train.equal(again[0]) and valid.equal(again[1])
    if stratify:
        share = labels[valid].bincount(minlength=5) - labels.bincount(minlength=5) * count / len(
            labels
        )
        assert share.abs().max() < 2


def test_splits_that_leave_nothing():
    labels = torch.zeros(10, dtype=torch.int64)
    assert len(split(labels, 0.25, 0)[1]) == 2
    for valid in (10, 11, 0.99, 0.01):
        with pytest.raises(InputError, match="leaves a part empty"):
            split(labels, valid, 0)


@pytest.mark.parametrize("kind", ["none", "unit", "standard", "feature"])
def test_normalization_is_fitted_on_the_training_part_only(kind):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 1, 3, 3), generator=draw, dtype=torch.uint8)
    images[:, :, 0, 0] = 7  # a constant feature
    labels = torch.arange(50) % 2
    data = prepare((images, labels), (images, labels), valid=10, normalize=kind)
    train_index, valid_index = split(labels, 10, 0)
    x = images.double()
    used = x[train_index]
    mean, std = {
        "none": (0, 1),
        "unit": (0, 255),
        "standard": (used.mean(), used.std(correction=0)),
        "feature": (used.mean(0), used.std(0, correction=0)),
    }[kind]
    if kind == "feature":
        std[:, 0, 0] = 1
    for part, expected in ((data.train, used), (data.valid, x[valid_index]), (data.test, x)):
        torch.testing.assert_close(part.x.double(), (expected - mean) / std, rtol=1e-5, atol=1e-5)
    again = Normalization(**data.normalization.to_meta())
    assert again.apply(images, torch.float32).equal(data.test.x)


def test_the_first_samples(tmp_path):
    images, labels = torch.arange(20.0).view(20, 1), torch.zeros(20, dtype=torch.int64)
    data = prepare((images, labels), None, train_samples=5, normalize="none")
    assert data.train.x.flatten().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="train_samples = 21, but there are 20"):
        prepare((images, labels), None, train_samples=21)


def test_augmentation_specs():
    assert Augment.parse(()) is None
    assert Augment.parse(("hflip", "shift:2", "cutout:8")) == Augment(True, 2, 8)
    for specs, message in (
        (("hflp",), "unknown 'hflp'; did you mean 'hflip'"),
        (("shift",), "'shift': write shift:N"),
        (("shift:x",), "'shift:x': write shift:N"),
        (("shift:0",), "'shift:0': write shift:N"),
        (("hflip:2",), "'hflip:2': write hflip"),
        (("hflip", "hflip"), "hflip stands there twice"),
    ):
        with pytest.raises(InputError, match=message):
            Augment.parse(specs)


def augmented(augment, x, seeds=(0,), step=0):
    workspace = Workspace(torch.float32)
    workspace.begin("test")
    return augment.apply(x, list(seeds), step, workspace).clone()


def test_flips_and_shifts_are_what_they_say():
    """Every result is one of the images that flipping and moving by hand gives, all of them occur,
    and each image is changed by its own draw."""
    image = torch.arange(1.0, 31).view(1, 1, 1, 5, 6)
    x = image.expand(1, 400, 1, 5, 6)
    padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1), mode="replicate")[0, 0]
    moved = [padded[i : i + 5, j : j + 6] for i in range(3) for j in range(3)]
    expected = {tuple(m.flatten().tolist()) for p in moved for m in (p, p.flip(1))}
    found = augmented(Augment(True, 1), x)
    assert {tuple(m.flatten().tolist()) for m in found[0, :, 0]} == expected
    flips = augmented(Augment(True), x)[0, :, 0]
    share = float((flips == image[0, 0, 0].flip(1)).all(2).all(1).double().mean())
    assert 0.4 < share < 0.6


def test_augmentation_is_a_function_of_seed_and_step():
    x = torch.randn(2, 8, 3, 5, 6)
    everything = Augment(True, 2, 3)
    whole = augmented(everything, x, (1, 2), step=4)
    assert whole.equal(augmented(everything, x, (1, 2), step=4))
    assert not whole.equal(augmented(everything, x, (1, 2), step=5))
    alone = augmented(Augment(True, 2), x[1:], (2,), step=4)
    assert augmented(Augment(True, 2), x, (1, 2), step=4)[1:].equal(alone)


def test_cutout_blanks_a_square():
    x = torch.randn(1, 50, 2, 7, 8)
    found = augmented(Augment(cutout=3), x)
    changed = found != x
    assert changed[:, :, 0].equal(changed[:, :, 1])
    sizes = changed[0, :, 0].flatten(1).sum(1)
    assert int(sizes.max()) == 9 and int(sizes.min()) >= 4
    assert (found[changed] == 0).all()


def test_one_permutation_for_all_examples():
    images = torch.randint(0, 256, (9, 1, 4, 5), dtype=torch.uint8)
    labels = torch.arange(9) % 3
    plain = prepare((images, labels), (images, labels), normalize="feature")
    moved = prepare((images, labels), (images, labels), normalize="feature", permute_seed=3)
    order = permutation(3, 20)
    assert order.sort().values.equal(torch.arange(20)) and not order.equal(torch.arange(20))
    assert moved.train.x.flatten(1).equal(plain.train.x.flatten(1)[:, order])
    assert moved.test.x.equal(moved.train.x)
    again = Normalization(**moved.normalization.to_meta())
    assert again.apply(images, torch.float32).equal(moved.train.x)


def test_the_test_images_as_source(folder):
    given = load("idx", folder)
    split = load_source("test", "idx", folder)
    assert split.train.images.equal(given.test.images) and split.test is None
    assert split.class_names == given.class_names
    assert load_source("train", "idx", folder).train.images.equal(given.train.images)
