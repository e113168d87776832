"""From the command line to a run that can start: all that can be wrong with its input is found here."""

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from datasets import DATA_SETS, REPEATS, ImageLoader, build_dataset, build_loader, canonical_data_set
from lape_vit import convert_checkpoint
from lape_vit.encodings import all_options, canonical_name
from model_setup import (
    build_model,
    build_teacher,
    compile_model,
    count_parameters,
    describe_model,
    freeze_all_but_attention,
    load_what_fits,
    log_match,
    match_classes,
    weights_of,
)
from training import distributed
from training.checkpoint import description_of, is_ours, load_checkpoint, load_weights
from training.distributed import World
from training.download import is_url
from training.events import Events
from training.files import find_checkpoint, open_output_dir, read_log, write_text
from training.logs import LoopDisplay
from training.optimisation import images_per_update, learning_rate
from training.options import (
    OptionParser,
    build_parser,
    config_text,
    describe,
    find_recipe,
    flag_of,
    read_recipe,
    saved_options,
)
from training.seeding import seed_everything
from training.shards import runs_commands
from training.state import TrainingState, build_state, restore_progress, restore_state

_logger = getLogger(__name__)

FIXED = ("model", "pe", "join_type", "input_size", *all_options())
"""Options that a checkpoint decides."""
FOR_EVALUATION = (
    "data_set",
    "data_path",
    "eval_data_path",
    "inat_category",
    "batch_size",
    "num_workers",
    "amp_dtype",
    "interpolation",
    "eval_crop_ratio",
)
"""Options that evaluation takes over from the training, to repeat what the training measured."""
SLOW_AVERAGE = 0.1
"""Part of the first weights above which the final average is called slow."""


@dataclass
class Training:
    """What training needs besides what evaluation needs."""

    model: nn.Module  # the run's, wrapped for several processes, and compiled
    state: TrainingState
    loader: ImageLoader
    updates: int  # per epoch
    config: dict[str, Any]  # the options to save
    events: Events | None = None  # for TensorBoard
    unsaved: str = ""  # why the last checkpoint could not be saved


@dataclass
class Run:
    """What a run works with, in this process."""

    args: argparse.Namespace
    world: World
    device: torch.device
    display: LoopDisplay
    model: nn.Module
    description: dict[str, Any]
    test_loader: ImageLoader
    num_test_images: int
    training: Training | None = None
    output_dir: Path | None = None  # in the main process, which alone writes


def set_up(argv: Sequence[str], world: World, display: LoopDisplay) -> Run:
    """Read the options, the data, the checkpoint and the model.

    Raises:
        ValueError, OSError: something is wrong with the input; the message says what, where, and what to do.
    """
    parser = build_parser(all_options())
    given = read_given(parser, argv)
    if given.get("auto_resume"):
        checkpoint = find_checkpoint(given)
    else:
        checkpoint = load_checkpoint(given["resume"]) if "resume" in given else {}
    description = description_of(checkpoint)
    args, start = resolve_given(parser, given, checkpoint)
    if args.tensorboard and not args.eval and args.output_dir is None:
        raise ValueError("--tensorboard needs --output_dir DIR, to write to DIR/tensorboard")
    device = distributed.pick_device(args.device, world)
    resolve_device_options(args, device)
    if args.deterministic:
        distributed.make_deterministic()
    distributed.check_size(args.world_size, world)
    distributed.start(world, device, args.dist_url, args.init_timeout)
    check_same_start(args, checkpoint, world, device)

    test_set, classes = build_dataset(False, args, description.get("classes"))
    if checkpoint:
        classes = classes_of_model(args, classes, description)
    seed_everything(args.seed)  # every process makes the same model
    model = build_model(args, len(classes), description.get("input_size", args.input_size))
    if checkpoint:
        name = f"{args.model} with {args.pe} and {args.join_type}"
        load_weights(model, convert_checkpoint(weights_of(checkpoint, args)), args.resume, name)
        model.set_input_size(img_size=to_2tuple(args.input_size))
    if start:
        load_what_fits(model, start, args.finetune, args.data_set, classes)
    run = Run(
        args=args,
        world=world,
        device=device,
        display=display,
        model=model.to(device),
        description=describe_model(args, classes),
        test_loader=build_loader(test_set, False, args, world.rank, world.size),
        num_test_images=len(test_set),
    )
    if not args.eval:
        run.training = set_up_training(run, parser, checkpoint)
    if world.is_main:
        run.output_dir = open_output_dir(args)
        introduce(run, parser, given)
        if run.training is not None and run.output_dir is not None:
            text = config_text(run.training.config, shlex.join(["main.py", *argv]))
            write_text(run.output_dir / "config.yaml", text)
    if run.training is not None and args.tensorboard:
        run.training.events = start_events(run, run.training)
    return run


def classes_of_model(args: argparse.Namespace, classes: list[str], description: dict[str, Any]) -> list[str]:
    """The names of the classes of a checkpoint's model, in its order; the data set's where it has none.

    Raises:
        ValueError: the data set has other classes.
    """
    match = match_classes(classes, args.data_set, description, args.resume)
    expected = description.get("num_classes", len(classes))
    names = f": {match.differences}" if match.differences else ""
    if expected != len(classes):
        raise ValueError(
            f"{args.data_set} has {len(classes)} classes, but the model of {args.resume} has {expected}{names}"
        )
    if names:
        raise ValueError(f"{args.data_set} has other classes than the model of {args.resume}{names}")
    log_match(match, args.data_set, args.resume)
    if match.order is None and not DATA_SETS[args.data_set].is_sharded:
        return classes
    return description.get("classes", classes)


def read_given(parser: OptionParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that a command line names, with the data set's own name.

    Raises:
        ValueError: an unknown flag, an illegal value, or flags that contradict each other.
    """
    given = parser.read(argv)
    if given.get("eval") and "resume" not in given:
        raise ValueError("--eval needs --resume FILE, the checkpoint to evaluate")
    if given.get("eval_ema") and not given.get("eval"):
        raise ValueError("--eval-ema says what --eval evaluates: give both")
    if "data_set" in given:
        given["data_set"] = canonical_data_set(given["data_set"])
    if "finetune" in given and "resume" in given:
        raise ValueError("--finetune starts a run and --resume goes on with one: give one of them")
    if "start_epoch" in given and ("resume" in given or given.get("auto_resume")):
        raise ValueError("--start-epoch is for a run that starts; --resume goes on where its checkpoint was")
    if is_url(given.get("resume", "")) and not given.get("eval") and "output_dir" not in given:
        raise ValueError(f"--resume {given['resume']} needs --output_dir DIR, where the training goes on")
    if given.get("eval") and given.get("tensorboard"):
        raise ValueError("--tensorboard shows how a training goes: leave it out with --eval")
    return given


def resolve_given(
    parser: OptionParser, given: dict[str, Any], checkpoint: dict[str, Any]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """All options, but for those that the device decides, and the checkpoint to fine-tune, empty if there is none.

    Raises:
        ValueError, OSError: an unknown name or file, or an option that contradicts the checkpoint to go on with.
    """
    recipe = pick_recipe(parser, given, checkpoint)
    finetune = None if checkpoint else {**recipe, **given}.get("finetune")
    start = load_checkpoint(finetune) if finetune else {}
    args = resolve_options(parser, given, recipe, description_of(checkpoint), description_of(start))
    refuse_foreign_commands(args, given)
    if args.resplit:
        raise ValueError(
            "--resplit spares a clean augmentation split from erasing, but DeiT, whose flag it is, makes no splits: it "
            "never had an effect, so leave it out"
        )
    return args, start


def start_events(run: Run, training: Training) -> Events:
    """What writes for TensorBoard, if this is the main process, from where the training is."""
    folder = None if run.output_dir is None else run.output_dir / "tensorboard"
    return Events(folder, training.state.epoch, training.state.progress, training.updates)


def refuse_foreign_commands(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """See that no checkpoint or recipe, which may come from anyone, runs a command.

    Raises:
        ValueError: one would.
    """
    for name in {"data_path", "eval_data_path"} - given.keys():
        pattern = getattr(args, name)
        if pattern is not None and DATA_SETS[args.data_set].is_sharded and runs_commands(pattern):
            raise ValueError(
                f"{args.recipe} asks for {flag_of(name)} {pattern}: a command is run only if the command line has it: "
                "repeat it there if you trust it"
            )


def check_same_start(args: argparse.Namespace, checkpoint: dict[str, Any], world: World, device: torch.device) -> None:
    """See that all processes go on from the same place.

    Raises:
        ValueError: they do not.
    """
    is_training = bool(checkpoint) and not args.eval and is_ours(checkpoint)
    place = [checkpoint["epoch"], checkpoint["progress"]["counts"]["step"]] if is_training else [-1, -1]
    if len({tuple(found) for found in distributed.gather_over_ranks(place, world, device)}) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {args.output_dir}: name a folder that all of them share"
        )


def resolve_options(
    parser: OptionParser,
    given: dict[str, Any],
    recipe: dict[str, Any],
    description: dict[str, Any],
    start: dict[str, Any],
) -> argparse.Namespace:
    """All options: what was given, else what the checkpoint is of, else the recipe, else the default; canonical names.

    Args:
        description: of the checkpoint to evaluate or to go on with, which nothing may contradict.
        start: the description of the checkpoint to fine-tune, which goes before the recipe; it binds to nothing.

    Raises:
        ValueError: an unknown name, or an option that contradicts the checkpoint; names both values.
    """
    for options in (given, description, start):
        if options.get("pe") is not None:
            options["pe"] = canonical_name(options["pe"])
    fixed = {name: description[name] for name in FIXED if name in description}
    may_change = {"input_size"} if given.get("eval") else set()
    for name in (fixed.keys() & given.keys()) - may_change:
        if given[name] != fixed[name]:
            raise ValueError(f"{flag_of(name)} {given[name]} contradicts {given['resume']}, which has {fixed[name]}")

    model = {name: start[name] for name in FIXED if name in start}
    if given.get("pe", model.get("pe")) != model.get("pe"):
        model = {name: value for name, value in model.items() if name not in all_options()}
    args = argparse.Namespace(**{**parser.defaults, **recipe, **model, **fixed, **given})
    if args.resume and not args.eval and args.output_dir is None:
        args.output_dir = str(Path(args.resume).parent)
    if args.model not in (known := timm.list_models(module="models_lape")):
        raise ValueError(f"unknown --model {args.model!r}: choose from {', '.join(known)}")
    if args.input_size is None:
        cfg = timm.models.get_pretrained_cfg(args.model)
        assert cfg is not None  # all models of models_lape have one
        args.input_size = cfg.input_size[-1]
    args.data_set = canonical_data_set(args.data_set)
    data_set = DATA_SETS[args.data_set]
    args.data_path = args.data_path or data_set.default_data_path
    args.num_classes = description.get("num_classes")  # else the data set's
    args.mean, args.std = description.get("mean", data_set.mean), description.get("std", data_set.std)
    return args


def pick_recipe(parser: OptionParser, given: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Options, with their source as `recipe`: of the recipe asked for, else of the checkpoint, else of the data set."""
    if "recipe" in given:
        return {**read_recipe(parser, find_recipe(given["recipe"])), "recipe": given["recipe"]}
    if "config" in checkpoint:
        saved = dict(checkpoint["config"])
        if given.get("data_set", saved["data_set"]) != saved["data_set"]:
            saved |= {"data_path": None, "eval_data_path": None, "inat_category": None}  # are of the other data set
        options = {name: saved[name] for name in FOR_EVALUATION if name in saved} if given.get("eval") else saved
        return {**options, "recipe": given["resume"]}
    name = DATA_SETS[given.get("data_set", parser.defaults["data_set"])].recipe
    return {**read_recipe(parser, find_recipe(name)), "recipe": name}


def resolve_device_options(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in the options whose default depends on the device."""
    on_gpu = device.type == "cuda"
    args.device = args.device or device.type
    if args.amp_dtype is None:
        args.amp_dtype = (
            ("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16")
            if on_gpu
            else "float32"
        )
    if args.pin_mem is None:
        args.pin_mem = on_gpu


def set_up_training(run: Run, parser: OptionParser, checkpoint: dict[str, Any]) -> Training:
    """The training data and the state of the training, restored from the checkpoint if there is one."""
    args, world = run.args, run.world
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    if not args.train_mode and (args.drop or args.drop_path):
        _logger.warning("--drop and --drop-path are without effect under --no-train-mode")
    if args.attn_only:
        freeze_all_but_attention(run.model)
    classes = run.description["classes"]
    train_set, _ = build_dataset(True, args, classes)
    loader = build_loader(train_set, True, args, world.rank, world.size)
    updates = len(loader) // args.accum_steps
    teacher = None if args.distillation_type == "none" else build_teacher(args, classes).to(run.device)
    state = build_state(args, run.model, len(classes), updates, world.size, teacher)
    if checkpoint:
        restore_state(state, checkpoint, args)
        loader.num_skipped = restore_progress(state, checkpoint["progress"], updates, world)
        tell_another_order(args, state, checkpoint, world)
        if world.is_main:
            state.rows = read_log(Path(args.output_dir) / "log.txt", state.epoch)
    all_updates = updates * (args.epochs - args.start_epoch)
    kept = args.model_ema_decay**all_updates
    if args.model_ema and kept > SLOW_AVERAGE:
        _logger.warning(
            f"--model-ema-decay {args.model_ema_decay:g} is slow for {all_updates} updates: the average keeps "
            f"{100 * kept:.0f} % of the first weights"
        )
    model = distributed.wrap(run.model, world, run.device)
    if args.compile:
        model = compile_model(model, run.device)
    return Training(model, state, loader, updates, saved_options(args, parser))


def tell_another_order(
    args: argparse.Namespace, state: TrainingState, checkpoint: dict[str, Any], world: World
) -> None:
    """Say so where the rest of an epoch is not what was left of it."""
    if not (DATA_SETS[args.data_set].is_sharded and state.progress.step):
        return
    names = ("num_workers", "batch_size", "accum_steps")
    same_options = all(getattr(args, name) == checkpoint["config"][name] for name in names)
    if not same_options or len(checkpoint["progress"]["sums_by_rank"]) != world.size:
        _logger.warning(
            "what is left of epoch %d shows some images again and leaves others out: the order of %s depends on the "
            "numbers of processes and workers, and on the batch size",
            state.epoch + 1,
            args.data_set,
        )


def unique_images(training: Training, args: argparse.Namespace, world_size: int) -> int:
    """How many different images one epoch shows, over all processes."""
    shown = training.updates * images_per_update(args, world_size)
    return math.ceil(shown / REPEATS) if args.repeated_aug else shown


def introduce(run: Run, parser: OptionParser, given: dict[str, Any]) -> None:
    """Log what the run is going to do."""
    args, world = run.args, run.world
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    parameters = count_parameters(run.model)
    _logger.info("%s with %s, joined by %s: %s parameters", args.model, args.pe, args.join_type, f"{parameters:,}")
    if run.training is None:
        _logger.info(
            "%s: %d images; %s on %s in %s", args.data_set, run.num_test_images, processes, args.device, args.amp_dtype
        )
        return
    _logger.info("options (* given on the command line, others from recipe %s or by default)", args.recipe)
    _logger.info("%s", describe(args, parser, given))
    _logger.info(
        "%s: %d images to train, %d to test, %d classes",
        args.data_set,
        run.training.loader.num_images,
        run.num_test_images,
        run.description["num_classes"],
    )
    _logger.info(
        "%s on %s in %s: %d images per update, %d updates and %d different images per epoch, learning rate up to %g",
        processes,
        args.device,
        args.amp_dtype,
        images_per_update(args, world.size),
        run.training.updates,
        unique_images(run.training, args, world.size),
        learning_rate(args, world.size),
    )
    _logger.info("output: %s", run.output_dir or "none, as --output_dir is not given")
