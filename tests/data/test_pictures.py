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


RED, BLUE, WHITE = (200, 30, 30), (3, 4, 250), (255, 255, 255)


def _saved(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    """What is read of a picture, after it was saved."""
    image.save(path, **options)
    return np.asarray(read_image(str(path)))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("webp", {"lossless": True}), ("tif", {}), ("tga", {}), ("jp2", {}), ("gif", {})],
)
def test_what_is_transparent_lies_on_white(suffix: str, options: dict[str, object], tmp_path: Path) -> None:
    """Whatever its colour is: below it is black, and so is the picture."""
    image = Image.new("RGBA", (12, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (3, 2, 9, 6))
    expected = np.full((8, 12, 3), 255, np.uint8)
    expected[2:6, 3:9] = 0
    assert (_saved(image, tmp_path / f"0.{suffix}", **options) == expected).all()


def test_partly_transparent(tmp_path: Path) -> None:
    values = np.random.default_rng(SEED).integers(0, 256, (8, 12, 2))
    image = Image.fromarray(values.astype(np.uint8), "LA")
    grey, opaque = values[..., 0], values[..., 1] / 255
    expected = grey * opaque + 255 * (1 - opaque)
    got = _saved(image, tmp_path / "0.png").astype(int)
    assert np.abs(got - expected[..., None]).max() <= 1, SEED
    assert (got[values[..., 1] == 255] == grey[values[..., 1] == 255, None]).all()


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_a_palette_with_a_transparent_colour(transparency: object, tmp_path: Path) -> None:
    image = Image.new("P", (12, 8), 1)
    image.putpalette([0, 0, 0, *RED, *[0] * 762])
    image.paste(0, (0, 0, 6, 8))
    got = _saved(image, tmp_path / "0.png", transparency=transparency)
    assert (got[:, :6] == WHITE).all() and (got[:, 6:] == RED).all()
    grey = _saved(Image.fromarray(np.array([[7, 8]], np.uint8)), tmp_path / "grey.png", transparency=7)
    assert grey[0].tolist() == [[255] * 3, [8] * 3]


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("CMYK", (255, 0, 0, 0), "jpg", (0, 255, 255)),
        ("CMYK", (255, 0, 0, 0), "tif", (0, 255, 255)),
        ("YCbCr", (128, 128, 128), "tif", (128, 128, 128)),
        ("LAB", (128, 128, 128), "tif", (119, 119, 119)),  # of which A is no transparency
        ("1", 1, "png", WHITE),
        ("1", 1, "bmp", WHITE),
    ],
)
def test_other_kinds_of_colour(
    mode: str, colour: int | tuple[int, ...], suffix: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert np.abs(_saved(Image.new(mode, (16, 16), colour), tmp_path / f"0.{suffix}") - np.array(expected)).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_of_several(suffix: str, tmp_path: Path) -> None:
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), BLUE)]}
    more |= {"lossless": True} if suffix == "webp" else {}
    assert (_saved(Image.new("RGB", (16, 16), RED), tmp_path / f"0.{suffix}", **more) == RED).all()


def _cut(path: Path, share: float, **options: object) -> Path:
    Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (64, 64, 3), np.uint8)).save(path, **options)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404")
    Image.new("L", (4000, 2)).save(tmp_path / "strip.png")
    said = [
        ("page.jpg", r"page.jpg' \(what it holds is no image of a format that is read\); replace or remove it"),
        ("strip.png", r"strip.png' \(4000 x 2 pixels: one side is over 200 times the other\)"),
        (_cut(tmp_path / "half.jpg", 0.5).name, "half.jpg' .image file is truncated"),
        (_cut(tmp_path / "end.jpg", 0.9, progressive=True).name, "end.jpg' .image file is truncated"),
        (_cut(tmp_path / "half.png", 0.5).name, "half.png' .image file is truncated"),
    ]
    for name, reason in said:
        with pytest.raises(UsageError, match=reason):
            read_image(str(tmp_path / name))
    Image.new("L", (4000, 20)).save(tmp_path / "long.png")
    assert read_image(str(tmp_path / "long.png")).size == (4000, 20)


def test_in_a_data_set(make_folders: MakeFolders) -> None:
    root = make_folders({"train/cat": 1, "train/dog": 1, "test/cat": 1, "test/dog": 1})
    ramp = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    Image.fromarray(ramp).save(root / "test/cat/0.png")
    image = load_datasets("imagefolder", str(root), seed=0).test[0][0]
    pixels = (image[0, 0] * 0.229 + 0.485) * 255
    torch.testing.assert_close(pixels, torch.arange(16) * 17.0, rtol=0, atol=1e-3)
