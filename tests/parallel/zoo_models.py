"""The networks of the zoo: every model of torchvision, at least one of every module of timm, at sizes that run fast.

None is downloaded. Models that drop something do so: with a tenth of what they can drop, where they let it be chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TIMM = """
beit                    beit_base_patch16_224               64  img_size depth=2
byoanet                 eca_botnext26ts_256                 64  img_size
byoanet                 halonet_h1                         256
byobnet                 test_byobnet                        64
cait                    cait_xxs24_224                      64  img_size depth=2
coat                    coat_lite_tiny                      64  img_size
coat                    coat_tiny                           64  img_size
convit                  convit_tiny                         64  img_size depth=4
convmixer               convmixer_768_32                  96
convnext                test_convnext                       64
convnext                test_convnext2                      64
cpubone                 cpubone_nano                        64
crossvit                crossvit_tiny_240                   64
csatv2                  csatv2                              64
cspnet                  cs3darknet_focus_s                  64
cspnext                 cspnext_tiny                        64
davit                   davit_tiny                          64
deepseek_vit            deepseek_vit_412m                  546  depth=2
deit                    deit3_small_patch16_224             64  img_size depth=2
deit                    deit_small_distilled_patch16_224    64  img_size depth=2
densenet                densenet121                         64
dla                     dla34                               64
dla                     dla46x_c                            64
dpn                     dpn48b                              64
edgenext                edgenext_xx_small                   64
efficientformer         efficientformer_l1                 224
efficientformer_v2      efficientformerv2_s0                64  img_size
efficientnet            mixnet_s                            64
efficientnet            mnasnet_small                       64
efficientnet            test_efficientnet                   64
efficientnet            test_efficientnet_evos              64
efficientnet            test_efficientnet_gn                64
efficientnet            test_efficientnet_ln                64
efficientvim            efficientvim_m1                   128
efficientvit_mit        efficientvit_b0                     64
efficientvit_msra       efficientvit_m0                   128  img_size
eva                     eva02_tiny_patch14_224              64  img_size depth=2
fasternet               fasternet_t0                        64
fastvit                 fastvit_t8                          64
focalnet                focalnet_tiny_srf                   64
gcvit                   gcvit_xxtiny                        64  img_size
gemma4_vit              gemma4_vit_167m                     64  img_size depth=2
ghostnet                ghostnet_050                        64
ghostnet                ghostnetv2_100                    128
ghostnet                ghostnetv3_050                      64
hardcorenas             hardcorenas_a                       64
hgnet                   hgnetv2_b0                          64
hiera                   hiera_tiny_224                      64  img_size
hieradet_sam2           sam2_hiera_tiny                     64
hrnet                   hrnet_w18_small                     64
iformer                 iformer_t                         128
inception_next          inception_next_atto                 64
inception_resnet_v2     inception_resnet_v2                 96
inception_v3            inception_v3                      160
inception_v4            inception_v4                      160
lcnetv2                 lcnetv2_small                       64
levit                   levit_128s                        128  img_size
lowformer               lowformer_b0                        64
mambaout                test_mambaout                       64
maxxvit                 test_coatnet                        64  img_size
maxxvit                 test_maxvit                         64  img_size
metaformer              caformer_s18                        64
metaformer              convformer_s18                      64
mlp_mixer               gmixer_24_224                       64  img_size
mlp_mixer               gmlp_s16_224                        64  img_size
mlp_mixer               resmlp_12_224                       64  img_size
mobilenetv3             mobilenetv3_small_050               64
mobilenetv3             mobilenetv4_conv_small_035        128
mobilenetv5             mobilenetv5_base                    64
mobilevit               mobilevit_xxs                       64  img_size
mobilevit               mobilevitv2_050                     64  img_size
mvitv2                  mvitv2_tiny                         64  img_size
naflexvit               naflexvit_base_patch16_gap          64  img_size depth=2
nasnet                  nasnetalarge                        64
nest                    nest_tiny                           64  img_size
nextvit                 nextvit_small                       64
nfnet                   nf_regnet_b0                        64
nfnet                   test_nfnet                          64
pit                     pit_ti_224                          64  img_size
pnasnet                 pnasnet5large                       64
pvt_v2                  pvt_v2_b0                           64
qwen3_vit               qwen3_vit_88m                       64  img_size depth=2
rdnet                   rdnet_tiny                          64
regnet                  regnetx_002                         64
regnet                  regnety_002                         64
regnet                  regnetz_005                         64
repghost                repghostnet_050                     64
repvit                  repvit_m0_9                         64  img_size
res2net                 res2net50_14w_8s                    64
resnest                 resnest14d                          64
resnet                  ecaresnet26t                        64
resnet                  resnetblur50                        64
resnet                  seresnet18                          64
resnet                  test_resnet                         64
resnetv2                resnetv2_18                         64
rexnet                  rexnet_100                          64
selecsls                selecsls42                        128
senet                   legacy_seresnet18                   64
sequencer               sequencer2d_s                       64  img_size
shvit                   shvit_s1                          128
sknet                   skresnet18                          64
starnet                 starnet_s050                        64
swiftformer             swiftformer_xs                      64  img_size
swin_transformer        swin_tiny_patch4_window7_224        64  img_size
swin_transformer_v2     swinv2_tiny_window8_256             64  img_size
swin_transformer_v2_cr  swinv2_cr_tiny_224                  64  img_size
tiny_vit                tiny_vit_5m_224                     64
tnt                     tnt_s_patch16_224                   64  img_size
tresnet                 tresnet_m                           64
twins                   twins_pcpvt_small                   64  img_size
twins                   twins_svt_small                     64  img_size
vgg                     vgg11_bn                            64
visformer               visformer_tiny                      64  img_size
vision_transformer      test_vit                            64  img_size
vision_transformer      test_vit2                           64  img_size
vision_transformer_hybrid  vit_tiny_r_s16_p8_224            64  img_size depth=2
vision_transformer_relpos  test_vit_relpos                  64  img_size
vision_transformer_sam  samvit_base_patch16_224             64  img_size depth=2
vitamin                 vitamin_small_224                   64  img_size
volo                    volo_d1_224                         64  img_size
vovnet                  ese_vovnet19b_dw                    64
xception                legacy_xception                     64
xception_aligned        xception41                          64
xcit                    xcit_nano_12_p16_224                64  img_size depth=2
"""
"""Module of timm, model, height and width of its images; ``img_size`` where the model has to be told, and options."""

SIDES = {"inception_v3": 299, "quantized_inception_v3": 299, "maxvit_t": 224, "vit_h_14": 42}
"""Of a classifier of torchvision that does not take 64 x 64."""

BUILT_WITH: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": True},
    **{f"vit_{name}_16": {"image_size": 64} for name in "bl"},
    **{f"vit_{name}_32": {"image_size": 64} for name in "bl"},
    "vit_h_14": {"image_size": 42},
    "keypointrcnn_resnet50_fpn": {"num_classes": 2, "num_keypoints": 3},
}
"""What a model of torchvision is built with, beside its number of classes."""

CLIPS = dict.fromkeys(("mvit_v1_b", "mvit_v2_s", "s3d"), (16, 224, 224))
"""Frames, height and width of what a video model takes that does not take 4 x 32 x 32."""


LARGE = ("vit_l_16", "vit_l_32", "convnext_large")
"""Of more than 190 million parameters: they are compared in float32."""
_TOO_LARGE = "about 640 million parameters; needs 20 GB in float32 to compare two ranks with one device on one machine"
TOO_LARGE = dict.fromkeys(("regnet_y_128gf", "vit_h_14"), _TOO_LARGE)
"""Of torchvision, with what would be needed."""


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        name: as its library calls it, after the library: ``timm/test_resnet``.
        family: its module in timm, or its kind in torchvision.
        make: builds it, with random weights.
        arguments: makes what it takes, with gradients for the images.
        dtype: that it computes in.
        skip: why it does not run here; empty where it does.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    arguments: Callable[[], tuple[Any, ...]]
    dtype: torch.dtype = torch.float64
    skip: str = ""


def _images(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(),)


def _detected() -> tuple[Any, ...]:
    """Two images of two sizes, and what is in them."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator).requires_grad_() for size in ((64, 80), (72, 64))]
    targets = []
    for image in images:
        corners = torch.rand(3, 2, generator=generator) * 24
        boxes = torch.cat([corners, corners + 16 + torch.rand(3, 2, generator=generator) * 20], 1)
        masks = torch.zeros(3, *image.shape[1:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        points = torch.stack([boxes[:, :2] + 2, boxes[:, :2] + 7, boxes[:, 2:] - 4], 1)
        seen = torch.ones(3, 3, 1)
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.ones(3, dtype=torch.long),
                "masks": masks,
                "keypoints": torch.cat([points, seen], 2).float(),  # torchvision takes no others
            }
        )
    return images, targets


def _flow() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(1, 3, 128, 128, generator=generator).mul(2).sub(1).requires_grad_() for _ in range(2)]
    return (*images, 2)  # updates of the flow


def _make_timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    for drops in ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}, {}):
        try:
            return timm.create_model(name, num_classes=10, **drops, **options)
        except TypeError as error:
            if not drops or "drop_" not in str(error):
                raise
    raise AssertionError("unreachable")


def _make_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def timm_networks() -> list[Network]:
    networks = []
    for line in TIMM.split("\n")[1:-1]:
        module, name, size, *words = line.split()
        side = int(size)
        options: dict[str, Any] = {key: int(value) for key, _, value in (w.partition("=") for w in words) if value}
        if "img_size" in words:
            options["img_size"] = side
        make = functools.partial(_make_timm, name, options)
        networks.append(Network(f"timm/{name}", module, make, functools.partial(_images, 2, 3, side, side)))
    return networks


def torchvision_networks() -> list[Network]:
    import torchvision.models as models

    kinds = {
        "classification": (models, {"num_classes": 10}),
        "quantizable": (models.quantization, {"num_classes": 10, "quantize": False}),
        "segmentation": (models.segmentation, {"num_classes": 5, "weights_backbone": None, "aux_loss": True}),
        "video": (models.video, {"num_classes": 10}),
        "detection": (models.detection, {"num_classes": 4, "weights_backbone": None}),
        "optical flow": (models.optical_flow, {}),
    }
    networks = []
    for family, (module, common) in kinds.items():
        for name in models.list_models(module=module):
            options = {**common, **BUILT_WITH.get(name, {})}
            if family == "segmentation" and name.startswith("lraspp"):
                del options["aux_loss"]
            if family == "detection" and not name.startswith("ssd"):
                options |= {"min_size": 64, "max_size": 96}
            side = SIDES.get(name, 64)
            arguments: Callable[[], tuple[Any, ...]] = functools.partial(_images, 2, 3, side, side)
            if family == "video":
                arguments = functools.partial(_images, 2, 3, *CLIPS.get(name, (4, 32, 32)))
            elif family == "detection":
                arguments = _detected
            elif family == "optical flow":
                arguments = _flow
            # What a flow is looked up with is float32 whatever the network is.
            dtype = torch.float32 if family == "optical flow" or name in LARGE + tuple(TOO_LARGE) else torch.float64
            make = functools.partial(_make_torchvision, name, options)
            skip = TOO_LARGE.get(name, "")
            networks.append(Network(f"torchvision/{name}", family, make, arguments, dtype, skip))
    return networks


def zoo() -> dict[str, Network]:
    """Name -> network, of all."""
    return {network.name: network for network in (*torchvision_networks(), *timm_networks())}
