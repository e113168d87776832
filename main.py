"""Train a vision transformer, or evaluate a checkpoint of one.

`python main.py --help` lists the options; `torchrun main.py` does the same work in several processes.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

import models_lape  # noqa: F401  (registers the models)
from datasets import (
    DATA_SETS,
    REPEATS,
    ImageLoader,
    TrainSampler,
    UnreadableImageError,
    build_dataset,
    build_loader,
    canonical_data_set,
)
from engine import evaluate, train_one_epoch
from lape_vit import convert_checkpoint, warm_start
from lape_vit.encodings import all_options, canonical_name
from training import distributed
from training.checkpoint import atomic_write, description_of, is_ours, load_checkpoint, load_weights, save_checkpoint
from training.curves import draw_curves
from training.distributed import World
from training.files import CHECKPOINTS, find_checkpoint, last_checkpoint, open_output_dir, read_log, write_text
from training.interrupt import Interrupted, defer_interrupts
from training.logs import LoopDisplay, clock, start_logging
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
from training.state import Progress, TrainingState, build_state, restore_progress, restore_state

_logger = getLogger(__name__)

FIXED = ("model", "pe", "join_type", "input_size", *all_options())
"""Options that a checkpoint decides."""
FOR_EVALUATION = (
    "data_set",
    "data_path",
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
SECONDS_BETWEEN_DRAWINGS = 30
SECONDS_FOR_MAIN_PROCESS = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process).

    Returns:
        The exit code: 0; 1 if the training diverged, or a file could not be written; 2 for bad input; if a signal ended
        the run, 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1. All but 0 come with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    world = distributed.world_from_environment()
    console = start_logging(world.is_main)
    display = LoopDisplay(console if world.is_main else None, world.size)
    try:
        try:
            run = set_up(argv, world, display)
        except (ValueError, OSError) as error:
            return _end(f"error: {error}", 2, world)
        with defer_interrupts():
            return evaluate_checkpoint(run) if run.training is None else train(run, run.training)
    except UnreadableImageError as error:
        return _end(f"error: {error}; --skip-bad-images trains without such files", 2, world)
    except (FloatingPointError, OSError) as error:
        return _end(f"error: {error}", 1, world)
    except Interrupted as interrupt:
        return _end(str(interrupt), interrupt.exit_code, world) if world.is_main else interrupt.exit_code
    except KeyboardInterrupt as interrupt:
        return _end(f"interrupted{interrupt}", 130, world) if world.is_main else 130
    finally:
        distributed.stop()


def _end(message: str, exit_code: int, world: World) -> int:
    if not world.is_main:
        # If the main process fails too, torchrun ends this one while it waits, and one process has told what is wrong.
        time.sleep(SECONDS_FOR_MAIN_PROCESS)
        message = f"process {world.rank}: {message}"
    print("main.py:", " ".join(message.split()), file=sys.stderr, flush=True)
    return exit_code


# ---- set-up: all that can be wrong with the input is found here, before anything is written


@dataclass
class Training:
    """What training needs besides what evaluation needs."""

    state: TrainingState
    loader: ImageLoader
    updates: int  # per epoch
    config: dict[str, Any]  # the options to save
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
    if given.get("auto_resume"):
        checkpoint = find_checkpoint(given)
    else:
        checkpoint = load_checkpoint(given["resume"]) if "resume" in given else {}
    description = description_of(checkpoint)
    recipe = pick_recipe(parser, given, checkpoint)
    finetune = None if checkpoint else {**recipe, **given}.get("finetune")
    start = load_checkpoint(finetune) if finetune else {}
    args = resolve_options(parser, given, recipe, description, description_of(start))
    device = distributed.pick_device(args.device, world)
    resolve_device_options(args, device)
    distributed.check_size(args.world_size, world)
    distributed.start(world, device, args.dist_url, args.init_timeout)
    check_same_start(args, checkpoint, world, device)

    test_set, classes = build_dataset(False, args)
    expected = description.get("num_classes", len(classes))
    if expected != len(classes):
        raise ValueError(f"{args.data_set} has {len(classes)} classes, but the model of {args.resume} has {expected}")
    seed_everything(args.seed)  # every process makes the same model
    model = build_model(args, len(classes), description.get("input_size", args.input_size))
    if checkpoint:
        name = f"{args.model} with {args.pe} and {args.join_type}"
        load_weights(model, convert_checkpoint(weights_of(checkpoint, args)), args.resume, name)
        model.set_input_size(img_size=to_2tuple(args.input_size))
    if start:
        load_what_fits(model, start, args.finetune)
    run = Run(
        args=args,
        world=world,
        device=device,
        display=display,
        model=model.to(device),
        description=describe_model(args, classes),
        test_loader=build_loader(test_set, False, args, world.rank, world.size),
        num_test_images=len(test_set),  # type: ignore[arg-type]  # torch's Dataset declares no __len__
    )
    if not args.eval:
        run.training = set_up_training(run, parser, checkpoint)
    if world.is_main:
        run.output_dir = open_output_dir(args)
        introduce(run, parser, given)
        if run.training is not None and run.output_dir is not None:
            text = config_text(run.training.config, shlex.join(["main.py", *argv]))
            write_text(run.output_dir / "config.yaml", text)
    return run


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
    args.mean, args.std = description.get("mean", data_set.mean), description.get("std", data_set.std)
    return args


def pick_recipe(parser: OptionParser, given: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Options, with their source as `recipe`: of the recipe asked for, else of the checkpoint, else of the data set."""
    if "recipe" in given:
        return {**read_recipe(parser, find_recipe(given["recipe"])), "recipe": given["recipe"]}
    if "config" in checkpoint:
        saved = dict(checkpoint["config"])
        if given.get("data_set", saved["data_set"]) != saved["data_set"]:
            saved |= {"data_path": None, "inat_category": None}  # are of the other data set
        options = {name: saved[name] for name in FOR_EVALUATION} if given.get("eval") else saved
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


def load_what_fits(model: Any, checkpoint: dict[str, Any], path: str) -> None:
    """Start from the weights of a checkpoint, and say in one line each what is new and what was left out.

    Raises:
        ValueError: nothing fits.
    """
    size, patch = description_of(checkpoint).get("input_size"), model.patch_embed.patch_size
    grid = None if size is None else tuple(side // cell for side, cell in zip(to_2tuple(size), patch, strict=True))
    try:
        start = warm_start(checkpoint["model"], model, grid)
    except ValueError as error:
        raise ValueError(f"--finetune {path}: {error}") from error
    for line in start.report():
        _logger.info("%s: %s", path, line)
    model.load_state_dict(start.state_dict)


def build_teacher(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model to learn from: any of timm or of this project, with the weights of `--teacher-path`.

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
    weights, options = checkpoint["model"], {}
    if name in timm.list_models(module="models_lape"):
        weights, description = convert_checkpoint(weights), description_of(checkpoint)
        options = {key: description[key] for key in ("pe", "join_type", *all_options()) if key in description}
        if "input_size" in description:
            options["img_size"] = to_2tuple(description["input_size"])
    teacher = timm.create_model(name, num_classes=num_classes, **options)
    load_weights(teacher, weights, f"--teacher-path {path}", f"{name} of {num_classes} classes")
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


def set_up_training(run: Run, parser: OptionParser, checkpoint: dict[str, Any]) -> Training:
    """The training data and the state of the training, restored from the checkpoint if there is one."""
    args, world = run.args, run.world
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    if not args.train_mode and (args.drop or args.drop_path):
        _logger.warning("--drop and --drop-path are without effect under --no-train-mode")
    if args.attn_only:
        freeze_all_but_attention(run.model)
    train_set, classes = build_dataset(True, args)
    loader = build_loader(train_set, True, args, world.rank, world.size)
    updates = len(loader) // args.accum_steps
    teacher = None if args.distillation_type == "none" else build_teacher(args, len(classes)).to(run.device)
    state = build_state(args, run.model, len(classes), updates, world.size, teacher)
    if checkpoint:
        restore_state(state, checkpoint, args)
        loader.num_skipped = restore_progress(state, checkpoint["progress"], updates, world)
        if world.is_main:
            state.rows = read_log(Path(args.output_dir) / "log.txt", state.epoch)
    all_updates = updates * (args.epochs - args.start_epoch)
    kept = args.model_ema_decay**all_updates
    if args.model_ema and kept > SLOW_AVERAGE:
        _logger.warning(
            f"--model-ema-decay {args.model_ema_decay:g} is slow for {all_updates} updates: the average keeps "
            f"{100 * kept:.0f} % of the first weights"
        )
    return Training(state, loader, updates, saved_options(args, parser))


def unique_images(training: Training, args: argparse.Namespace, world_size: int) -> int:
    """How many different images one epoch shows, over all processes."""
    shown = training.updates * images_per_update(args, world_size)
    return math.ceil(shown / REPEATS) if args.repeated_aug else shown


def freeze_all_but_attention(model: Any) -> None:
    """Leave to training what DeiT III fine-tunes by `--attn-only`: attention, positions and classifier."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    trained = {id(parameter) for part in (model.join, *heads) for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name or name == "pos_embed" or id(parameter) in trained)


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
        len(run.training.loader.dataset),  # type: ignore[arg-type]
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


# ---- the two things to do


def evaluate_checkpoint(run: Run) -> int:
    """Evaluate the model, show the result, and write `eval.json`."""
    result = evaluate_model(run, run.model, "test")
    _logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", result["acc1"], result["acc5"], result["loss"])
    if run.output_dir is not None:
        write_text(run.output_dir / "eval.json", json.dumps(result) + "\n")
    return 0


def train(run: Run, training: Training) -> int:
    """Train the epochs that are left; after each, evaluate, log and save."""
    args, state = run.args, training.state
    model = distributed.wrap(run.model, run.world, run.device)
    if state.epoch >= args.epochs:
        _logger.info("all %d epochs of %s are done: give more --epochs to go on", args.epochs, args.resume)
        return 0
    start, epochs_before, drawn = time.monotonic(), state.epoch, -math.inf
    try:
        while state.epoch < args.epochs:
            row = run_epoch(run, training, model)
            is_best = row["test_acc1"] > state.best_acc1
            state.best_acc1 = max(state.best_acc1, row["test_acc1"])
            ema_is_best = row.get("test_ema_acc1", -1.0) > state.best_ema_acc1
            state.best_ema_acc1 = max(state.best_ema_acc1, row.get("test_ema_acc1", -1.0))
            state.epoch = row["epoch"]
            state.progress = Progress(bad_in_a_row=state.progress.bad_in_a_row)
            training.loader.num_skipped = 0
            state.accuracies.append(row["test_acc1"])
            state.scheduler.step(state.epoch, row["test_acc1"])
            state.rows.append(row)
            left = (time.monotonic() - start) / (state.epoch - epochs_before) * (args.epochs - state.epoch)
            _logger.info("%s  best %.2f %%  %s left", summarise(row, args.epochs), state.best_acc1, clock(left))
            draws = state.epoch == args.epochs or time.monotonic() - drawn > SECONDS_BETWEEN_DRAWINGS
            save(run, training, CHECKPOINTS[1:2] * is_best + CHECKPOINTS[2:] * ema_is_best, draws)
            if draws:
                drawn = time.monotonic()
    except FloatingPointError as error:
        raise FloatingPointError(f"epoch {state.epoch + 1}: {error}; {last_checkpoint(run.output_dir)}") from error
    except Interrupted as interrupt:
        save(run, training)
        distributed.wait_for_all()  # torchrun ends all processes soon after the first of them has ended
        place = f" in epoch {state.epoch + 1}, after update {state.progress.step} of {training.updates}"
        raise Interrupted(interrupt.signal_number, f"{place}; {last_checkpoint(run.output_dir)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f" in epoch {state.epoch + 1}; {last_checkpoint(run.output_dir)}") from None
    if training.unsaved:
        raise OSError(f"{training.unsaved}; {last_checkpoint(run.output_dir)}")
    return 0


def run_epoch(run: Run, training: Training, model: nn.Module) -> dict[str, Any]:
    """Train `model`, the wrapped `run.model`, for one epoch and evaluate it: a row of `log.txt`."""
    args, state, loader = run.args, training.state, training.loader
    start = time.monotonic()
    epoch = state.epoch + 1
    accuracy = f"  acc@1 {state.rows[-1]['test_acc1']:.2f} %" if state.rows else ""
    done = state.progress.step * args.accum_steps * args.batch_size
    cast("TrainSampler", loader.sampler).set_epoch(state.epoch, done)

    def after_update() -> None:
        every = args.checkpoint_steps
        if every and state.progress.step % every == 0 and state.progress.step < training.updates:
            save(run, training)

    trained = train_one_epoch(
        model,
        loader,
        state.criterion,
        state.optimizer,
        state.scheduler,
        state.scaler,
        progress=state.progress,
        epoch=state.epoch,
        title=f"epoch {epoch}/{args.epochs}{accuracy}",
        world=run.world,
        device=run.device,
        amp_dtype=getattr(torch, args.amp_dtype),
        seed=args.seed,
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        max_bad_steps=args.max_bad_steps,
        train_mode=args.train_mode,
        mixup=state.mixup,
        ema=state.ema,
        display=run.display,
        after_update=after_update,
    )
    num_bad_images = distributed.sum_over_ranks(torch.tensor(loader.num_skipped, device=run.device)).item()
    row = {"epoch": epoch, "train_loss": trained["loss"], "train_lr": trained["lr"]}
    row |= {"skipped_steps": state.progress.skipped, "skipped_images": num_bad_images}
    tested = {"test": evaluate_model(run, run.model, f"epoch {epoch}/{args.epochs}  test")}
    if state.ema is not None:
        average = state.ema.module.to(run.device)
        tested["test_ema"] = evaluate_model(run, average, f"epoch {epoch}/{args.epochs}  test of the average")
        average.to(state.ema.device or run.device)
    for name, result in tested.items():
        row |= {f"{name}_{key}": result[key] for key in ("loss", "acc1", "acc5")}
    row |= {"n_parameters": count_parameters(run.model), "seconds": time.monotonic() - start}
    return row | {"images_per_second": trained["images_per_second"]}


def evaluate_model(run: Run, model: nn.Module, title: str) -> dict[str, float]:
    """Evaluate `model` on the test images."""
    times = 1 if run.args.dist_eval else run.world.size
    result = evaluate(
        model,
        run.test_loader,
        num_images=times * run.num_test_images,
        title=title,
        device=run.device,
        amp_dtype=getattr(torch, run.args.amp_dtype),
        display=run.display,
    )
    return {**result, "count": run.num_test_images}


def summarise(row: dict[str, Any], epochs: int) -> str:
    """A row of `log.txt` for the eye."""
    ema = f" (average {row['test_ema_acc1']:.2f} %)" if "test_ema_acc1" in row else ""
    return (
        f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
        f"acc@1 {row['test_acc1']:.2f} %{ema}  acc@5 {row['test_acc5']:.2f} %  lr {row['train_lr']:.2e}  "
        f"{row['seconds']:.1f} s"
    )


def count_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- files


def save(run: Run, training: Training, best: Sequence[str] = (), draws: bool = False) -> None:
    """Write the log, then the checkpoint: a row beyond the checkpoint is dropped when the run is resumed.

    All processes have to call this; the main one writes. Where it cannot, the files stay as they were, and the run goes
    on: there may be space again when it saves next.

    Args:
        best: names of the checkpoints that this one replaces as the best so far.
        draws: whether to draw the curves, too.
    """
    state, folder = training.state, run.output_dir
    sums = [state.progress.loss_sum.item(), training.loader.num_skipped]
    progress = {
        "counts": state.progress.counts(),
        "updates": training.updates,
        "sums_by_rank": distributed.gather_over_ranks(sums, run.world, run.device),
    }
    if folder is None:
        return
    model = run.model.state_dict()
    if not all(weight.isfinite().all() for weight in model.values()):
        training.unsaved = "the checkpoint is not saved, as the weights are not finite"
        _logger.error("%s", training.unsaved)
        return
    checkpoint = {
        "model": model,
        **state.state_dict(),
        "progress": progress,
        "config": training.config,
        "description": run.description,
    }
    try:
        write_text(folder / "log.txt", "".join(f"{json.dumps(row)}\n" for row in state.rows))
        for name in (CHECKPOINTS[0], *best):
            save_checkpoint(folder / name, checkpoint)
        if draws:
            with atomic_write(folder / "curves.png") as file:
                draw_curves(state.rows, file, "{model}, {pe}, {join_type} on {data_set}".format(**run.description))
    except OSError as error:
        training.unsaved = f"the checkpoint of {folder} could not be saved, and the one before stays: {error}"
        _logger.error("%s", training.unsaved)
    else:
        training.unsaved = ""


if __name__ == "__main__":
    sys.exit(main())
