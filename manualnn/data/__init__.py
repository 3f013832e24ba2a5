"""Data sets as tensors: find the files, read them, split, normalise."""

from .idx import read_idx
from .labels import corrupt, relabel
from .prepare import Normalization, Prepared, Samples, prepare, split
from .sources import DATASETS, Dataset, Examples, load

__all__ = [
    "DATASETS",
    "Dataset",
    "Examples",
    "Normalization",
    "Prepared",
    "Samples",
    "corrupt",
    "load",
    "prepare",
    "read_idx",
    "relabel",
    "split",
]
