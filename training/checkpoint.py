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
    description     model, pe, join_type, num_classes, classes, input_size, data_set, mean, std, interpolation,
                    eval_crop_ratio

The learning rate is a function of the options, the epoch, the update and the accuracies, and so are order,
augmentations and all other random draws of each process (see `runtime.seeding`): nothing else needs to be kept.
"""

import argparse
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from runtime.download import fetch, is_url
from runtime.files import atomic_write

FORMAT, VERSION = "lape-vit", 1


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
        Ours as it was saved; another's with its state dict under `model`, and its `args`, if it has them.

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

    if _is_state_dict(content):
        content = {"model": content}
    elif isinstance(content, dict) and "model" not in content and "state_dict" in content:  # of timm's own training
        content = {**content, "model": content["state_dict"]}
    if not (isinstance(content, dict) and _is_state_dict(content.get("model"))):
        raise ValueError(f"{path} is no checkpoint of a model: it holds no state dict")
    if content.get("format") == FORMAT and content.get("version") != VERSION:
        raise ValueError(
            f"{path} is a checkpoint of version {content.get('version')}; this code reads version {VERSION}"
        )
    return content


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def is_ours(checkpoint: dict[str, Any]) -> bool:
    return checkpoint.get("format") == FORMAT


def description_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its model: its `description` if it is ours, else what its `args` say, if it has any."""
    if is_ours(checkpoint):
        return checkpoint["description"]
    names = {
        "model": "model",
        "pe": "pe",
        "join_type": "join_type",
        "nb_classes": "num_classes",
        "input_size": "input_size",
    }
    args = vars(checkpoint["args"]) if isinstance(checkpoint.get("args"), argparse.Namespace) else {}
    return {ours: args[theirs] for theirs, ours in names.items() if args.get(theirs) is not None}


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
