"""Attention over an image, and the split of its logits into content and positions, against a real forward pass."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from lape_vit import encodings
from lape_vit.analysis.attention_maps import attention_maps, why_no_split
from tests.models import DISTILLED, PAIRS, assert_near, images, norm1_reads_content_alone, over_pairs, tiny


def splits(pe: str, join_type: str) -> bool:
    """Whether positions reach attention after norm1, or as a bias, and only so."""
    parts = encodings.resolve(pe)
    turns = parts.attention is not None and "rotate" in parts.attention.overridden
    return (
        (parts.absolute or parts.attention) is not None and norm1_reads_content_alone(tiny(pe, join_type)) and not turns
    )


SPLIT = [pair for pair in PAIRS if splits(*pair)]


def real_weights(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The attention weights (h, N, N) of each layer in a forward pass, as timm's own dropout receives them."""
    weights: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: weights.append(args[0][0]))
    with torch.no_grad():
        model(image)
    return weights


@over_pairs
def test_weights_are_those_of_a_real_forward_pass(pe: str, join_type: str) -> None:
    model, image = tiny(pe, join_type, DISTILLED), images(1)
    layers = attention_maps(model, image)
    for layer, expected in zip(layers, real_weights(model, image), strict=True):
        assert_near(layer.weights, expected)


@pytest.mark.parametrize(("pe", "join_type"), SPLIT)
def test_content_and_position_sum_to_the_logits_of_a_real_forward_pass(pe: str, join_type: str) -> None:
    model, image = tiny(pe, join_type), images(1)
    layers = attention_maps(model, image)
    for layer, expected in zip(layers, real_weights(model, image), strict=True):
        assert layer.content is not None
        assert layer.position is not None
        assert_near((layer.content + layer.position).softmax(dim=-1), expected, 1e-10)


@pytest.mark.parametrize(("pe", "join_type"), SPLIT)
def test_the_content_part_is_the_logits_that_are_left_without_positions(pe: str, join_type: str) -> None:
    model, without, image = tiny(pe, join_type), tiny("none", "basic"), images(1)
    without.load_state_dict({name: model.state_dict()[name] for name in without.state_dict()})
    content = attention_maps(model, image)[0].content  # later layers read what positions did in earlier ones
    assert content is not None
    assert_near(content.softmax(dim=-1), real_weights(without, image)[0], 1e-10)


@over_pairs
def test_where_logits_do_not_split_there_are_no_parts_and_a_reason(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    reason, layers = why_no_split(model), attention_maps(model, images(1))
    assert (reason is None) == splits(pe, join_type)
    assert all((layer.content is None) == (layer.position is None) == (reason is not None) for layer in layers)
    if reason is not None:
        assert repr(pe) in reason
        assert repr(join_type) in reason


def test_a_norm_of_q_and_k_after_positions_were_added_does_not_split() -> None:
    reason = why_no_split(tiny("learnable", "LaPE", qk_norm=True))
    assert reason is not None
    assert "normalised" in reason
    assert why_no_split(tiny("2D_RPE", "LaPE", qk_norm=True)) is None


def test_hooks_are_gone_afterwards() -> None:
    model = tiny("learnable", "LaPE")
    attention_maps(model, images(1))
    assert pickle.dumps(model.blocks)  # which the hooks, local functions, would refuse
