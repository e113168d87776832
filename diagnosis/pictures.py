"""One page for each model, and one that compares them: curves over depth, bars of knock-outs, curves over sizes.

A line is the mean over the seeds, and a band reaches from the lowest to the highest of them.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from comparison.pictures import DPI, LOOKS, colours_of, explain
from diagnosis.summary import (
    INPUT,
    OUTPUT,
    READ,
    REMOVED,
    REMOVED_AT_OUTPUT,
    SHARPNESS,
    TAKEN_AWAY,
    Group,
    Key,
    changes_of,
    group,
)
from diagnosis.tables import Values, heading
from lape_vit.analysis.attention_statistics import uniform_distance
from lape_vit.analysis.diagnosis import Diagnosis
from runtime.files import atomic_write

BLUE, ORANGE, GREEN, GREY = "tab:blue", "tab:orange", "tab:green", "0.55"
R2_FLOOR = -0.25
"""Where the scale of R^2 ends, if values lie below: that far from any use, they say no more."""
SMALL = 8.5
"""Of text, in points."""
FEW = 8
"""Lines with bands on one panel, at most."""


def write_pictures(folder: Path, records: Sequence[Diagnosis]) -> list[str]:
    """Write a page for each group of seeds, and `diagnosis.png` where there are several groups; returns their names."""
    groups, names = group(records), []
    pages = [(file_name(one.label), draw_group(one)) for one in groups]
    if len(groups) > 1:
        pages.append(("diagnosis.png", draw_comparison(groups)))
    for name, figure in pages:
        with atomic_write(folder / name) as file:
            figure.savefig(file, format="png", dpi=DPI)
        names.append(name)
    return names


def file_name(label: str) -> str:
    """Of a group's page."""
    return re.sub(r"[^\w+.()=-]+", "_", label).strip("_") + ".png"


def draw_diagnosis(record: Diagnosis) -> Figure:
    """The page of one record, made by :func:`lape_vit.analysis.diagnosis.diagnose` or read from a file."""
    return draw_group(group([record])[0])


def draw_group(one: Group) -> Figure:
    """The page of a model, over its seeds."""
    values = one.all_values()
    has_sizes = bool(one.first.sizes)
    rows = 4 if has_sizes else 3
    figure = Figure(figsize=(15, 3.3 * rows + 0.6), dpi=DPI, layout="constrained")
    seeds = f"\nmean of {len(one.records)} seeds; bands and dots: from the lowest to the highest, each seed"
    figure.suptitle(f"{one.label}: {heading([one])}{seeds if len(one.records) > 1 else ''}", fontsize=11.5)
    axes = figure.subplots(rows, 2)
    draw_probes(axes[0, 0], one, values)
    draw_shares(axes[0, 1], one, values)
    draw_changes(axes[1, 0], one, values)
    draw_blocks(axes[1, 1], one, values)
    most = math.log(one.first.tokens)
    draw_heads(axes[2, 0], one, values, "entropy", "entropy of attention (nats)", most, "all tokens alike")
    uniform = uniform_distance(one.first.grid)
    draw_heads(axes[2, 1], one, values, "distance", "attention distance (patches)", uniform, "all patches alike")
    if has_sizes:
        draw_sizes(axes[3, 0], one, values, "accuracy", "accuracy (%)")
        draw_sizes(axes[3, 1], one, values, SHARPNESS, "entropy / log of the tokens")
    name_panels(figure)
    return figure


# ---- panels of a page


def over_depth(values: Values, key: Callable[[int | None], Key], blocks: Sequence[int | None]) -> list[list[float]]:
    """The numbers of each block over the seeds; None stands for what comes after the last norm."""
    return [values.get(key(block), []) for block in blocks]


def draw_line(axes: Axes, found: Sequence[Sequence[float]], has_band: bool = True, **style: Any) -> None:
    """A line through the means of what is there, and a band from the lowest to the highest."""
    x = [place for place, numbers in enumerate(found) if numbers]
    there = [numbers for numbers in found if numbers]
    if not there:
        return
    axes.plot(x, [np.mean(numbers) for numbers in there], **style)
    if has_band and any(len(numbers) > 1 for numbers in there):
        low, high = [min(numbers) for numbers in there], [max(numbers) for numbers in there]
        axes.fill_between(x, low, high, color=style.get("color"), alpha=0.12, linewidth=0)


def set_blocks(axes: Axes, depth: int, has_output: bool) -> None:
    """Ticks at the blocks, and at what comes after the last norm."""
    step = math.ceil(depth / 12)
    places = list(range(0, depth, step))
    names = [str(place) for place in places]
    if has_output:
        places, names = [place for place in places if place <= depth - step or step == 1], names
        names = [str(place) for place in places] + ["out"]
        places = [*places, depth]
    axes.set_xticks(places, names)
    axes.set_xlim(-0.4, depth - 0.6 + has_output)
    axes.set_xlabel("block" + ("; out: after the last norm" if has_output else ""))


def tidy(axes: Axes, title: str, label: str) -> None:
    """What all panels have."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def explain_beside(axes: Axes) -> None:
    """A legend to the right of a panel, where it hides nothing."""
    axes.legend(
        fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.3, handlelength=3.2
    )


def name_panels(figure: Figure) -> None:
    """A letter before each title, for a text to refer to."""
    for letter, axes in zip(ascii_lowercase, figure.axes, strict=False):
        axes.set_title(f"({letter}) {axes.get_title(loc='left')}", fontsize=10, loc="left")


def limit_r2(axes: Axes) -> None:
    """From a little below 0, or where the lowest value is, to 1."""
    low = min([0.0, *(float(np.nanmin(line.get_ydata())) for line in axes.get_lines())])
    axes.set_ylim(max(low, R2_FLOOR) - 0.05, 1.05)


def draw_probes(axes: Axes, one: Group, values: Values) -> None:
    """R^2 of the probes over depth, with their floor."""
    depth = one.depth()
    for spot, name, colour in ((READ, "what attention reads", BLUE), (INPUT, "block's input", ORANGE)):
        blocks: list[int | None] = [*range(depth)] + ([None] if spot == INPUT else [])
        for contents, line, words in (("permuted", "-", "contents permuted"), ("", "--", "contents in place")):
            found = over_depth(values, partial(spot_key, "r2", spot, contents), blocks)
            style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3.5}
            draw_line(axes, found, label=f"{name},\n{words}", **style)
    blocks = [*range(depth)]
    found = over_depth(values, lambda block: Key("r2", READ, "untrained, permuted", block), blocks)
    draw_line(
        axes,
        found,
        color=GREY,
        linestyle=":",
        marker="s",
        markersize=3.5,
        label="what attention reads, untrained,\ncontents permuted",
    )
    axes.axhline(0, color="black", linewidth=0.6)
    set_blocks(axes, depth, has_output=True)
    tidy(axes, "which layer knows where its patches are", "R² of a linear probe for x, y")
    limit_r2(axes)
    explain_beside(axes)


def spot_key(measure: str, spot: str, contents: str, block: int | None) -> Key:
    """Of a block, or after the last norm."""
    return Key(measure, OUTPUT if block is None else spot, contents, block)


def draw_shares(axes: Axes, one: Group, values: Values) -> None:
    """How much of the features is position, and whether near tokens are alike."""
    depth = one.depth()
    blocks: list[int | None] = [*range(depth), None]
    lines = (
        ("share", "", "variance between places", BLUE, "-"),
        ("share", "permuted", "variance between places,\ncontents permuted", BLUE, "--"),
        ("removed_share", "permuted", "variance that tells x and y,\ncontents permuted", ORANGE, "--"),
        ("similarity", "permuted", "similarity by distance,\ncontents permuted", GREEN, "--"),
        ("similarity", "", "similarity by distance", GREEN, "-"),
    )
    for measure, contents, label, colour, line in lines:
        found = over_depth(values, partial(spot_key, measure, INPUT, contents), blocks)
        draw_line(axes, found, color=colour, linestyle=line, marker="o", markersize=3.5, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    set_blocks(axes, depth, has_output=True)
    tidy(axes, "how much of a block's input is position", "share of variance; rank correlation")
    explain_beside(axes)


def answer_of(values: Values) -> tuple[str, str]:
    """The measure of answers that is known, and its name on an axis."""
    if Key("accuracy") in values:
        return "accuracy", "accuracy (%)"
    return "agreement", "answers that stay the same (%)"


def draw_intact(axes: Axes, values: Values, measure: str, is_vertical: bool) -> float:
    """A line at the intact model; returns where."""
    intact = float(np.mean(values[Key("accuracy")])) if measure == "accuracy" else 100.0
    draw = axes.axvline if is_vertical else axes.axhline
    draw(intact, color="black", linewidth=1, linestyle=(0, (4, 2)), label=f"intact: {intact:.1f}")
    return intact


def draw_changes(axes: Axes, one: Group, values: Values) -> None:
    """A bar for each knock-out of the whole model, with each seed."""
    measure, label = answer_of(values)
    changes = [name for name in changes_of([one]) if Key(measure, name) in values]
    places = range(len(changes) - 1, -1, -1)
    for place, name in zip(places, changes, strict=True):
        numbers = values[Key(measure, name)]
        axes.barh(place, float(np.mean(numbers)), height=0.62, color=BLUE, alpha=0.75)
        if len(numbers) > 1:
            axes.plot(numbers, [place] * len(numbers), "o", color="black", markersize=3, alpha=0.6)
        axes.annotate(f"{np.mean(numbers):.1f}", (max(numbers), place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=SMALL - 1)  # fmt: skip
    draw_intact(axes, values, measure, is_vertical=True)
    axes.set_yticks(list(places), changes, fontsize=SMALL)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    tidy(axes, "what the answer depends on", "")
    axes.set_xlabel(label)
    explain_beside(axes)


def draw_blocks(axes: Axes, one: Group, values: Values) -> None:
    """What each block's own positions, and what its input knows of places, are worth."""
    measure, label = answer_of(values)
    depth = one.depth()
    intact = draw_intact(axes, values, measure, is_vertical=False)
    taken = over_depth(values, lambda block: Key(measure, TAKEN_AWAY, block=block), range(depth))
    bars = {block: float(np.mean(numbers)) - intact for block, numbers in enumerate(taken) if numbers}
    if bars:
        style: dict[str, Any] = {
            "width": 0.5,
            "color": BLUE,
            "alpha": 0.75,
            "label": "the block's own\npositions taken away",
        }
        axes.bar(list(bars), list(bars.values()), bottom=intact, **style)
    for block, numbers in enumerate(taken):
        if len(numbers) > 1:
            axes.plot([block] * len(numbers), numbers, "o", color="black", markersize=3, alpha=0.6)
    removed = over_depth(values, lambda block: Key(measure, REMOVED, block=block), range(depth))
    removed.append(values.get(Key(measure, REMOVED_AT_OUTPUT), []))
    draw_line(axes, removed, color=ORANGE, marker="o", markersize=4, label="position removed\nfrom the block's input")
    axes.use_sticky_edges = False  # so that the intact line has room above it
    axes.margins(y=0.08)
    set_blocks(axes, depth, has_output=True)
    tidy(axes, "which layers use it", label)
    explain_beside(axes)


def draw_heads(axes: Axes, one: Group, values: Values, measure: str, label: str, most: float, words: str) -> None:
    """The mean of each block over its heads, and each head, with what attention that is blind would have."""
    depth = one.depth()
    for key, numbers in values.items():
        if key.measure == measure and key.block is not None and key.head is not None and not key.size:
            axes.plot(key.block, float(np.mean(numbers)), "o", color=BLUE, alpha=0.35, markersize=4, markeredgewidth=0)
    found = over_depth(values, lambda block: Key(measure, block=block), range(depth))
    draw_line(axes, found, color=BLUE, linewidth=1.8, label="mean over the heads,\nwhich are the dots")
    axes.axhline(most, color="black", linewidth=1, linestyle=(0, (4, 2)), label=words)
    axes.set_ylim(0, 1.08 * max(most, axes.dataLim.y1))
    set_blocks(axes, depth, has_output=False)
    tidy(axes, {"entropy": "how sharp attention is", "distance": "how far attention looks"}[measure], label)
    explain_beside(axes)


def draw_sizes(axes: Axes, one: Group, values: Values, measure: str, label: str) -> None:
    """A measure against the size of the input, a line for each way."""
    above = one.first.size[1]
    for way in dict.fromkeys(at.way for at in one.first.sizes):
        by_side = {above: values.get(Key(measure), [])}  # where all ways are the same
        for at in one.first.sizes:
            if at.way == way:
                by_side[at.size[1]] = values.get(Key(measure, size="x".join(map(str, at.size)), way=way), [])
        there = {side: by_side[side] for side in sorted(by_side) if by_side[side]}
        if there:
            (line,) = axes.plot(list(there), [np.mean(numbers) for numbers in there.values()], marker="o", label=way)
            low, high = ([end(numbers) for numbers in there.values()] for end in (min, max))
            axes.fill_between(list(there), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axvline(above, color="grey", linewidth=1, linestyle=(0, (1, 2)), label=f"the panels above: {above}")
    axes.set_xticks(sorted({at.size[1] for at in one.first.sizes} | {above}))
    axes.set_xlabel("side of the input (pixels)")
    title = "accuracy at other sizes" if measure == "accuracy" else "sharpness of attention at other sizes"
    tidy(axes, title, label)
    explain_beside(axes)


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
    deepest = max(one.depth() for one in groups)
    panels: list[tuple[Axes, str, str, Callable[[int | None], Key], bool]] = [
        (
            axes[0, 0],
            "what attention reads tells of places (contents permuted)",
            "R² of a linear probe",
            lambda block: Key("r2", READ, "permuted", block),
            False,
        ),
        (
            axes[0, 1],
            "what a block's input tells of places (contents permuted)",
            "R² of a linear probe",
            lambda block: spot_key("r2", INPUT, "permuted", block),
            True,
        ),
        (axes[2, 0], "how sharp attention is", "entropy (nats)", lambda block: Key("entropy", block=block), False),
        (
            axes[2, 1],
            "how far attention looks",
            "distance (patches)",
            lambda block: Key("distance", block=block),
            False,
        ),
    ]
    measure = "accuracy" if all(Key("accuracy") in found for found in values) else "agreement"
    for each, title, label, key, has_output in panels:
        for one, found, style in zip(groups, values, looks, strict=True):
            blocks: list[int | None] = [*range(one.depth()), *([None] if has_output else [])]
            draw_line(each, over_depth(found, key, blocks), len(groups) <= FEW, markersize=4, **style)
        set_blocks(each, deepest, has_output)
        tidy(each, title, label)
        if label.startswith("R²"):
            each.axhline(0, color="black", linewidth=0.6)
            limit_r2(each)
    draw_all_changes(axes[1, 0], groups, values, looks, measure)
    draw_losses(axes[1, 1], groups, values, looks, measure)
    name_panels(figure)
    explain_looks(figure, groups, looks)
    return figure


def draw_all_changes(
    axes: Axes, groups: Sequence[Group], values: Sequence[Values], looks: Sequence[dict[str, Any]], measure: str
) -> None:
    """A row for each change of the whole model, and in it a mark for each group."""
    changes = (["intact"] if measure == "accuracy" else []) + changes_of(groups)
    height = 0.7 / len(groups)
    for row, name in enumerate(reversed(changes)):
        for number, (found, style) in enumerate(zip(values, looks, strict=True)):
            numbers = found.get(Key(measure, "" if name == "intact" else name), [])
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
    axes: Axes, groups: Sequence[Group], values: Sequence[Values], looks: Sequence[dict[str, Any]], measure: str
) -> None:
    """What is lost once the positions of one block are taken away."""
    for one, found, style in zip(groups, values, looks, strict=True):
        intact = found[Key("accuracy")] if measure == "accuracy" else [100.0] * len(one.records)
        lost = [
            [
                whole - left
                for whole, left in zip(intact, found.get(Key(measure, TAKEN_AWAY, block=block), []), strict=False)
            ]
            for block in range(one.depth())
        ]
        draw_line(axes, lost, len(groups) <= FEW, markersize=4, **style)
    axes.axhline(0, color="black", linewidth=0.6)
    set_blocks(axes, max(one.depth() for one in groups), has_output=False)
    unit = "accuracy lost (points)" if measure == "accuracy" else "answers that change (%)"
    tidy(axes, "what each block's own positions are worth", unit)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def looks_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Colour, line and marker of each group: of its encoding and join where these tell the groups apart."""
    pairs = [(one.first.pe, one.first.join_type) for one in groups]
    if len({*pairs}) == len(pairs):
        colours = colours_of(pairs)
        return [{"color": colours[pe], "linestyle": LOOKS[join][0], "marker": LOOKS[join][1]} for pe, join in pairs]
    colours = colours_of([(one.label, "") for one in groups])
    return [{"color": colours[one.label], "linestyle": "-", "marker": "o"} for one in groups]


def explain_looks(figure: Figure, groups: Sequence[Group], looks: Sequence[dict[str, Any]]) -> None:
    """A legend beside the panels."""
    pairs = [(one.first.pe, one.first.join_type) for one in groups]
    if len({*pairs}) == len(pairs):
        explain(figure, pairs, colours_of(pairs))
        return
    handles = [Line2D([], [], label=one.label, markersize=5, **look) for one, look in zip(groups, looks, strict=True)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
