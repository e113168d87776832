"""Positions of timm's own models, against ours and against real forward passes."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lape_vit.analysis.positions import cosine_similarity, position_views
from lape_vit.analysis.timm_positions import timm_grid, timm_position_views
from tests.models import SIZES, disturb, tiny


def timm_model(name: str, **kwargs: Any) -> Any:
    """One of timm's, tiny, on a grid of 4 x 6."""
    torch.manual_seed(0)
    return disturb(timm.create_model(name, **{**SIZES, "img_size": (32, 48), **kwargs}).double()).eval()


def test_timms_model_shows_what_ours_with_the_same_weights_shows() -> None:
    ours = tiny("learnable", "basic")
    theirs = VisionTransformer(**SIZES).double().eval()
    theirs.load_state_dict(ours.state_dict())
    (expected,), (shown,) = position_views(ours), timm_position_views(theirs)
    assert (shown.name, shown.title, shown.limits, shown.layers) == (
        expected.name,
        expected.title,
        expected.limits,
        expected.layers,
    )
    for theirs_of_layer, ours_of_layer in zip(shown.values, expected.values, strict=True):
        torch.testing.assert_close(theirs_of_layer, ours_of_layer)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "vit_base_patch16_clip_224",  # a norm before the blocks
        "vit_small_patch14_reg4_dinov2",  # registers without a row
        "vit_base_patch16_rpn_224",  # attention before the norm
        "vit_small_patch16_rope_mixed_ape_224",  # of another class, with rotations besides
        "cait_xxs24_224",  # of another class, with a class token that comes late
    ],
)
def test_any_model_with_a_table_shows_what_its_first_attention_receives(name: str) -> None:
    model = timm_model(name)
    assert timm_grid(model) == (4, 6)
    received: list[Tensor] = []
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith("patch_embed.") or parameter_name.endswith("_token"):
                parameter.zero_()
        model.blocks[0].attn.register_forward_pre_hook(lambda module, args: received.append(args[0]))
        model(torch.randn(1, 3, 32, 48, dtype=torch.float64))
    (view,) = timm_position_views(model)
    assert len(view.values) == 2
    torch.testing.assert_close(view.values[0][0], cosine_similarity(received[0][0, -24:]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "ResNet has no table pos_embed"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer has no table pos_embed"),
        ("pit_ti_224", "PoolingVisionTransformer has no table pos_embed"),
        ("vit_base_patch16_18x2_224", "VisionTransformer has blocks without one attention each"),
    ],
)
def test_another_kind_of_model_is_refused(name: str, expected: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=expected):
        timm_grid(model)
