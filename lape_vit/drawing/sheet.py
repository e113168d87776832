"""Sheets of small pictures, laid out to the inch: bands of panels that share a colour scale, under one heading.

All lengths are in inches, from the top left corner of the sheet.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

MARGIN, GAP = 0.2, 0.14
LINE = 0.19
"""Height of a line of text."""
BEFORE_BAND = 0.1
TICKS = (0.62, 0.48)
"""Room left of and below a panel with ticks and names of its axes."""
SHARED = (0.62, 0.24, 0.2)
"""Room left of a row of panels that share their axes, below each row, and for the caption below the last."""
PAGE = (2000 / 150, 2500 / 150)
"""Width and height of the largest overview: 2,000 x 2,500 pixels at 150 per inch."""
BOXES = (1.6, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7)
"""Sides of a panel to choose from, so that a page holds all."""
BAR = (0.13, 0.62)
"""Width of a colour bar, and of what is written beside it."""
SHORTEST_BAR = 0.6
TICKS_PER_INCH, MOST_TICKS = 4, 10
"""Of a colour bar."""
HINTING = 1.04
"""How much wider a line of text may be on pixels than its outlines say."""
SIZES = {"heading": 9.5, "band": 9.0, "panel": 8.0, "tick": 7.0}
"""Of text, in points."""


class Picture(Figure):
    """A figure that every notebook shows, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


@dataclass(frozen=True)
class Colours:
    """What the colours of a band mean; what the band's title says needs no label.

    Attributes:
        cut: whether values lie beyond the limits; the bar then ends in points.
    """

    cmap: str | Colormap
    limits: tuple[float, float]
    label: str = ""
    ticks: Sequence[float] | None = None
    tick_labels: Sequence[str] | None = None
    cut: bool = False

    @property
    def scale(self) -> dict[str, Any]:
        """For `imshow` and `scatter`."""
        return {"cmap": self.cmap, "vmin": self.limits[0], "vmax": self.limits[1]}


@dataclass(frozen=True)
class Panel:
    """A picture: its title, and what draws it."""

    title: str
    draw: Callable[[Axes], Any]


@dataclass(frozen=True)
class SharedAxes:
    """Axes that all panels of a band have in common: tick labels at the left and below, and one caption.

    Attributes:
        caption: what both axes are, with the unit.
        draw: gives a panel its ticks; told whether it is the first of its row.
    """

    caption: str
    draw: Callable[[Axes, bool], Any]


@dataclass(frozen=True)
class Band:
    """Panels that share a scale, wherever they break into rows.

    Attributes:
        ratio: height of a panel to its width.
        colours: None where there is nothing to explain.
        with_ticks: whether panels have ticks and names on their axes.
        shared: the axes that panels have in common, or None.
        tile_ratio: the same of each of the pictures that a panel has below each other, or None.
    """

    title: str
    panels: list[Panel]
    ratio: float
    colours: Colours | None
    with_ticks: bool = False
    shared: SharedAxes | None = None
    tile_ratio: float | None = None

    @property
    def indent(self) -> float:
        """Room left of each row."""
        return SHARED[0] if self.shared is not None else 0.0


@dataclass(frozen=True)
class Sheet:
    """Bands below each other, under a heading; the first line of it is bold.

    Attributes:
        box: the side of the square into which each panel fits.
        per_row: panels side by side, at most.
    """

    heading: list[str]
    bands: list[Band]
    box: float = 1.6
    per_row: int = 6

    def panel_size(self, band: Band) -> tuple[float, float]:
        """(width, height)."""
        width = self.box / max(1.0, band.tile_ratio or band.ratio)
        return width, width * band.ratio

    def pitch(self, band: Band) -> tuple[float, float]:
        """From one panel to the next, (across, down)."""
        left, below = TICKS if band.with_ticks else (0.0, SHARED[1] if band.shared is not None else 0.0)
        widest_title = max(text_width(panel.title, "panel") for panel in band.panels)
        return max(self.panel_size(band)[0], widest_title) + GAP + left, self.panel_size(band)[1] + LINE + GAP + below

    def rows(self, band: Band) -> list[list[Panel]]:
        return [band.panels[first : first + self.per_row] for first in range(0, len(band.panels), self.per_row)]

    def band_height(self, band: Band) -> float:
        caption = SHARED[2] if band.shared is not None else 0.0
        panels = max(self.pitch(band)[1] * len(self.rows(band)), SHORTEST_BAR + LINE + GAP)
        return BEFORE_BAND + LINE + panels + caption

    @property
    def size(self) -> tuple[float, float]:
        """(width, height), margins included."""
        widths = [text_width(line, "heading") for line in self.heading]
        widths += [text_width(band.title, "band") for band in self.bands]
        for band in self.bands:
            bar = sum(BAR) if band.colours is not None else 0.0
            widths.append(band.indent + self.pitch(band)[0] * min(self.per_row, len(band.panels)) + bar)
            if band.shared is not None:
                widths.append(band.indent + text_width(band.shared.caption, "panel"))
        height = len(self.heading) * LINE + sum(map(self.band_height, self.bands))
        return max(widths) + 2 * MARGIN, height + 2 * MARGIN

    def fit_columns(self) -> "Sheet":
        """The same with as many panels side by side as the page is wide, and rows of about the same length."""
        if not self.bands:
            return self
        room = PAGE[0] - 2 * MARGIN - sum(BAR)
        most = max(1, min(int((room - band.indent) / self.pitch(band)[0]) for band in self.bands))
        longest = max(len(band.panels) for band in self.bands)
        return replace(self, per_row=math.ceil(longest / math.ceil(longest / most)))


def fit_page(contents: Sequence[tuple[list[str], list[Band]]]) -> tuple[list[Sheet], bool]:
    """Sheets of these headings and bands with the largest panels with which all of them, below each other, fit a page.

    Returns:
        The sheets, with the smallest panels if none fit; and whether they fit.
    """
    for box in BOXES:
        sheets = [Sheet(heading, bands, box).fit_columns() for heading, bands in contents]
        width, height = stacked_size(sheets)
        if width <= PAGE[0] and height <= PAGE[1]:
            return sheets, True
    return sheets, False


def single(heading: list[str], band: Band) -> Sheet:
    """A sheet of one band, with larger panels, in as many columns as leave few gaps."""
    count = len(band.panels)
    least = math.ceil(math.sqrt(count))
    columns = min((least, least + 1), key=lambda columns: (-count % columns, columns))
    return Sheet(heading, [band], box=4.4 if count == 1 else 2.2, per_row=columns)


@cache
def text_width(text: str, kind: str) -> float:
    """How wide a line of text is drawn, at most."""
    if not text:
        return 0.0
    properties = FontProperties(weight="normal" if kind == "panel" else "bold")
    return TextPath((0, 0), text, size=SIZES[kind], prop=properties).vertices[:, 0].max() / 72 * HINTING


def stacked_size(sheets: Sequence[Sheet]) -> tuple[float, float]:
    """(width, height) of sheets below each other, with one margin between two."""
    sizes = [sheet.size for sheet in sheets]
    return max(width for width, _ in sizes), sum(height - MARGIN for _, height in sizes) + MARGIN


def stack_sheets(sheets: Sequence[Sheet]) -> Figure:
    """Sheets below each other on one page; save it without trimming."""
    figure = Picture(figsize=stacked_size(sheets))
    top = MARGIN
    for sheet in sheets:
        _draw_sheet(figure, sheet, MARGIN, top)
        top += sheet.size[1] - MARGIN
    return figure


def draw_sheets(sheets: Sequence[Sheet], heading: Sequence[str] = ()) -> Figure:
    """Sheets side by side on one page, under a heading of all; save it without trimming."""
    sizes = [sheet.size for sheet in sheets]
    top = MARGIN + LINE * len(heading) if heading else 0.0
    widest = max((text_width(line, "heading") + 2 * MARGIN for line in heading), default=0.0)
    width = max(sum(width for width, _ in sizes), widest)
    figure = Picture(figsize=(width, top + max(height for _, height in sizes)))
    _write_lines(figure, MARGIN, MARGIN, heading)
    left = 0.0
    for sheet, (width, _) in zip(sheets, sizes, strict=True):
        _draw_sheet(figure, sheet, left + MARGIN, top + (0 if heading else MARGIN))
        left += width
    return figure


def _draw_sheet(figure: Figure, sheet: Sheet, left: float, top: float) -> None:
    _write_lines(figure, left, top, sheet.heading)
    top += LINE * len(sheet.heading)
    for band in sheet.bands:
        _write(figure, left, top + BEFORE_BAND, band.title, "band", weight="bold")
        _draw_band(figure, sheet, band, left, top + BEFORE_BAND + LINE)
        top += sheet.band_height(band)


def _write_lines(figure: Figure, left: float, top: float, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        _write(figure, left, top + number * LINE, line, "heading", weight="normal" if number else "bold")


def _draw_band(figure: Figure, sheet: Sheet, band: Band, left: float, top: float) -> None:
    width, height = sheet.panel_size(band)
    across, down = sheet.pitch(band)
    left += band.indent
    beside = TICKS[0] if band.with_ticks else 0.0
    for row, panels in enumerate(sheet.rows(band)):
        for column, panel in enumerate(panels):
            axes = _add_axes(figure, left + column * across + beside, top + row * down + LINE, width, height)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(panel.title, fontsize=SIZES["panel"], loc="left", pad=3)
            axes.tick_params(labelsize=SIZES["tick"], length=2)
            axes.xaxis.label.set_fontsize(SIZES["panel"])
            axes.yaxis.label.set_fontsize(SIZES["panel"])
            panel.draw(axes)
            if band.shared is not None:
                band.shared.draw(axes, column == 0)
            _name_only_what_fits(axes, width, height)
    rows = len(sheet.rows(band))
    tall = (rows - 1) * down + height
    if band.shared is not None:
        caption = top + LINE + max(tall, SHORTEST_BAR) + SHARED[1]
        _write(figure, left, caption, band.shared.caption, "panel", color="0.3")
    if band.colours is None:
        return
    most = min(sheet.per_row, len(band.panels))
    _draw_bar(figure, band.colours, left + most * across, top + LINE, max(tall, SHORTEST_BAR))


def _name_only_what_fits(axes: Axes, width: float, height: float) -> None:
    """Leave out the name of an axis that is shorter than it, as on grids of a few patches by many."""
    if text_width(axes.get_xlabel(), "panel") > width:
        axes.set_xlabel("")
    if text_width(axes.get_ylabel(), "panel") > height:
        axes.set_ylabel("")


def _draw_bar(figure: Figure, colours: Colours, left: float, top: float, height: float) -> None:
    axes = _add_axes(figure, left, top, BAR[0], height)
    axes.set_label("<colorbar>")
    scale = ScalarMappable(Normalize(*colours.limits), colours.cmap)
    point = min(BAR[0], height / 8)
    extend, points = ("neither", 0) if not colours.cut else ("both", 2) if colours.limits[0] < 0 else ("max", 1)
    share = point / (height - points * point)  # of the bar between the points
    bar = figure.colorbar(scale, cax=axes, extend=extend, extendfrac=share)
    if colours.ticks is not None:
        bar.set_ticks(list(colours.ticks), labels=colours.tick_labels)
    else:
        bar.locator = MaxNLocator(min(MOST_TICKS, max(2, int(height * TICKS_PER_INCH))), steps=(1, 2, 2.5, 5, 10))
        bar.update_ticks()
    bar.ax.tick_params(labelsize=SIZES["tick"], length=2)
    bar.outline.set_linewidth(0.5)
    bar.set_label(colours.label, fontsize=SIZES["tick"])


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    across, down = figure.get_size_inches()
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    return axes


def _write(figure: Figure, left: float, top: float, text: str, kind: str, **style: Any) -> None:
    across, down = figure.get_size_inches()
    figure.text(left / across, 1 - top / down, text, fontsize=SIZES[kind], va="top", **style)


def spread(count: int, most: float) -> range:
    """Evenly spaced numbers of 0 .. count - 1: at most `most` of them, rounded up."""
    return range(0, count, math.ceil(count / math.ceil(most)))
