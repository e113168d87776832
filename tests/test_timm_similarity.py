"""Positions and attention of timm's own models, against ours and against real forward passes."""

import pickle
from typing import Any

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models import get_model_input_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lape_vit import from_timm
from lape_vit.analysis.positions import PositionView, cosine_similarity, position_views
from lape_vit.analysis.timm_attention import (
    attention_calls,
    is_channels_first,
    timm_attention,
    timm_attention_of_patches,
)
from lape_vit.analysis.timm_positions import (
    patch_grid,
    relative_biases,
    timm_grid,
    timm_position_views,
    title_of,
)
from lape_vit.encodings.offsets import offset_index
from tests.models import SIZES, assert_equal, disturb, tiny


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
    view = timm_position_views(model)[0]
    assert (view.name, len(view.values)) == ("similarity", 2)
    torch.testing.assert_close(view.values[0][0], cosine_similarity(received[0][0, -24:]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "ResNet has no table pos_embed"),
        ("samvit_base_patch16", "VisionTransformerSAM has no table pos_embed"),
        ("pit_ti_224", "PoolingVisionTransformer has no table pos_embed"),
        ("vit_base_patch16_18x2_224", "VisionTransformer has blocks without one attention each"),
    ],
)
def test_another_kind_of_model_is_refused(name: str, expected: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=expected):
        timm_grid(model)


# ---- rotations and biases


SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": (64, 128), "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3), "window_size": 4}
BIASED: list[tuple[str, dict[str, Any]]] = [
    ("beit_base_patch16_224", {**SMALL, "img_size": (64, 96)}),
    ("beit_base_patch16_224", {**SMALL, "img_size": 64, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    ("vit_relpos_base_patch16_cls_224", {**SMALL, "img_size": (64, 96)}),
    ("vit_srelpos_small_patch16_224", {**SMALL, "img_size": 64}),
    ("swin_tiny_patch4_window7_224", SWIN),
    ("swinv2_tiny_window8_256", SWIN),
    ("swinv2_cr_tiny_224", SWIN),
    ("test_maxvit", {"img_size": 64}),
    ("maxvit_tiny_tf_224", {"img_size": (64, 128), "embed_dim": (32, 64), "depths": (1, 1)}),
    ("test_coatnet", {}),
    ("gcvit_xxtiny", {}),
]
over_biased = pytest.mark.parametrize(("name", "arguments"), BIASED, ids=str)


def biased(name: str, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return disturb(timm.create_model(name, **arguments)).eval()


def picture(model: Any) -> Tensor:
    return torch.randn(1, *get_model_input_config(model)["input_size"])


def between_places(view: PositionView) -> list[Tensor]:
    """The values of a view by offset, from each place to each: (h, S, S) of each layer."""
    height, width = ((side + 1) // 2 for side in view.values[0].shape[1:])
    index = offset_index((height, width), view.values[0].device).T
    return [values.flatten(1)[:, index] for values in view.values]


@torch.no_grad()
@over_biased
def test_a_bias_is_what_attention_adds_where_nothing_else_is_in_the_logits(
    name: str, arguments: dict[str, Any]
) -> None:
    model = biased(name, arguments)
    for key, parameter in model.named_parameters():
        if ".qkv." in key or key.endswith(("q_bias", "k_bias")):
            parameter.zero_()
    shown = [bias for view in timm_position_views(model) for bias in between_places(view)]
    calls = attention_calls(model, picture(model)).values()
    for bias, call in zip(shown * (len(calls) if len(shown) == 1 else 1), calls, strict=True):
        places = bias.shape[-1]
        expected = call.weights[0, :, -places:, -places:]  # the first window; shifted ones have a mask
        torch.testing.assert_close(bias.softmax(dim=-1), expected / expected.sum(dim=-1, keepdim=True))
        assert bias.std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["levit_128s", "tiny_vit_5m_224", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0"]
)
def test_a_bias_by_the_size_of_the_offset_is_timms_own(name: str) -> None:
    model = biased(name, {})
    modules = [*relative_biases(model).values()]
    shown = [bias for view in timm_position_views(model) for bias in between_places(view)]
    for bias, module in zip(shown, modules, strict=True):
        torch.testing.assert_close(bias, module.get_attention_biases(bias.device))


def test_layers_with_other_heads_or_windows_are_views_of_their_own() -> None:
    views = timm_position_views(biased("swin_tiny_patch4_window7_224", SWIN))
    assert [(view.name, view.first, view.layers) for view in views] == [
        ("bias_offsets_part0", 0, ["layers.0.blocks.0", "layers.0.blocks.1"]),
        ("bias_offsets_part1", 2, ["layers.1.blocks.0"]),
    ]
    assert {view.title for view in views} == {"bias by offset (logits), windows of 4 x 4"}


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_rope_mixed_ape_224", "vit_small_patch16_rope_224", "vit_small_patch16_dinov3"]
)
def test_a_rotation_of_timm_shows_what_ours_shows(name: str) -> None:
    theirs = timm_model(name)
    shown = {view.name: view for view in timm_position_views(theirs)}
    for view in position_views(from_timm(theirs)):
        assert (shown[view.name].title, shown[view.name].layers) == (view.title, view.layers)
        for theirs_of_layer, ours_of_layer in zip(shown[view.name].values, view.values, strict=True):
            torch.testing.assert_close(theirs_of_layer, ours_of_layer, rtol=0, atol=1e-5)


def test_a_rotation_that_is_none_of_ours_shows_its_mean_product_by_offset() -> None:
    model = timm_model("eva02_tiny_patch14_224", embed_dim=48)
    (kernel,) = (view for view in timm_position_views(model) if view.name == "kernel")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(20_000, 1, 16, generator=generator), dim=-1)
    turned = apply_rot_embed_cat(vectors, model.rope.get_embed(shape=(4, 6)))
    assert len(kernel.values) == 2
    for query, key in ((0, 23), (9, 10), (5, 18)):
        expected = (turned[:, query] * turned[:, key]).sum(dim=-1).mean().item()
        assert between_places(kernel)[0][0, query, key].item() == pytest.approx(expected, abs=0.01)


# ---- attention over an image


@over_biased
def test_attention_reaches_the_places_that_the_output_depends_on(name: str, arguments: dict[str, Any]) -> None:
    model = biased(name, arguments)
    seen = {one.layer: one.weights for one in timm_attention(model, picture(model), (0.6, 0.3))}
    modules, calls = dict(model.named_modules()), attention_calls(model, picture(model))
    for path, call in calls.items():
        weights, x = seen[title_of(path)], call.block_args[0]
        if x.ndim != 4 or (call.read.ndim == 4 and len(call.weights) == 1):  # all tokens are one window
            assert weights.isfinite().all()
            continue
        x, axis = x.detach().clone().requires_grad_(), 1 if is_channels_first(modules[path]) else -1
        output = modules[path.rpartition(".")[0]](x, *call.block_args[1:]).movedim(axis, -1)
        row, column = (int(share * side) for share, side in zip((0.6, 0.3), output.shape[1:3], strict=True))
        (gradient,) = torch.autograd.grad(output[0, row, column].square().sum(), x)
        reached = gradient.movedim(axis, -1)[0].abs().amax(dim=-1) > 0
        assert reached[(weights > 1e-3).any(dim=0)].all(), path
        assert not reached[weights.isnan().all(dim=0)].any(), path


@over_biased
def test_weights_over_an_image_sum_to_one_and_the_model_is_as_before(name: str, arguments: dict[str, Any]) -> None:
    model = biased(name, arguments)
    expected = model(image := picture(model))
    for one in timm_attention(model, image, (0.0, 0.99)):
        sums = one.weights.nansum(dim=(1, 2))
        if "cls" in name or "beit" in name:
            assert (sums < 1).all()  # the class token has the rest
        else:
            torch.testing.assert_close(sums, torch.ones_like(sums))
    assert_equal(model(image), expected)
    assert pickle.dumps(model.state_dict())


@over_biased
def test_attention_from_every_patch_is_that_from_each_where_there_are_no_windows(
    name: str, arguments: dict[str, Any]
) -> None:
    model = biased(name, arguments)
    every = timm_attention_of_patches(model, image := picture(model))
    grid = patch_grid(model)
    from_one = {place: timm_attention(model, image, place) for place in ((0.0, 0.99), (0.6, 0.3))}
    shapes = {one.weights.shape for one in from_one[0.6, 0.3]}
    in_windows = any(one.weights.isnan().any() for one in from_one[0.6, 0.3])
    assert (every is None) == (in_windows or len(shapes) > 1 or {shape[1:] for shape in shapes} != {grid})
    for place, layers in from_one.items() if every is not None and grid is not None else ():
        row, column = (int(share * side) for share, side in zip(place, grid, strict=True))
        assert list(every) == [one.layer for one in layers]
        for one in layers:
            assert torch.equal(every[one.layer][:, row * grid[1] + column].unflatten(1, grid), one.weights)


def test_a_model_that_hands_out_no_weights_is_refused() -> None:
    model, image = biased("levit_128s", {}), torch.randn(1, 3, 224, 224)
    with pytest.raises(ValueError, match="LevitDistilled does not hand out"):
        timm_attention(model, image, (0.5, 0.5))
    with pytest.raises(ValueError, match="LevitDistilled does not hand out"):
        timm_attention_of_patches(model, image)
