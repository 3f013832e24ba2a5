"""Memorisation: networks that learn coin flips, as in Zhang et al. (2017), "Understanding deep
learning requires rethinking generalization".

A training of the first N samples, in order, whose labels are drawn at random, wholly or in part.
What it shows is read from the run folders, one for each N.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import distributed, plots
from .config import Config, load_config, parse_config, put
from .data import load
from .diagnosis import guess_loss as guess_of
from .errors import InputError
from .evaluation import choose_device
from .experiment import Run, build, folder_called, join, to_json
from .files import write_text
from .find import newest_run
from .results import read_run

DEFAULT = "mnist-random-labels"
# What would keep a network from memorising, and its neutral value.
REGULARISATION = {
    "train.l1": 0.0,
    "train.l2": 0.0,
    "train.label_smoothing": 0.0,
    "train.early_stopping.patience": 0,
    "data.valid": 0,
}


TARGETS = {"random": "coin flips", "parity": "parity", "given": "true labels"}
MEASURES = (
    *("train_loss", "train_accuracy", "test_loss", "test_accuracy", "mean_test_loss"),
    "epochs_to_fit",
)


def configure(
    config: Config,
    corruption: Sequence[float] = (),
    labels: int = 0,
    outputs: int = 0,
    test_labels: str = "",
    seeds: int = 0,
) -> tuple[Config, list[str]]:
    """The config of a memorisation, and what of its regularisation was turned off.

    A config whose labels are not random yet is first made into the experiment's usual form: 128
    samples in one batch and in order, two classes, all labels random, and so are the test labels.
    labels: classes that labels are drawn from, 2 or those of the data set; outputs: width of the
    last layer; test_labels: "random", "true" or "parity" (default: random if all labels are);
    seeds: networks for each corruption. What is empty or 0 stays as it is. Raises InputError.
    """
    tree = config.to_dict()
    off = _strip(tree, config)
    changes: dict[str, Any] = {}
    if not any(member.data.corruption for member in config.members()):
        changes |= {"data.train_samples": 128, "data.labels": "parity", "data.corruption": 1.0}
        changes |= {"train.batch_size": 128, "train.shuffle": False, "data.test_labels": "random"}
    if labels:
        changes["data.labels"] = "parity" if labels == 2 else "given"
    fractions = list(corruption)
    if seeds and not fractions and isinstance(config.data.corruption, tuple):
        fractions = list(dict.fromkeys(config.data.corruption))
    count = seeds or (3 if len(fractions) > 1 else 1)
    chosen = list(range(config.train.seed, config.train.seed + count))
    if fractions:
        changes["data.corruption"] = [p for p in fractions for _ in chosen]
        changes["train.seeds"] = chosen * len(fractions)
        changes["data.test_labels"] = "same" if any(p < 1 for p in fractions) else "random"
    elif seeds:
        changes["train.seeds"] = chosen
    many = len(fractions) * count > 1 and not config.runs
    if many and config.train.evaluate_every == 1:
        changes["train.evaluate_every"] = max(1, config.train.epochs // 25)
    if test_labels:
        kinds = {"random": "random", "true": "given", "parity": "parity"}
        if test_labels not in kinds:
            raise InputError(f"--test-labels {test_labels}: use random, true or parity")
        changes["data.test_labels"] = kinds[test_labels]
    for key, value in changes.items():
        put(tree, key, value, key)
    if outputs:
        for table in (tree, *tree.get("run", [])):
            layers = table.get("model", {}).get("layers", [])
            linear = [i for i, layer in enumerate(layers) if layer[0] == "linear"]
            if linear:
                layers[linear[-1]] = ["linear", outputs]
    name = config.name if "random-labels" in config.name else f"{config.name}-random-labels"
    return parse_config(tree, name), off


def _strip(tree: dict[str, Any], config: Config) -> list[str]:
    """Take out of `tree` what regularises; the keys and values that were not neutral."""
    off = []
    trees = [member.to_dict() for member in config.members()]
    for key, neutral in REGULARISATION.items():
        values: list[Any] = []
        for member in trees:
            value: Any = member
            for part in key.split("."):
                value = value[part]
            if value not in (neutral, *values):
                values.append(value)
        if values:
            off.append(f"{key.rpartition('.')[2]} {', '.join(map(str, values))}")
            put(tree, key, neutral, key)
    for part, key in (("train", "class_weights"), ("data", "augment")):  # whose neutral is none
        if any(member[part].get(key) for member in trees):
            off.append(key)
        for table in (tree, *tree.get("run", [])):
            table.get(part, {}).pop(key, None)
    for table in (tree, *tree.get("run", [])):
        layers = table.get("model", {}).get("layers", [])
        kept = [layer for layer in layers if layer[0] != "dropout"]
        if len(kept) < len(layers):
            off += ["dropout"] if "dropout" not in off else []
            table["model"]["layers"] = kept
    return off


def runs(
    config: Config,
    samples: Sequence[int] = (),
    out: Path | str | None = None,
    device: str = "auto",
    labels: int = 0,
    resume: bool = False,
) -> tuple[Path, Iterator[Run]]:
    """The folder of the experiment, and a Run for each number of samples, in folders below it.

    Without `samples`, or with one number, the folder is that of the only run. `labels`, if given,
    must be 2 or how many classes the data set has. Raises InputError, for all before the first.
    """
    out = Path(out) if out is not None else None
    join(device, config)
    distributed.together(lambda: _check_labels(config, labels))

    def choose() -> Path:
        began = newest_run(config.name, "samples-*/config.toml") if samples[1:] else None
        if not (began and (resume or distributed.took(began))):
            began = None
        folder = out or began or folder_called(config.name, resume and not samples[1:])
        if samples[1:] and (folder / "config.toml").exists():
            raise InputError(f"{folder} already holds a run; give another --out")
        return folder

    folder = distributed.on_main(choose)
    distributed.take(folder)
    if len(samples) <= 1:
        only = _with_samples(config, samples[0]) if samples else config
        return folder, iter([Run(only, folder, device, resume)])
    for population in _with_samples(config, max(samples)).populations():
        # What does not fit shall not be found at the end.
        distributed.together(partial(build, population, choose_device(device)))
    return folder, (
        Run(_with_samples(config, n), folder / f"samples-{n}", device, resume) for n in samples
    )


def _check_labels(config: Config, labels: int) -> None:
    """Raise InputError unless `labels` is at most 2 or how many classes the data set has."""
    settings = config.members()[0].data
    if labels > 2:
        dataset = load(settings.name, settings.place, ("train",), class_names=settings.class_names)
        classes = len(dataset.class_names or ())
        if classes != labels:
            own = f"2, or {classes}" if classes > 2 else "2"
            raise InputError(f"--labels {labels}: use {own}, the classes of {settings.name}")


def _with_samples(config: Config, count: int) -> Config:
    tree = config.to_dict()
    put(tree, "data.train_samples", count, "--samples")
    return parse_config(tree, config.name)


def summarise(folder: Path | str, folders: Sequence[Path | str]) -> dict[str, Any]:
    """Draw `random-labels.png` (and, of several settings, `epochs-to-fit.png`) into `folder`, and
    write and return what `random-labels.json` holds, from finished run folders."""
    folder = Path(folder)
    networks = [network for path in folders for network in _networks(Path(path))]
    data = load_config(folders[0]).data.name
    result: dict[str, Any] = {key: _mean(networks, key) for key in MEASURES}
    result |= {"epochs": max(network["epochs"] for network in networks)}
    # What all networks have in common; None where they differ.
    for key in ("label_classes", "test_labels", "guess", "guess_loss"):
        values = {network[key] for network in networks}
        result[key] = values.pop() if len(values) == 1 else None
    if len(networks) > 1:
        result["runs"] = [{k: v for k, v in n.items() if k != "rows"} for n in networks]
    if all(network["corruption"] == 1 for network in networks):
        result["explanation"] = _explain_coins(networks)
    else:
        result["explanation"] = _explain_corruption(networks)
    counts = "/".join(dict.fromkeys(str(network["samples"]) for network in networks))
    title = f"{data}: {counts} samples with random labels"
    if result["label_classes"]:
        title += f" of {result['label_classes']} classes"
    if result["test_labels"]:
        title += f", tested on {TARGETS[result['test_labels']]}"
    value = result["guess_loss"]
    guess = None if value is None else (f"{result['guess']} = {value:.4f}", value)
    plots.save(plots.memorisation(networks, title, guess), folder / "random-labels.png")
    if len({(network["samples"], network["corruption"]) for network in networks}) > 1:
        plots.save(plots.fit_times(networks, data), folder / "epochs-to-fit.png")
    write_text(folder / "random-labels.json", to_json(result))
    return result | {"out": str(folder)}


def _mean(networks: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [network[key] for network in networks if network[key] is not None]
    return statistics.fmean(values) if values else None


def _explain_coins(networks: Sequence[dict[str, Any]]) -> str:
    """Why the losses are what they are where all labels were drawn at random; of several settings
    of the one with the lowest training loss."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for network in networks:
        groups.setdefault((network["samples"], network["run"]), []).append(network)

    def lowest(key: tuple[int, str]) -> float:
        loss = _mean(groups[key], "train_loss")
        return math.inf if loss is None else loss

    chosen = min(groups, key=lowest)
    group = groups[chosen]
    test, train = _mean(group, "test_loss"), _mean(group, "train_loss")
    k = group[0]["test_classes"]
    bound = f"{group[0]['guess']} = {group[0]['guess_loss']:.4f}"
    name = f" of {chosen[1]} on {chosen[0]} samples" if len(groups) > 1 else ""
    if group[0]["test_labels"] == "random":
        why = (
            f"The test labels are drawn at random, so no prediction can expect less than {bound} on"
            f" them: the mean loss over {k} equally likely labels is smallest where each has the"
            f" probability 1/{k}."
        )
    else:
        why = (
            "The training labels are drawn at random, so what was learned says nothing about the"
            f" true ones, and to beat a uniform guess ({bound}) is a matter of luck."
        )
    if test is None or train is None:
        return why
    if _mean(group, "train_accuracy") != 1:
        return (
            f"{why} The labels are not memorised yet: after {group[0]['epochs']} epochs the"
            f" training loss{name} is {train:.4f}. More epochs, or a larger learning rate, do that."
        )
    return (
        f"{why} The more confident the network has become by memorising, the larger its logits are"
        " on test images too, and the more a wrong answer costs: the test loss grows although the"
        f" accuracy stays that of chance. The difference to the training loss{name},"
        f" {test - train:.2f}, is pure memorisation: there was nothing to learn that could carry"
        " over."
    )


def _explain_corruption(networks: Sequence[dict[str, Any]]) -> str:
    """What the networks with the fewest and the most random labels show."""
    text = (
        "Labels that were kept follow the images, so what a network learns of them holds on test"
        " data; a label that was replaced can only be memorised."
    )
    most = max(network["samples"] for network in networks)
    networks = [network for network in networks if network["samples"] == most]
    fractions = sorted({network["corruption"] for network in networks})
    ends = [[n for n in networks if n["corruption"] == p] for p in (fractions[0], fractions[-1])]
    for key, what, scale, unit in (
        ("epochs_to_fit", "epochs until all samples are fitted", 1, ""),
        ("test_accuracy", "test accuracy", 100, " %"),
    ):
        low, high = (None if any(n[key] is None for n in end) else _mean(end, key) for end in ends)
        if len(fractions) > 1 and low is not None and high is not None:
            text += (
                f" With {most} samples, from corruption {fractions[0]:g} to {fractions[-1]:g}, the"
                f" mean {what} goes from {low * scale:.1f}{unit} to {high * scale:.1f}{unit}."
            )
    return text


def read_networks(folder: Path) -> list[dict[str, Any]]:
    """What is known of each network in the folder of a finished memorisation."""
    folders = sorted(folder.glob("samples-*"), key=lambda path: int(path.name.partition("-")[2]))
    return [network for path in folders or [folder] for network in _networks(path)]


def _networks(path: Path) -> list[dict[str, Any]]:
    """What is known of each network of a run folder, with its `rows` of history.csv.

    `epochs_to_fit` is the first epoch whose accuracy, averaged over its batches as trained, is 1.
    """
    networks = []
    for trained in read_run(path):
        figures, rows, data = trained.figures, trained.rows, trained.config.data
        tested = [row["test_loss"] for row in rows if math.isfinite(row["test_loss"] or math.nan)]
        fitted = (row["epoch"] for row in rows if row["train_accuracy"] == 1)
        kind = data.labels if data.test_labels == "same" else data.test_labels
        classes = {"random": figures["classes"], "parity": 2}.get(kind, figures["test_classes"])
        guess_loss, guess = guess_of(trained.config.train.loss, classes, figures["outputs"])
        networks.append(
            {
                **{key: figures[key] for key in ("run", "seed", "epochs")},
                **{f"train_{m}": figures[f"train_{m}"] for m in ("loss", "accuracy")},
                **{f"test_{m}": figures[f"test_{m}"] for m in ("loss", "accuracy")},
                "samples": figures["train_samples"],
                "corruption": trained.replica.corruption,
                "label_classes": figures["classes"],
                "test_labels": kind,
                "test_classes": classes,
                "guess": guess,
                "guess_loss": guess_loss,
                "mean_test_loss": statistics.fmean(tested) if tested else None,
                "epochs_to_fit": next(fitted, None),
                "rows": rows,
            }
        )
    return networks
