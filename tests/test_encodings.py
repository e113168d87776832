"""Absolute encodings against references written as loops, the registry's names, and what every encoding must keep."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lape_vit import encodings
from lape_vit.encodings import ALIASES, ENCODINGS, AbsoluteEncoding, AttentionEncoding, LayerSpec
from lape_vit.places import Grid, Places
from tests.models import assert_equal, assert_near, create, disturb, images, over_encodings

GRIDS = [(4, 4), (2, 8), (8, 2), (3, 5), (1, 1)]
ABSOLUTE = {name: encoding for name, encoding in ENCODINGS.items() if issubclass(encoding, AbsoluteEncoding)}
ATTENTION = {name: encoding for name, encoding in ENCODINGS.items() if issubclass(encoding, AttentionEncoding)}
FIXED = [
    name for name, encoding in ABSOLUTE.items() if not (encoding.learned or [*encoding(4, (2, 2), 1).parameters()])
]
HEAD_WIDTH, HEADS = 8, 3
FLOAT, DOUBLE = torch.empty(0), torch.empty(0, dtype=torch.float64)
"""What has the dtype of a model."""

over_grids = pytest.mark.parametrize("grid", GRIDS)
over_prefix_rows = pytest.mark.parametrize("prefix_rows", [0, 1, 3])


def sinusoid(position: int, channel: int, dim: int) -> float:
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return math.cos(angle) if channel % 2 else math.sin(angle)


def table_1d(dim: int, grid: Grid, prefix_rows: int) -> Tensor:
    rows = range(prefix_rows + grid[0] * grid[1])
    return torch.tensor([[[sinusoid(p, c, dim) for c in range(dim)] for p in rows]], dtype=torch.float64)


def table_2d(dim: int, grid: Grid, prefix_rows: int) -> Tensor:
    rows = [[0.0] * dim for _ in range(prefix_rows)]
    for y in range(grid[0]):
        for x in range(grid[1]):
            codes = [[sinusoid(place, c, dim // 2) for c in range(dim // 2)] for place in (x, y)]
            rows.append(codes[0] + codes[1])
    return torch.tensor([rows], dtype=torch.float64)


def resampled(table: Tensor, old: Grid, new: Grid, prefix_rows: int) -> Tensor:
    """One table (R, D) on another grid, cell by cell and channel by channel."""
    rows = [table[row] for row in range(prefix_rows)]
    maps = torch.empty(1, table.shape[1], *old)
    for y in range(old[0]):
        for x in range(old[1]):
            maps[0, :, y, x] = table[prefix_rows + y * old[1] + x]
    maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    return torch.stack(rows + [maps[0, :, y, x] for y in range(new[0]) for x in range(new[1])])


REFERENCES = {"1D_sin": table_1d, "2D_sin": table_2d}
over_references = pytest.mark.parametrize("name", REFERENCES)


@over_references
@over_grids
@over_prefix_rows
def test_a_fixed_table_is_the_formula(name: str, grid: Grid, prefix_rows: int) -> None:
    encoding = ABSOLUTE[name](24, grid, prefix_rows)
    assert_near(encoding(Places(grid), DOUBLE), REFERENCES[name](24, grid, prefix_rows))


@over_references
@over_grids
def test_a_fixed_table_is_the_formula_on_another_grid_than_it_was_built_for(name: str, grid: Grid) -> None:
    encoding = ABSOLUTE[name](24, (4, 4), 1)
    assert_near(encoding(Places(grid), DOUBLE), REFERENCES[name](24, grid, 1))
    encoding.set_grid(grid)
    assert_near(encoding(Places(grid), DOUBLE), REFERENCES[name](24, grid, 1))


@over_references
def test_a_fixed_table_is_exact_in_float32_at_positions_of_thousands(name: str) -> None:
    grid = (2, 3000)
    half_a_unit_in_the_last_place = 2**-25
    difference = ABSOLUTE[name](8, grid, 1)(Places(grid), FLOAT).double() - REFERENCES[name](8, grid, 1)
    assert difference.abs().max() <= 1.01 * half_a_unit_in_the_last_place


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_table_survives_half_precision(name: str) -> None:
    encoding, places = ABSOLUTE[name](24, (4, 4), 1), Places((4, 4))
    before = encoding(places, FLOAT)
    assert encoding.half()(places, FLOAT.half()).dtype == torch.float16
    assert_equal(encoding.float()(places, FLOAT), before)
    assert_equal(encoding.bfloat16().double()(places, DOUBLE).float(), before)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_table_survives_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        encoding = ABSOLUTE[name](24, (4, 4), 1)
        assert encoding(Places((4, 4)), torch.empty(0)).is_meta
    places = Places((4, 4), device=torch.device("cpu"))
    assert_equal(encoding.to_empty(device="cpu")(places, FLOAT), ABSOLUTE[name](24, (4, 4), 1)(places, FLOAT))


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_encoding_stores_nothing(name: str) -> None:
    encoding = ABSOLUTE[name](24, (4, 4), 1)
    assert not encoding.state_dict()
    assert not list(encoding.parameters())


@pytest.mark.parametrize("name", [name for name, encoding in ABSOLUTE.items() if encoding.learned])
class TestResizing:
    """A trained table on another grid."""

    @pytest.mark.parametrize("tables", [1, 3])
    @pytest.mark.parametrize("prefix_rows", [0, 1, 3])
    @pytest.mark.parametrize(
        ("old", "new"),
        [((4, 4), (8, 8)), ((6, 6), (4, 4)), ((4, 4), (3, 5)), ((2, 8), (4, 4)), ((4, 4), (2, 8)), ((2, 8), (8, 2))],
    )
    def test_is_bicubic_over_the_grid(self, name: str, old: Grid, new: Grid, prefix_rows: int, tables: int) -> None:
        table = torch.randn(tables, prefix_rows + old[0] * old[1], 8, generator=torch.Generator().manual_seed(0))
        encoding = ABSOLUTE[name](8, old, prefix_rows)
        resized = torch.cat([encoding(Places(new), one, one) for one in table.split(1)])
        for before, after in zip(table, resized, strict=True):
            assert_near(after, resampled(before, old, new, prefix_rows), 1e-6)
            if before.shape != after.shape:  # else an older timm takes a table of as many rows for one of the same grid
                expected = resample_abs_pos_embed(before[None], new, old, num_prefix_tokens=prefix_rows)
                assert_near(after[None], expected, 1e-6)

    @over_grids
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_to_the_same_grid_changes_no_bit(self, name: str, grid: Grid, dtype: torch.dtype) -> None:
        table = torch.randn(1, 1 + grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert_equal(ABSOLUTE[name](8, grid, 1)(Places(grid), table, table), table)

    def test_lets_gradients_through(self, name: str) -> None:
        table = torch.randn(1, 17, 8, requires_grad=True)
        ABSOLUTE[name](8, (4, 4), 1)(Places((3, 5)), table, table).square().sum().backward()
        assert table.grad is not None
        assert table.grad.any(dim=2).all()


@pytest.mark.parametrize("name", ABSOLUTE)
@over_grids
@over_prefix_rows
def test_an_absolute_encoding_has_a_row_for_each_patch_and_prefix_row(name: str, grid: Grid, prefix_rows: int) -> None:
    encoding = ABSOLUTE[name](24, (4, 4), prefix_rows)
    table = torch.randn(1, prefix_rows + 16, 24) if encoding.learned else None
    rows = encoding(Places(grid), FLOAT, table)
    assert rows.shape == (1, prefix_rows + grid[0] * grid[1], 24)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("name", ATTENTION)
@over_grids
@pytest.mark.parametrize("prefix", [0, 2])
def test_an_attention_encoding_broadcasts_over_batch_heads_and_tokens(name: str, grid: Grid, prefix: int) -> None:
    spec = LayerSpec(HEAD_WIDTH, HEADS, (4, 4), prefix, HEADS * HEAD_WIDTH)
    encoding, places = disturb(ATTENTION[name](spec).double()), Places(grid)
    tokens = prefix + grid[0] * grid[1]
    q, k = torch.randn(2, 2, HEADS, tokens, HEAD_WIDTH, dtype=torch.float64).unbind(0)
    read = torch.randn(2, tokens, HEADS * HEAD_WIDTH, dtype=torch.float64)
    for before, after in zip((q, k), encoding.rotate(q, k, places), strict=True):
        assert after.shape == before.shape
        assert_equal(after[:, :, :prefix], before[:, :, :prefix])
    bias = encoding.logits_bias(q, k, places)
    if bias is not None:
        assert torch.broadcast_shapes(bias.shape, (2, HEADS, tokens, tokens)) == (2, HEADS, tokens, tokens)
    if "widen" not in encoding.overridden:
        return
    wide_q, wide_k, wide_v = encoding.widen(q, k, k, read, places)
    assert wide_q.shape == wide_k.shape == wide_v.shape
    assert encoding.narrow(wide_v, places).shape == q.shape


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_is_registered_under_its_own_name_and_describes_itself(name: str) -> None:
    assert ENCODINGS[name].name == name
    assert inspect.getdoc(ENCODINGS[name])


def test_no_option_takes_the_name_of_one_of_timms_arguments() -> None:
    assert not encodings.all_options().keys() & inspect.signature(VisionTransformer.__init__).parameters.keys()


def refusal(pe: str, width: int, heads: int) -> str:
    """Why a model of this width cannot be built; empty where it is built and runs."""
    try:
        model = create(pe, embed_dim=width, num_heads=heads).double()
    except ValueError as error:
        return str(error)
    assert model(images(1)).isfinite().all()
    return ""


@pytest.mark.parametrize(("width", "heads"), [(21, 3), (22, 2), (15, 5), (24, 12), (6, 1)])
@over_encodings
def test_a_width_that_does_not_divide_is_refused_by_the_encodings_name(pe: str, width: int, heads: int) -> None:
    if message := refusal(pe, width, heads):
        assert any(f"pe={part!r}" in message for part in pe.split("+"))
        assert message.endswith((f" {width}", f" {width // heads}"))


@pytest.mark.parametrize(("name", "width"), [("1D_sin", 21), ("2D_sin", 21), ("2D_sin", 22)])
def test_a_sinusoid_needs_its_sines_and_cosines(name: str, width: int) -> None:
    with pytest.raises(ValueError, match=rf"pe='{name}'.*{width}"):
        create(name, embed_dim=width, num_heads=1)


@over_encodings
def test_every_name_is_canonical(pe: str) -> None:
    assert encodings.canonical_name(pe) == pe


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_means_the_encoding_of_its_name(alias: str) -> None:
    assert encodings.canonical_name(alias) == ALIASES[alias]
    assert alias not in ENCODINGS
    assert encodings.resolve(alias) == encodings.resolve(ALIASES[alias])


@pytest.mark.parametrize("second", ATTENTION)
@pytest.mark.parametrize("first", ABSOLUTE)
def test_an_absolute_and_an_attention_encoding_add_up_in_either_order(first: str, second: str) -> None:
    name = f"{first}+{second}"
    assert name in encodings.sums()
    for pe in (name, f"{second} + {first}"):
        resolved = encodings.resolve(pe)
        assert (resolved.name, resolved.parts) == (name, [ABSOLUTE[first], ATTENTION[second]])


@pytest.mark.parametrize("second", ENCODINGS)
@pytest.mark.parametrize("first", ENCODINGS)
def test_no_other_sum_is_legal(first: str, second: str) -> None:
    if {f"{first}+{second}", f"{second}+{first}"} & set(encodings.sums()):
        return
    with pytest.raises(ValueError, match="sum"):
        encodings.resolve(f"{first}+{second}")


@pytest.mark.parametrize("pe", ["sinus", "LEARNABLE", "learnable+sinus", "learnable+", "+", "learnable+none"])
def test_what_is_no_encoding_is_refused_in_one_line(pe: str) -> None:
    with pytest.raises(ValueError, match="pe=") as error:
        encodings.resolve(pe)
    assert "\n" not in str(error.value)


def test_an_unknown_encoding_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sinus'") as error:
        encodings.canonical_name("sinus")
    assert all(name in str(error.value) for name in ENCODINGS)
