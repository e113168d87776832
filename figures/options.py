"""The command line of `similarity_visualize.py`, read without torch: in a moment."""

import argparse
import math
import re
from collections.abc import Sequence

from training.catalogue import encoding_options
from training.options import Parser, encoding_option, flag_of

CHECKPOINT, PICTURES = "result/deit_t_LaPE/best_checkpoint.pth", "visualize/similarity"
SHORT_NAME = re.compile(r"deit_(?P<size>[tsb])(?P<distilled>_distill)?_(?P<join>basic|LaPE)")
SIZES = {"t": "tiny", "s": "small", "b": "base"}


def build_parser() -> Parser:
    """All options of this command; each flag in the spelling with `-` and the one with `_`."""
    parser = Parser(
        prog="similarity_visualize.py",
        usage="%(prog)s [--ckpt_path FILE | --model NAME --pretrained [TAG] | --compare FILE FILE ...] "
        "[--save_dir DIR] [options]",
        description="Draw what every layer of a checkpoint sees of positions.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--ckpt_path", "--ckpt-path", metavar="FILE", default=CHECKPOINT,
        help="a checkpoint: ours, an original's, or timm's (.pth or .safetensors); default, as in LaPE's code: "
        f"{CHECKPOINT}")  # fmt: skip
    source.add_argument("--pretrained", nargs="?", const="", metavar="TAG",
        help="in place of a checkpoint, the weights that timm publishes for --model, by default or under TAG"
    )  # fmt: skip
    source.add_argument("--compare", nargs="+", metavar="FILE",
        help="two checkpoints or more: their sheets below each other, and curves over depth")  # fmt: skip
    add = parser.add_argument
    add("--save_dir", "--save-dir", default=PICTURES, metavar="DIR",
        help=f"receives the pictures; default, as in LaPE's code: {PICTURES}")  # fmt: skip
    add("--token", type=pair, metavar="ROW,COLUMN", help="the patch to draw alone, counted from 0; default: the centre")
    add("--layers", type=numbers, metavar="LIST", help="the blocks to draw, such as 0,5,8-11; default: all")
    add("--heads", type=heads, metavar="LIST",
        help="the heads to draw, such as 0,2, or all, or mean; default: all where they fit a page of 2,000 x 2,500 "
        "pixels, else their mean")  # fmt: skip
    add("--full", action="store_true", help="draw every patch against every patch in overviews, too, which is done "
        "by default on grids of 64 patches or fewer, where that is more than a mean by offset")  # fmt: skip
    add("--scale", type=scale, default="quantile", metavar="SCALE",
        help="of the colours: quantile tells 99 %% of the values apart and says where it ends; range reaches the "
        "largest value, of cosines 1; a number is the limit itself; default: quantile")  # fmt: skip
    add("--format", choices=("png", "pdf", "svg"), default="png", help="of the pictures; default: png")
    add("--image", metavar="FILE", help="draw attention over this image too, as seen from the patch of --token; "
        "with --html, the page has it from every patch, also of --compare")  # fmt: skip
    add("--html", action="store_true", help="write explore.html, too: all of it on one page, to explore in a browser")
    add("--diagnosis", metavar="FILE",
        help="with --html: a diagnosis.json of diagnose.py, whose curves over depth the page shows, too")  # fmt: skip
    group = parser.add_argument_group("for a checkpoint that does not say what model it holds")
    add = group.add_argument
    add("--model", "--model-name", "--model_name", dest="model", metavar="NAME",
        help="a model of models_lape, one of timm with a table pos_embed, rotations or a bias by offset, or "
        "deit_{t,s,b}[_distill]_{basic,LaPE}")  # fmt: skip
    add("--pe", metavar="NAME", help="its positional encoding; default: the model's own")
    add("--join-type", "--join_type", metavar="NAME", help="how that reaches the layers; default: the model's own")
    add("--input-size", "--input_size", type=size, metavar="S", help="side of its images, or HEIGHT,WIDTH, in pixels; "
        "default: the model's own")  # fmt: skip
    for name, (kind, encodings) in encoding_options().items():
        add(flag_of(name), f"--{name}", **encoding_option(kind, encodings))
    return parser


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, the model's short name spelt out.

    Raises:
        ValueError: flags that are unknown or do not go together.
    """
    args = build_parser().parse_args(argv)
    if args.compare is not None and len(args.compare) < 2:
        raise ValueError("--compare takes two checkpoints or more; one alone is drawn by --ckpt_path")
    if args.pretrained is not None and args.model is None:
        raise ValueError("--pretrained needs --model NAME: the model whose weights timm publishes")
    if args.compare is not None and args.image is not None and not args.html:
        raise ValueError(
            "--image draws one checkpoint, of --ckpt_path or --pretrained; that of --compare is on the page: add --html"
        )
    if args.diagnosis is not None and not args.html:
        raise ValueError("--diagnosis is for the page of --html: give both")
    if args.model is not None:
        args.model, join_type = full_name(args.model)
        args.join_type = args.join_type or join_type
    return args


def pair(text: str) -> tuple[int, int]:
    """`3,5`."""
    first, _, second = text.partition(",")
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected two whole numbers such as 3,5, got {text!r}")
    return int(first), int(second)


def numbers(text: str) -> tuple[int, ...]:
    """`0,5,8-11`, in ascending order, each once."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 1000):
            raise argparse.ArgumentTypeError(f"expected whole numbers such as 0,5,8-11, got {text!r}")
        found.update(range(int(first), int(last) + 1))
    return tuple(sorted(found))


def heads(text: str) -> tuple[int, ...] | str:
    """`all`, `mean`, or numbers."""
    return text if text in ("all", "mean") else numbers(text)


def scale(text: str) -> str | float:
    """`quantile`, `range`, or a number above 0."""
    if text in ("quantile", "range"):
        return text
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise argparse.ArgumentTypeError(f"expected quantile, range or a number above 0, got {text!r}")
    return limit


def size(text: str) -> tuple[int, int]:
    """`32`, or `32,48` for height and width."""
    return pair(text if "," in text else f"{text},{text}")


def full_name(name: str) -> tuple[str, str | None]:
    """The model's name and the join, from one of the original's short names such as `deit_t_distill_LaPE`; any other
    name comes back as it is, without a join."""
    short = SHORT_NAME.fullmatch(name)
    if short is None:
        return name, None
    distilled = "_distilled" if short["distilled"] else ""
    return f"deit_{SIZES[short['size']]}{distilled}_patch16_224", short["join"]
