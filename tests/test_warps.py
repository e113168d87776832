"""The fast warps give Pillow's images."""

import random

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import AugmentOp

from loading.warps import FAST, use_fast_warps

FILL = (124, 116, 104)
OPTIONS = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "magnitude_std": 0.5, "translate_const": 20}


def smooth_image(width: int, height: int) -> Image.Image:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def results(operation: AugmentOp, image: Image.Image) -> np.ndarray:
    """Of 20 draws, with either sign, and the random number that comes after them."""
    random.seed(0)
    images = np.stack([np.asarray(operation(image), dtype=int) for _ in range(20)])
    return np.append(images, random.random())


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("size", [(64, 64), (50, 31), (1, 7)])
@pytest.mark.parametrize("magnitude", [0, 9])
def test_a_fast_warp_is_pillows_but_for_rounding(name: str, size: tuple[int, int], magnitude: int) -> None:
    pillows, fast = (AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=OPTIONS) for _ in range(2))
    use_fast_warps(fast)
    image = smooth_image(*size)
    exact, ours = results(pillows, image), results(fast, image)
    differences = np.abs(ours - exact)
    assert differences.max() <= 1
    assert (differences > 0).mean() < 2e-3
    assert ours[-1] == exact[-1]
    if magnitude and min(size) > 1:
        assert (results(AugmentOp(name, 1.0, 5, OPTIONS), image) != exact).mean() > 0.2  # so the images do move


@pytest.mark.parametrize("name", FAST)
def test_a_colour_that_fills_the_image_stays_as_it_is(name: str) -> None:
    operation = AugmentOp(name, prob=1.0, magnitude=9, hparams=OPTIONS)
    use_fast_warps(operation)
    for value in range(256):
        image = Image.new("RGB", (12, 10), (value, value, value))
        assert {colour for _, colour in operation(image).getcolors()} <= {(value, value, value), FILL}


@pytest.mark.parametrize("name", ["Rotate", "Invert", *FAST])
def test_other_operations_filters_and_modes_stay_pillows(name: str) -> None:
    bilinear = OPTIONS | {"interpolation": Image.Resampling.BILINEAR}
    for options, image in ((bilinear, smooth_image(40, 30)), (OPTIONS, smooth_image(40, 30).convert("L"))):
        options = options | {"img_mean": FILL if image.mode == "RGB" else 128}
        pillows, other = (AugmentOp(name, prob=1.0, magnitude=9, hparams=options) for _ in range(2))
        use_fast_warps(other)
        np.testing.assert_array_equal(results(other, image), results(pillows, image))
    operation = AugmentOp(name, prob=1.0, magnitude=9, hparams=OPTIONS)
    before = operation.aug_fn
    use_fast_warps(operation)
    assert (operation.aug_fn is before) is (name not in FAST)
