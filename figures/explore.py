"""One self-contained page to explore what the layers of one or more checkpoints see of positions.

The page is `page/page.html` with its style sheet, its scripts, plotly.js and the data in it; it asks no network.
"""

import io
import json
import math
import re
import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from plotly.offline import get_plotlyjs
from torch import Tensor

from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.analysis.diagnosis_numbers import INPUT, READ, TAKEN_AWAY, Key, numbers
from lape_vit.analysis.positions import PositionView
from lape_vit.drawing.attention import UNSIGNED, PatchAttention
from lape_vit.drawing.panels import SIGNED, Scale, limits_of
from lape_vit.drawing.positions import Positions

_logger = getLogger(__name__)

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("values.js", "plots.js", "panel.js", "page.js")
LIMIT = 10_000_000
"""Bytes of a page that is not to be exceeded while values can be kept less finely."""
FINEST, COARSEST = 16, 8
"""Bits of a value."""
STOPS = 41
"""Colours of each of the files' scales that the page is told; between two it draws those between them."""
FREQUENCIES = "frequencies"
"""The name of the one view that has no patches but points in the plane."""
ATTENTION = "attention"
"""The name of the one view that is drawn over an image."""
IMAGE_SIDE = 256
"""Most pixels of a side of that image."""


def explore_page(
    shown: Sequence[Positions],
    diagnoses: Mapping[str, Diagnosis] | None = None,
    attention: Mapping[str, PatchAttention] | None = None,
) -> bytes:
    """The page, in UTF-8; the first two checkpoints stand side by side, others can be chosen in their place.

    Args:
        diagnoses: by the source of a checkpoint, what was measured in its blocks, which is shown as curves over depth.
        attention: by the source of a checkpoint, what its patches attend to on an image; left out, with a line in the
            log, where the page would be too large with it.
    """
    known, seen = diagnoses or {}, attention or {}
    parts = {
        "title": escape(", ".join(one.source for one in shown)),
        "style": read("page.css"),
        "script": "\n".join(map(read, SCRIPTS)),
        "plotly": pack(get_plotlyjs().encode()),
        "colours": json.dumps({"signed": stops(SIGNED), "unsigned": stops(UNSIGNED)}),
        "data": "",
    }
    views = [views_of(one) for one in shown]
    images = {source: image_of(of_one) for source, of_one in seen.items()}
    for one, of_one in zip(shown, views, strict=True):
        if one.source in seen:
            of_one.append(attention_view(seen[one.source], one.scale))
    room = LIMIT - len(fill(parts)) - sum(len(images[one.source]["url"]) for one in shown if one.source in images)
    packed = iter(pack_views([view for of_one in views for view in of_one], room))
    data = [
        {**describe(one, [next(packed) for _ in of_one]), "curves": curves_of(known.get(one.source))}
        for one, of_one in zip(shown, views, strict=True)
    ]
    for about in data:
        for view in about["views"]:
            if view["name"] == ATTENTION:
                view["image"] = images[about["name"]]
    # "<" would let a checkpoint's name end the script element
    parts["data"] = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = fill(parts)
    if seen and len(page) > LIMIT:
        size = "with it, the page would have %.1f MB, more than %.1f"
        _logger.warning(f"attention over the image is not on the page: {size}", len(page) / 1e6, LIMIT / 1e6)
        return explore_page(shown, diagnoses)
    return page


def stops(name: str) -> list[str]:
    """A colour map as the page is told of it."""
    return [to_hex(colormaps[name](place / (STOPS - 1))) for place in range(STOPS)]


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def fill(parts: dict[str, str]) -> bytes:
    """The page with its parts in their slots."""
    return re.sub(r"{{(\w+)}}", lambda slot: parts[slot[1]], read("page.html")).encode()


def views_of(one: Positions) -> list[PositionView]:
    """What there is to see of a checkpoint; last, an absolute encoding's own tables or a rotary one's frequencies."""
    views = [*one.views]
    if one.encoding is not None:
        tables = list(one.encoding[:, None])
        titles = [f"table {table}" for table in range(len(tables))] if len(tables) > 1 else ["the table"]
        title = "cosine similarity of the encoding itself"
        views.append(PositionView("encoding", title, tables, False, one.encoding_limits, titles))
    if one.frequencies:
        reach = max(points.abs().max().item() for points in one.frequencies) or 1.0
        title = "frequencies in the plane (radians per patch)"
        views.append(PositionView(FREQUENCIES, title, one.frequencies, False, (-reach, reach), one.layers))
    return views


def attention_view(seen: PatchAttention, scale: Scale) -> PositionView:
    """Attention as a view between patches; where there are several heads, their mean comes last."""
    values = [torch.cat([one, one.mean(dim=0, keepdim=True)]) if len(one) > 1 else one for one in seen.weights]
    most = max(value.abs().max().item() for value in values) or 1.0
    limits = limits_of(values, scale, (-most, most))
    return PositionView(ATTENTION, "attention weights over the image", values, False, limits, seen.layers)


def image_of(seen: PatchAttention) -> dict[str, str]:
    """What the page is told of an image: its name, and its pixels as a PNG file in a data URL."""
    image = Image.fromarray((seen.pixels * 255).round().byte().cpu().numpy())
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return {"name": Path(seen.file).name, "url": f"data:image/png;base64,{b64encode(file.getvalue()).decode('ascii')}"}


def describe(one: Positions, views: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page is told of a checkpoint."""
    nothing = "" if views else f"Nothing to draw: pe={one.pe!r} has no positions."
    source, caption = one.heading
    texts = {"name": source, "caption": caption, "nothing": nothing}
    stem = re.sub(r"[^\w.+-]+", "-", f"{one.model}_{one.pe}_{one.join_type}")
    return {**texts, "stem": stem, "grid": one.grid, "token": one.token, "scale": one.scale, "views": views}


CURVES: tuple[tuple[str, tuple[tuple[str, Key], ...]], ...] = (
    (
        "R² of a probe",
        (
            ("attention reads", Key("r2", READ, "permuted")),
            ("block's input", Key("r2", INPUT, "permuted")),
        ),
    ),
    ("same answers without the block's positions (%)", (("", Key("agreement", TAKEN_AWAY)),)),
    ("entropy of attention (nats)", (("", Key("entropy")),)),
    ("attention distance (patches)", (("", Key("distance")),)),
)
"""Curves over depth: a title, and for each line its name and its number without the block."""


def curves_of(record: Diagnosis | None) -> list[dict[str, Any]]:
    """What the page is told of the curves of a checkpoint; a block that has no such number is null."""
    if record is None:
        return []
    found, blocks = numbers(record), range(len(record.layers))
    curves = []
    for title, lines in CURVES:
        values = [(name, [found.get(key._replace(block=block)) for block in blocks]) for name, key in lines]
        there = [{"name": name, "values": line} for name, line in values if any(one is not None for one in line)]
        if there:
            curves.append({"title": title, "lines": there})
    return curves


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
        "points": view.name == FREQUENCIES,
        "mean": view.name == ATTENTION and heads > 1,
        "signed": view.name != ATTENTION or any(bool((value < 0).any()) for value in view.values),
        "panels": view.panels,
        "rows": view.rows,
        "limit": view.limits[1],
        "largest": max(value.abs().max().item() for value in view.values),
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
