"""Encodings that add to the logits or values, against published numbers and against references written as loops."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lape_vit.analysis.views import added_logits
from lape_vit.attention import Attention
from lape_vit.convert import warm_start
from lape_vit.encodings import ENCODINGS, LayerSpec
from lape_vit.encodings.distance import lookhere_heads
from lape_vit.places import Grid, Places
from tests.models import assert_equal, assert_near, create, disturb, images, tiny
from tests.references import alibi, cpb, irpe, lookhere, pape
from tests.test_references import INDEX, Arrays, Entry

B, HEADS, D = 2, 3, 8


def build(
    name: str,
    grid: Grid,
    prefix: int = 0,
    heads: int = HEADS,
    head_dim: int = D,
    layer: int = 0,
    depth: int = 1,
    **options: Any,
) -> Any:
    torch.manual_seed(0)
    spec = LayerSpec(head_dim, heads, grid, prefix, heads * head_dim, layer, depth)
    return disturb(ENCODINGS[name](spec, **options).double())  # type: ignore[arg-type]


def cases(family: str) -> Any:
    return pytest.mark.parametrize("name", [name for name, entry in INDEX.items() if entry["family"] == family])


def case(name: str) -> tuple[Entry, Arrays, Grid]:
    entry = INDEX[name]
    height, width = entry["grid"]
    return entry, Arrays(name), (height, width)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def bias_of(encoding: Any, places: Places) -> Tensor:
    """(h, N, N), of an encoding whose bias depends on places alone."""
    q = noise(1, encoding.num_heads, 1, 1)
    bias = encoding.logits_bias(q, q, places)
    return bias if bias.dim() == 3 else bias[0]


def assert_is(actual: Tensor, expected: Any, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


# ---- published numbers


@cases("alibi")
def test_alibi_is_cromas(name: str) -> None:
    entry, arrays, grid = case(name)
    assert_is(bias_of(build("alibi", grid, heads=entry["heads"]), Places(grid)), arrays["bias"], entry["tolerance"])


@cases("lookhere")
def test_lookhere_is_the_authors(name: str) -> None:
    entry, arrays, grid = case(name)
    for layer, expected in zip(entry["layers"], arrays["bias"], strict=True):
        encoding = build(
            "lookhere",
            grid,
            entry["prefix"],
            entry["heads"],
            layer=layer,
            depth=entry["depth"],
            lookhere_view=entry["options"]["view"],
        )
        assert_is(bias_of(encoding, Places(grid)), expected, entry["tolerance"])


@cases("cpb")
def test_cpb_is_timms_also_at_another_size_than_the_trained_one(name: str) -> None:
    entry, arrays, grid = case(name)
    options = {"cpb_mode": entry["options"]["mode"], "cpb_hidden": entry["options"]["hidden"]}
    encoding = build("cpb", grid, entry["prefix"], entry["heads"], **options)
    encoding.mlp.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.state().items()})
    run_grid = tuple(entry["run_grid"])
    expected = arrays["bias"].reshape(entry["heads"], *arrays["bias"].shape[-2:])
    assert_is(bias_of(encoding, Places(run_grid)), expected, entry["tolerance"])
    encoding.set_grid(run_grid)
    assert_is(bias_of(encoding, Places(run_grid)), expected, entry["tolerance"])


@cases("irpe")
@torch.no_grad()
def test_irpe_is_the_authors(name: str) -> None:
    entry, arrays, grid = case(name)
    check = {"buckets": check_irpe_buckets, "terms": check_irpe_terms, "attention": check_irpe_attention}
    check[entry["kind"]](entry, arrays, grid)


def check_irpe_buckets(entry: Entry, arrays: Arrays, grid: Grid) -> None:
    assert_is(build("irpe", grid, entry["prefix"]).buckets(Places(grid)), arrays["buckets"], 0)


def check_irpe_terms(entry: Entry, arrays: Arrays, grid: Grid) -> None:
    encoding = build("irpe", grid, entry["prefix"], entry["heads"], entry["head_dim"], irpe_on="qkv")
    q, k, places = torch.from_numpy(arrays["q"]), torch.from_numpy(arrays["k"]), Places(grid)
    tables = {"k": encoding.key_table, "q": encoding.query_table}
    for side in [side for side in tables if f"term_{side}" in arrays]:
        for other, table in tables.items():
            table.copy_(torch.from_numpy(arrays[f"table_{side}"][0].T) * (other == side))
        term = encoding.term(q, k, places, entry["head_dim"] ** -0.5)
        assert_is(term, arrays[f"term_{side}"], entry["tolerance"])
    if "value_term" in arrays:
        encoding.value_table.copy_(torch.from_numpy(arrays["table_v"][0]))
        weights = torch.from_numpy(arrays["attention_logits"]).softmax(dim=-1)
        wide_v = encoding.widen(q, k, torch.zeros_like(q), q, places)[2]
        assert_is(encoding.narrow(weights @ wide_v, places), arrays["value_term"], entry["tolerance"])


def check_irpe_attention(entry: Entry, arrays: Arrays, grid: Grid) -> None:
    state, x = arrays.state(), torch.from_numpy(arrays["x"])
    heads, head_dim, on = entry["heads"], entry["head_dim"], entry["options"]["on"]
    attention = Attention(x.shape[-1], num_heads=heads, qkv_bias="qkv.bias" in state).double()
    own = {name: torch.from_numpy(value) for name, value in state.items() if not name.startswith("rpe_")}
    attention.load_state_dict(own)
    encoding = build("irpe", grid, entry["prefix"], heads, head_dim, irpe_on=on)
    for side, name in (("k", "key_table"), ("q", "query_table"), ("v", "value_table")):
        if side in on:
            table = torch.from_numpy(state[f"rpe_{side}.lookup_table_weight"][0])
            getattr(encoding, name).copy_(table if side == "v" else table.T)
    attention.encoding = encoding
    assert_is(attention.eval()(x, Places(grid)), arrays["y"], entry["tolerance"])


@cases("pape")
@torch.no_grad()
def test_pape_is_the_authors_with_the_class_token_at_a_place_and_the_slope_turned_round(name: str) -> None:
    entry, arrays, grid = case(name)
    heads, parabolas = entry["heads"], entry["options"]["parabolas"]
    tokens, q, k = (torch.from_numpy(arrays[key]) for key in ("tokens", "q", "k"))
    encoding = build("pape", grid, 0, heads, entry["head_dim"], pape_parabolas=parabolas)  # the class token has a place
    state = {key: torch.from_numpy(value) for key, value in arrays.state().items()}
    encoding.directions.copy_(state["position.weight"].reshape(heads, parabolas, 2))
    curvature, slope = state["ab.weight"].chunk(2)
    encoding.curvature_and_slope.weight.copy_(torch.cat([curvature, -slope]))
    x, y = torch.from_numpy(arrays["positions"][0]).T
    added = added_logits(encoding, q, tokens, Places(grid, x, y))
    assert added is not None
    assert_is(q @ k.mT * entry["head_dim"] ** -0.5 + added, arrays["logits"], entry["tolerance"])


# ---- references, at other grids, numbers of heads and of prefix tokens, and at real places

GRIDS: list[Grid] = [(4, 4), (3, 5), (1, 1), (2, 1)]
over_grids = pytest.mark.parametrize("grid", GRIDS)
over_prefixes = pytest.mark.parametrize("prefix", [0, 1, 2])
Bias = Callable[..., Any]


def cpb_reference(encoding: Any, grid: Grid, trained_grid: Grid, prefix: int, **places: Any) -> Any:
    weights = [parameter.detach().numpy() for parameter in encoding.mlp.parameters()]
    return cpb.bias(
        grid, *weights, mode="swin" if encoding.is_swin else "cr", trained_grid=trained_grid, prefix=prefix, **places
    )


def built_and_reference(name: str, grid: Grid, prefix: int) -> tuple[Any, Bias]:
    """An encoding and its reference as a function of places."""
    if name == "alibi":
        return build(name, grid, prefix, 5), lambda **places: alibi.bias(grid, 5, prefix, **places)
    if name.startswith("lookhere"):
        view = int(name[-3:].strip("_"))
        encoding = build("lookhere", grid, prefix, 12, layer=2, depth=6, lookhere_view=view)
        return encoding, lambda **places: lookhere.bias(grid, 12, 2, 6, view, prefix, **places)
    encoding = build("cpb", (4, 1), prefix, cpb_mode=name.removeprefix("cpb_"), cpb_hidden=6)
    return encoding, lambda **places: cpb_reference(encoding, grid, (4, 1), prefix, **places)


@pytest.mark.parametrize("name", ["alibi", "lookhere_45", "lookhere_90", "lookhere_180", "cpb_swin", "cpb_cr"])
@over_grids
@over_prefixes
def test_a_bias_is_its_reference_at_whole_and_at_real_places(name: str, grid: Grid, prefix: int) -> None:
    encoding, reference = built_and_reference(name, grid, prefix)
    places = Places(grid)
    assert_is(bias_of(encoding, places), reference())
    x, y = (axis + 0.3 * noise(len(axis), seed=seed) for seed, axis in enumerate(places.coordinates()))
    assert_is(bias_of(encoding, places._replace(x=x, y=y)), reference(x=x.tolist(), y=y.tolist()))
    both = places._replace(x=torch.stack([x, y]), y=torch.stack([y, x]))
    q = noise(2, encoding.num_heads, 1, 1)
    by_image = encoding.logits_bias(q, q, both)
    assert_is(by_image[0], reference(x=x.tolist(), y=y.tolist()))
    assert_is(by_image[1], reference(x=y.tolist(), y=x.tolist()))


def irpe_tables(encoding: Any) -> dict[str, Any]:
    tables = {"k": encoding.key_table, "q": encoding.query_table, "v": encoding.value_table}
    return {f"table_{side}": table.detach().numpy() for side, table in tables.items() if table is not None}


@pytest.mark.parametrize("on", ["k", "qk", "qkv"])
@over_grids
@over_prefixes
@torch.no_grad()
def test_irpe_is_its_reference_at_whole_and_at_real_places(on: str, grid: Grid, prefix: int) -> None:
    encoding = build("irpe", grid, prefix, irpe_on=on)
    tables = irpe_tables(encoding)
    assert {f"table_{side}" for side in on} == tables.keys()
    N = prefix + grid[0] * grid[1]
    q, k, v = noise(3, B, HEADS, N, D).unbind(0)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
        term = 0 if bias is None else bias.make(q, k)
        return ((q @ k.mT) * D**-0.5 + term).softmax(dim=-1) @ v

    def reference(index: slice, **places: Any) -> Any:
        parts = (part[index].numpy() for part in (q, k, v))
        return irpe.attention(*parts, grid, prefix, **tables, **places)

    whole = Places(grid)
    assert_is(encoding(q, k, v, q, whole, attend), reference(slice(None)))
    x, y = (axis + 3 * noise(len(axis), seed=seed) for seed, axis in enumerate(whole.coordinates()))
    real = encoding(q, k, v, q, whole._replace(x=x, y=y), attend)
    assert_is(real, reference(slice(None), x=x.tolist(), y=y.tolist()))
    by_image = encoding(q, k, v, q, whole._replace(x=torch.stack([x, y]), y=torch.stack([y, x])), attend)
    assert_is(by_image[:1], reference(slice(0, 1), x=x.tolist(), y=y.tolist()))
    assert_is(by_image[1:], reference(slice(1, 2), x=y.tolist(), y=x.tolist()))


def pape_reference(encoding: Any, read: Tensor, grid: Grid, prefix: int, **places: Any) -> Any:
    weights = encoding.curvature_and_slope.weight.detach().unflatten(0, (2, encoding.num_heads, -1)).numpy()
    return pape.bias(read.numpy(), encoding.directions.detach().numpy(), *weights, grid, prefix, **places)


@over_grids
@over_prefixes
@torch.no_grad()
def test_pape_is_its_reference_at_whole_and_at_real_places(grid: Grid, prefix: int) -> None:
    encoding = build("pape", grid, prefix, pape_parabolas=3)
    N = prefix + grid[0] * grid[1]
    read, q = noise(B, N, HEADS * D), noise(B, HEADS, N, D, seed=1)
    whole = Places(grid)
    assert_is(added_logits(encoding, q, read, whole), pape_reference(encoding, read, grid, prefix))
    x, y = (axis + 3 * noise(len(axis), seed=seed) for seed, axis in enumerate(whole.coordinates()))
    expected = pape_reference(encoding, read, grid, prefix, x=x.tolist(), y=y.tolist())
    assert_is(added_logits(encoding, q, read, whole._replace(x=x, y=y)), expected)
    both = whole._replace(x=torch.stack([x, y]), y=torch.stack([y, x]))
    turned = pape_reference(encoding, read, grid, prefix, x=y.tolist(), y=x.tolist())
    assert_is(added_logits(encoding, q, read, both), np.stack([expected[0], turned[1]]))


# ---- what is ours, or is easily lost


@pytest.mark.parametrize("view", [45, 90, 180])
@pytest.mark.parametrize(("dx", "dy"), [(0.1, 1 / 3), (-7.3, 100.7)])
def test_borders_of_a_field_of_view_stay_where_they_are_when_all_places_are_shifted(
    view: int, dx: float, dy: float
) -> None:
    places = Places((6, 7))
    encoding = build("lookhere", places.grid, 1, 12, lookhere_view=view)
    expected, single = bias_of(encoding, places), places.shifted(dx, dy)
    assert_near(bias_of(encoding, single), expected)
    assert single.x is not None
    assert single.y is not None
    rounded = single._replace(x=single.x.float(), y=single.y.float())
    assert_equal(bias_of(encoding, rounded).isinf(), expected.isinf())


@pytest.mark.parametrize("view", [45, 90, 180])
@pytest.mark.parametrize("heads", [*range(5, 21), 24])
def test_heads_come_in_groups_that_look_to_all_sides_beside_up_to_four_that_look_everywhere(
    view: int, heads: int
) -> None:
    offsets = noise(2, 500).unbind(0)
    found = lookhere_heads(view, heads, layer=3)
    seen = torch.stack([sees(*offsets) for sees, _ in found])
    whole = seen.all(dim=1)
    assert len(found) == heads
    assert 1 <= whole.sum() <= 4
    assert whole[-int(whole.sum()) :].all()
    slopes = [slope for _, slope in found]
    assert slopes[-int(whole.sum()) :] == [0.25**power for power in range(1, int(whole.sum()) + 1)]
    for first in range(0, heads - int(whole.sum()), 4):
        assert len(set(slopes[first : first + 4])) == 1
        shares = seen[first : first + 4].double().mean(dim=1)
        assert (shares - view / 360).abs().max() < 0.1
        assert seen[first : first + 4].double().mean() == pytest.approx(view / 360, abs=0.02)


@pytest.mark.parametrize(("heads", "layers"), [(2, 8), (3, 4), (4, 8)])
def test_a_few_heads_take_turns_through_all_directions_from_layer_to_layer(heads: int, layers: int) -> None:
    offsets = noise(2, 500).unbind(0)
    patterns = set()
    for layer in range(layers):
        *directed, last = lookhere_heads(90, heads, layer)
        assert last[0](*offsets).all()
        patterns |= {tuple(sees(*offsets).tolist()) for sees, _ in directed}
    assert len(patterns) == 8
    assert [slope for _, slope in lookhere_heads(90, 1, 0)] == [0.25]


def test_lookheres_slope_falls_from_layer_to_layer() -> None:
    model = tiny("lookhere", depth=3)
    slopes = [block.attn.encoding.layer_slope for block in model.blocks]
    assert slopes == [1.5, 1.0, 0.5]
    steepest = [bias_of(block.attn.encoding, Places((4, 4)))[-1].min().item() for block in model.blocks]
    assert_near(torch.tensor(steepest), torch.tensor([-2 * s * 0.25 * math.sqrt(18) for s in slopes]), 1e-6)


def test_the_grid_that_cpb_was_trained_on_stays_with_its_weights() -> None:
    trained = tiny("cpb")
    larger = create("cpb", img_size=48).double()
    larger.load_state_dict(trained.state_dict())
    resized = tiny("cpb")
    resized.set_input_size(img_size=48)
    started = create("cpb", img_size=48).double()
    started.load_state_dict(warm_start(trained.state_dict(), started).state_dict)
    expected = resized.eval()(images(1, 48, 48))
    for model in (larger, started):
        assert model.blocks[0].attn.encoding.trained_grid.tolist() == [4, 4]
        assert_equal(model.eval()(images(1, 48, 48)), expected)
    again = create("cpb", img_size=48)
    assert again.blocks[0].attn.encoding.trained_grid.tolist() == [6, 6]
    assert create("cpb(cpb_mode=cr)").blocks[0].attn.encoding.trained_grid is None


@pytest.mark.parametrize("on", ["k", "qk", "qkv"])
def test_irpe_starts_as_if_it_were_not_there(on: str) -> None:
    model, bag = create("learnable+irpe", irpe_on=on).double(), create("learnable").double()
    bag.load_state_dict(model.state_dict(), strict=False)
    assert_near(model.eval()(images()), bag.eval()(images()), 1e-10)


@pytest.mark.parametrize(
    ("pe", "per_layer"),
    [
        ("alibi", 0),
        ("lookhere", 0),
        ("cpb", 3 * 512 + 512 * 3),
        ("cpb(cpb_mode=cr)", 3 * 512 + 512 * 3 + 3),
        ("irpe", 50 * 8),
        ("irpe(irpe_on=qkv)", 3 * 50 * 8),
        ("pape", 2 * 3 * 8 * 24 + 3 * 8 * 2),
    ],
)
def test_parameters_are_as_many_as_the_table_says(pe: str, per_layer: int) -> None:
    own = sum(parameter.numel() for parameter in create(pe).parameters())
    assert own - sum(parameter.numel() for parameter in create("none").parameters()) == 2 * per_layer


class Sizes(TorchFunctionMode):
    """Keeps the sizes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        self.found |= {part.numel() for part in parts if isinstance(part, Tensor)}
        return result


def test_pape_never_holds_a_tensor_over_pairs() -> None:
    grid, width = (31, 31), HEADS * D
    encoding, N = build("pape", grid, 1), 1 + 31 * 31
    q, read = noise(1, HEADS, N, D), noise(1, N, width)
    with Sizes() as sizes:
        encoding.narrow(encoding.widen(q, q, q, read, Places(grid))[2], Places(grid))
    assert N * HEADS * 24 in sizes.found
    assert max(sizes.found) < N * N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(14, 14), (32, 32)])
@pytest.mark.parametrize("shift", [0, 0.3, 100])
@torch.no_grad()
def test_pape_in_16_bits_is_as_exact_as_its_term_rounded_to_16_bits(
    dtype: torch.dtype, grid: Grid, shift: float
) -> None:
    """Where the term is above -10: elsewhere nothing is attended to."""
    encoding, N, head_dim = build("pape", grid, 1, head_dim=64), 1 + grid[0] * grid[1], 64
    q, read = noise(1, HEADS, N, head_dim), noise(1, N, HEADS * head_dim)
    places = Places(grid).shifted(shift, shift) if shift else Places(grid)
    wide_q, wide_k, _ = encoding.widen(q, q, q, read, places)
    wide_q, wide_k = (wide[..., head_dim:] for wide in (wide_q, wide_k))
    exact = wide_q @ wide_k.mT * head_dim**-0.5
    near = exact > -10
    in_16_bits = wide_q.to(dtype).float() @ wide_k.to(dtype).float().mT * head_dim**-0.5  # kernels sum in float32
    error, rounding = (((other.double() - exact)[near]).abs().max() for other in (in_16_bits, exact.to(dtype)))
    assert error < rounding
