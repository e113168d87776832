"""The command line of `diagnose.py`, read without torch: in a moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.options import PLAIN, WAYS
from runtime.world import world_from_environment
from training.catalogue import encoding_options, encodings_by_family, join_names
from training.command_line import read_flags
from training.options import OptionParser, build_parser, whole

IMAGES = 1000
"""Test images that are looked at by default, at most: the half of them fits probes, the other half judges."""
OF_MAIN = {
    *("data_set", "data_path", "eval_data_path", "inat_category", "where_task", "where_cell", "batch_size"),
    *("num_workers", "pin_mem", "interpolation", "eval_crop_ratio", "eval_ema", "pretrained", "seed", "device"),
    *("amp_dtype", "model", "pe", "join_type", "global_pool", "model_kwargs", "input_size"),
}
"""Options of `main.py` that mean the same here."""


@dataclass(frozen=True)
class DiagnoseOptions:
    """What the command line asks for.

    Attributes:
        checkpoints: paths; None in the place of one for weights that timm publishes.
        knock_out_images: of the images that judge, at most; None for the default, which depends on the grid.
        given: options of `main.py` that the command line names.
    """

    checkpoints: Sequence[str | None]
    output_dir: Path
    images: int
    knock_out_images: int | None
    sizes: Sequence[int]
    size_ways: Sequence[str]
    given: dict[str, Any]


# fmt: off
def build_diagnose_parser() -> OptionParser:
    """The options of this command, and those of `main.py` that say what is evaluated, and on what."""
    names = {"pe": encodings_by_family(), "join_type": ", ".join(join_names())}
    parser = build_parser(encoding_options(), names, only=OF_MAIN)
    parser.prog = "diagnose.py"
    parser.usage = "%(prog)s CHECKPOINT ... --output_dir DIR [options]\n" \
                   "       %(prog)s --model NAME --pretrained [TAG] --data-set NAME --output_dir DIR [options]"
    parser.description = "Measure what a model knows of where its patches are, in which layer, and whether it uses it."
    parser.epilog = "In flags, - and _ mean the same. Checkpoints of ours say what they are; others need --model, " \
                    "and may need --pe. Trainings that differ in their seed alone are shown as their mean and spread."
    section = parser.add_argument_group("diagnosis")

    def add(flag: str, **kwargs: Any) -> None:
        section.add_argument(flag, **kwargs)
        parser.flags[flag] = flag  # so that a misspelt one is recognised

    section.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT",
        help="files of checkpoints, ours, an original's or timm's; several stand side by side")
    add("--output-dir", metavar="DIR", help="receives diagnosis.md, .csv and .json, and the pictures")
    add("--images", type=whole(4), default=IMAGES, metavar="N",
        help=f"look at N of the test images: a half fits probes, the other judges; default: {IMAGES}")
    add("--knock-out-images", type=whole(1), metavar="N",
        help="take N of the judging images for knock-outs and attention, which take longest; all of them if N is no "
             "fewer; default: as many as have 20,000 patches, which is 103 of 14 x 14 and 1,250 of 4 x 4")
    add("--sizes", nargs="+", type=whole(1), default=[], metavar="S",
        help="look at attention and accuracy at these sides of the input, too")
    add("--size-ways", nargs="+", choices=tuple(WAYS), default=[PLAIN], metavar="WAY",
        help=f"how to evaluate at the sizes: {', '.join(WAYS)}; default: {PLAIN}")
    return parser
# fmt: on


def read_options(argv: Sequence[str]) -> DiagnoseOptions:
    """What the command line asks for.

    Raises:
        SystemExit: the help was asked for, and has been printed.
        ValueError: flags that are unknown or do not go together.
    """
    parser = build_diagnose_parser()
    given = read_flags(parser, argv)
    paths, folder, images, judged, sizes, ways = (
        given.pop(name) for name in ("checkpoints", "output_dir", "images", "knock_out_images", "sizes", "size_ways")
    )
    if folder is None:
        raise ValueError("--output_dir DIR is needed: it receives the tables and the pictures")
    if paths and "pretrained" in given:
        raise ValueError(f"--pretrained and {paths[0]} both say what to diagnose: give one of them")
    if not paths and not {"pretrained", "model"} <= given.keys():
        raise ValueError("give checkpoints, or --model NAME --pretrained")
    for flag, values in (("CHECKPOINT", paths), ("--sizes", sizes), ("--size-ways", ways)):
        if len(set(values)) < len(values):
            raise ValueError(f"{flag} names one thing twice")
    if ways != [PLAIN] and not sizes:
        raise ValueError("--size-ways says how --sizes evaluates: give both")
    if world_from_environment().size > 1:
        raise ValueError("diagnose.py is one process: start it by python, not by torchrun")
    return DiagnoseOptions(paths or [None], Path(folder).expanduser(), images, judged, sizes, ways, given)
