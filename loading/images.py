"""Images as they come from a file."""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from runtime.seeding import AUGMENTATION, CROP, ERASING, seed_everything
from training.options import AugmentationOptions, DataOptions

Picture = Image.Image | np.ndarray
"""RGB: an array is uint8 (H, W, 3)."""
Reader = Callable[..., Picture]  # (path or content of a file, name for the error)
Transform = Callable[[Any], Any]
Crop = Callable[[Any], Any]  # of a picture; to a PIL image of the input's size
LabelledImages = tuple[Dataset, list[str]]
"""Images, and the class names in the order of their labels."""

NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow recognises and does not decode itself."""
FORMATS_OF_16_BITS = ("PNG", "PPM")
"""Formats whose images of mode `I`, 32 bits wide, hold values of 0..65535."""
WHITE_IS_ZERO = 0
"""Of TIFF's photometric interpretations the one that Pillow heeds up to 8 bits alone."""


@dataclass(frozen=True)
class ImageSettings:
    """How images are found, prepared and loaded: two sections of the options, and what bears on it besides.

    Attributes:
        input_size: side of the model's input, or its height and width, pixels.
        mean, std: of each channel, to normalise by, of images scaled to 0..1.
        num_classes: where the data set does not know it.
        seed: of order and augmentation.
        accum_steps: batches per update.
    """

    data: DataOptions
    augmentation: AugmentationOptions
    input_size: int | Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    num_classes: int | None = None
    seed: int = 0
    accum_steps: int = 1


class Images(Dataset):
    """One split of a data set: an item is (image (3, H, W), label).

    Args:
        pictures: (picture, label) by index; or `Shards`, which have no index.
        crop: from a picture to a PIL image of the input's size.
        augment: from a cropped image to pixels, uint8 (H, W, 3).
        finish: the steps from the pixels of an image or of a batch to what the model takes.
        labels: what stands for each label of `pictures`; by default the label itself.
    """

    def __init__(
        self,
        pictures: Dataset,
        crop: Crop,
        augment: Transform,
        finish: Sequence[Transform] = (),
        labels: Sequence[int] | None = None,
    ) -> None:
        self.pictures = pictures
        self.crop = crop
        self.augment = augment
        self.finish = finish
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pictures)  # type: ignore[arg-type]  # torch's Dataset declares no __len__; all of ours have one

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[index]
        image = self.augment(self.crop(picture))
        for step in self.finish:
            image = step(image)
        return image, label if self.labels is None else self.labels[label]


@dataclass(frozen=True)
class Sample:
    """An image on its way to a batch.

    Attributes:
        place: (epoch, place in the order of all images), which its crop and its augmentation depend on.
        complaint: about the unreadable image that it stands in for, if it does.
        seconds: of a core's time that it took.
    """

    image: Picture
    label: int
    place: tuple[int, int]
    complaint: str
    seconds: float = field(default=0.0, compare=False)


class Loaded(NamedTuple):
    """A batch on its way from a loader's worker; a tuple, which torch knows how to pin.

    Attributes:
        batch: pixels, uint8 (B, H, W, 3), and labels (B,).
        places, complaints: of the samples.
        num_made: batches that this process has made to have it: 1 in general; where batches are shared none if another
            one has made it, and more if it made others meanwhile.
        seconds: of a core's time that it took to make those, from the files on.
    """

    batch: Any
    places: Sequence[tuple[int, int]]
    complaints: Sequence[str]
    seconds: float = 0.0
    num_made: int = 1


GROUP = 8
"""Images that are read before they are cropped: few enough for the processor's caches."""


def crop_in_groups(samples: Iterable[Sample], crop: Crop, seed: int) -> Iterator[Sample]:
    """Crop samples by the seeds of their places.

    A few are read, then cropped, and so on: a core that keeps to one piece of code is faster than one that turns from
    reading to cropping with each image. An error in reading comes after the images before it.
    """
    rest, error = iter(samples), None
    while error is None:
        group: list[Sample] = []
        try:
            group.extend(islice(rest, GROUP))
        except Exception as failure:
            error = failure
        for sample in group:
            start = time.thread_time()
            seed_everything(seed, CROP, *sample.place)
            image = crop(sample.image)
            yield replace(sample, image=image, seconds=sample.seconds + time.thread_time() - start)
        if not group and error is None:
            return
    raise error


@dataclass(frozen=True)
class Batching:
    """Augments samples and collates them: a loader's `collate_fn`.

    A batch passes each half of the transform at a time, as a core that keeps to one piece of code is some 15 % faster
    than one that does all of an image before the next.

    Args:
        augment: from a cropped image to its pixels.
        seed: of the augmentations; None where nothing is random.
        labels: what stands for each label of the samples; None where they stay.
    """

    augment: Transform
    seed: int | None
    labels: Sequence[int] | None = None

    def __call__(self, samples: Sequence[Sample | Exception]) -> Loaded | Exception:
        """Make a batch; or return the error that stands in the place of a sample."""
        start, seconds = time.thread_time(), 0.0
        augmented, places, complaints = [], [], []
        for sample in samples:
            if isinstance(sample, Exception):
                return sample
            if self.seed is not None:
                seed_everything(self.seed, AUGMENTATION, *sample.place)
            label = sample.label if self.labels is None else self.labels[sample.label]
            augmented.append((self.augment(sample.image), label))
            places.append(sample.place)
            complaints.append(sample.complaint)
            seconds += sample.seconds
        batch = default_collate(augmented)
        return Loaded(batch, places, complaints, seconds + time.thread_time() - start)


@dataclass(frozen=True)
class Finishing:
    """Makes the images of a batch of its pixels, on a device.

    Args:
        steps: for a whole batch; but random erasing, for each image by the seed of its place.
        seed: of the erasing; None where nothing is random.
    """

    steps: Sequence[Transform]
    seed: int | None
    device: torch.device

    def __call__(self, pixels: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
        batch = pixels.to(self.device, non_blocking=True)
        for step in self.steps:
            if self.seed is None or not isinstance(step, RandomErasing):
                batch = step(batch)
                continue
            step.device = self.device  # where it draws the new pixels
            for image, place in zip(batch, places, strict=True):
                seed_everything(self.seed, ERASING, *place)
                step(image)
        return batch


class UnreadableImageError(ValueError):
    """What cannot be read as an image; the message names it."""


@cache
def image_endings() -> frozenset[str]:
    """The endings of the files that Pillow reads, in lower case and with their dot."""
    endings = Image.registered_extensions()  # which loads Pillow's plugins
    read = {*Image.OPEN, "MPO"} - NOT_DECODED
    return frozenset(ending for ending, kind in endings.items() if kind in read)


def read_image(file: str | bytes, name: str = "", upright: bool = False) -> Image.Image:
    """The RGB image in a file.

    Args:
        file: its path, or what it holds.
        name: of the image, for the error; else the path.
        upright: whether to turn it as its EXIF orientation says, for the eye. Training and evaluation read images as
            they are stored, as torchvision does.

    Raises:
        UnreadableImageError: it is damaged, absent, no image, or of a mode that `to_rgb` refuses.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # what is no image can fail in any way
        raise UnreadableImageError(f"{name or file!s} cannot be read as an image: {one_line(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any image that is open.

    Pillow's `convert` clips grey of 16 bits at 255. Here it keeps its high byte, as Pillow's colours of 16 bits do.

    Raises:
        ValueError: the values have no known range, as whole numbers of 32 bits or with a sign, and floats.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in FORMATS_OF_16_BITS):
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
            grey = 255 - grey
        image = Image.fromarray(grey)
    elif image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floats"
        raise ValueError(f"its values are {kind} of no known range: save it with 8 or 16 unsigned bits per channel")
    return image.convert("RGB")


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
