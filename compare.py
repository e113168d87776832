"""Train every legal pair of encodings and joins under one recipe, and compare: `python compare.py --help`."""

from comparison.options import read_options
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("compare.py", read_options, "torch, timm and matplotlib")

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from logging import getLogger
from pathlib import Path

from rich.console import Console

from comparison.forecast import forecast
from comparison.jobs import FAILED, Job, alone_in, environments, folder_of_batches, run_jobs
from comparison.overview import write_overview
from comparison.paired import paired_differences, write_paired
from comparison.pictures import draw_comparison
from comparison.plan import Plan, check_can_share, make_plan
from comparison.screen import Screen
from comparison.sizes import check_ways, evaluation_jobs, write_sizes
from comparison.tables import NAMES, describe_making, heading, outcomes, table_rows, write_tables
from datasets import build_dataset
from diagnosis.runs import diagnose_runs
from runtime.files import atomic_write
from runtime.interrupt import Interrupted, defer_interrupts, raise_on_ctrl_c, time_limit
from runtime.logs import LoopDisplay, end_in_one_line, start_logging
from runtime.tables import print_table
from training.setup import image_settings

_logger = getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process).

    Returns:
        The exit code: 0; 1 if a run failed or a file could not be written; 2 for bad input; if a signal ended it, 130
        for SIGINT, 143 for SIGTERM, 138 for SIGUSR1; 142 if `--minutes` did. All but 0 come with a line that says why.
    """
    start = time.monotonic()
    console = start_logging(is_main=True)
    try:
        with ExitStack() as stack:
            try:
                args, rest = read_options(sys.argv[1:] if argv is None else argv)
                plan = make_plan(args, rest)
                check_ways(plan, args.size_ways)
                if args.share_batches:
                    check_can_share(plan)
                show_plan(plan, args.jobs)
                if args.dry_run:
                    return forecast(plan, args.jobs, console)
                open_data(plan)
                stack.enter_context(alone_in(plan.folder))
            except (ValueError, OSError) as error:
                return _end(f"error: {error}", 2)
            left = None if args.minutes is None else 60 * args.minutes - (time.monotonic() - start)
            with defer_interrupts(), time_limit(left):
                return compare(plan, args, console)
    except (ValueError, OSError) as error:
        return _end(f"error: {error}", 1)
    except Interrupted as interrupt:
        done = sum(run.is_finished() for run in plan.runs)
        where = f"{done} of {len(plan.runs)} runs are finished; the same command continues"
        is_limit = interrupt.signal_number == signal.SIGALRM
        what = f"stopped after --minutes {args.minutes:g}" if is_limit else str(interrupt)
        return _end(f"{what}; {where}", interrupt.exit_code)
    except KeyboardInterrupt:
        return _end("interrupted; the same command continues", 130)


_end = partial(end_in_one_line, "compare.py")


# ---- the work


def show_plan(plan: Plan, jobs: int) -> None:
    """Log what there is to do."""
    done = sum(run.is_finished() for run in plan.runs)
    counts = f"{len({run.pair for run in plan.runs})} pairs, {len(plan.runs)} runs, {done} of them finished"
    _logger.info("%s: %s; %d at a time on %s", heading(plan), counts, jobs, plan.common["device"])
    if plan.illegal:
        _logger.info("skipped, as the join cannot carry the encoding: %s", "; ".join(map(", ".join, plan.illegal)))
    if plan.others:
        _logger.info("in the tables too: %d runs of earlier calls", len(plan.others))


def open_data(plan: Plan) -> None:
    """See that the data set is there, before all runs look for it at the same time; CIFAR is downloaded if it is not.

    Raises:
        ValueError, OSError: it is not.
    """
    if not all(run.is_finished() for run in plan.runs):
        build_dataset(False, image_settings(plan.options, {}))


def compare(plan: Plan, args: argparse.Namespace, console: Console) -> int:
    """Train what is left, evaluate at other sizes, diagnose, write it all down; 1 if something failed."""
    where = environments(args.jobs, plan.common["device"])
    failures: dict[str, str] = {}
    write_results(plan, failures)
    try:
        with folder_of_batches(plan.folder) as batches:
            jobs = training_jobs(plan, batches if args.share_batches else None)
            for job in run_shown(Screen(console, "training", jobs, args.jobs, trains=True), jobs, where):
                keep_failure(job, failures)
                write_results(plan, failures)
    finally:  # runs may finish while they are stopped
        write_results(plan, failures)
    show_results(plan, console)
    if args.sizes:
        evaluate(plan, args, where, console, failures)
    if args.diagnose:
        folder, failed = diagnose_runs(plan, args.sizes, args.size_ways, LoopDisplay(console))
        failures |= failed
        _logger.info("%s: diagnosis.md, diagnosis.csv, diagnosis.json and pictures", folder)
    for name, reason in failures.items():
        _end(f"{name} failed: {reason}", 1)
    return 1 if failures else 0


def training_jobs(plan: Plan, batches: Path | None) -> list[Job]:
    """A job for each run that is not finished; `batches` is where they share their batches, if they do."""
    sharing = [] if batches is None else ["--shared-batches", str(batches)]
    return [
        Job(
            run.name,
            run,
            [*run.argv, "--output-dir", str(run.folder), "--auto-resume", *sharing],
            run.folder,
            run.is_finished,
        )
        for run in plan.runs
        if not run.is_finished()
    ]


def evaluate(
    plan: Plan, args: argparse.Namespace, where: list[dict[str, str]], console: Console, failures: dict[str, str]
) -> None:
    """Evaluate every finished run at the sizes, and write that down."""
    failed: dict[str, str] = {}
    jobs = evaluation_jobs(plan, args.sizes, args.size_ways)
    try:
        for job in run_shown(Screen(console, "evaluation", jobs, args.jobs, trains=False), jobs, where):
            keep_failure(job, failed)
    finally:
        write_sizes(plan, args.sizes, args.size_ways, failed)
    failures |= failed
    _logger.info("%s: sizes.md, sizes.csv and sizes.png", plan.folder)


def run_shown(screen: Screen, jobs: Sequence[Job], where: Sequence[dict[str, str]]) -> Iterator[Job]:
    """Run the jobs and show how far they are; yield each that has ended."""
    with screen, closing(run_jobs(jobs, where, screen.watch)) as ended:
        yield from ended


def keep_failure(job: Job, failures: dict[str, str]) -> None:
    """Keep the reason if a job has failed."""
    if job.state == FAILED:
        failures[job.name] = f"{job.reason} ({job.output})"


def write_results(plan: Plan, failures: dict[str, str]) -> None:
    """Write the tables and, once a run has finished, the picture."""
    found = outcomes(plan)
    differences = paired_differences(found)
    write_tables(plan, found, failures)
    write_paired(plan, differences)
    write_overview(plan, found, differences)
    if any(found.values()):
        with atomic_write(plan.folder / "compare.png") as file:
            draw_comparison(found, heading(plan), file)


def show_results(plan: Plan, console: Console) -> None:
    """Print the table without what a terminal has no room for."""
    found = outcomes(plan)
    rows = table_rows(plan, found)
    without_epochs = [{name: row[name] for name in row if "epoch" not in name} for row in rows]
    print_table(console, heading(plan), without_epochs, NAMES)
    for line in describe_making(found):
        _logger.info("%s", line)
    _logger.info("%s: table.md, table.csv and compare.png", plan.folder)


if __name__ == "__main__":
    raise_on_ctrl_c()
    sys.exit(main())
