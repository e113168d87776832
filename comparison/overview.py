"""Accuracies at a glance: a row for each encoding, a column for each join."""

from collections.abc import Mapping, Sequence

from comparison.paired import PairedDifference, count_tests
from comparison.plan import Plan
from comparison.tables import NAMES, MeanAndDeviation, Outcome, Pair, heading
from lape_vit.encodings.base import NoEncoding
from lape_vit.joins import JOINS, Basic, legal_joins
from runtime.files import write_text
from runtime.tables import NOT_YET, Row, markdown

CERTAIN = 0.05
"""The largest p, after the correction, of a difference that is marked."""


def write_overview(
    plan: Plan, found: Mapping[Pair, Sequence[Outcome]], differences: Sequence[PairedDifference]
) -> None:
    """Write `overview.md`, where there are several joins."""
    joins = [join for join in JOINS if join in {join for _, join in found}]
    if len(joins) < 2 or not any(found.values()):
        return
    rows: list[Row] = [
        {NAMES[0]: pe, **{join: cell((pe, join), found, differences) for join in joins}}
        for pe in dict.fromkeys(pe for pe, _ in found)
    ]
    text = f"# {heading(plan)}: accuracy of the last epoch (%)\n\n{markdown(rows, NAMES)}{remark(found, differences)}"
    write_text(plan.folder / "overview.md", text)


def cell(pair: Pair, found: Mapping[Pair, Sequence[Outcome]], differences: Sequence[PairedDifference]) -> str:
    """Mean and deviation, the number of seeds where pairs differ in it, and an arrow for a difference that is certain;
    empty where the join cannot carry the encoding."""
    if pair[1] not in legal_joins(pair[0]):
        return ""
    finished = found.get(pair, [])
    if not finished:
        return NOT_YET
    seeds = f" ({len(finished)})" if differ_in_seeds(found) else ""
    return f"{MeanAndDeviation.of([one.last for one in finished])}{seeds}{arrow(pair, differences)}"


def arrow(pair: Pair, differences: Sequence[PairedDifference]) -> str:
    """Up or down for a certain difference to the same encoding with `basic`; of `basic` itself, to no encoding."""
    baseline = (NoEncoding.name if pair[1] == Basic.name else pair[0], Basic.name)
    for one in differences:
        if (one.pair, one.baseline) == (pair, baseline) and one.p_corrected is not None and one.p_corrected < CERTAIN:
            return " ↑" if one.difference.mean > 0 else " ↓"
    return ""


def differ_in_seeds(found: Mapping[Pair, Sequence[Outcome]]) -> bool:
    return len({len(finished) for finished in found.values() if finished}) > 1


def remark(found: Mapping[Pair, Sequence[Outcome]], differences: Sequence[PairedDifference]) -> str:
    """What a reader has to know."""
    words = "Accuracy on the test images: mean ± standard deviation over seeds"
    words += ", whose number is in brackets. " if differ_in_seeds(found) else ". "
    words += "Empty: the join cannot carry the encoding."
    if differences:
        words += (
            f" ↑ and ↓: above and below the same encoding with basic, and in the column basic above and below none, "
            f"with p < {CERTAIN} in a paired t-test over seeds after Holm's correction for "
            f"{count_tests(differences)} comparisons."
        )
    return f"\n{words}\n"
