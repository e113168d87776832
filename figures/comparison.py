"""Checkpoints side by side, and how their positions change over depth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from lape_vit.analysis.positions import PositionView, layer_correlations, mean_by_distance
from lape_vit.drawing.positions import EVERYTHING, Choice, Positions, overviews
from lape_vit.drawing.sheet import SIZES, stack_sheets

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
    """A row for each quantity: its mean by distance, and the correlation of successive layers.

    Checkpoints that differ in the seed alone are one line, the mean over them, in a band from the least to the greatest
    of them. Correlations are drawn from -1 to 1, and means on the scale of the colours, so that a trend that is seen is
    one that matters beside the values themselves.
    """
    groups = seed_groups(checkpoints)
    shown = on_common_scales(checkpoints)
    rows = {name: views_named(shown, groups, name) for name in curve_views(shown)}
    columns = max(map(len, rows.values())) + 1
    figure = Figure(figsize=(3.1 * columns, 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, views in zip(grid, rows.values(), strict=True):
        for axes, (label, group) in zip(row, views.items(), strict=False):
            axes.sharey(row[0])
            draw_locality(axes, label, group)
        reach = max(
            max(view.limits[1] for group in views.values() for _, view in group),
            1.05 * max(abs(y) for axes in row[: len(views)] for line in axes.lines for y in line.get_ydata()),
        )
        row[0].set_ylim(-reach, reach)
        draw_correlations(row[len(views)], views)
        for axes in row[: len(views) + 1]:
            axes.tick_params(labelsize=SIZES["tick"])
            axes.set_xlabel("block", fontsize=SIZES["panel"])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in row[len(views) + 1 :]:
            axes.remove()
    return figure


def seed_groups(checkpoints: Sequence[Positions]) -> list[list[int]]:
    """Numbers of the checkpoints, those together that differ in the seed of the training alone."""
    groups: list[list[int]] = []
    for number, one in enumerate(checkpoints):
        for group in groups:
            first = checkpoints[group[0]]
            seeds = [seed_and_rest(checkpoints[other])[0] for other in group]
            seed, rest = seed_and_rest(one)
            if seed is not None and seed not in seeds and rest == seed_and_rest(first)[1] and one.grid == first.grid:
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def seed_and_rest(positions: Positions) -> tuple[int | None, dict[str, Any]]:
    """The seed of the training, None where that is unknown, and all other options."""
    rest = dict(positions.config or {})
    return rest.pop("seed", None), rest


Shown = Sequence[tuple[Positions, PositionView]]
"""A view of checkpoints that differ in the seed alone."""


def views_named(checkpoints: Sequence[Positions], groups: Sequence[Sequence[int]], name: str) -> dict[str, Shown]:
    """Of each group of checkpoints that has the view, by a short name of the group."""
    found: dict[str, Shown] = {}
    for group in groups:
        members = [(one, view) for one in (checkpoints[i] for i in group) for view in one.views if view.name == name]
        if members:
            letters = ", ".join(ascii_uppercase[number] for number in group)
            seeds = f", {len(group)} seeds" if len(group) > 1 else ""
            found[f"{letters}: {members[0][0].pe}, {members[0][0].join_type}{seeds}"] = members
    return found


def draw_locality(axes: Axes, label: str, group: Shown) -> None:
    """The mean by distance over depth, a line for each of a few distances."""
    found = [mean_by_distance(view, positions.grid) for positions, view in group]
    distances, means = found[0][0], torch.stack([means for _, means in found])
    last = len(distances) - 1
    shown = sorted({round(last * step / (DISTANCES - 1)) for step in range(DISTANCES)})
    for place, index in enumerate(shown):
        colour = colormaps["viridis"](0.9 * place / max(1, len(shown) - 1))
        draw_line(axes, range(means.shape[1]), means[:, :, index], colour, str(distances[index]))
    view = group[0][1]
    axes.set_title(label, fontsize=SIZES["panel"], loc="left")
    axes.set_ylabel(f"mean {view.title}".replace("mean mean", "mean"), fontsize=SIZES["tick"])
    legend_below(axes, len(shown), "patches apart")


def draw_correlations(axes: Axes, views: Mapping[str, Shown]) -> None:
    """The correlation of each layer with the one before it, a line for each group of checkpoints."""
    for place, (label, group) in enumerate(views.items()):
        colour = colormaps["viridis"](0.8 * place / max(1, len(views) - 1))
        correlations = torch.stack([layer_correlations(view) for _, view in group])
        draw_line(axes, range(1, correlations.shape[1] + 1), correlations, colour, label)
    axes.set_ylim(-1.05, 1.05)
    axes.set_title("correlation with the block before", fontsize=SIZES["panel"], loc="left")
    legend_below(axes, 1)


def draw_line(axes: Axes, x: Sequence[int], values: Tensor, colour: Any, label: str) -> None:
    """The mean of (S, x), and a band from the least to the greatest where S is more than one."""
    axes.plot(x, values.mean(dim=0), ".-", color=colour, label=label)
    if len(values) > 1:
        axes.fill_between(x, values.amin(dim=0), values.amax(dim=0), color=colour, alpha=0.25, linewidth=0)


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
