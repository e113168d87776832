"""Checkpoint files, ours and other code bases': what they hold, and what they say of their model.

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
                    data_set, mean, std, interpolation, eval_crop_ratio, crop_mode

The learning rate is a function of the options, the epoch, the update and the accuracies, and so are order,
augmentations and all other random draws of each process: nothing else needs to be kept.
"""

import argparse
import json
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from timm.models import split_model_name_tag
from torch import Tensor

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
    "label_names": "classes",
    "img_size": "input_size",
    "input_size": "input_size",
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop_pct": "eval_crop_ratio",
    "eval_crop_ratio": "eval_crop_ratio",
    "crop_mode": "crop_mode",
}
"""Options of DeiT's, LaPE's and timm's training that say what a model is, and our names of them; later ones win."""
OF_IMAGES = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
"""What `pretrained_cfg` in a folder of the Hub says of the images and the classes."""
HUB_CONFIG, HUB_WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
"""The files of such a folder; of the weights, the first that is there is read."""

LAYER_SCALE = {"init_values": 1e-4}
"""Of the models named `_LS`; those of timm, with which DeiT III's weights are fine-tuned, start at 1e-6."""
MODELS: dict[str, dict[str, Any]] = {
    f"deit_{name}_LS": {"model": f"deit3_{name}_224", "model_kwargs": LAYER_SCALE}
    for name in ("small_patch16", "medium_patch16", "base_patch16", "large_patch16", "huge_patch14")
}
MODELS |= {
    f"rope_{kind}_{ape}deit_{size}_patch16_LS": {
        **MODELS[f"deit_{size}_patch16_LS"],
        "pe": f"{'learnable+' if ape else ''}rope_{kind}",
    }
    for kind in ("axial", "mixed")
    for ape in ("", "ape_")
    for size in ("small", "base", "large")
}
"""Models of DeiT III's code and of RoPE-ViT's, by their names there: the options that make them here."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ours, an original's or timm's, to the CPU; it cannot run code.

    Args:
        path: of a file (`.safetensors` or what `torch.save` writes), or of a folder as `timm.models.save_for_hf` writes
            it and the Hub holds it.

    Returns:
        Ours as it was saved; another's with its state dict under `model`, that of its average under `model_ema` if it
        has one, and its `args`, if it has them. Where there is nothing but an average, it is under both. Of a folder,
        what its `config.json` says is under `args`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, a damaged one, one that holds more than data, or one of a later version.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _read_hub_folder(file)
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


def _read_hub_folder(folder: Path) -> dict[str, Any]:
    weights = next((folder / name for name in HUB_WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not (folder / HUB_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} is a folder without {HUB_CONFIG} and {' or '.join(HUB_WEIGHTS)}, as timm writes them for the "
            "Hub: name a checkpoint file"
        )
    try:
        config = json.loads((folder / HUB_CONFIG).read_text(encoding="utf-8"))
        cfg, arguments = (dict(config.get(name) or {}) for name in ("pretrained_cfg", "model_args"))
        args = {"model": config["architecture"], "model_kwargs": arguments}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / HUB_CONFIG} is damaged, or not timm's ({type(error).__name__}: {error})"
        ) from error
    said = {**cfg, **{name: config[name] for name in ("label_names", "num_classes") if name in config}}
    args |= {name: said[name] for name in (*OF_IMAGES, "num_classes") if name in said}
    return {"model": read_checkpoint(weights)["model"], "args": args}


def _in_our_layout(content: Any, path: str | Path) -> dict[str, Any]:
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


def is_ours(checkpoint: Mapping[str, Any]) -> bool:
    return checkpoint.get("format") == FORMAT


def average_of(checkpoint: Mapping[str, Any], path: str | Path, leave_out: str) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint.

    Args:
        leave_out: what asks for them.

    Raises:
        ValueError: it has none.
    """
    average = checkpoint.get("model_ema")
    if average is None:
        raise ValueError(f"{path} holds no averaged weights: leave {leave_out} out")
    return average


def description_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
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
    if isinstance(description.get("classes"), dict):  # as the Hub may have them, by number
        description["classes"] = list(description["classes"].values())
    if description.get("interpolation") == "random":  # timm's, which is for training alone
        del description["interpolation"]
    return {name: value for name, value in description.items() if value is not None}


def _height_and_width(size: Any) -> int | list[int] | None:
    """The size of images from timm's (channels, height, width), a pair or one number: one number if it can be."""
    sides = [size] if isinstance(size, int) else list(size)[-2:]
    if not all(isinstance(side, int) for side in sides):
        return None
    return sides[0] if len(set(sides)) == 1 else sides


def in_our_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """These options, with a model that has a source's name spelt out: the model, its encoding, and its arguments.

    Raises:
        ValueError: another encoding than the name's.
    """
    known = MODELS.get(values.get("model", ""))
    if known is None:
        return dict(values)
    pe = values.get("pe")
    if pe is not None and known.get("pe", pe) != pe:
        raise ValueError(
            f"--pe {pe} contradicts --model {values['model']}, which has {known['pe']}: give --model {known['model']}"
        )
    arguments = {**known["model_kwargs"], **(values.get("model_kwargs") or {})}
    return {**values, **known, "model_kwargs": arguments}
