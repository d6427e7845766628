"""MobileNetV2 whose 1x1 convolutions are replaced.

*MobileNetV2: Inverted Residuals and Linear Bottlenecks*, M. Sandler et al., https://arxiv.org/abs/1801.04381, as
torchvision builds it and as Section 4.2 of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060) uses it:
the stem, the depthwise convolutions and the classifier stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import Conv2dNormActivation

from tlgc_mp.models.wide_resnet import ConvFactory

LAST = "features.18.0"
"""The last 1x1 convolution, from 320 to 1280 channels."""


class MobileNetV2(torchvision.models.MobileNetV2):  # type: ignore[misc]  # it has no types
    """(B, 3, H, W) -> (B, num_classes) logits, channels_last from stem to classifier.

    Modules have torchvision's names: with dense convolutions, either's weights load into the other.

    Args:
        num_classes: C.
        conv: makes every 1x1 convolution but the last.
        last_conv: makes the last one: a group convolution where the others are two-level, or else the counts are not
            those of the paper's Table 4.
        dropout: the share of the classifier's inputs that training drops.

    Attributes:
        block_types: the classes of its residual blocks.
        channels_apart: classes whose code between layers, like that of this one, mixes no channels, pads none, and does
            not read how many there are, so that a share of the channels goes through as all of them do.
    """

    block_types: tuple[type[nn.Module], ...] = (InvertedResidual,)
    channels_apart: tuple[type[nn.Module], ...] = (InvertedResidual, Conv2dNormActivation)

    def __init__(self, num_classes: int, conv: ConvFactory, last_conv: ConvFactory, dropout: float = 0.2) -> None:
        super().__init__(num_classes=num_classes, dropout=dropout)
        pointwise = [
            (name, module)
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        ]
        for name, module in pointwise:
            make = last_conv if name == LAST else conv
            self.set_submodule(name, make(module.in_channels, module.out_channels, 1, stride=1, padding=0))

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images.contiguous(memory_format=torch.channels_last))
        # torchvision's own ending takes a mean, which hands back a gradient in another format.
        logits: Tensor = self.classifier(F.avg_pool2d(x, x.shape[2:]).flatten(1))
        return logits
