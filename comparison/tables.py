"""What came out of the runs: a row per pair of encoding and join, over its seeds."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from comparison.plan import Plan, Run
from runtime.files import write_text
from runtime.logs import clock
from runtime.tables import Row, markdown

Pair = tuple[str, str]

NAMES = ("encoding", "join")
"""Columns that hold no numbers."""
BEST = "best (%)"
MAKING = "making batches"


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

    @property
    def averages(self) -> list[float]:
        """Accuracies of the averaged weights; none without `--model-ema`."""
        return [row["test_ema_acc1"] for row in self.rows if "test_ema_acc1" in row]


@dataclass(frozen=True)
class MeanAndDeviation:
    """Mean of several numbers, and how far they spread: the standard deviation of a sample, None for one number."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "MeanAndDeviation":
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
    """Write `table.md`, `table.csv` and `curves.csv`.

    Args:
        failures: why a run failed, by its name.
    """
    rows = table_rows(plan, found)
    means = [
        MeanAndDeviation.of([one.best for one in finished]).mean if finished else -1.0 for finished in found.values()
    ]
    for row, average in zip(rows, means, strict=True):
        if BEST in row and average == max(means):
            row[BEST] = f"**{row[BEST]}**"
    text = f"# {heading(plan)}\n\n{markdown(rows, NAMES)}{remarks(plan, rows)}{failed(failures)}"
    write_text(plan.folder / "table.md", text)
    write_text(plan.folder / "table.csv", csv_text(csv_rows(found, failures, plan)))
    if curves := curve_rows(found):
        write_text(plan.folder / "curves.csv", csv_text(curves))


def heading(plan: Plan) -> str:
    """Of the tables and pictures."""
    common = plan.common
    epochs = f"{common['epochs']} epoch{'s' * (common['epochs'] > 1)}"
    return f"{common['model']} on {common['data_set']}, {epochs}"


def table_rows(plan: Plan, found: Mapping[Pair, Sequence[Outcome]]) -> list[Row]:
    """The table, a row for each pair; one without a finished run has no numbers."""
    wanted = [run.pair for run in plan.all_runs]
    return [
        {**dict(zip(NAMES, pair, strict=True)), **cells(finished), "seeds": f"{len(finished)} of {wanted.count(pair)}"}
        for pair, finished in found.items()
    ]


def cells(finished: Sequence[Outcome]) -> Row:
    """What a pair came to, by column."""
    if not finished:
        return {}
    epochs = sorted(one.best_epoch for one in finished)
    averages = [max(one.averages) for one in finished if one.averages]
    return {
        BEST: str(MeanAndDeviation.of([one.best for one in finished])),
        "last (%)": str(MeanAndDeviation.of([one.last for one in finished])),
        **({"best of averaged weights (%)": str(MeanAndDeviation.of(averages))} if averages else {}),
        "best epoch": f"{epochs[0]}" + (f"-{epochs[-1]}" if epochs[-1] > epochs[0] else ""),
        "epochs": str(finished[0].run.epochs),
        "parameters": f"{finished[0].rows[-1]['n_parameters']:,}",
        "images/s": f"{speed(finished):,.0f}",
        "waiting for data": f"{100 * waiting(finished):.0f} %",
        **({} if (made := Making.of(finished)) is None else {MAKING: f"{100 * made.share:.0f} %"}),
    }


def csv_rows(found: Mapping[Pair, Sequence[Outcome]], failures: Mapping[str, str], plan: Plan) -> list[dict[str, Any]]:
    """The same for programs, with all digits."""
    rows = []
    for pair, finished in found.items():
        row: dict[str, Any] = {"pe": pair[0], "join_type": pair[1], "seeds": len(finished)}
        reasons = [
            f"seed {run.seed}: {failures[run.name]}" for run in plan.runs if run.pair == pair and run.name in failures
        ]
        row |= {"failed": len(reasons), "reasons": "; ".join(reasons)}
        numbers = {
            "best_acc1": [one.best for one in finished],
            "last_acc1": [one.last for one in finished],
            "best_ema_acc1": [max(one.averages) for one in finished if one.averages],
        }
        for name, values in numbers.items():
            row |= mean_and_deviation(name, values)
        row |= {
            "best_epochs": " ".join(str(one.best_epoch) for one in finished),
            "epochs": plan.common["epochs"],
            "n_parameters": finished[0].rows[-1]["n_parameters"] if finished else None,
            "images_per_second": speed(finished) if finished else None,
            "waiting_share": waiting(finished) if finished else None,
        }
        made = Making.of(finished)
        row |= {"making_share": made and made.share, "making_share_unshared": made and made.share_unshared}
        rows.append(row)
    return rows


CURVES = ("epoch", "train_loss", "test_loss", "test_acc1", "test_ema_acc1")
"""What `curves.csv` has of each row of a log, where it is there."""


def curve_rows(found: Mapping[Pair, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Each epoch of each run."""
    runs = [one for finished in found.values() for one in finished]
    names = [name for name in CURVES if any(name in row for one in runs for row in one.rows)]
    return [
        {"pe": one.run.pe, "join_type": one.run.join_type, "seed": one.run.seed}
        | {name: rounded(row.get(name)) for name in names}
        for one in runs
        for row in one.rows
    ]


def rounded(number: float | None) -> float | None:
    """To six digits."""
    return float(f"{number:.6g}") if isinstance(number, float) else number


def mean_and_deviation(name: str, numbers: Sequence[float]) -> dict[str, float | None]:
    """The two columns of a quantity in a table for programs; empty without numbers."""
    spread = MeanAndDeviation.of(numbers) if numbers else None
    return {f"{name}_mean": spread.mean if spread else None, f"{name}_std": spread.deviation if spread else None}


def speed(finished: Sequence[Outcome]) -> float:
    """Images per second in training: the median of all epochs, for some may have been disturbed."""
    return median(row["images_per_second"] for one in finished for row in one.rows)


def waiting(finished: Sequence[Outcome]) -> float:
    """Part of the time in training spent waiting for data, 0..1: the median of all epochs."""
    return median(row["waiting_share"] for one in finished for row in one.rows)


@dataclass(frozen=True)
class Making:
    """What it took to make the batches of some runs: to decode, crop and augment their images.

    Attributes:
        core_seconds: of making batches.
        seconds: of training and evaluation, run by run.
        made: batches that the runs have made themselves.
        taken: batches that they have trained with.
    """

    core_seconds: float
    seconds: float
    made: int
    taken: int

    @classmethod
    def of(cls, finished: Sequence[Outcome]) -> "Making | None":
        """Of these runs; None if their logs do not say, as earlier versions wrote them."""
        names = ("making_seconds", "seconds", "batches_made", "batches")
        rows = [row for one in finished for row in one.rows if row.keys() >= {*names}]
        found = cls(*(sum(row[name] for row in rows) for name in names))
        return found if found.taken else None

    @property
    def share(self) -> float:
        """Of one core's time beside each run, 0..1, or more if it takes more than one core."""
        return self.core_seconds / self.seconds

    @property
    def share_unshared(self) -> float | None:
        """The same if each run made all its batches; unknown for runs that made none."""
        return self.share * self.taken / self.made if self.made else None


def describe_making(found: Mapping[Pair, Sequence[Outcome]]) -> list[str]:
    """A line on what it took to make batches, over all runs, with and without sharing; none if the logs do not say."""
    made = Making.of([one for finished in found.values() for one in finished])
    if made is None:
        return []
    line = f"making batches: {clock(made.core_seconds)} of a core's time in {clock(made.seconds)} of runs"
    line += f" ({100 * made.share:.0f} %)"
    if made.share_unshared is not None and made.made < made.taken:
        line += f"; {made.made:,} of {made.taken:,} batches were made, the others shared: without sharing "
        line += f"{100 * made.share_unshared:.0f} %"
    return [line]


def remarks(plan: Plan, rows: Sequence[Row]) -> str:
    """What a reader of the table, of these rows, has to know."""
    devices = sorted({run.last_options().get("device", run.options["device"]) for run in plan.finished()})
    where = ", ".join([*devices, plan.common["amp_dtype"]])
    lines = [
        "Accuracy on the test images: mean ± standard deviation over seeds, of each run's best epoch (chosen on the "
        "same images) and of its last one. Images per second and the share of time spent waiting for data are medians "
        f"over the epochs, several runs at a time included ({where}).",
    ]
    if any(MAKING in row for row in rows):
        lines.append(
            "Making batches (to decode, crop and augment images) is measured as part of one core's time beside a run. "
            "With --share-batches a run makes some of its batches and reads the others, and waiting for data includes "
            "waiting for slower runs."
        )
    if plan.illegal:
        lines.append(f"Not trained, as the join cannot carry the encoding: {'; '.join(map(', '.join, plan.illegal))}.")
    return "".join(f"\n{line}\n" for line in lines)


def failed(failures: Mapping[str, str]) -> str:
    """The failures and their reasons."""
    return "\nFailed:\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in failures.items()) if failures else ""


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A comma-separated file with a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
