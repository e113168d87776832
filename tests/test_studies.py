"""The studies of the Makefile: what they start is legal, and a part that ends early is the last one of its call."""

import os
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

from comparison.options import side_by_side_parser
from comparison.plan import Plan
from tests.fake_runs import plan_of

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"
STUDIES = [line.split(":")[0] for line in MAKEFILE.read_text().splitlines() if line.startswith("study-")]
PYTHON = """#!/bin/sh
printf '%s\\n' "$@" END >>calls.txt
exit CODE
"""
"""Writes its arguments down."""


def run_study(folder: Path, study: str, code: int, *variables: str) -> tuple[int, list[list[str]]]:
    """The exit code of `make`, and the command lines of `compare.py`, each of which ends with `code`.

    Tables side by side may follow, of folders that these calls write.
    """
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.replace("CODE", str(code)))
    python.chmod(0o755)
    command = ["make", "-f", str(MAKEFILE), "-o", ".venv/.installed", study, *variables]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)
    words = (folder / "calls.txt").read_text().split("\nEND\n")[:-1]
    calls = [call.splitlines() for call in words]
    comparisons = [call[1:] for call in calls if call[0] == "compare.py"]
    written = {call[call.index("--output-dir") + 1] for call in comparisons}
    for call in calls[len(comparisons) :]:
        assert call[:2] == ["-m", "comparison.side_by_side"]
        assert {*side_by_side_parser().parse_args(call[2:]).folders} == written
    return done.returncode, comparisons


def plan_in(folder: Path, call: list[str]) -> Plan:
    output = folder / call[call.index("--output-dir") + 1]
    return plan_of(*call, "--device", "cpu", "--output-dir", output, "--seeds", "0")


@pytest.mark.parametrize("study", STUDIES)
def test_every_comparison_of_a_study_is_legal(tmp_path: Path, study: str) -> None:
    code, calls = run_study(tmp_path, study, 0)
    assert code == 0
    plans = [plan_in(tmp_path, call) for call in calls]
    folders = [run.folder for plan in plans for run in plan.runs]
    assert len({*folders}) == len(folders)
    for plan, other in combinations(plans, 2):
        if plan.folder == other.folder:  # the table of a folder is of one recipe
            assert plan.common == other.common


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_ends_with_the_first_comparison_that_does_not_end_well(tmp_path: Path, study: str) -> None:
    code, calls = run_study(tmp_path, study, 142)
    assert (code, len(calls)) == (2, 1)


def test_the_minutes_of_a_study_are_those_of_all_its_comparisons(tmp_path: Path) -> None:
    _, calls = run_study(tmp_path, "study-gpu", 0, "MINUTES=9", "JOBS=7", "ARGS=--dry-run", "SEEDS=4 5")
    for call in calls:
        assert int(call[call.index("--minutes") + 1]) in (8, 9)
        assert call[call.index("--jobs") + 1] == "7"
        assert "--dry-run" in call
        assert call[call.index("--seeds") + 1 :][:2] == ["4", "5"]
    assert {call[call.index("--data-set") + 1] for call in calls} == {"CIFAR10", "CIFAR100"}
