"""TensorBoard shows what the log has, once, however often a run was stopped."""

import errno
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import call, log_of
from torch.utils.tensorboard import SummaryWriter

import engine
from tests.test_resume import ROOT, at_update, python

Points = dict[str, list[tuple[int, float]]]
UPDATES = 4  # per epoch


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("shown")
    data = tiny_run.make_images(folder / "images", num_val=5)
    (folder / "tiny.yaml").write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    flags = ("--model-ema", "--model-ema-decay", 0.9, "--sched-on-updates", "--tensorboard")
    return ("--recipe", folder / "tiny.yaml", *flags)


def points_of(run: Path) -> Points:
    """What TensorBoard shows: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_shows_the_log(points: Points, run: Path) -> None:
    """Every number of every row, and nothing else but updates."""
    rows = log_of(run)
    assert points.keys() == rows[0].keys() | {"update/loss", "update/lr"}
    for name in rows[0]:
        assert points[name] == [(1000 * row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    steps = [250 * (1 + update) for update in range(UPDATES * len(rows))]
    assert [step for step, _ in points["update/loss"]] == [step for step, _ in points["update/lr"]] == steps


def test_tensorboard_shows_every_row_of_the_log_and_the_loss_of_updates(
    tmp_path: Path, command: tuple[Any, ...]
) -> None:
    assert call(*command, "--output_dir", tmp_path) == 0
    points = points_of(tmp_path)
    assert_shows_the_log(points, tmp_path)
    assert {"train_loss", "train_lr", "test_acc1", "test_ema_acc1", "images_per_second"} <= points.keys()
    losses = [loss for _, loss in points["update/loss"]]
    for epoch, row in enumerate(log_of(tmp_path)):
        mean = sum(losses[UPDATES * epoch : UPDATES * (epoch + 1)]) / UPDATES
        assert mean == pytest.approx(row["train_loss"], rel=1e-6)
        assert points["update/lr"][UPDATES * (epoch + 1) - 1][1] == pytest.approx(row["train_lr"], rel=1e-6)


def test_a_stopped_run_that_is_resumed_shows_no_update_twice_and_none_too_few(
    tmp_path: Path, command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(*command, "--output_dir", tmp_path / "whole") == 0

    def stop() -> None:
        raise SystemExit

    flags = (*command, "--checkpoint-steps", 2, "--output_dir", tmp_path / "parts", "--auto-resume")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_update", at_update(UPDATES + 4, stop))  # 2 updates after the checkpoint, 1 shown
        with pytest.raises(SystemExit):
            call(*flags)
    assert [step for step, _ in points_of(tmp_path / "parts")["update/loss"]][-1] == 1750
    assert call(*flags) == 0
    points = points_of(tmp_path / "parts")
    assert_shows_the_log(points, tmp_path / "parts")
    assert points["update/loss"] == points_of(tmp_path / "whole")["update/loss"]


def test_without_the_flag_nothing_is_written(tmp_path: Path, command: tuple[Any, ...]) -> None:
    assert call(*command[:-1], "--epochs", 1, "--output_dir", tmp_path) == 0
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(("flags", "words"), [((), "--output_dir DIR"), (("--eval", "--resume", "x.pth"), "--eval")])
def test_tensorboard_without_a_folder_or_a_training_is_refused(
    flags: tuple[str, ...], words: str, command: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*command, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--tensorboard" in line
    assert words in line


def test_events_that_cannot_be_written_are_told_once_and_the_run_goes_on(
    tmp_path: Path, command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", fail)
    assert call(*command, "--output_dir", tmp_path) == 0
    assert capsys.readouterr().out.count("events cannot be written") == 1
    assert len(log_of(tmp_path)) == 2


def test_of_two_processes_one_writes_the_mean_loss_of_both(tmp_path: Path, command: tuple[Any, ...]) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    flags = (*command, "--epochs", 1, "--batch-size", 6, "--device", "cpu", "--output_dir", tmp_path)
    process = python(*launcher, ROOT / "main.py", *flags)
    assert process.returncode == 0, process.stderr
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    points = points_of(tmp_path)
    assert_shows_the_log(points, tmp_path)
    mean = sum(loss for _, loss in points["update/loss"]) / UPDATES
    assert mean == pytest.approx(log_of(tmp_path)[0]["train_loss"], rel=1e-6)
