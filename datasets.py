"""The data sets, their transforms and their loaders; a new data set is one entry of `DATA_SETS`.

This file shadows Hugging Face's `datasets` package, so timm's `hfds/` readers are not offered.

Images reach the model as float32 (3, H, W) of `--input-size`, scaled to 0..1 and then normalised by mean and std.
"""

import argparse
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from timm.data.transforms_factory import create_transform
from timm.layers import to_2tuple
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
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

from training.classes import first_few, name_differences, order_of_classes
from training.distributed import in_turns
from training.images import (
    Batching,
    Crop,
    Picture,
    Reader,
    Sample,
    Transform,
    UnreadableImageError,
    image_endings,
    one_line,
    read_image,
    read_pixels,
)
from training.interrupt import hold_signals, leave_signals_to_parent
from training.seeding import CROP, seed_everything
from training.shards import Shards, ShardStream, open_shards, share_of_shards

_logger = getLogger(__name__)

LabelledImages = tuple[Dataset, list[str]]  # cropped images, and the class names in the order of their labels


# ---- data sets


@dataclass(frozen=True)
class DataSet:
    """What differs from one data set to the next."""

    open: Callable[..., LabelledImages]  # (is_train, data path, crop), and a reader unless in memory
    mean: tuple[float, float, float]  # of the training images scaled to 0..1
    std: tuple[float, float, float]
    recipe: str  # the recipe used when none is named
    default_data_path: str | None = None
    small: bool = False  # images in memory, and so small that evaluation takes them whole
    has_categories: bool = False  # classes are of one of several taxonomic ranks, `open`'s argument `category`
    is_sharded: bool = False  # the test images have a path of their own, and no file names the classes


def canonical_data_set(name: str) -> str:
    """The key of `DATA_SETS` that `name` means: any case, with or without `-` and `_`; `CIFAR` is CIFAR100, as in DeiT.

    Raises:
        ValueError: no such data set; lists the known ones.
    """
    key = re.sub("[-_]", "", name).upper()
    key = "CIFAR100" if key == "CIFAR" else key
    if key not in DATA_SETS:
        raise ValueError(f"unknown --data-set {name!r}: choose from {', '.join(DATA_SETS)}")
    return key


class Images(Dataset):
    """One split of a data set: an item is (image (3, H, W), label).

    Args:
        cropped: (PIL RGB image of the input's size, label) by index; or `Shards`, which have no index.
        finish: what makes an image of a cropped one.
        labels: what stands for each label of `cropped`; by default the label itself.
    """

    def __init__(self, cropped: Dataset, finish: Transform, labels: Sequence[int] | None = None) -> None:
        self.cropped = cropped
        self.finish = finish
        self.labels = labels

    def __len__(self) -> int:
        return len(self.cropped)  # type: ignore[arg-type]  # torch's Dataset declares no __len__; all of ours have one

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.cropped[index]
        return self.finish(image), label if self.labels is None else self.labels[label]


def build_dataset(
    is_train: bool, args: argparse.Namespace, classes: Sequence[str] | None = None
) -> tuple[Images, list[str]]:
    """Open one split of `args.data_set` (a key of `DATA_SETS`), transformed by `build_transform`.

    Args:
        classes: of a model. Where the data set has the same names, an image's label is the place of its class in this
            order; else, and by default, in the data set's own.

    Returns:
        The images, and the data set's class names in its own order.

    Raises:
        FileNotFoundError: images are missing and, for CIFAR, cannot be downloaded.
        ValueError: `--data-path` is needed and absent (or the reverse), the classes of train/ and val/ differ, or an
            option of the transform is illegal.
    """
    data_set = DATA_SETS[args.data_set]
    options: dict[str, Any] = {}
    if data_set.has_categories:
        options["category"] = args.inat_category or "name"
    elif args.inat_category is not None:
        raise ValueError(f"--inat-category {args.inat_category} means nothing to {args.data_set}: leave it out")
    if data_set.is_sharded:
        options |= {"eval_data_path": args.eval_data_path, "num_classes": args.num_classes}
    elif args.eval_data_path is not None:
        raise ValueError(f"--eval-data-path {args.eval_data_path} means nothing to {args.data_set}: leave it out")
    if not data_set.small:
        options["read_file"] = read_pixels if is_train and _crops_pixels(args) else read_image
    data_path = args.data_path or data_set.default_data_path
    crop, finish = build_transform(is_train, args).transforms
    cropped, names = data_set.open(is_train, data_path, crop, **options)
    return Images(cropped, finish, None if classes is None else order_of_classes(names, classes)), names


def _open_folders(is_train: bool, data_path: str | None, crop: Crop, read_file: Reader) -> LabelledImages:
    if data_path is None:
        raise ValueError("--data-path is missing: name the folder that holds train/ and val/")
    splits = {split: Path(data_path).expanduser() / split for split in ("train", "val")}
    folder = splits["train" if is_train else "val"]
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: --data-path must hold train/ and val/, with a folder per class")
    classes = {split: _class_folders(path) for split, path in splits.items() if path.is_dir()}
    _check_same_classes(data_path, classes.get("train"), classes.get("val"))

    left_out = [path.name for path in sorted(folder.iterdir()) if not _is_class_folder(path)]
    endings, within, hidden = image_endings(), f"{folder}{os.sep}", f"{os.sep}."

    def is_image(path: str) -> bool:
        name = path.removeprefix(within)
        if hidden in name or os.path.splitext(name)[1].lower() not in endings:  # the class folder is not hidden
            left_out.append(name)
            return False
        return True

    images = _ClassFolders(str(folder), crop, loader=read_file, is_valid_file=is_image, allow_empty=True)
    if left_out:
        _logger.info(
            "%s: %d files or folders are left out, as they are hidden, in no class folder, or without the ending of "
            "an image: %s",
            folder,
            len(left_out),
            first_few(left_out),
        )
    if empty := set(range(len(images.classes))).difference(images.targets):
        names = first_few([images.classes[label] for label in sorted(empty)])
        raise FileNotFoundError(f"no image in class folder {names} of {folder}: add images or remove the folder")
    return images, images.classes


class _ClassFolders(ImageFolder):
    """torchvision's, without hidden folders such as `.ipynb_checkpoints`."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(_class_folders(Path(directory)))
        return names, {name: label for label, name in enumerate(names)}


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _class_folders(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir() if _is_class_folder(path)}
    if not names:
        raise FileNotFoundError(f"no class folder in {folder}: it must hold a folder of images per class")
    return names


def _check_same_classes(data_path: str, train: set[str] | None, val: set[str] | None) -> None:
    if train is None or val is None or train == val:
        return
    differences = name_differences(train, "train/", val, "val/")
    raise ValueError(f"the classes of train/ and val/ in --data-path {data_path} differ: {differences}")


def _open_cifar(cifar: type[CIFAR10], is_train: bool, data_path: str | None, crop: Crop) -> LabelledImages:
    assert data_path is not None  # DATA_SETS has a default
    folder = Path(data_path).expanduser() / cifar.base_folder
    with in_turns() as may_download:
        if may_download and not folder.is_dir():
            _logger.info("%s is not in %s: downloading it from %s", cifar.__name__, folder, cifar.url)
        try:
            # torchvision downloads only what is not already there, whole and with the right checksums
            images = cifar(folder.parent, train=is_train, transform=crop, download=may_download)
        except (OSError, HTTPException, RuntimeError) as error:
            raise FileNotFoundError(
                f"{cifar.__name__} is not complete in {folder}, and its download from {cifar.url} failed "
                f"({one_line(error)}): connect to the network, or unpack {cifar.filename} in {folder.parent}, "
                f"or name by --data-path the folder that holds {cifar.base_folder}"
            ) from error
    return images, images.classes


class Digits(Dataset):
    """Scikit-learn's 1,797 scans of handwritten digits, 8 x 8 and installed with it: 1,437 to train and 360 to test.

    The split is fixed and stratified by class. An item is (crop of a PIL RGB image, label).
    """

    def __init__(self, is_train: bool, crop: Crop) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target
        )
        split = train if is_train else test
        self.images = np.rint(digits.images[split] * (255 / 16)).astype(np.uint8)  # scanned in 17 grey levels, 0..16
        self.targets: list[int] = digits.target[split].tolist()
        self.classes = [str(name) for name in digits.target_names]
        self.crop = crop

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.crop(Image.fromarray(self.images[index]).convert("RGB")), self.targets[index]


class INaturalist(Dataset):
    """A split of iNaturalist 2018 or 2019, which its annotation files tell, with classes of any taxonomic rank.

    torchvision's class of this name knows no splits. Labels number the classes in the order in which the training
    annotations first name them, as DeiT's do. An item is (crop of what `read_file` reads, label).

    Args:
        folder: holds `train{year}.json`, `val{year}.json`, `categories.json` and the images they name.
        category: a key of `categories.json`: name (the species), genus, family, order, class, phylum, kingdom or
            supercategory.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a damaged file, or an unknown category.
    """

    def __init__(self, folder: Path, year: int, is_train: bool, category: str, crop: Crop, read_file: Reader) -> None:
        self.crop = crop
        self.read_file = read_file
        groups = {entry["id"]: entry for entry in _read_json(folder / "categories.json")}
        if unknown := [entry for entry in groups.values() if category not in entry]:
            known = ", ".join(key for key in unknown[0] if key != "id")
            raise ValueError(f"unknown --inat-category {category!r}: choose from {known}")
        train = _read_json(folder / f"train{year}.json")
        names = [groups[annotation["category_id"]][category] for annotation in train["annotations"]]
        labels = {name: label for label, name in enumerate(dict.fromkeys(names))}
        self.classes = list(labels)

        split = train if is_train else _read_json(folder / f"val{year}.json")
        files = {image["id"]: folder / image["file_name"] for image in split["images"]}
        self.samples = [
            (files[annotation["image_id"]], labels[groups[annotation["category_id"]][category]])
            for annotation in split["annotations"]
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return self.crop(self.read_file(str(path))), label


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --data-path must hold iNaturalist's annotation files and images")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error


def _open_inaturalist(
    year: int, is_train: bool, data_path: str | None, crop: Crop, read_file: Reader, category: str
) -> LabelledImages:
    if data_path is None:
        raise ValueError(f"--data-path is missing: name the folder that holds train{year}.json and the images")
    try:
        images = INaturalist(Path(data_path).expanduser(), year, is_train, category, crop, read_file)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the annotation files in --data-path {data_path} do not fit together: {error!r}") from error
    if missing := next((path for path, _ in images.samples if not path.is_file()), None):
        raise FileNotFoundError(f"no image {missing}, which the annotations name: unpack iNaturalist {year} there")
    return images, images.classes


def _open_digits(is_train: bool, data_path: str | None, crop: Crop) -> LabelledImages:
    if data_path is not None:
        raise ValueError(
            f"--data-path {data_path} means nothing to DIGITS, which comes with scikit-learn: leave it out"
        )
    digits = Digits(is_train, crop)
    return digits, digits.classes


# Upper case, without "-" or "_": what canonical_data_set reduces a name to.
DATA_SETS: dict[str, DataSet] = {
    "IMNET": DataSet(_open_folders, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, recipe="deit"),
    "FOLDER": DataSet(_open_folders, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, recipe="deit"),
    **{
        name: DataSet(
            partial(_open_inaturalist, year),
            IMAGENET_DEFAULT_MEAN,
            IMAGENET_DEFAULT_STD,
            recipe="deit",
            has_categories=True,
        )
        for name, year in (("INAT", 2018), ("INAT19", 2019))
    },
    "WDS": DataSet(open_shards, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, recipe="deit", is_sharded=True),
    "CIFAR10": DataSet(
        partial(_open_cifar, CIFAR10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        recipe="vit2d_cifar",
        default_data_path="./data",
        small=True,
    ),
    "CIFAR100": DataSet(
        partial(_open_cifar, CIFAR100),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        recipe="vit2d_cifar",
        default_data_path="./data",
        small=True,
    ),
    "DIGITS": DataSet(_open_digits, mean=(0.3054,) * 3, std=(0.3760,) * 3, recipe="digits", small=True),
}


# ---- transforms

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


def build_transform(is_train: bool, args: argparse.Namespace) -> Compose:
    """The transform of one split: PIL RGB image -> normalised float32 tensor (3, H, W) of `args.input_size`.

    Its two halves are the crop, to a PIL image of that size, and all that follows.

    Training: crop (`args.train_crop`), flip, `args.aa`, colour jitter, normalisation, random erasing, as in DeiT; `pad`
    crops the whole image padded by an eighth of its side, `none` takes the whole image. `args.src` and
    `args.three_augment` put DeiT III's simple random crop and its three augmentations in the place of `args.train_crop`
    and `args.aa`. Unless `args.fast_crop` is off, the random resized crop also takes uint8 (H, W, 3), which it resizes
    faster than a PIL image, and almost as exactly.

    Evaluation: the whole image for a small data set or a small input (up to 32 x 32), else DeiT's centre crop of
    `args.eval_crop_ratio` of each side.

    Raises:
        ValueError: an illegal option; names its flag.
    """
    return _train_transform(args) if is_train else _eval_transform(args)


def _train_transform(args: argparse.Namespace) -> Compose:
    _check_choice("--train-crop", args.train_crop, TRAIN_CROPS)
    _check_choice("--train-interpolation", args.train_interpolation, TRAIN_INTERPOLATIONS)
    _check_choice("--remode", args.remode, ERASING_MODES)
    if args.scale is not None and not 0 < args.scale[0] <= args.scale[1]:
        raise ValueError(f"--scale {args.scale}: give the smallest and the largest part of the image's area, above 0")
    if args.scale is not None and (args.src or args.train_crop != "random-resized"):
        _logger.warning("--scale %g %g is without effect: it is of --train-crop random-resized", *args.scale)
    if args.fast_crop is not None and not _may_crop_pixels(args):
        flag = "--fast-crop" if args.fast_crop else "--no-fast-crop"
        _logger.warning("%s is without effect: it is of --train-crop random-resized, of images in files", flag)
    height, width = size = to_2tuple(args.input_size)
    crop_and_flip, augment, finish = create_transform(
        size,
        is_training=True,
        scale=args.scale,
        hflip=args.hflip,
        auto_augment=_timm_policy(args),
        color_jitter=args.color_jitter or None,  # type: ignore[arg-type]  # None is none: it costs nothing
        interpolation=args.train_interpolation,
        mean=args.mean,
        std=args.std,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        separate=True,
    )
    if _crops_pixels(args):
        crop, *flip = crop_and_flip.transforms
        crop_and_flip = Compose([PixelCrop(crop), *flip])
    elif args.src:
        if args.train_crop != "random-resized":
            _logger.warning("--src takes the place of --train-crop %s", args.train_crop)
        crop = RandomCrop(size, padding=SIMPLE_CROP_PADDING, padding_mode="reflect")
        crop_and_flip = Compose([_resize(args, max(size)), crop, RandomHorizontalFlip(args.hflip)])
    elif args.train_crop != "random-resized":
        crops = [RandomCrop(size, padding=(width // 8, height // 8))] if args.train_crop == "pad" else []
        crop_and_flip = Compose([_resize(args, size), *crops, RandomHorizontalFlip(args.hflip)])
    if args.aa == "torchvision" and not args.three_augment:
        augment = Compose([RandAugment(), augment])
    _to_tensor, _normalise, *erase = finish.transforms
    return Compose([crop_and_flip, Compose([augment, Normalise(args.mean, args.std), *erase])])


def _may_crop_pixels(args: argparse.Namespace) -> bool:
    return args.train_crop == "random-resized" and not args.src and not DATA_SETS[args.data_set].small


def _crops_pixels(args: argparse.Namespace) -> bool:
    return args.fast_crop is not False and _may_crop_pixels(args)


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


class Normalise:
    """What torchvision's `ToTensor` and `Normalize` do, to the bit, in place: PIL RGB image -> float32 (3, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def _resize(args: argparse.Namespace, size: int | tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
    modes = ("bilinear", "bicubic") if args.train_interpolation == "random" else (args.train_interpolation,)
    return RandomChoice([Resize(size, InterpolationMode(mode)) for mode in modes])


def _timm_policy(args: argparse.Namespace) -> str | None:
    if args.three_augment:
        if args.aa not in (None, "none", "3a"):
            _logger.warning("--three-augment takes the place of --aa %s", args.aa)
        return "3a"
    if args.aa in (None, "none", "torchvision"):
        return None
    if not TIMM_POLICY.fullmatch(args.aa):
        raise ValueError(
            f"unknown policy --aa {args.aa!r}: give none, torchvision, or timm's rand-m9-mstd0.5-inc1, augmix-m3-w3, "
            "original, originalr, v0, v0r or 3a"
        )
    if args.color_jitter and "3a" not in args.aa:  # timm's own rule: it jitters colours beside the 3a policies only
        raise ValueError(
            f"--color-jitter {args.color_jitter} has no effect beside --aa {args.aa}: set it to 0, or --aa none"
        )
    return args.aa


def _eval_transform(args: argparse.Namespace) -> Compose:
    _check_choice("--interpolation", args.interpolation, [mode.value for mode in InterpolationMode])
    if not 0 < args.eval_crop_ratio <= 1:
        raise ValueError(f"--eval-crop-ratio {args.eval_crop_ratio} is no part of the image: give a number in (0, 1]")
    height, width = size = to_2tuple(args.input_size)
    mode = InterpolationMode(args.interpolation)
    if DATA_SETS[args.data_set].small or max(size) <= 32:
        crop: list[Callable] = [Resize(size, mode)]  # changes no pixel of an image of that size
    elif height == width:
        crop = [Resize(int(height / args.eval_crop_ratio), mode), CenterCrop(size)]
    else:
        around = [int(side / args.eval_crop_ratio) for side in size]
        crop = [ResizeKeepRatio(around, interpolation=args.interpolation), CenterCrop(size)]
    return Compose([Compose(crop), Compose([Normalise(args.mean, args.std)])])


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {flag} {value!r}: choose from {', '.join(choices)}")


# ---- loaders


REPEATS = 3
"""How often repeated augmentation shows an image in an epoch."""


class SeededRepeatAugSampler(RepeatAugSampler):
    """Repeated augmentation (Hoffer et al. 2020) as in DeiT: a third of the images an epoch, each three times.

    timm's sampler shuffles by the epoch alone; this one by seed + epoch, as `DistributedSampler` does. Its length is
    not rounded down to a multiple of 256, so that a small data set is not left without a batch.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, num_repeats=REPEATS, selected_round=0)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)


class TrainSampler(Sampler[tuple[int, int, int]]):
    """One process's share of an epoch, from any place on: (index of the image, epoch, place in the order of all).

    The place is counted over all processes, so the same global batch has the same images and augmentations however
    many processes share it.

    Args:
        order: of the indices in this process.
        images_per_update: of this process; the rest that does not fill an update is left out.
    """

    def __init__(self, order: DistributedSampler | SeededRepeatAugSampler, images_per_update: int) -> None:
        self.order = order
        self.num_images = len(order) // images_per_update * images_per_update
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Yield the order of `epoch` without this process's `first` images, none of which is read."""
        self.order.set_epoch(epoch)
        self.epoch = epoch
        self.first = first

    def __len__(self) -> int:
        return self.num_images  # of the whole epoch

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for number, index in islice(enumerate(self.order), self.first, self.num_images):
            yield index, self.epoch, number * self.order.num_replicas + self.order.rank


class _Samples(Dataset[Sample]):
    """The items of a data set, each cropped by its own seed; the next one where one is unreadable.

    An index is what `TrainSampler` yields.
    """

    def __init__(self, images: Images, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index_and_place: tuple[int, int, int]) -> Sample:
        index, epoch, number = index_and_place
        seed_everything(self.seed, CROP, epoch, number)
        complaint = ""
        for other in range(len(self)):
            try:
                image, label = self.images.cropped[(index + other) % len(self)]
            except UnreadableImageError as error:
                complaint = complaint or str(error)
            else:
                return Sample(image, label, (epoch, number), complaint)
        raise UnreadableImageError(complaint)


class ImageLoader(DataLoader):
    """Batches of images and labels.

    Attributes:
        num_images: of the data set, of which this process loads its share.
        skips_unreadable: whether the next readable image stands in for an unreadable one; else it is an error.
        num_skipped: unreadable images so far, in the batches that were taken.
    """

    def __init__(
        self, samples: _Samples | ShardStream, num_images: int, skips_unreadable: bool, **options: Any
    ) -> None:
        super().__init__(samples, worker_init_fn=leave_signals_to_parent, **options)
        self.num_images = num_images
        self.skips_unreadable = skips_unreadable
        self.num_skipped = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Of training: load `epoch` next, without this process's `first` images, which fill whole batches."""
        order = self.dataset if isinstance(self.dataset, ShardStream) else self.sampler
        assert isinstance(order, ShardStream | TrainSampler)
        order.set_epoch(epoch, first)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is all that a loop needs
        with hold_signals():
            batches = super().__iter__()  # which starts the workers
        for loaded in batches:
            if isinstance(loaded, Exception):
                raise loaded
            batch, complaints = loaded
            for complaint in filter(None, complaints):
                # raised here, as an exception from a worker comes with that worker's traceback in its message
                if not self.skips_unreadable:
                    raise UnreadableImageError(complaint)
                _logger.warning("%s; skipped", complaint)
                self.num_skipped += 1
            yield batch


def build_loader(dataset: Images, is_train: bool, args: argparse.Namespace, rank: int, world_size: int) -> ImageLoader:
    """The batches of process `rank` of `world_size`: images (B, 3, H, W) and labels (B,), B = `args.batch_size`.

    Training: full batches only, as many as fill whole updates of `args.accum_steps`, in an order and with augmentations
    that `args.seed` and `loader.set_epoch(epoch)` decide; `--skip-bad-images` is for training alone.
    Evaluation: batches of up to 1.5 B; the processes share out the data set, each image once, or without
    `args.dist_eval` each process has them all.

    While it loads, the random states of `random`, `numpy` and `torch` change in a way that `args.num_workers` decides.

    Raises:
        ValueError: `--batch-size` below 1, a training set smaller than one update of all processes, or fewer shards
            than workers.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} is too small: give at least 1")
    if is_train:
        _check_fills_a_batch(dataset, args, world_size)
    elif not args.dist_eval:
        rank, world_size = 0, 1
    load = partial(
        ImageLoader,
        num_images=len(dataset),
        collate_fn=Batching(dataset.finish, args.seed if is_train else None, dataset.labels),
        skips_unreadable=is_train and args.skip_bad_images,
        batch_size=args.batch_size if is_train else int(1.5 * args.batch_size),
        drop_last=is_train,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
    )
    if isinstance(dataset.cropped, Shards):
        repeats = REPEATS if is_train and args.repeated_aug else 1
        return load(share_of_shards(dataset.cropped, is_train, args, rank, world_size, repeats))
    samples = _Samples(dataset, args.seed)
    if not is_train:
        return load(samples, sampler=[(index, 0, index) for index in range(rank, len(dataset), world_size)])
    order = _train_order(dataset, args, rank, world_size)
    return load(samples, sampler=TrainSampler(order, args.batch_size * args.accum_steps))


def _check_fills_a_batch(dataset: Images, args: argparse.Namespace, world_size: int) -> None:
    if len(dataset) < args.batch_size * args.accum_steps * world_size:
        times = f" x --accum-steps {args.accum_steps}" if args.accum_steps > 1 else ""
        raise ValueError(
            f"{len(dataset)} training images do not fill a batch of {args.batch_size}{times} on each of {world_size} "
            "process(es): lower --batch-size or the number of processes"
        )


def _train_order(
    dataset: Images, args: argparse.Namespace, rank: int, world_size: int
) -> DistributedSampler | SeededRepeatAugSampler:
    if args.repeated_aug:
        return SeededRepeatAugSampler(dataset, world_size, rank, args.seed)
    return DistributedSampler(dataset, world_size, rank, seed=args.seed, drop_last=True)
