"""The benchmarks run and print what they promise; how fast anything is, is none of a test's business."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_models_are_compared_with_timms() -> None:
    small = ("--model", "vit_compact_patch4_32", "--batch-size", "2", "--repeats", "1")
    done = run("benchmarks.models", *small, "--pe", "relative", "learnable", "--join-type", "basic", "LaPE")
    assert done.returncode == 0, done.stderr
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in done.stdout.splitlines() if "|" in line]
    compared = [("timm's, again", ""), ("relative", "basic"), ("learnable", "basic"), ("learnable", "LaPE")]
    tables = [rows[start + 2 : start + 6] for start, row in enumerate(rows) if row == ("encoding", "join")]
    assert tables == [compared, compared]  # of training and of evaluation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pe", "none", "--join-type", "LaPE"), "none of the pairs"),
        (("--pe", "learnable", "foo"), "foo"),
        (("--pe", "rope", "--reference", "LaPE"), "--reference LaPE cannot carry rope"),
    ],
)
def test_what_cannot_be_compared_is_an_error_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run("benchmarks.models", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_the_start_is_measured() -> None:
    done = run("benchmarks.startup", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "import models_lape" in done.stdout
    assert "to the first step" in done.stdout


def test_cost_over_resolution_is_measured_and_drawn(tmp_path: Path) -> None:
    small = ("--sides", "2", "3", "--depth", "1", "--repeats", "1")
    done = run("benchmarks.resolution", *small, "--pe", "relative", "alibi", "--figure", str(tmp_path / "cost.png"))
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert [row[0] for row in rows if row[0].startswith("timm's")] == [
        *["timm's, s", "timm's, MiB"] * 2,
    ]
    assert [row[:2] for row in rows].count(["relative", "basic"]) == 4
    assert all(float(cell) > 0 for row in rows if row[0] == "alibi" for cell in row[2:])
    assert (tmp_path / "cost.png").stat().st_size > 0
