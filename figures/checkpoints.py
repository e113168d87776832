"""A checkpoint's model: from what the checkpoint says, from flags, and from what timm builds by that name."""

import re
from collections.abc import Mapping
from logging import getLogger
from typing import Any

import timm
from timm.layers import to_2tuple

from lape_vit import VisionTransformer, from_timm
from lape_vit.analysis.timm_positions import check_drawable
from lape_vit.convert import unwrap_names
from lape_vit.encodings import all_options, canonical_name
from training.checkpoint import carry_data_config, description_of, load_checkpoint, load_weights
from training.models import build_described, build_pretrained, is_of_models_lape, pretrained_cfg, spelled_for
from training.options import flag_of
from training.sources import in_our_names

_logger = getLogger(__name__)

FLAGS = {"model": "--model_name", "pe": "--pe", "join_type": "--join-type", "input_size": "--input-size"}
"""What a checkpoint may say of its model, and the flags for one that does not; each encoding's options besides."""
SHORT_NAME = re.compile(r"deit_(?P<size>[tsb])(?P<distilled>_distill)?_(?P<join>basic|LaPE)")
SIZES = {"t": "tiny", "s": "small", "b": "base"}


def full_name(name: str) -> tuple[str, str | None]:
    """The model's name and the join, from one of the original's short names such as `deit_t_distill_LaPE`; any other
    name comes back as it is, without a join."""
    short = SHORT_NAME.fullmatch(name)
    if short is None:
        return name, None
    distilled = "_distilled" if short["distilled"] else ""
    return f"deit_{SIZES[short['size']]}{distilled}_patch16_224", short["join"]


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
    name, said = description["model"], check_model(description)
    stored, heads = unwrap_names(checkpoint["model"]), ("head.weight", "head.fc.weight", "classifier.fc.weight")
    model = ours_or_drawable(
        build_described(description, len(next((stored[key] for key in heads if key in stored), ())))
    )
    state_dict = spelled_for(model, stored)
    own = {key: str(getattr(model, key)) for key in ("pe", "join_type") if hasattr(model, key)}
    load_weights(model, state_dict, path, f"{name} ({', '.join(own.values())})" if own else name)
    if untold := own.keys() - {*said}:
        taken = ", ".join(f"{key}={own[key]}" for key in sorted(untold))
        _logger.info("%s does not say all of its model: %s, as timm builds it", path, taken)
    carry_data_config(model, description)
    return model.eval(), description


def load_published(tag: str, flags: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """The model that the flags name, with the weights that timm publishes for it; as :func:`load_model`.

    Args:
        tag: of the weights; empty for the model's default, or where the name says it: NAME.TAG.

    Returns:
        The model and its description as of :func:`load_model`, and the full name of the weights.

    Raises:
        ValueError, OSError: no model's name, or one that timm has no such weights for, weights that cannot be loaded, a
            model whose positions cannot be seen.
    """
    if flags.get("model") is None:
        raise ValueError(f"--pretrained needs {FLAGS['model']} NAME: the model whose weights timm publishes")
    name, _, of_name = flags["model"].partition(".")
    if tag and of_name and tag != of_name:
        raise ValueError(f"--pretrained {tag} contradicts {FLAGS['model']} {name}.{of_name}")
    description = complete({}, {**flags, "model": name}, "--pretrained")
    check_model(description)
    cfg = pretrained_cfg(name, tag or of_name)
    ours_or_drawable(build_described(description, 0, device="meta"))  # before the weights are downloaded
    model = ours_or_drawable(build_pretrained(description, tag or of_name, cfg.num_classes))
    return model.eval(), description, f"{name}.{cfg.tag}"


def check_model(description: Mapping[str, Any]) -> list[str]:
    """What a description says of positions, by the options' names.

    Raises:
        ValueError: the name of its model is unknown, or the model takes none of these options.
    """
    name = description["model"]
    said = [option for option in ("pe", "join_type", *all_options()) if option in description]
    if not timm.is_model(name):
        raise ValueError(f"unknown {FLAGS['model']} {name!r}: it is neither a model of models_lape nor one of timm")
    if said and not is_of_models_lape(name):
        raise ValueError(f"{', '.join(map(flag_for, said))}: for models of models_lape; {name} is timm's own")
    return said


def ours_or_drawable(model: Any) -> Any:
    """The model as one of ours if it can be, else as it is.

    Raises:
        ValueError: it cannot be, and has nothing to see.
    """
    if isinstance(model, VisionTransformer):
        return model
    try:
        return from_timm(model)
    except ValueError:  # some positions of timm's own models can be seen all the same
        check_drawable(model)
        return model


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
