"""Accuracies with their spread, learning curves, and accuracy against resolution: a colour per encoding (per join where
there is one encoding alone), a line style and a marker per join."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import IO, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from comparison.tables import Outcome, Pair
from lape_vit.joins import JOINS

DPI = 130
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOOKS: dict[str, tuple[Any, str]] = dict(zip(JOINS, zip(cycle(LINES), cycle(MARKERS)), strict=False))
"""Line style and marker of each join."""
Look = Mapping[str, Any]
"""Colour, line style and marker, by matplotlib's names."""
MANY = 30
"""Epochs from which on curves have no markers."""
MOST_CURVES = 20
"""Pairs up to which learning curves can be told apart."""


def draw_comparison(found: Mapping[Pair, Sequence[Outcome]], title: str, file: IO[bytes]) -> None:
    """Draw the best accuracies, seed by seed and on average, left, and the learning curves, right.

    Of more than ``MOST_CURVES`` pairs with several joins, draw the last accuracies alone, in a row for each encoding.
    """
    done = {pair: finished for pair, finished in found.items() if finished}
    if len(done) > MOST_CURVES and len({join for _, join in done}) > 1:
        figure = draw_by_encoding(done, title)
        figure.savefig(file, format="png")
        return
    looks = pair_looks(done)
    figure = Figure(figsize=(13, max(4.6, 1.7 + 0.27 * len(done))), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=12)
    accuracy, curves = figure.subplots(1, 2, width_ratios=[1.0, 1.25])
    _draw_accuracies(accuracy, done, looks)
    _draw_curves(curves, done, looks)
    explain(figure, looks)
    figure.savefig(file, format="png")


def _draw_accuracies(axes: Axes, done: Mapping[Pair, Sequence[Outcome]], looks: Mapping[Pair, Look]) -> None:
    """The best pair on top."""
    ranked = sorted(done, key=lambda pair: np.mean([one.best for one in done[pair]]))
    for place, pair in enumerate(ranked):
        numbers = [one.best for one in done[pair]]
        colour, marker = looks[pair]["color"], looks[pair]["marker"]
        axes.plot([min(numbers), max(numbers)], [place, place], color=colour, linewidth=2, alpha=0.45)
        axes.plot(numbers, [place] * len(numbers), marker, color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
        axes.plot(np.mean(numbers), place, marker, color=colour, markersize=8, markeredgecolor="black")
        axes.annotate(
            f"{np.mean(numbers):.2f}",
            (max(numbers), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    one_join = len({join_type for _, join_type in ranked}) == 1
    labels = [pe if one_join else f"{pe}, {join_type}" for pe, join_type in ranked]
    axes.set_yticks(range(len(ranked)), labels, fontsize=9)
    axes.set_ylim(-0.6, len(ranked) - 0.4)
    axes.margins(x=0.16)
    axes.set_xlabel("test accuracy of the best epoch (%)")
    several = any(len(finished) > 1 for finished in done.values())
    axes.set_title("mean (framed) and each seed" if several else "one seed each", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_by_encoding(done: Mapping[Pair, Sequence[Outcome]], title: str) -> Figure:
    """Means and seeds of the last accuracies: a row for each encoding, the best on top, a colour for each join."""
    joins = [join for join in JOINS if join in {join for _, join in done}]
    colours = {join: colormaps["tab10"](list(JOINS).index(join)) for join in joins}
    means = {pair: float(np.mean([one.last for one in finished])) for pair, finished in done.items()}
    ranked = sorted({pe for pe, _ in done}, key=lambda pe: max(means[pair] for pair in means if pair[0] == pe))
    figure = Figure(figsize=(10, 1.6 + 0.36 * len(ranked)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12)  # above the axes alone, since the legend is beside them
    margin = 0.04 * (max(means.values()) - min(means.values())) or 1.0
    lowest = min(means.values()) - margin
    for (pe, join), finished in done.items():
        place = ranked.index(pe) + 0.7 * (0.5 - (joins.index(join) + 0.5) / len(joins))
        colour, marker = colours[join], LOOKS[join][1]
        numbers = [one.last for one in finished]
        axes.plot([min(numbers), max(numbers)], [place] * 2, color=colour, linewidth=1.5, alpha=0.5)
        axes.plot(means[pe, join], place, marker, color=colour, markersize=5.5, markeredgecolor="black", mew=0.5)
        if beyond := sorted(number for number in numbers if number < lowest):
            listed = "◂ " + ", ".join(f"{number:.0f}" for number in beyond)
            axes.text(lowest, place, listed, color=colour, fontsize=7.5, va="bottom")
    axes.set_xlim(lowest, max(one.last for finished in done.values() for one in finished) + margin)
    axes.set_yticks(range(len(ranked)), ranked, fontsize=9)
    axes.set_ylim(-0.7, len(ranked) - 0.3)
    for place in range(len(ranked) - 1):
        axes.axhline(place + 0.5, color="0.92", linewidth=0.8, zorder=0)
    axes.set_xlabel("test accuracy of the last epoch (%): mean, and from the lowest to the highest seed")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colours[join], marker=LOOKS[join][1], label=join) for join in joins]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _draw_curves(axes: Axes, done: Mapping[Pair, Sequence[Outcome]], looks: Mapping[Pair, Look]) -> None:
    """The mean over the seeds, and a band from the lowest to the highest of them."""
    for pair, finished in done.items():
        epochs = [row["epoch"] for row in finished[0].rows]
        numbers = np.array([one.accuracies for one in finished])
        look = looks[pair] if len(epochs) < MANY else {**looks[pair], "marker": None}
        axes.plot(epochs, numbers.mean(0), linewidth=1.5, markersize=4, **look)
        if len(numbers) > 1:
            axes.fill_between(epochs, numbers.min(0), numbers.max(0), color=look["color"], alpha=0.12, linewidth=0)
    late = [
        number for finished in done.values() for one in finished for number in one.accuracies[len(one.rows) // 10 :]
    ]
    if max(late) > min(late):  # the first tenth is steep, and would squeeze the rest
        margin = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    several = any(len(finished) > 1 for finished in done.values())
    axes.set_title("mean over seeds, from the lowest to the highest" if several else "one seed each", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_sizes(
    found: Mapping[Pair, Mapping[int, Sequence[float]]], trained_at: Any, title: str, file: IO[bytes]
) -> None:
    """Draw accuracy against resolution: the mean over the seeds, with bars from the lowest to the highest of them."""
    done = {pair: {size: found[pair][size] for size in sorted(found[pair]) if found[pair][size]} for pair in found}
    done = {pair: by_size for pair, by_size in done.items() if by_size}
    looks = pair_looks(done)
    figure = Figure(figsize=(9.5, max(5.0, 2.2 + 0.2 * len({pe for pe, _ in done}))), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12)
    for pair, by_size in done.items():
        means = np.array([np.mean(numbers) for numbers in by_size.values()])
        ends = np.array([[min(numbers), max(numbers)] for numbers in by_size.values()]).T
        errors = np.abs(ends - means)
        axes.errorbar(list(by_size), means, yerr=errors, markersize=5, capsize=2.5, elinewidth=0.8, **looks[pair])
    sizes = sorted({size for by_size in done.values() for size in by_size})
    if isinstance(trained_at, int):
        axes.axvline(trained_at, color="grey", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            "trained here",
            (trained_at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color="grey",
        )
    axes.margins(y=0.1)
    axes.set_xticks(sizes)
    axes.set_xlabel("side of the input (pixels)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    explain(figure, looks)
    figure.savefig(file, format="png")


def colours_of(names: Iterable[str]) -> dict[str, Any]:
    """A colour for each name, as different as so many can be."""
    several = list(dict.fromkeys(names))
    few = len(several) <= 10
    places = range(len(several)) if few else np.linspace(0.02, 0.98, len(several))
    return {name: colormaps["tab10" if few else "turbo"](place) for name, place in zip(several, places, strict=True)}


def pair_looks(pairs: Iterable[Pair]) -> dict[Pair, Look]:
    """The look of each pair: a colour for each encoding, or for each join of a single encoding."""
    pairs = list(pairs)
    told = 1 if _share_encoding(pairs) else 0
    colours = colours_of(pair[told] for pair in pairs)
    return {
        pair: {"color": colours[pair[told]], "linestyle": LOOKS[pair[1]][0], "marker": LOOKS[pair[1]][1]}
        for pair in pairs
    }


def _share_encoding(pairs: Iterable[Pair]) -> bool:
    return len({pe for pe, _ in pairs}) == 1


def explain(figure: Figure, looks: Mapping[Pair, Look]) -> None:
    """A legend beside the axes: the encodings by their colours, then the joins by their lines, if there are several.

    Of a single encoding, the pairs by both.
    """
    if _share_encoding(looks):
        handles = [Line2D([], [], markersize=5, label=", ".join(pair), **look) for pair, look in looks.items()]
    else:
        colours = {pe: look["color"] for (pe, _), look in looks.items()}
        handles = [Line2D([], [], color=colour, linewidth=3, label=pe) for pe, colour in colours.items()]
        of_joins = {join: {**look, "color": "black"} for (_, join), look in looks.items()}
        joins = [join for join in JOINS if join in of_joins and len(of_joins) > 1]
        handles += [Line2D([], [], markersize=5, label=join, **of_joins[join]) for join in joins]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, handlelength=5)
