"""One self-contained page to explore what the layers of one or more checkpoints see of positions.

The page is `page/page.html` with its style sheet, its scripts, plotly.js and the data in it; it asks no network.
"""

import json
import math
import re
import zlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs
from torch import Tensor

from lape_vit.encodings import Grid
from lape_vit.similarity import PositionView

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("values.js", "plots.js", "panel.js", "page.js")
LIMIT = 10_000_000
"""Bytes of a page that is not to be exceeded while values can be kept less finely."""
FINEST, COARSEST = 16, 8
"""Bits of a value."""


@dataclass(frozen=True)
class Exhibit:
    """A checkpoint on the page.

    Attributes:
        name: where it lies.
        caption: what it holds, in a line.
        grid: (H, W) patches.
        views: what there is to see of it; may be empty.
    """

    name: str
    caption: str
    grid: Grid
    views: Sequence[PositionView]


def explore_page(exhibits: Sequence[Exhibit]) -> bytes:
    """The page, in UTF-8; the first two checkpoints stand side by side, others can be chosen in their place."""
    parts = {
        "title": escape(", ".join(exhibit.name for exhibit in exhibits)),
        "style": read("page.css"),
        "script": "\n".join(map(read, SCRIPTS)),
        "plotly": pack(get_plotlyjs().encode()),
        "data": "",
    }
    room = LIMIT - len(fill(parts))
    packed = iter(pack_views([view for exhibit in exhibits for view in exhibit.views], room))
    data = {"checkpoints": [describe(exhibit, [next(packed) for _ in exhibit.views]) for exhibit in exhibits]}
    # "<" would let a checkpoint's name end the script element
    parts["data"] = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return fill(parts)


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def fill(parts: dict[str, str]) -> bytes:
    """The page with its parts in their slots."""
    return re.sub(r"{{(\w+)}}", lambda slot: parts[slot[1]], read("page.html")).encode()


def describe(exhibit: Exhibit, views: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page is told of a checkpoint."""
    nothing = "" if views else "Nothing to draw: this model has no positional encoding."
    return {
        "name": exhibit.name,
        "caption": exhibit.caption,
        "grid": exhibit.grid,
        "nothing": nothing,
        "views": views,
    }


def pack_views(views: Sequence[PositionView], room: int) -> list[dict[str, Any]]:
    """Every view as the page reads it; as long as all exceed `room` bytes, the largest is kept less finely."""
    bits = [FINEST] * len(views)
    packed = [pack_view(view, FINEST) for view in views]
    sizes = [len(json.dumps(view)) for view in packed]
    while sum(sizes) > room and max(bits) > COARSEST:
        largest = max((i for i in range(len(views)) if bits[i] > COARSEST), key=sizes.__getitem__)
        bits[largest] = max(COARSEST, min(bits[largest] - 1, math.ceil(bits[largest] * room / sum(sizes))))
        packed[largest] = pack_view(views[largest], bits[largest])
        sizes[largest] = len(json.dumps(packed[largest]))
    return packed


def pack_view(view: PositionView, bits: int) -> dict[str, Any]:
    """A view as the page reads it, each value in so many bits."""
    heads, *shape = view.values[0].shape
    layers = [{"title": title, **quantise(value, bits)} for title, value in zip(view.layers, view.values, strict=True)]
    return {
        "name": view.name,
        "title": view.title,
        "byOffset": view.by_offset,
        "panels": view.panels,
        "rows": view.rows,
        "limits": view.limits,
        "heads": heads,
        "shape": shape,
        "layers": layers,
    }


def quantise(values: Tensor, bits: int) -> dict[str, Any]:
    """Values as low + step * level, off by at most half a step; the low bytes of all levels, then their high bytes."""
    array = values.double().cpu().numpy()
    low, high = float(array.min()), float(array.max())
    step = (high - low) / (2**bits - 1)
    levels = np.rint((array - low) / (step or 1.0)).astype("<u2").ravel()
    return {"low": low, "step": step, "levels": pack(levels.view(np.uint8).reshape(-1, 2).T.tobytes())}


def pack(content: bytes) -> str:
    """Compressed, as text."""
    return b64encode(zlib.compress(content)).decode("ascii")
