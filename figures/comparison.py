"""Checkpoints side by side, and how their positions change over depth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lape_vit.analysis.positions import PositionView, layer_correlations, mean_by_distance
from lape_vit.drawing.positions import EVERYTHING, Choice, Positions, overviews
from lape_vit.drawing.sheet import SIZES, stack_sheets
from lape_vit.places import Grid

DISTANCES = 6
"""Most distances drawn, the nearest and the farthest among them."""


def pictures(checkpoints: Sequence[Positions], choice: Choice = EVERYTHING) -> Iterator[tuple[str, Figure]]:
    """Each picture with its file's name less the ending."""
    for number, figure in enumerate(below_each_other(checkpoints, choice), start=1):
        yield "compare_overview" if number == 1 else f"compare_overview_{number}", figure
    yield "compare_curves", draw_curves(checkpoints)


def below_each_other(checkpoints: Sequence[Positions], choice: Choice = EVERYTHING) -> list[Figure]:
    """The overviews below each other, on common scales, on as many pages as they need."""
    letters, figures = iter(ascii_uppercase), []
    for page in overviews(on_common_scales(checkpoints), choice):
        sheets = []
        for sheet in page:
            heading = [f"{next(letters)}: {sheet.heading[0]}", *sheet.heading[1:]]
            sheets.append(replace(sheet, heading=heading if sheet.bands else [*heading, "nothing to draw"]))
        figures.append(stack_sheets(sheets))
    return figures


def labels(checkpoints: Sequence[Positions]) -> list[str]:
    """A short name of each, with the letter that its sheet has."""
    named = zip(ascii_uppercase, checkpoints, strict=False)
    return [f"{letter}: {positions.pe}, {positions.join_type}" for letter, positions in named]


def on_common_scales(checkpoints: Sequence[Positions]) -> list[Positions]:
    """Views of the same name have the widest of their limits."""
    widest: dict[str, float] = {}
    for view in (view for positions in checkpoints for view in positions.views):
        widest[view.name] = max(view.limits[1], widest.get(view.name, 0.0))
    return [
        replace(
            positions,
            views=[replace(view, limits=(-widest[view.name], widest[view.name])) for view in positions.views],
        )
        for positions in checkpoints
    ]


def curve_views(checkpoints: Sequence[Positions]) -> list[str]:
    """Names of the views that have curves: those between patches, and those by offset that are all there is."""
    names = dict.fromkeys(view.name for positions in checkpoints for view in positions.views if not view.rows)
    return [name for name in names if name.removesuffix("_offsets") not in names.keys() - {name}]


def draw_curves(checkpoints: Sequence[Positions]) -> Figure:
    """A row for each quantity: its mean by distance in each checkpoint, and the correlation of successive layers."""
    rows = {name: views_named(checkpoints, name) for name in curve_views(checkpoints)}
    columns = max(map(len, rows.values())) + 1
    figure = Figure(figsize=(3.1 * columns, 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, views in zip(grid, rows.values(), strict=True):
        for axes, (label, (positions, view)) in zip(row, views.items(), strict=False):
            axes.sharey(row[0])
            draw_locality(axes, label, positions.grid, view)
        draw_correlations(row[len(views)], views)
        for axes in row[: len(views) + 1]:
            axes.tick_params(labelsize=SIZES["tick"])
            axes.set_xlabel("block", fontsize=SIZES["panel"])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in row[len(views) + 1 :]:
            axes.remove()
    return figure


def views_named(checkpoints: Sequence[Positions], name: str) -> dict[str, tuple[Positions, PositionView]]:
    """Of each checkpoint that has the view, by a short name of the checkpoint."""
    return {
        label: (positions, view)
        for label, positions in zip(labels(checkpoints), checkpoints, strict=True)
        for view in positions.views
        if view.name == name
    }


def draw_locality(axes: Axes, label: str, grid: Grid, view: PositionView) -> None:
    """The mean by distance over depth, a line for each of a few distances."""
    distances, means = mean_by_distance(view, grid)
    last = len(distances) - 1
    shown = sorted({round(last * step / (DISTANCES - 1)) for step in range(DISTANCES)})
    for place, index in enumerate(shown):
        colour = colormaps["viridis"](0.9 * place / max(1, len(shown) - 1))
        axes.plot(range(len(means)), means[:, index], ".-", color=colour, label=str(distances[index]))
    axes.set_title(label, fontsize=SIZES["panel"], loc="left")
    axes.set_ylabel(f"mean {view.title}".replace("mean mean", "mean"), fontsize=SIZES["tick"])
    legend_below(axes, len(shown), "patches apart")


def draw_correlations(axes: Axes, views: Mapping[str, tuple[Positions, PositionView]]) -> None:
    """The correlation of each layer with the one before it, a line for each checkpoint."""
    for place, (label, (_, view)) in enumerate(views.items()):
        colour = colormaps["viridis"](0.8 * place / max(1, len(views) - 1))
        axes.plot(range(1, len(view.layers)), layer_correlations(view), ".-", color=colour, label=label)
    axes.set_title("correlation with the block before", fontsize=SIZES["panel"], loc="left")
    legend_below(axes, 1)


def legend_below(axes: Axes, columns: int, title: str | None = None) -> None:
    """Where it covers no line."""
    axes.legend(
        title=title,
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        frameon=False,
        handlelength=1.0,
        columnspacing=1.0,
        fontsize=SIZES["tick"],
        title_fontsize=SIZES["tick"],
    )


def raw_curves(checkpoints: Sequence[Positions]) -> dict[str, NDArray[Any]]:
    """All numbers behind the curves; `0/similarity/by_distance` is of the first checkpoint's view `similarity`."""
    values: dict[str, NDArray[Any]] = {"checkpoints": np.array([positions.source for positions in checkpoints])}
    for number, positions in enumerate(checkpoints):
        names = curve_views([positions])
        for view in (view for view in positions.views if view.name in names):
            distances, means = mean_by_distance(view, positions.grid)
            stem = f"{number}/{view.name}"
            values[f"{stem}/distances"], values[f"{stem}/by_distance"] = np.array(distances), means.numpy()
            values[f"{stem}/correlations"] = layer_correlations(view).numpy()
    return values
