"""The options of a run: one dataclass a section, from which parser, recipes and saved configurations are made.

An option is looked up on the command line, then in the recipe, then in the defaults below. The defaults are DeiT's, but
augmentation and regularisation are off unless a recipe or a flag turns them on: a recipe tells all that a run does.
"""

import argparse
import ast
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml

from training.sources import advice

RECIPES = Path(__file__).parent.parent / "recipes"
WIDTH = 110
"""Columns of the help and of the list of options."""
MOST_WORKERS = 10
"""Processes that load data, unless more are asked for."""
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
"""A negative number."""


# ---- value types


def whole(low: int | None = 0) -> Callable[[str], int]:
    """A whole number, at least `low`."""
    least = "" if low is None else f" of at least {low}"

    def read(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() else None
        if value is None or (low is not None and value < low):
            raise argparse.ArgumentTypeError(f"expected a whole number{least}, got {text!r}")
        return value

    return read


def number(low: float = 0.0, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A finite number in `[low, high]`, or in `(low, high]` if it has to be `above` the low end."""
    least = "" if low == -math.inf else f" above {low:g}" if above else f" of at least {low:g}"
    wanted = least if high == math.inf else f"{least} and at most {high:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            raise argparse.ArgumentTypeError(f"expected a number{wanted}, got {text!r}")
        return value

    return read


def image_size(text: str) -> int | list[int]:
    """The side of a square image, or its height and width."""
    sides = [whole(1)(part) for part in text.strip("[]").split(",")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(
            f"expected a side such as 224, or a height and width such as 160,224, got {text!r}"
        )
    return sides[0] if len(set(sides)) == 1 else sides


def optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """What `read` takes, or `none`."""
    return lambda text: None if text.lower() == "none" else read(text)


AMOUNT, FRACTION = number(), number(high=1.0)

OWN_FLAGS = {"drop_rate": "--drop", "drop_path_rate": "--drop-path"}
"""Flags of arguments of a model that have other names."""


class Arguments(argparse.Action):
    """A dictionary of words such as `class_token=False`; the values are Python's, or else text, as timm reads them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        arguments = dict(getattr(namespace, self.dest, None) or {})
        for word in values:
            name, equals, text = word.partition("=")
            if not (name.isidentifier() and equals):
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, such as class_token=False, got {word!r}")
            own = OWN_FLAGS.get(name) or flag_of(name)
            if own in parser.flags:
                raise argparse.ArgumentError(self, f"{name} has a flag of its own: type {own} {text}")
            try:
                arguments[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                arguments[name] = text
            if arguments[name] is None:
                raise argparse.ArgumentError(self, f"{word}: timm passes no None to a model; leave it out")
        setattr(namespace, self.dest, arguments)


# ---- the sections


def option(
    *,
    help: str,
    default: Any = None,
    read: Callable[[str], Any] = str,
    aliases: Sequence[str] = (),
    of_one_call: bool = False,
    **how: Any,
) -> Any:
    """A field of a section that is an option of the command line.

    Args:
        read: what makes its value of a word; a bool has two flags, `--name` and `--no-name`, in its place.
        aliases: other flags of the same option.
        of_one_call: whether it belongs to one call: then no recipe may set it, a saved configuration leaves it out, and
            a bool has no `--no-name`.
        how: what `ArgumentParser.add_argument` takes besides.
    """
    return field(
        default=default,
        metadata={"help": help, "read": read, "aliases": aliases, "of_one_call": of_one_call, "how": how},
    )


OWN = "default: the model's own"


# fmt: off
@dataclass(frozen=True)
class RunOptions:
    """Where a run starts, what it leaves behind, and on what it computes."""

    output_dir: str | None = option(metavar="DIR", aliases=("--output-path",), of_one_call=True,
        help="receives the checkpoints, config.yaml, log.txt and curves.png; default: nothing is written")
    tensorboard: bool = option(default=False,
        help="write what log.txt has, and the loss as it goes, for TensorBoard, to tensorboard/ in --output-dir")
    resume: str | None = option(metavar="FILE", of_one_call=True,
        help="continue the training of this checkpoint, in its folder and with its options unless others are given;"
             " with --eval: the checkpoint to evaluate; here, at --finetune and at --teacher-path, FILE may be an "
             "https: URL whose name ends in its SHA-256 (NAME-a1311bcf.pth), or URL#sha256=a1311bcf; default: start "
             "afresh")
    eval: bool = option(default=False, of_one_call=True,
        help="evaluate the checkpoint of --resume, or of --finetune, and end; at another --input-size if one is given")
    eval_ema: bool = option(default=False, of_one_call=True, help="with --eval: evaluate the averaged weights")
    auto_resume: bool = option(default=False, of_one_call=True,
        help="--resume the newest readable checkpoint of --output-dir; start afresh where there is none")
    checkpoint_steps: int | None = option(read=optional(whole(1)), metavar="N",
        help="save checkpoint.pth every N updates, too; default: after each epoch only")
    max_bad_steps: int = option(default=10, read=whole(1), metavar="N",
        help="end after N updates in a row whose loss or gradient is not finite; each is skipped")
    finetune: str | None = option(metavar="FILE",
        help="start from the weights of this checkpoint, of any size, encoding or join; model, encoding, join and size "
             "are the checkpoint's unless others are given; default: start from random weights")
    pretrained: str | None = option(nargs="?", const="", read=optional(str), metavar="TAG",
        help="start from the weights that timm publishes for --model, under this tag or that of --model NAME.TAG, else "
             "under its default tag; what does not fit is left out, and said; none: start from random weights; "
             "default: as the recipe says, and most start from random weights")
    recipe: str | None = option(metavar="NAME", of_one_call=True,
        help="options from recipes/NAME.yaml, or from the .yaml file of this path; default: the data set's recipe")
    show_options: bool = option(default=False, of_one_call=True,
        help="print all options of the run, not only those that differ from the recipe")
    list_encodings: bool = option(default=False, of_one_call=True,
        help="print a table of all encodings, with their options and what they add to --model, and end")
    seed: int = option(default=0, read=whole(), metavar="N", help="of weights, order and augmentation")
    device: str | None = option(metavar="NAME", help="cpu, cuda or cuda:N; default: cuda if there is one, else cpu")
    distributed: bool = option(default=False, of_one_call=True,
        help="there must be several processes, which torchrun starts; they find each other without it, too")
    world_size: int | None = option(read=whole(1), metavar="N", of_one_call=True,
        help="how many processes there must be; default: as many as torchrun or the environment says")
    dist_url: str = option(default="env://", metavar="URL", of_one_call=True,
        help="where several processes meet: env://, tcp://HOST:PORT or file:///PATH")
    init_timeout: float = option(default=1800.0, read=number(above=True), metavar="S", of_one_call=True,
        help="seconds that a process waits for the others, at the start and later")
    compile: bool = option(default=False,
        help="train by torch.compile, which takes a minute to start and then runs faster; evaluation stays as it is")
    deterministic: bool = option(default=False,
        help="deterministic algorithms only, on a GPU too, where they are slower: a run then repeats bit for bit")
    amp_dtype: str | None = option(choices=("float32", "bfloat16", "float16"),
        help="type to compute in, with weights in float32; default: bfloat16 on a GPU that has it, float16 on any "
             "other, float32 on a CPU")


@dataclass(frozen=True)
class ModelOptions:
    """The model and the average of its weights.

    Attributes:
        encoding: the options of all encodings by name; None where the encoding decides.
    """

    model: str = option(default="deit_base_patch16_224", metavar="NAME", help="a model of models_lape")
    pe: str | None = option(metavar="NAME", aliases=("--pos-embed",),
        help="positional encoding, NAME or 'NAME(option=value)', or a sum with at most one of each family; "
             f"--list-encodings describes them; {OWN}")
    join_type: str | None = option(metavar="NAME", help=f"how an absolute encoding reaches the layers; {OWN}")
    global_pool: str | None = option(metavar="POOL",
        help=f"what the classifier reads: token, avg, avgmax, max, map, as timm has them; {OWN}")
    model_kwargs: Mapping[str, Any] | None = option(nargs="+", action=Arguments, metavar="KEY=VALUE",
        help=f"other arguments of timm's class, such as class_token=False fc_norm=False; {OWN}")
    input_size: int | Sequence[int] | None = option(read=image_size, metavar="S",
        aliases=("--image-size", "--img-size"), help=f"side of the images, or HEIGHT,WIDTH, pixels; {OWN}")
    drop: float | None = option(read=optional(FRACTION), metavar="P",
        help=f"probability of dropout before the classifier; {OWN}")
    drop_path: float | None = option(read=optional(FRACTION), metavar="P",
        help=f"probability to skip the last block, the others less; {OWN}")
    reference_grid: bool = option(default=False, of_one_call=True,
        help="with --eval, at another size: attention reads places in the cells of the trained grid, so that a part of "
             "the image has the same place at every size")
    log_n: bool = option(default=False, of_one_call=True,
        help="with --eval, at another size: multiply the logits of attention by log(tokens) / log(tokens in training)")
    model_ema: bool = option(default=False, help="average the weights over the updates, and evaluate the average too")
    model_ema_decay: float = option(default=0.99996, read=FRACTION, metavar="D", help="the average's decay per update")
    model_ema_force_cpu: bool = option(default=False,
        help="keep the average in the CPU's memory; it comes to the device to be evaluated")
    train_mode: bool = option(default=True,
        help="train in training mode; without, as DeiT fine-tunes, in evaluation mode: no dropout, no dropped blocks")
    attn_only: bool = option(default=False, help="train attention, positions and classifier only")
    encoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataOptions:
    """The data set and its loading."""

    data_set: str = option(default="IMNET", metavar="NAME", aliases=("--dataset",),
        help="IMNET, FOLDER, WDS (tar files), CIFAR10, CIFAR100, INAT (iNaturalist 2018), INAT19, DIGITS or "
             "WHERE (synthetic), in any case")
    data_path: str | None = option(metavar="DIR",
        help="IMNET, FOLDER: holds train/ and val/, with a folder of images per class; INAT, INAT19: holds the "
             "annotation files, categories.json and the images; WDS: the tar files to train with, as a pattern in "
             "quotes, 'shards/train-{0000..0099}.tar', of paths, https: URLs or commands ('pipe:cat FILE'); CIFAR: "
             "where it is, or is downloaded to; default: ./data for CIFAR")
    eval_data_path: str | None = option(metavar="PATTERN",
        help="WDS: the tar files to test with, likewise; default: none")
    inat_category: str | None = option(metavar="NAME",
        help="what makes a class of INAT, INAT19: name, genus, family, order, class, phylum, kingdom or supercategory; "
             "default: name, the species")
    where_task: str | None = option(metavar="NAME",
        help="what WHERE asks: cell, which cell is marked; direction, from one mark to another; order, of three marks; "
             "distance, of two; default: cell")
    where_cell: int | None = option(read=whole(1), metavar="N", help="side of a cell of WHERE, pixels; default: 4")
    num_classes: int | None = option(read=whole(1), metavar="N", aliases=("--n-classes", "--nb-classes"),
        of_one_call=True, help="how many classes there must be; default: as many as the data set has")
    batch_size: int = option(default=64, read=whole(1), metavar="N", aliases=("-b", "--batch"),
        help="images per step and process")
    num_workers: int = option(default=min(MOST_WORKERS, os.cpu_count() or 1), read=whole(), metavar="N",
        aliases=("--n-workers",),
        help="processes that load data, for each training process; default: one per core, at most 10")
    shared_batches: str | None = option(metavar="DIR", of_one_call=True,
        help="share augmented batches, through files in DIR, with the runs that name it at the same time and train on "
             "the same batches: each is made once; not for WDS; compare.py --share-batches gives it to its runs; "
             "default: each run makes its own")
    pin_mem: bool | None = option(help="load into page-locked memory; default: on with a GPU")
    skip_bad_images: bool = option(default=False,
        help="train with another image in place of one that cannot be read, and count it; evaluation never does")
    interpolation: str = option(default="bicubic", metavar="NAME",
        help="how evaluation resizes: bicubic, bilinear, nearest, ...")
    dist_eval: bool = option(default=True,
        help="share out the test images; without, every process evaluates all, to the same result")
    eval_crop_ratio: float = option(default=0.875, read=FRACTION, metavar="R",
        help="evaluation's centre crop, part of the shorter side")


@dataclass(frozen=True)
class AugmentationOptions:
    """What training makes of an image, of a batch, and of the order."""

    train_crop: str = option(default="random-resized", metavar="HOW",
        help="random-resized; pad, for a crop of the image padded by an eighth of its side; none")
    fast_crop: bool | None = option(
        help="crop, shear and shift image files faster, within a rounding of PIL's pixels; without, by PIL; "
             "default: on")
    scale: Sequence[float] | None = option(read=FRACTION, nargs=2, metavar=("LOW", "HIGH"),
        help="area of the random resized crop, part of the image's; default: 0.08 1")
    src: bool = option(default=False,
        help="simple random crop of DeiT III, in place of --train-crop: the shorter side resized to the input's, "
             "4 pixels of reflection around, a random crop")
    train_interpolation: str = option(default="bicubic", metavar="NAME",
        help="how training resizes: bicubic, bilinear, random")
    hflip: float = option(default=0.5, read=FRACTION, metavar="P", help="probability of a horizontal flip")
    aa: str | None = option(read=optional(str), metavar="POLICY",
        help="timm's augmentation policy, such as rand-m9-mstd0.5-inc1, or torchvision for its RandAugment; default: "
             "none")
    three_augment: bool = option(default=False, aliases=("--ThreeAugment",),
        help="grey, solarised or blurred, as in DeiT III, in place of --aa")
    color_jitter: float | None = option(read=optional(AMOUNT), metavar="X",
        help="strength of changes of brightness, contrast and saturation; default: none")
    reprob: float = option(default=0.0, read=FRACTION, metavar="P", help="probability of random erasing")
    remode: str = option(default="pixel", metavar="MODE", help="what erases: const, rand, pixel")
    recount: int = option(default=1, read=whole(1), metavar="N", help="erased boxes per image")
    repeated_aug: bool = option(default=False,
        help="show a third of the images per epoch, each three times and augmented anew")
    pos_shift: float = option(default=0.0, read=AMOUNT, metavar="S",
        help="shift the places of all patches by up to S halves of the grid's sides, drawn for each step; 0: off")
    pos_jitter: float = option(default=1.0, read=number(1.0), metavar="J",
        help="stretch columns and rows by factors from 1/J to J, drawn for each step; 1: off")
    pos_rescale: float = option(default=1.0, read=number(1.0), metavar="R",
        help="stretch both by the same factor from 1/R to R, drawn for each step; 1: off")
    mixup: float = option(default=0.0, read=AMOUNT, metavar="ALPHA", help="mixup's alpha; 0: off")
    cutmix: float = option(default=0.0, read=AMOUNT, metavar="ALPHA", help="cutmix's alpha; 0: off")
    cutmix_minmax: Sequence[float] | None = option(read=FRACTION, nargs=2, metavar=("LOW", "HIGH"),
        help="sides of cutmix's box, parts of the image's; default: drawn with --cutmix")
    mixup_prob: float = option(default=1.0, read=FRACTION, metavar="P",
        help="probability of mixing where mixup or cutmix is on")
    mixup_switch_prob: float = option(default=0.5, read=FRACTION, metavar="P",
        help="probability of cutmix where both are on")
    mixup_off_epoch: int | None = option(read=whole(1), metavar="N",
        help="epochs after which mixup and cutmix are off; default: never")
    mixup_mode: str = option(default="batch", choices=("batch", "pair", "elem"),
        help="what shares a draw: batch, pair of images, image")


@dataclass(frozen=True)
class OptimisationOptions:
    """How long training lasts, its optimizer, its schedule and its loss."""

    epochs: int = option(default=300, read=whole(1), metavar="N", help="passes over the training data")
    accum_steps: int = option(default=1, read=whole(1), metavar="K",
        help="batches per update, for a larger effective batch")
    start_epoch: int = option(default=0, read=whole(), metavar="N",
        help="epochs of the schedule to leave out at the start")
    opt: str = option(default="adamw", metavar="NAME", help="one of timm's optimizers")
    opt_eps: float | None = option(read=optional(AMOUNT), metavar="X", help="the optimizer's epsilon; default: its own")
    opt_betas: Sequence[float] | None = option(read=FRACTION, nargs="+", metavar="B",
        help="the optimizer's betas; default: its own")
    momentum: float | None = option(read=optional(FRACTION), metavar="M",
        help="the optimizer's momentum; default: 0.9 where it has one")
    weight_decay: float = option(default=0.05, read=AMOUNT, metavar="W",
        help="on all weights but biases, norms and encodings")
    clip_grad: float | None = option(read=optional(number(above=True)), metavar="NORM",
        help="largest norm of the gradient; default: any")
    lr: float = option(default=5e-4, read=AMOUNT, metavar="LR",
        help="learning rate of an update of 512 images, scaled in proportion")
    unscale_lr: bool = option(default=False, help="use --lr as it is")
    sched: str = option(default="cosine", choices=("cosine", "tanh", "poly", "step", "plateau", "constant"),
        help="learning rate after the warm-up")
    sched_on_updates: bool = option(default=False,
        help="change the learning rate with every update in place of every epoch")
    sched_one_epoch_late: bool = option(default=False,
        help="each epoch has the learning rate that the schedule has one epoch earlier, as in DeiT's and LaPE's loops")
    warmup_epochs: int = option(default=5, read=whole(), metavar="N", help="epochs of linear warm-up, part of --epochs")
    warmup_lr: float | None = option(read=AMOUNT, metavar="LR",
        help="learning rate at the start of the warm-up, not scaled; default: 1e-6")
    min_lr: float | None = option(read=AMOUNT, metavar="LR",
        help="learning rate at the end of cosine, tanh and poly, and the least of plateau; not scaled; default: 1e-5")
    cooldown_epochs: int | None = option(read=whole(), metavar="N",
        help="last epochs of cosine, tanh and poly, part of --epochs, that stay at --min-lr; default: 0")
    decay_epochs: int | None = option(read=whole(1), metavar="N",
        help="epochs from one decay of step to the next; default: 30")
    decay_rate: float | None = option(read=AMOUNT, metavar="X", aliases=("--dr",),
        help="factor of each decay of step and plateau; the power of poly; default: 0.1")
    patience_epochs: int | None = option(read=whole(), metavar="N",
        help="epochs without a better test accuracy before plateau decays; default: 10")
    lr_noise: Sequence[float] | None = option(read=FRACTION, nargs="+", metavar="X",
        help="part of the schedule from which on the learning rate is noisy, and up to which; default: none")
    lr_noise_pct: float | None = option(read=number(0.01, 1.0), metavar="X",
        help="largest noise, part of the learning rate; default: 0.67")
    lr_noise_std: float | None = option(read=number(above=True), metavar="X",
        help="standard deviation of the noise, part of the learning rate; default: 1")
    bce_loss: bool = option(default=False,
        help="binary cross entropy of each class, all classes of a mixed image being right, as in DeiT III")
    smoothing: float = option(default=0.0, read=FRACTION, metavar="X", help="label smoothing")
    cosub: bool = option(default=False, help="co-train two submodels, which --drop-path makes, by binary cross entropy")


@dataclass(frozen=True)
class DistillationOptions:
    """What a distilled model learns from a teacher."""

    distillation_type: str = option(default="none", choices=("none", "soft", "hard"),
        help="what a distilled model learns from a teacher: its probabilities, or its best guess")
    teacher_model: str | None = option(metavar="NAME",
        help="the teacher, any model of timm; NAME.TAG without --teacher-path has the weights that timm publishes; "
             "default: no teacher")
    teacher_path: str | None = option(metavar="FILE", help="checkpoint with the teacher's weights; default: no teacher")
    distillation_alpha: float | None = option(read=FRACTION, metavar="X",
        help="the teacher's weight in the loss; default: 0.5")
    distillation_tau: float | None = option(read=number(above=True), metavar="X",
        help="temperature of soft; default: 1")
# fmt: on


@dataclass(frozen=True)
class Options:
    """All options of a run."""

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    augmentation: AugmentationOptions
    optimisation: OptimisationOptions
    distillation: DistillationOptions

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Options":
        """The options of these values by name (`batch_size`); names of no section are those of encodings."""
        rest = dict(values)
        sections: dict[str, Any] = {
            title: {one.name: rest.pop(one.name) for one in options_of(section) if one.name in rest}
            for title, section in SECTIONS.items()
        }
        sections["model"]["encoding"] = rest
        return cls(**{title: section(**sections[title]) for title, section in SECTIONS.items()})

    def by_name(self) -> dict[str, Any]:
        """All values by name (`batch_size`), section after section, those of the encodings last."""
        sections = ((getattr(self, title), section) for title, section in SECTIONS.items())
        values = {one.name: getattr(values, one.name) for values, section in sections for one in options_of(section)}
        return {**values, **self.model.encoding}

    def changed(self, **values: Any) -> "Options":
        """These options with other values for some names."""
        return Options.of({**self.by_name(), **values})


def options_of(section: type) -> Iterator[Field[Any]]:
    """The fields of a section that are options."""
    return (one for one in fields(section) if "help" in one.metadata)


SECTIONS: dict[str, Any] = {section.name: section.type for section in fields(Options)}
"""The class of each section by its title."""
OF_ONE_CALL = {one.name for section in SECTIONS.values() for one in options_of(section) if one.metadata["of_one_call"]}
"""Options of one call: no recipe may set them, and a saved configuration leaves them out."""


# ---- the parser


class Parser(argparse.ArgumentParser):
    """A parser in whose flags `-` and `_` mean the same, and whose errors are a `ValueError` of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, with any spelling of a flag, and with negative numbers such as -1e-5 as values."""
        words: list[str] = []
        for word in map(with_dashes, sys.argv[1:] if args is None else args):
            if words and words[-1].startswith("--") and "=" not in words[-1] and NEGATIVE.fullmatch(word):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return super().parse_known_args(words, namespace)


class OptionParser(Parser):
    """The parser of `main.py`.

    Attributes:
        defaults: of every option, by its name (`batch_size`).
        flags: option names by flag (`--batch-size`), other names of the flag included.
        sections: option names by the title of their section.
    """

    def __init__(self) -> None:
        super().__init__(
            prog="main.py",
            usage="%(prog)s [options]",
            description="Train a vision transformer or evaluate a checkpoint; with several processes, by torchrun.",
            epilog="In flags, - and _ mean the same. The command line overrides the recipe, the recipe the defaults.",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=WIDTH),
            allow_abbrev=False,
        )
        self.defaults: dict[str, Any] = {}
        self.flags: dict[str, str] = {}
        self.sections: dict[str, list[str]] = {}

    def section(self, title: str) -> Callable[..., None]:
        """Start a section; what it returns adds an option: flags, help, default, and what `add_argument` takes."""
        group = self.add_argument_group(title)
        names = self.sections.setdefault(title, [])

        def add(*flags: str, help: str, default: Any = None, **kwargs: Any) -> None:
            if "default:" not in help:
                help += f" (default: {_show(default)})"
            # The default stays out of argparse, so that what it reads is what was given.
            name = group.add_argument(*flags, help=help, default=argparse.SUPPRESS, **kwargs).dest
            names.append(name)
            self.defaults[name] = default
            self.flags.update(dict.fromkeys(flags, name))

        return add

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options that `argv` names, without the defaults.

        Raises:
            ValueError: an unknown flag, or an illegal value; names it.
        """
        given, unknown = self.parse_known_args(argv)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]}{self.suggest(unknown[0], argv)}")
        return vars(given)

    def suggest(self, flag: str, argv: Sequence[str] = ()) -> str:
        """What to do about an unknown flag, which stands in `argv`."""
        if known_instead := advice(flag, [with_dashes(word) for word in argv], self.flags):
            return f": {known_instead}"
        known = get_close_matches(flag.partition("=")[0], self.flags)
        hint = f"did you mean {' or '.join(known)}?" if known else "leave it out;"
        return f": {hint} {self.prog} --help lists all"


def with_dashes(token: str) -> str:
    """A word of the command line, with `-` for each `_` where it is a flag."""
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value if token.startswith("--") else token


def flag_of(name: str) -> str:
    """`--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


def build_parser(
    encoding_options: Mapping[str, tuple[type, Sequence[str]]],
    names: Mapping[str, str] | None = None,
    only: Container[str] | None = None,
) -> OptionParser:
    """All options of `main.py`, in sections.

    Args:
        encoding_options: of the positional encodings: each one's type, and the encodings that take it.
        names: what the help of an option lists, by the option's name.
        only: the names of the options that another command takes, beside those of encodings; default: all.
    """
    names = names or {}
    parser = OptionParser()
    for title, section in SECTIONS.items():
        taken = [one for one in options_of(section) if only is None or one.name in only]
        if not taken:
            continue
        add = parser.section(title)
        for one in taken:
            about = one.metadata
            kinds = (one.type, *get_args(one.type))
            kind: type = bool if bool in kinds else Mapping if Mapping[str, Any] in kinds else str
            reading = reading_of(kind, about["read"], has_no=not about["of_one_call"])
            text = about["help"] + (f"; {names[one.name]}" if one.name in names else "")
            add(flag_of(one.name), *about["aliases"], help=text, default=one.default, **reading, **about["how"])
    add = parser.section("encoding")
    for name, (kind, encodings) in encoding_options.items():
        add(flag_of(name), **encoding_option(kind, encodings))
    return parser


def reading_of(kind: type, read: Callable[[str], Any], has_no: bool = True) -> dict[str, Any]:
    """How argparse reads a value by `read`, or a bool, by a flag that may have its `--no-name`."""
    if kind is Mapping:
        return {}
    if kind is not bool:
        return {"type": read}
    return {"action": argparse.BooleanOptionalAction if has_no else "store_true"}


def encoding_option(kind: type, encodings: Sequence[str]) -> dict[str, Any]:
    """What `add_argument` takes for an option of encodings, of type int, float, bool or str."""
    read, metavar = {int: (whole(None), "N"), float: (number(-math.inf), "X")}.get(kind, (str, "TEXT"))
    about = {"help": f"of --pe {', '.join(encodings)} and their sums; default: the encoding's own"}
    return {**about, **reading_of(kind, read), **({} if kind is bool else {"metavar": metavar})}


# ---- recipes


def find_recipe(name: str) -> Path:
    """The file of a recipe, by its path or by its name in `recipes/`.

    Raises:
        FileNotFoundError: there is none; lists those of `recipes/`.
    """
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe {path}: give the path of a .yaml file, or one of {known}")
    return path


def read_recipe(parser: OptionParser, path: Path) -> dict[str, Any]:
    """The options that a recipe sets: a flat YAML mapping from option to value, in any spelling of the flag.

    Raises:
        ValueError: not such a mapping, an unknown option, or an illegal value; names the file and the option.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} is no mapping from option to value")

    options: dict[str, Any] = {}
    for key, value in content.items():
        flag = flag_of(str(key))
        name = parser.flags.get(flag)
        if name is None:
            raise ValueError(f"recipe {path}: unknown option {key!r}{parser.suggest(flag)}")
        if name in OF_ONE_CALL:
            raise ValueError(f"recipe {path}: {key} belongs on the command line, not in a recipe")
        if name in options:
            raise ValueError(f"recipe {path}: {key} is set twice")
        try:
            options[name] = (
                None if value is None and parser.defaults[name] is None else _read_value(parser, flag, value)
            )
        except ValueError as error:
            raise ValueError(f"recipe {path}: {str(error).removeprefix('argument ')}") from error
    return options


def _read_value(parser: OptionParser, flag: str, value: Any) -> Any:
    """A YAML value as the command line would read it."""
    if isinstance(value, bool):
        argv = [flag if value else flag.replace("--", "--no-", 1)]
    elif isinstance(value, list):
        argv = [flag, *map(str, value)]
    elif isinstance(value, dict):
        argv = [flag, *(f"{key}={setting}" for key, setting in value.items())]
    elif isinstance(value, str | int | float):
        argv = [f"{flag}={value}"]
    else:
        raise ValueError(f"{flag}: expected a value as on the command line, got {value!r}")
    (read,) = parser.read(argv).values()
    return read


# ---- what a run resolved to


def saved_options(options: Options) -> dict[str, Any]:
    """The options that make a run what it is, as plain data."""
    return {name: value for name, value in options.by_name().items() if name not in OF_ONE_CALL}


def config_text(options: Mapping[str, Any], command: str) -> str:
    """`options` as a recipe file that says where it comes from."""
    header = f"# What the options of a run resolved to. As --recipe, this file repeats the run.\n# {command}\n"
    return header + yaml.safe_dump(dict(options), sort_keys=False)


def differences(options: Options, given: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """What was given and differs from `base`, which has a value for each option: `epochs 2 (was 20)`."""
    values = options.by_name()
    return [
        f"{name.replace('_', '-')} {_show(values[name])} (was {'unset' if base[name] is None else _show(base[name])})"
        for name in given
        if name not in OF_ONE_CALL and given[name] != base[name]
    ]


def describe(options: Options, parser: OptionParser, given: Mapping[str, Any]) -> str:
    """All options in aligned, wrapped lines, a section each; a star marks those that were given."""
    values = options.by_name()
    indent = 2 + max(map(len, parser.sections))
    lines = []
    for title, names in parser.sections.items():
        entries = [f"{name.replace('_', '-')}{'*' * (name in given)} {_show(values[name])}" for name in names]
        text = "   ".join(entry.replace(" ", "\0") for entry in entries)  # so that no entry is broken
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=title.ljust(indent), subsequent_indent=" " * indent, break_on_hyphens=False
        )
    return "\n".join(lines).replace("\0", " ")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(_show, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key}={setting}" for key, setting in value.items())
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
