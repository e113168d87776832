"""The table of data sets, and the two doors to their images: `build_dataset` and `build_loader`.

A new data set is one entry of `DATA_SETS`. What it takes from a file to a batch is in `loading/`.

This file shadows Hugging Face's `datasets` package, so timm's `hfds/` readers are not offered.

Images reach the model as float32 (3, H, W) of `--input-size`, scaled to 0..1 and then normalised by mean and std.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch.utils.data import DistributedSampler
from torchvision.datasets import CIFAR10, CIFAR100

from loading.classes import order_of_classes
from loading.folders import has_fewer_images, open_folders
from loading.images import Batching, Finishing, Images, ImageSettings, LabelledImages, Loaded, read_image, read_pixels
from loading.inaturalist import open_inaturalist
from loading.loader import ImageLoader
from loading.samplers import REPEATS, Samples, SeededRepeatAugSampler, TrainSampler
from loading.shards import Shards, open_shards, share_of_shards
from loading.sharing import BatchFiles, Company, SharedBatches, key_of, window_of
from loading.small import open_cifar, open_digits
from loading.transforms import build_transform, crops_pixels
from loading.where import CELL, open_where, refuse_moved_cells

FEW = 100_000
"""Images to train, below which a model that is trained already learns more than one from random weights."""


@dataclass(frozen=True)
class DataSet:
    """What differs from one data set to the next."""

    open: Callable[..., LabelledImages]  # (is_train, data path), and a reader unless in memory
    mean: tuple[float, float, float]  # of the training images scaled to 0..1
    std: tuple[float, float, float]
    recipe: str  # the recipe used when none is named
    recipe_of_few: str | None = None  # in its place where there are fewer than FEW images to train
    default_data_path: str | None = None
    small: bool = False  # images in memory, and so small that evaluation takes them whole
    has_categories: bool = False  # classes are of one of several taxonomic ranks, `open`'s argument `category`
    is_drawn: bool = False  # computed at the input's size, for a task: `open`'s arguments `size`, `task` and `cell`
    is_sharded: bool = False  # the test images have a path of their own, and no file names the classes


# Upper case, without "-" or "_": what canonical_data_set reduces a name to.
DATA_SETS: dict[str, DataSet] = {
    "IMNET": DataSet(open_folders, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, recipe="deit"),
    "FOLDER": DataSet(
        open_folders, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, recipe="deit", recipe_of_few="finetune"
    ),
    **{
        name: DataSet(
            partial(open_inaturalist, year),
            IMAGENET_DEFAULT_MEAN,
            IMAGENET_DEFAULT_STD,
            recipe="deit",
            has_categories=True,
        )
        for name, year in (("INAT", 2018), ("INAT19", 2019))
    },
    "WDS": DataSet(open_shards, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, recipe="deit", is_sharded=True),
    "CIFAR10": DataSet(
        partial(open_cifar, CIFAR10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        recipe="vit2d_cifar",
        default_data_path="./data",
        small=True,
    ),
    "CIFAR100": DataSet(
        partial(open_cifar, CIFAR100),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        recipe="vit2d_cifar",
        default_data_path="./data",
        small=True,
    ),
    "DIGITS": DataSet(open_digits, mean=(0.3054,) * 3, std=(0.3760,) * 3, recipe="digits", small=True),
    "WHERE": DataSet(
        open_where,
        mean=(0.5312, 0.4687, 0.4687),  # of the default task, at the size of its recipe
        std=(0.1223,) * 3,
        recipe="where",
        small=True,
        is_drawn=True,
    ),
}


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


def default_recipe(name: str, data_path: str | None) -> str:
    """The recipe of a data set, a key of `DATA_SETS`, where none is named; of a folder it depends on its images."""
    data_set = DATA_SETS[name]
    if data_set.recipe_of_few is not None and data_path is not None and has_fewer_images(data_path, FEW):
        return data_set.recipe_of_few
    return data_set.recipe


def build_dataset(
    is_train: bool, settings: ImageSettings, classes: Sequence[str] | None = None
) -> tuple[Images, list[str]]:
    """Open one split of `settings.data.data_set` (a key of `DATA_SETS`), transformed by `build_transform`.

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
    data = settings.data
    data_set = DATA_SETS[data.data_set]
    options: dict[str, Any] = {}
    if data_set.has_categories:
        options["category"] = data.inat_category or "name"
    elif data.inat_category is not None:
        raise ValueError(f"--inat-category {data.inat_category} means nothing to {data.data_set}: leave it out")
    if data_set.is_drawn:
        size = to_2tuple(settings.input_size)
        options |= {"size": size, "task": data.where_task or "cell", "cell": data.where_cell or CELL}
        if is_train:
            refuse_moved_cells(settings.augmentation)
    elif data.where_task is not None:
        raise ValueError(f"--where-task {data.where_task} means nothing to {data.data_set}: leave it out")
    elif data.where_cell is not None:
        raise ValueError(f"--where-cell {data.where_cell} means nothing to {data.data_set}: leave it out")
    if data_set.is_sharded:
        options |= {"eval_data_path": data.eval_data_path, "num_classes": settings.num_classes}
    elif data.eval_data_path is not None:
        raise ValueError(f"--eval-data-path {data.eval_data_path} means nothing to {data.data_set}: leave it out")
    if not data_set.small:
        options["read_file"] = (
            read_pixels if is_train and crops_pixels(settings.augmentation, data_set.small) else read_image
        )
    data_path = data.data_path or data_set.default_data_path
    crop, augment, finish = build_transform(is_train, settings, data_set.small).transforms
    pictures, names = data_set.open(is_train, data_path, **options)
    labels = None if classes is None else order_of_classes(names, classes)
    return Images(pictures, crop, augment, finish.transforms, labels), names


def build_loader(
    dataset: Images,
    is_train: bool,
    settings: ImageSettings,
    rank: int,
    world_size: int,
    device: torch.device | None = None,
) -> ImageLoader:
    """The batches of process `rank` of `world_size`: images (B, 3, H, W) and labels (B,), B = `--batch-size`.

    Training: full batches only, as many as fill whole updates of `--accum-steps`, in an order and with augmentations
    that `--seed` and `loader.set_epoch(epoch)` decide; `--skip-bad-images` and `--shared-batches` are for training
    alone.
    Evaluation: batches of up to 1.5 B; the processes share out the data set, each image once, or without
    `--dist-eval` each process has them all.

    Images are normalised, and erased, on `device`, by default the CPU, and stay there; the labels are on the CPU.

    While it loads, the random states of `random`, `numpy` and `torch` change in a way that `--num-workers` decides.

    Raises:
        ValueError: `--batch-size` below 1, a training set smaller than one update of all processes, fewer shards than
            workers, or `--shared-batches` of shards.
    """
    data = settings.data
    if data.batch_size < 1:
        raise ValueError(f"--batch-size {data.batch_size} is too small: give at least 1")
    if is_train:
        _check_fills_a_batch(dataset, settings, world_size)
    elif not data.dist_eval:
        rank, world_size = 0, 1
    seed = settings.seed if is_train else None
    load = partial(
        ImageLoader,
        finish=Finishing(dataset.finish, seed, device or torch.device("cpu")),
        num_images=len(dataset),
        collate_fn=Batching(dataset.augment, seed, dataset.labels),
        skips_unreadable=is_train and data.skip_bad_images,
        batch_size=data.batch_size if is_train else int(1.5 * data.batch_size),
        drop_last=is_train,
        num_workers=data.num_workers,
        pin_memory=bool(data.pin_mem),
    )
    if isinstance(dataset.pictures, Shards):
        if is_train and data.shared_batches is not None:
            raise ValueError(f"--shared-batches means nothing to {data.data_set}: leave it out")
        repeats = REPEATS if is_train and settings.augmentation.repeated_aug else 1
        return load(share_of_shards(dataset.pictures, dataset.crop, is_train, settings, rank, world_size, repeats))
    samples = Samples(dataset, settings.seed)
    if not is_train:
        return load(samples, sampler=[(index, 0, index) for index in range(rank, len(dataset), world_size)])
    order = _train_order(dataset, settings, rank, world_size)
    sampler = TrainSampler(order, data.batch_size * settings.accum_steps)
    if data.shared_batches is None:
        return load(samples, sampler=sampler)
    shared, company = _shared(samples, load.keywords["collate_fn"], sampler, settings, rank, world_size)
    return load(shared, sampler=sampler, company=company, collate_fn=_as_it_is)


def _shared(
    samples: Samples, batching: Batching, sampler: TrainSampler, settings: ImageSettings, rank: int, world_size: int
) -> tuple[SharedBatches, Company]:
    """The batches in the folder of `--shared-batches`, and those that share them."""
    data = settings.data
    # what only says how to load shapes no batch
    shaping = replace(settings, data=replace(data, num_workers=0, pin_mem=None, shared_batches=None))
    key = key_of(shaping, len(samples), batching.labels, rank, world_size)
    files = BatchFiles(Path(data.shared_batches or "").expanduser() / key)
    window = window_of(3 * math.prod(to_2tuple(settings.input_size)) * data.batch_size)
    company = Company(files, window, ahead=2 * data.num_workers)
    return SharedBatches(samples, batching, sampler, files, data.batch_size, window), company


def _as_it_is(batch: Loaded) -> Loaded:
    return batch


def _check_fills_a_batch(dataset: Images, settings: ImageSettings, world_size: int) -> None:
    batch_size = settings.data.batch_size
    if len(dataset) < batch_size * settings.accum_steps * world_size:
        times = f" x --accum-steps {settings.accum_steps}" if settings.accum_steps > 1 else ""
        raise ValueError(
            f"{len(dataset)} training images do not fill a batch of {batch_size}{times} on each of {world_size} "
            "process(es): lower --batch-size or the number of processes"
        )


def _train_order(
    dataset: Images, settings: ImageSettings, rank: int, world_size: int
) -> DistributedSampler | SeededRepeatAugSampler:
    if settings.augmentation.repeated_aug:
        return SeededRepeatAugSampler(dataset, world_size, rank, settings.seed)
    return DistributedSampler(dataset, world_size, rank, seed=settings.seed, drop_last=True)
