"""From a checkpoint to a model: the one way of :func:`lape_vit.load` and of every command."""

from collections.abc import Callable, Mapping
from inspect import signature
from logging import getLogger
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from lape_vit.checkpoints import average_of, description_of, in_our_names, read_checkpoint
from lape_vit.convert import convert_checkpoint, unwrap_names
from lape_vit.encodings import all_options, canonical_name
from lape_vit.timm_models import from_timm
from lape_vit.vit import VisionTransformer

_logger = getLogger(__name__)

NOT_OF_MODEL = {*signature(timm.create_model).parameters, "features_only", "out_indices"}
"""Keywords that say what to load or to return, and not what the model is."""
OF_REGISTERED_WEIGHTS = {
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "label_names", "label_descriptions", "label_offset"),
}
"""What timm's `pretrained_cfg` says of the registered weights, and of no others."""
OF_IMAGES = {
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "eval_crop_ratio": "crop_pct",
    "crop_mode": "crop_mode",
}
"""What a description says of images, and timm's names of it."""
HEADS = ("head", "head.fc", "classifier.fc")
"""Classifiers, as our models and the originals name them."""
OF_MODEL = ("model", "pe", "join_type", "input_size")
"""What commands let a user say of a model, each by the flag of its name, besides the encodings' options."""
TIMMS_NAMES = {"model": "model_name", "input_size": "img_size"}
"""What `timm.create_model` calls what a description holds under other names."""


def load(path: str | Path, model_name: str | None = None, *, use_ema: bool = False, **arguments: Any) -> nn.Module:
    """The model of a checkpoint, with its weights, in evaluation mode.

        model = lape_vit.load("runs/lape/best_checkpoint.pth")
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
        names = model.pretrained_cfg["label_names"]

    It is of our class, with ``pe`` and ``join_type``, where the checkpoint's model is or :func:`from_timm` takes it;
    else of timm's own. Its ``pretrained_cfg`` says how the checkpoint's images are prepared (mean, std, size, crop),
    and has the names of its classes under ``label_names``, if the checkpoint knows them. The models of ``models_lape``
    are registered with timm by this call.

    Args:
        path: of a file of this project, of LaPE's code, of DeiT's or timm's training, or of weights alone; or of a
            folder as ``timm.models.save_for_hf`` writes it and the Hub holds it.
        model_name, arguments: what ``timm.create_model`` takes, such as ``pe`` and ``img_size``, for a checkpoint that
            does not say it.
        use_ema: take the averaged weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, something that contradicts it or that neither says, other weights.
    """
    checkpoint = read_checkpoint(path)
    return load_described(checkpoint, str(path), as_description(model_name, arguments), use_ema=use_ema)[0]


def describe(path: str | Path, model_name: str | None = None, **arguments: Any) -> dict[str, Any]:
    """What ``timm.create_model(**description)`` takes to build a checkpoint's model, with random weights.

    Args:
        path, model_name, arguments: as for :func:`load`.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load`.
    """
    checkpoint = read_checkpoint(path)
    description = complete(description_of(checkpoint), as_description(model_name, arguments), str(path))
    return creation_arguments(description, count_classes(checkpoint["model"], description))


def as_description(model_name: str | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller says of a model in timm's names, in those of a description."""
    given = {"model": model_name, "input_size": arguments.get("img_size")}
    given |= {name: arguments[name] for name in ("pe", "join_type", "global_pool", *all_options()) if name in arguments}
    others = {name: value for name, value in arguments.items() if name not in given and name != "img_size"}
    return {**given, **({"model_kwargs": others} if others else {})}


def load_described(
    checkpoint: Mapping[str, Any],
    path: str,
    given: Mapping[str, Any],
    spelled: Callable[[str], str] = lambda name: TIMMS_NAMES.get(name, name),
    use_ema: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint that is read, and what is known of it.

    Args:
        path: where it was read, for messages.
        given: what the checkpoint does not say, by the names of a description; None where it is not known.
        spelled: what a user types for one of these names.
        use_ema: take the averaged weights.

    Returns:
        The model, see :func:`load`, and the description: what the checkpoint says, with what was given.

    Raises:
        ValueError: as for :func:`load`.
    """
    description = complete(description_of(checkpoint), given, path, spelled)
    name, said = description["model"], check_description(description, spelled)
    weights = average_of(checkpoint, path, spelled("use_ema")) if use_ema else checkpoint["model"]
    model = as_ours(build_described(description, count_classes(weights, description)))
    own = {key: str(getattr(model, key)) for key in ("pe", "join_type") if hasattr(model, key)}
    load_weights(model, spelled_for(model, weights), path, f"{name} ({', '.join(own.values())})" if own else name)
    if untold := own.keys() - {*said}:
        taken = ", ".join(f"{key}={own[key]}" for key in sorted(untold))
        _logger.info("%s does not say all of its model: %s, as timm builds it", path, taken)
    carry_data_config(model, description)
    return model.eval(), description


def check_description(description: Mapping[str, Any], spelled: Callable[[str], str]) -> list[str]:
    """What a description says of positions, by the options' names.

    Raises:
        ValueError: the name of its model is unknown, or the model takes none of these options.
    """
    name = description["model"]
    said = [option for option in ("pe", "join_type", *all_options()) if option in description]
    if not is_of_models_lape(name):
        if not timm.is_model(name):
            raise ValueError(
                f"unknown {spelled('model')} {name!r}: it is neither a model of models_lape nor one of timm"
            )
        if said:
            raise ValueError(f"{', '.join(map(spelled, said))}: for models of models_lape; {name} is timm's own")
    return said


def as_ours(model: nn.Module) -> nn.Module:
    """The model as one of our class where :func:`from_timm` takes it, else as it is."""
    if isinstance(model, VisionTransformer):
        return model
    try:
        return from_timm(model)
    except ValueError:  # timm's own serves as it is
        _logger.debug("%s stays timm's", type(model).__name__)
        return model


def complete(
    description: Mapping[str, Any],
    given: Mapping[str, Any],
    path: str,
    spelled: Callable[[str], str] = lambda name: TIMMS_NAMES.get(name, name),
) -> dict[str, Any]:
    """What a checkpoint says of its model, and what is given where it says nothing; names in their canonical spelling.

    Raises:
        ValueError: something given that contradicts the checkpoint, or no model's name in either.
    """
    description = in_our_names(description)
    given = in_our_names({name: value for name, value in given.items() if value is not None})
    completed = {**given, **description}
    for name in given.keys() - {"model_kwargs"}:
        completed[name] = canonical(name, completed[name])
        if name in description and canonical(name, given[name]) != completed[name]:
            raise ValueError(
                f"{spelled(name)} {canonical(name, given[name])} contradicts {path}, which has {completed[name]}"
            )
    arguments, said = (values.get("model_kwargs") or {} for values in (given, description))
    for name in arguments.keys() & said.keys():
        if arguments[name] != said[name]:
            raise ValueError(f"{name} {arguments[name]} contradicts {path}, which has {said[name]}")
    if arguments or said:
        completed["model_kwargs"] = {**arguments, **said}
    if "model" not in completed:
        raise ValueError(f"{path} does not say what model it holds: give {spelled('model')}")
    return completed


def canonical(name: str, value: Any) -> Any:
    """The value of `name` in one spelling of those that mean the same."""
    spell: dict[str, Any] = {"pe": canonical_name, "input_size": lambda size: to_2tuple(size)[-2:]}
    return spell[name](value) if name in spell else value


# ---- from a description to a model


def is_of_models_lape(name: str) -> bool:
    """Whether a model is one of this project, and not of timm alone."""
    import models_lape  # noqa: F401  registers the models

    return name in timm.list_models(module="models_lape")


def creation_arguments(description: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """What `timm.create_model` takes to build the model that a description names.

    Args:
        description: `model`, a name of this project or of timm, and what else is known: `pe`, `join_type`, options of
            encodings, `global_pool`, `input_size`, `model_kwargs`; None where the model decides.

    Raises:
        ValueError: arguments that do not say what the model is.
    """
    name, size = description["model"], description.get("input_size")
    arguments = dict(description.get("model_kwargs") or {})
    if refused := NOT_OF_MODEL & arguments.keys():
        raise ValueError(f"{', '.join(sorted(refused))}: leave it out; it does not say what the model is")
    known = ("pe", "join_type", "global_pool", *all_options())
    arguments |= {option: description[option] for option in known if description.get(option) is not None}
    is_ours, cfg = is_of_models_lape(name), get_pretrained_cfg(name)
    if size is not None and (is_ours or (cfg is not None and cfg.fixed_input_size)):
        arguments["img_size"] = to_2tuple(size)
    return {"model_name": name, "num_classes": num_classes, **arguments}


def build_described(description: Mapping[str, Any], num_classes: int, **others: Any) -> Any:
    """The model that a description names, see :func:`creation_arguments`, with random weights.

    Args:
        others: what `timm.create_model` takes besides.

    Raises:
        ValueError: something that the model does not take.
    """
    arguments = creation_arguments(description, num_classes)
    try:
        return timm.create_model(**{**arguments, **others})
    except Exception as error:  # what arguments do inside timm can fail in any way
        name, of_user = arguments.pop("model_name"), description.get("model_kwargs") or "global_pool" in arguments
        if not (isinstance(error, TypeError) or of_user):
            raise
        said = ", ".join(f"{option}={value}" for option, value in arguments.items() if option != "num_classes")
        raise ValueError(f"{name} cannot be built with {said}: {str(error) or type(error).__name__}") from error


def count_classes(state_dict: Mapping[str, Tensor], description: Mapping[str, Any]) -> int:
    """The number of classes of a checkpoint: of its classifier's rows; else what it says; 0 where there is none."""
    cfg, stored = get_pretrained_cfg(description["model"]), unwrap_names(dict(state_dict))
    timms = getattr(cfg, "classifier", None) or ()
    heads = (*HEADS, *((timms,) if isinstance(timms, str) else timms))
    found = next((len(stored[f"{head}.weight"]) for head in heads if f"{head}.weight" in stored), None)
    return description.get("num_classes", 0) if found is None else found


def spelled_for(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names that a model gives them."""
    is_ours = isinstance(model, VisionTransformer)
    return convert_checkpoint(dict(state_dict), model) if is_ours else unwrap_names(dict(state_dict))


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], path: str, name: str) -> None:
    """Load `state_dict`, whose names are the model's already, into the model.

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


def carry_data_config(model: Any, description: Mapping[str, Any]) -> None:
    """Let a model say how its images are prepared and what its classes are, as its checkpoint describes it.

    timm reads it from `pretrained_cfg`, which says by default how the registered weights are used.
    """
    cfg = {name: value for name, value in model.pretrained_cfg.items() if name not in OF_REGISTERED_WEIGHTS}
    said = {theirs: description[ours] for ours, theirs in OF_IMAGES.items() if ours in description}
    cfg |= {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    cfg["num_classes"] = model.num_classes
    if "input_size" in description:
        cfg["input_size"] = (cfg["input_size"][0], *to_2tuple(description["input_size"]))
    if "classes" in description:
        cfg["label_names"] = tuple(description["classes"])
    model.pretrained_cfg = model.default_cfg = cfg
