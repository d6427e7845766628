"""What is done to an image before a network sees it: told once, kept with the weights, and done again at each use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict, cast

from torch import Tensor
from torchvision import transforms

from tlgc_mp.errors import UsageError, is_count
from tlgc_mp.json_types import Json, JsonObject


class _Entry(TypedDict):
    """A :class:`Preparation` as JSON holds it."""

    classes: Sequence[str]
    image_size: int
    resize: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Preparation:
    """Of an image that is tested or labelled.

    Attributes:
        classes: their names, in the order of the network's outputs.
        image_size: of the square that the network takes, in pixels.
        resize: what the shorter side becomes, before that square is cut from the middle.
        mean, std: of each channel, pixels scaled to 0..1.
    """

    classes: tuple[str, ...]
    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self) -> transforms.Compose:
        """Of a picture, to a tensor 3 x ``image_size`` x ``image_size``."""
        steps = [transforms.Resize(self.resize), transforms.CenterCrop(self.image_size)]
        return transforms.Compose([*steps, *self.to_tensor()])

    def to_tensor(self) -> list[Callable[..., Tensor]]:
        """The end of it, which is that of training too."""
        return [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]

    def entry(self) -> JsonObject:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def from_entry(entry: Json, classes: int) -> Preparation:
        """What :meth:`entry` has made, for a network of so many classes.

        Raises:
            UsageError: it has not made that.
        """
        try:
            held = cast(_Entry, entry)
            mean, std = (tuple(map(float, values)) for values in (held["mean"], held["std"]))
            made = Preparation(tuple(held["classes"]), held["image_size"], held["resize"], mean, std)
        except (KeyError, TypeError, ValueError):
            made = None
        if (
            made is None
            or not all(isinstance(name, str) for name in made.classes)
            or len(made.classes) != classes
            or not (is_count(made.image_size) and is_count(made.resize))
            or not len(made.mean) == len(made.std) == 3
            or not all(made.std)
        ):
            raise UsageError("it does not say how images are prepared for it; export it again from its run")
        return made
