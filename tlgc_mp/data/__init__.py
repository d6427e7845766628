"""Data sets, the paper's augmentation, and the batches each replica draws.

Importing this package does not import torch: the names that need it are resolved on first use.
"""

from typing import TYPE_CHECKING

from tlgc_mp import lazy
from tlgc_mp.data.catalog import DATASETS, check_dataset

if TYPE_CHECKING:
    from tlgc_mp.data.datasets import Datasets, load_datasets
    from tlgc_mp.data.loaders import EvaluationBatches, TrainingBatches

__all__ = ["DATASETS", "Datasets", "EvaluationBatches", "TrainingBatches", "check_dataset", "load_datasets"]

__getattr__ = lazy.attributes(
    __name__,
    {
        "Datasets": "tlgc_mp.data.datasets",
        "load_datasets": "tlgc_mp.data.datasets",
        "EvaluationBatches": "tlgc_mp.data.loaders",
        "TrainingBatches": "tlgc_mp.data.loaders",
    },
)
