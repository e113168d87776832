"""Figures of a model in memory, which a notebook shows as pictures: ``from lape_vit import plot``.

They need matplotlib, which ``pip install 'lape-vit[plot]'`` brings. Each is a `matplotlib.figure.Figure`: a notebook
shows it, and ``figure.savefig("positions.pdf")`` writes it.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("lape_vit.plot needs matplotlib: pip install 'lape-vit[plot]'", name="matplotlib") from error

from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.analysis.diagnosis_numbers import Group, images_of
from lape_vit.drawing.attention import over_image
from lape_vit.drawing.attention import pictures as attention_pictures
from lape_vit.drawing.diagnosis import draw_page
from lape_vit.drawing.panels import Token
from lape_vit.drawing.positions import measure
from lape_vit.drawing.positions import pictures as position_pictures
from lape_vit.images import image_transform


def positions(model: nn.Module, token: Token | None = None) -> Figure:
    """What every layer sees of positions: their similarity, the bias or kernel that they add, frequencies.

    Args:
        model: ours, or a vision transformer of timm whose positions can be seen.
        token: (row, column) of the patch that is drawn alone; default: the one in the centre.

    Raises:
        ValueError: a token outside the grid, weights that are NaN or infinite, a model without positions.
    """
    seen = measure(model, "what every layer sees of positions", name_of(model), token)
    if not seen.views and not seen.frequencies:
        raise ValueError(f"nothing to draw: pe={seen.pe!r} has no positions")
    _, figure = next(position_pictures(seen))
    return figure


def attention(model: nn.Module, image: str | Path | Image.Image | Tensor, token: Token | None = None) -> Figure:
    """What one patch attends to on an image in every layer, and, where the logits split, what positions add to them.

    Args:
        model: ours, or a vision transformer of timm that hands out its attention.
        image: a file, a PIL image, or a tensor (3, height, width) as the model reads it. The first two are prepared as
            in evaluation, a file upright.
        token: (row, column) of the patch that attends; default: the one in the centre.

    Raises:
        ValueError: a model whose attention cannot be seen, a token outside the grid.
        OSError: no image.
    """
    name = str(image) if isinstance(image, str | Path) else "an image"
    seen = measure(model, "attention", name_of(model), token)
    _, figure = next(attention_pictures(over_image(seen, model, read(model, image), name)))
    return figure


def diagnosis(record: Diagnosis) -> Figure:
    """Which layers know where their patches are, and whether the model uses it: probes, knock-outs, attention.

    Args:
        record: of :func:`lape_vit.analysis.diagnosis.diagnose`, or of `diagnose.py`'s file by ``Diagnosis.of``.
    """
    height, width = record.grid
    group = Group(f"{record.pe}, {record.join_type}", [record])
    return draw_page(group, f"{group.label}: {height} x {width} patches; {images_of(record)}")


def read(model: nn.Module, image: str | Path | Image.Image | Tensor) -> Tensor:
    """An image (3, height, width) as the model reads it, on the CPU."""
    if isinstance(image, Tensor):
        return image.cpu()
    if not isinstance(image, Image.Image):
        with Image.open(Path(image).expanduser()) as opened:
            image = ImageOps.exif_transpose(opened)
    return torch.as_tensor(image_transform(model)(image.convert("RGB")))


def name_of(model: Any) -> str:
    """What timm calls a model that it built; else the name of its class."""
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
