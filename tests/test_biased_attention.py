"""Attention with a trained bias gives the plain formula's results and gradients, and holds nothing over pairs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lape_vit import biased_attention
from lape_vit.biased_attention import BiasedAttention
from lape_vit.encodings import LayerSpec, resolve
from lape_vit.encodings.base import Bias
from lape_vit.encodings.relative_bias import RelativeBias
from lape_vit.places import Places
from tests.models import images, over_pairs, tiny

WITH_BIAS = ["2D_RPE", "cpb", "irpe", "irpe(irpe_on=qk)"]


def train(model: Any, fused: bool) -> Any:
    """In training, in float64, by one of the two ways."""
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model.train()


def gradients(model: Any, pixels: Tensor, fused: bool) -> list[Tensor | None]:
    loss = train(model, fused)(pixels).square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def assert_near(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert [one is None for one in actual] == [one is None for one in expected]
    largest = max(float(one.abs().max()) for one in expected if one is not None)
    for one, other in zip(actual, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * largest)


@over_pairs
def test_gradients_are_those_of_the_plain_formula(pe: str, join_type: str) -> None:
    model, pixels = tiny(pe, join_type), images()
    assert_near(gradients(model, pixels, fused=True), gradients(model, pixels, fused=False))


@pytest.mark.parametrize("block", [1, 60, 1000])
@pytest.mark.parametrize("pe", WITH_BIAS)
def test_the_size_of_a_block_makes_no_difference(pe: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = tiny(pe), images(3)
    monkeypatch.setattr(biased_attention, "BLOCK", block)
    assert_near(gradients(model, pixels, fused=True), gradients(model, pixels, fused=False))


def test_sums_over_blocks_lose_nothing_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biased_attention, "BLOCK", 1)
    encoding = RelativeBias(LayerSpec(head_dim=16, num_heads=2, grid=(6, 6), num_prefix_tokens=1, dim=32))
    bias = Bias(encoding, Places((6, 6)))
    rounded = [torch.randn(16, 2, 37, 16).bfloat16() for _ in range(4)] + [torch.randn(121, 2).bfloat16()]

    def of_inputs(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        q, k, v, grad, table = (one.to(dtype) for one in rounded)
        encoding.table.data = table
        inputs = [one.requires_grad_() for one in (q, k, v)]
        if fused:
            result = BiasedAttention.apply(bias, 0.25, 1.0, *inputs, encoding.table)
        else:
            result = (0.25 * q @ k.mT + bias.make(q, k)).softmax(dim=-1) @ v
        return [one.double() for one in torch.autograd.grad(result, [*inputs, encoding.table], grad)]

    exact, plain, by_blocks = (
        of_inputs(dtype, fused)
        for dtype, fused in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True))
    )
    for of_exact, of_plain, of_blocks in zip(exact, plain, by_blocks, strict=True):
        assert (of_blocks - of_exact).norm() <= 1.5 * (of_plain - of_exact).norm()


@pytest.mark.parametrize("pe", WITH_BIAS)
def test_gradients_of_gradients_are_those_of_the_plain_formula(pe: str) -> None:
    model, pixels = tiny(pe), images().requires_grad_()
    found = []
    for fused in (True, False):
        loss = train(model, fused)(pixels).square().sum()
        (of_pixels,) = torch.autograd.grad(loss, pixels, create_graph=True)
        penalty = of_pixels.square().sum()
        found.append(list(torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)))
    assert_near(*found)


@pytest.mark.parametrize("pe", WITH_BIAS)
def test_other_tensors_in_the_place_of_parameters_get_their_own_gradients(pe: str) -> None:
    model, pixels = train(tiny(pe), fused=True), images()
    others = {name: (value * 1.5).detach().requires_grad_() for name, value in model.named_parameters()}
    loss = torch.func.functional_call(model, others, (pixels,)).square().sum()
    of_others = torch.autograd.grad(loss, list(others.values()), allow_unused=True)  # the model has its own again
    model.load_state_dict(model.state_dict() | {name: value.detach() for name, value in others.items()})
    assert_near(list(of_others), gradients(model, pixels, fused=False))


@pytest.mark.parametrize("pe", WITH_BIAS)
def test_transforms_of_functions_pass_through(pe: str) -> None:
    model, pixels = train(tiny(pe), fused=True), images()
    of_transform = torch.func.grad(lambda x: model(x).square().sum())(pixels)
    pixels.requires_grad_()
    (of_pixels,) = torch.autograd.grad(model(pixels).square().sum(), pixels)
    torch.testing.assert_close(of_transform, of_pixels)


@pytest.mark.parametrize("pe", [*WITH_BIAS, "rope", "rope_mixed", "relative", "alibi", "lookhere", "pape"])
def test_nothing_over_pairs_of_tokens_is_held_for_the_backward_pass(pe: str) -> None:
    model = tiny(pe, img_size=64).train()
    tokens = model.pos_embed.shape[1] if model.pos_embed is not None else 1 + 8 * 8
    shared, held = set(), []

    def pack(x: Tensor) -> Tensor:
        if x.shape[-2:] == (tokens, tokens) and x.untyped_storage().data_ptr() not in shared:
            held.append(tuple(x.shape))
            shared.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(images(2, 64, 64))
    one_for_all_layers = 0 if resolve(pe, {}).attention.differs_by_layer else 1  # type: ignore[union-attr]
    per_layer = 0 if one_for_all_layers else len(model.blocks)
    assert len(held) <= one_for_all_layers + per_layer
