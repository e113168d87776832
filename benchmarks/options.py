"""The command lines of the benchmarks, read without torch: in a moment."""

from argparse import ArgumentParser
from pathlib import Path

from training.catalogue import join_names
from training.options import whole

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_compact_patch4_32")
DEFAULT_MODELS = ["deit_tiny_patch16_224", "vit_compact_patch4_32"]
DTYPES = ("float32", "bfloat16", "float16")
STEPS = {"train": "training step", "forward": "evaluation step"}
SIDES = [14, 24, 32, 48, 64]
FORWARD = 4
"""Forward steps for each training step."""


def models_parser() -> ArgumentParser:
    """Of `benchmarks.models`."""
    parser = ArgumentParser(
        prog="python -m benchmarks.models",
        description="Training and evaluation step of every legal pair of an encoding and a join, next to timm's model "
        "of the same size.",
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=DEFAULT_MODELS, help="default: all but DeiT-S")
    parser.add_argument("--step", nargs="+", choices=STEPS, default=list(STEPS), help="a table of each; default: both")
    parser.add_argument("--pe", nargs="+", metavar="NAME", help="encodings; default: all, without sums")
    parser.add_argument("--join-type", nargs="+", metavar="NAME", help="joins, where they are legal; default: all")
    parser.add_argument(
        "--reference",
        choices=("timm", *join_names()),
        default="timm",
        help="compare with timm's model, or with the same encoding under this join (default: timm)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 16 of 224 x 224, 128 of 32 x 32")
    parser.add_argument(
        "--repeats",
        type=int,
        default=10,
        help=f"training steps of each model, and {FORWARD} times as many forward ones (default: 10)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--compile", action="store_true", help="compile all models (default: eager)")
    return parser


def resolution_parser() -> ArgumentParser:
    """Of `benchmarks.resolution`."""
    parser = ArgumentParser(
        prog="python -m benchmarks.resolution",
        description="How time and memory of a forward and of a training step grow with the number of patches, next to "
        "timm's model: deit_tiny_patch16_224, cut to a few blocks, at other sizes of the image.",
    )
    parser.add_argument("--pe", nargs="+", metavar="NAME", help="encodings; default: all, without sums")
    parser.add_argument(
        "--join-type", nargs="+", metavar="NAME", default=["basic"], help="joins, where they are legal; default: basic"
    )
    parser.add_argument(
        "--sides", type=whole(2), nargs="+", default=SIDES, metavar="N", help="N x N patches (default: 14 24 32 48 64)"
    )
    parser.add_argument(
        "--measure", nargs="+", choices=("time", "memory"), default=["time", "memory"], help="default: both"
    )
    parser.add_argument("--depth", type=whole(1), default=4, metavar="N", help="blocks (default: 4)")
    parser.add_argument("--batch-size", type=whole(1), default=1, metavar="N", help="default: 1")
    parser.add_argument("--repeats", type=whole(1), default=5, metavar="N", help="steps of each kind (default: 5)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the ratios, as PNG, SVG or PDF")
    return parser


def loader_parser() -> ArgumentParser:
    """Of `benchmarks.loader`."""
    parser = ArgumentParser(prog="python -m benchmarks.loader", description="How fast a core loads images.")
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="any folder of JPEGs; default: random ones")
    parser.add_argument("--images", type=whole(1), metavar="N", help="that many of them; default: all")
    parser.add_argument("--workers", type=whole(1), default=1, metavar="N", help="processes at a time; default: 1")
    parser.add_argument("--repeats", type=whole(1), default=5, metavar="N", help="passes over the images; default: 5")
    return parser


def startup_parser() -> ArgumentParser:
    """Of `benchmarks.startup`."""
    parser = ArgumentParser(
        prog="python -m benchmarks.startup",
        description="How long a user waits: for an import, for an answer, and for the first step of a run.",
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each (default: 7)")
    return parser
