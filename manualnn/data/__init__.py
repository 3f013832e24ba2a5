"""Data sets as tensors: find the files, read them, split, normalise."""

from .augment import Augment
from .columns import Asked
from .conversion import convert
from .csv_set import Place, asked_of, csv_files
from .export import export_csv
from .generate import generate
from .idx import read_idx
from .labels import corrupt, relabel
from .prepare import Normalization, Prepared, Samples, prepare, split
from .rows import Rows, Shards, open_shards, verify_shards
from .shards import ShardWriter
from .sources import DATASETS, Dataset, Examples, example_shape, load, load_source
from .stream import Streamed, epoch_order
from .table import open_table, read_examples, read_table

__all__ = [
    "DATASETS",
    "Asked",
    "Augment",
    "Dataset",
    "Examples",
    "Normalization",
    "Place",
    "Prepared",
    "Rows",
    "Samples",
    "ShardWriter",
    "Shards",
    "Streamed",
    "asked_of",
    "convert",
    "corrupt",
    "csv_files",
    "epoch_order",
    "example_shape",
    "export_csv",
    "generate",
    "load",
    "load_source",
    "open_shards",
    "open_table",
    "prepare",
    "read_examples",
    "read_idx",
    "read_table",
    "relabel",
    "split",
    "verify_shards",
]
