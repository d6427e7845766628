"""Reads an image file as it is meant to be seen: upright, on white where it is transparent, over its whole range."""

import contextlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tlgc_mp.errors import must_be

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
_LONGEST = 200
"""How many times as long as the other a side may be: the shorter one is resized, and the longer one grows with it."""


def read_image(path: str) -> Image.Image:
    """The image in RGB, 8 bits a channel, turned as its EXIF orientation says.

    Integers of 9 to 16 bits a pixel are scaled from the range that their bits allow, floating-point values from 0..1.
    What is transparent lies on white; of an animation or several pages the first one is read.

    Raises:
        UsageError: it cannot be read, is a strip, or its values have another range or one that the file does not say.
    """
    try:
        # Of a path, Pillow maps an uncompressed TIFF into memory, and takes its sides for those after turning it.
        with open(path, "rb") as file, Image.open(file) as image:
            if max(image.size) > _LONGEST * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels: one side is over {_LONGEST} times the other")
            image.load()
            _turn_upright(image)
            return _on_white(_in_eight_bits(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        unknown = isinstance(error, UnidentifiedImageError)  # which says where, too
        note = "what it holds is no image of a format that is read" if unknown else " ".join(str(error).split())
        one = "one that can be read"
        raise must_be("every image", one, str(path), "replace or remove it", note=f" ({note})") from error


def _turn_upright(image: Image.Image) -> None:
    with contextlib.suppress(Exception):  # EXIF that is damaged says nothing; the image is as good without
        ImageOps.exif_transpose(image, in_place=True)


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB. The colour of what is transparent is any, and often black like what is seen."""
    if image.getbands()[-1] not in ("A", "a") and "transparency" not in image.info:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """An image of one channel of more than 8 bits, which Pillow would clip; others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN neither
            raise ValueError(
                f"floating-point values must lie in 0 to 1, got {values.min():g} to {values.max():g}: scale them"
            )
        largest = 1
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # those of 16 bits
        raise ValueError("the file does not say the range of its 32-bit or signed integers: save it in 8 or 16 bits")
    else:
        largest = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    values = (values * (255 / largest)).round().clip(0, 255)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 255 - values
    return Image.fromarray(values.astype(np.uint8))
