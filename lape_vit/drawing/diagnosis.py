"""The page of a diagnosis: curves over depth, bars of knock-outs, curves over sizes.

A line is the mean over the seeds, and a band reaches from the lowest to the highest of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from string import ascii_lowercase
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lape_vit.analysis import diagnosis_numbers as names
from lape_vit.analysis.attention_statistics import uniform_distance
from lape_vit.analysis.diagnosis_numbers import Group, Key, Values, changes_of
from lape_vit.drawing.sheet import Picture

DPI = 130
BLUE, ORANGE, GREEN, GREY = "tab:blue", "tab:orange", "tab:green", "0.55"
R2_FLOOR = -0.25
"""Where the scale of R^2 ends, if values lie below: that far from any use, they say no more."""
SMALL = 8.5
"""Of text, in points."""
FEW = 8
"""Lines with bands on one panel, at most."""


def draw_page(one: Group, title: str) -> Figure:
    """The page of a model, over its seeds."""
    values = one.all_values()
    has_sizes = bool(one.first.sizes)
    rows = 4 if has_sizes else 3
    figure = Picture(figsize=(15, 3.3 * rows + 0.6), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11.5)
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
        draw_sizes(axes[3, 1], one, values, names.SHARPNESS, "entropy / log of the tokens")
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
    labels = [str(place) for place in places]
    if has_output:
        places = [place for place in places if place <= depth - step or step == 1]
        labels = [str(place) for place in places] + ["out"]
        places = [*places, depth]
    axes.set_xticks(places, labels)
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
    for spot, name, colour in ((names.READ, "what attention reads", BLUE), (names.INPUT, "block's input", ORANGE)):
        blocks: list[int | None] = [*range(depth)] + ([None] if spot == names.INPUT else [])
        for contents, line, words in (("permuted", "-", "contents permuted"), ("", "--", "contents in place")):
            found = over_depth(values, partial(spot_key, "r2", spot, contents), blocks)
            style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3.5}
            draw_line(axes, found, label=f"{name},\n{words}", **style)
    blocks = [*range(depth)]
    found = over_depth(values, lambda block: Key("r2", names.READ, "untrained, permuted", block), blocks)
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
    return Key(measure, names.OUTPUT if block is None else spot, contents, block)


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
        found = over_depth(values, partial(spot_key, measure, names.INPUT, contents), blocks)
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
    intact = float(np.mean(values[Key("accuracy", names.INTACT)])) if measure == "accuracy" else 100.0
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
    taken = over_depth(values, lambda block: Key(measure, names.TAKEN_AWAY, block=block), range(depth))
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
    removed = over_depth(values, lambda block: Key(measure, names.REMOVED, block=block), range(depth))
    removed.append(values.get(Key(measure, names.REMOVED_AT_OUTPUT), []))
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
