"""One page for each model, one that compares them (curves over depth, bars of knock-outs, curves over sizes), and the
two panels of it that answer most.

A line is the mean over the seeds, and a band reaches from the lowest to the highest of them.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from comparison.pictures import DPI, Look, colours_of, explain, pair_looks
from diagnosis.summary import group
from diagnosis.tables import heading
from lape_vit.analysis import diagnosis_numbers as names
from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.analysis.diagnosis_numbers import Group, Key, Values, changes_of
from lape_vit.drawing.diagnosis import (
    FEW,
    SMALL,
    draw_line,
    draw_page,
    limit_r2,
    name_panels,
    over_depth,
    set_blocks,
    spot_key,
    tidy,
)
from runtime.files import atomic_write

R2 = "R² of a linear probe"
KNOWN = "what attention reads tells of places (contents permuted)"
KNOWN_AT_INPUT = "what a block's input tells of places (contents permuted)"


def write_pictures(folder: Path, records: Sequence[Diagnosis]) -> list[str]:
    """Write a page for each group of seeds, and where there are several groups `diagnosis.png` and `layers.png`.

    Returns:
        The names of the files.
    """
    groups, written = group(records), []
    pages = [(file_name(one.label), draw_group(one)) for one in groups]
    if len(groups) > 1:
        pages += [("diagnosis.png", draw_comparison(groups)), ("layers.png", draw_layers(groups))]
    for name, figure in pages:
        with atomic_write(folder / name) as file:
            figure.savefig(file, format="png", dpi=DPI)
        written.append(name)
    return written


def file_name(label: str) -> str:
    """Of a group's page."""
    return re.sub(r"[^\w+.()=-]+", "_", label).strip("_") + ".png"


def draw_group(one: Group) -> Figure:
    """The page of a model, over its seeds."""
    seeds = f"\nmean of {len(one.records)} seeds; bands and dots: from the lowest to the highest, each seed"
    return draw_page(one, f"{one.label}: {heading([one])}{seeds if len(one.records) > 1 else ''}")


# ---- the page that compares


def draw_comparison(groups: Sequence[Group]) -> Figure:
    """Curves over depth of all groups, and what their answers depend on."""
    values = [one.all_values() for one in groups]
    looks = looks_of(groups)
    middle = max(3.7, 0.035 * len(groups) * len(changes_of(groups)))
    figure = Figure(figsize=(15.5, 7.8 + middle), dpi=DPI, layout="constrained")
    several = any(len(one.records) > 1 for one in groups)
    bands = ", bands from the lowest to the highest" if len(groups) <= FEW else ""
    figure.suptitle(heading(groups) + (f"\nmean over seeds{bands}" if several else ""), fontsize=12)
    axes = figure.subplots(3, 2, height_ratios=(3.7, middle, 3.7))
    draw_knowledge(axes[0, 0], groups, values, looks)
    draw = partial(draw_curves, groups=groups, values=values, looks=looks)
    draw(axes[0, 1], KNOWN_AT_INPUT, R2, lambda block: spot_key("r2", names.INPUT, "permuted", block), has_output=True)
    draw(axes[2, 0], "how sharp attention is", "entropy (nats)", lambda block: Key("entropy", block=block))
    draw(axes[2, 1], "how far attention looks", "distance (patches)", lambda block: Key("distance", block=block))
    measure = measure_of(values)
    draw_all_changes(axes[1, 0], groups, values, looks, measure)
    draw_losses(axes[1, 1], groups, values, looks, measure)
    name_panels(figure)
    explain_looks(figure, groups, looks)
    return figure


def draw_layers(groups: Sequence[Group]) -> Figure:
    """What the attention of each layer is told of places, beside what that is worth to the answer."""
    values = [one.all_values() for one in groups]
    looks = looks_of(groups)
    figure = Figure(figsize=(11, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2)
    draw_knowledge(axes[0], groups, values, looks)
    draw_losses(axes[1], groups, values, looks, measure_of(values))
    explain_looks(figure, groups, looks)
    return figure


def measure_of(values: Sequence[Values]) -> str:
    """What knock-outs are judged by: accuracy where all models have one."""
    return "accuracy" if all(Key("accuracy") in found for found in values) else "agreement"


def draw_knowledge(axes: Axes, groups: Sequence[Group], values: Sequence[Values], looks: Sequence[Look]) -> None:
    """What the where-probe finds in what attention reads."""
    draw_curves(axes, KNOWN, R2, lambda block: Key("r2", names.READ, "permuted", block), groups, values, looks)


def draw_curves(
    axes: Axes,
    title: str,
    label: str,
    key: Callable[[int | None], Key],
    groups: Sequence[Group],
    values: Sequence[Values],
    looks: Sequence[Look],
    has_output: bool = False,
) -> None:
    """A line over the blocks for each group."""
    for one, found, style in zip(groups, values, looks, strict=True):
        blocks: list[int | None] = [*range(one.depth()), *([None] if has_output else [])]
        draw_line(axes, over_depth(found, key, blocks), len(groups) <= FEW, markersize=4, **style)
    set_blocks(axes, max(one.depth() for one in groups), has_output)
    tidy(axes, title, label)
    if label == R2:
        axes.axhline(0, color="black", linewidth=0.6)
        limit_r2(axes)


def draw_all_changes(
    axes: Axes, groups: Sequence[Group], values: Sequence[Values], looks: Sequence[Look], measure: str
) -> None:
    """A row for each change of the whole model, and in it a mark for each group."""
    changes = ([names.INTACT] if measure == "accuracy" else []) + changes_of(groups)
    height = 0.7 / len(groups)
    for row, name in enumerate(reversed(changes)):
        for number, (found, style) in enumerate(zip(values, looks, strict=True)):
            numbers = found.get(Key(measure, name), [])
            if numbers:
                y = row + 0.35 - (number + 0.5) * height
                axes.plot([min(numbers), max(numbers)], [y, y], color=style["color"], linewidth=1.2, alpha=0.6)
                axes.plot(float(np.mean(numbers)), y, style["marker"], color=style["color"], markersize=4.5)
    for row in range(1, len(changes)):
        axes.axhline(row - 0.5, color="0.85", linewidth=0.8)
    axes.set_yticks(range(len(changes)), list(reversed(changes)), fontsize=SMALL)
    axes.set_ylim(-0.5, len(changes) - 0.5)
    tidy(axes, "what the answer depends on", "")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy (%)" if measure == "accuracy" else "answers that stay the same (%)")


def draw_losses(
    axes: Axes, groups: Sequence[Group], values: Sequence[Values], looks: Sequence[Look], measure: str
) -> None:
    """What is lost once the positions of one block are taken away."""
    for one, found, style in zip(groups, values, looks, strict=True):
        intact = found[Key("accuracy", names.INTACT)] if measure == "accuracy" else [100.0] * len(one.records)
        lost = [
            [
                whole - left
                for whole, left in zip(intact, found.get(Key(measure, names.TAKEN_AWAY, block=block), []), strict=False)
            ]
            for block in range(one.depth())
        ]
        draw_line(axes, lost, len(groups) <= FEW, markersize=4, **style)
    axes.axhline(0, color="black", linewidth=0.6)
    set_blocks(axes, max(one.depth() for one in groups), has_output=False)
    unit = "accuracy lost (points)" if measure == "accuracy" else "answers that change (%)"
    tidy(axes, "what each block's own positions are worth", unit)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def looks_of(groups: Sequence[Group]) -> list[Look]:
    """Colour, line and marker of each group: of its encoding and join where these tell the groups apart."""
    if pairs := telling_pairs(groups):
        looks = pair_looks(pairs)
        return [looks[pair] for pair in pairs]
    colours = colours_of(one.label for one in groups)
    return [{"color": colours[one.label], "linestyle": "-", "marker": "o"} for one in groups]


def telling_pairs(groups: Sequence[Group]) -> list[tuple[str, str]] | None:
    """The encoding and join of each group, if these tell the groups apart."""
    pairs = [(one.first.pe, one.first.join_type) for one in groups]
    return pairs if len({*pairs}) == len(pairs) else None


def explain_looks(figure: Figure, groups: Sequence[Group], looks: Sequence[Look]) -> None:
    """A legend beside the panels."""
    if pairs := telling_pairs(groups):
        explain(figure, dict(zip(pairs, looks, strict=True)))
        return
    handles = [Line2D([], [], label=one.label, markersize=5, **look) for one, look in zip(groups, looks, strict=True)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
