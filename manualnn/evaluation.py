"""Trained weights on data: accuracy, loss, each class, the worst mistakes; and predictions.

Shapes: N samples, K classes.
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import distributed, plots
from .config import Population, check_table_flags, data_source, load_config
from .data import (
    Asked,
    Dataset,
    Normalization,
    Place,
    Rows,
    Samples,
    Streamed,
    asked_of,
    corrupt,
    csv_files,
    example_shape,
    load,
    load_source,
    relabel,
    split,
)
from .data.csv_set import read_features, read_labels
from .data.labels import label_names
from .data.prepare import head, select
from .data.sources import check_labels
from .data.table import idx_examples
from .errors import InputError
from .find import SHIPPED, find_described, find_weights
from .losses import probabilities
from .network import Network, Weights, load_weights
from .places import check_there, run_config
from .scale import normalization_for
from .training import evaluate


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where it works, else the CPU. Raises InputError.

    Of the processes that torchrun starts on a machine each has the GPU of its local rank.
    """
    # With several streams, as graphs have, cuBLAS gives the same bits only with buffers of its own.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and _runs_kernels() else "cpu"
    if name == "cuda" and distributed.launched():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.backends.cuda.is_built():
            raise InputError(
                f"--device {name}: this torch ({torch.__version__}) is built without CUDA"
            )
        if not torch.cuda.is_available():
            raise InputError(
                f"--device {name}: torch finds no NVIDIA driver or no GPU; use --device cpu"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def _runs_kernels() -> bool:
    """Whether the GPU computes: one that this torch has no kernels for is there, too."""
    try:
        return float(torch.ones(2, device="cuda").sum()) == 2
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        said = f"there is a GPU, but it does not work ({reason}); using the CPU"
        print(f"note: {said}", file=sys.stderr)
        return False


@dataclass(frozen=True)
class Evaluation:
    """How a network does on N samples: predictions (N,), their probabilities (N,), counts (K, K) of
    true class (row) against predicted class."""

    accuracy: float
    loss: float
    targets: Tensor
    predictions: Tensor
    confidences: Tensor
    confusion: Tensor

    def per_class(self, class_names: list[str]) -> list[dict[str, Any]]:
        """For each class its number of samples, recall (its accuracy) and precision."""
        counts = self.confusion.tolist()
        hits = [counts[k][k] for k in range(len(counts))]
        predicted = self.confusion.sum(0).tolist()
        return [
            {
                "class": name,
                "n": sum(row),
                "accuracy": hit / sum(row) if sum(row) else None,
                "precision": hit / guessed if guessed else None,
            }
            for name, row, hit, guessed in zip(class_names, counts, hits, predicted, strict=True)
        ]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation with what it was made of, for tables and pictures."""

    evaluation: Evaluation
    images: Tensor | Rows
    class_names: list[str]
    path: Path
    data: str
    where: str
    read: str = ""  # one line that says what was read


def evaluate_weights(
    weights: Path | str | None = None,
    data: str | None = None,
    data_dir: Path | str | None = None,
    split: str = "test",
    device: str = "cpu",
    label: str | None = None,
    header: str | None = None,
    normalize: str | None = None,
    activation: str | None = None,
) -> Evaluated:
    """Evaluate a weights file (as `find_weights` takes it) on a part of a data set.

    By default the network that ships with the package, the data set it was trained on, and its test
    part; "train" and "valid" are the parts its training used. `data` is a data set's name, a CSV
    file with labels, or a folder of CSV or idx files; `label` and `header` as in `data.Asked`.

    `normalize` ("none", "unit", "standard" as fitted on the data set's training part, or
    "MEAN,STD") and `activation` ("relu", "sigmoid", "tanh") say how foreign weights take raw
    values. Raises InputError, also where a weight is not finite.
    """
    if split not in ("test", "train", "valid"):
        raise InputError(f"--split {split}: use test, valid or train")
    path = find_weights(weights or f"{SHIPPED}mnist-mlp")
    loaded, network = _load(path, choose_device(device), activation)
    meta = loaded.meta
    part = "test" if split == "test" else "train"
    cut = meta.get("split") or {}
    swapped = cut.get("source") == "test" and data is None
    name, place = _data_place(data, data_dir, part, label, header, meta.get("label_column"))
    if name is None:
        name = meta.get("dataset") or "mnist"
        needed = "test" if swapped else part
        own = _own_place(path, meta, needed) if data_dir is None else None
        if isinstance(place, dict) and own is not None and not {"train", "test", "dir"} & {*place}:
            place = {**(own if isinstance(own, dict) else {"dir": str(own)}), **place}
        place = place or own
        check_table_flags(name, name, label, header)
    if swapped and split == "test":
        raise InputError(
            f"{path} was trained on a split of {name}'s test images, so there is no test set left;"
            " use --split valid or train"
        )
    dataset = load_source("test", name, place) if swapped else load(name, place, parts=(part,))
    asked = {key: cut[key] for key in ("labels", "test_labels", "seed", "classes") if key in cut}
    dataset = relabel(dataset, **asked)
    images, labels = _part(dataset, split, cut)
    check_labels(labels, network.classes, f"{dataset.where} against {path}")
    _check_shape(images, network, path, dataset.where)

    def training_images() -> Tensor | Rows:
        return _training_images(name, place, cut if data is None else {})

    normalization = normalization_for(
        loaded, images, str(path), dataset.where, normalize, training_images
    )
    x = _normalised(images, network, normalization)
    samples = Samples(x, labels.to(network.theta.device))
    evaluation = _judge(network, samples, meta.get("loss", "cross_entropy"))
    names = meta.get("class_names") if name == meta.get("dataset") else dataset.class_names
    if not names or len(names) != network.classes:
        names = [str(k) for k in range(network.classes)]
    kinds = {key: cut[key] for key in ("labels", "test_labels", "corruption") if cut.get(key)}
    names = label_names(names, **kinds)
    called = f"{name} {split}{' (of the test images)' if swapped else ''}"
    if isinstance(place, dict) and part in place and data is not None:
        called = Path(place[part]).name.partition(".")[0]  # a file is no part of a data set
    return Evaluated(evaluation, images, names, path, called, dataset.where, dataset.read)


def predict_file(
    weights: Path | str,
    examples: Path | str | None,
    device: str = "cpu",
    data: str | None = None,
    data_dir: Path | str | None = None,
    label: str | None = None,
    header: str | None = None,
    normalize: str | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Predicted classes (N,) and probabilities (N, K) of the examples in an idx or CSV file, or
    with `data` in the test part of a data set.

    All else is as for `evaluate_weights`. A CSV row has the network's inputs, or a
    label before them, which is ignored. Raises InputError.
    """
    path = find_weights(weights)
    loaded, network = _load(path, choose_device(device), activation)
    place = _data_place(data, data_dir, "test", label, header, loaded.meta.get("label_column"))
    inputs = math.prod(network.shape)
    images, where = _examples(examples, *place, inputs)
    _check_shape(images, network, path, where)

    def training_images() -> Tensor | Rows:
        return _training_images(place[0] or "mnist", place[1], {})

    normalization = normalization_for(
        loaded, images, str(path), where, normalize, None if examples else training_images
    )
    # Normalised some chunks at a time: as float32 all of them would take four times their bytes.
    parts = images.split(8 * network.chunk)
    normalised = (_normalised(part, network, normalization) for part in parts)
    p = torch.cat([_probabilities(network, part) for part in normalised])
    print(f"read {where}: {len(images):,} examples of {inputs} features", file=sys.stderr)
    return p.argmax(-1), p


def score_predictions(
    predictions: Path | str, labels: Path | str, label: str | None = None, header: str | None = None
) -> tuple[int, int]:
    """How many predictions are right, and how many there are: in each CSV file the only column, the
    one that the header calls label or the like, or the one that `label` says.

    Raises InputError when they differ in length, or where it is in doubt which column it is.
    """
    predictions = Path(predictions)
    labels = Path(labels)
    asked = Asked(**{k: x for k, x in (("label", label), ("header", header)) if x is not None})
    found, expected = (read_labels(path, asked) for path in (predictions, labels))
    if len(found) != len(expected):
        raise InputError(
            f"{predictions} has {len(found)} predictions, but {labels} has {len(expected)} labels"
        )
    return int((found == expected).sum()), len(found)


def summarise(name: Path | str, data_dir: Path | str | None = None) -> dict[str, Any]:
    """The layers of a config or weights file (a path, a run folder or a shipped name).

    `source` is the file, `input_shape` that of one example, `layers` a dict each (of several runs,
    the first's), `parameters` their sum, and of weights `meta` what else they hold. Raises
    InputError.
    """
    path, meta = find_described(name), dict[str, Any]()
    if path.suffix == ".pkl":
        weights = load_weights(path)
        network = weights.network
        own = {} if weights.foreign else weights.meta
        meta = {k: v for k, v in own.items() if k not in ("layers", "shape")}
    else:
        network = describe(load_config(path).populations()[0], data_dir)
    return {
        "source": str(path),
        "input_shape": list(network.shape),
        "layers": network.summary(),
        "parameters": network.layout.count,
        "meta": meta,
    }


def describe(population: Population, data_dir: Path | str | None = None) -> Network:
    """One network of a population, its weights 0. Needs no files for the known data sets."""
    data = population.config.data
    shape, classes = example_shape(data.name, data_dir or data.place)
    classes = 2 if data.labels == "parity" else len(data.class_names or ()) or classes
    return Network(population.layers(), shape, classes)


def prediction_lines(classes: Tensor, p: Tensor | None = None) -> list[str]:
    """One class per line; with p (N, K) a comma and each probability after it, in the shortest
    digits that read back as the same float32 number."""
    if p is None:
        return [str(k) for k in classes.tolist()]
    rows = zip(classes.tolist(), p.float().numpy(), strict=True)
    return [",".join([str(k), *map(str, row)]) for k, row in rows]


def _data_place(
    data: str | None,
    data_dir: Path | str | None,
    part: str,
    label: str | None = None,
    header: str | None = None,
    trained: str | None = None,
) -> tuple[str | None, Place]:
    """The data set's name and place that `--data NAME|PATH`, `--data-dir`, `--label` and `--header`
    mean for one part; `trained` is the label's column of the training data."""
    folder = str(data_dir) if data_dir is not None else None
    name, place = data_source(data, folder, part, label, header)
    if trained is not None and name in ("csv", None):
        given = place if isinstance(place, dict) else {"dir": place} if place else {}
        place = given | {"trained": trained}
    return name, place


def _examples(
    file: Path | str | None, name: str | None, place: Place, width: int
) -> tuple[Tensor, str]:
    """Raw examples, and where they are from: a file, else the test part of a data set. `width` is
    the number of features, as a table may have other columns, too."""
    if file is None:
        if name != "csv":
            dataset = load(name or "mnist", place, parts=("test",))
            assert dataset.test is not None and isinstance(dataset.test.images, Tensor)
            return dataset.test.images, dataset.where
        file = csv_files(place, ("test",), ())["test"]
    found = idx_examples(Path(file))
    if found is not None:
        return found, str(file)
    return read_features(Path(file), asked_of(place), width), str(file)


def _training_images(name: str, place: Place, cut: dict[str, Any]) -> Tensor | Rows:
    """The raw training examples of a data set, of which `cut` says the split."""
    if isinstance(place, dict) and not {"train", "dir"} & {*place}:
        raise InputError("--normalize standard: the data have no training part; give MEAN,STD")
    swapped = cut.get("source") == "test"
    dataset = load_source("test", name, place) if swapped else load(name, place, ("train",))
    return _part(dataset, "train", cut)[0]


def _own_place(path: Path, meta: dict[str, Any], part: str) -> Place:
    """Where the run that made a weights file had its data, if the file lies in its folder. Raises
    InputError where `part` of them is no longer there."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.toml").is_file():
            populations = run_config(folder).populations()
            own = [p for p in populations if any(r.label == meta.get("run") for r in p.replicas)]
            data = (own or populations)[0].config.data
            check_there(data, folder, ("dir", part))
            return data.place
    return None


def _load(
    path: Path, device: torch.device, activation: str | None = None
) -> tuple[Weights, Network]:
    """The content of a weights file, and its network on a device. Raises InputError where a weight
    is not finite: predictions would mean nothing."""
    loaded = load_weights(path, activation)
    ours = loaded.network
    for key, tensor in ours.layout.to_dict(ours.theta[0]).items():
        if wrong := int((~tensor.isfinite()).sum()):
            raise InputError(
                f"{path}: {key} is not finite: {wrong:,} of its {tensor.numel():,} numbers are nan"
                " or inf, so it predicts nothing; did its training diverge?"
            )
    moved = Network(ours.specs, ours.shape, ours.classes, 1, ours.theta.dtype, device)
    moved.theta.copy_(ours.theta)
    return loaded, moved


def _check_shape(images: Tensor | Rows, network: Network, path: Path, where: str) -> None:
    inputs, found = math.prod(network.shape), images.shape[1:].numel()
    if found != inputs:
        raise InputError(
            f"{path} takes examples of shape {network.shape}, but those of {where} have shape"
            f" {tuple(images.shape[1:])}"
            + ("; does a label lack in the first column?" if found + 1 == inputs else "")
        )


def _normalised(
    images: Tensor | Rows, network: Network, normalization: Normalization
) -> Tensor | Streamed:
    """Raw images (N, ...) as the network takes them."""
    if isinstance(images, Rows):
        rows = replace(images, example=torch.Size(network.shape))
        return Streamed(rows, normalization, network.theta.dtype, network.theta.device)
    x = normalization.apply(images.reshape(-1, *network.shape), network.theta.dtype)
    return x.to(network.theta.device)


def _probabilities(network: Network, x: Tensor | Streamed) -> Tensor:
    return probabilities(network.logits(x)[0].double()).cpu()


def draw_evaluation(
    evaluation: Evaluation, images: Tensor | Rows, class_names: Any, title: str, folder: Path
) -> None:
    """confusion.png, and mistakes.png: the most confident wrong predictions as images."""
    matrix = evaluation.confusion.numpy()
    accuracy = f"{100 * evaluation.accuracy:.2f} %"
    figure = plots.confusion(matrix, class_names, f"{title}: accuracy {accuracy}")
    plots.save(figure, folder / "confusion.png")
    wrong = (evaluation.predictions != evaluation.targets).nonzero().flatten()
    order = evaluation.confidences[wrong].argsort(descending=True, stable=True)
    shown = wrong[order][:32]
    if images.dim() != 4 or not len(wrong):
        return  # features that are no image, or nothing to show
    captions = [
        f"{class_names[t]} as {class_names[p]}\n{100 * c:.1f} %"
        for t, p, c in zip(
            evaluation.targets[shown].tolist(),
            evaluation.predictions[shown].tolist(),
            evaluation.confidences[shown].tolist(),
            strict=True,
        )
    ]
    heading = (
        f"{title}: the {len(shown)} most confident of {len(wrong)} mistakes (true as predicted)"
    )
    plots.save(plots.image_grid(images[shown].numpy(), captions, heading), folder / "mistakes.png")


def _judge(network: Network, samples: Samples, loss: str) -> Evaluation:
    [(mean_loss, accuracy)] = evaluate(network, samples, loss)
    assert mean_loss is not None and accuracy is not None
    decided = []
    for part in samples.x.split(8 * network.chunk):
        p = _probabilities(network, part)
        decided.append((p.argmax(-1), p.amax(-1)))
    predictions, confidences = (torch.cat(parts) for parts in zip(*decided, strict=True))
    targets, k = samples.y.cpu(), network.classes
    confusion = (targets * k + predictions).bincount(minlength=k * k).view(k, k)
    return Evaluation(accuracy, mean_loss, targets, predictions, confidences, confusion)


def _part(dataset: Dataset, part: str, cut: dict[str, Any]) -> tuple[Tensor | Rows, Tensor]:
    """The raw images and labels of a part; `cut` says how the training file was split."""
    examples = dataset.test if part == "test" else dataset.train
    assert examples is not None
    images, labels = examples.images, examples.labels
    if part == "test":
        return images, labels
    if first := cut.get("train_samples", 0):
        images, labels = head(images, first), labels[:first]
    if valid := cut.get("valid", 0):
        chosen, held_out = split(labels, valid, cut.get("seed", 0), cut.get("stratify", False))
        index = chosen if part == "train" else held_out
        images, labels = select(images, index), labels[index]
    elif part == "valid":
        raise InputError("--split valid: this network was trained without a validation split")
    if part == "train" and (fraction := cut.get("corruption", 0)):
        labels = corrupt(labels, fraction, cut["classes"], cut["corruption_seed"])
    return images, labels
