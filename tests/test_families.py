"""timm's interface, as its own tests ask for it, of every family of models; the pairs take turns."""

from typing import Any

import pytest
import timm
import torch
from timm.models import get_model_input_config, group_parameters
from torch import Tensor

from tests.models import FAMILIES, PAIRS, sizes_of

BEHIND_CONVOLUTIONS = ["vit_base_mci_224", "vit_base_resnet26d_224", "vit_small_r26_s32_224", "vitamin_small_224"]
"""Their first network cannot be made small: they are built on the meta device, and meet one pair each."""
TURNS = 8
"""Each other family meets every eighth pair, and each pair four families or five."""
CASES = [
    (name, *pair)
    for turn, name in enumerate(FAMILIES)
    for pair in (PAIRS[-1 - turn :: len(PAIRS)] if name in BEHIND_CONVOLUTIONS else PAIRS[turn % TURNS :: TURNS])
]


def create(name: str, pe: str, join_type: str, **arguments: Any) -> Any:
    on_meta = {"depth": 2, "device": "meta"}
    torch.manual_seed(0)
    sizes = on_meta if name in BEHIND_CONVOLUTIONS else {**sizes_of(name), "img_size": (32, 48)}
    return timm.create_model(name, pe=pe, join_type=join_type, **{**sizes, **arguments})


def pixels_for(model: Any) -> Tensor:
    weight = next(model.parameters())
    return torch.zeros(2, *get_model_input_config(model)["input_size"]).to(weight)


@pytest.mark.parametrize(("name", "pe", "join_type"), CASES)
def test_timms_interface(name: str, pe: str, join_type: str) -> None:
    model = create(name, pe, join_type, num_classes=7)
    pixels, (height, width) = pixels_for(model), model.patch_embed.grid_size
    features = model.forward_features(pixels)
    assert features.shape == (2, model.num_prefix_tokens + height * width, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)

    names = {parameter_name for parameter_name, _ in model.named_parameters()}
    assert group_parameters(model, model.group_matcher(), reverse=True).keys() == names
    assert {one for one in model.no_weight_decay() if "." in one} <= names
    model.set_grad_checkpointing()
    logits = model.train()(pixels)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert [one for one, parameter in model.named_parameters() if parameter.grad is None] == []

    model.to(torch.bfloat16).requires_grad_(False).reset_classifier(0)
    assert model(pixels.bfloat16()).shape == (2, model.head_hidden_size)
    model.set_input_size(img_size=(2 * pixels.shape[2], pixels.shape[3]))
    last, outputs = model.eval().forward_intermediates(pixels_for(model))
    assert last.shape == (2, model.num_prefix_tokens + 2 * height * width, model.num_features)
    assert {(*output.shape,) for output in outputs} == {(2, model.num_features, 2 * height, width)}
    assert (last.dtype, any(parameter.requires_grad for parameter in model.parameters())) == (torch.bfloat16, False)
    model.prune_intermediate_layers([0], prune_norm=True)
    assert len(model.forward_intermediates(pixels_for(model), intermediates_only=True)) == 1


@pytest.mark.parametrize(("name", "pe", "join_type"), CASES[::6])
def test_timms_feature_extractor(name: str, pe: str, join_type: str) -> None:
    features = create(name, pe, join_type, features_only=True, out_indices=(0, 1))
    outputs = features(pixels_for(features))
    assert [output.shape[1] for output in outputs] == features.feature_info.channels()
