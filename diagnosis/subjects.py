"""What is diagnosed: a checkpoint's model, or one with weights that timm publishes, and images to look at."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import Subset

from datasets import DATA_SETS, build_dataset, build_loader, canonical_data_set
from lape_vit.analysis.diagnosis import Batch
from lape_vit.checkpoints import average_of, description_of
from lape_vit.from_checkpoint import count_classes, load_weights, spelled_for
from loading.images import Images, ImageSettings
from loading.shards import Shards
from runtime.interrupt import Interrupted, noted_signal
from runtime.logs import LoopDisplay
from runtime.process import Runtime
from runtime.world import World
from training.checkpoint import load_checkpoint
from training.command_line import parser_of_main
from training.models import build_model, log_match, match_classes, pretrained_cfg
from training.options import Options
from training.setup import image_settings, resolve_given, start_process

_logger = getLogger(__name__)

BATCH_SIZE = 16
"""By default; evaluation takes half as many images again. On a CPU a larger batch leaves the caches."""


@dataclass(frozen=True)
class Subject:
    """A model, and what its images are.

    Attributes:
        source: its checkpoint, or the name of its weights at timm.
        model: ours, in evaluation mode, on the device.
        untrained: one of the same kind with random weights.
        options: of `main.py`, as an evaluation of it has them.
        runtime: what this process computes on.
        description: what the checkpoint says of the model.
        seed: of its training; None where that is not known.
        is_labelled: whether the labels of the images are the model's classes.
    """

    source: str
    model: Any
    untrained: Any
    options: Options
    runtime: Runtime
    description: Mapping[str, Any]
    seed: int | None
    is_labelled: bool

    @property
    def about(self) -> dict[str, Any]:
        """What a reader of the results has to know."""
        data = self.options.data
        return {
            "checkpoint": self.source,
            "model": self.options.model.model,
            "data_set": data.data_set,
            "seed": self.seed,
        }

    def settings(self, size: Any = None) -> ImageSettings:
        """How its images are loaded, at another size if one is given."""
        options = self.options if size is None else self.options.changed(input_size=size)
        return image_settings(options, dict(self.description))

    def test_images(self, size: Any = None) -> tuple[Images, bool]:
        """The test images, at another size if one is given, and whether their labels are the model's classes."""
        found, classes = build_dataset(False, self.settings(size), self.description.get("classes"))
        return found, self.is_labelled and len(classes) == self.model.num_classes

    def halves(self, count: int, size: Any = None) -> tuple["Half", "Half"]:
        """Images to fit probes to, and other ones to judge by, at another size if one is given.

        Args:
            count: of both together, at most.

        Raises:
            ValueError: there are too few.
        """
        images, is_labelled = self.test_images(size)
        fitted, held_out = (
            Half(self, half, self.settings(size), is_labelled, number)
            for half, number in zip(split(images, count), (count // 2, count - count // 2), strict=True)
        )
        return fitted, held_out

    def at_size(self, size: int, reference_grid: bool, log_n: bool) -> Any:
        """A copy of the model, set up for another size.

        Raises:
            ValueError: the patches do not fill the size, or the encoding takes no reference grid.
        """
        for side, multiple in zip(to_2tuple(size), self.model.patch_embed.patch_size, strict=True):
            if side % multiple:
                raise ValueError(f"--sizes {side} is no multiple of the {multiple} pixels of the patches")
        model = copy.deepcopy(self.model)
        model.extrapolate(model.patch_embed.grid_size if reference_grid else None, log_n)
        model.set_input_size(img_size=to_2tuple(size))
        return model


@dataclass(frozen=True)
class Half:
    """Half of the images that are looked at, in batches on the device."""

    subject: Subject
    images: Images
    settings: ImageSettings
    is_labelled: bool
    most: int

    def __len__(self) -> int:
        return min(self.most, len(self.images))

    def batches(self, title: str) -> Iterator[Batch]:
        """The batches, once; how far that is, and how long it takes, is shown.

        Raises:
            Interrupted: a signal came where signals are deferred.
        """
        runtime = self.subject.runtime
        loader = build_loader(self.images, False, self.settings, 0, 1, runtime.device)
        steps = -(-len(self) // int(1.5 * self.settings.data.batch_size))
        with runtime.display.show(title, steps) as loop:
            for images, labels in first_images(loop.batches(loader), len(self)):
                images, labels = images.to(runtime.device), labels.to(runtime.device)
                yield images, labels if self.is_labelled else None
                loop.advance(len(images), lambda: ())
                if number := noted_signal():
                    raise Interrupted(number)


def first_images(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the first `count` images."""
    left = count
    for images, labels in batches:
        yield images[:left], labels[:left]
        left -= len(images[:left])
        if not left:
            return


def split(images: Images, count: int) -> tuple[Images, Images]:
    """Two parts of a data set that share no image, the same at every call: a random half of `count` images each.

    They are in random order, so that the first of them are as good as any. Of tar files, whose images have no index,
    every second file, as they are.

    Raises:
        ValueError: there are too few images, or a single tar file.
    """
    if isinstance(images.cropped, Shards):
        shards = images.cropped
        if len(shards.urls) < 2:
            raise ValueError(
                "a probe is fitted to the images of some tar files, and judged on others: give two or more"
            )
        halves: list[Any] = [Shards(shards.urls[half::2], shards.crop, shards.read_file) for half in (0, 1)]
    else:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
        halves = [Subset(images.cropped, half) for half in (order[: len(order) // 2], order[len(order) // 2 :])]
    fitted, held_out = (Images(half, images.augment, images.finish, images.labels) for half in halves)
    if len(fitted) < 2:
        raise ValueError(f"{len(images)} images are too few, or --images {count} is: a probe needs four or more")
    return fitted, held_out


def open_subject(given: Mapping[str, Any], checkpoint_path: str | None, display: LoopDisplay) -> Subject:
    """A model by the options given, as `main.py --eval` would evaluate it.

    Args:
        given: options of `main.py` that the command line names.
        checkpoint_path: of a checkpoint, ours or another's; None for weights that timm publishes.

    Raises:
        ValueError, OSError: what `main.py` refuses; but classes that are not the data set's only cost the accuracy.
    """
    parser, given = parser_of_main(), {"batch_size": BATCH_SIZE, "amp_dtype": "float32", **given, "eval": True}
    if "data_set" in given:
        given["data_set"] = canonical_data_set(given["data_set"])
    checkpoint: dict[str, Any] = {}
    if checkpoint_path is not None:
        checkpoint = load_checkpoint(checkpoint_path)
        given["resume"] = checkpoint_path
    description = description_of(checkpoint)
    options, _ = resolve_given(parser, given, checkpoint)
    runtime, options = start_process(options, World(), display)
    if checkpoint_path is None:
        tag = options.run.pretrained
        cfg = pretrained_cfg(options.model.model, tag or "")
        description = {"mean": list(cfg.mean), "std": list(cfg.std)}
        source, num_classes = f"{options.model.model}.{cfg.tag}" if cfg.tag else options.model.model, cfg.num_classes
        weights = None
    else:
        source, tag = checkpoint_path, None
        is_average = options.run.eval_ema
        weights = average_of(checkpoint, source, "--eval-ema") if is_average else checkpoint["model"]
        num_classes = count_classes(weights, {**description, "model": options.model.model})
    is_labelled = check_classes(options, description, num_classes, source)

    built_at: Any = description.get("input_size", options.model.input_size)
    torch.manual_seed(options.run.seed)
    untrained, _ = build_model(options, num_classes, built_at)
    model, options = build_model(options, num_classes, built_at, tag)
    if weights is not None:
        name = f"{options.model.model} with {options.model.pe} and {options.model.join_type}"
        load_weights(model, spelled_for(model, weights), source, name)
    for one in (model, untrained):
        one.set_input_size(img_size=to_2tuple(options.model.input_size))
        one.eval().to(runtime.device)
    seed = checkpoint.get("config", {}).get("seed")
    return Subject(source, model, untrained, options, runtime, description, seed, is_labelled)


def check_classes(options: Options, description: dict[str, Any], num_classes: int, source: str) -> bool:
    """Whether the data set's classes are the model's; logs what a reader has to know of that."""
    data_set = options.data.data_set
    _, classes = build_dataset(False, image_settings(options, description), description.get("classes"))
    match = match_classes(classes, data_set, description, source)
    if num_classes == len(classes) and not match.differences:
        if description.get("classes") is not None or DATA_SETS[data_set].is_sharded:
            log_match(match, data_set, source)
        return True
    why = match.differences or f"it has {num_classes}, and {data_set} has {len(classes)}"
    _logger.warning("%s: accuracies are left out, as its classes are not those of %s: %s", source, data_set, why)
    return False


def short_name(path: str) -> str:
    """Of a checkpoint: its folder's name if it is one of a run, else its own."""
    file = Path(path)
    return file.parent.name if file.parent.name and "checkpoint" in file.stem else file.stem
