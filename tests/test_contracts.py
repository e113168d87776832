"""The contracts, shown by members that stand only here, and the faults that are found where a member is defined."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lape_vit import encodings, joins
from lape_vit.analysis.attention_maps import attention_maps, why_no_split
from lape_vit.analysis.positions import layer_positions, position_views
from lape_vit.encodings import AbsoluteEncoding, AttentionEncoding, Encoding, LayerSpec, TokenEncoding
from lape_vit.joins import JOINS, Join, Terms
from lape_vit.places import Grid, Places
from tests.models import assert_equal, assert_near, create, images, tiny


class Everywhere(Join):
    """Adds w at every spot, each time another multiple of it."""

    name = "everywhere"

    def terms(self, *w: Tensor) -> Terms:
        rows = self.to_tokens(w[0])
        layers = range(1, self.depth + 1)
        return Terms(rows, [0.1 * layer * rows for layer in layers], [10 * layer * rows for layer in layers], -rows)


class Means(TokenEncoding):
    """Adds to each patch the mean of the patches in its row."""

    name = "means"

    def __init__(self, dim: int, grid: Grid, *, strength: float = 1.0, after: int = 0) -> None:
        super().__init__(dim, grid, after=after)
        self.strength = strength

    def forward(self, x: Tensor, places: Places) -> Tensor:
        _, dy = places.offsets(x.dtype)
        same_row = (dy == 0).to(x.dtype)
        return x + self.strength * same_row @ x / same_row.sum(-1, keepdim=True)


class Along(AttentionEncoding):
    """A bias that falls with the distance along an axis."""

    name = "along"

    def __init__(
        self, spec: LayerSpec, *, axis: Literal["x", "y"] = "x", steep: float = 1.0, squared: bool = False
    ) -> None:
        super().__init__(spec)
        self.axis, self.steep, self.squared = axis, steep, squared

    def patch_bias(self, places: Places) -> Tensor:
        dx, dy = places.offsets()
        distance = (dx if self.axis == "x" else dy).abs()
        return -self.steep * (distance**2 if self.squared else distance)


class Slope(AbsoluteEncoding):
    """w = slope * column, in every channel."""

    name = "slope"

    def __init__(self, dim: int, grid: Grid, prefix_rows: int, *, slope: float = 1.0) -> None:
        super().__init__(dim, grid, prefix_rows)
        self.slope = slope

    def patch_vectors(self, places: Places) -> Tensor:
        x, _ = places.coordinates()
        return self.slope * x[..., None].expand(*x.shape, self.dim)


@pytest.fixture(autouse=True)
def members(monkeypatch: pytest.MonkeyPatch) -> None:
    """The members above are in the registries while a test runs."""
    monkeypatch.setattr(encodings, "ENCODINGS", encodings.ENCODINGS.copy())
    monkeypatch.setitem(JOINS, Everywhere.name, Everywhere)
    encodings.register(Means, Along, Slope)


# ---- terms


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def test_a_join_may_add_at_the_input_the_residual_attention_and_the_output_together() -> None:
    model = tiny("learnable", "everywhere", class_token=False, global_pool="avg", fc_norm=False)
    x, places = model.tokens_of(images())
    w = model.pos_embed
    x = x + w
    for layer, block in enumerate(model.blocks, start=1):
        x = x + 0.1 * layer * w
        x = x + block.attn(layer_norm(x, block.norm1) + 10 * layer * w, places)
        x = x + block.mlp(layer_norm(x, block.norm2))
    assert_near(model.forward_features(images()), layer_norm(x, model.norm) - w, 1e-11)
    assert_equal(model.forward_intermediates(images(), norm=True)[0], model.forward_features(images()))


@torch.no_grad()
def test_the_picture_of_such_a_join_shows_all_that_attention_reads() -> None:
    model = tiny("learnable", "everywhere")
    w = model.pos_embed
    for layer, (positions, block) in enumerate(zip(layer_positions(model), model.blocks, strict=True), start=1):
        expected = layer_norm(w + 0.1 * layer * w, block.norm1) + 10 * layer * w
        assert_near(positions, expected[0, 1:])
    reason = why_no_split(model)
    assert reason is not None
    assert "norm1 reads the sum" in reason
    assert len(attention_maps(model, images(1))) == 2


@torch.no_grad()
def test_dropped_patches_take_their_terms_along() -> None:
    model = tiny("learnable", "everywhere", patch_drop_rate=0.5).train()
    kept: list[Tensor] = []
    model.patch_drop.register_forward_hook(lambda module, args, output: kept.append(output[1]))
    features = model.forward_features(images(1))
    whole = tiny("learnable", "everywhere")
    tokens, places = whole.tokens_of(images(1))
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:][:, kept[0][0]]], dim=1)
    assert_near(features, whole.forward_tokens(tokens, places.keep(kept[0])), 1e-11)


def test_a_new_join_is_offered_for_every_absolute_encoding() -> None:
    legal = {pe for pe, join_type in joins.legal_pairs() if join_type == "everywhere"}
    assert legal == {name for name in encodings.names() if encodings.resolve(name).absolute is not None}


# ---- a token encoding


@torch.no_grad()
def test_a_token_encoding_acts_on_the_patches_after_its_block() -> None:
    for pe, after in (("means", 0), ("means(after=1)", 1), ("means(after=-1,strength=0.5)", 1)):
        model = tiny(pe)
        x, places = model.tokens_of(images())
        for layer, block in enumerate(model.blocks):
            x = block(x, places)
            if layer == after:
                rows = x[:, 1:].unflatten(1, (4, 4)).mean(dim=2, keepdim=True).expand(-1, -1, 4, -1).flatten(1, 2)
                x = torch.cat([x[:, :1], x[:, 1:] + model.token_encoding.strength * rows], dim=1)
        assert_near(model.forward_features(images()), layer_norm(x, model.norm), 1e-11)


def test_a_token_encoding_adds_to_one_of_each_family() -> None:
    model = tiny("means+along+slope", "LaPE")
    assert model.pe == "slope+along+means"
    assert model(images()).isfinite().all()
    assert "slope+along+means" in encodings.sums()
    assert [view.name for view in position_views(model)] == ["similarity", "bias", "bias_offsets", "response"]
    assert tiny("means").prune_intermediate_layers([0]) == [0]


@pytest.mark.parametrize("after", [2, -3])
def test_a_token_encoding_after_a_block_that_is_not_there_is_refused(after: int) -> None:
    with pytest.raises(ValueError, match=f"after={after}, and the blocks are 0 to 1"):
        create(f"means(after={after})")


# ---- options


@pytest.mark.parametrize(
    ("pe", "canonical"),
    [
        ("along", "along"),
        ("along(axis=x)", "along"),
        ("along(axis=y)", "along(axis=y)"),
        ("along( steep = -2.50 , axis = 'y' )", "along(axis=y,steep=-2.5)"),
        ("along(steep=2)", "along(steep=2)"),
        ("along(steep=0.1)", "along(steep=0.1)"),
        ("along(steep=1e+20)", "along(steep=1e+20)"),
        ("along(steep=0.12345678901)", "along(steep=0.12345678901)"),
        ("along(squared=true)", "along(squared=True)"),
        ("along(squared=False)", "along"),
        ("along(axis=y) + slope(slope=3)", "slope(slope=3)+along(axis=y)"),
        ("along()", "along"),
    ],
)
def test_options_stand_in_the_name_in_one_form(pe: str, canonical: str) -> None:
    resolved = encodings.resolve(pe)
    assert resolved.name == encodings.canonical_name(pe) == canonical
    assert encodings.resolve(canonical) == resolved
    model = create(pe)
    assert (model.pe, model.pe_options) == (canonical, resolved.options())


def test_options_as_arguments_come_into_the_name() -> None:
    model = create("along", axis="y", steep=3)
    assert model.pe == "along(axis=y,steep=3)"
    assert model.pe_options == {"axis": "y", "steep": 3.0, "squared": False}
    assert model.blocks[0].attn.encoding.axis == "y"
    assert create("along(steep=3)", steep=3.0).pe == "along(steep=3)"


@pytest.mark.parametrize(
    ("pe", "given", "error", "message"),
    [
        ("along(axis=z)", {}, ValueError, "axis='z'.*one of x, y"),
        ("along(steep=high)", {}, ValueError, "steep='high'.*a number"),
        ("along(squared=2)", {}, ValueError, "squared=2.*True or False"),
        ("along(slope=2)", {}, TypeError, "pe='along' takes no option 'slope'; its options: axis, steep, squared"),
        ("slope+along(slope=2)", {}, TypeError, "pe='along' takes no option 'slope'"),
        ("along", {"slope": 2.0}, TypeError, "takes no option 'slope'"),
        ("along(steep=2)", {"steep": 3.0}, ValueError, "steep=2, and steep=3"),
        ("along(steep)", {}, ValueError, "'steep' is no option=value"),
        ("along(steep=2", {}, ValueError, "cannot be read"),
        ("none(steep=2)", {}, TypeError, "pe='none' takes no option 'steep'"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_in_one_line(
    pe: str, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        create(pe, **given)
    assert "\n" not in str(raised.value)


# ---- faults of a definition


def test_a_class_of_no_family_is_refused_by_the_registry() -> None:
    class Nothing(Encoding):
        name = "nothing"

    with pytest.raises(TypeError, match="Nothing belongs to no family"):
        encodings.register(Nothing)


def test_a_name_is_given_once_and_is_a_word() -> None:
    with pytest.raises(ValueError, match="'slope' is taken"):
        encodings.register(Slope)
    with pytest.raises(ValueError, match=r"'a\+b' is taken, or is no word"):
        encodings.register(type("Sum", (Slope,), {"name": "a+b"}))


def test_an_option_needs_a_default_of_a_plain_type() -> None:
    class Listed(Slope):
        name = "listed"

        def __init__(self, dim: int, grid: Grid, prefix_rows: int, *, steps: tuple[int, ...] = (1, 2)) -> None:
            super().__init__(dim, grid, prefix_rows)

    with pytest.raises(TypeError, match="option 'steps' of Listed needs a default"):
        encodings.register(Listed)


@pytest.mark.parametrize(
    ("family", "methods", "message"),
    [
        (AbsoluteEncoding, ["vectors"], "defines none of patch_vectors, forward"),
        (AbsoluteEncoding, ["patch_vectors", "forward"], "its patch_vectors would never be called"),
        (AbsoluteEncoding, ["patch_vectors", "patch_bias"], "patch_bias, a hook of another family"),
        (AttentionEncoding, ["value_term"], "defines none of rotate, offset_bias, patch_bias, bias, widen, narrow"),
        (AttentionEncoding, ["narrow"], "must define widen and narrow together"),
        (AttentionEncoding, ["bias", "widen"], "must define widen and narrow together"),
        (AttentionEncoding, ["bias", "patch_vectors"], "patch_vectors, a hook of another family"),
        (TokenEncoding, ["rotate"], "defines none of forward"),
        (TokenEncoding, ["forward", "rotate"], "rotate, a hook of another family"),
    ],
)
def test_a_hook_that_would_never_be_called_is_a_fault_of_the_class(
    family: type[Encoding], methods: list[str], message: str
) -> None:
    with pytest.raises(TypeError, match=f"Faulty .*{message}"):
        type("Faulty", (family,), {method: lambda self, *args: None for method in methods})


def test_widen_is_called_without_any_flag() -> None:
    class Widening(AttentionEncoding):
        name = "widening"

        def widen(self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
            x, _ = (
                torch.nn.functional.pad(axis, (1, 0)).to(q)[:, None].expand(*q.shape[:-1], 1)
                for axis in places.coordinates()
            )
            return torch.cat([q, -x], -1), torch.cat([k, x], -1), torch.cat([v, torch.zeros_like(x)], -1)

        def narrow(self, x: Tensor, places: Places) -> Tensor:
            return x[..., :-1]

    encodings.register(Widening)
    model, bag = tiny("widening"), tiny("none")
    bag.load_state_dict(model.state_dict())
    assert (model(images()) - bag(images())).abs().max() > 1e-6


def test_the_biases_of_a_member_add_up() -> None:
    class All(Along):
        name = "all of them"

        def offset_bias(self, dx: Tensor, dy: Tensor) -> Tensor:
            return 10 * dx + 100 * dy

        def bias(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
            return torch.ones(1, 1, q.shape[2], q.shape[2]).to(q).triu()

    encoding, along = (kind(LayerSpec(8, 3, (4, 4), 1, 24)) for kind in (All, Along))
    places, q = Places((4, 4)), torch.randn(2, 3, 17, 8, dtype=torch.float64)
    dx, dy = places.offsets()
    of_offsets = torch.nn.functional.pad(10 * dx + 100 * dy, (1, 0, 1, 0))
    expected = torch.ones(1, 1, 17, 17).double().triu() + of_offsets
    assert_near(encoding.logits_bias(q, q, places) - along.logits_bias(q, q, places), expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_bias_of_offsets_is_the_same_of_a_whole_grid_of_some_patches_and_of_each_image(heads: int) -> None:
    class Slanted(AttentionEncoding):
        name = "slanted"

        def offset_bias(self, dx: Tensor, dy: Tensor) -> Tensor:
            slopes = torch.arange(1.0, heads + 1, dtype=dx.dtype)[:, None, None]
            return slopes * (dx + 10 * dy)

    # As many images as heads: neither may stand in for the other.
    encoding, q = Slanted(LayerSpec(8, 2, (2, 3), 1, 16)), torch.zeros(2, 2, 7, 8, dtype=torch.float64)
    places = Places((2, 3))
    whole = encoding.logits_bias(q, q, places)
    assert whole.shape == (heads, 7, 7)
    assert whole[-1, 1, 6] == heads * (2 + 10)  # from the first cell to the last
    assert not whole[:, 0].any()
    assert not whole[:, :, 0].any()
    order = torch.tensor([[5, 0, 3], [1, 2, 4]])
    tokens = torch.nn.functional.pad(order + 1, (1, 0))
    of_each = torch.stack([whole[:, one][:, :, one] for one in tokens])
    assert_equal(encoding.logits_bias(q, q, places.keep(order)), of_each)
    assert_equal(encoding.logits_bias(q, q, places.keep(order[0])), of_each[0])
