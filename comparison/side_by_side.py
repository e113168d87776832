"""Comparisons side by side: a row for each pair of an encoding and a join, a column for each folder of `compare.py`.

python -m comparison.side_by_side DIR DIR ... [--reached PERCENT]
"""

from comparison.options import side_by_side_parser
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("python -m comparison.side_by_side", side_by_side_parser().parse_args)

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from comparison.plan import earlier_runs, place_in_registries
from comparison.tables import NAMES, MeanAndDeviation, Outcome, Pair
from runtime.logs import end_in_one_line
from runtime.tables import NOT_YET, Row, markdown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code: 0, or 2 for bad input."""
    args = side_by_side_parser().parse_args(argv)
    try:
        columns = {Path(folder).resolve().name: outcomes_in(Path(folder)) for folder in args.folders}
        if len(columns) < len(args.folders):
            raise ValueError("two folders have the same name, which heads a column: rename one")
    except (ValueError, OSError) as error:
        return end_in_one_line("python -m comparison.side_by_side", f"error: {error}", 2)
    pairs = sorted(set().union(*columns.values()), key=lambda pair: place_in_registries(*pair))
    rows: list[Row] = [
        dict(zip(NAMES, pair, strict=True))
        | {column: cell(found.get(pair, []), args.reached) for column, found in columns.items()}
        for pair in pairs
    ]
    print(markdown(rows, NAMES), end="")
    print(f"\n{remark([finished for found in columns.values() for finished in found.values()], args.reached)}")
    return 0


def outcomes_in(folder: Path) -> dict[Pair, list[Outcome]]:
    """The finished runs of each pair.

    Raises:
        ValueError, OSError: there are none, or a run is damaged.
    """
    found: dict[Pair, list[Outcome]] = {}
    for run in earlier_runs(folder, []):
        if run.is_finished():
            found.setdefault(run.pair, []).append(Outcome(run, run.rows()))
    if not found:
        raise ValueError(f"{folder} holds no finished run of compare.py")
    return found


def remark(pairs: Sequence[Sequence[Outcome]], reached: float | None) -> str:
    """What a reader of the table has to know."""
    fewest, most = min(map(len, pairs)), max(map(len, pairs))
    seeds = f"{fewest}" + (f" to {most}" if most > fewest else "")
    words = "Accuracy on the test images of the last epoch (%): "
    words += "one seed a pair" if most == 1 else f"mean ± standard deviation over {seeds} seeds a pair"
    if reached is not None:
        words += f"; in brackets the first epoch with {reached:g} % or more"
        words += "" if most == 1 else ", the median over seeds, where all have reached it"
    return f"{words}."


def cell(finished: Sequence[Outcome], reached: float | None) -> str:
    """What a pair came to in a comparison."""
    if not finished:
        return NOT_YET
    text = str(MeanAndDeviation.of([one.last for one in finished]))
    epochs = [] if reached is None else [epoch_of(one, reached) for one in finished]
    known = [epoch for epoch in epochs if epoch is not None]
    return f"{text} ({median(known):g})" if known and len(known) == len(epochs) else text


def epoch_of(outcome: Outcome, reached: float) -> int | None:
    """The first epoch with this accuracy or more."""
    return next((row["epoch"] for row in outcome.rows if row["test_acc1"] >= reached), None)


if __name__ == "__main__":
    sys.exit(main())
