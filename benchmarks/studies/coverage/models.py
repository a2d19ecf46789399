"""The list: what each model is called, how it is built, at which input, and which part of it is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

_CLASSIFICATION = """
alexnet convnext_tiny convnext_small@128 densenet121 densenet161@128 densenet169@128 densenet201@64 efficientnet_b0
efficientnet_b1@128 efficientnet_b2@128 efficientnet_b3@128 efficientnet_b4@128 efficientnet_b5@96 efficientnet_b6@128
efficientnet_b7@96 efficientnet_v2_s@128 efficientnet_v2_m@128 googlenet inception_v3 maxvit_t
mnasnet1_0 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_x_800mf regnet_x_1_6gf
regnet_x_3_2gf@128 regnet_x_8gf@96 regnet_x_16gf@96 regnet_x_32gf@64 regnet_y_400mf regnet_y_800mf regnet_y_1_6gf
regnet_y_3_2gf@128 regnet_y_8gf@96 regnet_y_16gf@64 regnet_y_32gf@64 resnet18 resnet34 resnet50 resnet101@128
resnet152@128 resnext50_32x4d@128 resnext101_32x8d@96 resnext101_64x4d@96 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1
swin_t swin_s swin_v2_t swin_v2_s@128 vgg11@96 vgg11_bn@96 vgg13@96 vgg13_bn@96 vgg16@96 vgg16_bn@96 vgg19@96
vgg19_bn@96 vit_b_16 vit_b_32 wide_resnet50_2@128 wide_resnet101_2@96
"""
"""`name@side` if the input is smaller than the library's default. Models that differ only in width are listed once."""

_SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
_VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d swin3d_t"
_DETECTORS = """
fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_fpn retinanet_resnet50_fpn fcos_resnet50_fpn ssd300_vgg16
ssdlite320_mobilenet_v3_large
"""

_DETECTOR_SIZES: Mapping[str, Mapping[str, int]] = {
    name: {"min_size": 160, "max_size": 160} for name in _DETECTORS.split()[:4]
}
"""What these bring an image to; the others have a size of their own."""

_TIMM = """
mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 levit_128s tiny_vit_5m_224
repvit_m0_9 fastvit_t8 mobileone_s0 mobilenetv4_conv_small mobilenetv4_hybrid_medium ghostnet_100 ghostnetv2_100
ghostnetv3_100 mixnet_s tinynet_a lcnet_100 hgnet_tiny hgnetv2_b0 starnet_s1 fasternet_t0 swiftformer_xs
poolformer_s12 poolformerv2_s12 convformer_s18@128 caformer_s18 coatnet_nano_rw_224 maxvit_nano_rw_256
maxxvit_rmlp_nano_rw_256 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 vit_tiny_patch16_224 vit_small_patch16_18x2_224 vit_relpos_small_patch16_224
vit_tiny_r_s16_p8_224 cait_xxs24_224 xcit_nano_12_p16_224 pvt_v2_b0 pvt_v2_b2_li twins_pcpvt_small twins_svt_small
pit_ti_224 crossvit_9_240 coat_tiny convit_tiny mixer_s16_224 gmlp_ti16_224 resmlp_12_224 convnext_atto
convnextv2_atto convnext_zepto_rms inception_next_atto focalnet_tiny_srf nest_tiny res2net50_26w_4s resnest14d
skresnet18 seresnet50 ecaresnet26t gcresnet33ts cspresnet50 cspdarknet53 cs3darknet_s darknet53 dla34 dpn68
hrnet_w18_small selecsls42 vovnet39a ese_vovnet19b_dw legacy_xception xception41 nfnet_f0 eca_nfnet_l0 nf_resnet26
resnetv2_50 resnetv2_50x1_bit regnetz_005 regnetv_040 rexnet_100 repvgg_a0 repghostnet_050 rdnet_tiny densenetblur121d
botnet26t_256 halonet26t lambda_resnet26t sebotnet33ts_256 bat_resnext26ts gernet_s inception_v4 inception_resnet_v2
convmixer_768_32 hardcorenas_a fbnetc_100 hiera_tiny_224 davit_tiny efficientvit_b0 efficientvit_l1 efficientvit_m0
efficientnet_lite0 tf_efficientnetv2_b0 efficientnet_b0_gn efficientnet_b0_g16_evos semnasnet_075 spnasnet_100
mobilenet_edgetpu_100 mobilenetv1_100 resnet26d resnetaa50 resnet50_gn tresnet_m visformer_tiny volo_d1_224
tnt_s_patch16_224 gcvit_xxtiny mvitv2_tiny nextvit_small sequencer2d_s shvit_s1 mambaout_femto iformer_t cspnext_tiny
lowformer_b0 lcnetv2_small pnasnet5large@96 nasnetalarge@96 eva02_tiny_patch14_224 beit_base_patch16_224
legacy_seresnet18 vitamin_small_224 samvit_base_patch16_224 csatv2
"""


@dataclass(frozen=True, slots=True)
class Model:
    """One row of the table.

    Attributes:
        name: unique; the part after `/` is the part that is cut.
        family: `torchvision`, `segmentation`, `video`, `detection` or `timm`.
        spec: as on the command line: a library's name, or `package.module:CALLABLE` of a builder below.
        shape: of the example input; None for the model's own.
        arguments: of the builder.
        part: submodule that is cut; None for the whole model.
        note: how it differs from what the library ships.
    """

    name: str
    family: str
    spec: str
    shape: tuple[int, ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    part: str | None = None
    note: str = ""


def _sized(text: str, family: str, prefix: str = "") -> Iterator[Model]:
    for word in text.split():
        name, _, side = word.partition("@")
        shape = (1, 3, int(side), int(side)) if side else None
        yield Model(prefix + name, family, prefix + name, shape, note=f"input {side} x {side}" if side else "")


_HERE = "benchmarks.studies.coverage.models"
_SMALLER = (
    Model(
        "efficientnet_v2_l, half the blocks",
        "torchvision",
        f"{_HERE}:efficientnet_v2_l",
        (1, 3, 96, 96),
        note="half of the blocks of each stage, 96 x 96",
    ),
    Model("vit_l_16, 4 blocks", "torchvision", f"{_HERE}:vit_l_16", (1, 3, 64, 64), note="4 of 24 blocks, 64 x 64"),
    Model("vit_l_32, 4 blocks", "torchvision", f"{_HERE}:vit_l_32", (1, 3, 64, 64), note="4 of 24 blocks, 64 x 64"),
    Model("vit_h_14, 2 blocks", "torchvision", f"{_HERE}:vit_h_14", (1, 3, 56, 56), note="2 of 32 blocks, 56 x 56"),
    Model(
        "regnet_y_128gf, 3 blocks",
        "torchvision",
        f"{_HERE}:regnet_y_128gf",
        (1, 3, 64, 64),
        note="3 of 27 blocks, 64 x 64",
    ),
)


def models() -> tuple[Model, ...]:
    """Return the whole list, in the order of the table."""
    segmentation = (
        Model(name, "segmentation", name, (1, 3, 96, 96), note="input 96 x 96") for name in _SEGMENTATION.split()
    )
    video = (
        Model(name, "video", name, _CLIPS.get(name, (1, 3, 8, 64, 64)), note="short clip") for name in _VIDEO.split()
    )
    detection = (
        Model(f"{name}/backbone", "detection", name, (1, 3, 160, 160), _DETECTOR_SIZES.get(name, {}), "backbone", note)
        for name in _DETECTORS.split()
        for note in ["image 160 x 160" if name in _DETECTOR_SIZES else ""]
    )
    return (
        *_sized(_CLASSIFICATION, "torchvision"),
        *_SMALLER,
        *segmentation,
        *video,
        *_SMALLER_VIDEO,
        *detection,
        *_sized(_TIMM, "timm", "timm:"),
    )


_CLIPS = {"s3d": (1, 3, 16, 224, 224)}
_CLIP = (1, 3, 8, 112, 112)
_SMALLER_VIDEO = (
    Model("mvit_v1_b, 4 blocks", "video", f"{_HERE}:mvit_v1_b", _CLIP, note="4 of 16 blocks, short clip"),
    Model("mvit_v2_s, 4 blocks", "video", f"{_HERE}:mvit_v2_s", _CLIP, note="4 of 16 blocks, short clip"),
)

CI_SLICE = ("timm:lcnet_100", "timm:fasternet_t0")
"""What the tests run."""


def _vision_transformer(patch: int, side: int, blocks: int, heads: int, width: int) -> nn.Module:
    from surgery.inputs import import_torchvision

    module: nn.Module = import_torchvision().models.VisionTransformer(
        image_size=side, patch_size=patch, num_layers=blocks, num_heads=heads, hidden_dim=width, mlp_dim=4 * width
    )
    return module


def vit_l_16() -> nn.Module:
    """ViT-L/16 with 4 of its 24 blocks."""
    return _vision_transformer(16, 64, 4, 16, 1024)


def vit_l_32() -> nn.Module:
    """ViT-L/32 with 4 of its 24 blocks."""
    return _vision_transformer(32, 64, 4, 16, 1024)


def vit_h_14() -> nn.Module:
    """ViT-H/14 with 2 of its 32 blocks."""
    return _vision_transformer(14, 56, 2, 16, 1280)


def _multiscale(channels: list[int], *, first: bool, **options: Any) -> nn.Module:
    """A multiscale vision transformer of four blocks; `first`: as in version 1, which widens a block earlier."""
    from surgery.inputs import import_torchvision

    mvit = import_torchvision().models.video.mvit
    halved, kept = [1, 2, 2], [] if first else [1, 1, 1]
    strides = [kept, halved, kept, halved]
    coarse = [[1, 8, 8], [1, 4, 4], [1, 4, 4], [1, 2, 2]]
    blocks = [
        mvit.MSBlockConfig(heads, before, after, [3, 3, 3] if q else [], [3, 3, 3], q, kv)
        for heads, (before, after), q, kv in zip([1, 2, 2, 4], pairwise(channels), strides, coarse, strict=True)
    ]
    module: nn.Module = mvit.MViT(
        spatial_size=_CLIP[3:], temporal_size=_CLIP[2], block_setting=blocks, residual_pool=not first, **options
    )
    return module


def mvit_v1_b() -> nn.Module:
    """MViTv1-B with 4 of its 16 blocks."""
    return _multiscale(
        [96, 192, 192, 384, 384], first=True, residual_with_cls_embed=False, rel_pos_embed=False, proj_after_attn=False
    )


def mvit_v2_s() -> nn.Module:
    """MViTv2-S with 4 of its 16 blocks."""
    return _multiscale(
        [96, 96, 192, 192, 384], first=False, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True
    )


def efficientnet_v2_l() -> nn.Module:
    """EfficientNetV2-L with half of the blocks of each stage."""
    from surgery.inputs import import_torchvision

    efficientnet = import_torchvision().models.efficientnet
    stages, last = efficientnet._efficientnet_conf("efficientnet_v2_l")
    for stage in stages:
        stage.num_layers = (stage.num_layers + 1) // 2
    module: nn.Module = efficientnet.EfficientNet(stages, 0.4, last_channel=last)
    return module


def regnet_y_128gf() -> nn.Module:
    """RegNetY-128GF with one block in each of its first three stages."""
    from surgery.inputs import import_torchvision

    regnet = import_torchvision().models.regnet
    full = regnet.BlockParams.from_init_params(depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25)
    first = slice(0, 3)
    short = regnet.BlockParams(
        [1, 1, 1],
        full.widths[first],
        full.group_widths[first],
        full.bottleneck_multipliers[first],
        full.strides[first],
        full.se_ratio,
    )
    module: nn.Module = regnet.RegNet(short)
    return module
