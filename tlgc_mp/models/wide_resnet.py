"""WideResNet for images of CIFAR's size.

*Wide Residual Networks*, S. Zagoruyko, N. Komodakis, https://arxiv.org/abs/1605.07146, pre-activation form, as Section
4.1 of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060) uses it: every convolution but the 3-to-16 stem
is replaced, the 1x1 shortcuts included; no dropout, no convolution bias, a dense linear head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvFactory = Callable[..., nn.Module]
"""Makes a convolution from (in_channels, out_channels, kernel_size, stride=..., padding=...)."""

STEM_WIDTH = 16


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
        out = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + residual


class WideResNet(nn.Module):
    """WideResNet-``depth``-``width``: (B, 3, H, W) -> (B, num_classes) logits, channels_last from stem to head.

    Args:
        depth: l = 6 u + 4, with u residual units in each of the three stages.
        width: w, the channels of the stages being 16 w, 32 w and 64 w.
        num_classes: C.
        conv: makes every convolution but the stem.
    """

    def __init__(self, depth: int, width: int, num_classes: int, conv: ConvFactory) -> None:
        super().__init__()
        units = (depth - 4) // 6
        self.stem = nn.Conv2d(3, STEM_WIDTH, 3, padding=1, bias=False)
        stages = []
        channels = STEM_WIDTH
        for stage, stage_channels in enumerate((16 * width, 32 * width, 64 * width)):
            for unit in range(units):
                stride = 2 if stage > 0 and unit == 0 else 1
                stages.append(ResidualUnit(channels, stage_channels, stride, conv))
                channels = stage_channels
        self.units = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.units(self.stem(images.contiguous(memory_format=torch.channels_last)))
        x = F.relu(self.bn(x), inplace=True)
        # Unlike a mean, pooling hands a channels_last gradient back.
        return self.head(F.avg_pool2d(x, x.shape[2:]).flatten(1))
