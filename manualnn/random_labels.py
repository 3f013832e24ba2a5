"""Memorisation: networks that learn coin flips, as in Zhang et al. (2017), "Understanding deep
learning requires rethinking generalization".

A training of the first N samples, in order, whose labels are drawn at random, wholly or in part.
What it shows is read from the run folders, one for each N.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plots
from .config import Config, load_config, parse_config, put
from .data import load
from .errors import InputError
from .experiment import Run, new_folder, to_json
from .files import write_text
from .network import load_weights
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
    if corruption or seeds:
        fractions = list(corruption) or [1.0]
        count = seeds or (3 if len(fractions) > 1 else 1)
        first = config.train.seed
        changes["data.corruption"] = [p for p in fractions for _ in range(count)]
        changes["train.seeds"] = list(range(first, first + count)) * len(fractions)
        if any(p < 1 for p in fractions):
            changes["data.test_labels"] = "same"
        if len(fractions) * count > 1 and config.train.evaluate_every == 1:
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
            if "layers" in table.get("model", {}):
                table["model"]["layers"][-1] = ["linear", outputs]
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
    if any(member["train"].get("class_weights") for member in trees):
        off.append("class_weights")
        tree["train"].pop("class_weights", None)
        for table in tree.get("run", []):
            table.get("train", {}).pop("class_weights", None)
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
    out: Path | None = None,
    device: str = "auto",
    labels: int = 0,
) -> tuple[Path, list[Run]]:
    """The folder of the experiment, and a Run for each number of samples, in folders below it.

    Without `samples`, or with one number, the folder is that of the only run. `labels`, if given,
    must be 2 or how many classes the data set has. Raises InputError.
    """
    settings = config.members()[0].data
    if labels > 2:
        dataset = load(settings.name, settings.dir, ("train",), class_names=settings.class_names)
        if dataset.class_names and len(dataset.class_names) != labels:
            raise InputError(
                f"--labels {labels}: use 2, or {len(dataset.class_names)}, the classes of"
                f" {settings.name}"
            )
    folder = out or new_folder(config.name)
    if len(samples) <= 1:
        configs = {folder: _with_samples(config, samples[0]) if samples else config}
    else:
        if (folder / "config.toml").exists():
            raise InputError(f"{folder} already holds a run; give another --out")
        configs = {folder / f"samples-{n}": _with_samples(config, n) for n in samples}
    return folder, [Run(c, path, device) for path, c in configs.items()]


def _with_samples(config: Config, count: int) -> Config:
    tree = config.to_dict()
    put(tree, "data.train_samples", count, "--samples")
    return parse_config(tree, config.name)


def summarise(folder: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Draw `random-labels.png` (and, of several settings, `epochs-to-fit.png`) into `folder`, and
    write and return what `random-labels.json` holds, from finished run folders."""
    networks = [network for path in folders for network in _networks(path)]
    data = load_config(folders[0] / "config.toml").members()[0].data
    kind = data.labels if data.test_labels == "same" else data.test_labels
    classes = networks[0]["output_classes" if kind == "given" else "label_classes"]

    result: dict[str, Any] = {key: _mean(networks, key) for key in MEASURES}
    result |= {"epochs": max(network["epochs"] for network in networks)}
    result |= {"label_classes": networks[0]["label_classes"], "test_labels": kind}
    result |= {"test_classes": classes, "guess_loss": math.log(classes)}
    if len(networks) > 1:
        result["runs"] = [{k: v for k, v in n.items() if k != "rows"} for n in networks]
    if all(network["corruption"] == 1 for network in networks):
        result["explanation"] = _explain_coins(result)
    else:
        result["explanation"] = _explain_corruption(networks)
    target = {"random": "coin flips", "parity": "parity", "given": "true labels"}[kind]
    counts = "/".join(dict.fromkeys(str(network["samples"]) for network in networks))
    title = (
        f"{data.name}: {counts} samples with random labels of {result['label_classes']} classes,"
        f" tested on {target}"
    )
    guess = (f"ln {classes} = {result['guess_loss']:.4f}", result["guess_loss"])
    plots.save(plots.memorisation(networks, title, guess), folder / "random-labels.png")
    if len({(network["samples"], network["corruption"]) for network in networks}) > 1:
        plots.save(plots.fit_times(networks, data.name), folder / "epochs-to-fit.png")
    write_text(folder / "random-labels.json", to_json(result))
    return result | {"out": str(folder)}


def _mean(networks: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [network[key] for network in networks if network[key] is not None]
    return statistics.fmean(values) if values else None


def _explain_coins(result: dict[str, Any]) -> str:
    """Why the losses are what they are where all labels were drawn at random."""
    k, test, train = result["test_classes"], result["test_loss"], result["train_loss"]
    bound = f"ln {k} = {result['guess_loss']:.4f}"
    if result["test_labels"] == "random":
        why = (
            f"The test labels are drawn at random, so no prediction p can expect less than {bound}"
            f" on them: the mean of -ln p over {k} equally likely labels is smallest where each"
            f" has p = 1/{k}."
        )
    else:
        why = (
            "The training labels are drawn at random, so what was learned says nothing about the"
            f" true ones, and to beat a uniform guess ({bound}) is a matter of luck."
        )
    if test is None or train is None:
        return why
    if train > result["guess_loss"] / 4:
        return (
            f"{why} The labels are not memorised yet: after {result['epochs']} epochs the training"
            f" loss is {train:.4f}. More epochs, or a larger learning rate, do that."
        )
    return (
        f"{why} The more confident the network has become by memorising, the larger its logits are"
        " on test images too, and a wrong answer costs about the gap between the logits: the test"
        " loss grows although the accuracy stays that of chance. The difference to the training"
        f" loss, {test - train:.2f}, is pure memorisation: there was nothing to learn that could"
        " carry over."
    )


def _explain_corruption(networks: Sequence[dict[str, Any]]) -> str:
    """What the networks with the fewest and the most random labels show."""
    text = (
        "Labels that were kept follow the images, so what a network learns of them holds on test"
        " data; a label that was replaced can only be memorised."
    )
    fractions = sorted({network["corruption"] for network in networks})
    ends = [[n for n in networks if n["corruption"] == p] for p in (fractions[0], fractions[-1])]
    for key, what, scale, unit in (
        ("epochs_to_fit", "epochs until all samples are fitted", 1, ""),
        ("test_accuracy", "test accuracy", 100, " %"),
    ):
        low, high = (_mean(end, key) for end in ends)
        if len(fractions) > 1 and low is not None and high is not None:
            text += (
                f" From corruption {fractions[0]:g} to {fractions[-1]:g} the mean {what} goes from"
                f" {low * scale:.1f}{unit} to {high * scale:.1f}{unit}."
            )
    return text


def _networks(path: Path) -> list[dict[str, Any]]:
    """What is known of each network of a run folder, with its `rows` of history.csv."""
    meta = load_weights(path / "weights.pkl").meta
    networks = []
    for trained in read_run(path):
        figures, rows = trained.figures, trained.rows
        tested = [row["test_loss"] for row in rows if row["test_loss"] is not None]
        fitted = (int(row["epoch"]) for row in rows if row["train_accuracy"] == 1)
        networks.append(
            {
                **{key: figures[key] for key in ("run", "seed", "epochs")},
                **{f"train_{m}": figures[f"train_{m}"] for m in ("loss", "accuracy")},
                **{f"test_{m}": figures[f"test_{m}"] for m in ("loss", "accuracy")},
                "samples": trained.config.data.train_samples,
                "corruption": trained.replica.corruption,
                "label_classes": meta["split"]["classes"],
                "output_classes": meta["classes"],
                "mean_test_loss": statistics.fmean(tested) if tested else None,
                "epochs_to_fit": next(fitted, None),
                "rows": rows,
            }
        )
    return networks
