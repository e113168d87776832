"""Images as they come from a file."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from training.seeding import AUGMENTATION, seed_everything

Picture = Image.Image | np.ndarray
"""RGB: an array is uint8 (H, W, 3)."""
Reader = Callable[..., Picture]  # (path or content of a file, name for the error)
Crop = Callable[[Picture], Image.Image]
Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Sample:
    """A cropped image on its way to a batch.

    Attributes:
        place: (epoch, place in the order of all images), which its augmentation depends on.
        complaint: about the unreadable image that it stands in for, if it does.
    """

    image: Image.Image
    label: int
    place: tuple[int, int]
    complaint: str


@dataclass(frozen=True)
class Batching:
    """Finishes samples and collates them: a loader's `collate_fn`.

    A batch passes each half of the transform at a time, as a core that keeps to one piece of code is some 15 % faster
    than one that does all of an image before the next.

    Args:
        finish: the transform after the crop.
        seed: of the augmentations; None where nothing is random.
    """

    finish: Transform
    seed: int | None

    def __call__(self, samples: Sequence[Sample | Exception]) -> Any:
        """Make a batch.

        Returns:
            ((images (B, 3, H, W), labels (B,)), complaints), or the error that stands in the place of a sample.
        """
        finished, complaints = [], []
        for sample in samples:
            if isinstance(sample, Exception):
                return sample
            if self.seed is not None:
                seed_everything(self.seed, AUGMENTATION, *sample.place)
            finished.append((self.finish(sample.image), sample.label))
            complaints.append(sample.complaint)
        return default_collate(finished), complaints


class UnreadableImageError(ValueError):
    """What cannot be read as an image; the message names it."""


def read_image(file: str | bytes, name: str = "") -> Image.Image:
    """The RGB image in a file.

    Args:
        file: its path, or what it holds.
        name: of the image, for the error; else the path.

    Raises:
        UnreadableImageError: it is damaged, absent, or no image.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return image.convert("RGB")
    except Exception as error:  # what is no image can fail in any way
        raise UnreadableImageError(f"{name or file!s} cannot be read as an image: {one_line(error)}") from error


def read_pixels(file: str | bytes, name: str = "") -> Picture:
    """What `read_image` reads, faster where it can be: the same pixels, of a JPEG as uint8 (H, W, 3).

    simplejpeg decodes what is faultless, not of print's colours, and not so large that PIL would complain; all else is
    for `read_image` to read or to refuse.
    """
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours in ("YCbCr", "Gray", "RGB") and int(height) * int(width) <= (Image.MAX_IMAGE_PIXELS or 0):
            return simplejpeg.decode_jpeg(content)
    except (OSError, ValueError):
        pass
    return read_image(file, name)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
