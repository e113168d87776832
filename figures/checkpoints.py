"""The models of `similarity_visualize.py`: of checkpoints, with what the flags say of them."""

from collections.abc import Mapping
from typing import Any

from lape_vit import VisionTransformer
from lape_vit.analysis.timm_positions import timm_grid
from lape_vit.encodings import all_options
from lape_vit.from_checkpoint import load_described
from training.checkpoint import load_checkpoint
from training.options import flag_of

FLAGS = {"model": "--model_name", "pe": "--pe", "join_type": "--join-type", "input_size": "--input-size"}
"""What a checkpoint may say of its model, and the flags for one that does not; each encoding's options besides."""


def load_model(path: str, flags: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, with its weights (not their running average), and what is known of it.

    Args:
        path: of a checkpoint of ours, of an original, or of timm.
        flags: what the command line says of `FLAGS` and of the encodings' options; None where it says nothing.

    Returns:
        The model in evaluation mode, see :func:`lape_vit.load`, and the description: what the checkpoint says, with the
        flags; the key `model` is always there.

    Raises:
        ValueError, OSError: no checkpoint, a flag that contradicts it, something that neither says, other weights, a
            model of timm's whose positions cannot be seen.
    """
    given = {name: flags.get(name) for name in (*FLAGS, *all_options(), "model_kwargs")}
    model, description = load_described(load_checkpoint(path), path, given, flag_for)
    if not isinstance(model, VisionTransformer):
        timm_grid(model)  # a table can be seen all the same
    return model, description


def flag_for(name: str) -> str:
    return FLAGS.get(name) or flag_of(name)
