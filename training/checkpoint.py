"""Checkpoint files, ours and the original code bases'.

Ours are a dictionary of plain data (tensors, numbers, strings, lists, dictionaries), written by `torch.save`:

    format          "lape-vit"
    version         1
    model           state dict
    model_ema       state dict of the averaged weights, or None
    optimizer       state dict
    scaler          state dict of the gradient scaler
    epoch           epochs finished
    progress        of the epoch under way: `counts` of updates, `updates` per epoch, and per process `sums_by_rank`
                    of the loss and of the unreadable images
    best_acc1       best test accuracy so far, per cent
    best_ema_acc1   the same of the averaged weights; -1 without them
    accuracies      test accuracy after each epoch, per cent
    config          the options of the run, by name (`batch_size`)
    description     model, pe, join_type, global_pool, model_kwargs if there are any, num_classes, classes, input_size,
                    data_set, mean, std, interpolation, eval_crop_ratio

The learning rate is a function of the options, the epoch, the update and the accuracies, and so are order,
augmentations and all other random draws of each process (see `runtime.seeding`): nothing else needs to be kept.
"""

import argparse
from logging import getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from timm.layers import to_2tuple
from timm.models import split_model_name_tag
from torch import Tensor, nn

from runtime.download import fetch, is_url
from runtime.files import atomic_write

_logger = getLogger(__name__)

FORMAT, VERSION = "lape-vit", 1

WEIGHTS, AVERAGES = ("model", "state_dict"), ("model_ema", "state_dict_ema")
"""Names under which code bases save a state dict and the one of its running average; ours come first."""
DESCRIBED = {
    "model": "model",
    "pe": "pe",
    "join_type": "join_type",
    "gp": "global_pool",
    "global_pool": "global_pool",
    "nb_classes": "num_classes",
    "num_classes": "num_classes",
    "img_size": "input_size",
    "input_size": "input_size",
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop_pct": "eval_crop_ratio",
    "eval_crop_ratio": "eval_crop_ratio",
}
"""Options of DeiT's, LaPE's and timm's training that say what a model is, and our names of them; later ones win."""

OF_REGISTERED_WEIGHTS = {
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "label_names", "label_descriptions", "label_offset"),
}
"""What timm's `pretrained_cfg` says of the registered weights, and of no others."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of our format; `path` holds a complete one at every moment.

    Raises:
        OSError: it cannot be written; `path` stays as it was.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, file)
        except RuntimeError as error:  # where a write fails torch raises this on top
            raise OSError(f"{path} cannot be written: {error.__context__ or error}") from error


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, ours, an original's or timm's (`.safetensors` too), to the CPU; it cannot run code.

    Args:
        path: of the file, or the https: URL of one, with its hash (see `runtime.download.fetch`).

    Returns:
        Ours as it was saved; another's with its state dict under `model`, that of its average under `model_ema` if it
        has one, and its `args`, if it has them. Where there is nothing but an average, it is under both.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, a damaged one, one that holds more than data, one of a later version, or a URL
            that is refused.
        OSError: a URL that cannot be downloaded.
    """
    file = fetch(path) if is_url(path) else Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    stream = file.open("rb")  # out here, for its errors say what is wrong; those of a damaged file may not
    try:
        # the original code bases keep their options in the checkpoint, as a Namespace
        with stream, torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = (
                safetensors.torch.load(stream.read())
                if file.suffix == ".safetensors"
                else torch.load(stream, map_location="cpu", weights_only=True)
            )
    except UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than plain data, or is no checkpoint at all") from error
    except Exception as error:  # what is no checkpoint can fail in any way
        raise ValueError(f"{path} is damaged, or no checkpoint at all") from error

    content = _in_our_layout(content, path)
    if content.get("format") == FORMAT and content.get("version") != VERSION:
        raise ValueError(
            f"{path} is a checkpoint of version {content.get('version')}; this code reads version {VERSION}"
        )
    return content


def _in_our_layout(content: Any, path: str) -> dict[str, Any]:
    if _is_state_dict(content):
        return {"model": content}
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint of a model: it holds no state dict")
    weights, average = (
        next((content[name] for name in names if _is_state_dict(content.get(name))), None)
        for names in (WEIGHTS, AVERAGES)
    )
    if weights is None and average is None:
        raise ValueError(f"{path} is no checkpoint of a model: it holds no state dict")
    if weights is None:
        _logger.info("%s holds no weights but their running average, which is taken", path)
    content = {**content, "model": average if weights is None else weights}
    return content if average is None else {**content, "model_ema": average}


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def is_ours(checkpoint: dict[str, Any]) -> bool:
    return checkpoint.get("format") == FORMAT


def description_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its model: its `description` if it is ours, else what its `args` say, if it has any.

    The size of the images is one number where they are square, else [height, width]. Arguments of the model that
    timm's `--model-kwargs` holds, such as `pe`, count as options.
    """
    if is_ours(checkpoint):
        return checkpoint["description"]
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    description = {ours: args[theirs] for theirs, ours in DESCRIBED.items() if args.get(theirs)}
    of_model = args.get("model_kwargs") or {}
    of_model = {name: value for name, value in of_model.items() if value is not None}
    description |= {DESCRIBED.get(name, name): value for name, value in of_model.items()}
    if others := {name: value for name, value in of_model.items() if name not in DESCRIBED}:
        description["model_kwargs"] = others
    if "input_size" in description:
        description["input_size"] = _height_and_width(description["input_size"])
    if "model" in description:
        description["model"], _ = split_model_name_tag(str(description["model"]))
    if description.get("interpolation") == "random":  # timm's, which is for training alone
        del description["interpolation"]
    return {name: value for name, value in description.items() if value is not None}


def _height_and_width(size: Any) -> int | list[int] | None:
    """The size of images from timm's (channels, height, width), a pair or one number: one number if it can be."""
    sides = [size] if isinstance(size, int) else list(size)[-2:]
    if not all(isinstance(side, int) for side in sides):
        return None
    return sides[0] if len(set(sides)) == 1 else sides


def carry_data_config(model: Any, description: dict[str, Any]) -> None:
    """Let a model say how its images are prepared and what its classes are, as its checkpoint describes it.

    timm reads it from `pretrained_cfg`, which says by default how the registered weights are used.
    """
    names = {"mean": "mean", "std": "std", "interpolation": "interpolation", "eval_crop_ratio": "crop_pct"}
    cfg = {name: value for name, value in model.pretrained_cfg.items() if name not in OF_REGISTERED_WEIGHTS}
    said = {theirs: description[ours] for ours, theirs in names.items() if ours in description}
    cfg |= {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    cfg["num_classes"] = model.num_classes
    if "input_size" in description:
        cfg["input_size"] = (cfg["input_size"][0], *to_2tuple(description["input_size"]))
    if "classes" in description:
        cfg["label_names"] = tuple(description["classes"])
    model.pretrained_cfg = model.default_cfg = cfg


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], path: str, name: str) -> None:
    """Load `state_dict`, whose names are ours already, into the model.

    Raises:
        ValueError: weights of another model; names some of them.
    """
    wanted = model.state_dict()
    differences = [f"{key} is missing" for key in wanted.keys() - state_dict.keys()]
    differences += [f"{key} is not of this model" for key in state_dict.keys() - wanted.keys()]
    differences += [
        f"{key} is {tuple(state_dict[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state_dict.keys()
        if wanted[key].shape != state_dict[key].shape
    ]
    if differences:
        few = sorted(differences)[:3]
        rest = f"; and {len(differences) - len(few)} more" if len(differences) > len(few) else ""
        raise ValueError(f"{path} does not fit {name}: {'; '.join(few)}{rest}")
    model.load_state_dict(state_dict)
