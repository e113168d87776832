"""Joins against the design's equations, written out block by block, and which pairs are legal."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit import encodings
from lape_vit.joins import JOINS, Terms, check_pair, legal_joins, legal_pairs
from lape_vit.places import Places
from tests.models import DISTILLED, PAIRS, assert_equal, assert_near, create, images, over_encodings, over_pairs, tiny

Run = Callable[[Any, Tensor, Tensor], Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "embed_class": {},
    "no_embed_class": {"no_embed_class": True},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "norm_layer": partial(nn.LayerNorm, eps=0.05)},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "distilled": {"name": DISTILLED},
    "distilled_no_embed_class": {"name": DISTILLED, "no_embed_class": True},
}
CARRIED = [(pe, join_type) for pe, join_type in PAIRS if encodings.resolve(pe).absolute is not None]
SUMS = [(pe, join_type) for pe, join_type in CARRIED if encodings.resolve(pe).attention is not None]
ABSOLUTE = [pair for pair in CARRIED if pair not in SUMS]
ILLEGAL_PAIRS = [
    (pe, join_type) for pe in encodings.names() for join_type in JOINS if (pe, join_type) not in legal_pairs()
]

over_absolute_pairs = pytest.mark.parametrize(("pe", "join_type"), ABSOLUTE)
over_variants = pytest.mark.parametrize("variant", VARIANTS)


def tensors_of(terms: Terms) -> list[Tensor]:
    everywhere = (terms.input, *terms.residual, *terms.attention, terms.output)
    return [term for term in everywhere if term is not None]


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def attention(block: Any, y: Tensor) -> Tensor:
    return block.attn(y, Places((2, 4)))


def mlp(block: Any, x: Tensor) -> Tensor:
    hidden = F.gelu(layer_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def after_attention(model: Any, block: Any, x: Tensor) -> Tensor:
    x = x + mlp(block, x)
    encoding, P = model.token_encoding, model.num_prefix_tokens
    if encoding is None or model.blocks[encoding.after] is not block:
        return x
    return torch.cat([x[:, :P], encoding(x[:, P:], Places((2, 4)))], dim=1)


def on_tokens(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (R, D) at the last R of the tokens x (B, N, D), zeros before them."""
    term = torch.zeros_like(x[:1])
    term[0, len(term[0]) - len(rows) :] = rows
    return term


def basic(model: Any, x: Tensor, w: Tensor) -> Tensor:
    x = x + on_tokens(w[0], x)
    for block in model.blocks:
        x = x + attention(block, layer_norm(x, block.norm1))
        x = after_attention(model, block, x)
    return x


def share(model: Any, x: Tensor, w: Tensor) -> Tensor:
    for block in model.blocks:
        x = x + on_tokens(w[0], x)
        x = x + attention(block, layer_norm(x, block.norm1))
        x = after_attention(model, block, x)
    return x


def unshare(model: Any, x: Tensor, w: Tensor) -> Tensor:
    for layer, block in enumerate(model.blocks):
        x = x + on_tokens(w[layer], x)
        x = x + attention(block, layer_norm(x, block.norm1))
        x = after_attention(model, block, x)
    return x


def lape(model: Any, x: Tensor, w: Tensor) -> Tensor:
    rows = w[0]
    for layer, block in enumerate(model.blocks):
        rows = layer_norm(rows, model.join.norms[layer])
        x = x + attention(block, layer_norm(x, block.norm1) + on_tokens(rows, x))
        x = after_attention(model, block, x)
    return x


def lape_share(model: Any, x: Tensor, w: Tensor) -> Tensor:
    for layer, block in enumerate(model.blocks):
        rows = layer_norm(w[0], model.join.norms[layer])
        x = x + attention(block, layer_norm(x, block.norm1) + on_tokens(rows, x))
        x = after_attention(model, block, x)
    return x


def pvg(model: Any, x: Tensor, w: Tensor) -> Tensor:
    rows = w[0]
    x = x + on_tokens(rows, x)
    for layer, block in enumerate(model.blocks):
        read = layer_norm(x, block.norm1)
        if layer > 0:
            rows = layer_norm(rows, model.join.norms[str(layer)])
            read = read + on_tokens(rows, x)
        x = x + attention(block, read)
        x = after_attention(model, block, x)
    return x


EQUATIONS: dict[str, Run] = {
    "basic": basic,
    "share": share,
    "unshare": unshare,
    "LaPE": lape,
    "LaPE_share": lape_share,
    "PVG": pvg,
    "MPVG": pvg,
}


def no_output(model: Any, x: Tensor, w: Tensor) -> Tensor | float:
    return 0.0


def mpvg_output(model: Any, x: Tensor, w: Tensor) -> Tensor:
    return layer_norm(on_tokens(w[0], x), model.join.output_norm)


OUTPUTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor | float]] = {"MPVG": mpvg_output}
"""What a join adds after the last norm."""


def tokens(model: Any, pixels: Tensor) -> Tensor:
    """Prefix tokens and patches (B, N, D) before any position reaches them."""
    patches = torch.stack([model.patch_embed(image[None])[0] for image in pixels])
    prefix = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    return torch.cat([*(token.expand(len(pixels), -1, -1) for token in prefix if token is not None), patches], dim=1)


def rows_of(model: Any) -> Tensor:
    """w (T, R, D), which tests/test_encodings.py checks."""
    encoding, places = model.join.encoding, Places((2, 4))
    if model.pos_embed is None:
        return encoding(places, model.head.weight)
    return torch.cat([encoding(places, table, table) for table in model.pos_embed.split(1)])


def build(pe: str, join_type: str, variant: str) -> Any:
    """A model of three blocks on a grid of 2 x 4 patches, so that rows, columns and layers cannot be confused."""
    return tiny(pe, join_type, img_size=(16, 32), depth=3, **VARIANTS[variant])


@pytest.mark.parametrize(
    ("pe", "join_type", "variant"),
    [*((*pair, variant) for pair in ABSOLUTE for variant in VARIANTS), *((*pair, "no_embed_class") for pair in SUMS)],
)
def test_a_join_is_its_equation(pe: str, join_type: str, variant: str) -> None:
    model, pixels = build(pe, join_type, variant), images(2, 16, 32)
    with torch.no_grad():
        x = EQUATIONS[join_type](model, tokens(model, pixels), rows_of(model))
        expected = x if isinstance(model.norm, nn.Identity) else layer_norm(x, model.norm)
        expected = expected + OUTPUTS.get(join_type, no_output)(model, x, rows_of(model))
        assert_near(model.forward_features(pixels), expected, 1e-11)
        assert_near(model(pixels), model.forward_head(expected), 1e-11)


@over_variants
@over_absolute_pairs
def test_terms_of_blocks_reach_every_token_that_has_a_row_and_no_other(pe: str, join_type: str, variant: str) -> None:
    model = build(pe, join_type, variant)
    prefix = model.num_prefix_tokens
    without_row = prefix if model.no_embed_class else 0
    terms = model.position_terms()
    assert terms.output is None or terms.output.shape == (1, prefix + 8, 24)
    in_blocks = tensors_of(terms._replace(output=None))
    assert in_blocks
    for term in in_blocks:
        assert term.shape == (1, prefix + 8, 24)
        assert not term[:, :without_row].any()
        assert (term[:, prefix:] != 0).any(dim=2).all()


@over_pairs
def test_no_term_is_there_without_an_absolute_encoding(pe: str, join_type: str) -> None:
    carried = encodings.resolve(pe).absolute is not None
    assert bool(tensors_of(tiny(pe, join_type).position_terms())) == carried


@over_absolute_pairs
def test_terms_follow_the_grid_that_is_asked_for(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    for grid in ((2, 8), (3, 5)):
        terms = model.position_terms(Places(grid))
        assert {tuple(term.shape) for term in tensors_of(terms)} == {(1, 1 + grid[0] * grid[1], 24)}
    assert_equal(model.position_terms(Places((4, 4))), model.position_terms())


@pytest.mark.parametrize("name", [None, DISTILLED])
def test_lapes_norms_act_on_a_class_tokens_row_of_zeros(name: str | None) -> None:
    model = tiny("2D_sin", "LaPE", **({"name": name} if name else {}))
    first, second = model.position_terms().attention
    for token in range(model.num_prefix_tokens):
        assert_near(first[0, token], model.join.norms[0].bias)
        assert_near(second[0, token], layer_norm(model.join.norms[0].bias, model.join.norms[1]))


def without_class_token(join_type: str, **kwargs: Any) -> Any:
    return tiny("learnable", join_type, depth=3, class_token=False, global_pool="avg", fc_norm=False, **kwargs)


def parameters_added(join_type: str, depth: int) -> int:
    of_join, of_basic = (create("2D_sin", name, depth=depth) for name in (join_type, "basic"))
    return sum(p.numel() for p in of_join.parameters()) - sum(p.numel() for p in of_basic.parameters())


@pytest.mark.parametrize("depth", [1, 3])
def test_each_norm_of_a_join_has_a_scale_and_a_shift(depth: int) -> None:
    counts = {"LaPE": depth, "LaPE_share": depth, "PVG": depth - 1, "MPVG": depth}
    assert {join_type: parameters_added(join_type, depth) for join_type in counts} == {
        join_type: 2 * norms * 24 for join_type, norms in counts.items()
    }


@over_variants
def test_mpvgs_last_norm_reaches_the_logits_of_every_model(variant: str) -> None:
    model = build("learnable", "MPVG", variant)
    model(images(2, 16, 32)).square().sum().backward()
    assert model.join.output_norm.bias.grad.all()


@torch.no_grad()
def test_before_a_linear_head_mpvgs_last_term_stands_in_the_last_norms_shift() -> None:
    mpvg_model, pvg_model = without_class_token("MPVG"), without_class_token("PVG")
    state = mpvg_model.state_dict()
    pvg_model.load_state_dict({name: value for name, value in state.items() if "output_norm" not in name})
    assert (pvg_model(images()) - mpvg_model(images())).abs().max() > 1e-3
    pvg_model.norm.bias += mpvg_model.position_terms().output[0].mean(dim=0)
    assert_near(pvg_model(images()), mpvg_model(images()), 1e-11)


@torch.no_grad()
def test_a_pruned_model_keeps_the_norms_of_the_blocks_that_are_left() -> None:
    for join_type in ("PVG", "MPVG"):
        model = without_class_token(join_type)
        expected = model.forward_intermediates(images(), [1], intermediates_only=True, norm=True)
        model.prune_intermediate_layers([1], prune_head=False)
        assert set(model.join.norms) == {"1"}
        (features,) = model.forward_intermediates(images(), [1], intermediates_only=True, norm=True)
        assert_equal([features], expected)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.05])
@over_absolute_pairs
def test_a_joins_norms_have_the_models_eps_and_start_as_the_identity(pe: str, join_type: str, eps: float) -> None:
    model = create(pe, join_type, norm_layer=partial(nn.LayerNorm, eps=eps))
    norms = [module for module in model.join.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) in {0, 1, 2}
    assert all(norm.eps == model.blocks[0].norm1.eps == eps for norm in norms)
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    parameters = [parameter for module in (*norms, *model.blocks) for parameter in module.parameters()]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)


@pytest.mark.parametrize(
    ("pe", "joins"),
    [
        ("none", ["basic"]),
        ("learnable", ["basic", "share", "unshare", "LaPE", "LaPE_share", "PVG", "MPVG"]),
        ("1D_sin", ["basic", "share", "LaPE", "LaPE_share", "PVG", "MPVG"]),
        ("2D_sin", ["basic", "share", "LaPE", "LaPE_share", "PVG", "MPVG"]),
    ],
)
def test_the_legal_joins_are_those_of_the_design(pe: str, joins: list[str]) -> None:
    assert legal_joins(pe) == joins


@over_encodings
def test_a_sum_may_join_as_its_absolute_part_and_basic_carries_everything(pe: str) -> None:
    resolved = encodings.resolve(pe)
    assert "basic" in legal_joins(pe)
    if resolved.absolute is not None:
        assert legal_joins(pe) == legal_joins(resolved.absolute.name)
    else:
        assert not {"share", "unshare", "LaPE_share", "PVG", "MPVG"} & set(legal_joins(pe))


@pytest.mark.parametrize(("pe", "join_type"), ILLEGAL_PAIRS)
def test_an_illegal_pair_is_refused_at_construction_with_the_legal_joins(pe: str, join_type: str) -> None:
    for refuse in (check_pair, create):
        with pytest.raises(ValueError, match="join_type") as error:
            refuse(pe, join_type)
        message = str(error.value)
        assert repr(pe) in message
        assert repr(join_type) in message
        assert message.endswith(": " + ", ".join(legal_joins(pe)))


@over_pairs
def test_a_legal_pair_passes_the_check(pe: str, join_type: str) -> None:
    check_pair(pe, join_type)


def test_an_unknown_join_is_answered_with_the_known_ones() -> None:
    for refuse in (check_pair, create):
        with pytest.raises(ValueError, match="'lape'") as error:
            refuse("learnable", "lape")
        assert all(name in str(error.value) for name in JOINS)


def test_an_unknown_encoding_is_refused_at_construction() -> None:
    for refuse in (check_pair, create):
        with pytest.raises(ValueError, match="'sinus'") as error:
            refuse("sinus", "basic")
        assert all(name in str(error.value) for name in encodings.ENCODINGS)
