"""The models of a run, built from its options and filled from checkpoints."""

import argparse
from collections.abc import Sequence
from logging import getLogger
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

import models_lape  # noqa: F401  (registers the models)
from datasets import DATA_SETS
from lape_vit import convert_checkpoint, warm_start
from lape_vit.encodings import all_options
from training.checkpoint import description_of, load_checkpoint, load_weights
from training.classes import name_differences, order_of_classes
from training.options import flag_of

_logger = getLogger(__name__)


def build_model(args: argparse.Namespace, num_classes: int, input_size: int | list[int]) -> Any:
    """The model of the options; what they leave open, it decides, and `args` then says the encoding and the join."""
    of_encoding = {name: getattr(args, name) for name in all_options() if getattr(args, name) is not None}
    options = {"pe": args.pe, "join_type": args.join_type, "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        model: Any = timm.create_model(
            args.model, num_classes=num_classes, img_size=to_2tuple(input_size), **options, **of_encoding
        )
    except TypeError as error:
        if not of_encoding:
            raise
        raise ValueError(f"{' '.join(map(flag_of, of_encoding))}: {error}") from error
    patch = model.patch_embed.patch_size
    for side, multiple in zip(to_2tuple(args.input_size), patch, strict=True):
        if side % multiple:  # timm would leave the rest of the image out
            raise ValueError(f"--input-size {side} is no multiple of the {multiple} pixels of {args.model}'s patches")
    vars(args).update(pe=model.pe, join_type=model.join_type, **model.pe_options)
    return model


def weights_of(checkpoint: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The weights of a checkpoint, or their average for `--eval-ema`.

    Raises:
        ValueError: it has no average.
    """
    weights = checkpoint.get("model_ema") if args.eval_ema else checkpoint["model"]
    if weights is None:
        raise ValueError(f"{args.resume} holds no averaged weights: leave --eval-ema out")
    return weights


class ClassMatch(NamedTuple):
    """How the classes of a data set compare with those of a checkpoint."""

    order: list[int] | None
    """Where each class of the data set stands among the checkpoint's; None where these are not the same names."""
    differences: str
    """The names of one side alone; empty where there are none, or where one side has no names."""


def match_classes(classes: Sequence[str], data_set: str, description: dict[str, Any], path: str) -> ClassMatch:
    """Compare the names of a data set's classes with those in the description of the checkpoint at `path`.

    Shards have no names, and neither have the checkpoints of other code bases.
    """
    known = description.get("classes")
    if known is None:
        return ClassMatch(None, "")
    order = order_of_classes(classes, known)
    unnamed = {name for name, entry in DATA_SETS.items() if entry.is_sharded}
    if order is not None or unnamed & {data_set, description.get("data_set")}:
        return ClassMatch(order, "")
    return ClassMatch(None, name_differences(classes, data_set, known, path))


def log_match(match: ClassMatch, data_set: str, path: str) -> None:
    """Log where a class has another number in the checkpoint, and where names could not be compared."""
    if match.order is None:
        _logger.info(
            "%s: its classes cannot be compared by name with those of %s: equal numbers are taken for equal classes",
            path,
            data_set,
        )
    elif match.order != sorted(match.order):
        _logger.info("%s: its classes are those of %s in another order, and matched by name", path, data_set)


def reorder_classifier(
    state_dict: dict[str, torch.Tensor], model: Any, order: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The weights with row `order[label]` of each of the model's classifiers as row `label`."""
    names = classifier_names(model)
    return {name: value[list(order)] if name in names else value for name, value in state_dict.items()}


def classifier_names(model: Any) -> set[str]:
    """The names of the parameters of a model's classifier, or of its two."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    parameters = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}


def load_what_fits(model: Any, checkpoint: dict[str, Any], path: str, data_set: str, classes: Sequence[str]) -> None:
    """Start from the weights of a checkpoint, and say in one line each what is new and what was left out.

    Of a classifier for the same `classes`, each row goes to the class of its name; one for others is left out.

    Raises:
        ValueError: nothing fits.
    """
    weights, match = checkpoint["model"], match_classes(classes, data_set, description_of(checkpoint), path)
    if match.differences:
        _logger.info("%s: its classifier is for other classes and left out: %s", path, match.differences)
        weights = {name: value for name, value in weights.items() if name not in classifier_names(model)}
    elif match.order is not None:
        weights = reorder_classifier(weights, model, match.order)
    size, patch = description_of(checkpoint).get("input_size"), model.patch_embed.patch_size
    grid = None if size is None else tuple(side // cell for side, cell in zip(to_2tuple(size), patch, strict=True))
    try:
        start = warm_start(weights, model, grid)
    except ValueError as error:
        raise ValueError(f"--finetune {path}: {error}") from error
    for line in start.report():
        _logger.info("%s: %s", path, line)
    if not match.differences and not classifier_names(model) <= {*start.new}:
        log_match(match, data_set, path)
    model.load_state_dict(start.state_dict)


def build_teacher(args: argparse.Namespace, classes: Sequence[str]) -> nn.Module:
    """The model to learn from: any of timm or of this project, with the weights of `--teacher-path`.

    Its classes are in the order of `classes`, if its checkpoint names them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown model, other weights, other classes, or another image size.
    """
    name, path = args.teacher_model, args.teacher_path
    if name is None or path is None:
        raise ValueError(
            f"--distillation-type {args.distillation_type} needs --teacher-model NAME and --teacher-path FILE"
        )
    if name not in timm.list_models():
        raise ValueError(f"unknown --teacher-model {name!r}: timm.list_models() lists them")
    checkpoint = load_checkpoint(path)
    match = match_classes(classes, args.data_set, description_of(checkpoint), path)
    if match.differences:
        raise ValueError(f"--teacher-path {path} was trained on other classes: {match.differences}")
    log_match(match, args.data_set, path)
    weights, options = checkpoint["model"], {}
    if name in timm.list_models(module="models_lape"):
        weights, description = convert_checkpoint(weights), description_of(checkpoint)
        options = {key: description[key] for key in ("pe", "join_type", *all_options()) if key in description}
        if "input_size" in description:
            options["img_size"] = to_2tuple(description["input_size"])
    teacher = timm.create_model(name, num_classes=len(classes), **options)
    if match.order is not None:
        weights = reorder_classifier(weights, teacher, match.order)
    load_weights(teacher, weights, f"--teacher-path {path}", f"{name} of {len(classes)} classes")
    size = to_2tuple(args.input_size)
    try:
        with torch.no_grad():
            teacher.eval()(torch.zeros(1, 3, *size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--teacher-model {name} cannot take images of --input-size {size}: {error}") from error
    return teacher


def describe_model(args: argparse.Namespace, classes: Sequence[str]) -> dict[str, Any]:
    """What it takes to build the model and to prepare its images, as plain data."""
    return {
        "model": args.model,
        "pe": args.pe,
        "join_type": args.join_type,
        **{name: getattr(args, name) for name in all_options() if getattr(args, name) is not None},
        "num_classes": len(classes),
        "classes": list(classes),
        "input_size": args.input_size,
        "data_set": args.data_set,
        "mean": list(args.mean),
        "std": list(args.std),
        "interpolation": args.interpolation,
        "eval_crop_ratio": args.eval_crop_ratio,
    }


def freeze_all_but_attention(model: Any) -> None:
    """Leave to training what DeiT III fine-tunes by `--attn-only`: attention, positions and classifier."""
    names, positions = {"pos_embed", *classifier_names(model)}, {id(parameter) for parameter in model.join.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name or name in names or id(parameter) in positions)


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """The compiled form of `model`, which shares its weights and leaves it as it is.

    Raises:
        ValueError: nothing can be compiled here, as where there is no C++ compiler.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # the parts of a compiler raise what they like
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--compile needs a C++ compiler such as g++; install it or leave it out: {reason}") from error
    return cast("nn.Module", torch.compile(model))


def count_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
