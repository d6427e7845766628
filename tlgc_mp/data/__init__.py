"""Data sets, the paper's augmentation, and the batches each replica draws.

Importing this package does not import torch: the names that need it are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tlgc_mp.data.catalog import DATASETS, check_dataset

if TYPE_CHECKING:
    from tlgc_mp.data.datasets import Datasets, load_datasets
    from tlgc_mp.data.loaders import EvaluationBatches, TrainingBatches

__all__ = ["DATASETS", "Datasets", "EvaluationBatches", "TrainingBatches", "check_dataset", "load_datasets"]

_HOMES = {
    "Datasets": "datasets",
    "load_datasets": "datasets",
    "EvaluationBatches": "loaders",
    "TrainingBatches": "loaders",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
