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
        key = (record.pe, record.join_type, about(record, "model"), about(record, "data_set"))
        found.setdefault(key, []).append(record)
    models, data_sets = ({key[place] for key in found} for place in (2, 3))
    groups = []
    for (pe, join_type, model, data_set), members in found.items():
        others = [name for name, known in ((model, models), (data_set, data_sets)) if len(known) > 1]
        label = ", ".join([pe, join_type, *others])
        seeds = {record.about.get("seed") for record in members} - {None}
        if len(seeds) == len(members) or len(members) == 1:
            groups.append(Group(label, sorted(members, key=lambda record: record.about.get("seed") or 0)))
        else:
            names = [short_name(about(record, "checkpoint")) for record in members]
            paths = [about(record, "checkpoint") for record in members]
            numbered = [str(number) for number in range(len(members))]
            shown = next(each for each in (names, paths, numbered) if len({*each}) == len(members))
            groups += [Group(f"{label}: {name}", [record]) for name, record in zip(shown, members, strict=True)]
    return sorted(groups, key=lambda one: place_in_registries(one.first.pe, one.first.join_type))


def about(record: Diagnosis, name: str) -> str:
    """What is known besides; a record that a notebook has made says nothing of it."""
    return record.about.get(name, {"model": "a model", "data_set": "some images"}.get(name, ""))


def spread(values: Sequence[float]) -> MeanAndDeviation | None:
    """Mean and deviation over the seeds; None without a number."""
    return MeanAndDeviation.of(values) if values else None
