"""Every trained model at other sizes of its input: the evaluations, and what came out of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.jobs import Job
from comparison.pictures import draw_sizes
from comparison.plan import Plan, Run
from comparison.tables import NAMES, MeanAndDeviation, Pair, csv_text, failed, heading, mean_and_deviation
from runtime.files import atomic_write, write_text
from runtime.tables import NOT_YET, markdown

Measured = dict[Pair, dict[int, list[float]]]
"""Accuracies over seeds, per cent, by pair and size."""


def evaluations(plan: Plan, sizes: Sequence[int]) -> list[Job]:
    """The evaluations of finished runs that are not there yet."""
    wanted = [(run, size) for run in plan.finished() for size in sizes]
    return [evaluation(plan, run, size) for run, size in wanted if not is_evaluated(run, size)]


def evaluation(plan: Plan, run: Run, size: int) -> Job:
    """The evaluation of a run's best checkpoint at a size, where this call has its data."""
    options = {"resume": run.best_checkpoint, "input-size": size, "output-dir": result_of(run, size).parent}
    here = ("data_path", "eval_data_path", "device", "num_workers")
    options |= {name.replace("_", "-"): plan.common[name] for name in here if plan.common[name] is not None}
    argv = ["--eval", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    folder = result_of(run, size).parent
    return Job(f"{run.name}, at {size}", run, argv, folder, lambda: is_evaluated(run, size))


def result_of(run: Run, size: int) -> Path:
    return run.folder / f"size_{size}" / "eval.json"


def is_evaluated(run: Run, size: int) -> bool:
    """Whether the result is there and of the present checkpoint."""
    result = result_of(run, size)
    return result.exists() and result.stat().st_mtime >= run.best_checkpoint.stat().st_mtime


def measured(plan: Plan, sizes: Sequence[int]) -> Measured:
    """The results that are there."""
    found: Measured = {run.pair: {size: [] for size in sizes} for run in plan.all_runs}
    for run in plan.finished():
        for size in sizes:
            if is_evaluated(run, size):
                found[run.pair][size].append(json.loads(result_of(run, size).read_text())["acc1"])
    return found


def write_sizes(plan: Plan, sizes: Sequence[int], failures: Mapping[str, str]) -> None:
    """Write `sizes.md`, `sizes.csv` and `sizes.png`."""
    found, trained_at = measured(plan, sizes), plan.common["input_size"]
    rows = []
    for pair, by_size in found.items():
        row = dict(zip(NAMES, pair, strict=True))
        for size, numbers in by_size.items():
            column = f"{size} (trained)" if size == trained_at else str(size)
            row[column] = str(MeanAndDeviation.of(numbers)) if numbers else NOT_YET
        rows.append(row)
    remark = (
        f"\nTest accuracy (%) of each run's best epoch by the side of the input in pixels; trained at {trained_at}: "
        "mean ± standard deviation over seeds.\n"
    )
    text = f"# {heading(plan)}, at other sizes\n\n{markdown(rows, NAMES)}{remark}{failed(failures)}"
    write_text(plan.folder / "sizes.md", text)
    write_text(plan.folder / "sizes.csv", csv_text(list(csv_rows(found))))
    if any(accuracies for by_size in found.values() for accuracies in by_size.values()):
        with atomic_write(plan.folder / "sizes.png") as file:
            draw_sizes(found, trained_at, f"{heading(plan)}, at other sizes", file)


def csv_rows(found: Measured) -> list[dict[str, Any]]:
    """The same for programs, with all digits."""
    rows = []
    for (pe, join_type), by_size in found.items():
        for size, accuracies in by_size.items():
            row = {"pe": pe, "join_type": join_type, "size": size, "seeds": len(accuracies)}
            rows.append({**row, **mean_and_deviation("acc1", accuracies)})
    return rows
