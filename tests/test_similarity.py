"""Cosine similarity, and that what it is computed from is what attention reads in a real forward pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import models_lape  # noqa: F401
from lape_vit import encodings, joins
from lape_vit.similarity import cosine_similarity, layer_positions, token_map

GRID = (3, 5)
DEPTH = 3
MODELS = {
    "class token without a row": ("vit_compact_patch4_32", {"no_embed_class": True}),
    "class token with a row": ("vit_compact_patch4_32", {"no_embed_class": False}),
    "two prefix tokens": ("deit_tiny_distilled_patch16_224", {}),
    "norm before the blocks": ("deit_tiny_patch16_224", {"pre_norm": True, "reg_tokens": 2}),
}


def has_absolute_part(pe: str) -> bool:
    return encodings.resolve(pe).absolute is not None


PAIRS = [pair for pair in joins.legal_pairs() if has_absolute_part(pair[0]) and "+" not in pair[0]]


def build(pe: str, join_type: str, variant: str = "class token without a row", **kwargs: object) -> nn.Module:
    """A small model in float64 whose norms and positions are random, so that every layer differs."""
    name, options = MODELS[variant]
    size = {"img_size": (4 * GRID[0], 4 * GRID[1]), "patch_size": 4, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
    model = timm.create_model(name, pe=pe, join_type=join_type, **{**size, **options, **kwargs}).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter is model.pos_embed:
                parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) + 0.1)
    return model


def record_attention(model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What each block's norm1 gives and what its attention reads of it, each (B, N, D), in one forward pass."""
    normed: list[Tensor] = []
    read: list[Tensor] = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda module, args, output: normed.append(output))
        block.attn.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(images)
    return normed, read


def silence_content(model: nn.Module) -> None:
    """Patches and prefix tokens become zero, and each block reads x_0 in place of what earlier blocks made of it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("patch_embed.") or name.endswith("_token"):
                parameter.zero_()
    first: list[Tensor] = []

    def feed_x0(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first.append(args[0])
        return (first[0], *args[1:])

    for block in model.blocks:
        block.register_forward_pre_hook(feed_x0)
    # A norm makes its bias of zeros: where it reads content without positions, that bias would be content.
    target = model.join.target
    before = [model.norm_pre] if target != "input" else []
    around = [block.norm1 for block in model.blocks] if target == "attention" else []
    for norm in (*before, *around):
        if isinstance(norm, nn.LayerNorm):
            nn.init.zeros_(norm.bias)


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize(("pe", "join_type"), PAIRS)
def test_positions_are_what_attention_reads_where_only_positions_flow(pe: str, join_type: str, variant: str) -> None:
    model = build(pe, join_type, variant)
    silence_content(model)
    _, read = record_attention(model, torch.randn(1, 3, 4 * GRID[0], 4 * GRID[1], dtype=torch.float64))
    positions = layer_positions(model)
    assert len(positions) == len(read) == DEPTH
    for ours, received in zip(positions, read, strict=True):
        torch.testing.assert_close(ours, received[0, model.num_prefix_tokens :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pe", "join_type"), [pair for pair in PAIRS if joins.JOINS[pair[1]].target == "attention"])
def test_positions_are_what_is_added_to_the_normalised_content_of_real_images(pe: str, join_type: str) -> None:
    model = build(pe, join_type)
    normed, read = record_attention(model, torch.randn(2, 3, 4 * GRID[0], 4 * GRID[1], dtype=torch.float64))
    for ours, content, received in zip(layer_positions(model), normed, read, strict=True):
        added = (received - content)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(added, ours.expand_as(added), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("pe", "join_type"), PAIRS)
def test_positions_of_another_grid_are_those_of_a_forward_pass_at_that_size(pe: str, join_type: str) -> None:
    model = build(pe, join_type, dynamic_img_size=True)
    silence_content(model)
    _, read = record_attention(model, torch.randn(1, 3, 16, 8, dtype=torch.float64))
    for ours, received in zip(layer_positions(model, grid=(4, 2)), read, strict=True):
        assert ours.shape == (8, model.embed_dim)
        torch.testing.assert_close(ours, received[0, model.num_prefix_tokens :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pe", [pe for pe in encodings.names() if not has_absolute_part(pe)])
def test_an_encoding_without_an_absolute_part_has_nothing_to_draw(pe: str) -> None:
    for join_type in joins.legal_joins(pe):
        with pytest.raises(ValueError, match=f"pe='{pe}' .*nothing to draw"):
            layer_positions(build(pe, join_type))


def random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_similarity_is_the_cosine_of_the_angle_between_rows() -> None:
    rows = random_rows(6, 5)
    expected = [[nn.functional.cosine_similarity(a, b, dim=0) for b in rows.double()] for a in rows.double()]
    torch.testing.assert_close(cosine_similarity(rows), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_similarity_is_exactly_symmetric_with_ones_on_the_diagonal_and_within_bounds(dtype: torch.dtype) -> None:
    rows = random_rows(50, 7).to(dtype)
    similarity = cosine_similarity(torch.cat([rows, -rows, rows * 2]))
    assert similarity.dtype == torch.float64
    assert torch.equal(similarity, similarity.T)
    assert torch.equal(similarity.diagonal(), torch.ones(150, dtype=torch.float64))
    assert similarity.abs().max() <= 1
    torch.testing.assert_close(similarity[:50, 50:100].diagonal(), -torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 3.0, 1e20, 1e300])
def test_similarity_does_not_change_with_the_scale_of_any_row(scale: float) -> None:
    rows = random_rows(9, 4).double()
    scaled = rows.clone()
    scaled[::2] *= scale
    torch.testing.assert_close(cosine_similarity(scaled), cosine_similarity(rows), rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_is_like_no_other_row() -> None:
    rows = random_rows(4, 3)
    rows[1] = rows[2] = 0
    similarity = cosine_similarity(rows)
    assert similarity[1].tolist() == [0, 1, 0, 0]
    assert similarity[2].tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(similarity[0, 3], cosine_similarity(rows[[0, 3]])[0, 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_without_a_direction_are_refused(value: float) -> None:
    rows = random_rows(4, 3)
    rows[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        cosine_similarity(rows)


def test_a_token_map_lays_its_row_of_the_matrix_out_as_the_patches_are() -> None:
    similarity = cosine_similarity(random_rows(GRID[0] * GRID[1], 6))
    drawn = token_map(similarity, GRID, (2, 1))
    assert drawn.shape == GRID
    assert drawn[2, 1] == 1
    assert drawn[0, 4] == similarity[2 * 5 + 1, 4]
    assert drawn[1, 0] == similarity[2 * 5 + 1, 5]


@pytest.mark.parametrize("token", [(3, 0), (0, 5), (-1, 0), (0, -1)])
def test_a_token_outside_the_grid_is_refused_with_the_grid_named(token: tuple[int, int]) -> None:
    similarity = torch.eye(15)
    with pytest.raises(ValueError, match=r"grid of 3 x 5 .* rows are 0 to 2, columns 0 to 4"):
        token_map(similarity, GRID, token)


def test_the_module_runs_without_matplotlib() -> None:
    root = Path(__file__).parent.parent
    blocked = "import sys; sys.modules['matplotlib'] = None; import runpy; runpy.run_module('lape_vit.similarity')"
    subprocess.run([sys.executable, "-W", "error", "-c", blocked], check=True, cwd=root)
    subprocess.run([sys.executable, "-W", "error", "-m", "lape_vit.similarity"], check=True, cwd=root)
