"""What the sheets and curves show, on which scales, and that no text is in the way of another."""

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from figures import comparison
from lape_vit.analysis.attention_maps import attention_maps
from lape_vit.analysis.positions import PositionView, layer_correlations, mean_by_distance, plane_frequencies
from lape_vit.drawing import attention
from lape_vit.drawing.attention import TokenAttention, of_token
from lape_vit.drawing.panels import mosaic_shape, offset_ticks, same_place, varies_by_patch
from lape_vit.drawing.positions import (
    Choice,
    Positions,
    check_choice,
    measure,
    overview,
    overviews,
    pictures,
    raw_values,
    single_bands,
)
from lape_vit.drawing.sheet import Colours, draw_sheets, single, stack_sheets
from lape_vit.encodings.base import LayerSpec
from lape_vit.encodings.rotary import RopeMixed
from tests.models import images, tiny

SHEETS = [("learnable", "LaPE_share"), ("2D_RPE", "LaPE"), ("relative", "basic"), ("rope", "basic")]
SHEETS += [("learnable+rope_mixed", "LaPE"), ("1D_sin+relative", "LaPE_share"), ("peg", "basic")]


def of(pe: str, join_type: str, grid: tuple[int, int] = (4, 4), depth: int = 2, **kwargs: object) -> Positions:
    model = tiny(pe, join_type, img_size=(8 * grid[0], 8 * grid[1]), depth=depth, **kwargs)
    return measure(model, "runs/a_run_with_a_long_name/best_checkpoint.pth", "deit_base_distilled_patch16_384")


def panels(figure: Figure) -> list[Axes]:
    """All but the colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def view_of(positions: Positions, name: str) -> PositionView:
    (found,) = (view for view in positions.views if view.name == name)
    return found


def shown_values(axes: Axes) -> Tensor:
    """The tiles of a panel, (V, R, C)."""
    return torch.stack([torch.from_numpy(np.asarray(image.get_array())) for image in axes.images])


# ---- what is on the sheets


def test_the_overview_shows_every_matrix_and_every_map_of_the_chosen_patch_on_one_scale() -> None:
    model = tiny("learnable", "LaPE_share", img_size=(24, 40), depth=8)
    positions = measure(model, "c.pth", "m", token=(1, 2), scale="range")
    shown = panels(draw_sheets([overview(positions)]))
    values = view_of(positions, "similarity").values
    assert positions.untrained is not None
    values = [*values, positions.untrained]
    expected = [*values, *(value[:, 1 * 5 + 2].unflatten(1, (3, 5)) for value in values)]
    for axes, value in zip(shown, expected, strict=True):
        assert torch.equal(shown_values(axes), value)
        assert axes.images[0].get_clim() == (-1, 1)
    assert [axes.get_title(loc="left") for axes in shown] == [
        *(f"block {layer}" for layer in range(8)),
        "untrained",
    ] * 2
    for axes in shown[9:]:
        (mark,) = axes.lines
        assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2.5], [1.5])  # the middle of its cell
    for axes in shown:
        height, width = axes.get_window_extent().height, axes.get_window_extent().width
        rows, columns = shown_values(axes).shape[1:]
        assert height / width == pytest.approx(rows / columns)  # patches are squares


def test_the_heading_says_what_is_shown() -> None:
    text = " ".join(text.get_text() for text in draw_sheets([overview(of("learnable", "LaPE", (3, 5)))]).texts)
    for part in (
        "a_run_with_a_long_name",
        "deit_base_distilled_patch16_384",
        "pe=learnable",
        "join_type=LaPE",
        "3 x 5",
    ):
        assert part in text
    assert "row 1, column 2" in text


@pytest.mark.parametrize(("pe", "join_type"), SHEETS)
def test_every_band_has_one_scale_and_a_colour_bar_of_it(pe: str, join_type: str) -> None:
    positions = of(pe, join_type)
    figure = draw_sheets([overview(positions)])
    limits = {axes.images[0].get_clim() for axes in panels(figure) if axes.images}
    assert {view.limits for view in positions.views if view.by_offset or view.rows} <= limits
    assert limits <= {view.limits for view in positions.views}
    bars = {axes.get_ylim() for axes in figure.axes if axes.get_label() == "<colorbar>"}
    assert limits <= bars


def test_heads_are_tiles_in_the_order_of_reading() -> None:
    positions = of("2D_RPE", "basic", (2, 3), num_heads=6)
    figure = draw_sheets([overview(positions)])
    first, second = panels(figure)
    corners = []
    for axes, values in zip((first, second), view_of(positions, "bias_offsets").values, strict=True):
        assert torch.equal(shown_values(axes), values)
        corners.append([(tile.get_extent()[3], tile.get_extent()[0]) for tile in axes.images])  # top, left
    assert corners[0] == corners[1] == sorted(corners[0])
    assert len({top for top, _ in corners[0]}) == 6
    assert first.get_position().y0 == second.get_position().y0  # a head is a row over the layers
    assert [text.get_text() for text in first.texts] == [f"head {head}" for head in range(6)]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (6, (2, 3)), (12, (3, 4))])
def test_a_mosaic_is_nearly_square_and_has_no_gaps(count: int, shape: tuple[int, int]) -> None:
    assert mosaic_shape(count) == shape


def test_layers_that_are_alike_are_drawn_once() -> None:
    figure = draw_sheets([overview(of("rope", "basic", depth=5))])
    assert [axes.get_title(loc="left") for axes in panels(figure)] == ["blocks 0 to 4"] * 2


def test_frequencies_are_points_in_the_plane_that_a_patch_down_and_one_to_the_right_make() -> None:
    model = tiny("rope_mixed", "basic")
    (axes,) = panels(dict(pictures(measure(model, "c", "m")))["basic_layer1_frequencies"])
    (points,) = axes.collections
    expected = plane_frequencies(model)[1].flatten(0, 1)
    np.testing.assert_array_equal(np.asarray(points.get_offsets()), expected.numpy())
    assert axes.yaxis_inverted()
    assert [len(set(map(tuple, points.to_rgba(points.get_array()[head * 4 : head * 4 + 4])))) for head in range(3)] == [
        1,
        1,
        1,
    ]
    assert len(set(map(tuple, points.to_rgba(points.get_array())))) == 3


@pytest.mark.parametrize(("pe", "join_type"), SHEETS)
def test_colours_tell_99_percent_of_the_values_apart_and_a_caption_says_where_they_end(pe: str, join_type: str) -> None:
    positions = of(pe, join_type, (6, 6))
    for view in positions.views:
        sizes = torch.cat([values[:, ~same_place(values, view.by_offset)].flatten() for values in view.values]).abs()
        low, high = view.limits
        assert low == -high
        assert (sizes <= high * (1 + 1e-6)).double().mean() >= 0.99
        assert high <= 1.1 * sizes.quantile(0.99) or high <= 1.25 * 1.1 * torch.stack(view.values).abs().max()
    for band in overview(positions).bands:
        if isinstance(band.colours, Colours) and band.colours.cut:
            assert band.shared is not None
            assert f"colours end at ±{band.colours.limits[1]:.2g}, the largest value is" in band.shared.caption


@pytest.mark.parametrize("grid", [(6, 6), (5, 5)], ids=str)
def test_the_scale_of_cosines_leaves_out_those_of_a_place_with_itself(grid: tuple[int, int]) -> None:
    (view,) = of("learnable", "LaPE", grid).views
    assert view.limits[1] < 0.7
    (band, _) = overview(of("learnable", "LaPE", grid)).bands
    assert band.colours is not None
    assert band.colours.cut


@pytest.mark.parametrize(("scale", "expected"), [("range", 1.0), (0.25, 0.25), (3.0, 3.0)])
def test_the_scale_can_be_fixed(scale: Any, expected: float) -> None:
    positions = measure(tiny("learnable", "LaPE"), "c", "m", scale=scale)
    assert {view.limits for view in positions.views} == {(-expected, expected)}
    assert positions.encoding_limits == (-expected, expected)


def test_frequencies_are_drawn_from_their_start_and_the_title_says_how_far_they_moved() -> None:
    torch.manual_seed(3)
    encoding = RopeMixed(LayerSpec(16, 2, (4, 4), 1, 32))
    start = encoding.frequencies.detach().clone()
    torch.testing.assert_close(encoding.nearest_start(), start)
    with torch.no_grad():
        encoding.frequencies += 0.05 * torch.randn_like(start)
    nearest = encoding.nearest_start()
    assert (encoding.frequencies - nearest).norm() <= (encoding.frequencies - start).norm()
    assert (nearest - start).norm() < 0.5 * (encoding.frequencies - start).norm()
    positions = of("rope_mixed", "basic")
    assert len(positions.starts) == 2
    band = overview(positions).bands[-1]
    moved = (torch.stack(positions.frequencies) - torch.stack(list(positions.starts))).norm(dim=-1).mean()
    assert band.title.endswith(f"grey: from the nearest start, {moved:.2g} away in the mean")
    assert not of("rope", "basic").starts


@pytest.mark.parametrize(
    ("pe", "join_type"), [("learnable", "LaPE"), ("learnable", "unshare"), ("learnable+rope", "share")]
)
def test_a_trained_table_is_shown_beside_an_untrained_one(pe: str, join_type: str) -> None:
    torch.manual_seed(5)
    positions, after = of(pe, join_type), torch.rand(1)
    torch.manual_seed(5)
    of(pe, join_type)
    assert torch.equal(torch.rand(1), after)
    assert positions.untrained is not None
    assert np.array_equal(positions.untrained, raw_values(of(pe, join_type))["untrained"])
    different = positions.untrained[0][~torch.eye(16, dtype=torch.bool)]
    assert different.abs().max() < 1
    assert different.mean().abs() < 0.1  # drawn at random: no place is like another

    named = [band for band in overview(positions).bands if band.title.startswith("cosine similarity")]
    assert len(named) == 2  # of every patch, and of the chosen one
    for band in named:
        assert band.panels[-1].title == "untrained"
        assert sum(panel.title == "untrained" for panel in band.panels) == 1
    axes = panels(dict(pictures(positions))["PE_token_sim"])
    assert [one.get_title(loc="left") for one in axes][-1] == "untrained"
    row = positions.untrained[0][positions.token[0] * 4 + positions.token[1]].reshape(4, 4)
    assert torch.equal(shown_values(axes[-1])[0], row)
    assert np.array_equal(raw_values(positions)["untrained"], positions.untrained)


@pytest.mark.parametrize(("pe", "join_type"), [("2D_sin", "LaPE"), ("2D_RPE", "LaPE"), ("none", "basic")])
def test_what_is_no_trained_table_has_nothing_untrained_beside_it(pe: str, join_type: str) -> None:
    positions = of(pe, join_type)
    assert positions.untrained is None
    assert "untrained" not in {panel.title for band in overview(positions).bands for panel in band.panels}


def test_a_picture_of_one_head_is_that_heads_matrix_with_ticks_at_the_rows_of_patches() -> None:
    positions = of("2D_RPE", "LaPE", (3, 5))
    (axes,) = panels(dict(pictures(positions))["LaPE_layer1_head2"])
    assert torch.equal(shown_values(axes)[0], view_of(positions, "bias").values[1][2])
    assert axes.get_title(loc="left") == "head 2"
    assert list(axes.get_xticks()) == [0, 5, 10]


def test_only_what_differs_by_more_than_the_offset_gets_the_chosen_patchs_map() -> None:
    positions = of("2D_RPE", "LaPE", (3, 5))
    assert {view.name: varies_by_patch(view, (3, 5)) for view in positions.views} == {
        "bias": False,
        "bias_offsets": False,
        "bias_normed": True,
        "bias_normed_offsets": False,
    }
    assert positions.uses_token
    assert not of("relative", "basic").uses_token


@pytest.mark.parametrize(
    ("side", "longer", "names"),
    [
        (4, 4, ["\N{MINUS SIGN}2", "0", "+2"]),
        (14, 14, ["\N{MINUS SIGN}10", "\N{MINUS SIGN}5", "0", "+5", "+10"]),
        (10, 14, ["\N{MINUS SIGN}5", "0", "+5"]),
        (1, 9, ["0"]),
    ],
)
def test_ticks_of_offsets_are_even_around_0(side: int, longer: int, names: list[str]) -> None:
    places, labels = offset_ticks(side, longer)
    assert labels == names
    assert places[labels.index("0")] == side - 1


def test_raw_values_hold_every_number() -> None:
    positions = of("learnable+rope_mixed", "unshare")
    values = raw_values(positions)
    assert values["similarity"].shape == (2, 1, 16, 16)
    assert values["encoding"].shape == (2, 16, 16)
    assert values["kernel"].shape == (2, 3, 7, 7)
    assert values["frequencies"].shape == (2, 3, 4, 2)


LARGE: dict[str, Any] = {"grid": (14, 14), "depth": 12, "num_heads": 6, "embed_dim": 48}
"""The layers, heads and patches of DeiT-S."""


@pytest.mark.parametrize(("pe", "join_type"), [*SHEETS, ("alibi", "basic"), ("2D_sin", "LaPE")])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_overviews_of_deit_s_fit_a_page(pe: str, join_type: str, count: int) -> None:
    pages = overviews([of(pe, join_type, **LARGE)] * count)
    assert sum(map(len, pages)) == count
    assert len(pages) == 1 or any(len(sheet.bands) > 1 for sheet in pages[0])
    for sheets in pages:
        width, height = stack_sheets(sheets).get_size_inches() * 150
        assert width <= 2000
        assert height <= 2500


def test_the_heads_mean_is_drawn_where_all_would_not_fit_the_page_and_the_title_says_so() -> None:
    positions = of("2D_RPE", "LaPE", **LARGE)
    bands = overview(positions).bands
    assert all(band.title.endswith("mean over 6 heads") for band in bands[:1])
    axes = panels(draw_sheets([overview(positions)]))[0]
    torch.testing.assert_close(shown_values(axes)[0], view_of(positions, "bias_offsets").values[0].mean(dim=0))
    assert "mean over" not in overview(positions, Choice(heads="all")).bands[0].title


def test_layers_heads_and_matrices_are_drawn_as_chosen() -> None:
    positions = of("2D_RPE", "basic", depth=4)
    drawn = dict(pictures(positions, Choice(layers=(1, 3), heads=(0, 2), full=True)))
    shown = panels(drawn["overview"])
    assert [axes.get_title(loc="left") for axes in shown] == ["block 1", "block 3"] * 2
    assert torch.equal(shown_values(shown[1]), view_of(positions, "bias").values[3][[0, 2]])
    assert {re.sub(r"_bias.*", "", name) for name in drawn if name != "overview"} == {
        f"basic_layer{layer}{head}" for layer in (1, 3) for head in ("", "_head0", "_head2")
    }


@pytest.mark.parametrize(("pe", "choice"), [("2D_RPE", Choice(layers=(4,))), ("2D_RPE", Choice(heads=(0, 3)))])
def test_layers_and_heads_that_are_not_there_are_refused(pe: str, choice: Choice) -> None:
    with pytest.raises(ValueError, match=r"--(layers 4: .* layers 0 to 3|heads 3: .* heads 0 to 2)"):
        check_choice(of(pe, "basic", depth=4), choice)


def test_large_matrices_are_drawn_only_if_asked() -> None:
    positions = of("learnable", "LaPE", (14, 14))
    for full, expected in ((False, {(14, 14)}), (True, {(14, 14), (196, 196)})):
        figure = draw_sheets([overview(positions, Choice(full=full))])
        assert {tuple(shown_values(axes).shape[1:]) for axes in panels(figure)} == expected


@pytest.mark.parametrize(("pe", "join_type"), SHEETS)
def test_each_axis_has_ticks_and_each_bar_is_as_high_as_its_panels(pe: str, join_type: str) -> None:
    figure = draw_sheets([overview(of(pe, join_type, (14, 14), depth=7))])
    figure.draw_without_rendering()
    bars = [axes.get_position(original=True) for axes in figure.axes if axes.get_label() == "<colorbar>"]
    lefts = min(axes.get_position().x0 for axes in panels(figure))
    for axes in panels(figure):
        assert len(axes.get_xticks()) > 1
        assert len(axes.get_yticks()) > 1 or axes.get_position().x0 > lefts
    for bar in bars:
        beside = [
            place
            for place in (axes.get_position() for axes in panels(figure))
            if place.y0 >= bar.y0 - 1e-6 and place.y1 <= bar.y1 + 1e-6
        ]
        assert min(place.y0 for place in beside) == pytest.approx(bar.y0)
        assert max(place.y1 for place in beside) == pytest.approx(bar.y1)


# ---- comparisons


@pytest.mark.parametrize("order", [1, -1])
def test_checkpoints_stand_below_each_other_on_common_scales(order: int) -> None:
    checkpoints = [of("2D_RPE", "basic"), of("2D_RPE", "LaPE", depth=3)][::order]
    (figure,) = comparison.below_each_other([*checkpoints, of("none", "basic")])
    limits = {view_of(positions, "bias_offsets").limits[1] for positions in checkpoints}
    assert len(limits) == 2
    widest = max(limits)
    of_bias = [axes for axes in panels(figure) if shown_values(axes).shape[1:] == (7, 7)]
    scales = {axes.images[0].get_clim() for axes in of_bias}
    assert (-widest, widest) in scales
    assert len(scales) == 2  # of the bias before the norm, and after it
    texts = [text.get_text() for text in figure.texts]
    assert [text[0] for text in texts if "best_checkpoint" in text] == ["A", "B", "C"]
    assert texts[-1] == "nothing to draw"


def test_curves_show_the_mean_by_distance_and_the_correlation_of_layers() -> None:
    first, second = of("learnable", "LaPE", depth=4), of("learnable", "unshare", (3, 5), depth=3)
    figure = comparison.draw_curves([first, second])
    for axes, positions in zip(figure.axes, (first, second), strict=False):
        distances, means = mean_by_distance(view_of(positions, "similarity"), positions.grid)
        assert [line.get_label() for line in axes.lines] == list(map(str, distances))
        for line, curve in zip(axes.lines, means.T, strict=True):
            np.testing.assert_array_equal(line.get_ydata(), curve)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    last = figure.axes[-1]
    assert [line.get_label() for line in last.lines] == ["A: learnable, LaPE", "B: learnable, unshare"]
    for line, positions in zip(last.lines, (first, second), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), layer_correlations(view_of(positions, "similarity")))
        assert list(line.get_xdata()) == list(range(1, len(view_of(positions, "similarity").layers)))


def test_checkpoints_that_differ_in_the_seed_alone_are_one_line_in_a_band() -> None:
    config = {"epochs": 3, "seed": 0}
    seeds = [replace(of("learnable", "LaPE"), config={**config, "seed": seed}) for seed in (0, 1)]
    seeds[1] = replace(seeds[1], views=[replace(v, values=[-value for value in v.values]) for v in seeds[1].views])
    others = [
        replace(seeds[0], config={"epochs": 9, "seed": 2}),
        replace(seeds[0], config=config),  # another epoch of the same training
        replace(seeds[0], config=None),
        replace(seeds[0], config=None),
    ]
    assert comparison.seed_groups([*seeds, *others]) == [[0, 1], [2], [3], [4], [5]]
    first, correlations = comparison.draw_curves(seeds).axes
    assert first.get_title(loc="left") == "A, B: learnable, LaPE, 2 seeds"
    _, means = mean_by_distance(view_of(seeds[0], "similarity"), (4, 4))
    for line, band, mean in zip(first.lines, first.collections, means.T.numpy(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 0, atol=1e-12)
        edges = band.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([edges.min(), edges.max()], [-abs(mean).max(), abs(mean).max()])
    assert len(correlations.lines) == 1


def test_noise_is_not_zoomed_into_a_trend() -> None:
    checkpoints = [of("learnable", "LaPE", depth=3), of("rope_mixed", "basic", depth=3)]
    axes = comparison.draw_curves(checkpoints).axes
    assert [axes[1].get_ylim(), axes[3].get_ylim()] == [(-1.05, 1.05)] * 2
    for shown, positions in zip((axes[0], axes[2]), checkpoints, strict=True):
        assert shown.get_ylim()[1] >= positions.views[0].limits[1]


def test_quantities_that_only_some_checkpoints_have_get_a_row_of_those() -> None:
    figure = comparison.draw_curves([of("learnable", "LaPE"), of("2D_RPE", "LaPE"), of("rope_mixed", "basic")])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    correlation = "correlation with the block before"
    assert titles == [
        "A: learnable, LaPE",
        correlation,
        "B: 2D_RPE, LaPE",
        correlation,
        "B: 2D_RPE, LaPE",
        correlation,
        "C: rope_mixed, basic",
        correlation,
    ]


# ---- attention


def attention_of(pe: str, join_type: str) -> TokenAttention:
    model = tiny(pe, join_type, img_size=(24, 40))
    positions = measure(model, "c.pth", "m", (2, 3))
    return of_token(positions, "photo.png", torch.rand(24, 40, 3), attention_maps(model, images(1, 24, 40)))


@pytest.mark.parametrize(("pe", "join_type", "parts"), [("2D_RPE", "LaPE", 2), ("rope", "basic", 1)])
def test_attention_stands_beside_the_position_part_of_its_logits(pe: str, join_type: str, parts: int) -> None:
    shown = attention_of(pe, join_type)
    drawn = dict(attention.pictures(shown))
    picture, *maps = panels(drawn["attention"])
    np.testing.assert_allclose(picture.images[0].get_array(), shown.pixels)
    corner = picture.patches[0].get_xy()
    assert corner == (3 * 8 - 0.5, 2 * 8 - 0.5)
    assert torch.equal(shown_values(maps[0]), shown.parts["attention"][0])
    assert len(maps) == 2 * parts
    for axes, values in zip(maps[2:], shown.parts.get("position_logits", []), strict=True):
        assert torch.equal(shown_values(axes), values)
        low, high = axes.images[0].get_clim()
        assert low == -high
    assert len(panels(drawn[f"{join_type}_layer1_attention"])) == 3 * parts


def test_attention_has_a_scale_that_no_single_head_sets_and_says_where_it_ends() -> None:
    shown = attention_of("2D_RPE", "LaPE")
    shown.parts["attention"] = [torch.linspace(0, 0.1, 120).reshape(8, 3, 5) for _ in shown.layers]
    shown.parts["attention"][0][0, 0, 0] = 0.9
    colours = attention.scale(shown, "attention")
    assert (colours.cmap, colours.limits[0], colours.cut) == (attention.UNSIGNED, 0, True)
    assert 0.09 < colours.limits[1] < 0.12
    figure = dict(attention.pictures(shown))["attention"]
    note = f"attention weights: colours end at {colours.limits[1]:.2g}, the largest value is 0.9"
    assert note in [text.get_text() for text in figure.texts]
    whole = replace(shown, positions=replace(shown.positions, scale="range"))
    assert attention.scale(whole, "attention").limits == pytest.approx((0, 0.9))


def test_attention_is_the_chosen_patchs_to_every_patch() -> None:
    model = tiny("learnable", "LaPE", img_size=(24, 40))
    layers = attention_maps(model, images(1, 24, 40))
    shown = attention_of("learnable", "LaPE")
    assert torch.equal(shown.parts["attention"][1], layers[1].weights[:, 1 + 2 * 5 + 3, 1:].unflatten(1, (3, 5)))


# ---- looks


def texts_of(figure: Figure) -> list[Text]:
    """All that is written; of the labels of ticks those within the limits."""
    figure.draw_without_rendering()
    hidden = []
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        hidden += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        hidden += [tick.label2 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in hidden]


@pytest.mark.parametrize(("pe", "join_type"), SHEETS)
@pytest.mark.parametrize(("grid", "depth"), [((4, 4), 1), ((14, 14), 1), ((10, 14), 7), ((3, 24), 1), ((24, 3), 1)])
def test_no_text_covers_another_or_leaves_the_page(pe: str, join_type: str, grid: tuple[int, int], depth: int) -> None:
    positions = of(pe, join_type, grid, depth)
    sheets = {name: single(positions.heading, band) for name, band in single_bands(positions)}
    drawn = {name: sheet for name, sheet in sheets.items() if re.search("layer[1-9]|head[1-9]", name) is None}
    for name, sheet in {**drawn, "overview": overview(positions)}.items():
        figure = draw_sheets([sheet])
        texts = texts_of(figure)
        boxes = [text.get_window_extent() for text in texts]
        page = figure.bbox.padded(1)
        for text, box in zip(texts, boxes, strict=True):
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, (name, text)
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, (name, text)
        for (one, box), (other, other_box) in combinations(zip(texts, boxes, strict=True), 2):
            assert not box.overlaps(other_box), (name, one, other)


def test_signed_quantities_are_white_or_grey_at_0_and_of_equal_strength_on_both_sides() -> None:
    (axes, *_) = panels(draw_sheets([overview(of("2D_RPE", "basic"))]))
    red, green, blue, _ = to_rgba(axes.images[0].get_cmap()(0.5))
    assert max(red, green, blue) - min(red, green, blue) < 0.02
