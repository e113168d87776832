"""Any vision transformer of timm made ours: published numbers, every variant, every name of the registry."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import Eva
from timm.models import VisionTransformer as TimmsVisionTransformer
from torch import Tensor, nn

import models_lape
from lape_vit import VisionTransformer, convert_checkpoint, from_timm, warm_start
from tests.models import (
    DEIT,
    HYBRID,
    SIZES,
    TIMMS,
    assert_equal,
    assert_same_model,
    create,
    disturb,
    gradients,
    images,
    over_pairs,
    sizes_of,
)

GOLDEN = Path(__file__).parent / "golden_timm"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))
CHECKPOINTS = [name for name, entry in INDEX.items() if entry["family"] == "checkpoint"]
NAMES = [name for name in timm.list_models(module="models_lape") if hasattr(getattr(models_lape, name), "__wrapped__")]
"""Those of timm that take an encoding."""
OTHER_BLOCKS = {
    "vit_base_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_rpn_224": "ResPostBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_dlittle_patch16_reg1_gap_256": "DiffAttention",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
    "vit_huge_patch14_xp_224": "ParallelScalingBlock",
    "vit_large_patch14_xp_224": "ParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "eva02_enormous_patch14_clip_224": "EvaBlockPostNorm",
    **{f"vit_{size}_patch16_sapiens2": "num_kv_heads" for size in ("base", "large", "huge", "giant", "5b")},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TIMMS),
    *((DEIT, {"qk_norm": qk_norm, "qkv_bias": False, "proj_bias": False}) for qk_norm in (False, True)),
    (DEIT, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    (DEIT, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    (DEIT, {"class_token": False, "global_pool": "avgmax"}),
    (DEIT, {"global_pool": "prr"}),
    (DEIT, {"reg_tokens": 2, "no_embed_class": True, "pool_include_prefix": True, "global_pool": "avg"}),
    (DEIT, {"pos_embed": "none"}),
    (DEIT, {"dynamic_img_size": True, "img_size": (16, 40)}),
    (DEIT, {"act_layer": "quick_gelu", "mlp_layer": timm.layers.SwiGLU}),
    (HYBRID, {}),
]
OF_EVA: list[tuple[str, str, dict[str, Any]]] = [
    ("vit_small_plus_patch16_dinov3_qkvb", "rope_dinov3", {}),
    ("vit_small_patch16_dinov3", "rope_dinov3", {"global_pool": "token", "img_size": (32, 48)}),
    ("vit_small_patch16_rope_mixed_ape_224", "learnable+rope_mixed", {"qkv_fused": False}),
    ("vit_small_patch16_rope_224", "rope_axial(rope_theta=50)", {"rope_temperature": 50.0, "global_pool": "map"}),
    ("vit_small_patch16_rope_ape_224", "learnable+rope_axial", {"qk_norm": True, "num_reg_tokens": 2}),
    ("eva_giant_patch14_224", "learnable", {"scale_attn_inner": True, "scale_mlp": True, "swiglu_mlp": True}),
]
over_variants = pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]).double() for key in file.files}


def state_of(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("state/"): value for key, value in golden.items() if key.startswith("state/")}


def assert_golden(model: Any, golden: dict[str, Tensor], tolerance: float) -> None:
    pixels = golden["input"].clone().requires_grad_()
    logits = model.eval()(pixels)
    (grad_input,) = torch.autograd.grad(logits.square().sum(), pixels)
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=tolerance)
    torch.testing.assert_close(grad_input, golden["grad_input"], rtol=0, atol=10 * tolerance)


def timms(name: str = DEIT, **arguments: Any) -> Any:
    """A small model of timm's own class, with parameters at random."""
    torch.manual_seed(0)
    return disturb(timm.create_model(name, **{**sizes_of(name), **arguments}))


@pytest.mark.parametrize("name", [name for name, entry in INDEX.items() if "name" in entry["create"]])
def test_published_models_keep_their_logits_and_gradients(name: str) -> None:
    golden, entry = arrays(name), INDEX[name]
    model = timm.create_model(entry["create"]["name"], **entry["create"]["args"]).double()
    model.load_state_dict(state_of(golden))
    ours = from_timm(model)
    if "ours" in entry:
        assert ours.pe == entry["ours"]["pe"]
    without_bias = sum(len(value) for key, value in golden.items() if key.endswith(".attn.q_bias"))  # of k
    assert sum(parameter.numel() for parameter in ours.parameters()) == entry["params"] + without_bias
    assert_golden(ours, golden, entry["tolerance"])


def ours_of(entry: dict[str, Any]) -> Any:
    """Our model of a published checkpoint of RoPE-ViT or DINOv3, as a caller builds it."""
    arguments = {**entry["create"]["args"], **entry["ours"]}
    name, eps = arguments.pop("model"), arguments.pop("norm_eps", 1e-6)
    return timm.create_model(name, norm_layer=partial(nn.LayerNorm, eps=eps), **arguments).double()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_are_converted(name: str) -> None:
    golden, entry = arrays(name), INDEX[name]
    model, state = ours_of(entry), state_of(golden)
    kept = {key: value.clone() for key, value in state.items()}
    model.load_state_dict(convert_checkpoint(state, model), strict=True)
    assert_golden(model, golden, entry["tolerance"])
    assert_equal(state, kept)
    own = dict(model.state_dict())
    assert_equal(convert_checkpoint(own), own)
    start = warm_start({f"module.{key}": value for key, value in state.items()}, ours_of(entry))
    assert (start.new, start.left_out) == ([], [])
    assert_equal(start.state_dict, own)


def test_a_checkpoint_that_does_not_say_its_heads_asks_for_the_model() -> None:
    with pytest.raises(ValueError, match=r"heads.*give the model") as error:
        convert_checkpoint(state_of(arrays("checkpoint-original-naver-rope_mixed_ape")))
    assert "\n" not in str(error.value)


def test_dinov3s_own_names_are_converted() -> None:
    """As https://github.com/facebookresearch/dinov3 names and masks them."""
    state = state_of(arrays("checkpoint-dinov3_qkvb"))
    theirs = {"rope_embed.periods": torch.ones(4), "mask_token": torch.ones(1, 48)}
    for name, value in state.items():
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            block = name.removesuffix("q_bias")
            unused = torch.full_like(value, 3.0)
            theirs[f"{block}qkv.bias"] = torch.cat([value, unused, state[f"{block}v_bias"]])
            theirs[f"{block}qkv.bias_mask"] = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
        else:
            name = name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
            theirs[name.replace("gamma_2", "ls2.gamma")] = value
    converted, expected = convert_checkpoint(theirs), convert_checkpoint(state)
    assert converted.keys() == expected.keys()
    assert_equal({name: converted[name] for name in expected}, expected)


@over_variants
def test_every_variant_stays_the_same_bit_for_bit(name: str, arguments: dict[str, Any]) -> None:
    theirs = timms(name, **{"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, **arguments})
    ours = from_timm(copy.deepcopy(theirs))
    assert (ours.pe, ours.join_type) == ("none" if theirs.pos_embed is None else "learnable", "basic")
    assert_same_model(ours, theirs, images(2, *theirs.patch_embed.img_size).float())


@pytest.mark.parametrize(("name", "pe", "arguments"), OF_EVA, ids=str)
def test_every_variant_of_eva_stays_the_same(name: str, pe: str, arguments: dict[str, Any]) -> None:
    sizes = {**SIZES, "mlp_ratio": 4.0, **arguments}
    theirs = disturb(timm.create_model(name, **sizes).double()).eval()
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    pixels = images(2, *theirs.patch_embed.img_size).requires_grad_()
    expected = gradients(theirs, theirs(pixels))
    logits = theirs(pixels)
    ours = from_timm(theirs)
    assert (ours.pe, ours.training, ours.pretrained_cfg) == (pe, False, theirs.pretrained_cfg)
    # timm's angles are float32
    torch.testing.assert_close(ours(pixels), logits, rtol=0, atol=2e-5)
    found = gradients(ours, ours(pixels))
    for key in expected.keys() & found.keys():
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
    assert_equal(dict(theirs.state_dict()), state)

    start = warm_start(state, from_timm(timm.create_model(name, **sizes).double()))
    assert (start.new, start.left_out) == ([], [])
    assert_equal(start.state_dict, dict(ours.state_dict()))


def test_a_rotation_that_is_none_of_ours_asks_for_another_encoding() -> None:
    with pytest.raises(ValueError, match=r"RotaryEmbeddingCat with grid_indexing='ij'.*give pe=") as error:
        from_timm(timm.create_model("eva02_tiny_patch14_224", depth=1))
    assert "\n" not in str(error.value)
    ours = from_timm(timm.create_model("eva02_tiny_patch14_224", depth=1), "learnable", "LaPE")
    assert (ours.pe, ours.join_type) == ("learnable", "LaPE")


def test_an_augmentation_of_places_is_kept_and_can_be_replaced() -> None:
    arguments = {**SIZES, "rope_shift_coords": 0.1, "rope_rescale_coords": 2.0}
    for given, shift in (({}, 0.1), ({"pos_shift": 0.0}, 0.0)):
        ours = from_timm(timm.create_model("vit_small_patch16_dinov3", **arguments), **given)
        assert (ours.augment_places.shift, ours.augment_places.jitter, ours.augment_places.rescale) == (shift, 1, 2)


def test_the_model_is_adopted_in_place_with_its_settings() -> None:
    model = timms(patch_drop_rate=0.25).eval()
    model.head.weight.requires_grad_(False)
    seen = []
    model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    parameters, mode = list(model.parameters()), {name: part.training for name, part in model.named_modules()}
    ours = from_timm(model)
    assert ours is model
    assert all(one is other for one, other in zip(ours.parameters(), parameters, strict=True))
    assert mode.items() <= {name: part.training for name, part in ours.named_modules()}.items()
    assert not any(part.training for part in ours.modules())
    ours(images().float())
    assert seen == [1]


@over_pairs
def test_with_an_encoding_and_a_join_it_is_the_model_that_the_constructor_makes(pe: str, join_type: str) -> None:
    expected = disturb(create(pe, join_type))
    theirs = timms()
    own = {name: value for name, value in expected.state_dict().items() if name in theirs.state_dict()}
    theirs.load_state_dict(
        {**theirs.state_dict(), **{k: v for k, v in own.items() if v.shape == theirs.state_dict()[k].shape}}
    )
    kept = dict(theirs.state_dict())
    ours = from_timm(theirs, pe, join_type)
    assert list(ours.state_dict()) == list(expected.state_dict())
    for name, value in ours.state_dict().items():
        if name in kept and kept[name].shape == value.shape:
            assert_equal(value, kept[name])
    ours.load_state_dict(expected.state_dict())
    assert (ours.pe, ours.join_type, ours.pe_options) == (expected.pe, expected.join_type, expected.pe_options)
    assert_equal(ours.eval()(images().float()), expected.eval()(images().float()))


def test_what_is_new_starts_as_in_a_model_without_training() -> None:
    model = timms(class_token=False, global_pool="avg", pos_embed="none").bfloat16()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ours = from_timm(model, "learnable", "LaPE")
    for norm in ours.join.norms:
        assert_equal((norm.weight.data, norm.bias.data), (torch.ones_like(norm.weight), torch.zeros_like(norm.bias)))
        assert norm.weight.requires_grad
        assert norm.weight.dtype == torch.bfloat16
    assert ours.pos_embed is not None
    assert 0.01 < ours.pos_embed.float().std() < 0.03
    assert ours.pos_embed.requires_grad


def test_options_and_augmentation_of_places_are_taken() -> None:
    ours = from_timm(timms(), "rope_axial(rope_theta=10)", pos_shift=0.1)
    assert ours.pe == "rope_axial(rope_theta=10)"
    assert from_timm(timms(), "rope_axial", rope_theta=10.0).pe == ours.pe
    assert ours.augment_places.is_on


PRETRAINED = [*TIMMS[2:], HYBRID, "vit_small_patch16_rope_mixed_ape_224", "vit_small_patch16_dinov3_qkvb"]


class TestPretrained:
    """``pretrained=True`` of a folder as timm writes it, with another encoding, join or size."""

    def source(self, name: str, folder: Path, **arguments: Any) -> tuple[str, dict[str, Any], Any]:
        given = {**sizes_of(name), "mlp_ratio": 4.0, **arguments}
        torch.manual_seed(0)
        model = disturb(timm.create_model(name, **given))
        timm.models.save_for_hf(model, folder, model_args=given)
        return f"local-dir:{folder}", given, model.eval()

    @pytest.mark.parametrize("name", PRETRAINED)
    def test_timms_weights_give_timms_logits_in_ours(
        self, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        source, _, theirs = self.source(name, tmp_path)
        ours = timm.create_model(source, pretrained=True, join_type="basic").eval()
        assert isinstance(ours, VisionTransformer)
        pixels = images(2, *theirs.patch_embed.img_size).float()
        torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=0, atol=1e-4)
        assert "pretrained weights: new" not in caplog.text
        assert "left out" not in caplog.text

    @pytest.mark.parametrize("name", PRETRAINED)
    def test_what_another_encoding_and_size_leave_out_and_need_is_said(
        self, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        source, _, theirs = self.source(name, tmp_path)
        ours = timm.create_model(source, pretrained=True, pe="2D_sin+relative", join_type="LaPE", img_size=(32, 64))
        assert (ours.pe, ours.join_type, ours.patch_embed.img_size) == ("2D_sin+relative", "LaPE", (32, 64))
        kept = {key: value for key, value in theirs.state_dict().items() if key in ours.state_dict()}
        assert len(kept) > 10
        assert_equal({key: ours.state_dict()[key] for key in kept}, kept)
        (new,) = [record.getMessage() for record in caplog.records if "weights: new" in record.getMessage()]
        assert "join.norms.*.weight (2)" in new
        assert "blocks.*.attn.encoding.key_x (2)" in new
        lost = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert bool(lost) == (theirs.pos_embed is not None or "mixed" in name)

    def test_a_table_is_resampled_as_by_set_input_size(self, tmp_path: Path) -> None:
        for name in ("vit_small_patch14_reg4_dinov2", HYBRID):
            source, _, theirs = self.source(name, tmp_path / name)
            loaded = timm.create_model(source, pretrained=True, pe="learnable", img_size=(48, 64))
            expected = from_timm(theirs)
            expected.set_input_size((48, 64))
            assert_equal(dict(loaded.state_dict()), dict(expected.state_dict()))

    def test_a_model_of_ours_comes_back_with_its_encoding_by_timms_own_way(self, tmp_path: Path) -> None:
        for name in (DEIT, "vit_small_patch16_rope_mixed_224"):
            arguments = {"pe": "learnable+rope_mixed", "join_type": "LaPE"}
            source, _, ours = self.source(name, tmp_path / name, **arguments)
            loaded = timm.create_model(source, pretrained=True)
            assert (loaded.pe, loaded.join_type) == ("learnable+rope_mixed", "LaPE")
            assert_equal(dict(loaded.state_dict()), dict(ours.state_dict()))

    def test_features_are_those_of_the_whole_model(self, tmp_path: Path) -> None:
        source, _, _ = self.source("vit_small_patch14_dinov2", tmp_path)
        features = timm.create_model(source, pretrained=True, pe="2D_sin", features_only=True, out_indices=(0, 1))
        whole = timm.create_model(source, pretrained=True, pe="2D_sin").eval()
        pixels = images().float()
        expected = whole.forward_intermediates(pixels, [0, 1], intermediates_only=True)
        assert_equal(features.eval()(pixels), expected)


class TestRefusals:
    """One line, and the model is as it was."""

    def refused(self, model: Any, match: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
        before = {name: (type(part), part.training) for name, part in model.named_modules()}
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=match) as raised:
            from_timm(model, **arguments)
        assert "\n" not in str(raised.value)
        assert {name: (type(part), part.training) for name, part in model.named_modules()} == before
        assert_equal(dict(model.state_dict()), dict(state))

    @pytest.mark.parametrize(
        ("block", "name"),
        [
            (timm.models.vision_transformer.ParallelScalingBlock, "ParallelScalingBlock"),
            (timm.models.vision_transformer.ParallelThingsBlock, "ParallelThingsBlock"),
            (timm.models.vision_transformer.ResPostBlock, "ResPostBlock"),
        ],
    )
    def test_other_blocks(self, block: type[nn.Module], name: str) -> None:
        self.refused(timms(block_fn=block), f"blocks.*{name}")

    def test_another_attention(self) -> None:
        self.refused(timms(attn_layer="diff", num_heads=2), "attention.*DiffAttention")

    def test_a_block_of_ours_in_the_constructor(self) -> None:
        with pytest.raises(ValueError, match="ResPostBlock"):
            timm.create_model(DEIT, pe="none", block_fn=timm.models.vision_transformer.ResPostBlock, **SIZES)

    def test_another_class(self) -> None:
        class Derived(TimmsVisionTransformer):
            pass

        self.refused(timm.create_model("resnet10t"), "ResNet")
        self.refused(Derived(**SIZES), "Derived")
        self.refused(create("none"), "ours already, with pe='none'")

    def test_what_is_no_encoding_or_does_not_fit(self) -> None:
        self.refused(timms(), "sinus", pe="sinus")
        self.refused(timms(), "unshare", pe="2D_sin", join_type="unshare")
        self.refused(timms(), "'rope_theta'", TypeError, rope_theta=3.0)
        self.refused(timms(embed_dim=30), "divisible by 4", pe="rope")
        self.refused(timms(), "pos_shift", pe="relative", pos_shift=0.1)
        self.refused(timms(), "pos_jitter=0.5", pos_jitter=0.5)


class TestNames:
    """All names of timm's registry."""

    @pytest.mark.parametrize("name", NAMES)
    def test_each_takes_an_encoding_and_a_join_or_says_in_one_line_why_not(self, name: str) -> None:
        sizes = {"depth": 2, **({"num_kv_heads": 2} if "sapiens" in name else {})}
        with torch.device("meta"):
            theirs = timm.create_model(name, **sizes)
            assert type(theirs).__module__.startswith("timm.")
            if name in OTHER_BLOCKS:
                with pytest.raises(ValueError, match=OTHER_BLOCKS[name]) as error:
                    timm.create_model(name, **sizes, pe="rope_mixed")
                assert "\n" not in str(error.value)
                return
            ours = timm.create_model(name, **sizes, pe="learnable+rope_mixed", join_type="LaPE")
            assert isinstance(ours, VisionTransformer)
            if theirs.pretrained_cfg["architecture"] == name:  # one name of timm's has the weights of another
                assert ours.pretrained_cfg == theirs.pretrained_cfg
            pixels = torch.empty(1, 3, *ours.patch_embed.img_size)
            assert ours(pixels).shape == theirs(pixels).shape
        traits = [timm.models.get_model_traits(model) for model in (ours, theirs)]
        assert traits[0] == traits[1]

    def test_which_say_that_they_make_a_plain_vision_transformer_are_all_there(self) -> None:
        plain = {
            name
            for name in timm.list_models()
            if timm.model_entrypoint(name).__annotations__.get("return") in (TimmsVisionTransformer, Eva)
        }
        assert len(plain) > 260
        assert plain <= set(NAMES)

    def test_of_other_classes_are_timms_own(self) -> None:
        with pytest.raises(TypeError, match="'pe'"):
            timm.create_model("resnet10t", pe="none")
