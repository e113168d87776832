"""Records side by side: which of them are seeds of one training."""

from collections.abc import Sequence

from comparison.plan import place_in_registries
from comparison.tables import MeanAndDeviation
from diagnosis.subjects import short_name
from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.analysis.diagnosis_numbers import Group


def group(records: Sequence[Diagnosis]) -> list[Group]:
    """Records of one model, encoding, join and data set whose trainings had different seeds are a group.

    Where two of them have the same seed, or one that nobody knows, each stands for itself under its own name. Groups
    are in the order of the registries.
    """
    found: dict[tuple[str, str, str, str], list[Diagnosis]] = {}
    for record in records:
        about = record.about
        found.setdefault((record.pe, record.join_type, about["model"], about["data_set"]), []).append(record)
    models, data_sets = ({key[place] for key in found} for place in (2, 3))
    groups = []
    for (pe, join_type, model, data_set), members in found.items():
        others = [name for name, known in ((model, models), (data_set, data_sets)) if len(known) > 1]
        label = ", ".join([pe, join_type, *others])
        seeds = {record.about["seed"] for record in members} - {None}
        if len(seeds) == len(members) or len(members) == 1:
            groups.append(Group(label, sorted(members, key=lambda record: record.about["seed"] or 0)))
        else:
            names = [short_name(record.about["checkpoint"]) for record in members]
            paths = [record.about["checkpoint"] for record in members]
            shown = names if len({*names}) == len(names) else paths
            groups += [Group(f"{label}: {name}", [record]) for name, record in zip(shown, members, strict=True)]
    return sorted(groups, key=lambda one: place_in_registries(one.first.pe, one.first.join_type))


def spread(values: Sequence[float]) -> MeanAndDeviation | None:
    """Mean and deviation over the seeds; None without a number."""
    return MeanAndDeviation.of(values) if values else None
