"""Does a model know where its patches are, in which layer, and does it use it? `python diagnose.py --help`.

What each measure means: `docs/diagnosis.md`.
"""

from runtime.interrupt import end_on_ctrl_c, raise_on_ctrl_c

if __name__ == "__main__":  # before the imports below, which take seconds
    end_on_ctrl_c("diagnose.py")

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

from rich.console import Console

from comparison.sizes import PLAIN, WAYS
from diagnosis.measure import IMAGES, measure
from diagnosis.pictures import write_pictures
from diagnosis.subjects import open_subject
from diagnosis.summary import group
from diagnosis.tables import NAMES, heading, overview_rows, write_tables
from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.encodings import all_options
from runtime.distributed import world_from_environment
from runtime.logs import LoopDisplay, end_in_one_line, start_logging
from runtime.tables import print_table
from training.options import OptionParser, build_parser, whole
from training.setup import read_given

_logger = getLogger(__name__)

OF_MAIN = {
    *("data_set", "data_path", "eval_data_path", "inat_category", "where_task", "where_cell", "batch_size"),
    *("num_workers", "pin_mem", "interpolation", "eval_crop_ratio", "eval_ema", "pretrained", "seed", "device"),
    *("amp_dtype", "model", "pe", "join_type", "global_pool", "model_kwargs", "input_size"),
}
"""Options of `main.py` that mean the same here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process).

    Returns:
        The exit code: 0; 1 if a file could not be written; 2 for bad input; 130 if interrupted. All but 0 come with a
        line that says why.
    """
    console = start_logging(is_main=True)
    try:
        try:
            options = read_options(sys.argv[1:] if argv is None else argv)
            records = diagnose_all(options, LoopDisplay(console))
        except (ValueError, OSError) as error:
            return _end(f"error: {error}", 2)
        show(options, records, console)
    except OSError as error:
        return _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    return 0


_end = partial(end_in_one_line, "diagnose.py")


# ---- options


@dataclass(frozen=True)
class DiagnoseOptions:
    """What the command line asks for.

    Attributes:
        checkpoints: paths; None in the place of one for weights that timm publishes.
        given: options of `main.py` that the command line names.
    """

    checkpoints: Sequence[str | None]
    output_dir: Path
    images: int
    sizes: Sequence[int]
    size_ways: Sequence[str]
    given: dict[str, Any]


# fmt: off
def build_own_parser() -> OptionParser:
    """The options of this command, and those of `main.py` that say what is evaluated, and on what."""
    parser = build_parser(all_options(), only=OF_MAIN)
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
    add("--sizes", nargs="+", type=whole(1), default=[], metavar="S",
        help="look at attention and accuracy at these sides of the input, too")
    add("--size-ways", nargs="+", choices=tuple(WAYS), default=[PLAIN], metavar="WAY",
        help=f"how to evaluate at the sizes: {', '.join(WAYS)}; default: {PLAIN}")
    return parser
# fmt: on


def read_options(argv: Sequence[str]) -> DiagnoseOptions:
    """What the command line asks for.

    Raises:
        ValueError: flags that are unknown or do not go together.
    """
    parser = build_own_parser()
    given = read_given(parser, argv)
    paths, folder, images, sizes, ways = (
        given.pop(name) for name in ("checkpoints", "output_dir", "images", "sizes", "size_ways")
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
    return DiagnoseOptions(paths or [None], Path(folder).expanduser(), images, sizes, ways, given)


# ---- the work


def diagnose_all(options: DiagnoseOptions, display: LoopDisplay) -> list[Diagnosis]:
    """Diagnose one checkpoint after the other; what is done is on disk before the next one starts.

    Raises:
        ValueError, OSError: a checkpoint, data or flags that are no good; what was done before stays.
    """
    parser, records = build_parser(all_options()), []
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for path in options.checkpoints:
        subject = open_subject(parser, options.given, path, display)
        records.append(measure(subject, options.images, options.sizes, options.size_ways))
        write_tables(options.output_dir, records)
        write_pictures(options.output_dir, records)
    return records


def show(options: DiagnoseOptions, records: Sequence[Diagnosis], console: Console) -> None:
    """Print what stands out, and where all of it is."""
    groups = group(records)
    rows = overview_rows(groups, [one.all_values() for one in groups])
    print_table(console, heading(groups), rows, NAMES)
    _logger.info("%s: diagnosis.md, diagnosis.csv, diagnosis.json and pictures", options.output_dir)


if __name__ == "__main__":
    raise_on_ctrl_c()
    sys.exit(main())
