"""The plugin: its models beside timm's own of the same name, their sizes, their start, and the arguments they take."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from lape_vit import VisionTransformer, convert_checkpoint, encodings, from_timm
from lape_vit.dropout import LEVELS
from lape_vit.encodings import ALIASES, ENCODINGS, AttentionEncoding
from lape_vit.joins import legal_pairs
from tests.models import (
    CCT,
    COMPACT,
    DEIT,
    DISTILLED,
    MODELS,
    SIZES,
    TIMMS,
    VIT_LITE,
    assert_equal,
    assert_same_model,
    create,
    disturb,
    images,
    over_encodings,
    over_pairs,
    sizes_of,
    tiny,
)

FOR_CIFAR = (COMPACT, VIT_LITE, CCT)
DROPS = {
    "drop_rate": 0.1,
    "pos_drop_rate": 0.1,
    "patch_drop_rate": 0.25,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
    "drop_path_rate": 0.3,
}
ARGUMENTS: list[dict[str, Any]] = [
    {"qk_norm": True},
    {"init_values": 1e-2},
    {"pre_norm": True},
    {"qkv_bias": False},
    {"no_embed_class": True},
    {"reg_tokens": 2},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "map"},
    {"global_pool": "avg", "fc_norm": False},
    {"global_pool": "avgmax", "final_norm": False},
    {"dynamic_img_size": True},
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"img_size": (16, 40)},
    {"in_chans": 1},
    {"num_classes": 0},
    {"weight_init": "jax"},
    {"fix_init": True},
    {"act_layer": "relu"},
    {"pos_embed": "learn"},
]

over_models = pytest.mark.parametrize("name", MODELS)
over_timms_models = pytest.mark.parametrize("name", TIMMS)


def both(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """Our model and timm's, each from the same seed."""
    models = []
    for ours in ({} if "pos_embed" in kwargs else {"pe": "learnable"}, {}):
        torch.manual_seed(0)
        models.append(named(name, **ours, **kwargs))
    if "pos_embed" in kwargs:
        models[0] = from_timm(models[0])
    assert isinstance(models[0], VisionTransformer)
    assert type(models[1]).__module__.startswith("timm.")
    return models[0], models[1]


def leaves(model: Any) -> dict[str, str]:
    """Name: description, with rates, eps and strides, of each module that has no children."""
    return {name: repr(module) for name, module in model.named_modules() if not list(module.children())}


def parameter_count(name: str, **kwargs: Any) -> int:
    """Of the model at full size, or with smaller arguments."""
    return sum(parameter.numel() for parameter in on_meta(name, **kwargs).parameters())


def on_meta(name: str, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return named(name, **kwargs)


def named(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **kwargs)


def compact(**kwargs: Any) -> Any:
    return timm.create_model(COMPACT, **kwargs)


class TestWithTimmsOwnEncodingAndJoin:
    """The model is timm's, bit for bit."""

    def same(self, ours: Any, theirs: Any, pixels: Tensor) -> None:
        assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))
        assert_same_model(disturb(ours), disturb(theirs), pixels)

    @pytest.mark.parametrize("fused", [True, False])
    @over_timms_models
    def test_each_model_is_timms(self, name: str, fused: bool) -> None:
        drops = dict(DROPS)
        if "distilled" in name:
            del drops["patch_drop_rate"]  # timm's model may drop the distillation token, ours drops patches alone
        ours, theirs = both(name, **{**SIZES, **drops})
        for block in (*ours.blocks, *theirs.blocks):
            block.attn.fused_attn = fused
        self.same(ours, theirs, images().float())

    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
    def test_every_argument_acts_as_in_timm(self, arguments: dict[str, Any]) -> None:
        ours, theirs = both(DEIT, **{**SIZES, **arguments})
        pixels = images(2, *(arguments.get("img_size") or (32, 32)))[:, : arguments.get("in_chans", 3)]
        self.same(ours, theirs, pixels.float())

    @pytest.mark.parametrize("training", [True, False])
    def test_distilled_training_gives_both_heads(self, training: bool) -> None:
        ours, theirs = both(DISTILLED, **SIZES)
        for model in (ours, theirs):
            model.set_distilled_training(True)
            model.train(training)
        assert_equal(ours(images().float()), theirs(images().float()))
        assert isinstance(ours(images().float()), tuple) == training

    @over_timms_models
    def test_at_full_size_every_layer_is_timms(self, name: str) -> None:
        with torch.device("meta"):
            ours, theirs = both(name)
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
        assert list(shapes[0].items()) == list(shapes[1].items())
        assert leaves(theirs).items() <= leaves(ours).items()
        for attribute in ("num_heads", "head_dim", "scale"):
            values = [[getattr(block.attn, attribute) for block in model.blocks] for model in (ours, theirs)]
            assert values[0] == values[1]
        assert ours.patch_embed.img_size == theirs.patch_embed.img_size

    def test_at_full_size_the_logits_are_timms(self) -> None:
        ours, theirs = both(DEIT)
        assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))
        pixels = images(1, 224, 224).float()
        with torch.no_grad():
            assert_equal(ours.eval()(pixels), theirs.eval()(pixels))

    @over_timms_models
    def test_a_new_head_is_timms(self, name: str) -> None:
        models = both(name, **SIZES)
        for model in models:
            torch.manual_seed(1)
            model.reset_classifier(7)
        self.same(*models, images().float())

    @over_timms_models
    def test_the_groups_of_an_optimiser_are_timms(self, name: str) -> None:
        ours, theirs = both(name, **SIZES)
        assert ours.no_weight_decay() == theirs.no_weight_decay()


class TestRegistry:
    SCRIPT = """
import json, timm
before = timm.list_models()
def registry():
    pretrained = timm.list_pretrained()
    return {
        "models": timm.list_models(),
        "pretrained": pretrained,
        "listed as pretrained": timm.list_models(pretrained=True),
        "is pretrained": {name: timm.is_model_pretrained(name) for name in before},
        "configurations": {
            name: timm.get_pretrained_cfg(name).to_dict()
            for name in [*before, *pretrained] if timm.is_model_pretrained(name)
        },
    }
registries = [registry()]
import models_lape
print(json.dumps([*registries, registry()]))
"""

    def test_of_timm_only_gains_the_models_for_cifar(self) -> None:
        root = Path(__file__).resolve().parents[1]
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", self.SCRIPT], cwd=root, capture_output=True, text=True, check=True
        )
        before, after = json.loads(run.stdout)
        after["models"] = [name for name in after["models"] if name not in FOR_CIFAR]
        assert f"{DEIT}.fb_in1k" in before["configurations"]
        assert after == before

    def test_has_the_models_of_the_papers(self) -> None:
        sizes = ["tiny_{}patch16_224", "small_{}patch16_224", "base_{}patch16_224", "base_{}patch16_384"]
        expected = {f"deit_{size.format(kind)}" for size in sizes for kind in ("", "distilled_")}
        assert {*expected, *FOR_CIFAR} <= set(timm.list_models(module="models_lape"))

    @over_models
    def test_makes_our_model(self, name: str) -> None:
        model = named(name, pe="learnable", **sizes_of(name))
        assert type(model).__module__.partition(".")[0] in {"lape_vit", "models_lape"}
        assert (model.pe, model.join_type) == ("learnable", "basic")

    @over_timms_models
    def test_resolves_every_tag_as_timm(self, name: str) -> None:
        for full_name in (name, *timm.list_pretrained(f"{name}.*")):
            ours, theirs = (named(full_name, **given, **SIZES).pretrained_cfg for given in ({"pe": "none"}, {}))
            assert ours == theirs


class TestPretrainedFiles:
    """``pretrained=True``, with a file in place of a download."""

    def save(self, folder: Path, state: dict[str, Tensor], num_classes: int = 5) -> dict[str, Any]:
        torch.save(state, folder / "pretrained.pth")
        configuration = {"file": str(folder / "pretrained.pth"), "num_classes": num_classes}
        return {"pretrained": True, "pretrained_cfg_overlay": configuration}

    @pytest.mark.parametrize(
        "changes", [{}, {"img_size": 48}, {"img_size": 24}, {"num_classes": 7}, {"in_chans": 1}], ids=str
    )
    @pytest.mark.parametrize("name", [DEIT, DISTILLED])
    def test_load_as_in_timm(self, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
        pretrained = self.save(tmp_path, disturb(named(name, **SIZES)).state_dict())
        ours, theirs = both(name, **{**SIZES, **changes}, **pretrained)
        assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))

    @over_pairs
    def test_of_another_size_load_as_if_resized_afterwards(self, pe: str, join_type: str, tmp_path: Path) -> None:
        expected = disturb(create(pe, join_type))
        pretrained = self.save(tmp_path, expected.state_dict())
        expected.set_input_size((40, 40))
        loaded = create(pe, join_type, img_size=40, **pretrained)
        assert_equal(dict(loaded.state_dict()), dict(expected.state_dict()))

    def test_may_be_an_originals(self, tmp_path: Path) -> None:
        with np.load(Path(__file__).parent / "golden" / "lape-learnable-LaPE.npz") as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        original = {name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")}
        pretrained = self.save(tmp_path, original, num_classes=7)
        loaded = create("learnable", "LaPE", num_classes=7, **pretrained).state_dict()
        expected = convert_checkpoint(original)
        assert loaded.keys() == expected.keys()
        assert_equal(dict(loaded), {name: expected[name].float() for name in loaded})


class TestParameterCounts:
    @pytest.mark.parametrize("join_type", ["LaPE", "LaPE_share"])
    @pytest.mark.parametrize(("name", "added"), [(DEIT, 4608), ("deit_small_patch16_224", 9216)])
    def test_lape_adds_a_norm_per_layer(self, name: str, added: int, join_type: str) -> None:
        assert parameter_count(name, join_type=join_type) == parameter_count(name) + added

    @pytest.mark.parametrize(
        ("pe", "expected"), [("none", 802_826), ("2D_sin", 802_826), ("learnable", 811_018), (None, 811_018)]
    )
    def test_of_the_compact_model(self, pe: str | None, expected: int) -> None:
        assert parameter_count(COMPACT, pe=pe) == expected

    @over_models
    def test_a_sinusoid_saves_the_trained_table_and_unshare_needs_one_per_layer(self, name: str) -> None:
        model, sizes = named(name, **sizes_of(name)), {**sizes_of(name), "depth": 3}
        count, table = parameter_count(name, **sizes), model.pos_embed.numel()
        for pe in ("none", "1D_sin", "2D_sin"):
            assert parameter_count(name, pe=pe, **sizes) == count - table
        assert parameter_count(name, join_type="share", **sizes) == count
        assert parameter_count(name, join_type="unshare", **sizes) == count + 2 * table


class TestLiteModels:
    """ViT-Lite-7/4 and CCT-7/3x1, of https://arxiv.org/abs/2104.05704."""

    @pytest.mark.parametrize(("name", "count", "grid"), [(VIT_LITE, 3_716_874, (8, 8)), (CCT, 3_760_139, (16, 16))])
    def test_have_the_authors_sizes(self, name: str, count: int, grid: tuple[int, int]) -> None:
        model = on_meta(name)
        assert parameter_count(name) == count
        assert model.patch_embed.grid_size == grid
        assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (256, 7, 4)
        assert model.blocks[0].mlp.fc1.out_features == 512
        assert {block.attn.attn_drop.p for block in model.blocks} == {0.1}

    @pytest.mark.parametrize("name", [VIT_LITE, CCT])
    def test_trained_positions_start_ten_times_as_large_as_timms(self, name: str) -> None:
        assert named(name).pos_embed.std().item() == pytest.approx(0.2, rel=0.05)

    def test_cct_pools_its_tokens_by_a_softmax_of_scores(self) -> None:
        model = tiny(name=CCT)
        features = model.forward_features(images(2, 8, 8))
        weights = torch.softmax(features @ model.attn_pool.score.weight[0] + model.attn_pool.score.bias, dim=1)
        expected = model.head(torch.einsum("bn,bnd->bd", weights, features))
        torch.testing.assert_close(model(images(2, 8, 8)), expected)

    def test_cct_cannot_change_its_patches(self) -> None:
        for resize in (lambda: named(CCT, patch_size=4), lambda: named(CCT).set_input_size(patch_size=4)):
            with pytest.raises(ValueError, match="patch_size=4: the tokenizer of CCT"):
                resize()

    @pytest.mark.parametrize("name", [VIT_LITE, CCT])
    def test_take_images_of_another_size_and_another_number_of_classes(self, name: str) -> None:
        model = named(name, pe="rope", num_classes=3)
        model.set_input_size((24, 40))
        model.reset_classifier(7)
        assert model(torch.randn(1, 3, 24, 40)).shape == (1, 7)


class TestCompactModel:
    def test_has_the_sizes_of_the_2d_pe_vit(self) -> None:
        model = on_meta(COMPACT)
        assert model.patch_embed.img_size == (32, 32)
        assert model.patch_embed.patch_size == (4, 4)
        assert model.embed_dim == 128
        assert len(model.blocks) == 6
        assert {block.attn.num_heads for block in model.blocks} == {4}
        assert {block.mlp.fc1.out_features for block in model.blocks} == {256}
        assert (model.num_classes, model.head.out_features) == (10, 10)
        assert (model.no_embed_class, model.num_prefix_tokens) == (True, 1)
        assert model.pos_embed.shape == (1, 64, 128)

    @pytest.mark.parametrize(("pe", "join_type"), [("none", "basic"), ("learnable", "basic"), ("learnable", "LaPE")])
    def test_drops_after_the_embedding_the_projection_and_the_mlp(self, pe: str, join_type: str) -> None:
        model = compact(pe=pe, join_type=join_type)
        dropouts = {name: one.p for name, one in model.named_modules() if isinstance(one, nn.Dropout) and one.p > 0}
        layers = [f"blocks.{layer}.{place}" for layer in range(6) for place in ("attn.proj_drop", "mlp.drop2")]
        assert dropouts == dict.fromkeys(["pos_drop", *layers], 0.1)

    @over_encodings
    def test_drops_a_tenth_of_the_embedding_with_every_encoding(self, pe: str) -> None:
        model = compact(pe=pe, depth=1).train()
        tokens = []
        model.blocks[0].register_forward_pre_hook(lambda block, inputs: tokens.append(inputs[0]))
        with torch.no_grad():
            disturb(model)(torch.ones(4, 3, 32, 32))
            model.eval()(torch.ones(4, 3, 32, 32))
        dropped, whole = tokens
        kept = dropped != 0
        count = dropped.numel()
        assert 1 - kept.double().mean().item() == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / count) ** 0.5)
        exact = round(0.1 * LEVELS) / LEVELS
        torch.testing.assert_close(dropped[kept], whole[kept] / (1 - exact))

    def test_drops_once_in_the_mlp_at_its_end(self) -> None:
        mlp = compact().blocks[0].mlp.train()
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter.fill_(1.0)
            values = mlp(torch.ones(50, 65, 128)).unique()
        assert len(values) == 2, "zero, or the whole sum over 0.9: nothing was dropped before the sum"
        assert values[0] == 0

    @pytest.mark.parametrize("join_type", [join for pe, join in legal_pairs() if pe == "learnable"])
    def test_every_norm_has_eps_1e_5(self, join_type: str) -> None:
        model = compact(join_type=join_type)
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        assert len(norms) - 13 == {"LaPE": 6, "LaPE_share": 6, "PVG": 5, "MPVG": 6}.get(join_type, 0)
        assert {norm.eps for norm in norms} == {1e-5}

    @pytest.mark.parametrize("again", [False, True])
    def test_every_weight_starts_as_a_truncated_normal_of_deviation_0_02(self, again: bool) -> None:
        torch.manual_seed(0)
        model = compact()
        if again:
            model.init_weights()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert len(layers) == 4 * 6 + 2
        for weight in (*(layer.weight for layer in layers), model.cls_token, model.pos_embed):
            error = 0.02 / weight.numel() ** 0.5
            assert weight.mean().item() == pytest.approx(0, abs=5 * error)
            assert weight.std().item() == pytest.approx(0.02, abs=5 * error / 2**0.5)
            assert weight.abs().max() < 0.02 * 7
        assert all(layer.bias is not None and not layer.bias.any() for layer in layers)

    def test_is_normalised_as_cifar(self) -> None:
        configuration = compact().pretrained_cfg
        assert configuration["input_size"] == (3, 32, 32)
        assert configuration["mean"] == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
        assert configuration["std"] == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-3)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"class_token": False, "global_pool": "avg"},
            {"pre_norm": True},
            {"reg_tokens": 2},
            {"no_embed_class": False},
        ],
        ids=str,
    )
    def test_takes_timms_arguments(self, arguments: dict[str, Any]) -> None:
        assert compact(**arguments)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@over_models
class TestArguments:
    def test_join_type_reaches_the_model(self, name: str) -> None:
        for pe, join_type in [("learnable", "LaPE"), ("2D_sin", "share")]:
            model = named(name, pe=pe, join_type=join_type, **sizes_of(name))
            assert (model.pe, model.join_type) == (pe, join_type)

    def test_an_unknown_one_is_a_type_error_that_names_it(self, name: str) -> None:
        with pytest.raises(TypeError, match="'jion_type'"):
            named(name, jion_type="LaPE")

    def test_pe_and_pos_embed_together_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"pe='learnable'.*pos_embed='2D_sin'"):
            named(name, pe="learnable", pos_embed="2D_sin")

    def test_what_cannot_be_joined_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="unshare"):
            named(name, pe="2D_sin", join_type="unshare", **sizes_of(name))
        with pytest.raises(ValueError, match="sinus"):
            named(name, pe="sinus", **sizes_of(name))
        with pytest.raises(ValueError, match="lape"):
            named(name, join_type="lape", **sizes_of(name))


@over_encodings
class TestOptions:
    """Keyword arguments of an encoding, given to ``timm.create_model``."""

    def test_of_another_encoding_are_type_errors_that_name_them(self, pe: str) -> None:
        for option in encodings.all_options().keys() - encodings.resolve(pe).options().keys():
            given: dict[str, Any] = {option: 2}
            with pytest.raises(TypeError, match=f"'{option}'") as error:
                create(pe, **given)
            assert repr(pe) in str(error.value)

    def test_unknown_ones_are_type_errors_that_name_them(self, pe: str) -> None:
        with pytest.raises(TypeError, match="'tempreature'"):
            create(pe, tempreature=10)

    def test_of_its_own_are_taken_and_kept_on_the_model(self, pe: str) -> None:
        defaults = encodings.resolve(pe).options()
        size = {"img_size": (24, 40)}  # sides differ, for options that tell them apart
        pixels, plain = images(1, 24, 40), tiny(pe, **size)
        assert plain.pe_options == defaults
        for option, default in defaults.items():
            changed = another_value(pe, option)
            same, other = tiny(pe, **size, **{option: default}), tiny(pe, **size, **{option: changed})
            assert_equal(same(pixels), plain(pixels))
            assert not other(pixels).equal(plain(pixels))
            assert (same.pe_options, same.pe) == (defaults, pe)
            assert other.pe_options == {**defaults, option: changed}
            by_name = tiny(other.pe, **size)  # the canonical form says all
            assert (by_name.pe, by_name.pe_options) == (other.pe, other.pe_options)
            assert_equal(by_name(pixels), other(pixels))


def another_value(pe: str, option: str) -> Any:
    """A legal value of an option that is not its default."""
    for part in encodings.resolve(pe).parts:
        if option in part.options():
            default = part.options()[option]
            if option in part.choices():
                return next(value for value in part.choices()[option] if value != default)
            return not default if isinstance(default, bool) else 3 * default if default else 1
    raise KeyError(option)


@pytest.mark.parametrize("argument", ["pe", "pos_embed"])
@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_builds_the_encoding_of_its_name(alias: str, argument: str) -> None:
    model, expected = create(name=COMPACT, **{argument: alias}), create(ALIASES[alias], name=COMPACT)
    assert model.pe == ALIASES[alias]
    assert_equal(dict(model.state_dict()), dict(expected.state_dict()))
    assert_equal(model.eval()(images().float()), expected.eval()(images().float()))


@pytest.mark.parametrize("join_type", ["basic", "LaPE"])
def test_a_sum_may_be_written_with_aliases_and_in_either_order(join_type: str) -> None:
    second = next(name for name, encoding in ENCODINGS.items() if issubclass(encoding, AttentionEncoding))
    expected = create(f"learnable+{second}", join_type)
    for pe in (f"{second}+learnable", f"learn+{second}", f"{second}+learn"):
        model = create(pe, join_type)
        assert model.pe == expected.pe == f"learnable+{second}"
        assert_equal(dict(model.state_dict()), dict(expected.state_dict()))


@over_timms_models
def test_timms_own_values_of_pos_embed_give_timms_own_model(name: str) -> None:
    for value in ("learn", "", "none"):
        model = named(name, pos_embed=value, **SIZES)
        assert type(model).__module__.startswith("timm.")
        own = "none" if model.pos_embed is None else "learnable"  # timm's distilled model keeps its table
        assert from_timm(model).pe == own
