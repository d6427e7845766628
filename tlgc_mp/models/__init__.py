"""Models by name, built of the layers in :mod:`tlgc_mp.nn`. Knows nothing of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy

if TYPE_CHECKING:
    from tlgc_mp.models.conversion import Conversion, convert
    from tlgc_mp.models.factory import create_model
    from tlgc_mp.models.folding import Folding, fold
    from tlgc_mp.models.mobilenet_v2 import MobileNetV2
    from tlgc_mp.models.wide_resnet import WideResNet

__all__ = ["Conversion", "Folding", "MobileNetV2", "WideResNet", "convert", "create_model", "fold"]

__getattr__ = lazy.attributes(
    __name__,
    {
        "Conversion": "tlgc_mp.models.conversion",
        "convert": "tlgc_mp.models.conversion",
        "create_model": "tlgc_mp.models.factory",
        "Folding": "tlgc_mp.models.folding",
        "fold": "tlgc_mp.models.folding",
        "MobileNetV2": "tlgc_mp.models.mobilenet_v2",
        "WideResNet": "tlgc_mp.models.wide_resnet",
    },
)
