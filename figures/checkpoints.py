"""A checkpoint's model: from what the checkpoint says, from flags, and from what timm builds by that name."""

from collections.abc import Mapping
from logging import getLogger
from typing import Any

import timm
from timm.layers import to_2tuple

from lape_vit import VisionTransformer, from_timm
from lape_vit.analysis.timm_positions import timm_grid
from lape_vit.convert import unwrap_names
from lape_vit.encodings import all_options, canonical_name
from training.checkpoint import carry_data_config, description_of, load_checkpoint, load_weights
from training.models import build_described, is_of_models_lape, spelled_for
from training.options import flag_of
from training.sources import in_our_names

_logger = getLogger(__name__)

FLAGS = {"model": "--model_name", "pe": "--pe", "join_type": "--join-type", "input_size": "--input-size"}
"""What a checkpoint may say of its model, and the flags for one that does not; each encoding's options besides."""


def load_model(path: str, flags: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, with its weights (not their running average), and what is known of it.

    Args:
        path: of a checkpoint of ours, of an original, or of timm.
        flags: what the command line says of `FLAGS` and of the encodings' options; None where it says nothing.

    Returns:
        The model in evaluation mode: ours, or timm's where only timm knows the name. Its `pretrained_cfg` says to
        timm's `resolve_data_config` and `save_for_hf` how the checkpoint's images are prepared. And the description:
        what the checkpoint says, with the flags; the key `model` is always there.

    Raises:
        ValueError, OSError: no checkpoint, a flag that contradicts it, something that neither says, other weights, a
            model of timm's whose positions cannot be seen.
    """
    checkpoint = load_checkpoint(path)
    description = complete(description_of(checkpoint), flags, path)
    name = description["model"]
    said = [option for option in ("pe", "join_type", *all_options()) if option in description]
    if not timm.is_model(name):
        raise ValueError(f"unknown {FLAGS['model']} {name!r}: it is neither a model of models_lape nor one of timm")
    if said and not is_of_models_lape(name):
        raise ValueError(f"{', '.join(map(flag_for, said))}: for models of models_lape; {name} is timm's own")
    stored, heads = unwrap_names(checkpoint["model"]), ("head.weight", "head.fc.weight", "classifier.fc.weight")
    model = build_described(description, len(next((stored[key] for key in heads if key in stored), ())))
    if not isinstance(model, VisionTransformer):
        try:
            model = from_timm(model)
        except ValueError:  # a table can be seen all the same
            timm_grid(model)
    state_dict = spelled_for(model, stored)
    own = {key: str(getattr(model, key)) for key in ("pe", "join_type") if hasattr(model, key)}
    load_weights(model, state_dict, path, f"{name} ({', '.join(own.values())})" if own else name)
    if untold := own.keys() - {*said}:
        taken = ", ".join(f"{key}={own[key]}" for key in sorted(untold))
        _logger.info("%s does not say all of its model: %s, as timm builds it", path, taken)
    carry_data_config(model, description)
    return model.eval(), description


def complete(description: Mapping[str, Any], flags: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a checkpoint says of its model, and from the flags what it does not; names in their canonical spelling.

    Raises:
        ValueError: a flag that contradicts the checkpoint, or no model's name in either.
    """
    description = in_our_names(description)
    flags = in_our_names({name: value for name, value in flags.items() if value is not None})
    completed = {name: value for name, value in description.items() if name not in FLAGS}
    for name in (*FLAGS, *all_options()):
        values = [description.get(name), flags.get(name)]
        said, given = (None if value is None else canonical(name, value) for value in values)
        if said is not None and given is not None and said != given:
            raise ValueError(f"{flag_for(name)} {given} contradicts {path}, which has {said}")
        if said is not None or given is not None:
            completed[name] = given if said is None else said
    if "model_kwargs" in flags:
        completed.setdefault("model_kwargs", flags["model_kwargs"])
    if "model" not in completed:
        raise ValueError(f"{path} does not say what model it holds: give {FLAGS['model']}")
    return completed


def flag_for(name: str) -> str:
    return FLAGS.get(name) or flag_of(name)


def canonical(name: str, value: Any) -> Any:
    """The value of `name` in one spelling of those that mean the same."""
    spell: dict[str, Any] = {"pe": canonical_name, "input_size": lambda size: to_2tuple(size)[-2:]}
    return spell[name](value) if name in spell else value
