"""Image files as cameras, scanners and other programs write them keep their range and stand upright."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.conftest import MakeFolders
from tlgc_mp.data import load_datasets
from tlgc_mp.data.pictures import read_image
from tlgc_mp.errors import UsageError

SEED = 4


def _tiff(path: Path, bits: int, data: bytes, size: tuple[int, int], *, photometric: int = 1, kind: int = 1) -> Path:
    """An uncompressed TIFF that lies on its side (orientation 6), as Pillow itself does not write them."""
    width, height = size
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (274, 6), (277, 1)]
    tags += [(278, height), (279, len(data)), (339, kind)]
    file = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags))
    path.write_bytes(file + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4))
    return path


def _grey(path: Path) -> np.ndarray:
    pixels = np.asarray(read_image(str(path)))
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits(suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(SEED).integers(0, 65536, (8, 12), dtype=np.uint16)
    path = tmp_path / f"0.{suffix}"
    Image.fromarray(values).save(path)
    assert (_grey(path) == np.round(values / 257.0)).all(), SEED


def test_floating_point(tmp_path: Path) -> None:
    values = np.random.default_rng(SEED).random((8, 12), dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "0.tif")
    assert (_grey(tmp_path / "0.tif") == np.round(values.astype(float) * 255)).all(), SEED


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 200.5]], np.float32), "floating-point values must lie in 0 to 1, got 0 to 200.5"),
        (np.array([[0, np.nan]], np.float32), "floating-point values must lie in 0 to 1, got nan"),
        (np.array([[0, 7]], np.int32), "does not say the range of its 32-bit or signed integers"),
    ],
)
def test_a_range_that_is_not_known_is_refused(values: np.ndarray, said: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "0.tif")
    with pytest.raises(UsageError, match=said) as refused:
        read_image(str(tmp_path / "0.tif"))
    assert str(tmp_path / "0.tif") in str(refused.value)


def test_twelve_bits_and_white_as_zero(tmp_path: Path) -> None:
    """Both are lying on their side: what is stored as a row is seen as a column."""
    twelve = int("".join(f"{value:012b}" for value in (0, 1365, 2730, 4095)), 2).to_bytes(6, "big")
    assert _grey(_tiff(tmp_path / "12.tif", 12, twelve, (4, 1))).tolist() == [[0], [85], [170], [255]]
    white = np.array([0, 65535, 0x8080], "<u2").tobytes()
    assert _grey(_tiff(tmp_path / "16.tif", 16, white, (3, 1), photometric=0)).tolist() == [[255], [0], [127]]
    with pytest.raises(UsageError, match="signed integers"):
        read_image(str(_tiff(tmp_path / "signed.tif", 16, white, (3, 1), kind=2)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(suffix: str, orientation: int, tmp_path: Path) -> None:
    """Numbered as EXIF has it: where the first row and the first column of what is stored are seen."""
    seen = np.zeros((32, 48), np.uint8)
    seen[:16, :16], seen[:16, 16:] = 255, 100
    stored = {
        **{1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1]},
        **{5: seen.T, 6: np.rot90(seen, 1), 7: seen[::-1, ::-1].T, 8: np.rot90(seen, -1)},
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / f"0.{suffix}", exif=exif)
    got = np.asarray(read_image(str(tmp_path / f"0.{suffix}"))).astype(int)
    assert got.shape == (32, 48, 3)
    assert np.abs(got[..., 0] - seen.astype(int)).mean() < 3  # JPEG and WebP are not exact


def test_damaged_exif_is_no_damaged_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "0.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(str(tmp_path / "0.png")).getpixel((0, 0)) == (9, 9, 9)


def test_in_a_data_set(make_folders: MakeFolders) -> None:
    root = make_folders({"train/cat": 1, "test/cat": 1})
    ramp = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    Image.fromarray(ramp).save(root / "test/cat/0.png")
    image = load_datasets("imagefolder", str(root), seed=0).test[0][0]
    pixels = (image[0, 0] * 0.229 + 0.485) * 255
    torch.testing.assert_close(pixels, torch.arange(16) * 17.0, rtol=0, atol=1e-3)
