"""Models of torchvision and timm by name, without weights that somebody trained.

Any of them will do that maps images (B, 3, H, W), or videos (B, 3, T, H, W), to logits (B, classes), in training too:
what is minimized is a cross-entropy of logits. A forward pass on the meta device, which computes nothing, shows which
ones do. ``tlgc-mp train`` has data sets of images only.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError, one_of
from tlgc_mp.models.names import library_model
from tlgc_mp.nn.window import channels_last_of

BATCH = 2
"""Images of a trial forward pass: BatchNorm takes no batch of one where a channel has one value."""

USUAL_SIZE = 224
"""Pixels a side, of images for models that do not say which they take."""

FRAMES = 16
"""Images of a video, in a trial forward pass."""

_NO_CLASSIFIERS = {
    "detection": "a detector, which is trained on losses of boxes",
    "segmentation": "a segmentation network, which gives logits for each pixel",
    "optical_flow": "a network for optical flow, which takes two images",
    "googlenet": "which gives the logits of auxiliary classifiers as well in training",
    "inception": "which gives the logits of auxiliary classifiers as well in training",
}
"""Part of a torchvision builder's module -> why its models do not train on a cross-entropy of logits."""

_OWN_LOOP = "train it with tlgc_mp.initialize in a loop of your own, as docs/other_models.md shows"


def takes_videos(name: str) -> bool:
    """Whether it is a model of torchvision that takes (B, 3, T, H, W)."""
    return "video" in _modules_of(name)


def _modules_of(name: str) -> list[str]:
    """The parts of the name of the module that builds a model of torchvision; none for other models."""
    found = library_model(name)
    if found is None or found[0] != "torchvision":
        return []
    from torchvision.models import get_model_builder, list_models

    _check_known(name, found[1], list_models())
    module: str = get_model_builder(found[1]).__module__
    return module.split(".")


def check_trainable(name: str) -> None:
    """Raises :class:`UsageError` unless the library has such a model, and it gives logits for images."""
    if takes_videos(name):
        raise _no_classifier(name, "a network for videos")
    check_classifier(name)


@functools.cache
def check_classifier(name: str) -> None:
    """Raises :class:`UsageError` unless the library has such a model, and it gives logits for images or videos."""
    library, own_name = _parts(name)
    if library == "torchvision":
        for part in _modules_of(name):
            if part in _NO_CLASSIFIERS:
                raise _no_classifier(name, _NO_CLASSIFIERS[part])
    else:
        import timm

        if not timm.is_model(own_name):  # which knows names of the past as well
            _check_known(name, own_name, timm.list_models())
    classes = 10
    model = _on_meta(name, classes)
    height, width = _made_for(model)
    frames = (FRAMES,) if takes_videos(name) else ()
    try:
        found = output_on_meta(model, BATCH, *frames, height, width)
    except Exception as error:  # the model's own code may raise anything
        raise _no_classifier(name, f"which cannot take {height} x {width} images ({_in_a_line(error)})") from error
    if not isinstance(found, Tensor):
        raise _no_classifier(name, f"which gives a {type(found).__name__} in training")
    if tuple(found.shape) != (BATCH, classes):
        raise _no_classifier(name, f"which gives a tensor of shape {tuple(found.shape)} for B={BATCH}, {classes=}")


def check_images(name: str, image_size: int, batch_size: int) -> None:
    """Raises :class:`UsageError` unless the model trains on batches (``batch_size``, 3, ``image_size``,
    ``image_size``)."""
    check_trainable(name)
    model = _on_meta(name, 10)
    try:
        output_on_meta(model, batch_size, image_size, image_size)
    except Exception as error:  # the model's own code may raise anything
        height, width = _made_for(model)
        raise UsageError(
            f"model={name!r} must have images that it can take, got {batch_size} of {image_size} x {image_size} pixels "
            f"({_in_a_line(error)}); use images of {height} x {width} (--image-size {height}), for which it is made"
        ) from error


def build_on_meta(name: str, num_classes: int) -> nn.Module:
    """The model on the meta device, where it has names and shapes and no values.

    Raises:
        UsageError: as :func:`check_classifier`.
    """
    check_classifier(name)
    return _on_meta(name, num_classes)


def build(name: str, num_classes: int) -> nn.Module:
    """The model with its initial weights, which the library's own code draws from torch's random state.

    Raises:
        UsageError: as :func:`check_classifier`.
    """
    check_classifier(name)
    return _builder(name)(num_classes=num_classes)


def _parts(name: str) -> tuple[str, str]:
    parts = library_model(name)
    assert parts is not None, f"{name!r} is a model of this package"
    return parts


def _builder(name: str) -> Callable[..., nn.Module]:
    library, own_name = _parts(name)
    if library == "torchvision":
        from torchvision.models import get_model

        return functools.partial(get_model, own_name, weights=None)
    import timm

    return functools.partial(timm.create_model, own_name, pretrained=False)


def _on_meta(name: str, num_classes: int) -> nn.Module:
    builder = _builder(name)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return builder(num_classes=num_classes)
        except (NotImplementedError, RuntimeError):  # torchvision's RegNet computes its widths with tensors
            with torch.device("cpu"):
                return builder(num_classes=num_classes).to("meta")


def _made_for(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that the model says it takes, else of the usual ones."""
    described = getattr(model, "default_cfg", None) or {}  # timm's
    if "input_size" in described:
        _, height, width = described["input_size"]
        return height, width
    size = getattr(model, "image_size", USUAL_SIZE)  # of torchvision's ViT
    return size, size


def output_on_meta(model: nn.Module, batch_size: int, *size: int) -> object:
    """What the model, which is on the meta device, gives in training for images or videos of that size, (H, W) or
    (T, H, W)."""
    images = torch.empty(batch_size, 3, *size, device="meta")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return model.train()(images.to(memory_format=channels_last_of(images)))


def _check_known(name: str, own_name: str, known: list[str]) -> None:
    if own_name in known:
        return
    library = name.partition(":")[0]
    near = difflib.get_close_matches(own_name, known, n=5)
    hint = one_of([f"{library}:{match}" for match in near]) if near else f"a name of {library}'s list_models()"
    raise UsageError(f"model must be a model that {library} has, got {name!r}; use {hint}")


def _no_classifier(name: str, what: str) -> UsageError:
    return UsageError(f"model must give logits (B, classes) for images (B, 3, H, W), got {name!r}, {what}; {_OWN_LOOP}")


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
