"""Whole torchvision architectures at reduced input, library-default weights, cut at random and checked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Cutting, cut_model

from surgery.core.counting import count_macs
from surgery.coupling.cost import cost_functions
from surgery.inputs import import_torchvision

# Widths of ViT-B/16, with 3 of its 12 blocks.
VIT = {"image_size": 32, "patch_size": 16, "num_layers": 3, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}

CONVNEXT = (96, 192, 384, 768, None)  # widths of ConvNeXt-T, here with one block each

# name → (constructor arguments, input side, a tensor, how many of its rows one unit of each of its groups owns)
CASES: dict[str, tuple[dict[str, Any], int, str, set[int]]] = {
    # 12 heads of 64 in each of query, key and value, and 64 dimensions of 12 heads each
    "VisionTransformer": (VIT, 32, "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", {36, 192}),
    "ConvNeXt": ({}, 64, "features.1.0.block.0.weight", {1}),  # depthwise
    "resnext50_32x4d": ({}, 64, "layer1.0.conv2.weight", {4, 32}),  # 32 groups of 4 channels
    "shufflenet_v2_x1_0": ({}, 64, "stage2.0.branch2.3.weight", {1}),  # depthwise
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_groups_heads_and_depthwise_channels_are_cut(name: str) -> None:
    arguments, side, tensor, owned = CASES[name]
    torch.manual_seed(0)
    models = import_torchvision().models
    if name == "ConvNeXt":
        arguments = {"block_setting": [models.convnext.CNBlockConfig(i, o, 1) for i, o in pairwise(CONVNEXT)]}
    model = getattr(models, name)(**arguments)
    cutting = cut_model(model, torch.randn(1, 3, side, side))
    assert set(_positions_per_unit(cutting, tensor)) == owned
    result = cutting.check()
    assert result.error_float64 <= 1e-10 and result.replayed > 50
    inputs = torch.randn(1, 3, side, side)
    costs = cost_functions(cutting.program, cutting.coupling)["macs"]
    assert costs({}) == count_macs(model, (inputs,))
    assert costs(cutting.plan.dead) == count_macs(cutting.compact.module, (inputs,)) < costs({})


def _positions_per_unit(cutting: Cutting, tensor: str) -> Iterator[int]:
    """For each group that was cut along the first axis of `tensor`: how many of its indices die with one unit."""
    for group in cutting.coupling.groups:
        for site in group.sites:
            if (site.tensor, site.axis) == (tensor, 0) and cutting.plan.dead[group.name]:
                yield len(site.index[0])
