"""Pairs of an encoding and a join, seed by seed: each against `basic`, and against no encoding at all.

Runs of one seed see the same images with the same augmentation, in the same order, so their difference leaves out what
the seed does to both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from comparison.plan import Plan
from comparison.tables import NAMES, MeanAndDeviation, Outcome, Pair, csv_text, heading
from lape_vit.encodings.base import NoEncoding
from lape_vit.joins import Basic
from runtime.files import write_text
from runtime.tables import Row, markdown

LEAST_DEVIATION = 1e-9
"""Of differences in points: what is below comes from rounding."""


@dataclass(frozen=True)
class PairedDifference:
    """What a pair has over another one, in points of the last epoch's accuracy.

    Attributes:
        seeds: those that both were trained with.
        difference: over these seeds.
        p: of a paired t-test; None where the differences do not vary.
        p_corrected: the same after Holm's correction for all comparisons.
    """

    pair: Pair
    baseline: Pair
    seeds: Sequence[int]
    difference: MeanAndDeviation
    p: float | None
    p_corrected: float | None = None


def paired_differences(found: Mapping[Pair, Sequence[Outcome]]) -> list[PairedDifference]:
    """Each pair against the same encoding with `basic`, and against `none`, where two seeds or more are common."""
    possible = [
        paired_difference(found, pair, baseline)
        for pair in found
        for baseline in dict.fromkeys([(pair[0], Basic.name), (NoEncoding.name, Basic.name)])
        if baseline != pair and baseline in found
    ]
    differences = [one for one in possible if one is not None]
    corrected = iter(holm([one.p for one in differences if one.p is not None]))
    return [one if one.p is None else replace(one, p_corrected=next(corrected)) for one in differences]


def paired_difference(found: Mapping[Pair, Sequence[Outcome]], pair: Pair, baseline: Pair) -> PairedDifference | None:
    """`pair` less `baseline`; None where fewer than two seeds are common."""
    ours, theirs = ({one.run.seed: one.last for one in found[name]} for name in (pair, baseline))
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    spread = MeanAndDeviation.of([ours[seed] - theirs[seed] for seed in seeds])
    assert spread.deviation is not None
    if spread.deviation < LEAST_DEVIATION:
        return PairedDifference(pair, baseline, seeds, spread, None)
    from scipy.stats import ttest_rel  # takes most of a second to import, and one seed needs no test

    test = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    return PairedDifference(pair, baseline, seeds, spread, float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction for their number (Holm 1979, Scandinavian Journal of Statistics 6)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def write_paired(plan: Plan, differences: Sequence[PairedDifference]) -> None:
    """Write `paired.md` and `paired.csv`, where any two pairs have two seeds in common."""
    if not differences:
        return
    rows: list[Row] = [
        {
            **dict(zip(NAMES, one.pair, strict=True)),
            "against": ", ".join(one.baseline),
            "difference (points)": f"{round(one.difference.mean, 2) + 0:+.2f} ± {one.difference.deviation:.2f}",
            "p": "-" if one.p is None else f"{one.p:.2g}",
            "p, corrected": "-" if one.p_corrected is None else f"{one.p_corrected:.2g}",
            "seeds": str(len(one.seeds)),
        }
        for one in differences
    ]
    remark = (
        "\nAccuracy of the last epoch, seed by seed: mean ± standard deviation of the differences, and a paired t-test "
        f"of {count_tests(differences)} comparisons. The corrected p is Holm's for this number.\n"
    )
    text = f"# {heading(plan)}: differences, seed by seed\n\n{markdown(rows, (*NAMES, 'against'))}{remark}"
    write_text(plan.folder / "paired.md", text)
    numbers = [
        {
            "pe": one.pair[0],
            "join_type": one.pair[1],
            "baseline_pe": one.baseline[0],
            "baseline_join_type": one.baseline[1],
            "seeds": " ".join(map(str, one.seeds)),
            "difference_mean": one.difference.mean,
            "difference_std": one.difference.deviation,
            "p": one.p,
            "p_corrected": one.p_corrected,
        }
        for one in differences
    ]
    write_text(plan.folder / "paired.csv", csv_text(numbers))


def count_tests(differences: Sequence[PairedDifference]) -> int:
    return sum(one.p is not None for one in differences)
