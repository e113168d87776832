"""What does not depend on the images is computed once in evaluation, and never used after it changed."""

import copy
import io
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.autograd import forward_ad

from lape_vit.encodings import ENCODINGS, AttentionEncoding
from tests.models import images, over_sampled_pairs, tiny


def assert_fresh(model: Any, pixels: Tensor) -> None:
    """The output is, twice, that of a model which knows nothing from before."""
    outputs = [model(pixels), model(pixels)]
    for module in model.modules():
        if hasattr(module, "cache"):
            module.cache.entry = None
    fresh = model(pixels)
    assert all(torch.equal(output, fresh) for output in outputs)


def step(model: Any) -> None:
    """An optimiser's, of all parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(images()).square().sum().backward()
    optimizer.step()


def load(model: Any) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def replace(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter + 0.1))


def swap_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1


def write_data_and_switch(model: Any) -> None:
    model.train()
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    model.eval()


def take_averages(model: Any) -> None:
    average = ModelEmaV3(model, decay=0.5)
    average.update(tiny(model.pe, model.join_type, img_size=32))
    model.load_state_dict(average.module.state_dict())


CHANGES: list[Callable[[Any], object]] = [
    step,
    load,
    replace,
    swap_data,
    write_data_and_switch,
    take_averages,
    lambda model: model.float(),
    lambda model: model.set_input_size(img_size=(32, 48)),
    lambda model: model.requires_grad_(False),
    lambda model: model.prune_intermediate_layers([0], prune_head=False),
]


@over_sampled_pairs
@torch.no_grad()
def test_no_change_leaves_a_stale_result(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    for change in CHANGES:
        size = model.patch_embed.img_size
        model(images(2, *size).to(model.head.weight.dtype))
        change(model)
        assert_fresh(model, images(2, *model.patch_embed.img_size).to(model.head.weight.dtype))


@over_sampled_pairs
@torch.no_grad()
def test_images_of_many_sizes_do_not_share_results(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type, dynamic_img_size=True)
    for size in ((32, 32), (24, 48), (48, 24), (32, 32)):
        assert_fresh(model, images(2, *size))


@over_sampled_pairs
def test_a_forward_in_inference_mode_does_not_hinder_gradients_later(pe: str, join_type: str) -> None:
    model, pixels = tiny(pe, join_type), images()
    before = torch.autograd.grad(model(pixels).sum(), list(model.parameters()))
    with torch.inference_mode():
        model(pixels)
    after = torch.autograd.grad(model(pixels).sum(), list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))
    with torch.inference_mode():
        model.requires_grad_(False)
        model(pixels)
    model.head.requires_grad_(True)
    model(pixels.requires_grad_(True)).sum().backward()  # through what was kept


@over_sampled_pairs
@torch.no_grad()
def test_evaluation_computes_terms_once(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    with patch.object(type(model), "position_terms", autospec=True, side_effect=type(model).position_terms) as terms:
        for batch in (2, 3, 2):
            model(images(batch))
        assert terms.call_count == 1


ATTENTION = [name for name, encoding in ENCODINGS.items() if issubclass(encoding, AttentionEncoding)]


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_attention_encodings_compute_their_tables_once(name: str) -> None:
    model = tiny(name)
    kept = []
    for _ in range(2):
        model(images())
        kept.append([block.attn.encoding.cache.entry for block in model.blocks])
    assert all(entry is not None for entry in kept[0])
    assert all(first is second for first, second in zip(*kept, strict=True))


@pytest.mark.parametrize("pe", ["learnable", "2D_RPE", "rope_mixed"])
@torch.no_grad()
def test_copies_and_pickles_of_a_model_have_results_of_their_own(pe: str) -> None:
    model, pixels = tiny(pe), images()
    model(pixels)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(module.cache.entry is None for module in other.modules() if hasattr(module, "cache"))
        step(other)
        assert_fresh(other, pixels)
    assert_fresh(model, pixels)


@pytest.mark.parametrize("pe", ["learnable", "2D_sin", "2D_RPE", "rope_mixed"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
@torch.no_grad()
def test_tensors_in_the_place_of_parameters_are_heeded(pe: str) -> None:
    model, pixels = tiny(pe), images()
    others = {name: value + 0.1 for name, value in model.named_parameters()}
    before = model(pixels)
    swapped = torch.func.functional_call(model, others, (pixels,))
    assert not torch.equal(swapped, before)
    assert torch.equal(swapped, torch.func.functional_call(model, others, (pixels,)))
    assert torch.equal(model(pixels), before)
    stacked = {name: torch.stack([value, others[name]]) for name, value in model.named_parameters()}
    both = torch.func.vmap(lambda values: torch.func.functional_call(model, values, (pixels,)))(stacked)
    torch.testing.assert_close(both, torch.stack([before, swapped]))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own use of it
@torch.no_grad()
def test_tangents_of_forward_differentiation_are_not_lost() -> None:
    model, pixels = tiny("learnable", "LaPE"), images()
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's kernel has no tangents
    model(pixels)
    with forward_ad.dual_level():
        table = forward_ad.make_dual(model.pos_embed.detach(), torch.randn_like(model.pos_embed))
        logits = torch.func.functional_call(model, {"pos_embed": table}, (pixels,))
        tangent = forward_ad.unpack_dual(logits).tangent
    assert tangent is not None
    assert tangent.abs().max() > 0
