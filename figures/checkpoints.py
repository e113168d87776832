"""The models of `similarity_visualize.py`: of checkpoints, with what the flags say of them."""

from collections.abc import Mapping
from typing import Any

from lape_vit import VisionTransformer
from lape_vit.analysis.timm_positions import check_drawable
from lape_vit.encodings import all_options
from lape_vit.from_checkpoint import (
    OF_MODEL,
    as_ours,
    build_described,
    carry_data_config,
    check_description,
    complete,
    load_described,
)
from training.checkpoint import load_checkpoint
from training.models import build_pretrained, pretrained_cfg
from training.options import flag_of


def load_model(path: str, flags: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, with its weights (not their running average), and what is known of it.

    Args:
        path: of a checkpoint of ours, of an original, or of timm.
        flags: what the command line says of `OF_MODEL` and of the encodings' options; None where it says nothing.

    Returns:
        The model in evaluation mode, see :func:`lape_vit.load`, and the description: what the checkpoint says, with the
        flags; the key `model` is always there.

    Raises:
        ValueError, OSError: no checkpoint, a flag that contradicts it, something that neither says, other weights, a
            model of timm's whose positions cannot be seen.
    """
    given = {name: flags.get(name) for name in (*OF_MODEL, *all_options(), "model_kwargs")}
    model, description = load_described(load_checkpoint(path), path, given, flag_of)
    return drawable(model), description


def load_published(tag: str, flags: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """The model that the flags name, with the weights that timm publishes for it.

    Args:
        tag: of the weights; empty for the model's default, or where the name says it: NAME.TAG.

    Returns:
        The model and its description as of :func:`load_model`, and the full name of the weights.

    Raises:
        ValueError, OSError: a name that timm has no such weights for, weights that cannot be loaded, a model whose
            positions cannot be seen.
    """
    name, _, of_name = flags["model"].partition(".")
    if tag and of_name and tag != of_name:
        raise ValueError(f"--pretrained {tag} contradicts --model {name}.{of_name}")
    given = {option: flags.get(option) for option in (*OF_MODEL, *all_options())}
    description = complete({}, {**given, "model": name}, "--pretrained", flag_of)
    check_description(description, flag_of)
    cfg = pretrained_cfg(name, tag or of_name)
    drawable(as_ours(build_described(description, 0, device="meta")))  # before the weights are downloaded
    model = drawable(as_ours(build_pretrained(description, tag or of_name, cfg.num_classes)))
    carry_data_config(model, description)
    return model.eval(), description, f"{name}.{cfg.tag}"


def drawable(model: Any) -> Any:
    """The model, ours or timm's own; ValueError where there is nothing to see of it."""
    if not isinstance(model, VisionTransformer):
        check_drawable(model)
    return model
