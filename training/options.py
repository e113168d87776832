"""The options of a run: one parser reads them from the command line and from recipe files.

An option is looked up on the command line, then in the recipe, then in the defaults below. The defaults are DeiT's, but
augmentation and regularisation are off unless a recipe or a flag turns them on: a recipe tells all that a run does.
"""

import argparse
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"
RUN_ONLY = (
    "output_dir",
    "resume",
    "auto_resume",
    "eval",
    "eval_ema",
    "recipe",
    "world_size",
    "dist_url",
    "init_timeout",
)
"""Options of one call: no recipe may set them, and a saved configuration leaves them out."""
WIDTH = 110
"""Columns of the help and of the list of options."""
MOST_WORKERS = 10
"""Processes that load data, unless more are asked for."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `ValueError` of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class OptionParser(Parser):
    """A parser in whose flags `-` and `_` mean the same.

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
        return vars(self.parse_args([with_dashes(token) for token in argv]))


def with_dashes(token: str) -> str:
    """A word of the command line, with `-` for each `_` where it is a flag."""
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value if token.startswith("--") else token


def flag_of(name: str) -> str:
    """`--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


# ---- value types


def whole(low: int = 0) -> Callable[[str], int]:
    """A whole number, at least `low`."""

    def read(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() else low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return value

    return read


def number(low: float = 0.0, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A finite number in `[low, high]`, or in `(low, high]` if it has to be `above` the low end."""
    least = f"above {low:g}" if above else f"of at least {low:g}"
    wanted = least if high == math.inf else f"{least} and at most {high:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text!r}")
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


# ---- the options


def build_parser(encoding_options: Mapping[str, tuple[type, Sequence[str]]]) -> OptionParser:
    """All options of `main.py`, in sections.

    Args:
        encoding_options: of the positional encodings: each one's type, and the encodings that take it.
    """
    parser = OptionParser()
    for title, add_options in (
        ("run", _run_options),
        ("model", _model_options),
        ("data", _data_options),
        ("augmentation", _augmentation_options),
        ("optimisation", _optimisation_options),
        ("distillation", _distillation_options),
    ):
        add_options(parser.section(title))
    add = parser.section("encoding")
    for name, (kind, encodings) in encoding_options.items():
        read = whole() if kind is int else number()
        whose = f"of --pe {', '.join(encodings)} and their sums"
        add(flag_of(name), type=read, metavar="N" if kind is int else "X", help=f"{whose}; default: the encoding's own")
    return parser


# fmt: off
def _run_options(add: Callable[..., None]) -> None:
    add("--output-dir", metavar="DIR",
        help="receives the checkpoints, config.yaml, log.txt and curves.png; default: nothing is written")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
        help="write what log.txt has, and the loss as it goes, for TensorBoard, to tensorboard/ in --output-dir")
    add("--resume", metavar="FILE",
        help="go on with the training of this checkpoint, in its folder and with its options unless others are given;"
             " with --eval: the checkpoint to evaluate; here, at --finetune and at --teacher-path, FILE may be an "
             "https: URL whose name ends in its SHA-256 (NAME-a1311bcf.pth), or URL#sha256=a1311bcf; default: start "
             "afresh")
    add("--eval", action="store_true", default=False,
        help="evaluate the checkpoint of --resume and end; at another --input-size if one is given")
    add("--eval-ema", action="store_true", default=False, help="with --eval: evaluate the averaged weights")
    add("--auto-resume", action="store_true", default=False,
        help="--resume the newest readable checkpoint of --output-dir; start afresh where there is none")
    add("--checkpoint-steps", type=optional(whole(1)), metavar="N",
        help="save checkpoint.pth every N updates, too; default: after each epoch only")
    add("--max-bad-steps", type=whole(1), default=10, metavar="N",
        help="end after N updates in a row whose loss or gradient is not finite; each is skipped")
    add("--finetune", metavar="FILE",
        help="start from the weights of this checkpoint, of any size, encoding or join; model, encoding, join and size "
             "are the checkpoint's unless others are given; default: start from random weights")
    add("--recipe", metavar="NAME",
        help="options from recipes/NAME.yaml, or from the .yaml file of this path; default: the data set's recipe")
    add("--seed", type=whole(), default=0, metavar="N", help="of weights, order and augmentation")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda if there is one, else cpu")
    add("--world-size", type=whole(1), metavar="N",
        help="how many processes there must be; default: as many as torchrun or the environment says")
    add("--dist-url", default="env://", metavar="URL",
        help="where several processes meet: env://, tcp://HOST:PORT or file:///PATH")
    add("--init-timeout", type=number(above=True), default=1800.0, metavar="S",
        help="seconds that a process waits for the others, at the start and later")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="train by torch.compile, which takes a minute to start and then runs faster; evaluation stays as it is")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False,
        help="deterministic algorithms only, on a GPU too, where they are slower: a run then repeats bit for bit")
    add("--amp-dtype", choices=("float32", "bfloat16", "float16"),
        help="type to compute in, with weights in float32; default: bfloat16 on a GPU that has it, float16 on any "
             "other, float32 on a CPU")


def _model_options(add: Callable[..., None]) -> None:
    own = "default: the model's own"
    add("--model", default="deit_base_patch16_224", metavar="NAME", help="a model of models_lape")
    add("--pe", "--pos-embed", metavar="NAME", help=f"positional encoding; {own}")
    add("--join-type", metavar="NAME", help=f"how an absolute encoding reaches the layers; {own}")
    add("--input-size", type=image_size, metavar="S", help=f"side of the images, or HEIGHT,WIDTH, pixels; {own}")
    add("--drop", type=optional(FRACTION), metavar="P", help=f"probability of dropout before the classifier; {own}")
    add("--drop-path", type=optional(FRACTION), metavar="P",
        help=f"probability to skip the last block, the others less; {own}")
    add("--model-ema", action=argparse.BooleanOptionalAction, default=False,
        help="average the weights over the updates, and evaluate the average too")
    add("--model-ema-decay", type=FRACTION, default=0.99996, metavar="D", help="the average's decay per update")
    add("--model-ema-force-cpu", action=argparse.BooleanOptionalAction, default=False,
        help="keep the average in the CPU's memory; it comes to the device to be evaluated")
    add("--train-mode", action=argparse.BooleanOptionalAction, default=True,
        help="train in training mode; without, as DeiT fine-tunes, in evaluation mode: no dropout, no dropped blocks")
    add("--attn-only", action=argparse.BooleanOptionalAction, default=False,
        help="train attention, positions and classifier only")


def _data_options(add: Callable[..., None]) -> None:
    add("--data-set", "--dataset", default="IMNET", metavar="NAME",
        help="IMNET, FOLDER, WDS (tar files), CIFAR10, CIFAR100, INAT (iNaturalist 2018), INAT19 or DIGITS, in any "
             "case")
    add("--data-path", metavar="DIR",
        help="IMNET, FOLDER: holds train/ and val/, with a folder of images per class; INAT, INAT19: holds the "
             "annotation files, categories.json and the images; WDS: the tar files to train with, as a pattern in "
             "quotes, 'shards/train-{0000..0099}.tar', of paths, https: URLs or commands ('pipe:cat FILE'); CIFAR: "
             "where it is, or is downloaded to; default: ./data for CIFAR")
    add("--eval-data-path", metavar="PATTERN", help="WDS: the tar files to test with, likewise; default: none")
    add("--inat-category", metavar="NAME",
        help="what makes a class of INAT, INAT19: name, genus, family, order, class, phylum, kingdom or supercategory; "
             "default: name, the species")
    add("--batch-size", type=whole(1), default=64, metavar="N", help="images per step and process")
    add("--num-workers", type=whole(), default=min(MOST_WORKERS, os.cpu_count() or 1), metavar="N",
        help="processes that load data, for each training process; default: one per core, at most 10")
    add("--pin-mem", action=argparse.BooleanOptionalAction, help="load into page-locked memory; default: on with a GPU")
    add("--skip-bad-images", action=argparse.BooleanOptionalAction, default=False,
        help="train with another image in place of one that cannot be read, and count it; evaluation never does")
    add("--interpolation", default="bicubic", metavar="NAME",
        help="how evaluation resizes: bicubic, bilinear, nearest, ...")
    add("--dist-eval", action=argparse.BooleanOptionalAction, default=True,
        help="share out the test images; without, every process evaluates all, to the same result")
    add("--eval-crop-ratio", type=FRACTION, default=0.875, metavar="R",
        help="evaluation's centre crop, part of the shorter side")


def _augmentation_options(add: Callable[..., None]) -> None:
    add("--train-crop", default="random-resized", metavar="HOW",
        help="random-resized; pad, for a crop of the image padded by an eighth of its side; none")
    add("--fast-crop", action=argparse.BooleanOptionalAction,
        help="make the random resized crops of image files faster, within a rounding of PIL's pixels; without, by PIL; "
             "default: on")
    add("--scale", type=FRACTION, nargs=2, metavar=("LOW", "HIGH"),
        help="area of the random resized crop, part of the image's; default: 0.08 1")
    add("--src", action=argparse.BooleanOptionalAction, default=False,
        help="simple random crop of DeiT III, in place of --train-crop: the shorter side resized to the input's, "
             "4 pixels of reflection around, a random crop")
    add("--train-interpolation", default="bicubic", metavar="NAME",
        help="how training resizes: bicubic, bilinear, random")
    add("--hflip", type=FRACTION, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--aa", type=optional(str), metavar="POLICY",
        help="timm's augmentation policy, such as rand-m9-mstd0.5-inc1, or torchvision for its RandAugment; default: "
             "none")
    add("--three-augment", "--ThreeAugment", action=argparse.BooleanOptionalAction, default=False,
        help="grey, solarised or blurred, as in DeiT III, in place of --aa")
    add("--color-jitter", type=optional(AMOUNT), metavar="X",
        help="strength of changes of brightness, contrast and saturation; default: none")
    add("--reprob", type=FRACTION, default=0.0, metavar="P", help="probability of random erasing")
    add("--remode", default="pixel", metavar="MODE", help="what erases: const, rand, pixel")
    add("--recount", type=whole(1), default=1, metavar="N", help="erased boxes per image")
    add("--resplit", action=argparse.BooleanOptionalAction, default=False,
        help="refused: it spares a clean augmentation split from erasing, and DeiT, whose flag it is, makes no splits")
    add("--repeated-aug", action=argparse.BooleanOptionalAction, default=False,
        help="show a third of the images per epoch, each three times and augmented anew")
    add("--mixup", type=AMOUNT, default=0.0, metavar="ALPHA", help="mixup's alpha; 0: off")
    add("--cutmix", type=AMOUNT, default=0.0, metavar="ALPHA", help="cutmix's alpha; 0: off")
    add("--cutmix-minmax", type=FRACTION, nargs=2, metavar=("LOW", "HIGH"),
        help="sides of cutmix's box, parts of the image's; default: drawn with --cutmix")
    add("--mixup-prob", type=FRACTION, default=1.0, metavar="P",
        help="probability of mixing where mixup or cutmix is on")
    add("--mixup-switch-prob", type=FRACTION, default=0.5, metavar="P", help="probability of cutmix where both are on")
    add("--mixup-off-epoch", type=whole(1), metavar="N",
        help="epochs after which mixup and cutmix are off; default: never")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch",
        help="what shares a draw: batch, pair of images, image")


def _optimisation_options(add: Callable[..., None]) -> None:
    add("--epochs", type=whole(1), default=300, metavar="N", help="passes over the training data")
    add("--accum-steps", type=whole(1), default=1, metavar="K", help="batches per update, for a larger effective batch")
    add("--start-epoch", type=whole(), default=0, metavar="N", help="epochs of the schedule to leave out at the start")
    add("--opt", default="adamw", metavar="NAME", help="one of timm's optimizers")
    add("--opt-eps", type=optional(AMOUNT), metavar="X", help="the optimizer's epsilon; default: its own")
    add("--opt-betas", type=FRACTION, nargs="+", metavar="B", help="the optimizer's betas; default: its own")
    add("--momentum", type=optional(FRACTION), metavar="M",
        help="the optimizer's momentum; default: 0.9 where it has one")
    add("--weight-decay", type=AMOUNT, default=0.05, metavar="W",
        help="on all weights but biases, norms and encodings")
    add("--clip-grad", type=optional(number(above=True)), metavar="NORM",
        help="largest norm of the gradient; default: any")
    add("--lr", type=AMOUNT, default=5e-4, metavar="LR",
        help="learning rate of an update of 512 images, scaled in proportion")
    add("--unscale-lr", action=argparse.BooleanOptionalAction, default=False, help="use --lr as it is")
    add("--sched", choices=("cosine", "tanh", "poly", "step", "plateau", "constant"), default="cosine",
        help="learning rate after the warm-up")
    add("--sched-on-updates", action=argparse.BooleanOptionalAction, default=False,
        help="change the learning rate with every update in place of every epoch")
    add("--warmup-epochs", type=whole(), default=5, metavar="N", help="epochs of linear warm-up, part of --epochs")
    add("--warmup-lr", type=AMOUNT, metavar="LR",
        help="learning rate at the start of the warm-up, not scaled; default: 1e-6")
    add("--min-lr", type=AMOUNT, metavar="LR",
        help="learning rate at the end of cosine, tanh and poly, and the least of plateau; not scaled; default: 1e-5")
    add("--cooldown-epochs", type=whole(), metavar="N",
        help="last epochs of cosine, tanh and poly, part of --epochs, that stay at --min-lr; default: 0")
    add("--decay-epochs", type=whole(1), metavar="N", help="epochs from one decay of step to the next; default: 30")
    add("--decay-rate", type=AMOUNT, metavar="X",
        help="factor of each decay of step and plateau; the power of poly; default: 0.1")
    add("--patience-epochs", type=whole(), metavar="N",
        help="epochs without a better test accuracy before plateau decays; default: 10")
    add("--lr-noise", type=FRACTION, nargs="+", metavar="X",
        help="part of the schedule from which on the learning rate is noisy, and up to which; default: none")
    add("--lr-noise-pct", type=number(0.01, 1.0), metavar="X",
        help="largest noise, part of the learning rate; default: 0.67")
    add("--lr-noise-std", type=number(above=True), metavar="X",
        help="standard deviation of the noise, part of the learning rate; default: 1")
    add("--bce-loss", action=argparse.BooleanOptionalAction, default=False,
        help="binary cross entropy of each class, all classes of a mixed image being right, as in DeiT III")
    add("--smoothing", type=FRACTION, default=0.0, metavar="X", help="label smoothing")
    add("--cosub", action=argparse.BooleanOptionalAction, default=False,
        help="co-train two submodels, which --drop-path makes, by binary cross entropy")


def _distillation_options(add: Callable[..., None]) -> None:
    add("--distillation-type", choices=("none", "soft", "hard"), default="none",
        help="what a distilled model learns from a teacher: its probabilities, or its best guess")
    add("--teacher-model", metavar="NAME", help="the teacher, any model of timm; default: no teacher")
    add("--teacher-path", metavar="FILE", help="checkpoint with the teacher's weights; default: no teacher")
    add("--distillation-alpha", type=FRACTION, metavar="X", help="the teacher's weight in the loss; default: 0.5")
    add("--distillation-tau", type=number(above=True), metavar="X", help="temperature of soft; default: 1")
# fmt: on


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
            raise ValueError(f"recipe {path}: unknown option {key!r} (main.py --help lists them)")
        if name in RUN_ONLY:
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
    elif isinstance(value, str | int | float):
        argv = [f"{flag}={value}"]
    else:
        raise ValueError(f"{flag}: expected a value as on the command line, got {value!r}")
    (read,) = parser.read(argv).values()
    return read


# ---- what a run resolved to


def saved_options(args: argparse.Namespace, parser: OptionParser) -> dict[str, Any]:
    """The options that make a run what it is, as plain data."""
    return {name: getattr(args, name) for name in parser.defaults if name not in RUN_ONLY}


def config_text(options: Mapping[str, Any], command: str) -> str:
    """`options` as a recipe file that says where it comes from."""
    header = f"# What the options of a run resolved to. As --recipe, this file repeats the run.\n# {command}\n"
    return header + yaml.safe_dump(dict(options), sort_keys=False)


def describe(args: argparse.Namespace, parser: OptionParser, given: Mapping[str, Any]) -> str:
    """All options in aligned, wrapped lines, a section each; a star marks those that were given."""
    indent = 2 + max(map(len, parser.sections))
    lines = []
    for title, names in parser.sections.items():
        entries = [f"{name.replace('_', '-')}{'*' * (name in given)} {_show(getattr(args, name))}" for name in names]
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
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
