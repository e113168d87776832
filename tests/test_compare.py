"""The command line `compare.py`: what it starts, stops, continues, refuses and writes."""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import compare
import comparison.jobs
import training.setup
from comparison import forecast
from comparison.jobs import Job, alone_in, environments
from comparison.options import NOT_HERE
from comparison.plan import HARMLESS, count_cores
from lape_vit.joins import JOINS, legal_joins, legal_pairs
from tests import tiny_run
from tests.fake_runs import calls_of, finish_all, plan_of, write_main
from tests.tiny_run import contents, log_of
from training.options import Options, flag_of

QUICK = ("--data-set", "DIGITS", "--device", "cpu", "--epochs", 3)


def call(*argv: object) -> int:
    """The exit code of `compare.py`."""
    return compare.main([str(word) for word in argv])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.py: error: ")
    return line


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a stand-in that starts with some statements in the place of `main.py`."""

    def put(behaviour: str) -> None:
        for program in ("MAIN", "EVALUATION"):
            monkeypatch.setattr(comparison.jobs, program, write_main(tmp_path / "stand_in.py", behaviour))

    put("")
    return put


# ---- with main.py itself

SEED, SIZE, NO_SIZE = 3, 24, 25


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A comparison of two runs, one of which cannot write its checkpoint, and of one illegal pair."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "recipe.yaml").write_text(f"{tiny_run.RECIPE}\ndata-path: {tiny_run.make_images(folder / 'images')}\n")
    out = folder / "out"
    (out / f"2D_sin_LaPE_seed{SEED}" / "checkpoint.pth").mkdir(parents=True)
    flags = ("--recipe", folder / "recipe.yaml", "--device", "cpu", "--jobs", 2, "--output_dir", out)
    flags = (*flags, "--sizes", NO_SIZE, SIZE)
    argv = ["--pe", "none", "learnable", "2D_sin", "--join_type", "LaPE", "--seeds", SEED, *flags]
    return {"argv": argv, "out": out, "code": call(*argv), "run": out / f"learnable_LaPE_seed{SEED}"}


def test_the_table_tells_what_the_log_of_a_run_does(real: dict[str, Any]) -> None:
    rows = log_of(real["run"])
    best = max(row["test_acc1"] for row in rows)
    (of_run,) = (row for row in table_of(real["out"] / "table.csv") if row["pe"] == "learnable")
    numbers = {name: float(of_run[name]) for name in ("best_acc1_mean", "last_acc1_mean", "n_parameters", "epochs")}
    expected = {"best_acc1_mean": best, "last_acc1_mean": rows[-1]["test_acc1"], "epochs": len(rows)}
    assert numbers == {**expected, "n_parameters": rows[-1]["n_parameters"]}
    text = (real["out"] / "table.md").read_text()
    assert f"**{best:.2f}**" in text
    assert "none, LaPE" in text
    assert (real["out"] / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_is_told_with_its_reason_and_the_others_finish(real: dict[str, Any]) -> None:
    assert real["code"] == 1
    (of_failed,) = (row for row in table_of(real["out"] / "table.csv") if row["pe"] == "2D_sin")
    assert (of_failed["seeds"], of_failed["failed"], of_failed["best_acc1_mean"]) == ("0", "1", "")
    assert "could not be saved" in of_failed["reasons"]
    assert of_failed["reasons"].split(": ", 1)[1] in (real["out"] / "table.md").read_text()


def test_the_finished_run_is_evaluated_at_the_other_size(real: dict[str, Any]) -> None:
    result = json.loads((real["run"] / f"size_{SIZE}" / "eval.json").read_text())
    by_pe = {row["pe"]: row for row in table_of(real["out"] / "sizes.csv")}
    assert float(by_pe["learnable"]["acc1_mean"]) == result["acc1"]
    assert (by_pe["learnable"]["size"], by_pe["2D_sin"]["acc1_mean"]) == (str(SIZE), "")
    assert f"{result['acc1']:.2f}" in (real["out"] / "sizes.md").read_text()
    assert (real["out"] / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_a_size_that_cannot_be_evaluated_is_told_and_the_others_are(real: dict[str, Any]) -> None:
    reason = f"learnable, LaPE, seed {SEED}: at {NO_SIZE}: --input-size {NO_SIZE} is no multiple of"
    assert reason in (real["out"] / "sizes.md").read_text()
    assert not (real["run"] / f"size_{NO_SIZE}").exists()


def test_the_next_call_finds_the_finished_run_as_main_py_has_left_it(real: dict[str, Any]) -> None:
    plan = plan_of(*real["argv"])
    assert [run.folder for run in plan.runs if run.is_finished()] == [real["run"]]


def test_a_dry_run_measures_each_pair_and_writes_nothing(
    real: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "SECONDS", 0.05)
    before = contents(real["out"])
    assert call(*real["argv"], "--dry-run", "--seeds", SEED, 4) == 0
    assert contents(real["out"]) == before
    out = capsys.readouterr().out
    cells = {line.split("|")[1].strip(): line.split("|")[3:] for line in out.splitlines() if "| LaPE" in line}
    epochs, parameters = log_of(real["run"])[-1]["epoch"], log_of(real["run"])[-1]["n_parameters"]
    assert [cell.strip() for cell in cells["learnable"][:3]] == ["1 of 2", str(epochs), f"{parameters:,}"]
    assert [cell.strip() for cell in cells["2D_sin"][:2]] == ["0 of 2", str(2 * epochs)]
    assert "none, LaPE" in out
    assert "in all" in out


def test_a_dry_run_tells_which_pair_cannot_start_and_measures_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "SECONDS", 0.05)

    def build(options: Options, *others: Any, build: Callable[..., Any] = training.setup.build_model) -> Any:
        if options.model.pe == "rope":
            raise ValueError("no rope\ntoday")
        return build(options, *others)

    monkeypatch.setattr(training.setup, "build_model", build)
    assert call("--pe", "none", "rope", *QUICK, "--output_dir", tmp_path / "out", "--dry-run") == 1
    out = capsys.readouterr().out
    assert "rope, basic cannot start: no rope today" in out
    (line,) = (line for line in out.splitlines() if line.startswith("| none"))
    assert "-" not in line.replace("|", "").split()
    assert not (tmp_path / "out").exists()


# ---- what is started, and how


def test_each_run_gets_its_flags_its_folder_and_its_share_of_the_machine(
    tmp_path: Path, stand_in: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out = tmp_path / "out"
    pairs = ("--pe", "relative", "learn", "--join-type", "basic", "LaPE", "--seeds", 0, 7)
    assert call(*pairs, *QUICK, "--max_relative_distance", 3, "--batch_size", 32, "--output_dir", out, "--jobs", 2) == 0
    relative = "relative(max_relative_distance=3)"
    for pe, join_type in ((relative, "basic"), ("learnable", "basic"), ("learnable", "LaPE")):
        for seed in (0, 7):
            folder = out / f"{pe}_{join_type}_seed{seed}"
            ((argv, environment, _),) = calls_of(folder)
            flags = dict(pairwise(argv))
            wanted = {"--pe": pe, "--join-type": join_type, "--seed": str(seed), "--output-dir": str(folder)}
            assert wanted.items() <= flags.items()
            assert flags["--batch-size"] == "32"
            assert "--auto-resume" in argv
            assert environment["OMP_NUM_THREADS"] == str(max(1, count_cores() // 2))
            assert "stand-in" in (folder / "output.txt").read_text()
    assert len(list(out.glob("*/calls.txt"))) == 6


def test_so_many_runs_at_a_time_and_no_more(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    running = f"Path({str(tmp_path)!r}) / 'running'"
    count = f"sum(path.stat().st_size for path in ({running}).iterdir())"
    stand_in(
        f"({running} / flags['--seed']).write_text('x')\ntime.sleep(0.5)\n"
        f"(folder / 'together.txt').write_text(str({count}))\n"
        f"import atexit; atexit.register(lambda: ({running} / flags['--seed']).write_text(''))"
    )
    (tmp_path / "running").mkdir()
    out = tmp_path / "out"
    assert call("--pe", "none", *QUICK, "--seeds", *range(5), "--output_dir", out, "--jobs", 3) == 0
    together = [int(path.read_text()) for path in out.glob("*/together.txt")]
    assert len(together) == 5
    assert max(together) == 3


def test_every_job_on_gpus_has_one_of_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(3, "cuda")] == ["2", "5", "2"]
    assert all("CUDA_VISIBLE_DEVICES" not in place for place in [*environments(2, "cpu"), *environments(2, "cuda:1")])


# ---- what fails, stops and continues


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("sys.exit('main.py: error: no luck') if '2D_sin' in argv else None", "no luck"),
        ("1 / (0 if '2D_sin' in argv else 1)", "ZeroDivisionError"),
        ("os.kill(os.getpid(), 9 if '2D_sin' in argv else 0)", "killed by SIGKILL"),
        ("sys.exit(0) if '2D_sin' in argv else None", "exit code 0"),
    ],
)
def test_whatever_ends_a_run_is_told_and_a_later_call_tries_it_again(
    tmp_path: Path,
    stand_in: Callable[[str], None],
    behaviour: str,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ("--pe", "2D_sin", "none", *QUICK, "--output_dir", tmp_path / "out")
    stand_in(behaviour)
    assert call(*argv) == 1
    rows = {row["pe"]: row for row in table_of(tmp_path / "out" / "table.csv")}
    assert reason in rows["2D_sin"]["reasons"]
    assert (rows["none"]["seeds"], rows["none"]["reasons"]) == ("1", "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.py: 2D_sin, basic, seed 0 failed: ")
    assert reason in line
    stand_in("")
    assert call(*argv) == 0
    assert [row["seeds"] for row in table_of(tmp_path / "out" / "table.csv")] == ["1", "1"]
    assert len(calls_of(tmp_path / "out" / "none_basic_seed0")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_comparison_stops_its_runs_and_goes_on(
    tmp_path: Path, stand_in: object, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ("--pe", "none", "rope", *QUICK, "--epochs", 20, "--output_dir", out, "--jobs", 2)
    logs = [out / f"{pe}_basic_seed0" / "log.txt" for pe in ("none", "rope")]

    def stop_when_both_train() -> None:
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in logs) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_when_both_train)
    thread.start()
    assert call(*argv) == 128 + number
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"compare.py: interrupted by {number.name}; 0 of 2 runs are finished; the same command continues"
    )
    before = [len(path.read_text().splitlines()) for path in logs]
    assert all(0 < epochs < 20 for epochs in before)
    time.sleep(0.5)
    assert [len(path.read_text().splitlines()) for path in logs] == before  # nothing trains on
    assert call(*argv) == 0
    assert [[row["epoch"] for row in log_of(path.parent)] for path in logs] == [list(range(1, 21))] * 2
    assert call(*argv) == 0
    assert [len(calls_of(path.parent)) for path in logs] == [2, 2]


@pytest.mark.parametrize("sizes", [(), ("--sizes", 24, 32)])
def test_what_finishes_while_a_comparison_is_stopped_is_in_the_tables(
    tmp_path: Path, stand_in: Callable[[str], None], sizes: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stopped = "'--eval' in argv" if sizes else "'none' in argv"
    finishes = "" if sizes else "; stopped = []"
    stand_in(f"if {stopped}: os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5){finishes}")
    argv = ("--pe", "none", "rope", *QUICK, "--output_dir", out, *sizes)
    for name in ("none", "rope")[: 2 * len(sizes)]:
        finish_all(plan_of("--pe", name, *QUICK, "--output_dir", out))
    assert call(*argv) == 130
    assert f"{2 if sizes else 1} of 2 runs are finished" in capsys.readouterr().err
    if sizes:
        assert [row["seeds"] for row in table_of(out / "sizes.csv")] == ["1", "0", "0", "0"]
    else:
        assert [row["seeds"] for row in table_of(out / "table.csv")] == ["1", "0"]


def test_a_comparison_ends_after_its_minutes_and_goes_on(
    tmp_path: Path, stand_in: object, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ("--pe", "none", "rope", "relative", *QUICK, "--epochs", 20, "--output_dir", out, "--jobs", 2)
    folders = [out / name for name in ("none_basic_seed0", "rope_basic_seed0")]
    began = time.monotonic()
    assert call(*argv, "--minutes", 0) == 142
    assert calls_of(folders[0]) == []
    assert call(*argv, "--minutes", 1.5 / 60) == 142
    assert time.monotonic() - began > 1.5
    lines = capsys.readouterr().err.splitlines()
    told = [f"compare.py: stopped after --minutes {number}; 0 of 3 runs are finished" for number in ("0", "0.025")]
    assert [line.split("; the same")[0] for line in lines] == told
    assert call(*argv, "--minutes", 10) == 0
    assert [len(calls_of(folder)) for folder in folders] == [2, 2]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("stops", [False, True])
def test_shared_batches_are_new_for_each_call_and_gone_after_it(
    tmp_path: Path, stand_in: Callable[[str], None], stops: bool
) -> None:
    out = tmp_path / "out"
    batches = out / ".batches"
    (batches / "of a call that was killed").mkdir(parents=True)
    stand_in(
        "shared = Path(flags['--shared-batches'])\n"
        "(folder / 'left.txt').write_text(' '.join(map(str, shared.glob('of*'))))\n"
        "(shared / 'key').mkdir(parents=True, exist_ok=True)\n(shared / 'key' / flags['--pe']).write_text('')\n"
        + ("os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5)" if stops else "")
    )
    argv = ("--pe", "none", "rope", *QUICK, "--output_dir", out, "--jobs", 2, "--share-batches")
    assert call(*argv) == (130 if stops else 0)
    called = [path.parent for path in out.glob("*/calls.txt")]
    assert len(called) == 2 or (stops and called)
    for run in called:
        ((argv_of_run, _, _),) = calls_of(run)
        assert dict(pairwise(argv_of_run))["--shared-batches"] == str(batches)
        assert (run / "left.txt").read_text() == ""
    assert not batches.exists()


def test_a_second_comparison_waits_for_the_runs_of_the_first_to_end(
    tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    with alone_in(tmp_path), pytest.raises(ValueError, match="another"), alone_in(tmp_path):
        pass
    stand_in("while not (folder / 'go').exists(): time.sleep(0.05)")
    (run,) = plan_of("--pe", "none", *QUICK, "--output_dir", tmp_path).runs
    job = Job("run", run, ["--output-dir", str(run.folder), "--epochs", "1"], run.folder, run.is_finished)
    with alone_in(tmp_path):
        left_over = job.start({})
    with pytest.raises(ValueError, match="runs that it has started"), alone_in(tmp_path):
        pass
    (run.folder / "go").touch()
    left_over.wait()
    with alone_in(tmp_path):
        pass


def test_sizes_are_evaluated_once_for_each_checkpoint(tmp_path: Path, stand_in: object) -> None:
    out = tmp_path / "out"
    argv = ("--pe", "none", "rope", *QUICK, "--output_dir", out, "--sizes", 16, 24)
    finish_all(plan_of(*argv))
    assert call(*argv) == 0
    assert call(*argv) == 0
    run = out / "none_basic_seed0"
    assert [len(calls_of(run / f"size_{size}")) for size in (16, 24)] == [1, 1]
    ((evaluation, *_),) = calls_of(run / "size_24")
    flags = dict(pairwise(evaluation))
    assert flags["--resume"] == str(run / "best_checkpoint.pth")
    assert (flags["--input-size"], flags["--device"]) == ("24", "cpu")
    os.utime(run / "best_checkpoint.pth", (time.time() + 3600, time.time() + 3600))
    assert call(*argv) == 1  # the result stays older than the checkpoint
    assert [len(calls_of(out / f"{pe}_basic_seed0" / "size_24")) for pe in ("none", "rope")] == [2, 1]


def test_a_size_is_evaluated_in_every_way_that_the_encoding_takes(tmp_path: Path, stand_in: object) -> None:
    out = tmp_path / "out"
    ways = ("plain", "reference-grid", "log-n", "reference-grid+log-n")
    argv = ("--pe", "learnable", "rope", *QUICK, "--output_dir", out, "--sizes", 24, "--size-ways", *ways)
    finish_all(plan_of(*argv))
    assert call(*argv) == 0
    flags = {}
    processes: dict[str, set[int]] = {"learnable": set(), "rope": set()}
    for pe in processes:
        for folder in (out / f"{pe}_basic_seed0").glob("size_24*"):
            ((evaluation, _, process),) = calls_of(folder)
            processes[pe].add(process)
            flags[pe, folder.name] = {"--reference-grid", "--log-n"} & {*evaluation}
    assert flags == {
        ("learnable", "size_24"): set(),
        ("learnable", "size_24_log-n"): {"--log-n"},
        ("rope", "size_24"): set(),
        ("rope", "size_24_log-n"): {"--log-n"},
        ("rope", "size_24_reference-grid"): {"--reference-grid"},
        ("rope", "size_24_reference-grid+log-n"): {"--reference-grid", "--log-n"},
    }
    assert [len(of_one_model) for of_one_model in processes.values()] == [1, 1]
    assert [row["way"] for row in table_of(out / "sizes.csv")].count("plain") == 2
    assert (out / "sizes.md").read_text().count("\n## ") == 3
    assert {path.name for path in out.glob("sizes*.png")} == {"sizes.png", *(f"sizes_{way}.png" for way in ways[1:])}


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--pe", "none", "--no-such-flag", "3"), "--no-such-flag"),
        (("--pe", "none", "--jobs", "1", "stray"), "stray"),
        (("--pe", "none", "--epochs", "x"), "--epochs"),
        (("--pe", "none", "--recipe", "no_such"), "no_such"),
        (("--pe", "none", "--model", "resnet50"), "resnet50"),
        (("--pe", "none", "--data-set", "FOLDER", "--data-path", "no/such"), "no/such"),
        (("--pe", "learnable", "learn"), "learnable twice"),
        (("--pe", "none", "--seeds", "1", "1"), "--seeds"),
        (("--pe", "none", "--sizes", "8", "8"), "--sizes"),
        (("--pe", "none", "--size-ways", "log-n"), "--size-ways says how --sizes evaluates"),
        (("--pe", "none", "learnable", "--sizes", "8", "--size-ways", "reference-grid"), "--size-ways reference-grid"),
        (("--pe", "none", "--join-type", "glue"), "glue"),
        (("--pe", "none", "rope", "--join-type", "LaPE", "share"), "legal joins are none: basic; rope: basic"),
        (("--pe", "none", "--max-relative-distance", "3"), "relative"),
        (("--pe", "relative", "--max-relative-distance", "x"), "--max-relative-distance"),
        (("--pe", "none", "--jobs", "0"), "--jobs"),
        (("--pe", "none", "--share-batches"), "give --jobs 2 or more"),
        (("--pe", "none", "--minutes", "-1"), "--minutes"),
        ((), "--pe"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    tmp_path: Path, flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str], stand_in: object
) -> None:
    assert call(*QUICK, *flags, "--output_dir", tmp_path / "out") == 2
    assert told in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_options_of_a_single_run_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"auto_resume": (), "eval": ("--resume", "x"), "eval_ema": ("--eval", "--resume", "x")}.get(name, ("1",))
    assert call("--pe", "none", *QUICK, "--output_dir", tmp_path / "out", flag_of(name), *value) == 2
    assert "compare.py" in refused(capsys).removeprefix("compare.py:")


def test_torchrun_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("--pe", "none", *QUICK, "--output_dir", tmp_path) == 2
    assert "torchrun" in refused(capsys)


def test_runs_made_with_other_options_are_not_mixed_with_new_ones(
    tmp_path: Path, stand_in: object, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    finish_all(plan_of("--pe", "none", *QUICK, "--output_dir", out))
    for pe in ("none", "rope"):  # the run itself, and one that would be its neighbour in the table
        assert call("--pe", pe, *QUICK, "--lr", 0.5, "--output_dir", out) == 2
        line = refused(capsys)
        assert "none_basic_seed0 was made with --lr 0.002, and now it is 0.5" in line
    assert call("--pe", "none", *QUICK, "--max-bad-steps", 3, "--output_dir", out) == 0
    assert "--max-bad-steps is now 3; it was 10" in capsys.readouterr().out
    assert "max_bad_steps" in HARMLESS
    assert calls_of(out / "none_basic_seed0") == []


@pytest.mark.parametrize("join_type", JOINS)
def test_illegal_pairs_are_listed_and_skipped(
    tmp_path: Path, join_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(dict.fromkeys(pe for pe, _ in legal_pairs()))
    argv = ("--pe", *names, "--join-type", join_type, *QUICK, "--output_dir", tmp_path)
    plan = plan_of(*argv)
    legal = [pe for pe in names if join_type in legal_joins(pe)]
    assert [run.pe for run in plan.runs] == legal
    assert [pe for pe, _ in plan.illegal] == [pe for pe in names if pe not in legal]
    compare.show_plan(plan, 1)
