"""Data sets as tensors: find the files, read them, split, normalise."""

from .idx import read_idx
from .prepare import Normalization, Prepared, Samples, prepare, split
from .sources import DATASETS, Dataset, Examples, load

__all__ = [
    "DATASETS",
    "Dataset",
    "Examples",
    "Normalization",
    "Prepared",
    "Samples",
    "load",
    "prepare",
    "read_idx",
    "split",
]
