"""What every legal pair must hold as a timm model: every legal pair is tested by being in the registry."""

import copy
import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import timm
import timm.models.deit
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from lape_vit import encodings
from lape_vit.joins import JOINS, legal_pairs
from tests.models import (
    DEIT,
    DISTILLED,
    PAIRS,
    SIZES,
    assert_equal,
    assert_near,
    create,
    disturb,
    gradients,
    images,
    over_pairs,
    tiny,
)

PREFIXES: dict[str, dict[str, Any]] = {
    "no_embed_class": {"no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "distilled": {"name": DISTILLED},
}
CAUSAL = "is_causal" in inspect.signature(timm.models.vision_transformer.VisionTransformer.forward).parameters
"""False for an older timm, whose unfused attention takes a boolean mask for numbers, too."""

over_prefixes = pytest.mark.parametrize("prefix", PREFIXES)


def without_position(pe: str) -> bool:
    return encodings.resolve(pe).name == "none"


def mixes_tokens_in_attention_alone(pair: tuple[str, str]) -> bool:
    """Whether a mask of attention decides which patches know of which; a token encoding knows no mask."""
    return encodings.resolve(pair[0]).token is None


over_pairs_that_heed_masks = pytest.mark.parametrize(
    ("pe", "join_type"), [*filter(mixes_tokens_in_attention_alone, PAIRS)]
)


def has_trained_tables(pe: str) -> bool:
    absolute = encodings.resolve(pe).absolute
    return absolute is not None and absolute.learned


def timms(name: str = DEIT, **kwargs: Any) -> Any:
    """timm's own model, with the weights of our tiny default model."""
    model = getattr(timm.models.deit, name)(**{**SIZES, **kwargs}).double().eval()
    model.load_state_dict(tiny(name=name, **kwargs).state_dict())
    return model


def shuffle_patches(pixels: Tensor, order: Tensor) -> Tensor:
    patches = F.unfold(pixels, 8, stride=8)
    return F.fold(patches[:, :, order], pixels.shape[-2:], 8, stride=8)


class TestLogits:
    @over_pairs
    def test_depend_on_the_encoding_through_the_tables_alone(self, pe: str, join_type: str) -> None:
        """With all other weights shared, only ``none`` gives the logits of ``none``."""
        model, bag = tiny(pe, join_type), tiny("none")
        bag.load_state_dict({name: model.state_dict()[name] for name in bag.state_dict()})
        logits = model(images())
        assert logits.isfinite().all()
        assert logits.shape == (2, 5)
        assert ((logits - bag(images())).abs().max() > 1e-6) != without_position(pe)

    @over_pairs
    def test_know_the_places_of_patches(self, pe: str, join_type: str) -> None:
        """Patches in another order change the class token, but for ``none``: that one sees a bag of patches."""
        model, order = tiny(pe, join_type), torch.randperm(16, generator=torch.Generator().manual_seed(0))
        features = model.forward_features(images())
        shuffled = model.forward_features(shuffle_patches(images(), order))
        if without_position(pe):
            assert_near(shuffled[:, 0], features[:, 0], 1e-10)
            assert_near(shuffled[:, 1:], features[:, 1:][:, order], 1e-10)
        else:
            assert (shuffled[:, 0] - features[:, 0]).abs().max() > 1e-6

    @over_pairs
    def test_of_an_image_do_not_depend_on_its_batch(self, pe: str, join_type: str) -> None:
        model, pixels = tiny(pe, join_type), images(3)
        assert_near(model(pixels), torch.cat([model(image) for image in pixels.split(1)]))

    @over_pairs
    @over_prefixes
    def test_come_out_with_every_kind_of_prefix(self, pe: str, join_type: str, prefix: str) -> None:
        model = tiny(pe, join_type, **PREFIXES[prefix])
        assert model(images(1)).isfinite().all()
        assert model.forward_features(images(1)).shape == (1, model.num_prefix_tokens + 16, 24)

    @over_pairs
    def test_are_the_same_with_and_without_fused_attention(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) < 0.8
        mask |= torch.eye(17, dtype=torch.bool)
        calls: list[dict[str, Any]] = [{}, {"attn_mask": mask}, {"is_causal": True}]
        fused = [model.forward_features(images(), **call) for call in calls]
        for block in model.blocks:
            block.attn.fused_attn = not block.attn.fused_attn
        assert_near([model.forward_features(images(), **call) for call in calls], fused, 1e-10)


class TestMasks:
    @pytest.mark.parametrize("checkpointing", [True, False])
    @pytest.mark.parametrize("fused", [True, False])
    def test_of_the_default_pair_act_as_timms(self, fused: bool, checkpointing: bool) -> None:
        ours, theirs = tiny(), timms()
        ours.set_grad_checkpointing(checkpointing)
        for block in (*ours.blocks, *theirs.blocks):
            block.attn.fused_attn = fused
        additive = torch.randn(17, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        boolean = (additive < 0.5) | torch.eye(17, dtype=torch.bool)
        per_head = torch.stack([additive, additive.T, -additive])[None]
        for mask in (additive, per_head, *([boolean] if fused or CAUSAL else [])):
            assert_near(ours(images(), attn_mask=mask), theirs(images(), attn_mask=mask))
        if CAUSAL:
            assert_near(ours(images(), is_causal=True), theirs(images(), is_causal=True))

    @over_pairs_that_heed_masks
    def test_of_causality_hide_the_tokens_to_come(self, pe: str, join_type: str) -> None:
        model, pixels = tiny(pe, join_type), images(1)
        changed = pixels.clone()
        changed[:, :, 8:16, 8:16] += 1  # patch 5, token 6
        before, after = (model.forward_features(one, is_causal=True) for one in (pixels, changed))
        assert_near(after[:, :6], before[:, :6])
        assert ((after - before)[:, 6:].abs().amax(dim=2) > 1e-6).all()

    @over_pairs_that_heed_masks
    def test_hide_a_key(self, pe: str, join_type: str) -> None:
        """A patch that no other token may look at has no say in the class token."""
        model, pixels = tiny(pe, join_type), images(1)
        hidden = pixels.clone()
        hidden[:, :, 8:16, 8:16] += 1  # patch 5, token 6
        assert (model(hidden) - model(pixels)).abs().max() > 1e-6
        boolean = torch.ones(17, 17, dtype=torch.bool)
        boolean[:, 6] = False
        boolean[6, 6] = True
        for mask in (boolean, torch.zeros(17, 17, dtype=torch.float64).masked_fill(~boolean, float("-inf"))):
            assert_near(model(hidden, attn_mask=mask), model(pixels, attn_mask=mask))


class TestGradients:
    @over_pairs
    def test_reach_every_parameter(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        tokens = model.forward_features(images())  # of all tokens: a class token looks past the last layer's 2D_RPE
        found = gradients(model, torch.cat([tokens.flatten(), model.forward_head(tokens).flatten()]))
        assert [name for name, gradient in found.items() if not gradient.any()] == []
        assert all(gradient.isfinite().all() for gradient in found.values())
        if model.pos_embed is not None:
            assert [layer for layer, gradient in enumerate(found["pos_embed"]) if not gradient.any()] == []

    @over_pairs
    def test_are_the_same_with_checkpointing(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type, drop_path_rate=0.3, proj_drop_rate=0.1).train()
        found = []
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(1)
            found.append(gradients(model, model(images())))
        assert_near(found[1], found[0])


class TestTrainedTables:
    @over_pairs
    def test_are_one_per_layer_where_the_join_asks_for_it(self, pe: str, join_type: str) -> None:
        model = create(pe, join_type, img_size=(16, 32), depth=3, no_embed_class=True)
        if has_trained_tables(pe):
            assert model.pos_embed.shape == (JOINS[join_type].num_tables(3), 8, 24)
        else:
            assert model.pos_embed is None
            assert "pos_embed" not in model.state_dict()

    @pytest.mark.parametrize("join_type", [join for pe, join in legal_pairs() if pe == "learnable"])
    @pytest.mark.parametrize("again", [False, True])
    def test_start_as_a_normal_of_deviation_0_02_each_of_its_own(self, join_type: str, again: bool) -> None:
        model = create("learnable", join_type, embed_dim=240)
        if again:
            model.init_weights()
        for table in model.pos_embed:
            assert table.std().item() == pytest.approx(0.02, rel=5 / (2 * table.numel()) ** 0.5)
        assert len(model.pos_embed.unique(dim=0)) == len(model.pos_embed)


class TestInputSize:
    @over_pairs
    def test_of_the_same_size_changes_no_bit(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        before, logits = copy.deepcopy(model.state_dict()), model(images())
        model.set_input_size((32, 32))
        assert_equal(dict(model.state_dict()), dict(before))
        assert_equal(model(images()), logits)

    @over_pairs
    def test_of_another_shape_gives_the_logits_of_a_dynamic_model(self, pe: str, join_type: str) -> None:
        dynamic = tiny(pe, join_type, dynamic_img_size=True)
        for height, width in ((40, 24), (16, 64)):  # the latter has as many patches as before
            model, pixels = tiny(pe, join_type), images(1, height, width)
            model.set_input_size((height, width))
            assert_near(model(pixels), dynamic(pixels), 1e-9)

    @over_pairs
    def test_gives_a_model_as_if_created_for_it(self, pe: str, join_type: str) -> None:
        """The shapes agree, and so do the logits once the weights do: nothing of the old size is left behind."""
        model, created = tiny(pe, join_type), create(pe, join_type, img_size=(16, 40)).double().eval()
        model.set_input_size((16, 40))
        created.load_state_dict(model.state_dict())
        assert_equal(created(images(1, 16, 40)), model(images(1, 16, 40)))

    @over_pairs
    def test_and_back_leaves_what_is_not_trained_as_it_was(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        state, logits = copy.deepcopy(model.state_dict()), model(images())
        model.set_input_size((24, 40))
        model.set_input_size((32, 32))
        assert model(images()).isfinite().all()
        model.load_state_dict(state)
        assert_equal(model(images()), logits)

    @over_pairs
    def test_keeps_frozen_parameters_frozen(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type).requires_grad_(False)
        model.set_input_size((24, 40))
        assert not any(parameter.requires_grad for parameter in model.parameters())

    @over_pairs
    def test_follows_the_patch_size(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        model.set_input_size(img_size=(24, 20), patch_size=(4, 4))
        assert model.patch_embed.grid_size == (6, 5)
        assert model.forward_features(images(1, 24, 20)).shape == (1, 31, 24)

    @pytest.mark.parametrize("kwargs", [{}, {"no_embed_class": True}, {"reg_tokens": 2}], ids=str)
    @pytest.mark.parametrize("size", [(48, 48), (24, 40), (16, 40)])
    def test_of_the_default_pair_acts_as_timms(self, size: tuple[int, int], kwargs: dict[str, Any]) -> None:
        ours, theirs = tiny(**kwargs), timms(**kwargs)
        dynamic, timms_dynamic = tiny(dynamic_img_size=True, **kwargs), timms(dynamic_img_size=True, **kwargs)
        ours.set_input_size(size)
        theirs.set_input_size(size)
        pixels = images(1, *size)
        assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))
        assert_near(ours(pixels), theirs(pixels))
        assert_near(dynamic(pixels), timms_dynamic(pixels))


INTERMEDIATES: list[dict[str, Any]] = [
    {},
    {"indices": 2},
    {"indices": [0, -1]},
    {"indices": (2, 0)},
    {"indices": [1], "stop_early": True},
    {"indices": [1], "stop_early": True, "intermediates_only": True},
    {"norm": True},
    {"output_fmt": "NLC"},
    {"return_prefix_tokens": True},
    {"return_prefix_tokens": True, "intermediates_only": True, "output_fmt": "NLC", "norm": True},
    {"output_dict": True},
    {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True, "indices": 1},
    *([{"is_causal": True}] if CAUSAL else []),
]
PREFIX_KWARGS = pytest.mark.parametrize(
    "kwargs", [{}, {"name": DISTILLED}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}], ids=str
)


class TestIntermediates:
    @PREFIX_KWARGS
    @pytest.mark.parametrize("call", INTERMEDIATES, ids=str)
    def test_of_the_default_pair_are_timms(self, call: dict[str, Any], kwargs: dict[str, Any]) -> None:
        ours, theirs = tiny(depth=3, **kwargs), timms(depth=3, **kwargs)
        assert_near(ours.forward_intermediates(images(), **call), theirs.forward_intermediates(images(), **call))

    @PREFIX_KWARGS
    @pytest.mark.parametrize(
        "call",
        [{}, {"n": 2}, {"n": [0, 2]}, {"n": 3, "reshape": True}, {"return_prefix_tokens": True, "norm": True}],
        ids=str,
    )
    def test_layers_of_the_default_pair_are_timms(self, call: dict[str, Any], kwargs: dict[str, Any]) -> None:
        ours, theirs = tiny(depth=3, **kwargs), timms(depth=3, **kwargs)
        assert_near(ours.get_intermediate_layers(images(), **call), theirs.get_intermediate_layers(images(), **call))

    def test_of_the_default_pair_are_timms_on_another_grid(self) -> None:
        ours, theirs = tiny(dynamic_img_size=True), timms(dynamic_img_size=True)
        pixels = images(1, 16, 40)
        assert_near(ours.forward_intermediates(pixels), theirs.forward_intermediates(pixels))

    @pytest.mark.parametrize("indices", [0, 4, [3], [-4], []])
    def test_of_a_block_that_is_not_there_are_refused(self, indices: Any) -> None:
        with pytest.raises(ValueError, match="blocks 0 to 2"):
            tiny(depth=3).forward_intermediates(images(1), indices=indices)

    def test_in_an_unknown_format_are_refused(self) -> None:
        with pytest.raises(ValueError, match="NHWC"):
            tiny().forward_intermediates(images(1), output_fmt="NHWC")

    @over_pairs
    def test_end_in_the_features(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type, img_size=(16, 32))
        pixels = images(2, 16, 32)
        features, maps = model.forward_intermediates(pixels, norm=True)
        assert_equal(features, model.forward_features(pixels))
        assert [tuple(one.shape) for one in maps] == [(2, 24, 2, 4)] * 2
        assert_equal(maps[-1].flatten(2).transpose(1, 2), features[:, 1:])
        (early,) = model.get_intermediate_layers(pixels, [0], reshape=True, norm=True)
        assert_equal(early, maps[0])

    @over_pairs
    def test_survive_pruning(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type, depth=3)
        expected = model.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
        assert model.prune_intermediate_layers([0, 1]) == [0, 1]
        assert len(model.blocks) == 2
        assert_equal(model.forward_intermediates(images(), indices=[0, 1], intermediates_only=True), expected)
        assert_equal(model(images()), model.forward_features(images()))
        terms = model.position_terms()
        assert {len(terms.residual), len(terms.attention)} <= {0, 2}

    @over_pairs
    def test_pruning_leaves_no_parameter_without_a_use(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type, depth=3)
        model.prune_intermediate_layers([1])
        found = gradients(model, model(images()))
        assert [name for name, gradient in found.items() if not gradient.any()] == []
        if model.pos_embed is not None:
            assert [layer for layer, gradient in enumerate(found["pos_embed"]) if not gradient.any()] == []

    @over_pairs
    def test_come_out_of_timms_feature_extractor(self, pe: str, join_type: str) -> None:
        extractor = create(pe, join_type, depth=3, features_only=True, out_indices=(0, 1)).double().eval()
        expected = create(pe, join_type, depth=3).double().eval().forward_intermediates(images(), [0, 1])[1]
        assert extractor.feature_info.channels() == [24, 24]
        assert_equal(extractor(images()), expected)

    def test_of_the_default_pair_come_out_of_timms_feature_extractor_as_timms(self) -> None:
        kwargs: dict[str, Any] = {**SIZES, "depth": 4, "features_only": True}
        ours = disturb(timm.create_model(DEIT, **kwargs).double()).eval()
        theirs = timm.models.deit.deit_tiny_patch16_224(**kwargs).double().eval()
        theirs.load_state_dict(ours.state_dict())
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert_near(ours(images()), theirs(images()))


class TestOptimisation:
    @over_pairs
    def test_never_decays_positions_or_tokens(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type, reg_tokens=1)
        parameters, named = dict(model.named_parameters()), model.no_weight_decay()
        assert named - parameters.keys() <= timms().no_weight_decay(), "beyond timm's own, only what exists"
        assert {"cls_token", "pos_embed"} | timms().no_weight_decay() <= named
        for prefix, module in model.named_modules():
            if isinstance(module, encodings.Encoding):
                assert {f"{prefix}.{name}" for name in module.no_weight_decay()} <= named

    @over_pairs
    @pytest.mark.parametrize("layer_decay", [None, 0.75])
    def test_by_timm_takes_every_parameter_once(self, pe: str, join_type: str, layer_decay: float | None) -> None:
        model = create(pe, join_type)
        optimiser = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
        taken = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))
        spared = {id(one) for group in optimiser.param_groups if not group["weight_decay"] for one in group["params"]}
        parameters = dict(model.named_parameters())
        assert all(id(parameters[name]) in spared for name in model.no_weight_decay() & parameters.keys())

    @over_pairs
    def test_by_timm_scales_what_a_join_holds_for_a_layer_as_that_layer(self, pe: str, join_type: str) -> None:
        model = create(pe, join_type, depth=3)
        optimiser = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.5)
        scales = {id(one): group["lr_scale"] for group in optimiser.param_groups for one in group["params"]}
        for layer, block in enumerate(model.blocks):
            norms = [norm for name, norm in model.join.named_modules() if name.endswith(f".{layer}")]
            of_layer = {scales[id(one)] for module in (block, *norms) for one in module.parameters()}
            assert of_layer == {scales[id(block.norm1.weight)]}
        of_input = [] if model.join.encoding is None else [*model.join.encoding.parameters()]
        of_input += [] if model.pos_embed is None else [model.pos_embed]
        assert {scales[id(one)] for one in of_input} <= {scales[id(model.patch_embed.proj.weight)]}
        of_output = [one for name, one in model.join.named_parameters() if name.startswith("output_norm")]
        assert {scales[id(one)] for one in of_output} <= {scales[id(model.norm.weight)]}

    def test_by_timm_scales_a_token_encoding_as_the_block_before_it(self) -> None:
        for pe, layer in (("peg", 0), ("peg(after=-1)", 2)):
            model = create(pe, depth=3)
            optimiser = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.5)
            scales = {id(one): group["lr_scale"] for group in optimiser.param_groups for one in group["params"]}
            found = {scales[id(one)] for one in model.token_encoding.parameters()}
            assert found == {scales[id(model.blocks[layer].norm1.weight)]}


class TestStorage:
    @over_pairs
    def test_a_copy_is_the_same_model(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        twin = copy.deepcopy(model)
        assert_equal(twin(images()), model(images()))
        disturb(model)
        assert (twin(images()) - model(images())).abs().max() > 1e-6

    @over_pairs
    def test_a_pickled_model_is_the_same(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        again = pickle.loads(pickle.dumps(model))
        assert_equal(again(images()), model(images()))
        assert (again.pe, again.join_type) == (pe, join_type)

    @over_pairs
    def test_a_state_dict_holds_the_parameters_and_whole_numbers_at_most(self, pe: str, join_type: str) -> None:
        model, other = tiny(pe, join_type), create(pe, join_type).double().eval()
        state, parameters = model.state_dict(), dict(model.named_parameters()).keys()
        assert parameters <= state.keys()
        assert not any(state[name].is_floating_point() for name in state.keys() - parameters)
        other.load_state_dict(model.state_dict())
        assert_equal(other(images()), model(images()))

    @over_pairs
    def test_a_cast_to_half_precision_and_back_spoils_only_the_parameters(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        cast = copy.deepcopy(model).half().double()
        cast.load_state_dict(model.state_dict())
        assert_equal(cast(images()), model(images()))

    @over_pairs
    def test_a_model_made_on_the_meta_device_works_once_loaded(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type)
        with torch.device("meta"):
            loaded = create(pe, join_type)
        assert all(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        loaded.to_empty(device="cpu").double().eval().load_state_dict(model.state_dict())
        assert_equal(loaded(images()), model(images()))

    @over_pairs
    def test_timms_arguments_device_and_dtype_reach_everything(self, pe: str, join_type: str) -> None:
        model, doubled = tiny(pe, join_type), create(pe, join_type, dtype=torch.float64).eval()
        doubled.load_state_dict(model.state_dict())
        real = [tensor for tensor in (*doubled.parameters(), *doubled.buffers()) if tensor.is_floating_point()]
        assert all(tensor.dtype == torch.float64 for tensor in real)
        assert_equal(doubled(images()), model(images()))
        meta = create(pe, join_type, device="meta")
        assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))

    @over_pairs
    def test_a_model_in_bfloat16_stays_in_bfloat16(self, pe: str, join_type: str) -> None:
        model = create(pe, join_type).bfloat16().eval()
        assert model(images().bfloat16()).dtype == torch.bfloat16
        terms = model.position_terms()
        found = [term for term in (terms.input, *terms.residual, *terms.attention, terms.output) if term is not None]
        assert all(term.dtype == torch.bfloat16 for term in found)

    @over_pairs
    def test_autocast_trains(self, pe: str, join_type: str) -> None:
        model = disturb(create(pe, join_type))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images().float())
        assert logits.dtype == torch.bfloat16
        assert all(gradient.isfinite().all() for gradient in gradients(model, logits.float()).values())


class TestArguments:
    @over_pairs
    def test_names_are_kept_on_the_model(self, pe: str, join_type: str) -> None:
        model = create(pe, join_type)
        assert (model.pe, model.join_type, model.join.name) == (pe, join_type, join_type)

    @over_pairs
    def test_the_norm_layer_may_be_another(self, pe: str, join_type: str) -> None:
        model = tiny(pe, join_type, norm_layer=partial(nn.RMSNorm, eps=1e-3))
        assert model(images(1)).isfinite().all()
        assert not [module for module in model.join.modules() if isinstance(module, nn.LayerNorm)]
