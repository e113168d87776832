"""From a PIL image to the model's input: crops, flips, policies of augmentation, normalisation."""

import random
import re
from collections.abc import Callable, Sequence
from logging import getLogger

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from timm.data.transforms_factory import create_transform
from timm.layers import to_2tuple
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    RandAugment,
    RandomChoice,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
)

from loading.images import ImageSettings, Picture
from loading.warps import use_fast_warps
from training.options import AugmentationOptions

_logger = getLogger(__name__)


TRAIN_CROPS = ("random-resized", "pad", "none")
SIMPLE_CROP_PADDING = 4
TRAIN_INTERPOLATIONS = ("bicubic", "bilinear", "random")
ERASING_MODES = ("const", "rand", "pixel")

# timm drops a section of a policy that it cannot read ("rand-m9-inc") without a word, and falls back on a default for
# an unknown set of operations ("rand-tfoo"): only what it reads is let through.
_NUMBER = r"\d+(\.\d+)?"
TIMM_POLICY = re.compile(
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw?)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(original|v0)r?(-mstd{_NUMBER})?|3a(-mstd{_NUMBER})?"
)


def build_transform(is_train: bool, settings: ImageSettings, is_small: bool) -> Compose:
    """The transform of one split: PIL RGB image -> normalised float32 tensor (3, H, W) of `settings.input_size`.

    Its three parts are the crop, to a PIL image of that size; what augments it, to its pixels, uint8 (H, W, 3); and
    what follows, of one image or of a batch: normalisation, and random erasing.

    Training: crop (`--train-crop`), flip, `--aa`, colour jitter, normalisation, random erasing, as in DeiT; `pad`
    crops the whole image padded by an eighth of its side, `none` takes the whole image. `--src` and `--three-augment`
    put DeiT III's simple random crop and its three augmentations in the place of `--train-crop` and `--aa`. Unless
    `--fast-crop` is off, the random resized crop also takes uint8 (H, W, 3), which it resizes faster than a PIL image,
    and RandAugment shears and shifts faster than PIL. The results differ from PIL's by rounding alone.

    Evaluation: the whole image for a small data set or a small input (up to 32 x 32), else DeiT's centre crop of
    `--eval-crop-ratio` of each side.

    Args:
        is_small: whether images lie in memory, and are so small that evaluation takes them whole.

    Raises:
        ValueError: an illegal option; names its flag.
    """
    return _train_transform(settings, is_small) if is_train else _eval_transform(settings, is_small)


def _train_transform(settings: ImageSettings, is_small: bool) -> Compose:
    augmentation, mean, std = settings.augmentation, tuple(settings.mean), tuple(settings.std)
    scale = augmentation.scale
    _check_choice("--train-crop", augmentation.train_crop, TRAIN_CROPS)
    _check_choice("--train-interpolation", augmentation.train_interpolation, TRAIN_INTERPOLATIONS)
    _check_choice("--remode", augmentation.remode, ERASING_MODES)
    if scale is not None and not 0 < scale[0] <= scale[1]:
        raise ValueError(f"--scale {scale}: give the smallest and the largest part of the image's area, above 0")
    if scale is not None and (augmentation.src or augmentation.train_crop != "random-resized"):
        _logger.warning("--scale %g %g is without effect: it is of --train-crop random-resized", *scale)
    if augmentation.fast_crop is not None and not _may_crop_pixels(augmentation, is_small):
        flag = "--fast-crop" if augmentation.fast_crop else "--no-fast-crop"
        _logger.warning("%s is without effect: it is of --train-crop random-resized, of images in files", flag)
    height, width = size = to_2tuple(settings.input_size)
    crop_and_flip, augment, finish = create_transform(
        size,
        is_training=True,
        scale=None if scale is None else (scale[0], scale[1]),
        hflip=augmentation.hflip,
        auto_augment=_timm_policy(augmentation),
        color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]  # None: no step for it
        interpolation=augmentation.train_interpolation,
        mean=mean,
        std=std,
        re_prob=augmentation.reprob,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
        separate=True,
    )
    if crops_pixels(augmentation, is_small):
        crop, *flip = crop_and_flip.transforms
        crop_and_flip = Compose([PixelCrop(crop), *flip])
        for policy in augment.transforms:
            if isinstance(policy, TimmRandAugment):
                for operation in policy.ops:
                    use_fast_warps(operation)
    elif augmentation.src:
        if augmentation.train_crop != "random-resized":
            _logger.warning("--src takes the place of --train-crop %s", augmentation.train_crop)
        crop = RandomCrop(size, padding=SIMPLE_CROP_PADDING, padding_mode="reflect")
        crop_and_flip = Compose(
            [_resize(augmentation.train_interpolation, max(size)), crop, RandomHorizontalFlip(augmentation.hflip)]
        )
    elif augmentation.train_crop != "random-resized":
        crops = [RandomCrop(size, padding=(width // 8, height // 8))] if augmentation.train_crop == "pad" else []
        crop_and_flip = Compose(
            [_resize(augmentation.train_interpolation, size), *crops, RandomHorizontalFlip(augmentation.hflip)]
        )
    if augmentation.aa == "torchvision" and not augmentation.three_augment:
        augment = Compose([RandAugment(), augment])
    _to_tensor, _normalise, *erase = finish.transforms
    return Compose([crop_and_flip, Compose([augment, to_pixels]), Compose([Normalise(mean, std), *erase])])


def _may_crop_pixels(augmentation: AugmentationOptions, is_small: bool) -> bool:
    return augmentation.train_crop == "random-resized" and not augmentation.src and not is_small


def crops_pixels(augmentation: AugmentationOptions, is_small: bool) -> bool:
    """Whether the training crop takes pixels in place of PIL images."""
    return augmentation.fast_crop is not False and _may_crop_pixels(augmentation, is_small)


class PixelCrop:
    """timm's random resized crop, of pixels too: the same crop for the same random state, resized by torch.

    Of the resized values, one in some 300 differs by 1 of 255 from PIL's, and one in a million by 2.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, image: Picture) -> Image.Image:
        if isinstance(image, Image.Image):
            return self.crop(image)
        pixels = torch.from_numpy(image)
        top, left, height, width = self.crop.get_params(pixels.permute(2, 0, 1), self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple) else modes
        part = pixels[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
        if not part.numel():  # of an image of a few pixels: black, as PIL's
            return Image.new("RGB", self.crop.size[::-1])
        resized = interpolate(part, self.crop.size, mode=mode.value, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL RGB image as uint8 (H, W, 3)."""
    return torch.from_numpy(np.array(image))


class Normalise:
    """What torchvision's `ToTensor` and `Normalize` do, to the bit: uint8 (..., H, W, 3) -> float32 (..., 3, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.constants = torch.tensor([[255.0] * 3, [*mean], [*std]])[..., None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.constants.device != pixels.device:
            self.constants = self.constants.to(pixels.device)
        scale, mean, std = self.constants
        pixels = pixels.movedim(-1, -3)
        return torch.empty(pixels.shape, device=pixels.device).copy_(pixels).div_(scale).sub_(mean).div_(std)


def _resize(interpolation: str, size: int | tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
    modes = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
    return RandomChoice([Resize(size, InterpolationMode(mode)) for mode in modes])


def _timm_policy(augmentation: AugmentationOptions) -> str | None:
    policy, jitter = augmentation.aa, augmentation.color_jitter
    if augmentation.three_augment:
        if policy not in (None, "none", "3a"):
            _logger.warning("--three-augment takes the place of --aa %s", policy)
        return "3a"
    if policy in (None, "none", "torchvision"):
        return None
    if not TIMM_POLICY.fullmatch(policy):
        raise ValueError(
            f"unknown policy --aa {policy!r}: give none, torchvision, or timm's rand-m9-mstd0.5-inc1, augmix-m3-w3, "
            "original, originalr, v0, v0r or 3a"
        )
    if jitter and "3a" not in policy:  # timm's own rule: it jitters colours beside the 3a policies only
        raise ValueError(f"--color-jitter {jitter} has no effect beside --aa {policy}: set it to 0, or --aa none")
    return policy


def _eval_transform(settings: ImageSettings, is_small: bool) -> Compose:
    data = settings.data
    _check_choice("--interpolation", data.interpolation, [mode.value for mode in InterpolationMode])
    if not 0 < data.eval_crop_ratio <= 1:
        raise ValueError(f"--eval-crop-ratio {data.eval_crop_ratio} is no part of the image: give a number in (0, 1]")
    height, width = size = to_2tuple(settings.input_size)
    mode = InterpolationMode(data.interpolation)
    if takes_whole_image(size, is_small):
        crop: list[Callable] = [Resize(size, mode)]  # changes no pixel of an image of that size
    elif height == width:
        crop = [Resize(int(height / data.eval_crop_ratio), mode), CenterCrop(size)]
    else:
        around = [int(side / data.eval_crop_ratio) for side in size]
        crop = [ResizeKeepRatio(around, interpolation=data.interpolation), CenterCrop(size)]
    return Compose([Compose(crop), to_pixels, Compose([Normalise(settings.mean, settings.std)])])


def takes_whole_image(input_size: int | Sequence[int], is_small: bool) -> bool:
    """Whether evaluation resizes an image to the model's input, and crops nothing; see `build_transform`."""
    return is_small or max(to_2tuple(input_size)) <= 32


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {flag} {value!r}: choose from {', '.join(choices)}")
