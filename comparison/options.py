"""The command lines of `compare.py` and `side_by_side.py`, read without torch: in a moment."""

import argparse
from collections.abc import Sequence

from runtime.world import world_from_environment
from training.catalogue import encoding_options
from training.command_line import check_command_line
from training.options import WIDTH, Parser, encoding_option, flag_of, number, whole

ALL = "all"
"""In place of names: all that there are, without sums; pairs that are not legal are then left out without a word."""
PLAIN = "plain"
WAYS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "reference-grid": ("--reference-grid",),
    "log-n": ("--log-n",),
    "reference-grid+log-n": ("--reference-grid", "--log-n"),
}
"""Ways to evaluate at another size, and their flags of `main.py`."""
NOT_HERE = {
    "seed": "compare.py sets it for each run: give --seeds",
    "resume": "compare.py continues the runs in --output_dir by itself",
    "auto_resume": "compare.py continues the runs in --output_dir by itself",
    "start_epoch": "compare.py continues the runs in --output_dir by itself",
    "shared_batches": "compare.py names the folder by itself: give --share-batches",
    "eval": "compare.py evaluates by itself, at other sizes by --sizes",
    "eval_ema": "compare.py evaluates by itself, at other sizes by --sizes",
    **dict.fromkeys(("world_size", "dist_url", "init_timeout"), "each run of compare.py is one process"),
}
"""Options of `main.py` that belong to one run."""


# fmt: off
def build_parser() -> Parser:
    """The options of this command; all others go to `main.py`."""
    parser = Parser(
        prog="compare.py",
        usage="%(prog)s --pe NAME ... --output_dir DIR [options] [options of main.py]",
        description="Train every legal pair of encodings and joins with several seeds, and write tables and pictures.",
        epilog="All other options go to main.py as they are: --data-set, --data-path, --recipe, --epochs and what else "
               "python main.py --help lists. In flags, - and _ mean the same. The same command continues after a stop.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=WIDTH),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--pe", "--pos-embed", nargs="+", required=True, metavar="NAME",
        help=f"positional encodings, or {ALL} for every one without sums")
    add("--join-type", nargs="+", default=["basic"], metavar="NAME",
        help=f"how an absolute encoding reaches the layers, or {ALL}; illegal pairs are named and skipped; default: "
             "basic")
    add("--seeds", nargs="+", type=whole(), default=[0], metavar="N", help="a run each; default: 0")
    add("--output-dir", required=True, metavar="DIR",
        help="receives a folder per run, table.md, table.csv, curves.csv, compare.png; with several joins overview.md; "
             "with two seeds or more paired.md and paired.csv; the tables also have runs of other calls in it, which "
             "were made with the same options")
    add("--jobs", type=whole(1), default=1, metavar="N",
        help="runs at a time: they share out the cores and, unless --num-workers is given, the processes that load "
             "data; with several GPUs each run has one; many small models on one GPU train faster under NVIDIA's "
             "MPS (docs/comparing.md); default: 1")
    add("--share-batches", action="store_true",
        help="runs of one seed that train at the same time make each augmented batch once, and share it through files "
             "in DIR, which are removed at the end; the fast ones wait for the slow ones; results stay the same to the "
             "bit")
    add("--minutes", type=number(), metavar="M",
        help="stop after M minutes: the runs save, which takes some seconds more, and the same command continues; exit "
             "code 142; default: no limit")
    add("--sizes", nargs="+", type=whole(1), default=[], metavar="S",
        help="evaluate every trained model at these sides of its input, too: sizes.md, sizes.csv and sizes.png")
    add("--size-ways", nargs="+", choices=tuple(WAYS), default=[PLAIN], metavar="WAY",
        help=f"how to evaluate at the sizes: {', '.join(WAYS)}; on a reference grid, attention reads places in the "
             f"cells of the trained grid, and log-n sharpens attention over more tokens; default: {PLAIN}")
    add("--diagnose", action="store_true",
        help="measure what every trained model knows of where its patches are, and whether it uses it, as diagnose.py "
             "does, at --sizes too: tables and pictures in DIR/diagnosis")
    add("--dry-run", action="store_true",
        help="show the plan and the time that it takes, from some steps of each pair, and write nothing; CIFAR, which "
             "that needs, is downloaded if it is not there")
    group = parser.add_argument_group("options of encodings, which go to those that take them")
    for name, (kind, encodings) in encoding_options().items():
        group.add_argument(flag_of(name), **encoding_option(kind, encodings))
    return parser


def side_by_side_parser() -> argparse.ArgumentParser:
    """The options of `python -m comparison.side_by_side`."""
    parser = argparse.ArgumentParser(
        prog="python -m comparison.side_by_side",
        description="Print a table of the last accuracies (%) of several comparisons: a row for each pair of an "
                    "encoding and a join, a column for each folder.",
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="the --output-dir of a call of compare.py")
    add("--reached", type=number(), metavar="PERCENT",
        help="add in brackets the first epoch with this accuracy or more: the median over seeds, where all reach it")
    return parser
# fmt: on


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the rest of the command line: those of `main.py`.

    Raises:
        SystemExit: the help was asked for, and has been printed.
        ValueError, OSError: something is wrong with either.
    """
    args, rest = build_parser().parse_known_args(argv)
    for flag, values in (("--seeds", args.seeds), ("--sizes", args.sizes), ("--size-ways", args.size_ways)):
        if len(set(values)) < len(values):
            raise ValueError(f"{flag} names one thing twice")
    if args.size_ways != [PLAIN] and not args.sizes:
        raise ValueError("--size-ways says how --sizes evaluates: give both")
    if args.share_batches and args.jobs < 2:
        raise ValueError("--share-batches is for runs that train at the same time: give --jobs 2 or more, too")
    if world_from_environment().size > 1:
        raise ValueError("compare.py starts its runs itself, by --jobs: start it by python, not by torchrun")
    for name in NOT_HERE.keys() & check_command_line(rest).keys():
        raise ValueError(f"{flag_of(name)} is for a single run: {NOT_HERE[name]}")
    return args, rest
