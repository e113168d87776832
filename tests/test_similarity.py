"""Views of positions, and that what they are computed from is what attention gets in a real forward pass."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import models_lape  # noqa: F401
from lape_vit import encodings, joins
from lape_vit.analysis.positions import (
    PositionView,
    cosine_similarity,
    encoding_tables,
    layer_correlations,
    layer_positions,
    mean_by_distance,
    plane_frequencies,
    position_views,
    token_map,
)
from lape_vit.analysis.views import mean_by_offset
from lape_vit.encodings import AttentionEncoding
from lape_vit.places import Places
from tests.models import PAIRS as ALL_PAIRS
from tests.models import assert_near, norm1_reads_content_alone, over_pairs, tiny

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
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or parameter is model.pos_embed or ".encoding." in name:
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
    before = [model.norm_pre] if model.position_terms().input is None else []
    around = [block.norm1 for block in model.blocks] if norm1_reads_content_alone(model) else []
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


@pytest.mark.parametrize(("pe", "join_type"), [pair for pair in PAIRS if norm1_reads_content_alone(tiny(*pair))])
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


def images_of(grid: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64)


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


# ---- views of every encoding


def record_calls(model: nn.Module, method: str) -> list[Tensor]:
    """What a method of each layer's attention encoding returns in forward passes from now on, in order."""
    returned: list[Tensor] = []

    def recording(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            returned.append(own(*args))
            return returned[-1]

        return call

    for block in model.blocks:
        setattr(block.attn.encoding, method, recording(getattr(block.attn.encoding, method)))
    return returned


def record_added_logits(model: nn.Module) -> list[Tensor]:
    """What each layer's attention encoding adds to the logits in forward passes from now on, in order."""
    encodings = [block.attn.encoding for block in model.blocks]
    if "widen" not in encodings[0].overridden:
        return record_calls(model, "logits_bias")
    added: list[Tensor] = []

    def recording(encoding: AttentionEncoding) -> Callable[..., Any]:
        own = encoding.widen

        def widen(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
            wide = own(q, k, *others)
            widened = (wide[0] @ wide[1].mT - q @ k.mT) * encoding.head_dim**-0.5
            bias = encoding.logits_bias(q, k, others[-1])
            added.append(widened if bias is None else widened + bias)
            return wide

        return widen

    for encoding in encodings:
        encoding.widen = recording(encoding)
    return added


def between_patches(model: nn.Module, bias: Tensor) -> Tensor:
    """The patches' part (2, 15, 15) of a bias of both heads and all tokens."""
    P = model.num_prefix_tokens
    return bias.broadcast_to(1, 2, P + 15, P + 15)[0, :, P:, P:]


def has_attention_part(pe: str) -> bool:
    return encodings.resolve(pe).attention is not None


def view(model: nn.Module, name: str, grid: tuple[int, int] | None = None) -> PositionView:
    (found,) = (view for view in position_views(model, grid) if view.name == name)
    return found


@over_pairs
def test_every_encoding_shows_each_of_its_parts_in_every_layer_on_one_scale(pe: str, join_type: str) -> None:
    model = build(pe, join_type)
    views = position_views(model)
    assert [view.name for view in views if view.name == "similarity"] == ["similarity"] * has_absolute_part(pe)
    of_tokens = encodings.resolve(pe).token is not None
    assert [view.name for view in views if view.name == "response"] == ["response"] * of_tokens
    assert any(view.name not in ("similarity", "response") for view in views) == has_attention_part(pe)
    assert len({view.name for view in views}) == len(views)
    height, width = GRID
    for shown in views:
        blocks = range(1) if shown.name == "response" else range(DEPTH)  # the tokens change in one place
        assert shown.layers == [f"block {layer}, {join_type}" for layer in blocks]
        assert len(shown.values) == len(blocks)
        assert shown.limits[0] == -shown.limits[1] < 0
        for values in shown.values:
            side = len(shown.rows) or height * width
            assert values.shape[1:] == ((2 * height - 1, 2 * width - 1) if shown.by_offset else (side, side))
            assert len(values) in (len(shown.panels) or 2, 1)
            assert values.abs().max() <= shown.limits[1]


@over_pairs
def test_views_hold_at_another_grid(pe: str, join_type: str) -> None:
    model = build(pe, join_type, dynamic_img_size=True)
    for shown in position_views(model, (4, 2)):
        for values in shown.values:
            side = len(shown.rows) or 8
            assert values.shape[1:] == ((7, 3) if shown.by_offset else (side, side))


@pytest.mark.parametrize(("pe", "join_type"), [pair for pair in ALL_PAIRS if has_absolute_part(pair[0])])
def test_the_similarity_is_of_what_attention_reads_where_only_positions_flow(pe: str, join_type: str) -> None:
    model = build(pe, join_type)
    silence_content(model)
    _, read = record_attention(model, images_of(GRID))
    for ours, received in zip(view(model, "similarity").values, read, strict=True):
        expected = cosine_similarity(received[0, model.num_prefix_tokens :])
        torch.testing.assert_close(ours[0], expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(ours, ours.mT)
        assert torch.equal(ours[0].diagonal(), torch.ones(15, dtype=torch.float64))


@pytest.mark.parametrize(("pe", "join_type"), [pair for pair in ALL_PAIRS if has_attention_part(pair[0])])
def test_the_bias_is_what_attention_adds_where_only_positions_flow(pe: str, join_type: str) -> None:
    model = build(pe, join_type)
    silence_content(model)
    added = record_added_logits(model)
    with torch.no_grad():
        model(images_of(GRID))
    names = [shown.name for shown in position_views(model) if shown.name in ("bias", "bias_normed", "factor")]
    added = added[:DEPTH]  # views call the method, too
    if not names:
        assert added == [None] * DEPTH
        return
    for ours, received in zip(view(model, names[-1]).values, added, strict=True):
        expected = between_patches(model, received)
        expected = expected.exp() if names[-1] == "factor" else expected
        torch.testing.assert_close(ours.expand(2, -1, -1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pe", [pe for pe in encodings.ENCODINGS if has_attention_part(pe)])
def test_on_real_images_a_table_of_biases_is_added_as_it_is_shown(pe: str) -> None:
    if "table" not in dict(build(pe, "basic").blocks[0].attn.encoding.named_parameters()):
        return
    for join_type, name in (("basic", "bias"), ("LaPE", "bias_normed")):
        model = build(pe, join_type)
        added = record_calls(model, "logits_bias")
        with torch.no_grad():
            model(torch.randn(2, 3, 12, 20, dtype=torch.float64))
        for ours, received in zip(view(model, name).values, added[:DEPTH], strict=True):
            torch.testing.assert_close(ours, between_patches(model, received))


@pytest.mark.parametrize("after", [0, 2])
def test_a_convolution_shows_its_weights_around_a_patch(after: int) -> None:
    model = build(f"peg(after={after})", "basic")
    shown = view(model, "response")
    assert (shown.layers, shown.first) == ([f"block {after}, basic"], after)
    expected = torch.zeros(5, 9, dtype=torch.float64)
    expected[1:4, 3:6] = model.token_encoding.weight.detach()[:, 0].square().mean(dim=0).sqrt()
    assert_near(shown.values[0][0], expected)


def test_a_norm_shows_the_bias_before_it_too() -> None:
    model = build("2D_RPE", "LaPE")
    for ours, block in zip(view(model, "bias").values, model.blocks, strict=True):
        table = block.attn.encoding.table.unflatten(0, (5, 9))
        assert ours[1, 7, 3] == table[1 - 0 + 2, 2 - 3 + 4, 1]  # from row 1, column 2 to row 0, column 3
    assert not torch.equal(view(model, "bias").values[0], view(model, "bias_normed").values[0])


ROTARY = [pe for pe in encodings.ENCODINGS if has_attention_part(pe) and plane_frequencies(build(pe, "basic"))]


@pytest.mark.parametrize("pe", ROTARY)
def test_the_kernel_is_the_mean_over_random_equal_q_and_k(pe: str) -> None:
    model = build(pe, "basic")
    shown = view(model, "kernel")
    q = torch.nn.functional.normalize(random_rows(4000, 16).double(), dim=1)[:, None, None].expand(-1, 2, 16, -1)
    for values, block in zip(shown.values, model.blocks, strict=True):
        turned_q, turned_k = block.attn.encoding.rotate(q, q, Places(GRID))
        query, key = 1 + 2 * 5 + 1, 1 + 0 * 5 + 4  # from row 2, column 1 to row 0, column 4, after the class token
        means = (turned_q[:, :, query] * turned_k[:, :, key]).sum(dim=-1).mean(dim=0)
        torch.testing.assert_close(values[:, -2 + 2, 3 + 4].expand(2), means, rtol=0, atol=0.03)
        assert_near(values[:, 2, 4], torch.ones_like(values[:, 2, 4]))  # a patch with itself
        assert_near(values, values.flip(1, 2))


@pytest.mark.parametrize("pe", ROTARY)
def test_frequencies_say_what_rotation_makes_of_q_and_k_in_a_real_forward_pass(pe: str) -> None:
    model = build(pe, "basic")
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    turned = record_calls(model, "rotate")
    with torch.no_grad():
        model(torch.randn(1, 3, 12, 20, dtype=torch.float64))
    (row, column), (key_row, key_column) = (2, 1), (0, 4)
    query, key = 1 + row * 5 + column, 1 + key_row * 5 + key_column
    for frequencies, block, read, (q, k) in zip(plane_frequencies(model), model.blocks, inputs, turned, strict=True):
        plain_q, plain_k, _ = block.attn.project(read)
        shape, pair = ((2, -1), -2) if block.attn.encoding.halves else ((-1, 2), -1)
        vectors = (plain_q[0, :, query], plain_k[0, :, key])
        as_complex = (vector.unflatten(-1, shape).movedim(pair, -1) for vector in vectors)
        complex_q, complex_k = (torch.view_as_complex(pairs.contiguous()) for pairs in as_complex)
        angles = frequencies @ torch.tensor([key_column - column, key_row - row], dtype=torch.float64)
        expected = (complex_q.conj() * complex_k * torch.polar(torch.ones_like(angles), angles)).real.sum(dim=-1)
        torch.testing.assert_close((q[0, :, query] * k[0, :, key]).sum(dim=-1), expected)


def test_the_tables_of_relative_positions_show_which_rows_are_alike() -> None:
    model = build("relative", "basic", max_relative_distance=3)
    shown = view(model, "table")
    assert shown.rows == ("prefix", "-3", "-2", "-1", "0", "+1", "+2", "+3")
    assert shown.panels == ("key x", "key y", "value x", "value y")
    for values, block in zip(shown.values, model.blocks, strict=True):
        assert torch.equal(values[2], cosine_similarity(block.attn.encoding.value_x))


def test_a_bias_that_depends_on_the_query_says_of_which() -> None:
    assert view(build("relative", "basic"), "bias").title == "bias of queries without content (logits)"
    assert view(build("2D_RPE", "basic"), "bias").title == "bias (logits)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_view_of_weights_that_are_not_finite_is_refused_with_its_block_named(value: float) -> None:
    model = build("2D_RPE", "basic")
    with torch.no_grad():
        model.blocks[1].attn.encoding.table[3] = value
    with pytest.raises(ValueError, match=r"block 1, basic: the bias .* NaN or infinite"):
        position_views(model)


def test_heads_that_agree_are_shown_as_one_unless_they_differ_in_another_layer() -> None:
    model = build("2D_RPE", "basic")
    for block in model.blocks:
        nn.init.zeros_(block.attn.encoding.table)
    assert [len(values) for values in view(model, "bias").values] == [1, 1, 1]
    nn.init.normal_(model.blocks[2].attn.encoding.table)
    assert [len(values) for values in view(model, "bias").values] == [2, 2, 2]


# ---- what is derived from them


def test_the_mean_by_offset_is_over_all_pairs_from_query_to_key() -> None:
    height, width = GRID
    values = random_rows(2, 15, 15)
    means = mean_by_offset(values, GRID)
    assert means.shape == (2, 5, 9)
    for dy, dx in ((0, 0), (-2, 4), (1, -3), (2, 0)):
        pairs = [
            values[:, y * width + x, (y + dy) * width + x + dx]
            for y in range(height)
            for x in range(width)
            if 0 <= y + dy < height and 0 <= x + dx < width
        ]
        torch.testing.assert_close(means[:, dy + 2, dx + 4], torch.stack(pairs).mean(dim=0))


def some_view(*values: Tensor, by_offset: bool = False) -> PositionView:
    return PositionView("some", "some", list(values), by_offset, (-1.0, 1.0), ["block"] * len(values))


def test_the_mean_by_distance_is_over_all_pairs_that_far_apart() -> None:
    values = random_rows(3, 2, 15, 15).double()
    distances, means = mean_by_distance(some_view(*values), GRID)
    assert (distances, means.shape) == ([1, 2, 3, 4], (3, 4))
    places = [(y, x) for y in range(3) for x in range(5)]
    for distance, mean in zip(distances, means.T, strict=True):
        pairs = [
            values[:, :, i, j]
            for i, (y, x) in enumerate(places)
            for j, (v, u) in enumerate(places)
            if round(((y - v) ** 2 + (x - u) ** 2) ** 0.5) == distance
        ]
        torch.testing.assert_close(mean, torch.stack(pairs).mean(dim=(0, 2)))
    by_offset = some_view(*(mean_by_offset(value, GRID) for value in values), by_offset=True)
    torch.testing.assert_close(mean_by_distance(by_offset, GRID)[1], means)


@pytest.mark.parametrize("by_offset", [False, True])
def test_the_correlation_of_layers_is_pearsons_and_leaves_out_a_patch_with_itself(by_offset: bool) -> None:
    first, third = random_rows(2, 2, 5, 5)
    same = torch.zeros(5, 5, dtype=torch.bool)
    same[2, 2] = True
    if not by_offset:
        same = torch.eye(5, dtype=torch.bool)
    second = 3 - 2 * first
    second[:, same] = 1000
    correlations = layer_correlations(some_view(first, second, third, by_offset=by_offset))
    expected = torch.corrcoef(torch.stack([first[:, ~same].flatten(), third[:, ~same].flatten()]).double())[0, 1]
    torch.testing.assert_close(correlations, torch.stack([torch.tensor(-1.0).double(), -expected]))


def test_a_constant_layer_correlates_with_nothing() -> None:
    assert layer_correlations(some_view(random_rows(1, 4, 4), torch.ones(1, 4, 4))).isnan().all()


def test_the_encoding_itself_has_a_row_for_each_patch_and_a_table_for_each_layer_that_has_one() -> None:
    assert encoding_tables(build("relative", "basic")) is None
    model = build("learnable", "unshare", "two prefix tokens")
    tables = encoding_tables(model)
    assert tables is not None
    assert torch.equal(tables, model.pos_embed[:, 2:])


def test_the_module_runs_without_matplotlib() -> None:
    root = Path(__file__).parent.parent
    blocked = (
        "import sys; sys.modules['matplotlib'] = None; import runpy; runpy.run_module('lape_vit.analysis.positions')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", blocked], check=True, cwd=root)
    subprocess.run([sys.executable, "-W", "error", "-m", "lape_vit.analysis.positions"], check=True, cwd=root)
