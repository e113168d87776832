"""From a checkpoint to its model: to train and to evaluate, to teach, and to draw."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from torch import Tensor

import models_lape  # noqa: F401  (registers the models)
from lape_vit import convert_checkpoint
from lape_vit.checkpoints import unwrap_names
from lape_vit.encodings import all_options


def is_of_models_lape(name: str) -> bool:
    """Whether a model is one of this project, and not of timm alone."""
    return name in timm.list_models(module="models_lape")


def build_described(description: Mapping[str, Any], num_classes: int, **others: Any) -> Any:
    """The model that a description names, with its encoding, join and input size, and with random weights.

    Args:
        description: `model`, a name of this project or of timm, and what else is known: `pe`, `join_type`, options of
            encodings, `input_size`; None where the model decides.
        others: what `timm.create_model` takes besides.

    Raises:
        ValueError: something that the model does not take.
    """
    name, size = description["model"], description.get("input_size")
    known = ("pe", "join_type", *all_options())
    build = {option: description[option] for option in known if description.get(option) is not None}
    cfg = get_pretrained_cfg(name)
    if size is not None and (is_of_models_lape(name) or (cfg is not None and cfg.fixed_input_size)):
        build["img_size"] = to_2tuple(size)
    try:
        return timm.create_model(name, num_classes=num_classes, **build, **others)
    except TypeError as error:
        said = ", ".join(f"{option}={value}" for option, value in build.items())
        raise ValueError(f"{name} cannot be built with {said}: {error}") from error


def spelled_for(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names that the model of this name gives them."""
    return convert_checkpoint(dict(state_dict)) if is_of_models_lape(name) else unwrap_names(dict(state_dict))
