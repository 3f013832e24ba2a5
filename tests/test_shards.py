"""Data larger than memory: the folder, what it refuses, the order, and training on it."""

import gzip
import json
import random
import resource
import subprocess
import sys
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch

from manualnn import experiment
from manualnn.circumstances import data_digest
from manualnn.config import parse_config
from manualnn.data import Rows, ShardWriter, Streamed, convert, load, open_shards, verify_shards
from manualnn.data.stream import Plan, quality
from manualnn.errors import InputError
from manualnn.training import Progress

from .conftest import write_folder, write_idx

SHAPE = (1, 4, 4)
CPU = torch.device("cpu")


def examples(count, seed=0, dtype=torch.uint8, classes=3):
    """Images whose labels can be learned."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=draw)
    images = torch.randint(0, 150, (count, *SHAPE), generator=draw)
    images[torch.arange(count), 0, 0, labels] += 100
    return (images / 8 if dtype.is_floating_point else images).to(dtype), labels


def write(folder, count=1000, test=100, dtype=torch.uint8, shard_bytes=16 * 300, data=None):
    parts = data or {"train": examples(count, 0, dtype), "test": examples(test, 1, dtype)}
    with ShardWriter(folder, "own", SHAPE, dtype, ("a", "b", "c"), shard_bytes) as writer:
        for part, (images, labels) in parts.items():
            for chosen in zip(images.split(170), labels.split(170), strict=True):
                writer.add(part, *chosen)
    return folder


def config(name, place, data=None, **train):
    layers = train.pop("layers", [["linear", 8], ["relu"], ["linear", "classes"]])
    settings = {"epochs": 2, "batch_size": 32, "optimizer": {"learning_rate": 0.1}} | train
    data = {"name": name, "dir": str(place), **(data or {})}
    return parse_config({"data": data, "model": {"layers": layers}, "train": settings})


def build(chosen):
    return experiment.build(chosen.populations()[0], CPU)[0]


@pytest.fixture
def both(tmp_path):
    """The same data set as idx files and as shards."""
    folder = write_folder(tmp_path / "idx", 900, 80)
    convert("idx", folder, tmp_path / "shards", shard_bytes=36 * 170)
    return {"idx": folder, "shards": tmp_path / "shards"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_is_written_is_read(tmp_path, dtype):
    images, labels = examples(1000, 0, dtype)
    folder = write(tmp_path / "own", 1000, 100, dtype)
    found = open_shards(folder)
    rows = found.images["train"]
    assert (found.name, found.class_names) == ("own", ("a", "b", "c"))
    assert rows.shape == images.shape and rows.dtype == dtype and rows.numel() == images.numel()
    assert len(rows.files) > 1 and found.labels["train"].equal(labels)
    assert rows[:].equal(images) and rows[37:700].equal(images[37:700])
    assert rows[900:3000].equal(images[900:]) and rows[5:2].shape == (0, *SHAPE)
    index = torch.randint(0, 1000, (400,), generator=torch.Generator().manual_seed(0))
    assert rows[index].equal(images[index]) and rows[1:900:7].equal(images[1:900:7])
    some = rows.select(index).select(torch.arange(3, 300))
    assert isinstance(some, Rows) and some[:].equal(images[index[3:300]])
    assert torch.cat(list(some.split(50))).equal(images[index[3:300]])
    assert torch.stack(list(rows.first(20))).equal(images[:20])
    files = [np.load(file.path) for file in rows.files]
    assert torch.from_numpy(np.concatenate(files)).equal(images)
    assert sum(size for _, size in verify_shards(folder)) > images.numel()


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    images, labels = examples(10)
    for arguments, message in (
        (("valid", images, labels), "a part is train or test"),
        (("train", images.float(), labels), "torch.float32 of shape"),
        (("train", images[:, :, 1:], labels), r"of shape \(1, 3, 4\)"),
        (("train", images, labels[1:]), "10 train examples have"),
        (("train", images, labels + 1), "label 3 of a train example is none of 3 classes"),
        (("train", images, labels - 1), "label -1"),
    ):
        writing = ShardWriter(tmp_path / "own", "own", SHAPE, torch.uint8, tuple("abc"))
        with pytest.raises(InputError, match=message), writing as writer:
            writer.add("train", images, labels)
            writer.add(*arguments)
        assert not (tmp_path / "own").exists()
    writing = ShardWriter(tmp_path / "own", "own", SHAPE)
    with pytest.raises(InputError, match="no examples to write"), writing:
        pass
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"holds thesis\.txt"):
        write(tmp_path / "own")
    writing = ShardWriter(tmp_path / "float", "own", (2,), torch.float32)
    with pytest.raises(InputError, match="a number that is not finite"), writing as writer:
        writer.add("train", torch.tensor([[1, torch.nan]]), torch.tensor([0]))


def test_an_interrupted_conversion_is_no_data_set(tmp_path):
    """Neither an exception nor a kill leaves a manifest; what a killed process left is removed."""
    folder = tmp_path / "own"
    with pytest.raises(KeyboardInterrupt), ShardWriter(folder, "own", SHAPE) as writer:
        writer.add("train", *examples(500))
        raise KeyboardInterrupt
    assert not folder.exists()
    killed = f"""
import os, torch
from manualnn.data import ShardWriter
writer = ShardWriter({str(folder)!r}, "own", {SHAPE}, shard_bytes=1600).__enter__()
writer.add("train", torch.zeros(500, *{SHAPE}, dtype=torch.uint8), torch.zeros(500).long())
print("ready", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", killed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match="another process is writing there"):
            write(folder)
        process.kill()
    assert len(list(folder.iterdir())) > 5
    with pytest.raises(InputError, match=r"own is a shard folder without its manifest"):
        open_shards(folder)
    write(folder)
    assert len(open_shards(folder).images["train"]) == 1000
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match="own: cannot be written: File too large"):
            write(tmp_path / "own", 5000, shard_bytes=2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "own").exists()


def equal_sets(one, other):
    for part in ("train", "test"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert (ours is None) == (theirs is None)
        if ours:
            assert ours.images[:].dtype == theirs.images.dtype
            assert ours.images[:].equal(theirs.images) and ours.labels.equal(theirs.labels)
    assert one.class_names == other.class_names


@pytest.mark.parametrize("gz", [False, True])
def test_converted_idx_files_are_what_load_reads(tmp_path, gz):
    folder = write_folder(tmp_path / "idx", gz=gz)
    counts = convert("idx", folder, tmp_path / "own", shard_bytes=36 * 70)
    assert counts == {"train": 300, "test": 60}
    equal_sets(load("shards", tmp_path / "own"), load("idx", folder))
    name = f"train-images-idx3-ubyte{'.gz' if gz else ''}"
    whole = (folder / name).read_bytes()
    for damaged, message in (
        (whole[:-9], "truncated"),
        (whole[:-9] + bytes(9) if gz else whole + b"0", "damaged|too long"),
        (gzip.compress(gzip.decompress(whole) + b"0") if gz else b"\0\0", "too long|not an idx"),
    ):
        (folder / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name}: .*({message})"):
            convert("idx", folder, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_the_bundled_data_set_is_converted_by_its_name(tmp_path):
    convert("mnist", None, tmp_path / "own")
    equal_sets(load("shards", tmp_path / "own"), load("mnist"))


def write_csv(path, images, labels, header="", fraction=0.0):
    rows = [
        ",".join([str(int(label)), *(f"{value + fraction:g}" for value in image.tolist())])
        for image, label in zip(images.flatten(1), labels, strict=True)
    ]
    text = "\n".join([*([header] if header else []), *rows]) + "\n"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("kind", ["images", "features", "floats", "one file"])
def test_converted_csv_files_are_what_load_reads(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(
        "manualnn.data.conversion.NUMBERS", 2000
    )  # so that there are several blocks
    draw = torch.Generator().manual_seed(0)
    side = 8 if kind in ("images", "one file") else 4
    images = torch.randint(0, 256, (210, 1, side, side), generator=draw)
    labels = torch.arange(210) % 5
    folder = tmp_path / "tables"
    write_csv(folder / "train.csv.gz", images[:150], labels[:150], "", 0.5 * (kind == "floats"))
    if kind != "one file":
        write_csv(folder / "test.csv", images[150:], labels[150:])
    place = {"train": str(folder / "train.csv.gz")} if kind == "one file" else folder
    convert("csv", place, tmp_path / "own")
    expected = load("csv", place, optional=("test",))
    equal = load("shards", tmp_path / "own", optional=("test",))
    if kind == "floats":  # one type for both parts
        images = expected.test.images.float()
        expected = experiment.replace(
            expected, test=experiment.replace(expected.test, images=images)
        )
    equal_sets(equal, expected)


def test_a_table_without_labels_is_noted_once(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("0,1.5,2\n1,3,4\n")  # no bytes: it is begun anew
    (tmp_path / "test.csv").write_text("5,6\n")
    assert convert("csv", tmp_path, tmp_path / "shards") == {"train": 2}
    assert capsys.readouterr().err.count("holds no labels: its examples are left out") == 1


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (120, "1,2,x,4", "line 121, column 3: 'x' is not a finite number"),
        (130, "1,2,3", "line 131: has 3 columns, the first line has 4"),
        (140, "1.5,2,3,4", "line 141, column 1: label 1.5 is no whole number from 0"),
        (141, "-1,2,3,4", "line 142, column 1: label -1 is no whole number from 0"),
        (60, "900,2,3,4", "line 61, column 1: label 900 is too large for 200 examples"),
        (60, "", ""),
    ],
)
def test_faults_of_a_table_are_told_with_their_line(tmp_path, monkeypatch, line, text, message):
    monkeypatch.setattr("manualnn.data.conversion.NUMBERS", 100)
    rows = [f"{i % 3},{i % 7},2,3" for i in range(200)]
    rows[line] = text
    (tmp_path / "own.csv").write_text("\n".join(rows) + "\n")
    place = {"train": str(tmp_path / "own.csv")}
    if not message:  # a blank line
        assert convert("csv", place, tmp_path / "shards") == {"train": 199}
        return
    with pytest.raises(InputError, match=message):
        load("csv", place, ("train",))
    with pytest.raises(InputError, match=message):
        convert("csv", place, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


VARIANTS = [
    ({}, {}),
    ({"valid": 0.2, "stratify": True, "normalize": "feature"}, {"label_smoothing": 0.1}),
    ({"valid": 101, "normalize": "standard", "permute_seed": 3}, {"class_weights": "balanced"}),
    ({"train_samples": 777, "normalize": "unit", "corruption": 0.3}, {"precision": "fp64"}),
    (
        {"normalize": "none", "augment": ["hflip", "shift:1"]},
        {"layers": [["linear", 8], ["relu"], ["dropout", 0.3], ["linear", "classes"]]},
    ),
    ({}, {"layers": [["conv2d", 3, 3], ["relu"], ["linear", "classes"]], "shuffle": False}),
    ({}, {"seeds": [1, 2, 3], "optimizer": {"learning_rate": 0.1, "momentum": 0.9}}),
]


@pytest.mark.parametrize(("data", "train"), VARIANTS)
def test_training_equals_training_in_memory(both, data, train):
    """Where the memory that is given holds all examples, to the bit, whatever is asked for."""
    memory, streamed = (build(config(name, both[name], data, **train)) for name in both)
    assert isinstance(streamed.data.train.x, Streamed)
    for training in (memory, streamed):
        for _ in training.run():
            pass
    assert streamed.network.theta.equal(memory.network.theta)
    for ours, theirs in zip(streamed.records, memory.records, strict=True):
        assert experiment.replace(ours, seconds=0) == experiment.replace(theirs, seconds=0)
    assert streamed.measure(streamed.data.train) == memory.measure(memory.data.train)
    assert streamed.data.normalization == memory.data.normalization


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """20,000 examples of 784 bytes, and the folder that holds them: 15.7 MB."""
    folder = tmp_path_factory.mktemp("large") / "shards"
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (20_000, 1, 28, 28), dtype=torch.uint8, generator=draw)
    labels = torch.arange(20_000) // 2000
    images[:, 0, 0, :10] = 255 * torch.nn.functional.one_hot(labels, 10).to(torch.uint8)
    with ShardWriter(folder, "large", (1, 28, 28), shard_bytes=784 * 3000) as writer:
        writer.add("train", images, labels)
    return folder, images, labels


@pytest.mark.parametrize("data", [{}, {"valid": 0.25}, {"train_samples": 7003}])
def test_a_ring_of_a_megabyte(large, data):
    """An epoch visits every sample once; the numbers are those of the same order in memory."""
    folder, images, labels = large
    settings = {"memory_mb": 1, "normalize": "feature", **data}
    training = build(config("shards", folder, settings, batch_size=61))
    x = training.data.train.x
    batches = list(training.batches(1))
    order = torch.cat(batches, 1).flatten()
    assert order.sort().values.equal(torch.arange(len(x)))
    assert order.equal(torch.cat(list(training.batches(1)), 1).flatten())
    assert not order.equal(torch.cat(list(training.batches(2)), 1).flatten())
    batches = list(training.batches(1))
    held = build(config("shards", folder, settings | {"memory_mb": 64}, batch_size=61))
    chosen = labels[: data.get("train_samples")]
    for index in batches:
        training.step(index)
        held.step(index)  # in another order than it drew
    assert training.network.theta.equal(held.network.theta)
    assert x.ring._memory.nbytes <= 2**20 < x.rows.numel()
    assert held.data.train.x.whole and not x.whole
    kept = torch.arange(len(chosen)) if x.rows.rows is None else x.rows.rows
    expected = x.normalization.apply(images[kept[-300:]], torch.float32)
    assert x[-300:].equal(expected)
    assert training.data.train.y.equal(labels[kept])
    if data.get("valid"):  # what is held out is too much, too
        assert isinstance(training.data.valid.x, Streamed)
        assert training.measure(training.data.valid) == held.measure(held.data.valid)


def test_any_step_may_be_asked_for(large):
    """Steps back, batches larger than a window, and batches of another epoch are read directly."""
    folder, images, _ = large
    training = build(config("shards", folder, {"memory_mb": 1}, batch_size=64))
    x = training.data.train.x
    batches = [index[0] for index in training.batches(1)]
    asked = [*batches[:15], batches[200], batches[3], torch.arange(5000), *batches[201:230]]
    asked += [torch.tensor([0, 19_999] * 8), *batches[14:17], batches[-1]]
    for index in asked:
        out = torch.empty(len(index), 1, 28, 28)
        x.gather(index, out)
        assert out.equal(x.normalization.apply(images[index], torch.float32))


def test_several_threads_gather_at_once(large):
    folder, images, _ = large
    training = build(config("shards", folder, {"memory_mb": 1}))
    x = training.data.train.x
    batches, wrong = [index[0] for index in training.batches(1)], []

    def work(step):
        for index in batches[::step]:
            out = torch.empty(len(index), 1, 28, 28)
            x.gather(index, out)
            if not out.equal(x.normalization.apply(images[index], torch.float32)):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(step,)) for step in (1, 2, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_it_goes_on_within_an_epoch(large, tmp_path):
    settings = {"batch_size": 20, "checkpoint_every_steps": 100}
    chosen = config("shards", large[0], {"memory_mb": 1, "valid": 1000}, **settings)
    whole, half = (experiment.Run(chosen, tmp_path / name) for name in ("whole", "half"))
    for _ in whole.train():
        pass
    for event in half.train():
        if isinstance(event, Progress) and event.samples == 4000:
            half.stop()
    assert half.stopped and 200 <= half.training.epoch_step <= 300
    again = experiment.Run(chosen, tmp_path / "half", resume=True)
    for _ in again.train():
        pass
    assert again.training.network.theta.equal(whole.training.network.theta)
    for ours, theirs in zip(again.records, whole.records, strict=True):
        assert experiment.replace(ours, seconds=0) == experiment.replace(theirs, seconds=0)
    assert again.metrics["data_sha256"] == whole.metrics["data_sha256"]


def test_populations_need_one_order(large):
    folder = large[0]
    data = {"memory_mb": 1, "train_samples": 5000}
    with pytest.raises(InputError, match=r"set train\.shared_batches"):
        build(config("shards", folder, data, seeds=[1, 2]))
    settings = {"seeds": [1, 2, 3], "shared_batches": True, "batch_size": 100}
    ours = build(config("shards", folder, data, **settings))
    theirs = build(config("shards", folder, data | {"memory_mb": 64}, **settings))
    rates = {"optimizer": {"learning_rate": [0.1, 0.2]}}
    for _ in build(config("shards", folder, data, **rates, epochs=1)).run():
        pass  # one seed, one order
    for index in ours.batches(1):
        ours.step(index)
        theirs.step(index)
    assert ours.network.theta.equal(theirs.network.theta)


def test_low_precision(both):
    big = {"layers": [["linear", 300], ["relu"], ["linear", "classes"]], "batch_size": 256}
    ours, theirs = (build(config(n, both[n], precision="bf16", **big)) for n in both)
    for training in (ours, theirs):
        for _ in training.run():
            pass
    assert ours.network.theta.equal(theirs.network.theta)


def damage(folder, what):
    """Damage a folder; what the message must have."""
    file = folder / "train-00001-images.npy"
    content = file.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["parts"]["train"]["shards"][1]
    if what == "missing":
        file.unlink()
        return "train-00001-images.npy: cannot be read: No such file"
    if what in ("truncated", "too long", "foreign", "short header"):
        file.write_bytes({
            "truncated": content[:-1], "too long": content + b"0",
            "foreign": b"GIF89a" + content, "short header": content[:40],
        }[what])  # fmt: skip
        return "train-00001-images.npy: " + (what if "t" in what[:3] else "not an .npy file")
    if what == "other shape":
        np.save(file, np.zeros((3, 3), np.uint8))
        return r"images.npy: its shape is \(3, 3\), manifest"
    if what == "other type":
        np.save(file, np.zeros((300, *SHAPE), np.float32))
        return "images.npy: holds torch.float32, not images"
    if what == "objects":
        np.save(file, np.array([{"a": 1}]), allow_pickle=True)
        return "images.npy: holds .O values"
    if what == "folder":
        file.unlink()
        file.mkdir()
        return "images.npy: cannot be read: Is a directory"
    if what == "labels":
        np.save(folder / shard["labels"], np.full(300, 3))
        return "label 3 of train example 300 is outside the 3 classes"
    if what == "outside":
        shard["images"] = "../train-00001-images.npy"
    elif what == "absolute":
        shard["images"] = str(file)
    elif what == "twice":
        shard["images"] = "train-00000-images.npy"
    elif what == "count":
        shard["count"] += 1
    elif what == "huge":
        shard["count"] += 2**47
        manifest["parts"]["train"]["count"] += 2**47
        del manifest["parts"]["train"]["histogram"]
    elif what == "histogram":
        manifest["parts"]["train"]["histogram"][0] += 1
    elif what == "version":
        manifest["version"] = 2
    elif what == "shape":
        manifest["shape"] = [2**30, 2**30, 2**30]
    (folder / "manifest.json").write_text(
        json.dumps(manifest)[:-5] if what == "json" else json.dumps(manifest)
    )
    return {"huge": "its shape is", "json": "is no JSON"}.get(what, "manifest.json: ")


@pytest.mark.parametrize("what", [
    "missing", "truncated", "too long", "foreign", "short header", "other shape", "other type",
    "objects", "folder", "labels", "outside", "absolute", "twice", "count", "huge", "histogram",
    "version", "shape", "json",
])  # fmt: skip
def test_a_damaged_folder_is_one_line(tmp_path, what):
    folder = write(tmp_path / "own")
    message = damage(folder, what)
    with pytest.raises(InputError, match=message) as found:
        load("shards", folder)
    assert "\n" not in str(found.value)


def test_verify_finds_what_sizes_do_not_show(tmp_path, run):
    folder = write(tmp_path / "own")
    assert run("data", "verify", folder)[:2] == (0, f"{folder}: 10 files, 26,400 bytes, as they"
                                                    " were written\n")  # fmt: skip
    file = folder / "train-00002-labels.npy"
    content = bytearray(file.read_bytes())
    content[-8] = (content[-8] + 1) % 3
    file.write_bytes(content)
    code, _, err = run("data", "verify", folder)
    assert code == 2 and "train-00002-labels.npy: damaged: its checksum is" in err


def test_no_manifest_does_more_than_be_refused(tmp_path):
    """Values of any type in any place: an InputError, or the data set as it was."""
    folder = write(tmp_path / "own", 400)
    text = (folder / "manifest.json").read_text()
    draw = random.Random(0)
    values = [None, True, -1, 0, 1, 2.5, 2**70, "", "x" * 300, "a/b", "..", [], {}, [1], "nan"]
    places = []

    def walk(value, path):
        places.append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items if isinstance(value, dict | list) else ():
            walk(item, (*path, key)) if isinstance(item, dict | list) else places.append(
                (*path, key)
            )

    walk(json.loads(text), ())
    refused = 0
    for _ in range(400):
        manifest = json.loads(text)
        path = draw.choice(places[1:])
        inner = manifest
        for key in path[:-1]:
            inner = inner[key]
        if draw.random() < 0.2:
            del inner[path[-1]]
        else:
            inner[path[-1]] = draw.choice(values)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        try:
            load("shards", folder, optional=("test",))
        except InputError:
            refused += 1
    assert refused > 300
    (folder / "manifest.json").write_text(text)
    file = folder / "train-00000-images.npy"
    content = file.read_bytes()
    for _ in range(200):  # and no header of a file
        damaged = bytearray(content)
        damaged[draw.randrange(128)] = draw.randrange(256)
        file.write_bytes(damaged)
        with suppress(InputError):
            load("shards", folder, optional=("test",))
    for content in (b"", b"[" * 100_000, b"\xff\xfe", b"1e999", b'{"format": "manualnn-shards"}'):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(InputError, match=r"manifest\.json: "):
            load("shards", folder)


@pytest.mark.parametrize("what", ["deleted", "truncated"])
def test_a_file_that_goes_while_it_is_trained_on(tmp_path, what):
    """The reader's error comes to the thread that trains, and nothing hangs."""
    folder = tmp_path / "own"
    data = torch.randint(0, 256, (9000, 1, 28, 28), dtype=torch.uint8), torch.arange(9000) % 3
    with ShardWriter(folder, "own", (1, 28, 28), shard_bytes=784 * 1000) as writer:
        writer.add("train", *data)
    training = build(config("shards", folder, {"memory_mb": 1}, batch_size=10))
    batches = list(training.batches(1))
    training.step(batches[0])
    for path in folder.glob("train-*-images.npy"):
        if what == "deleted":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:1000])
    why = "cannot be read: No such file" if what == "deleted" else "truncated"
    with pytest.raises(InputError, match=f"train-0000.-images.npy: {why}"):
        for index in batches[1:]:
            training.step(index)


def test_what_fits_is_read_once(tmp_path):
    folder = write(tmp_path / "own")
    training = build(config("shards", folder, epochs=3))
    training.step(next(training.batches(1)))
    for path in folder.glob("train-*-images.npy"):
        path.unlink()
    for epoch in (1, 2):
        for index in training.batches(epoch):
            training.step(index)
    assert training.step_number > 60


@pytest.mark.parametrize(("count", "memory"), [(60_000, 2**22), (200_000, 2**25)])
def test_how_well_it_shuffles(count, memory):
    """Against what theory says of m blocks of M in a window, for a file sorted by its labels."""
    labels = torch.arange(count) * 10 // count
    plan, full = Plan(count, 784, memory), Plan(count, 784, 2**40)
    assert full.whole and not plan.whole and (plan.window << plan.shift) * 2 * 784 <= memory
    windows = [len(blocks) for blocks in plan.windows(None)]
    assert max(windows) - min(windows) <= 1 and max(windows) <= plan.window
    correlation, chi = zip(
        *(quality(plan.order(torch.Generator().manual_seed(i))[0], labels) for i in range(6)),
        strict=True,
    )
    # Blocks in random order have correlations of variance 1/(M - 1).
    assert all(abs(value) < 4 * (plan.blocks - 1) ** -0.5 for value in correlation)
    expected = 1 + 63 * (1 / max(windows) - 1 / plan.blocks)
    assert sum(chi) / 6 == pytest.approx(expected, rel=0.1)
    correlation, chi = quality(full.order(torch.Generator().manual_seed(0))[0], labels)
    assert abs(correlation) < 4 * count**-0.5 and chi == pytest.approx(1, abs=0.05)
    correlation, chi = quality(plan.order(None)[0], labels)
    assert correlation == pytest.approx(1) and chi == pytest.approx(64, rel=0.05)


def test_memory_for_less_than_two_examples(large):
    with pytest.raises(InputError, match="memory_mb = 1 holds no two examples of 600000 bytes"):
        Plan(10, 600_000, 2**20)
    assert Plan(1, 600_000, 2**20).whole


def test_digest(tmp_path):
    digests = []
    for name, changed in (("a", 0), ("b", 0), ("c", 1)):
        images, labels = examples(500)
        images[123, 0, 2, 2] ^= changed
        folder = write(tmp_path / name, data={"train": (images, labels)})
        digests.append(data_digest(load("shards", folder, ("train",))))
    assert digests[0] == digests[1] != digests[2]


def test_commands(tmp_path, run, folder):
    """Convert, train in a small ring, evaluate each part, show, and train again to the bit."""
    code, out, _ = run("data", "convert", folder, "--out", "own")
    assert code == 0 and out == "own: 300 train examples\nown: 60 test examples\n"
    assert run("data", "convert", folder, "--out", "own")[0] == 2
    code, _, err = run("data", "convert", folder, "--out", "own/manifest.json")
    assert code == 2 and "--out own/manifest.json: is a file; give a folder" in err
    code, _, err = run("data", "convert", "own", "--out", "other")
    assert code == 2 and "own is a shard folder already: train with --data" in err
    sets = ["train.epochs=3", "data.memory_mb=1", "data.valid=0.2", "train.batch_size=20"]
    layers = 'model.layers=[["linear", 16], ["relu"], ["linear", "classes"]]'
    arguments = [part for text in (*sets, layers) for part in ("--set", text)]
    code, _, err = run("train", "mnist-mlp", "--data", "own", "--out", "trained", *arguments)
    assert code == 0, err
    found = json.loads((tmp_path / "trained" / "metrics.json").read_text())
    for part in ("train", "valid", "test"):
        code, out, _ = run("evaluate", "trained", "--split", part, "--json")
        assert code == 0 and json.loads(out)["accuracy"] == pytest.approx(found[f"{part}_accuracy"])
    assert run("show", "own")[0] == 0 and (tmp_path / "own.png").exists()
    assert run("reproduce", "trained")[0] == 0
    code, _, err = run("data", "export-csv", "shards", "--data-dir", "own")
    assert code == 2 and "own: a shard folder may be larger than memory" in err
    assert run("data", "export-csv", "own")[2] == err
    code, out, err = run("data", "generate", "--from", folder, "--out", "made", "--samples", 20)
    assert code == 0 and out == "made: 20 training and 60 test examples\n", err
    write_idx(folder / "train-images-idx3-ubyte", np.zeros((299, 6, 6)))
    code, _, err = run("data", "convert", folder, "--out", "other")
    assert code == 2 and "299 images in" in err and not (tmp_path / "other").exists()


def test_what_is_no_shard_folder_is_said(tmp_path, run, folder):
    wanted = "give one made by `data convert` or `data generate`"
    for place, what in ((folder, "has no manifest.json"), (tmp_path / "x", "is not a folder")):
        code, _, err = run("data", "verify", place)
        assert (code, err.count("\n")) == (2, 1) and f"{place} {what}; {wanted}" in err
    unfinished = write(tmp_path / "unfinished")
    (unfinished / "manifest.json").unlink()
    for arguments in (("data", "verify"), ("train", "--data")):
        code, _, err = run(*arguments, unfinished)
        assert (code, err.count("\n")) == (2, 1)
        assert "a shard folder without its manifest.json, interrupted or incomplete" in err
