"""The scale of inputs: raw values against those that a network was trained on.

Only what is certain is rescaled, with a note; a mismatch that is certain, without a remedy that is,
is an error. `--normalize` sets the scale by hand, as foreign weights need it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from .data import DATASETS, Normalization, Rows
from .data.ranges import LIGHT, Range
from .errors import InputError, note
from .network import Weights

Raw = Tensor | Rows
WHAT = "use none, unit (x / 255), standard, or MEAN,STD as in 33.3,78.6"
BYTE = 255.0
# Of the width of the range trained on: how far others may exceed it, and how narrow they may be,
# without a note.
MARGIN, NARROW = 0.1, 0.05


def normalization_for(
    weights: Weights,
    images: Raw,
    name: str,
    where: str,
    normalize: str | None = None,
    training_images: Callable[[], Raw] | None = None,
) -> Normalization:
    """The normalization of raw `images` (N, ...) from `where` for the weights in the file `name`.

    By default the one that the file has. Foreign weights take bytes as x / 255, other values as
    they are. `normalize` is "none", "unit", "standard" (fitted on `training_images()`) or
    "MEAN,STD". Raises InputError where the values are on another scale than those trained on.
    """
    stored = weights.meta.get("normalization") or {}
    try:
        own = Normalization(**(stored or {"kind": "none"}))
    except TypeError as error:
        raise InputError(f"{name}: its meta has an unusable normalization ({error})") from None
    if not len(images):
        return own
    found = Range.of(images)
    if normalize is not None:
        chosen = _asked(normalize, found, where, training_images)
        if weights.foreign:
            how = f"(x - {chosen.mean:.6g}) / {chosen.std:.6g} of {where}"
            _say_foreign(weights, name, how)
        return replace(chosen, permute_seed=own.permute_seed)
    if weights.foreign:
        pixels = found.whole and found.high > 1
        _say_foreign(weights, name, f"x / 255 of {where}" if pixels else f"{where} as it is")
        return Normalization("unit", 0.0, BYTE) if pixels else Normalization("none")
    if not stored:
        note(f"{name} has no normalization: {where} is taken as it is ({found}); see --normalize")
        return own
    trained = trained_range(weights.meta)
    return own if trained is None else _fitting(own, trained, found, weights, name, where)


def trained_range(meta: dict[str, Any]) -> Range | None:
    """The range of the raw values that weights were trained on, None where it is not known.

    Files that do not hold it were written before it was recorded: images of the known data sets
    and of CSV files are bytes, as their mean and deviation show, and so are those with x / 255.
    """
    if stored := meta.get("range"):
        return Range.from_meta(stored)
    normalization = meta.get("normalization") or {}
    kind, dataset = normalization.get("kind"), meta.get("dataset")
    if len(meta.get("shape") or ()) != 3:
        return None
    # The highest value is at least the mean, and at least twice the deviation.
    doubled = [2 * std for std in _listed(normalization, "std")]
    least = max(_listed(normalization, "mean") + doubled)
    fits = dataset in (*DATASETS, "csv") and LIGHT <= least <= BYTE
    if kind == "unit" or (kind in ("standard", "feature") and fits):
        return Range(0.0, BYTE, True)
    return Range(0.0, BYTE, True) if kind == "none" and dataset in DATASETS else None


def _listed(normalization: dict[str, Any], key: str) -> list[float]:
    value = normalization.get(key, 0.0)
    return value if isinstance(value, list) else [value]


def _fitting(
    own: Normalization, trained: Range, found: Range, weights: Weights, name: str, where: str
) -> Normalization:
    """The network's own normalization, rescaled where it is certain that the values are pixels
    divided by 255."""
    said = f"{where}: its values are {found}, but {name} was trained on {trained}"
    image = len(weights.network.shape) == 3
    white = BYTE if trained.is_light else trained.high
    if image and trained.whole and trained.high > 1:
        if found.low < 0 or found.high > BYTE:
            raise InputError(f"{said}; give raw pixels, or say with --normalize how they are read")
        if found.is_unit and trained.is_light:
            note(f"{said}; taken as pixels / 255")
            return scaled(own, 1 / BYTE)
        if 0 < found.high <= 1:  # 0 and 1 alone are black and white, or very dark
            raise InputError(f"{said}; {_remedy(own, 1 / white)} takes 1 as {white:g}")
    elif image and trained.low >= 0 and trained.high <= 1 and found.whole and found.high > 1:
        white = BYTE if found.is_light else found.high
        raise InputError(f"{said}; {_remedy(own, white)} takes {white:g} as 1")
    width = trained.high - trained.low
    beyond = max(trained.low - found.low, found.high - trained.high)
    narrow = not image and found.high - found.low < NARROW * width
    if beyond > MARGIN * width or (found.low < 0 <= trained.low) or narrow:
        note(f"{said}; is that the same scale? --normalize sets it")
    return own


def _say_foreign(weights: Weights, name: str, inputs: str) -> None:
    """Say on one line how foreign weights are read."""
    layers = [spec[0] for spec in weights.network.specs if spec[0] != "linear"]
    kind = f"a {layers[0]} network" if layers else "one linear layer"
    flags = "--activation and --normalize change that" if layers else "--normalize changes that"
    note(f"{name} is of other origin: read as {kind} on {inputs}; {flags}")


def _asked(
    normalize: str, found: Range, where: str, training_images: Callable[[], Raw] | None
) -> Normalization:
    """The normalization that `--normalize` asks for."""
    if normalize in ("none", "unit"):
        if normalize == "unit" and found.is_unit:
            raise InputError(
                f"--normalize unit: {where} is {found} already, without a division by 255; use none"
            )
        return Normalization(normalize, 0.0, BYTE if normalize == "unit" else 1.0)
    if normalize == "standard":
        if training_images is None:
            raise InputError(f"--normalize standard: {where} has no training part; give MEAN,STD")
        return Normalization.fit("standard", training_images())
    try:
        mean, std = map(float, normalize.split(","))
    except ValueError:
        raise InputError(f"--normalize {normalize}: {WHAT}") from None
    if not abs(mean) < float("inf") or not 0 < std < float("inf"):
        raise InputError(f"--normalize {normalize}: the deviation must be above 0, both finite")
    given = Normalization("standard", mean, std)
    if found.is_light and abs(mean) <= 1 and std <= 1:
        note(f"--normalize {normalize}: taken as those of pixels / 255, as {where} is {found}")
        return scaled(given, BYTE)
    if found.is_unit and mean > 1:
        raise InputError(
            f"--normalize {normalize}: {where} is {found}; give the mean and deviation of these"
        )
    return given


def scaled(normalization: Normalization, factor: float) -> Normalization:
    """The normalization of values that are `factor` times those of `normalization`."""

    def times(value: float | list[float]) -> float | list[float]:
        return [factor * v for v in value] if isinstance(value, list) else factor * value

    return replace(normalization, mean=times(normalization.mean), std=times(normalization.std))


def _remedy(own: Normalization, factor: float) -> str:
    other = scaled(own, factor)
    if isinstance(other.mean, list) or isinstance(other.std, list):
        return "rescaling the file"
    return f"--normalize {other.mean:.6g},{other.std:.6g}"
