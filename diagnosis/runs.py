"""The diagnosis of all finished runs of a comparison."""

import json
from collections.abc import Sequence
from pathlib import Path

from comparison.plan import Plan, Run
from comparison.sizes import takes
from diagnosis.measure import measure
from diagnosis.options import IMAGES
from diagnosis.pictures import write_pictures
from diagnosis.subjects import open_subject
from diagnosis.tables import read_records, write_tables
from lape_vit.analysis.diagnosis import Diagnosis
from runtime.files import write_text
from runtime.logs import LoopDisplay

HERE = ("data_path", "eval_data_path", "device", "num_workers")
"""Options of a call that say where its data and its device are, and not what was trained."""


def diagnose_runs(
    plan: Plan, sizes: Sequence[int], ways: Sequence[str], display: LoopDisplay
) -> tuple[Path, dict[str, str]]:
    """Diagnose the best checkpoints of the finished runs that have no diagnosis yet, and write everything down.

    Args:
        sizes, ways: of :func:`diagnosis.measure.measure`.

    Returns:
        The folder with the tables and the pictures, and why a run could not be diagnosed, by its name.

    Raises:
        Interrupted: a signal came; what was measured before is kept.
        OSError: something cannot be written.
    """
    records, failures = [], {}
    given = {name: plan.common[name] for name in HERE if plan.common[name] is not None}
    for run in plan.finished():
        record = known_record(run, sizes, ways)
        if record is None:
            try:
                subject = open_subject(given, str(run.best_checkpoint), display)
                record = measure(subject, IMAGES, sizes=sizes, ways=ways)
            except (ValueError, OSError) as error:
                failures[f"the diagnosis of {run.name}"] = " ".join(str(error).split())
                continue
            write_text(result_of(run), json.dumps([record.as_dict()]) + "\n")
        records.append(record)
    folder = plan.folder / "diagnosis"
    if records:
        folder.mkdir(exist_ok=True)
        write_tables(folder, records)
        write_pictures(folder, records)
    return folder, failures


def result_of(run: Run) -> Path:
    return run.folder / "diagnosis.json"


def known_record(run: Run, sizes: Sequence[int], ways: Sequence[str]) -> Diagnosis | None:
    """What an earlier call has measured, if it is of the present checkpoint and has all sizes."""
    path = result_of(run)
    if not path.exists() or path.stat().st_mtime < run.best_checkpoint.stat().st_mtime:
        return None
    try:
        (record,) = read_records(path)
    except ValueError:
        return None
    wanted = {(size, way) for size in sizes for way in ways if takes(run.pe, way)}
    return record if wanted <= {(at.size[0], at.way) for at in record.sizes} else None
