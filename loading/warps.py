"""Shears and shifts of images, as timm's policies draw them, faster than Pillow's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torch import Tensor

ROUNDING = 1e-4
"""Added to each value, so that what float32 holds as 99.99999 becomes 100. Pillow computes in float64."""


def use_fast_warps(operation: AugmentOp) -> None:
    """Let an operation of a policy use the functions of this file where they are what it does."""
    fast = FAST.get(operation.name)
    if fast is not None and operation.kwargs["resample"] == Image.Resampling.BICUBIC:
        pillows: Any = operation.aug_fn
        operation.aug_fn = partial(warp, pillows, *fast)  # type: ignore[assignment]  # any callable will do


def warp(
    pillows: Callable[..., Image.Image],
    shifts: Callable[[float, int, int], np.ndarray],
    along_rows: bool,
    image: Image.Image,
    amount: float,
    **options: Any,
) -> Image.Image:
    """`Image.transform` by Pillow's bicubic filter, where each row of pixels, or each column, moves along itself.

    Args:
        pillows: the function that this one replaces; it takes images other than RGB.
        shifts: from the amount, the number of rows and their length to where each row reads from, in pixels ahead.
        along_rows: whether rows move, or columns.
        amount: what the policy drew.
        options: `fillcolor` for what comes from outside the image.
    """
    if image.mode != "RGB":
        return pillows(image, amount, **options)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.height, image.width)
    rows = pixels if along_rows else np.ascontiguousarray(pixels.T)
    moved = move_rows(rows, shifts(amount, *rows.shape), options["fillcolor"])
    moved = moved if along_rows else np.ascontiguousarray(moved.T)
    return Image.frombytes("RGB", image.size, moved.tobytes(), "raw", "RGBX")


def move_rows(rows: np.ndarray, shifts: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """Read each row, packed pixels (H, W), from `shifts` (H,) pixels ahead, between them by Pillow's cubic filter."""
    height, width = rows.shape
    whole = np.floor(shifts).astype(np.intp)
    columns = np.arange(-1, width + 2) + whole[:, None]
    places = columns.clip(0, width - 1) + np.arange(0, height * width, width)[:, None]
    near = torch.from_numpy(rows.reshape(-1).take(places).view(np.uint8).reshape(height, width + 3, 4)).float()
    weights = cubic_weights(torch.from_numpy(shifts - whole).float())[..., None, None]
    values = torch.full((height, width, 4), ROUNDING)
    for tap, weight in enumerate(weights):
        values.addcmul_(near[:, tap : tap + width], weight)
    moved = values.clamp_(0, 255).byte().numpy().view(np.uint32)[..., 0]
    centres = np.arange(width) + 0.5 + shifts[:, None]
    outside = (centres < 0) | (centres >= width)
    moved[outside] = np.frombuffer(bytes([*fill, 255]), np.uint32)
    return moved


def cubic_weights(d: Tensor) -> Tensor:
    """(4, ...): of two pixels before and two behind a point that is `d`, 0..1, behind the second: cubic with a = -1."""
    return torch.stack([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2])


def _shear(factor: float, height: int, width: int) -> np.ndarray:
    return factor * (np.arange(height) + 0.5)


def _shift_by_part(part: float, height: int, width: int) -> np.ndarray:
    return np.full(height, part * width)


def _shift(pixels: float, height: int, width: int) -> np.ndarray:
    return np.full(height, float(pixels))


FAST: dict[str, tuple[Callable[[float, int, int], np.ndarray], bool]] = {
    "ShearX": (_shear, True),
    "ShearY": (_shear, False),
    "TranslateXRel": (_shift_by_part, True),
    "TranslateYRel": (_shift_by_part, False),
    "TranslateX": (_shift, True),
    "TranslateY": (_shift, False),
}
"""By timm's name of the operation: the shifts, and whether it moves rows."""
