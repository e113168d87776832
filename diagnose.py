"""Does a model know where its patches are, in which layer, and does it use it? `python diagnose.py --help`.

What each measure means: `docs/diagnosis.md`.
"""

from diagnosis.options import DiagnoseOptions, read_options
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("diagnose.py", read_options, "torch, timm and matplotlib")

import sys
from collections.abc import Callable, Sequence
from functools import partial
from logging import getLogger
from pathlib import Path

from rich.console import Console

from diagnosis.measure import measure
from diagnosis.pictures import write_pictures
from diagnosis.subjects import open_subject
from diagnosis.summary import group
from diagnosis.tables import NAMES, heading, overview_rows, write_tables
from lape_vit.analysis.diagnosis import Diagnosis
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import LoopDisplay, end_in_one_line, start_logging
from runtime.tables import print_table

_logger = getLogger(__name__)

SHOWN = (
    "model",
    "seeds",
    "accuracy (%)",
    "R² read, block last",
    "R² output",
    "share of position",
    "s per 1,000 images",
)
"""Columns that a terminal has room for."""


class WriteError(Exception):
    """A result could not be written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process).

    Returns:
        The exit code: 0; 1 if a file could not be written; 2 for bad input; 130 if interrupted. All but 0 come with a
        line that says why.
    """
    console = start_logging(is_main=True)
    try:
        options = read_options(sys.argv[1:] if argv is None else argv)
        records = diagnose_all(options, LoopDisplay(console))
        show(options, records, console)
    except WriteError as error:
        return _end(f"error: {error}", 1)
    except (ValueError, OSError) as error:
        return _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    return 0


_end = partial(end_in_one_line, "diagnose.py")


def diagnose_all(options: DiagnoseOptions, display: LoopDisplay) -> list[Diagnosis]:
    """Diagnose one checkpoint after the other; the tables of what is done are on disk before the next one starts.

    The pictures are drawn at the end, of what was done until then.

    Raises:
        ValueError, OSError: a checkpoint, data or flags that are no good; what was done before stays.
        WriteError: a result could not be written.
    """
    records: list[Diagnosis] = []
    options.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        for path in options.checkpoints:
            subject = open_subject(options.given, path, display)
            records.append(measure(subject, options.images, options.knock_out_images, options.sizes, options.size_ways))
            write(write_tables, options.output_dir, records)
    finally:
        if records:
            write(write_pictures, options.output_dir, records)
    return records


def write(writer: Callable[[Path, Sequence[Diagnosis]], object], folder: Path, records: Sequence[Diagnosis]) -> None:
    """Write results into a folder; WriteError, with the name of the folder, where that is not possible."""
    try:
        writer(folder, records)
    except OSError as error:
        raise WriteError(f"{folder}: {error}") from error


def show(options: DiagnoseOptions, records: Sequence[Diagnosis], console: Console) -> None:
    """Print what stands out, and where all of it is."""
    groups = group(records)
    rows = overview_rows(groups, [one.all_values() for one in groups])
    few = [{name: cell for name, cell in row.items() if name in SHOWN} for row in rows]
    print_table(console, heading(groups), few, NAMES)
    _logger.info("%s: diagnosis.md, diagnosis.csv, diagnosis.json and pictures", options.output_dir)


if __name__ == "__main__":
    raise_on_ctrl_c()
    sys.exit(main())
