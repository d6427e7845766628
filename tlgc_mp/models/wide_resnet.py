"""WideResNet for images of CIFAR's and of ImageNet's size.

*Wide Residual Networks*, S. Zagoruyko, N. Komodakis, https://arxiv.org/abs/1605.07146, pre-activation form, as Section
4.1 of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060) uses it: every convolution but the stem is
replaced, the 1x1 shortcuts included; no dropout, no convolution bias, a dense linear head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvFactory = Callable[..., nn.Module]
"""Makes a convolution from (in_channels, out_channels, kernel_size, stride=..., padding=...)."""


class ResidualUnit(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3 plus the identity, or a 1x1 shortcut where the shape changes (Figure 3).

    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv: ConvFactory) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, stride=1, padding=1)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = conv(in_channels, out_channels, 1, stride=stride, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        residual = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + residual


class WideResNet(nn.Module):
    """Residual units between a stem and a linear head: (B, 3, H, W) -> (B, num_classes) logits, channels_last
    throughout.

    Args:
        stem: makes the first unit's input of the images.
        stem_channels: of what the stem makes.
        stages: (channels, units) of each stage; the first unit of each but the first stage halves height and width.
        num_classes: C.
        conv: makes every convolution of the units.

    Attributes:
        block_types: the classes of its residual blocks.
        channels_apart: classes whose code between layers, like that of this one, mixes no channels, pads none, and does
            not read how many there are, so that a share of the channels goes through as all of them do.
    """

    block_types: tuple[type[nn.Module], ...] = (ResidualUnit,)
    channels_apart: tuple[type[nn.Module], ...] = (ResidualUnit,)

    def __init__(
        self,
        stem: nn.Module,
        stem_channels: int,
        stages: Sequence[tuple[int, int]],
        num_classes: int,
        conv: ConvFactory,
    ) -> None:
        super().__init__()
        self.stem = stem
        units = []
        channels = stem_channels
        for stage, (stage_channels, count) in enumerate(stages):
            for unit in range(count):
                stride = 2 if stage > 0 and unit == 0 else 1
                units.append(ResidualUnit(channels, stage_channels, stride, conv))
                channels = stage_channels
        self.units = nn.Sequential(*units)
        self.bn = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.units(self.stem(images.contiguous(memory_format=torch.channels_last)))
        x = F.relu(self.bn(x), inplace=True)
        # Unlike a mean, pooling hands a channels_last gradient back.
        logits: Tensor = self.head(F.avg_pool2d(x, x.shape[2:]).flatten(1))
        return logits


def cifar_wide_resnet(depth: int, width: int, num_classes: int, conv: ConvFactory) -> WideResNet:
    """WRN-``depth``-``width`` for CIFAR: depth = 6 u + 4, u units in each stage of 16 w, 32 w and 64 w channels."""
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    units = (depth - 4) // 6
    return WideResNet(stem, 16, [(16 * width, units), (32 * width, units), (64 * width, units)], num_classes, conv)


def imagenet_wide_resnet(num_classes: int, conv: ConvFactory) -> WideResNet:
    """WRN-34-2 for ImageNet: stem and stages as in ResNet-34 (K. He et al., https://arxiv.org/abs/1512.03385, Table 1),
    the stages twice as wide."""
    return WideResNet(imagenet_stem(), 64, [(128, 3), (256, 4), (512, 6), (1024, 3)], num_classes, conv)


def imagenet_stem() -> nn.Module:
    """(B, 3, H, W) -> (B, 64, H / 4, W / 4), H and W rounded up."""
    return nn.Sequential(nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1))
