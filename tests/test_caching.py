"""What depends on a grid alone is computed once; what depends on a parameter follows it, however it was written."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.autograd import forward_ad

from lape_vit.encodings import ENCODINGS, AttentionEncoding, base
from lape_vit.encodings.base import Kept
from tests.models import assert_equal, disturb, images, over_pairs, tiny


def assert_fresh(model: Any, pixels: Tensor) -> None:
    """The output is, twice, that of a copy, which knows nothing from before."""
    outputs = [model(pixels), model(pixels)]
    fresh = copy.deepcopy(model)(pixels)
    assert all(torch.equal(output, fresh) for output in outputs)


def step(model: Any, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **kwargs: Any) -> None:
    """An optimiser's, of all parameters."""
    stepper = optimizer(model.parameters(), lr=0.1, **kwargs)
    with torch.enable_grad():
        model(images().to(model.head.weight.dtype)).square().sum().backward()
    stepper.step()


def step_fused(model: Any) -> None:
    """By torch's fused kernel, which does not count what it writes."""
    step(model, torch.optim.AdamW, fused=True)


def load(model: Any) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def replace(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter + 0.1))


def swap_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1


def average_in_place(model: Any) -> None:
    """As a teacher follows its student: through ``data``, in the mode in which it is."""
    student = tiny(model.pe, model.join_type, depth=len(model.blocks), img_size=model.patch_embed.img_size)
    for mine, of_student in zip(model.parameters(), student.parameters(), strict=True):
        mine.data.lerp_(of_student.data.to(mine.dtype) + 0.1, 0.5)


def write_by_foreach(model: Any) -> None:
    written = [parameter.data for parameter in model.parameters()]
    for data in written:
        data.grad = torch.ones_like(data)
    torch.optim.SGD(written, lr=0.1, foreach=True).step()


def copy_into_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data + 0.1)


def write_by_numpy(model: Any) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] += 0.1


def write_by_another_process(model: Any) -> None:
    """Its memory is written without any call on the tensor that this process holds."""
    for parameter in model.parameters():
        torch.from_dlpack(parameter.detach()).add_(0.1)


def take_averages(model: Any) -> None:
    average = ModelEmaV3(model, decay=0.5)
    average.update(tiny(model.pe, model.join_type, depth=len(model.blocks), img_size=model.patch_embed.img_size))
    model.load_state_dict(average.module.state_dict())


CHANGES: list[Callable[[Any], object]] = [
    step,
    step_fused,
    load,
    replace,
    swap_data,
    average_in_place,
    write_by_foreach,
    copy_into_data,
    write_by_numpy,
    write_by_another_process,
    take_averages,
    lambda model: model.float(),
    lambda model: model.set_input_size(img_size=(32, 48)),
    lambda model: model.requires_grad_(False),
    lambda model: model.prune_intermediate_layers([0], prune_head=False),
]


@over_pairs
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_no_change_leaves_a_stale_result(pe: str, join_type: str, training: bool) -> None:
    model = tiny(pe, join_type).train(training)
    for change in CHANGES:
        size = model.patch_embed.img_size
        model(images(2, *size).to(model.head.weight.dtype))
        change(model)
        assert_fresh(model, images(2, *model.patch_embed.img_size).to(model.head.weight.dtype))
        model.requires_grad_(True)


@over_pairs
@torch.no_grad()
def test_images_of_many_sizes_do_not_share_results(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type, dynamic_img_size=True)
    for size in ((32, 32), (24, 48), (48, 24), (32, 32)):
        assert_fresh(model, images(2, *size))


@over_pairs
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


ATTENTION = [name for name, encoding in ENCODINGS.items() if issubclass(encoding, AttentionEncoding)]


def kept_values(model: Any) -> list[Tensor]:
    """All results that a model's encodings keep."""
    kept = {id(store): store for module in model.modules() for store in vars(module).values() if type(store) is Kept}
    return [entry[-1] for store in kept.values() for entry in store.entries.values()]


def kept_tensors(model: Any) -> list[int]:
    """Their addresses."""
    return [value.data_ptr() for value in kept_values(model)]


@pytest.mark.parametrize("name", ENCODINGS)
@torch.no_grad()
def test_what_is_kept_is_kept_as_long_as_values_stay(name: str) -> None:
    model = tiny(name)
    model(images())
    kept = kept_tensors(model)
    model(images())
    assert kept_tensors(model) == kept
    with torch.enable_grad():
        model(images())
    assert kept_tensors(model) == kept


@pytest.mark.parametrize("name", ENCODINGS)
def test_in_training_only_what_depends_on_the_grid_alone_is_kept(name: str) -> None:
    model = tiny(name).train()
    model(images())
    twin = disturb(copy.deepcopy(model))  # which keeps nothing yet
    twin(images())
    assert_equal(kept_values(twin), kept_values(model))


@pytest.mark.parametrize("name", ["lookhere", "2D_RPE"])
@torch.no_grad()
def test_a_large_result_is_not_kept_for_each_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LAYER_LIMIT", 10)
    model = tiny(name)
    model(images())
    assert kept_tensors(model) == []
    assert_fresh(model, images())


@pytest.mark.parametrize("pe", ["2D_sin", "rope"])
@torch.no_grad()
def test_copies_and_pickles_of_a_model_have_results_of_their_own(pe: str) -> None:
    model, pixels = tiny(pe), images()
    model(pixels)
    assert len(kept_tensors(model)) == 1  # the layers share it
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not kept_tensors(other)
        assert_fresh(other, pixels)
        assert len(kept_tensors(other)) == 1
        assert kept_tensors(other) != kept_tensors(model)


@pytest.mark.parametrize("pe", ["learnable", "2D_sin", "2D_RPE", "rope", "rope_mixed"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
@torch.no_grad()
def test_tensors_in_the_place_of_parameters_are_heeded(pe: str) -> None:
    model, pixels = tiny(pe), images()
    others = {name: value + 0.1 for name, value in model.named_parameters()}
    stacked = {name: torch.stack([value, others[name]]) for name, value in model.named_parameters()}
    both = torch.func.vmap(lambda values: torch.func.functional_call(model, values, (pixels,)))(stacked)
    before = model(pixels)
    swapped = torch.func.functional_call(model, others, (pixels,))
    assert not torch.equal(swapped, before)
    assert torch.equal(swapped, torch.func.functional_call(model, others, (pixels,)))
    assert torch.equal(model(pixels), before)
    torch.testing.assert_close(both, torch.stack([before, swapped]))


@pytest.mark.parametrize("pe", ["2D_sin", "rope", "relative"])
def test_a_result_kept_within_a_transform_serves_outside_it(pe: str) -> None:
    model, pixels = tiny(pe), images()
    of_transform = torch.func.grad(lambda x: model(x).square().sum())(pixels)
    pixels = pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels).square().sum(), pixels)
    torch.testing.assert_close(of_transform, gradient)
    assert_fresh(model, pixels)


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
