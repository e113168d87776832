"""What came out of the runs: a row per pair of encoding and join, over its seeds."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from comparison.plan import Plan, Run
from training.files import write_text

Pair = tuple[str, str]

COLUMNS = (
    "encoding",
    "join",
    "best (%)",
    "last (%)",
    "best epoch",
    "epochs",
    "parameters",
    "images/s",
    "waiting for data",
    "seeds",
)
NOT_YET = "-"


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to; accuracies are of the test images, per cent.

    Attributes:
        rows: of its log.
    """

    run: Run
    rows: list[dict[str, Any]]

    @property
    def accuracies(self) -> list[float]:
        return [row["test_acc1"] for row in self.rows]

    @property
    def best(self) -> float:
        return max(self.accuracies)

    @property
    def best_epoch(self) -> int:
        """The first with the best accuracy."""
        return self.rows[self.accuracies.index(self.best)]["epoch"]

    @property
    def last(self) -> float:
        return self.accuracies[-1]


@dataclass(frozen=True)
class Spread:
    """Mean of several numbers, and how far they spread: the standard deviation of a sample, None for one number."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        return cls(mean(numbers), stdev(numbers) if len(numbers) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.deviation:.2f}" if self.deviation is not None else "")


def outcomes(plan: Plan) -> dict[Pair, list[Outcome]]:
    """The finished runs of each pair that the plan or an earlier call names, by seed."""
    found: dict[Pair, list[Outcome]] = {run.pair: [] for run in plan.all_runs}
    for run in plan.finished():
        found[run.pair].append(Outcome(run, run.rows()))
    return found


def write_tables(plan: Plan, found: Mapping[Pair, Sequence[Outcome]], failures: Mapping[str, str]) -> None:
    """Write `table.md` and `table.csv`.

    Args:
        failures: why a run failed, by its name.
    """
    cells = table_cells(plan, found)
    best = max((Spread.of([one.best for one in of_pair]).mean for of_pair in found.values() if of_pair), default=None)
    for row, of_pair in zip(cells, found.values(), strict=True):
        if of_pair and Spread.of([one.best for one in of_pair]).mean == best:
            row[2] = f"**{row[2]}**"
    text = f"# {heading(plan)}\n\n{markdown(COLUMNS, cells, left=2)}\n{remarks(plan, found)}{failed(failures)}"
    write_text(plan.folder / "table.md", text)
    write_text(plan.folder / "table.csv", csv_text(csv_rows(found, failures, plan)))


def heading(plan: Plan) -> str:
    """Of the tables and pictures."""
    common = plan.common
    return f"{common['model']} on {common['data_set']}, {common['epochs']} epochs"


def table_cells(plan: Plan, found: Mapping[Pair, Sequence[Outcome]]) -> list[list[str]]:
    """A row of `COLUMNS` for each pair."""
    wanted = [run.pair for run in plan.all_runs]
    rows = []
    for pair, of_pair in found.items():
        seeds = f"{len(of_pair)} of {wanted.count(pair)}"
        if not of_pair:
            rows.append([*pair, *[NOT_YET] * (len(COLUMNS) - 3), seeds])
            continue
        epochs = sorted(one.best_epoch for one in of_pair)
        rows.append(
            [
                *pair,
                str(Spread.of([one.best for one in of_pair])),
                str(Spread.of([one.last for one in of_pair])),
                f"{epochs[0]}" + (f"-{epochs[-1]}" if epochs[-1] > epochs[0] else ""),
                str(of_pair[0].run.epochs),
                f"{of_pair[0].rows[-1]['n_parameters']:,}",
                f"{speed(of_pair):,.0f}",
                f"{100 * waiting(of_pair):.0f} %",
                seeds,
            ]
        )
    return rows


def csv_rows(found: Mapping[Pair, Sequence[Outcome]], failures: Mapping[str, str], plan: Plan) -> list[dict[str, Any]]:
    """The same for programs, with all digits."""
    rows = []
    for pair, of_pair in found.items():
        row: dict[str, Any] = {"pe": pair[0], "join_type": pair[1], "seeds": len(of_pair)}
        reasons = [
            f"seed {run.seed}: {failures[run.name]}" for run in plan.runs if run.pair == pair and run.name in failures
        ]
        row |= {"failed": len(reasons), "reasons": "; ".join(reasons)}
        for name in ("best", "last"):
            spread = Spread.of([getattr(one, name) for one in of_pair]) if of_pair else None
            row[f"{name}_acc1_mean"] = spread and spread.mean
            row[f"{name}_acc1_std"] = spread and spread.deviation
        row |= {
            "best_epochs": " ".join(str(one.best_epoch) for one in of_pair),
            "epochs": plan.common["epochs"],
            "n_parameters": of_pair[0].rows[-1]["n_parameters"] if of_pair else None,
            "images_per_second": speed(of_pair) if of_pair else None,
            "waiting_share": waiting(of_pair) if of_pair else None,
        }
        rows.append(row)
    return rows


def speed(of_pair: Sequence[Outcome]) -> float:
    """Images per second in training: the median of all epochs, for some may have been disturbed."""
    return median(row["images_per_second"] for one in of_pair for row in one.rows)


def waiting(of_pair: Sequence[Outcome]) -> float:
    """Part of the time in training spent waiting for data, 0..1: the median of all epochs."""
    return median(row["waiting_share"] for one in of_pair for row in one.rows)


def remarks(plan: Plan, found: Mapping[Pair, Sequence[Outcome]]) -> str:
    """What a reader of the table has to know."""
    common = plan.common
    lines = [
        "Accuracy on the test images: mean ± standard deviation over seeds, of each run's best epoch (chosen on the "
        "same images) and of its last one. Images per second and the share of time spent waiting for data are medians "
        f"over the epochs, several runs at a time included ({common['device']}, {common['amp_dtype']}).",
    ]
    if plan.illegal:
        lines.append(f"Skipped, as no join of that kind can carry them: {'; '.join(map(', '.join, plan.illegal))}.")
    return "".join(f"\n{line}\n" for line in lines)


def failed(failures: Mapping[str, str]) -> str:
    """The failures and their reasons."""
    return "\nFailed:\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in failures.items()) if failures else ""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""
    widths = [max(3, *(len(row[place]) for row in [columns, *rows])) for place in range(len(columns))]
    rule = [("-" * width if place < left else "-" * (width - 1) + ":") for place, width in enumerate(widths)]
    lines = [columns, rule, *rows]
    return "".join(
        "| " + " | ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ) + " |\n"
        for line in lines
    )  # fmt: skip


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A comma-separated file with a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
