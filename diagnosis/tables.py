"""The results as `diagnosis.md`, `diagnosis.csv` and `diagnosis.json`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from comparison.tables import csv_text, mean_and_deviation
from diagnosis.summary import about, group, spread
from lape_vit.analysis import diagnosis_numbers as names
from lape_vit.analysis.attention_statistics import uniform_distance
from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.analysis.diagnosis_numbers import Group, Key, Values, changes_of, images_of
from runtime.files import write_text
from runtime.tables import NOT_YET, Row, markdown

NAMES = ("model", "block", "way")
"""Columns that hold no numbers."""


def write_tables(folder: Path, records: Sequence[Diagnosis]) -> None:
    """Write the three files; each is whole or as it was."""
    groups = group(records)
    write_text(folder / "diagnosis.md", report(groups))
    write_text(folder / "diagnosis.csv", csv_text(csv_rows(groups)))
    write_text(folder / "diagnosis.json", json.dumps([record.as_dict() for record in records], allow_nan=False) + "\n")


def read_records(path: Path) -> list[Diagnosis]:
    """The records of a `diagnosis.json`.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        return [Diagnosis.of(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no diagnosis.json of diagnose.py, or of an earlier version") from error


def csv_rows(groups: Sequence[Group]) -> list[dict[str, object]]:
    """A row for each number, over the seeds, with all digits."""
    rows = []
    for one in groups:
        first = one.first
        of_group = {"label": one.label, "model": about(first, "model"), "pe": first.pe, "join_type": first.join_type}
        for key, values in one.all_values().items():
            of_key = {name: "" if value is None else value for name, value in key._asdict().items()}
            spreads = {name.lstrip("_"): value for name, value in mean_and_deviation("", values).items()}
            rows.append({**of_group, "data_set": about(first, "data_set"), **of_key, "seeds": len(values), **spreads})
    return rows


def report(groups: Sequence[Group]) -> str:
    """The tables for the eye."""
    values = [one.all_values() for one in groups]
    text = f"# Where are the patches? {heading(groups)}\n\n{REMARKS}\n\n{all_counts(groups)}\n"
    text += f"\n## What the layers know, and what the model uses\n\n{markdown(overview_rows(groups, values), NAMES)}"
    for measure in ("accuracy", "agreement"):
        rows = knock_out_rows(groups, values, measure)
        if any(len(row) > 1 for row in rows):
            text += f"\n## Knock-outs: {TITLES[measure]}\n\n{markdown(rows, NAMES)}"
    for one, found in zip(groups, values, strict=True):
        seeds = f", {len(one.records)} seeds" if len(one.records) > 1 else ""
        text += f"\n## {one.label}{seeds}, block by block\n\n{markdown(block_rows(one, found), NAMES)}"
        if one.first.sizes:
            text += f"\n### {one.label}, at other sizes\n\n{markdown(size_rows(one, found), NAMES)}"
    return text


TITLES = {"accuracy": "accuracy (%)", "agreement": "answers that stay the same (%)"}
REMARKS = (
    "R² is the part of the variance of x and y that a linear probe explains on images that it has not seen: 1 if it "
    "finds every place. *Permuted*: the contents of each image were permuted among its patches, so that only positions "
    "tell a place; in the first table they always were, unless a column says otherwise. Numbers are mean ± standard "
    "deviation over seeds where there are several. `docs/diagnosis.md` says what each measure means."
)


def all_counts(groups: Sequence[Group]) -> str:
    """How many images each number is of, once for all groups where they agree."""
    texts = {one.label: counts(one.first) for one in groups}
    if len({*texts.values()}) == 1:
        return counts(groups[0].first)
    return "\n\n".join(f"*{label}*: {text}" for label, text in texts.items())


def counts(record: Diagnosis) -> str:
    """How many images each number is of, and what that means for it."""
    error = 50 / math.sqrt(record.judged)  # of a half of all answers, in per cent
    of_these = "all" if record.judged == record.held_out else record.judged
    floor = f" The untrained model has seen {record.floor} images of each half." if record.untrained else ""
    return (
        f"Probes are fitted to {record.fitted} images and judged on {record.held_out} others, and so is the accuracy "
        f"in the first table. Knock-outs, with the intact model beside them, and attention are of {of_these} of "
        f"these: the same for every change, so that differences are paired. The standard error of a percentage of "
        f"{record.judged} images is at most {error:.1f} points.{floor}"
    )


def heading(groups: Sequence[Group]) -> str:
    """What was diagnosed, in few words; all there is where the groups differ."""
    each = [
        (about(record, "model"), about(record, "data_set"), "{} x {}".format(*record.grid), images_of(record))
        for record in (one.first for one in groups)
    ]
    models, data_sets, grids, images = (" and ".join(dict.fromkeys(texts)) for texts in zip(*each, strict=True))
    return f"{models} on {data_sets}, {grids} patches; {images}"


def cell(values: Values, key: Key) -> str:
    """Mean and deviation of a number."""
    found = spread(values.get(key, ()))
    return NOT_YET if found is None else str(found)


def overview_rows(groups: Sequence[Group], values: Sequence[Values]) -> list[Row]:
    """A row for each group: what stands out."""
    rows = []
    for one, found in zip(groups, values, strict=True):
        first, last = 0, one.depth() - 1
        row = {"model": one.label, "seeds": str(len(one.records)), "accuracy (%)": cell(found, Key("accuracy"))}
        for block in dict.fromkeys((first, last)):
            row[f"R² read, block {'0' if block == 0 else 'last'}"] = cell(
                found, Key("r2", names.READ, "permuted", block)
            )
        row["R² output"] = cell(found, Key("r2", names.OUTPUT, "permuted"))
        row["R² output, contents in place"] = cell(found, Key("r2", names.OUTPUT))
        row["R² output, untrained"] = cell(found, Key("r2", names.OUTPUT, "untrained, permuted"))
        row["error, patches"] = cell(found, Key("error", names.OUTPUT, "permuted"))
        row["similarity by distance"] = cell(found, Key("similarity", names.OUTPUT, "permuted"))
        row["share of position"] = cell(found, Key("share", names.OUTPUT))
        row["s per 1,000 images"] = cell(found, Key("seconds per 1,000 images"))
        rows.append(row)
    return rows


def knock_out_rows(groups: Sequence[Group], values: Sequence[Values], measure: str) -> list[Row]:
    """A row for each group: the intact model, and each change of the whole."""
    changes = changes_of(groups)
    rows = []
    for one, found in zip(groups, values, strict=True):
        row = {"model": one.label}
        if measure == "accuracy" and Key("accuracy") in found:
            row[names.INTACT] = cell(found, Key("accuracy", names.INTACT))
        known = {change: Key(measure, change) for change in changes}
        row |= {change: cell(found, key) for change, key in known.items() if any(key in each for each in values)}
        rows.append(row)
    return rows


def block_rows(one: Group, found: Values) -> list[Row]:
    """A row for each block, and one for what comes after the last norm."""
    rows = []
    answer = "accuracy" if Key("accuracy") in found else "agreement"
    unit = "%" if answer == "accuracy" else "% same"
    for block in range(one.depth()):
        row = {"block": str(block)}
        for spot in (names.INPUT, names.READ):
            row[f"R² {spot}"] = cell(found, Key("r2", spot, "", block))
            row[f"R² {spot}, permuted"] = cell(found, Key("r2", spot, "permuted", block))
        row["untrained read, permuted"] = cell(found, Key("r2", names.READ, "untrained, permuted", block))
        row |= _of_spot(found, names.INPUT, block)
        row[f"{names.REMOVED} ({unit})"] = cell(found, Key(answer, names.REMOVED, block=block))
        row[f"{names.TAKEN_AWAY} ({unit})"] = cell(found, Key(answer, names.TAKEN_AWAY, block=block))
        row["entropy, nats"] = cell(found, Key("entropy", block=block))
        row["distance, patches"] = cell(found, Key("distance", block=block))
        rows.append(row)
    output = {"block": "output", "R² input": cell(found, Key("r2", names.OUTPUT))}
    output["R² input, permuted"] = cell(found, Key("r2", names.OUTPUT, "permuted"))
    output |= _of_spot(found, names.OUTPUT, None)
    output[f"{names.REMOVED} ({unit})"] = cell(found, Key(answer, names.REMOVED_AT_OUTPUT))
    rows.append({column: output.get(column, NOT_YET) for column in rows[0]})
    uniform = {"block": "uniform attention", "entropy, nats": f"{math.log(one.first.tokens):.2f}"}
    uniform["distance, patches"] = f"{uniform_distance(one.first.grid):.2f}"
    rows.append({column: uniform.get(column, NOT_YET) for column in rows[0]})
    return rows


def _of_spot(found: Values, spot: str, block: int | None) -> Row:
    return {
        "error, permuted, patches": cell(found, Key("error", spot, "permuted", block)),
        "similarity by distance, permuted": cell(found, Key("similarity", spot, "permuted", block)),
        "share of position": cell(found, Key("share", spot, "", block)),
        "share removed": cell(found, Key("removed_share", spot, "permuted", block)),
    }


def size_rows(one: Group, found: Values) -> list[Row]:
    """A row for each size and way."""
    rows = []
    for at in one.first.sizes:
        size = "x".join(map(str, at.size))
        keys = {name: Key(name, size=size, way=at.way) for name in ("accuracy", names.SHARPNESS)}
        above = " (as above)" if at.size == one.first.size else ""
        row = {"size": f"{size}{above}", "way": at.way, "accuracy (%)": cell(found, keys["accuracy"])}
        row[names.SHARPNESS] = cell(found, keys[names.SHARPNESS])
        for measure, unit in (("entropy", "nats"), ("distance", "patches")):
            for block in dict.fromkeys((0, one.depth() - 1)):
                name = f"{measure} in block {'0' if block == 0 else 'last'}, {unit}"
                row[name] = cell(found, Key(measure, block=block, size=size, way=at.way))
        rows.append(row)
    return rows
