"""Every trained model at other sizes of its input: the evaluations, and what came out of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from comparison.jobs import Job
from comparison.options import PLAIN, WAYS
from comparison.pictures import draw_sizes
from comparison.plan import Plan, Run
from comparison.tables import NAMES, MeanAndDeviation, Pair, csv_text, failed, heading, mean_and_deviation
from lape_vit.encodings import resolve
from runtime.files import atomic_write, write_text
from runtime.tables import NOT_YET, markdown

Measured = dict[Pair, dict[int, list[float]]]
"""Accuracies over seeds, per cent, by pair and size."""


def takes(pe: str, way: str) -> bool:
    """Whether an encoding can be evaluated in this way: a reference grid is for real places in attention."""
    resolved = resolve(pe)
    reads_real_places = all(part.reads_real_places for part in resolved.parts)
    return "--reference-grid" not in WAYS[way] or (resolved.attention is not None and reads_real_places)


def check_ways(plan: Plan, ways: Sequence[str]) -> None:
    """Raise ValueError where no run can be evaluated in one of the ways."""
    for way in ways:
        if not any(takes(run.pe, way) for run in plan.all_runs):
            raise ValueError(f"--size-ways {way}: none of the encodings reads places between cells in attention")


@dataclass(frozen=True)
class Evaluation:
    """Of a run's best checkpoint, at a side of its input, in one of the ways."""

    run: Run
    size: int
    way: str

    @property
    def title(self) -> str:
        return f"at {self.size}" + ("" if self.way == PLAIN else f", {self.way}")

    @property
    def result(self) -> Path:
        folder = f"size_{self.size}" if self.way == PLAIN else f"size_{self.size}_{self.way}"
        return self.run.folder / folder / "eval.json"

    @property
    def work(self) -> float:
        """In pixels of an image."""
        return self.size**2

    def is_done(self) -> bool:
        """Whether the result is there and of the present checkpoint."""
        return self.result.exists() and self.result.stat().st_mtime >= self.run.best_checkpoint.stat().st_mtime

    def argv(self, plan: Plan) -> list[str]:
        """The command line of `main.py`, where this call has its data."""
        options = {"resume": self.run.best_checkpoint, "input-size": self.size, "output-dir": self.result.parent}
        here = ("data_path", "eval_data_path", "device", "num_workers")
        options |= {name.replace("_", "-"): plan.common[name] for name in here if plan.common[name] is not None}
        words = (str(word) for name, value in options.items() for word in (f"--{name}", value))
        return ["--eval", *WAYS[self.way], *words]


def evaluations(run: Run, sizes: Sequence[int], ways: Sequence[str]) -> list[Evaluation]:
    """All of a run."""
    return [Evaluation(run, size, way) for way in ways if takes(run.pe, way) for size in sizes]


def evaluation_jobs(plan: Plan, sizes: Sequence[int], ways: Sequence[str]) -> list[Job]:
    """A job for each finished run, with its evaluations that are not there yet."""
    jobs = []
    for run in plan.finished():
        left = [one for one in evaluations(run, sizes, ways) if not one.is_done()]
        if left:
            argv = [json.dumps([one.title, one.argv(plan)]) for one in left]
            jobs.append(Job(run.name, run, argv, run.folder / "sizes", partial(are_done, left), left))
    return jobs


def are_done(some: Sequence[Evaluation]) -> bool:
    return all(one.is_done() for one in some)


def measured(plan: Plan, sizes: Sequence[int], way: str) -> Measured:
    """The results that are there."""
    found: Measured = {run.pair: {size: [] for size in sizes} for run in plan.all_runs if takes(run.pe, way)}
    for run in plan.finished():
        for size in sizes:
            one = Evaluation(run, size, way)
            if takes(run.pe, way) and one.is_done():
                found[run.pair][size].append(json.loads(one.result.read_text())["acc1"])
    return found


def write_sizes(plan: Plan, sizes: Sequence[int], ways: Sequence[str], failures: Mapping[str, str]) -> None:
    """Write `sizes.md` and `sizes.csv`, and a picture for each way: `sizes.png`, `sizes_log-n.png`."""
    by_way, trained_at = {way: measured(plan, sizes, way) for way in ways}, plan.common["input_size"]
    remark = (
        f"\nTest accuracy (%) of each run's best epoch by the side of the input in pixels; trained at {trained_at}: "
        "mean ± standard deviation over seeds.\n"
    )
    text = f"# {heading(plan)}, at other sizes\n"
    for way, found in by_way.items():
        title = "" if way == PLAIN else f"\n## {way}\n"
        text += f"{title}\n{markdown(table_rows(found, trained_at), NAMES)}"
        if any(accuracies for by_size in found.values() for accuracies in by_size.values()):
            about = f"{heading(plan)}, at other sizes" + ("" if way == PLAIN else f", {way}")
            with atomic_write(plan.folder / ("sizes.png" if way == PLAIN else f"sizes_{way}.png")) as file:
                draw_sizes(found, trained_at, about, file)
    write_text(plan.folder / "sizes.md", f"{text}{remark}{failed(failures)}")
    write_text(plan.folder / "sizes.csv", csv_text([row for way in ways for row in csv_rows(by_way[way], way)]))


def table_rows(found: Measured, trained_at: Any) -> list[dict[str, str]]:
    """A row per pair, for the eye."""
    rows = []
    for pair, by_size in found.items():
        row = dict(zip(NAMES, pair, strict=True))
        for size, numbers in by_size.items():
            column = f"{size} (trained)" if size == trained_at else str(size)
            row[column] = str(MeanAndDeviation.of(numbers)) if numbers else NOT_YET
        rows.append(row)
    return rows


def csv_rows(found: Measured, way: str) -> list[dict[str, Any]]:
    """The same for programs, with all digits."""
    rows = []
    for (pe, join_type), by_size in found.items():
        for size, accuracies in by_size.items():
            row = {"pe": pe, "join_type": join_type, "size": size, "way": way, "seeds": len(accuracies)}
            rows.append({**row, **mean_and_deviation("acc1", accuracies)})
    return rows
