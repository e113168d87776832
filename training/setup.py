"""From the command line to a run that can start: all that can be wrong with its input is found here."""

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

from datasets import (
    DATA_SETS,
    FEW,
    REPEATS,
    ImageLoader,
    build_dataset,
    build_loader,
    canonical_data_set,
    default_recipe,
)
from lape_vit.checkpoints import average_of, description_of, in_our_names, is_ours
from lape_vit.encodings import all_options, canonical_name, resolve
from lape_vit.from_checkpoint import carry_data_config, load_weights, spelled_for
from loading.images import ImageSettings
from loading.shards import runs_commands
from runtime import distributed
from runtime.files import write_text
from runtime.logs import LoopDisplay
from runtime.process import Runtime
from runtime.seeding import seed_everything
from runtime.world import World
from training.checkpoint import load_checkpoint
from training.command_line import parser_of_main, read_flags
from training.events import Events
from training.folder import find_checkpoint, open_output_dir, read_log
from training.models import (
    build_model,
    build_teacher,
    check_name,
    compile_model,
    count_parameters,
    describe_model,
    freeze_all_but_attention,
    load_what_fits,
    log_match,
    match_classes,
    pretrained_cfg,
)
from training.optimisation import highest_rate, images_per_update, learning_rate
from training.options import (
    OWN_FLAGS,
    DataOptions,
    OptionParser,
    Options,
    RunOptions,
    config_text,
    describe,
    differences,
    find_recipe,
    flag_of,
    read_recipe,
    saved_options,
)
from training.state import Training, build_training, restore_progress, restore_state

_logger = getLogger(__name__)

OF_MODEL = ("global_pool", "model_kwargs")
"""Options that are of one model, and of no other."""
FIXED = ("model", "pe", "join_type", "input_size", *OF_MODEL, *all_options())
"""Options that a checkpoint decides."""
FOR_EVALUATION = (
    "data_set",
    "data_path",
    "eval_data_path",
    "inat_category",
    "where_task",
    "where_cell",
    "batch_size",
    "num_workers",
    "amp_dtype",
    "interpolation",
    "eval_crop_ratio",
)
"""Options that evaluation takes over from the training, to repeat what the training measured."""
OF_ONE_DATA_SET = ("data_path", "eval_data_path", "inat_category", "where_task", "where_cell")
"""Options that mean nothing, or something else, to another data set."""
SLOW_AVERAGE = 0.1
"""Part of the first weights above which the final average is called slow."""


@dataclass
class Setup:
    """All that `main.py` works on.

    Attributes:
        runtime: what this process computes on.
        model: as it is evaluated and saved; training wraps it.
        description: what it takes to build the model and to prepare its images, as a checkpoint holds it.
        num_test_images: of all processes.
        training: None where the model is only evaluated.
        output_dir: in the main process, which alone writes.
        events: for TensorBoard, if it is asked for.
    """

    options: Options
    runtime: Runtime
    model: Any
    description: dict[str, Any]
    test_loader: ImageLoader
    num_test_images: int
    training: Training | None = None
    output_dir: Path | None = None
    events: Events | None = None


def set_up(argv: Sequence[str], world: World, display: LoopDisplay) -> Setup:
    """Read the options, the data, the checkpoint and the model.

    Raises:
        ValueError, OSError: something is wrong with the input; the message says what, where, and what to do.
    """
    parser = parser_of_main()
    given = read_given(parser, argv)
    if given.get("auto_resume"):
        checkpoint = find_checkpoint(given)
    else:
        checkpoint = load_checkpoint(given["resume"]) if "resume" in given else {}
    description = description_of(checkpoint)
    options, start = resolve_given(parser, given, checkpoint)
    runtime, options = start_process(options, world, display)
    check_same_start(options.run, checkpoint, runtime)

    if options.run.pretrained is not None and not checkpoint:
        cfg = pretrained_cfg(options.model.model, options.run.pretrained)
        images = image_settings(options, {"mean": list(cfg.mean), "std": list(cfg.std)})
    else:
        images = image_settings(options, description)
    test_set, classes = build_dataset(False, images, description.get("classes"))
    check_number_of_classes(options.data, len(classes))
    tell_default_recipe(given, options.run, options.model.model)
    if checkpoint:
        classes = classes_of_model(options, classes, description)
    seed_everything(options.run.seed)  # every process makes the same model
    built_at: Any = description.get("input_size", options.model.input_size)
    tag = None if checkpoint else options.run.pretrained
    model, options = build_model(options, len(classes), built_at, tag)
    if tag is not None and options.run.eval and model.pretrained_cfg["num_classes"] != len(classes):
        raise ValueError(
            f"--eval --pretrained: {options.data.data_set} has {len(classes)} classes, but the published weights "
            f"{model.pretrained_cfg['num_classes']}"
        )
    if checkpoint:
        name = f"{options.model.model} with {options.model.pe} and {options.model.join_type}"
        path = given["resume"]
        weights = average_of(checkpoint, path, "--eval-ema") if options.run.eval_ema else checkpoint["model"]
        load_weights(model, spelled_for(model, weights), path, name)
        if options.model.reference_grid or options.model.log_n:
            grid = model.patch_embed.grid_size if options.model.reference_grid else None
            model.extrapolate(reference_grid=grid, log_n=options.model.log_n)
        model.set_input_size(img_size=to_2tuple(options.model.input_size))
    if start:
        load_what_fits(model, start, str(options.run.finetune), options.data.data_set, classes)
    described = describe_model(model, options, images, classes)
    carry_data_config(model, described)
    setup = Setup(
        options,
        runtime,
        model.to(runtime.device),
        description=described,
        test_loader=build_loader(test_set, False, images, world.rank, world.size, runtime.device),
        num_test_images=len(test_set),
    )
    if not options.run.eval:
        setup.training = set_up_training(setup, images, checkpoint)
    if world.is_main:
        setup.output_dir = open_output_dir(options.run)
        log_plan(setup, parser, given, pick_recipe(parser, given, checkpoint))
        if setup.training is not None and setup.output_dir is not None:
            text = config_text(saved_options(options), shlex.join(["main.py", *argv]))
            write_text(setup.output_dir / "config.yaml", text)
    if setup.training is not None and options.run.tensorboard:
        setup.events = start_events(setup.training, setup.output_dir)
    return setup


def start_process(options: Options, world: World, display: LoopDisplay) -> tuple[Runtime, Options]:
    """Pick the device and meet the other processes.

    Returns:
        What this process computes on, and the options with those that depend on it.
    """
    run = options.run
    if run.tensorboard and not run.eval and run.output_dir is None:
        raise ValueError("--tensorboard needs --output_dir DIR, to write to DIR/tensorboard")
    device = distributed.pick_device(run.device, world)
    options = resolve_device_options(options, device)
    if run.deterministic:
        distributed.make_deterministic()
    distributed.check_size(run.world_size, world)
    if run.distributed and world.size == 1:
        raise ValueError(
            "--distributed needs several processes, torchrun --nproc_per_node=N main.py ...; else leave it out"
        )
    distributed.start(world, device, run.dist_url, run.init_timeout)
    return Runtime(world, device, getattr(torch, options.run.amp_dtype or ""), display), options


def image_settings(options: Options, description: dict[str, Any]) -> ImageSettings:
    """How to load the images of the options.

    Args:
        description: of the checkpoint to evaluate or to resume; it decides on what images are normalised by.
    """
    data_set, size = DATA_SETS[options.data.data_set], options.model.input_size
    assert size is not None  # it is resolved
    return ImageSettings(
        options.data,
        options.augmentation,
        size,
        mean=description.get("mean", data_set.mean),
        std=description.get("std", data_set.std),
        num_classes=description.get("num_classes", options.data.num_classes),
        seed=options.run.seed,
        accum_steps=options.optimisation.accum_steps,
    )


def check_number_of_classes(data: DataOptions, found: int) -> None:
    """See that the data set has as many classes as `--num-classes` says.

    Raises:
        ValueError: it has not.
    """
    if data.num_classes not in (None, found):
        raise ValueError(f"--num-classes {data.num_classes}: {data.data_set} has {found} classes; leave it out")


def classes_of_model(options: Options, classes: list[str], description: dict[str, Any]) -> list[str]:
    """The names of the classes of a checkpoint's model, in its order; the data set's where it has none.

    Raises:
        ValueError: the data set has other classes.
    """
    data_set, path = options.data.data_set, str(options.run.resume)
    match = match_classes(classes, data_set, description, path)
    expected = description.get("num_classes", len(classes))
    names = f": {match.differences}" if match.differences else ""
    if expected != len(classes):
        raise ValueError(f"{data_set} has {len(classes)} classes, but the model of {path} has {expected}{names}")
    if names:
        raise ValueError(f"{data_set} has other classes than the model of {path}{names}")
    log_match(match, data_set, path)
    if match.order is None and not DATA_SETS[data_set].is_sharded:
        return classes
    return description.get("classes", classes)


def read_given(parser: OptionParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that a command line names, as `read_flags` reads them, with the data set's own name.

    Raises:
        ValueError: an unknown flag or data set, an illegal value, or flags that contradict each other.
    """
    given = read_flags(parser, argv)
    if "data_set" in given:
        given["data_set"] = canonical_data_set(given["data_set"])
    return given


def resolve_given(
    parser: OptionParser, given: dict[str, Any], checkpoint: dict[str, Any]
) -> tuple[Options, dict[str, Any]]:
    """All options, except for those that the device decides, and the checkpoint to fine-tune, empty if there is none.

    Raises:
        ValueError, OSError: an unknown name or file, or an option that contradicts the checkpoint to resume.
    """
    recipe = pick_recipe(parser, given, checkpoint)
    for one, other in (("finetune", "pretrained"), ("pretrained", "finetune")):
        if given.get(one) is not None:
            recipe = {**recipe, other: None}
    if recipe.get("pretrained") is not None and "pretrained" not in given:
        given, recipe = resolve_pretrained(given, recipe)
    finetune = None if checkpoint else {**recipe, **given}.get("finetune")
    start = load_checkpoint(finetune) if finetune else {}
    options = resolve_options(parser, given, recipe, description_of(checkpoint), description_of(start))
    refuse_foreign_commands(options, given)
    return options, start


def resolve_pretrained(given: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options given and those of a recipe that starts from timm's weights, for another model than the recipe's.

    The recipe's tag is of its own model. One in `--model NAME.TAG` needs no `--pretrained` then, and a model of which
    timm publishes no weights starts from random ones.
    """
    name, _, tag = str({**recipe, **in_our_names(given)}["model"]).partition(".")
    if name == recipe.get("model") and not tag:
        return given, recipe
    if not timm.list_pretrained(f"{name}.*"):
        return given, {**recipe, "pretrained": None}
    return {**given, "pretrained": tag}, {**recipe, "pretrained": None}


def tell_default_recipe(given: dict[str, Any], run: RunOptions, model: str) -> None:
    """Say in one line that a folder of few images has a recipe of its own, and what it starts from."""
    data_set = DATA_SETS[given.get("data_set", "")] if given.get("data_set") else None
    if data_set is None or run.recipe != data_set.recipe_of_few or "recipe" in given or run.eval:
        return
    weights = f"timm's weights of {model}, a download the first time" if run.pretrained is not None else ""
    start = run.finetune or weights or "random weights"
    _logger.info(
        "fewer than %s images to train: recipe %s, from %s; --recipe %s is for more",
        f"{FEW:,}",
        run.recipe,
        start,
        data_set.recipe,
    )


def start_events(training: Training, output_dir: Path | None) -> Events:
    """What writes for TensorBoard, if this is the main process, from where the training is."""
    folder = None if output_dir is None else output_dir / "tensorboard"
    return Events(folder, training.epoch, training.progress, training.updates)


def refuse_foreign_commands(options: Options, given: dict[str, Any]) -> None:
    """See that no checkpoint or recipe, which may come from anyone, runs a command.

    Raises:
        ValueError: one would.
    """
    for name in {"data_path", "eval_data_path"} - given.keys():
        pattern = getattr(options.data, name)
        if pattern is not None and DATA_SETS[options.data.data_set].is_sharded and runs_commands(pattern):
            raise ValueError(
                f"{options.run.recipe} asks for {flag_of(name)} {pattern}: a command is run only if the command line "
                "has it: repeat it there if you trust it"
            )


def check_same_start(run: RunOptions, checkpoint: dict[str, Any], runtime: Runtime) -> None:
    """See that all processes start from the same place.

    Raises:
        ValueError: they do not.
    """
    is_training = bool(checkpoint) and not run.eval and is_ours(checkpoint)
    place = [checkpoint["epoch"], checkpoint["progress"]["counts"]["step"]] if is_training else [-1, -1]
    found = distributed.gather_over_ranks(place, runtime.world, runtime.device)
    if any(other != found[0] for other in found):
        raise ValueError(
            f"the processes found different checkpoints in {run.output_dir}: name a folder that all of them share"
        )


def resolve_options(
    parser: OptionParser,
    given: dict[str, Any],
    recipe: dict[str, Any],
    description: dict[str, Any],
    start: dict[str, Any],
) -> Options:
    """All options: what was given, else what the checkpoint is of, else the recipe, else the default.

    Names are canonical, and `pe` is without options, which have names of their own.

    Args:
        description: of the checkpoint to evaluate or to resume, which nothing may contradict.
        start: the description of the checkpoint to fine-tune, which goes before the recipe; it binds to nothing.

    Raises:
        ValueError: an unknown name, or an option that contradicts the checkpoint; names both values.
    """
    given, recipe, description, start = map(spell_out_names, (given, recipe, description, start))
    fixed = {name: description[name] for name in FIXED if description.get(name) is not None}
    may_change = {"input_size"} if given.get("eval") else set()
    for name in (fixed.keys() & given.keys()) - may_change:
        if given[name] != fixed[name]:
            raise ValueError(f"{flag_of(name)} {given[name]} contradicts {given['resume']}, which has {fixed[name]}")

    model = {name: start[name] for name in FIXED if name in start}
    built = {**parser.defaults, **recipe, **model, **fixed, **given}["model"]
    recipe, model = for_model(built, recipe), for_model(built, model)
    pe = {**recipe, **model, **fixed, **given}.get("pe")
    beneath = {**for_encoding(pe, recipe), **for_encoding(pe, model)}
    if not given.get("eval"):  # a run that continues saves what was asked of the pool, as before, not what was built
        fixed.pop("global_pool", None)
    values = {**parser.defaults, **beneath, **fixed, **given}
    if values["resume"] and not values["eval"] and values["output_dir"] is None:
        values["output_dir"] = str(Path(values["resume"]).parent)
    check_name(values["model"])
    if values["input_size"] is None:
        cfg = timm.models.get_pretrained_cfg(values["model"])
        assert cfg is not None  # all models of models_lape have one
        values["input_size"] = cfg.input_size[-1]
    values["data_set"] = canonical_data_set(values["data_set"])
    values["data_path"] = values["data_path"] or DATA_SETS[values["data_set"]].default_data_path
    return Options.of(values)


def spell_out_names(values: dict[str, Any]) -> dict[str, Any]:
    """These options, with a source's name of a model in ours, and what is in brackets in `pe` under its own name.

    Raises:
        ValueError: no such encoding or option, or two values of one option.
    """
    values = in_our_names(values)
    if values.get("model_kwargs"):  # of a foreign checkpoint they may hold what are options of their own here
        elsewhere = {*all_options(), *OWN_FLAGS}
        arguments = {name: value for name, value in values["model_kwargs"].items() if name not in elsewhere}
        values["model_kwargs"] = arguments or None
    name, _, tag = str(values.get("model", "")).partition(".")
    if tag:
        if values.get("pretrained") is None:
            raise ValueError(f"--model {name}.{tag} names weights of timm's: add --pretrained, or leave .{tag} out")
        if values["pretrained"] not in ("", tag):
            raise ValueError(f"--pretrained {values['pretrained']} contradicts --model {name}.{tag}")
        values |= {"model": name, "pretrained": tag}
    if values.get("pe") is None:
        return values
    try:
        resolved = resolve(values["pe"], {name: values[name] for name in all_options() if values.get(name) is not None})
    except TypeError as error:
        raise ValueError(f"--pe {values['pe']}: {error}") from error
    own = resolved.options() if "(" in values["pe"] else resolved.given
    return {**values, **own, "pe": "+".join(part.name for part in resolved.parts)}


def for_model(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """These options without the arguments of the model, if they are of another one than `name`."""
    if values.get("model") in (None, name):
        return values
    return {option: values[option] for option in values.keys() - {*OF_MODEL}}


def for_encoding(pe: str | None, values: dict[str, Any]) -> dict[str, Any]:
    """These options without those of encodings, if they are of another encoding than `pe`."""
    return (
        values if values.get("pe") in (None, pe) else {name: values[name] for name in values.keys() - {*all_options()}}
    )


def pick_recipe(parser: OptionParser, given: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Options, with their source as `recipe`: of the recipe asked for, else of the checkpoint, else of the data set."""
    if "recipe" in given:
        return {**read_recipe(parser, find_recipe(given["recipe"])), "recipe": given["recipe"]}
    if "config" in checkpoint:
        saved = {name: value for name, value in checkpoint["config"].items() if name in parser.defaults}
        if given.get("data_set", saved["data_set"]) != saved["data_set"]:
            saved |= dict.fromkeys(OF_ONE_DATA_SET)
        options = {name: saved[name] for name in FOR_EVALUATION if name in saved} if given.get("eval") else saved
        return {**options, "recipe": given["resume"]}
    name = default_recipe(given.get("data_set", parser.defaults["data_set"]), given.get("data_path"))
    said = {name: value for name, value in description_of(checkpoint).items() if name in FOR_EVALUATION}
    return {**read_recipe(parser, find_recipe(name)), **said, "recipe": name}


def resolve_device_options(options: Options, device: torch.device) -> Options:
    """The options, with those whose default depends on the device."""
    on_gpu = device.type == "cuda"
    amp_dtype, pin_mem = options.run.amp_dtype, options.data.pin_mem
    if amp_dtype is None and on_gpu:
        amp_dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return options.changed(
        device=options.run.device or device.type,
        amp_dtype=amp_dtype or "float32",
        pin_mem=on_gpu if pin_mem is None else pin_mem,
    )


def set_up_training(setup: Setup, images: ImageSettings, checkpoint: dict[str, Any]) -> Training:
    """The training data and the state of the training, restored from the checkpoint if there is one."""
    options, optimisation, world = setup.options, setup.options.optimisation, setup.runtime.world
    if optimisation.start_epoch >= optimisation.epochs:
        raise ValueError(f"--start-epoch {optimisation.start_epoch} leaves nothing of --epochs {optimisation.epochs}")
    if not options.model.train_mode and (options.model.drop or options.model.drop_path):
        _logger.warning("--drop and --drop-path are without effect under --no-train-mode")
    if options.model.attn_only:
        freeze_all_but_attention(setup.model)
    classes = setup.description["classes"]
    train_set, _ = build_dataset(True, images, classes)
    loader = build_loader(train_set, True, images, world.rank, world.size, setup.runtime.device)
    has_teacher = options.distillation.distillation_type != "none"
    teacher = build_teacher(options, classes).to(setup.runtime.device) if has_teacher else None
    training = build_training(options, setup.model, loader, teacher, base_lr(options, world), len(classes))
    if checkpoint:
        restore_state(training, checkpoint)
        restore_progress(training, checkpoint["progress"], world)
        warn_of_repeated_images(training, checkpoint, world)
        if world.is_main:
            training.rows = read_log(Path(options.run.output_dir or "") / "log.txt", training.epoch)
    warn_of_slow_average(options, training.updates)
    training.model = distributed.wrap(setup.model, world, setup.runtime.device)
    if options.run.compile:
        training.model = compile_model(training.model, setup.runtime.device)
    return training


def base_lr(options: Options, world: World) -> float:
    """The learning rate that the schedule scales."""
    return learning_rate(options.optimisation, images_per_update(options.data, options.optimisation, world.size))


def warn_of_slow_average(options: Options, updates: int) -> None:
    """Warn that an average of the weights keeps much of the first ones.

    Args:
        updates: of an epoch.
    """
    decay, optimisation = options.model.model_ema_decay, options.optimisation
    all_updates = updates * (optimisation.epochs - optimisation.start_epoch)
    kept = decay**all_updates
    if options.model.model_ema and kept > SLOW_AVERAGE:
        _logger.warning(
            f"--model-ema-decay {decay:g} is slow for {all_updates} updates: the average keeps {100 * kept:.0f} % of "
            "the first weights"
        )


def warn_of_repeated_images(training: Training, checkpoint: dict[str, Any], world: World) -> None:
    """Warn that a resumed epoch of sharded data may repeat or skip images."""
    data_set = training.options.data.data_set
    if not (DATA_SETS[data_set].is_sharded and training.progress.step):
        return
    now, names = training.options.by_name(), ("num_workers", "batch_size", "accum_steps")
    same_options = all(now[name] == checkpoint["config"][name] for name in names)
    if not same_options or len(checkpoint["progress"]["sums_by_rank"]) != world.size:
        _logger.warning(
            "the rest of epoch %d may repeat images and skip others: the order of %s depends on the numbers of "
            "processes and workers, and on the batch size",
            training.epoch + 1,
            data_set,
        )


def unique_images(training: Training, world_size: int) -> int:
    """How many different images one epoch shows, over all processes."""
    options = training.options
    shown = training.updates * images_per_update(options.data, options.optimisation, world_size)
    return math.ceil(shown / REPEATS) if options.augmentation.repeated_aug else shown


def log_plan(setup: Setup, parser: OptionParser, given: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Log what the run is going to do: what matters in a few lines, and all options where they are asked for."""
    options, training, world = setup.options, setup.training, setup.runtime.world
    run, model = options.run, options.model
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    lines = {
        "model": f"{model.model}  {count_parameters(setup.model):,} parameters",
        "positions": f"{canonical_name(model.pe or '', given_options(options))}  joined by {model.join_type}",
        "data": describe_data(setup),
    }
    if training is not None:
        changed = differences(options, given, {**parser.defaults, **recipe})
        lines["recipe"] = "  ".join([str(run.recipe), *(["changed:", *changed] if changed else [])])
        lines |= describe_schedule(options, training, world)
    lines["device"] = f"{processes} on {run.device} in {run.amp_dtype}"
    lines["output"] = str(setup.output_dir or "none, as --output_dir is not given")
    for name, text in lines.items():
        _logger.info("%-11s%s", name, text)
    if run.show_options:
        _logger.info("options (* given on the command line, others from recipe %s or by default)", run.recipe)
        _logger.info("%s", describe(options, parser, given))


def given_options(options: Options) -> dict[str, Any]:
    """The options of encodings that have a value."""
    return {name: value for name, value in options.model.encoding.items() if value is not None}


def describe_data(setup: Setup) -> str:
    """The data set, how many images and classes it has, and how large they are."""
    height, width = to_2tuple(setup.options.model.input_size)
    training = "" if setup.training is None else f"{setup.training.loader.num_images:,} images to train  "
    tested = f"{setup.num_test_images:,} to test" if training else f"{setup.num_test_images:,} images"
    counts = f"{training}{tested}  {setup.description['num_classes']} classes"
    return f"{setup.options.data.data_set}  {counts}  {height} x {width} pixels"


def describe_schedule(options: Options, training: Training, world: World) -> dict[str, str]:
    """How long the training lasts, what an update is, and how high the learning rate gets."""
    optimisation = options.optimisation
    images = images_per_update(options.data, optimisation, world.size)
    peak = highest_rate(optimisation, base_lr(options, world), training.updates)
    noise = ", without its noise" if optimisation.lr_noise else ""
    start = f"  from epoch {training.epoch + 1}" if training.epoch else ""
    return {
        "updates": f"{images} images per update, {training.updates} updates and {unique_images(training, world.size)} "
        "different images per epoch",
        "schedule": f"{optimisation.epochs} epochs{start}  {optimisation.sched} after {optimisation.warmup_epochs} of "
        f"warm-up  learning rate at most {peak:.3g}{noise}",
    }
