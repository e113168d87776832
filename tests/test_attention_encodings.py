"""Encodings that live in attention, each against an independent reference."""

import math
from typing import Any

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingMixed, apply_rot_embed_cat
from torch import Tensor

from lape_vit.analysis.views import added_logits
from lape_vit.encodings import ENCODINGS, LayerSpec
from lape_vit.encodings.rotary import Rotary, turn
from lape_vit.places import Grid, Places
from tests.models import assert_near, disturb, images, tiny

B, HEADS, D = 2, 3, 8
GRIDS: list[Grid] = [(3, 5), (4, 4)]
over_grids = pytest.mark.parametrize("grid", GRIDS)
over_prefixes = pytest.mark.parametrize("prefix", [0, 1, 2])
DIRECTED = ["learnable", "1D_sin", "2D_sin", "relative", "2D_RPE", "rope", "rope_axial", "rope_mixed"]
DIRECTED += ["rope_dinov3", "rope_golden", "factorized", "fourier", "peg"]
"""Encodings that tell columns from rows, which no function of a distance can do."""
ROTARY = [name for name, encoding in ENCODINGS.items() if issubclass(encoding, Rotary)]


def build(name: str, grid: Grid, prefix: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return disturb(ENCODINGS[name](spec(D, HEADS, grid, prefix), **options).double())  # type: ignore[arg-type]


def spec(head_dim: int, heads: int, grid: Grid, prefix: int) -> LayerSpec:
    return LayerSpec(head_dim, heads, grid, prefix, heads * head_dim)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bucket(query: int, key: int, k: int) -> int:
    return max(-k, min(k, key - query)) + k + 1


@over_grids
@over_prefixes
@pytest.mark.parametrize("k", [1, 2, 6])
@torch.no_grad()
def test_relative_is_shaws_sum_over_vectors_of_each_pair(grid: Grid, prefix: int, k: int) -> None:
    encoding = build("relative", grid, prefix, max_relative_distance=k)
    tokens = prefix + grid[0] * grid[1]
    q, attention = noise(B, HEADS, tokens, D), noise(B, HEADS, tokens, tokens, seed=1).softmax(-1)
    key_vectors, value_vectors = (torch.zeros(tokens, tokens, D, dtype=torch.float64) for _ in range(2))
    for i in range(tokens):
        for j in range(tokens):
            x = y = 0
            if i >= prefix and j >= prefix:
                (row_i, column_i), (row_j, column_j) = divmod(i - prefix, grid[1]), divmod(j - prefix, grid[1])
                x, y = bucket(column_i, column_j, k), bucket(row_i, row_j, k)
            key_vectors[i, j] = torch.cat([encoding.key_x[x], encoding.key_y[y]])
            value_vectors[i, j] = torch.cat([encoding.value_x[x], encoding.value_y[y]])
    k, places = noise(B, HEADS, tokens, D, seed=2), Places(grid)
    assert_near(added_logits(encoding, q, q, places), torch.einsum("bhid,ijd->bhij", q, key_vectors) / D**0.5)
    wide_q, wide_k, wide_v = encoding.widen(q, k, k, q, places)
    assert wide_q.shape[-1] == math.ceil((D + sum(grid)) / 8) * 8  # no more than there are places, in eights
    assert_near(wide_q @ wide_k.mT, q @ k.mT + torch.einsum("bhid,ijd->bhij", q, key_vectors))
    gathered = torch.einsum("bhij,bhijd->bhid", attention, k[:, :, None] + value_vectors)
    assert_near(encoding.narrow(attention @ wide_v, places), gathered)


@over_grids
@over_prefixes
@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_2d_rpe_is_a_bias_per_offset_normalised_over_the_keys(grid: Grid, prefix: int, normalised: bool) -> None:
    encoding = build("2D_RPE", grid, prefix)
    if normalised:
        encoding.add_norm()
        disturb(encoding.double())
    height, width = grid
    patches = height * width
    expected = torch.zeros(HEADS, prefix + patches, prefix + patches, dtype=torch.float64)
    for i in range(patches):
        for j in range(patches):
            dy, dx = i // width - j // width, i % width - j % width
            offset = (dy + height - 1) * (2 * width - 1) + dx + width - 1
            expected[:, prefix + i, prefix + j] = encoding.table[offset]
        if normalised:
            row = expected[:, prefix + i, prefix:]
            centred = row - row.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            expected[:, prefix + i, prefix:] = scaled * encoding.norm.weight + encoding.norm.bias
    q = noise(B, HEADS, prefix + patches, D)
    assert_near(encoding.logits_bias(q, q, Places(grid)), expected)


@over_grids
@over_prefixes
def test_rope_axial_turns_as_timms_module_does(grid: Grid, prefix: int) -> None:
    encoding = build("rope_axial", grid, prefix)
    module = RotaryEmbeddingCat(D, temperature=100.0, in_pixels=False, feat_shape=list(grid), grid_indexing="xy")
    q = noise(B, HEADS, prefix + grid[0] * grid[1], D)
    expected = apply_rot_embed_cat(q[:, :, prefix:], module.get_embed().double())
    assert_near(encoding.rotate(q, q, Places(grid))[0][:, :, prefix:], expected, 1e-5)  # timm's tables are in float32


@over_grids
@over_prefixes
def test_rope_mixed_turns_as_timms_module_does(grid: Grid, prefix: int) -> None:
    encoding = build("rope_mixed", grid, prefix)
    module = RotaryEmbeddingMixed(HEADS * D, depth=1, num_heads=HEADS, feat_shape=list(grid), grid_indexing="xy")
    with torch.no_grad():
        module.freqs.copy_(encoding.frequencies[:, None])
    q = noise(B, HEADS, prefix + grid[0] * grid[1], D)
    expected = apply_rot_embed_cat(q[:, :, prefix:], module.get_embed(list(grid))[0].double())
    assert_near(encoding.rotate(q, q, Places(grid))[0][:, :, prefix:], expected, 1e-5)


def test_rope_mixed_starts_with_the_magnitudes_and_right_angles_of_timms() -> None:
    ours = ENCODINGS["rope_mixed"](spec(16, 5, (4, 4), 1)).frequencies  # type: ignore[arg-type]
    theirs = RotaryEmbeddingMixed(80, depth=1, num_heads=5, temperature=10.0).freqs[:, 0]
    torch.testing.assert_close(torch.hypot(*ours), torch.hypot(*theirs))  # type: ignore[call-overload]
    first, second = ours[..., :4], ours[..., 4:]
    torch.testing.assert_close((first * second).sum(0), torch.zeros(5, 4), atol=1e-6, rtol=0)
    directions = torch.atan2(ours[1, :, 0], ours[0, :, 0])
    assert len(set(directions.tolist())) == 5  # each head is turned by an angle of its own


def test_tables_start_as_in_their_sources() -> None:
    torch.manual_seed(0)
    relative = ENCODINGS["relative"](spec(64, 3, (14, 14), 1), max_relative_distance=40)  # type: ignore
    for table in relative.parameters():
        assert table.mean().abs() < 0.1
        assert (table.std() - 1).abs() < 0.1
    assert not ENCODINGS["2D_RPE"](spec(64, 3, (14, 14), 1)).table.any()  # type: ignore[arg-type]


@over_grids
def test_rope_turns_by_the_tables_of_its_source(grid: Grid) -> None:
    q = noise(B, HEADS, 1 + grid[0] * grid[1], D)
    turned = build("rope", grid, 1).rotate(q, q, Places(grid))[0]
    expected = q.clone()
    for patch in range(grid[0] * grid[1]):
        row, column = divmod(patch, grid[1])
        for pair in range(D // 2):
            axis, index = divmod(pair, D // 4)
            place = (column, row)[axis] + 1
            angle = torch.tensor(place * 10000.0 ** (-2 * (index + 1) / (D / 2)), dtype=torch.float64)
            even, odd = q[:, :, 1 + patch, 2 * pair], q[:, :, 1 + patch, 2 * pair + 1]
            expected[:, :, 1 + patch, 2 * pair] = even * angle.cos() - odd * angle.sin()
            expected[:, :, 1 + patch, 2 * pair + 1] = even * angle.sin() + odd * angle.cos()
    assert_near(turned, expected)


@pytest.mark.parametrize("name", ROTARY)
@over_prefixes
def test_rotated_products_depend_on_the_offset_alone(name: str, prefix: int) -> None:
    grid = height, width = (5, 6)
    encoding = build(name, grid, prefix)
    q, k = (noise(1, HEADS, 1, D, seed=seed).expand(-1, -1, prefix + height * width, -1) for seed in (0, 1))
    turned_q, turned_k = encoding.rotate(q, k, Places(grid))
    products = (turned_q @ turned_k.transpose(-2, -1))[0, :, prefix:, prefix:].unflatten(1, grid).unflatten(3, grid)
    assert_near(products[:, :-1, :-1, :-1, :-1], products[:, 1:, 1:, 1:, 1:])
    assert_near(products[:, :-1, :, :-1], products[:, 1:, :, 1:])
    assert (products[:, 0, 0, 0, 0] - products[:, 0, 0, 0, 1]).abs().max() > 1e-3
    assert (products[:, 0, 0, 0, 0] - products[:, 0, 0, 1, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ROTARY)
def test_prefix_tokens_are_not_rotated_and_lengths_are_kept(name: str) -> None:
    q, k = noise(B, HEADS, 2 + 12, D), noise(B, HEADS, 2 + 12, D, seed=1)
    for before, after in zip((q, k), build(name, (3, 4), 2).rotate(q, k, Places((3, 4))), strict=True):
        assert torch.equal(before[:, :, :2], after[:, :, :2])
        assert_near(before.norm(dim=-1), after.norm(dim=-1))
        assert (before[:, :, 3:] - after[:, :, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotation_stays_in_the_dtype_of_q(name: str, dtype: torch.dtype) -> None:
    q = noise(B, HEADS, 1 + 12, D).to(dtype)
    encoding = build(name, (3, 4), 1).to(torch.float32)  # as under autocast: weights in float32
    assert all(turned.dtype == dtype for turned in encoding.rotate(q, q, Places((3, 4))))


@pytest.mark.parametrize("name", ["none", *DIRECTED])
def test_an_image_and_its_transpose_are_told_apart_by_position_alone(name: str) -> None:
    model = tiny(name, img_size=(24, 40))
    pixels = images(1, 24, 40)
    logits = model(pixels)
    model.set_input_size(img_size=(40, 24))
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.transpose(2, 3).clone())
    is_told_apart = (model(pixels.transpose(2, 3)) - logits).abs().max() > 1e-6
    assert is_told_apart == (name in DIRECTED)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("relative", {"max_relative_distance": 0}, "max_relative_distance=0"),
        ("rope_axial", {"rope_theta": 1.0}, "rope_theta=1.0"),
        ("rope_mixed", {"rope_theta": -3.0}, "rope_theta=-3.0"),
        ("rope_dinov3", {"rope_theta": 0.5}, "rope_theta=0.5"),
        ("rope_dinov3", {"rope_normalize": "mean"}, "rope_normalize='mean'"),
        ("rope_golden", {"rope_min_frequency": 0.0}, "rope_min_frequency=0.0"),
        ("rope_golden", {"rope_max_frequency": 0.1}, "rope_max_frequency=0.1"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny(name, **options)


def test_the_gradient_of_trained_turns_is_exact_from_the_result_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def turned(x: Tensor, angles: Tensor) -> Tensor:
        return turn(x, torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(-2), halves=False)

    assert torch.autograd.gradcheck(turned, (x, angles))
    assert torch.autograd.gradgradcheck(turned, (x, angles))
