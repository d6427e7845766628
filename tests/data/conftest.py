"""Folders of small images, made for one test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolders = Callable[..., Path]


@pytest.fixture
def make_folders(tmp_path: Path) -> MakeFolders:
    """``make_folders({"train/cat": 2})`` makes two images in ``train/cat`` and returns the folder of the splits."""

    def make(counts: dict[str, int], size: tuple[int, int] = (16, 16)) -> Path:
        pixels = np.random.default_rng(0)
        for folder, count in counts.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = pixels.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
        return tmp_path

    return make
