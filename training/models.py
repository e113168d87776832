"""The models of a run: from its options, from what timm publishes, from a checkpoint to start from, and to teach."""

import re
from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from torch import nn

import models_lape  # noqa: F401  (registers the models)
from datasets import DATA_SETS
from lape_vit import VisionTransformer, from_timm, warm_start
from lape_vit.checkpoints import description_of
from lape_vit.convert import grid_of
from lape_vit.encodings import ENCODINGS, FAMILIES
from lape_vit.from_checkpoint import build_described, is_of_models_lape, load_weights, spelled_for
from loading.classes import name_differences, order_of_classes
from loading.images import ImageSettings
from loading.transforms import takes_whole_image
from training.checkpoint import load_checkpoint
from training.options import AugmentationOptions, Options

_logger = getLogger(__name__)


def check_name(name: str) -> None:
    """See that a model may be trained here.

    Raises:
        ValueError: it may not; lists those that may.
    """
    if not is_of_models_lape(name):
        known = timm.list_models(module="models_lape")
        raise ValueError(f"unknown --model {name!r}: choose from {', '.join(known)}")


def pretrained_cfg(name: str, tag: str, flag: str = "--pretrained") -> Any:
    """What timm says of the weights that it publishes for a model: their size, classes and images.

    Args:
        tag: empty for the model's default.

    Raises:
        ValueError: it publishes none under this tag; lists those that it does.
    """
    known = timm.list_pretrained(f"{name}.*")
    if not known or (tag and f"{name}.{tag}" not in known):
        tags = ", ".join(full.removeprefix(f"{name}.") for full in known) or "none"
        raise ValueError(f"{flag} {tag or name}: timm publishes no such weights; its tags of {name}: {tags}")
    return get_pretrained_cfg(f"{name}.{tag}" if tag else name)


def build_pretrained(
    description: Mapping[str, Any], tag: str, num_classes: int, flag: str = "--pretrained", **others: Any
) -> Any:
    """As `build_described`, with the weights that timm publishes for the model under `tag`.

    Raises:
        ValueError: something that the model does not take, or a tag that timm does not know.
        OSError: the weights cannot be loaded.
    """
    name = description["model"]
    cfg = pretrained_cfg(name, tag, flag)
    build_described(description, num_classes, device="meta", **others)  # what is wrong with the model is told by itself
    try:
        return build_described(description, num_classes, pretrained=True, pretrained_cfg=cfg, **others)
    except Exception as error:  # a download can fail in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        instead = "; --pretrained none starts from random weights" if flag == "--pretrained" else ""
        raise OSError(f"{flag} {tag or name}: the weights of timm's cannot be loaded: {reason}{instead}") from error


def log_nameless(model: Any, num_classes: int) -> None:
    """Log where the classes of published weights, which have no names, are taken for those of the data."""
    if model.pretrained_cfg["num_classes"] == num_classes:
        name = model.pretrained_cfg["architecture"]
        _logger.info("the weights of %s name no classes: equal numbers are taken for equal classes", name)


def encoding_table(model: str) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """A row for each encoding: family, options with their defaults, parameters that it adds to a model, and source.

    Returns:
        The rows, and the names of the columns that hold no numbers.

    Raises:
        ValueError: an unknown model.
    """
    check_name(model)

    def count(pe: str) -> int:
        return count_parameters(timm.create_model(model, pe=pe, device="meta"))

    without, rows = count("none"), []
    for name, encoding in ENCODINGS.items():
        family = next((family for family, members in FAMILIES.items() if issubclass(encoding, members)), "")
        options = ", ".join(f"{option}={default}" for option, default in encoding.options().items())
        try:
            parameters = f"{count(name) - without:,}"
        except ValueError:  # a width that the encoding cannot divide
            parameters = "not for this width"
        source = re.search(r"arxiv\.org/abs/[\d.]+\d", encoding.__doc__ or "")
        row = {"pe": name, "family": family, "options": options, "parameters": parameters}
        rows.append({**row, "source": source.group() if source else ""})
    return rows, ("pe", "family", "options", "source")


def build_model(
    options: Options, num_classes: int, input_size: int | Sequence[int], tag: str | None = None
) -> tuple[Any, Options]:
    """The model of the options, and the options with what they left to the model: encoding, join and pooling.

    Args:
        tag: of the weights of timm's to start from; what is new and what was left out is logged. None: random weights.

    Raises:
        ValueError: something that the model does not take, or a tag that timm does not know.
        OSError: weights that cannot be loaded.
    """
    wanted = options.model
    if (channels := (wanted.model_kwargs or {}).get("in_chans", 3)) != 3:
        raise ValueError(f"--model-kwargs in_chans={channels}: leave it out, images have three channels here")
    description = {
        "model": wanted.model,
        "pe": wanted.pe,
        "join_type": wanted.join_type,
        "global_pool": wanted.global_pool,
        "model_kwargs": wanted.model_kwargs,
        "input_size": input_size,
    }
    rates: dict[str, Any] = {"drop_rate": wanted.drop, "drop_path_rate": wanted.drop_path}
    rates = {name: value for name, value in rates.items() if value is not None}
    moves = {name: getattr(options.augmentation, name) for name in ("pos_shift", "pos_jitter", "pos_rescale")}
    rates |= {name: value for name, value in moves.items() if value != getattr(AugmentationOptions, name)}
    description |= wanted.encoding
    if tag is None:
        model = build_described(description, num_classes, **rates)
    else:
        model = build_pretrained(description, tag, num_classes, **rates)
        log_nameless(model, num_classes)
    if not isinstance(model, VisionTransformer):  # with neither an encoding nor a join it is timm's own
        model = from_timm(model)
    patch = model.patch_embed.patch_size
    for side, multiple in zip(to_2tuple(wanted.input_size), patch, strict=True):
        if side % multiple:  # timm would leave the rest of the image out
            raise ValueError(f"--input-size {side} is no multiple of the {multiple} pixels of {wanted.model}'s patches")
    own = {"pe": model.pe, "join_type": model.join_type}
    return model, options.changed(**own, **model.pe_options)


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
    size = description_of(checkpoint).get("input_size")
    try:
        start = warm_start(weights, model, None if size is None else grid_of(size, weights, model))
    except ValueError as error:
        raise ValueError(f"--finetune {path}: {error}") from error
    for line in start.report():
        _logger.info("%s: %s", path, line)
    if not match.differences and not classifier_names(model) <= {*start.new}:
        log_match(match, data_set, path)
    model.load_state_dict(start.state_dict)


def build_teacher(options: Options, classes: Sequence[str]) -> nn.Module:
    """The model to learn from: any of timm or of this project, with the weights of `--teacher-path`.

    Without a path, a name with a tag of timm's, NAME.TAG, has the weights that timm publishes under it. Its classes are
    in the order of `classes`, if its checkpoint names them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown model, other weights, other classes, or another image size.
    """
    distillation = options.distillation
    name, path = distillation.teacher_model, distillation.teacher_path
    name, _, tag = (name or "").partition(".")
    if not name or not (path or tag):
        raise ValueError(
            f"--distillation-type {distillation.distillation_type} needs --teacher-model NAME and --teacher-path FILE"
        )
    if name not in timm.list_models():
        raise ValueError(f"unknown --teacher-model {name!r}: timm.list_models() lists them")
    if path is None:
        teacher = build_published_teacher(name, tag, len(classes))
    else:
        teacher = build_own_teacher(name, path, options.data.data_set, classes)
    size = to_2tuple(options.model.input_size)
    try:
        with torch.no_grad():
            teacher.eval()(torch.zeros(1, 3, *size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--teacher-model {name} cannot take images of --input-size {size}: {error}") from error
    return teacher


def build_published_teacher(name: str, tag: str, num_classes: int) -> Any:
    """The teacher with the weights that timm publishes under a tag.

    Raises:
        ValueError: no such weights, or weights for another number of classes.
        OSError: they cannot be loaded.
    """
    published = pretrained_cfg(name, tag, "--teacher-model").num_classes
    if published != num_classes:
        raise ValueError(f"--teacher-model {name}.{tag} is for {published} classes, and the data has {num_classes}")
    teacher = build_pretrained({"model": name}, tag, num_classes, "--teacher-model")
    log_nameless(teacher, num_classes)
    return teacher


def build_own_teacher(name: str, path: str, data_set: str, classes: Sequence[str]) -> Any:
    """The teacher with the weights of a checkpoint, in the order of `classes` if the checkpoint names its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other weights, or other classes.
    """
    checkpoint = load_checkpoint(path)
    description = description_of(checkpoint)
    match = match_classes(classes, data_set, description, path)
    if match.differences:
        raise ValueError(f"--teacher-path {path} was trained on other classes: {match.differences}")
    log_match(match, data_set, path)
    teacher = build_described({**description, "model": name}, len(classes))
    weights = spelled_for(teacher, checkpoint["model"])
    if match.order is not None:
        weights = reorder_classifier(weights, teacher, match.order)
    load_weights(teacher, weights, f"--teacher-path {path}", f"{name} of {len(classes)} classes")
    return teacher


def describe_model(built: Any, options: Options, images: ImageSettings, classes: Sequence[str]) -> dict[str, Any]:
    """What it takes to build the model of these options once more and to prepare its images, as plain data."""
    model, data = options.model, options.data
    is_whole = takes_whole_image(images.input_size, DATA_SETS[data.data_set].small)
    return {
        "model": model.model,
        "pe": model.pe,
        "join_type": model.join_type,
        **{name: value for name, value in model.encoding.items() if value is not None},
        "global_pool": built.global_pool,
        **({"model_kwargs": dict(model.model_kwargs)} if model.model_kwargs else {}),
        "num_classes": len(classes),
        "classes": list(classes),
        "input_size": model.input_size,
        "data_set": data.data_set,
        "mean": list(images.mean),
        "std": list(images.std),
        "interpolation": data.interpolation,
        "eval_crop_ratio": 1.0 if is_whole else data.eval_crop_ratio,
        "crop_mode": "squash" if is_whole else "center",  # timm's names
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
        raise ValueError(
            f"--compile does not work here: {reason}; leave it out, or install what it needs, such as g++"
        ) from error
    return cast("nn.Module", torch.compile(model))


def count_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
