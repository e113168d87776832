"""The parts of a comparison: options, tables, pictures and screen, on runs that nobody has trained."""

import csv
import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from comparison import forecast, screen, side_by_side
from comparison.jobs import FAILED, FINISHED, RUNNING, Job
from comparison.overview import write_overview
from comparison.paired import holm, paired_differences, write_paired
from comparison.pictures import LOOKS, draw_by_encoding, draw_comparison, draw_sizes, explain, pair_looks
from comparison.plan import Plan, Run
from comparison.screen import Screen
from comparison.sizes import evaluation_jobs
from comparison.tables import NAMES, describe_making, outcomes, table_rows, write_tables
from lape_vit import encodings
from lape_vit.joins import JOINS, legal_joins, legal_pairs
from runtime.tables import print_table
from tests.fake_runs import accuracies, finish, finish_all, plan_of, row
from tests.tiny_run import set_up
from training.options import config_text, saved_options

QUICK = ("--data-set", "DIGITS", "--device", "cpu")
PNG = b"\x89PNG"


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- options


@pytest.mark.parametrize("pe", encodings.names())
def test_the_options_of_a_run_are_those_that_main_py_saves(tmp_path: Path, pe: str) -> None:
    (run,) = plan_of("--pe", pe, "--join-type", legal_joins(pe)[-1], *QUICK, "--output_dir", tmp_path).runs
    finish(Run(run.pe, run.join_type, 0, tmp_path / "saved", saved_options(set_up(*run.argv).options)), [])
    assert lines_of(tmp_path / "saved" / "config.yaml")[2:] == config_text(run.options, "").splitlines()[2:]


def test_all_stands_for_every_name_and_every_seed_has_every_pair_before_the_next(tmp_path: Path) -> None:
    flags = ("--pe", "all", "2D_sin+peg", "--join-type", "all", "--seeds", 3, 5, *QUICK, "--output_dir", tmp_path)
    plan = plan_of(*flags)
    pairs = [*legal_pairs(), *(("2D_sin+peg", join) for join in legal_joins("2D_sin+peg"))]
    assert [(run.pe, run.join_type, run.seed) for run in plan.runs] == [
        (*pair, seed) for seed in (3, 5) for pair in pairs
    ]
    assert plan.illegal == []


def test_dashes_and_underscores_mean_the_same(tmp_path: Path) -> None:
    words = ("--join-type", "LaPE", "--batch-size", 9, "--data-set", "DIGITS", "--output-dir", tmp_path)
    underscores = [str(word).replace("-", "_").replace("__", "--", 1) for word in words[:-1]]
    plans = [plan_of("--pe", "learnable", *flags) for flags in (words, [*underscores, tmp_path])]
    assert plans[0].runs[0].options == plans[1].runs[0].options
    assert plans[0].runs[0].options["batch_size"] == 9


def test_the_loaders_share_out_the_cores_unless_their_number_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comparison.plan.count_cores", lambda: 16)
    flags = ("--pe", "none", "--data-set", "CIFAR10", "--output_dir", tmp_path)
    counts = {jobs: plan_of(*flags, "--jobs", jobs).common["num_workers"] for jobs in (1, 4, 99)}
    assert counts == {1: 10, 4: 4, 99: 1}
    assert plan_of(*flags, "--jobs", 4, "--num-workers", 0).common["num_workers"] == 0
    assert plan_of("--pe", "none", *QUICK, "--output_dir", tmp_path).common["num_workers"] == 0  # says its recipe


def test_a_run_is_finished_once_its_checkpoint_is_as_new_as_its_last_epoch(tmp_path: Path) -> None:
    (run,) = plan_of("--pe", "none", *QUICK, "--epochs", 2, "--output_dir", tmp_path).runs
    assert not run.is_finished()
    finish(run, [row(1, 50.0)])
    assert not run.is_finished()
    finish(run, [row(1, 50.0), row(2, 60.0)])
    assert run.is_finished()
    log = (run.folder / "log.txt").stat().st_mtime
    os.utime(run.folder / "checkpoint.pth", (log - 5, log - 5))
    assert not run.is_finished()
    (run.folder / "checkpoint.pth").unlink()
    assert not run.is_finished()


# ---- tables


def test_a_pair_has_mean_and_deviation_over_its_seeds(tmp_path: Path) -> None:
    seeds = (0, 5, 9)
    flags = ("--join-type", "basic", "LaPE", "--seeds", *seeds, *QUICK, "--epochs", 6, "--output_dir", tmp_path)
    plan = plan_of("--pe", "rope", "learnable", *flags)
    finish_all(plan)
    write_tables(plan, outcomes(plan), {})
    rows = table_of(tmp_path / "table.csv")
    assert [(row["pe"], row["join_type"]) for row in rows] == [
        ("learnable", "basic"),
        ("learnable", "LaPE"),
        ("rope", "basic"),
    ]
    for line in rows:
        runs = [run for run in plan.runs if run.pair == (line["pe"], line["join_type"])]
        best, last = [max(accuracies(run)) for run in runs], [accuracies(run)[-1] for run in runs]
        assert (float(line["best_acc1_mean"]), float(line["best_acc1_std"])) == pytest.approx((mean(best), stdev(best)))
        assert (float(line["last_acc1_mean"]), float(line["last_acc1_std"])) == pytest.approx((mean(last), stdev(last)))
        assert (line["best_epochs"], line["epochs"], line["n_parameters"]) == ("5 5 5", "6", "1234")
        assert (float(line["images_per_second"]), float(line["waiting_share"])) == (1003.5, 0.25)
        cells = f"{mean(best):.2f} ± {stdev(best):.2f}", f"{mean(last):.2f} ± {stdev(last):.2f}", "5", "6", "1,234"
        text = (tmp_path / "table.md").read_text().replace("*", "")
        (found,) = (each for each in text.splitlines() if each.startswith(f"| {line['pe']:9} | {line['join_type']:5} "))
        assert [cell.strip() for cell in found.split("|")[3:-1]] == [*cells, "1,004", "25 %", "3 of 3"]


def test_the_table_tells_what_it_took_to_make_batches_with_sharing_and_without(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", "rope", "learnable", *QUICK, "--epochs", 4, "--output_dir", tmp_path)

    def add(run: Run, rows: list[dict[str, Any]]) -> None:  # but to those of an earlier version
        for each in rows if run.pe != "learnable" else []:  # each of 2 seconds
            made = 6 if run.pe == "none" else 0
            each |= {"making_seconds": made / 5, "batches": 8, "batches_made": made}

    finish_all(plan, add)
    found = outcomes(plan)
    write_tables(plan, found, {})
    rows = {row["pe"]: row for row in table_of(tmp_path / "table.csv")}
    names = ("making_share", "making_share_unshared")
    assert [float(rows["none"][name]) for name in names] == pytest.approx([0.6, 0.8])
    assert [[rows[pe][name] for name in names] for pe in ("learnable", "rope")] == [["", ""], ["0.0", ""]]
    text = (tmp_path / "table.md").read_text()
    assert "| making batches |" in text
    assert "60 %" in text
    assert describe_making(found) == [
        "making batches: 0:05 of a core's time in 0:16 of runs (30 %); 24 of 64 batches were made, the others shared: "
        "without sharing 80 %"
    ]


def test_the_table_names_the_devices_of_the_runs_and_not_that_of_the_call(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", *QUICK, "--epochs", 4, "--seeds", 0, 1, "--output_dir", tmp_path)
    finish_all(plan)
    for run, devices in zip(plan.runs, ("cpu, cuda:1", "cuda:1"), strict=True):
        config = run.folder / "config.yaml"
        config.write_text(config.read_text().replace("device: cpu", "device: cuda:1"))
        write_tables(plan, outcomes(plan), {})
        assert f"({devices}, float32)" in (tmp_path / "table.md").read_text()


def test_the_best_pair_alone_is_bold(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", "learnable", "rope", *QUICK, "--epochs", 4, "--output_dir", tmp_path)
    finish_all(plan)
    write_tables(plan, outcomes(plan), {})
    best = max(plan.runs, key=lambda run: max(accuracies(run)))
    (line,) = (line for line in lines_of(tmp_path / "table.md") if "**" in line)
    assert line.startswith(f"| {best.pe} ")


def test_averaged_weights_have_a_column_where_there_are_some(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", *QUICK, "--epochs", 3, "--output_dir", tmp_path)

    def add(run: Run, rows: list[dict[str, Any]]) -> None:
        for number, each in enumerate(rows):
            each["test_ema_acc1"] = 90.0 - number

    finish_all(plan, add)
    (line,) = table_rows(plan, outcomes(plan))
    assert line["best of averaged weights (%)"] == "90.00"
    finish_all(plan)
    (line,) = table_rows(plan, outcomes(plan))
    assert "best of averaged weights (%)" not in line


def test_pairs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    flags = ("--pe", "none", "learnable", "--join-type", "basic", "LaPE", *QUICK, "--epochs", 1, "--seeds", 0, 1, 2, 3)
    plan = plan_of(*flags, "--output_dir", tmp_path)
    of_none = [50.0, 60.0, 40.0, 55.0]
    more = {
        ("none", "basic"): [0.0] * 4,
        ("learnable", "basic"): [1.0, 2.0, 3.0],
        ("learnable", "LaPE"): [3.0, 4.0, 5.0],
    }
    for run in plan.runs:
        if run.seed < len(more[run.pair]):
            finish(run, [row(1, of_none[run.seed] + more[run.pair][run.seed])])
    write_paired(plan, paired_differences(outcomes(plan)))
    found = {
        (one["pe"], one["join_type"], one["baseline_pe"], one["baseline_join_type"]): one
        for one in table_of(tmp_path / "paired.csv")
    }
    assert list(found) == [
        ("learnable", "basic", "none", "basic"),
        ("learnable", "LaPE", "learnable", "basic"),
        ("learnable", "LaPE", "none", "basic"),
    ]
    first, second, third = found.values()
    assert [one["seeds"] for one in found.values()] == ["0 1 2"] * 3
    assert float(first["difference_mean"]) == pytest.approx(2)
    assert float(first["difference_std"]) == pytest.approx(1)
    assert float(first["p"]) == pytest.approx(0.0741799, abs=1e-6)  # t = 2 sqrt(3) with two degrees of freedom
    assert float(second["difference_mean"]) == pytest.approx(2)
    assert second["p"] == ""
    assert float(third["p"]) == pytest.approx(0.0202041, abs=1e-6)  # t = 4 sqrt(3)
    assert float(third["p_corrected"]) == pytest.approx(2 * float(third["p"]))
    assert float(first["p_corrected"]) == pytest.approx(float(first["p"]))
    text = (tmp_path / "paired.md").read_text()
    assert "of 2 comparisons" in text
    assert "+4.00 ± 1.00" in text


def test_one_seed_is_not_tested(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", "learnable", *QUICK, "--epochs", 1, "--output_dir", tmp_path)
    finish_all(plan)
    write_paired(plan, paired_differences(outcomes(plan)))
    assert not (tmp_path / "paired.md").exists()


def test_the_overview_has_a_row_for_each_encoding_and_marks_what_is_certain(tmp_path: Path) -> None:
    flags = ("--join-type", "basic", "LaPE", *QUICK, "--epochs", 1, "--seeds", 0, 1, 2, "--output_dir", tmp_path)
    plan = plan_of("--pe", "none", "learnable", "2D_sin", "rope", *flags)
    levels = {
        ("none", "basic"): [50.0, 50.1, 50.2],
        ("learnable", "basic"): [60.0, 60.2, 60.1],
        ("learnable", "LaPE"): [55.0, 55.1, 55.3],
        ("2D_sin", "basic"): [40.0, 70.0],
    }
    for run in plan.runs:
        if run.seed < len(levels.get(run.pair, [])):
            finish(run, [row(1, levels[run.pair][run.seed])])
    found = outcomes(plan)
    write_overview(plan, found, paired_differences(found))
    _, _, header, _, *rows, _, remark = lines_of(tmp_path / "overview.md")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    assert cells == [
        ["encoding", "basic", "LaPE"],
        ["none", "50.10 ± 0.10 (3)", ""],
        ["learnable", "60.10 ± 0.10 (3) ↑", "55.13 ± 0.15 (3) ↓"],
        ["2D_sin", "55.00 ± 21.21 (2)", "-"],
        ["rope", "-", ""],
    ]
    assert "correction for 4 comparisons" in remark


def test_comparisons_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {
        ("one", "none", 0): [10.0, 20.0],
        ("one", "none", 1): [10.0, 30.0],
        ("one", "rope", 0): [99.0, 100.0],
        ("one", "rope", 1): [50.0, 99.5],
        ("two", "rope", 0): [99.0, 80.0],
    }
    for folder in ("one", "two"):
        flags = (*QUICK, "--epochs", 2, "--seeds", 0, 1, "--output_dir", tmp_path / folder)
        for run in plan_of("--pe", "rope", "none", *flags).runs:
            curve = curves.get((folder, run.pe, run.seed), [])
            if curve:
                finish(run, [row(epoch, accuracy) for epoch, accuracy in enumerate(curve, start=1)])
    words = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert side_by_side.main([*words, "--reached", "99"]) == 0
    header, _, *rows, _, said = capsys.readouterr().out.splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)] == [
        ["encoding", "join", "one", "two"],
        ["none", "basic", "25.00 ± 7.07", "-"],
        ["rope", "basic", "99.75 ± 0.35 (1.5)", "80.00 (1)"],
    ]
    assert "over 1 to 2 seeds a pair" in said
    assert side_by_side.main(words) == 0
    assert "(1" not in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [(["empty"], "no finished run"), (["empty", "more/empty"], "same name")])
def test_folders_that_cannot_stand_side_by_side_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in words if len(words) > 1 else []:
        finish_all(plan_of("--pe", "none", *QUICK, "--epochs", 1, "--output_dir", word))
    assert side_by_side.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_curves_have_each_epoch_of_each_finished_run(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", "rope", *QUICK, "--epochs", 2, "--seeds", 0, 1, "--output_dir", tmp_path)
    for run in plan.runs[:3]:
        finish(run, [row(1, 10.0, train_loss=2.0), row(2, 20 + run.seed + 1 / 3, train_loss=1.0)])
    write_tables(plan, outcomes(plan), {})
    assert [tuple(line.values()) for line in table_of(tmp_path / "curves.csv")] == [
        ("none", "basic", "0", "1", "2.0", "10.0"),
        ("none", "basic", "0", "2", "1.0", "20.3333"),
        ("none", "basic", "1", "1", "2.0", "10.0"),
        ("none", "basic", "1", "2", "1.0", "21.3333"),
        ("rope", "basic", "0", "1", "2.0", "10.0"),
        ("rope", "basic", "0", "2", "1.0", "20.3333"),
    ]


def test_one_join_needs_no_overview(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", "learnable", *QUICK, "--epochs", 1, "--output_dir", tmp_path)
    finish_all(plan)
    write_overview(plan, outcomes(plan), [])
    assert not (tmp_path / "overview.md").exists()


def test_holms_correction_never_changes_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])


def test_finished_runs_of_earlier_calls_are_in_the_table_in_the_order_of_the_registries(tmp_path: Path) -> None:
    flags = (*QUICK, "--epochs", 2, "--output_dir", tmp_path)
    finish_all(plan_of("--pe", "rope", "learnable", "--seeds", 1, *flags))
    plan = plan_of("--pe", "2D_sin", "rope", *flags)
    assert [run.name for run in plan.finished()] == ["learnable, basic, seed 1", "rope, basic, seed 1"]
    counts = {line["encoding"]: line["seeds"] for line in table_rows(plan, outcomes(plan))}
    assert counts == {"learnable": "1 of 1", "2D_sin": "0 of 1", "rope": "1 of 2"}
    assert list(counts) == ["learnable", "2D_sin", "rope"]


# ---- pictures


@pytest.mark.parametrize(
    ("names", "seeds", "epochs"),
    [(["none"], [0], 1), (["none", "learnable", "rope"], [0, 1, 2], 40), (encodings.names(), [0], 3)],
    ids=["one run of one epoch", "several seeds", "every encoding"],
)
def test_a_comparison_of_any_extent_is_drawn(
    tmp_path: Path, names: Sequence[str], seeds: Sequence[int], epochs: int
) -> None:
    flags = ("--join-type", "basic", "LaPE", "--seeds", *seeds, *QUICK, "--epochs", epochs, "--output_dir", tmp_path)
    plan = plan_of("--pe", *names, *flags)
    finish_all(plan)
    file = io.BytesIO()
    draw_comparison(outcomes(plan), "title", file)
    assert file.getvalue().startswith(PNG)


def test_many_pairs_are_drawn_in_a_row_for_each_encoding_and_a_far_seed_is_named(tmp_path: Path) -> None:
    flags = ("--join-type", "basic", "LaPE", "--seeds", 0, 1, *QUICK, "--epochs", 1, "--output_dir", tmp_path)
    plan = plan_of("--pe", "rope", "none", "learnable", *flags)
    levels = {"rope": [90.0, 92.0], "none": [71.0, 71.2], "learnable": [30.0, 130.0]}
    for run in plan.runs:
        finish(run, [row(1, levels[run.pe][run.seed])])
    done = {pair: finished for pair, finished in outcomes(plan).items() if finished}
    (axes,) = draw_by_encoding(done, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "learnable", "rope"]
    assert {text.get_text() for text in axes.texts} == {"◂ 30"}
    assert axes.get_xlim()[0] > 60


@pytest.mark.parametrize("trained_at", [32, [32, 48]])
def test_accuracy_against_resolution_is_drawn_with_what_is_there(trained_at: object) -> None:
    file = io.BytesIO()
    found = {("none", "basic"): {24: [40.0, 42.0], 32: [50.0]}, ("rope", "basic"): {24: [], 32: []}}
    draw_sizes(found, trained_at, "title", file)
    assert file.getvalue().startswith(PNG)


def test_the_title_keeps_clear_of_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    flags = ("--seeds", 0, *QUICK, "--epochs", 1, "--output_dir", tmp_path)
    plan = plan_of("--pe", "none", "learnable+rope_mixed", *flags)
    finish_all(plan)
    done, title = outcomes(plan), "vit_compact_patch4_32 on FOLDER, 20 epochs, at other sizes, without log-n"
    draw_comparison(done, title, io.BytesIO())
    draw_sizes({pair: {24: [40.0], 32: [50.0]} for pair in done}, 32, title, io.BytesIO())
    for figure in (*figures, draw_by_encoding(done, title)):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        titles = [text for text in (*figure.texts, *(axes.title for axes in figure.axes)) if text.get_text() == title]
        assert len(titles) == 1
        assert not legend.get_window_extent().overlaps(titles[0].get_window_extent())


def test_every_encoding_has_its_own_colour_and_every_join_its_own_look() -> None:
    looks = pair_looks(legal_pairs())
    colours = {pe: look["color"] for (pe, _), look in looks.items()}
    assert list(colours) == encodings.names()
    assert len(set(colours.values())) == len(colours) == len({(pe, look["color"]) for (pe, _), look in looks.items()})
    lines, markers = zip(*LOOKS.values(), strict=True)
    assert len(set(lines)) == len(set(markers)) == len(JOINS) == len(LOOKS)


def test_joins_of_a_single_encoding_differ_in_colour_and_the_legend_names_the_pairs() -> None:
    pairs = [pair for pair in legal_pairs() if pair[0] == "learnable"]
    looks = pair_looks(pairs)
    assert len({look["color"] for look in looks.values()}) == len(pairs) == len(JOINS)
    figure = Figure()
    explain(figure, looks)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert [*zip(texts, [line.get_color() for line in legend.get_lines()], strict=True)] == [
        (f"{pe}, {join}", look["color"]) for (pe, join), look in looks.items()
    ]


# ---- forecast


def test_a_forecast_counts_what_is_left_and_how_many_run_at_a_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    plan = plan_of("--pe", "none", "rope", "--seeds", 0, 1, *QUICK, "--epochs", 5, "--output_dir", tmp_path)
    monkeypatch.setattr(forecast, "measure", lambda run: forecast.Cost(7, 100.0, 0.5, 60.0))
    console = Console(file=io.StringIO())
    finish(plan.runs[0], [row(epoch, 50.0) for epoch in range(1, 6)])
    finish(plan.runs[1], [row(1, 50.0)])
    times = dict.fromkeys((1, 2, 50), "")
    for jobs in times:
        assert forecast.forecast(plan, jobs, console) == 0
        times[jobs] = caplog.messages[-1].split(",")[0]
    # 4 epochs and two times 5 are left; never less than the longest run
    assert times == {1: "about 14:00 in all", 2: "about 7:00 in all", 50: "about 5:00 in all"}


def test_a_stopwatch_measures_the_loop_after_its_first_steps_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = forecast.Stopwatch()

    def load() -> Iterator[int]:
        nonlocal now
        for number in range(100):
            now += 50.0 if number < forecast.WARM_UP else 0.25  # seconds until the batch is there
            yield 8

    def work() -> None:
        nonlocal now
        with watch.show("", 100) as loop:
            for images in loop.batches(load()):
                now += 0.75
                loop.advance(images, list)

    with pytest.raises(forecast.EnoughError):
        work()
    assert (watch.speed, watch.waiting) == (8.0, 0.25)
    assert now < 50.0 * forecast.WARM_UP + 20.0


# ---- screen


def jobs_of(plan: Plan) -> list[Job]:
    return [Job(run.name, run, [], run.folder, lambda: True) for run in plan.runs]


def test_on_a_terminal_the_running_and_the_failed_come_first_and_all_fits(tmp_path: Path) -> None:
    plan = plan_of("--pe", "none", "--seeds", *range(30), *QUICK, "--epochs", 4, "--output_dir", tmp_path)
    jobs = jobs_of(plan)
    finish(plan.runs[7], [row(1, 40.0), row(2, 30.0)])
    jobs[7].state, jobs[3].state, jobs[1].state = RUNNING, FAILED, FINISHED
    jobs[3].reason = "no luck " * 30
    console = Console(force_terminal=True, width=80, height=12, file=io.StringIO(), color_system=None)
    with Screen(console, "training", jobs, 1, trains=True) as shown:
        shown.watch()
        plain = Console(width=80, height=12, file=io.StringIO())
        plain.print(shown.render())
    lines = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) < 12
    assert [word in lines[1] for word in ("seed 7", "2/4", "40.00", "30.00", "0:04 left")] == [True] * 5
    assert "seed 3" in lines[2]
    assert "no luck" in lines[2]
    assert lines[-1].startswith("1 running, 1 failed, 27 waiting, 1 finished, ")


def test_without_a_terminal_each_change_is_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plan = plan_of("--pe", "none", *QUICK, "--epochs", 2, "--output_dir", tmp_path)
    (job,) = jobs = jobs_of(plan)
    with Screen(Console(file=io.StringIO()), "training", jobs, 1, trains=True) as shown:
        shown.watch()
        job.state = RUNNING
        shown.watch()
        finish(plan.runs[0], [row(1, 40.0)])
        shown.watch()
        shown.watch()
        job.state, job.reason = FAILED, "no luck"
    assert caplog.messages == [
        "none, basic, seed 0: started",
        "none, basic, seed 0: epoch 1/2  acc@1 40.00 %  best 40.00 %  0:02 left",
        "none, basic, seed 0: failed: no luck  (1 of 1)",
    ]


def test_the_time_left_of_evaluations_grows_with_their_pixels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    plan = plan_of("--pe", "none", *QUICK, "--output_dir", tmp_path)
    finish_all(plan)
    (job,) = jobs = evaluation_jobs(plan, [16, 32, 64], ["plain"])
    console = Console(width=80, file=io.StringIO())
    with Screen(console, "evaluation", jobs, 1, trains=False) as shown:
        job.state = RUNNING
        shown.watch()
        for size, seconds in ((16, 10.0), (32, 40.0)):
            now[0] += seconds
            write_evaluation(plan.runs[0].folder / f"size_{size}")
            shown.watch()
        console.print(shown.render())
        job.state = FINISHED
    assert caplog.messages == [
        "none, basic, seed 0: started",
        "none, basic, seed 0: 1/3 sizes, 3:20 left",
        "none, basic, seed 0: 2/3 sizes, 2:40 left",
        "none, basic, seed 0: finished  (1 of 1, 2:40 left)",
    ]
    assert "2/3" in console.file.getvalue()  # type: ignore[attr-defined]


def write_evaluation(folder: Path) -> None:
    folder.mkdir()
    (folder / "eval.json").write_text('{"acc1": 50.0}')


def test_a_table_is_printed_as_markdown_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [{"encoding": "none", "join": "basic", "best (%)": "1.00"}, {"encoding": "rope", "join": "basic"}]
    print_table(Console(file=io.StringIO()), "title", rows, NAMES)
    (text,) = caplog.messages
    assert text.splitlines()[3:] == [
        "| encoding | join  | best (%) |",
        "| -------- | ----- | -------: |",
        "| none     | basic |     1.00 |",
        "| rope     | basic |        - |",
    ]
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    print_table(console, "title", rows, NAMES)
    assert "rope" in console.file.getvalue()  # type: ignore[attr-defined]
