"""Batches that several runs share: they are made once, and the runs stay what they are alone, to the bit."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compare
import datasets
import engine
import main
from loading import sharing
from loading.images import Loaded
from loading.loader import ImageLoader
from loading.sharing import BatchFiles, Company
from tests import tiny_run
from tests.test_datasets import build_dataset, build_loader, make_args, settings_of
from tests.test_resume import at_update
from tests.tiny_run import assert_same_run, log_of

AUGMENTED = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "hflip": 0.5, "batch_size": 64}
SECONDS = 120
"""After which a process counts as hung."""


def loader_of(folder: Path | None, **changes: Any) -> ImageLoader:
    args = make_args(**{**AUGMENTED, "shared_batches": None if folder is None else str(folder), **changes})
    return build_loader(build_dataset(True, args)[0], True, args, 0, 1)


def batches_of(loader: ImageLoader, epochs: Sequence[int], seconds: float = 0.0) -> list[bytes]:
    """All batches, each trained on for so long."""
    batches = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        for images, labels in loader:
            batches.append(images.numpy().tobytes() + labels.numpy().tobytes())
            time.sleep(seconds)
    return batches


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns in a process of its own; the negative number of a signal that has ended it.

    They wait for each other when they join those that share batches.
    """
    context = multiprocessing.get_context("fork")
    barrier, queues = context.Barrier(len(calls)), [context.SimpleQueue() for _ in calls]
    processes = [
        context.Process(target=_call, args=(call, barrier, queue)) for call, queue in zip(calls, queues, strict=True)
    ]
    for process in processes:
        process.start()
    results = []
    for process, queue in zip(processes, queues, strict=True):
        deadline = time.monotonic() + SECONDS
        while queue.empty() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        results.append(process.exitcode if queue.empty() else queue.get())
        process.join(deadline - time.monotonic())
        assert process.exitcode is not None, "it hangs"
    return results


def _call(call: Callable[[], Any], barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)  # as threads do not survive a fork
    join = Company.join

    def join_and_wait(self: Company, number: int) -> None:
        is_first = self.path is None
        join(self, number)
        if is_first:
            barrier.wait(SECONDS)

    Company.join = join_and_wait  # type: ignore[method-assign]  # of this process alone
    queue.put(call())


# ---- batches


def test_processes_make_each_batch_once_and_read_the_same_from_each_other(tmp_path: Path) -> None:
    def load(loader: ImageLoader) -> tuple[list[bytes], int]:
        batches, made = [], 0
        for epoch in range(2):
            batches += batches_of(loader, [epoch], seconds=0.002)
            made += loader.num_made
            assert loader.num_taken == len(loader)
            assert (loader.making_seconds > 0) == (loader.num_made > 0)
        return batches, made

    loaders = [loader_of(tmp_path, num_workers=number) for number in (0, 2, 0)]
    results = together(*(partial(load, loader) for loader in loaders))
    alone = batches_of(loader_of(None), range(2))
    assert [batches == alone for batches, _ in results] == [True] * 3
    assert sum(made for _, made in results) == len(alone)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_batch_is_read_as_it_was_made_with_its_complaints(tmp_path: Path) -> None:
    pixels = torch.arange(96, dtype=torch.uint8).view(2, 4, 4, 3)
    made = Loaded([pixels, torch.tensor([5, 7])], [(0, 3), (0, 1)], ["", "x.png is damaged"], 1.5)
    assert BatchFiles(tmp_path).get(3, lambda number: made, end=9) == made
    read = BatchFiles(tmp_path).get(3, lambda number: pytest.fail("it is there"), end=9)
    assert all(torch.equal(*tensors) for tensors in zip(read.batch, made.batch, strict=True))
    assert read[1:] == (made.places, made.complaints, 0.0, 0)


def test_a_process_makes_other_batches_while_one_that_it_needs_is_made(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    is_making, may_end = context.Event(), context.Event()

    def batch(number: int) -> Loaded:
        return Loaded(
            [torch.full((2, 4, 4, 3), number, dtype=torch.uint8), torch.zeros(2)], [(0, 0)] * 2, [""] * 2, 1.0
        )

    def make_slowly(number: int) -> Loaded:
        is_making.set()
        assert may_end.wait(SECONDS)
        return batch(number)

    made: list[int] = []

    def make(number: int) -> Loaded:
        made.append(number)
        if len(made) == 3:
            may_end.set()
        return batch(number)

    BatchFiles(tmp_path).get(6, batch, end=7)
    other = context.Process(target=BatchFiles(tmp_path).get, args=(4, make_slowly, 9))
    other.start()
    assert is_making.wait(SECONDS)
    got = BatchFiles(tmp_path).get(4, make, end=9)
    other.join()
    assert made == [5, 7, 8]  # 4 is being made, and 6 is there; then only to wait is left
    assert (got.batch[0] == 4).all()
    assert (got.num_made, got.seconds) == (3, 3.0)


def test_processes_that_share_make_different_batches_at_the_same_time(tmp_path: Path) -> None:
    slow = sharing.SharedBatches._make

    def load(loader: ImageLoader) -> list[tuple[float, float]]:
        making = []

        def make(self: sharing.SharedBatches, number: int) -> Loaded:
            start = time.monotonic()
            time.sleep(0.1)
            made = slow(self, number)
            making.append((start, time.monotonic()))
            return made

        sharing.SharedBatches._make = make  # type: ignore[method-assign]  # of this process alone
        batches_of(loader, [0])
        return making

    first, second = together(*(partial(load, loader_of(tmp_path)) for _ in range(2)))
    overlaps = [min(a[1], b[1]) - max(a[0], b[0]) for a in first for b in second]
    assert sum(overlap for overlap in overlaps if overlap > 0) > 0.25 * len(loader_of(None)) * 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"aa": None},
        {"reprob": 0.25},
        {"hflip": 0.0},
        {"train_crop": "pad"},
        {"batch_size": 16},
        {"input_size": 24},
        {"mean": (0.4, 0.5, 0.5)},
        {"accum_steps": 2},
        {"repeated_aug": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_shapes_a_batch_names_its_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    def folder(**changes: Any) -> Path:
        company = loader_of(tmp_path, **changes).company
        assert company is not None
        return company.files.folder

    assert folder() == folder(num_workers=2, pin_mem=True)
    assert folder() != folder(**change)


def test_other_versions_classes_and_processes_do_not_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = make_args(**AUGMENTED, shared_batches=str(tmp_path))
    settings = settings_of(args)
    images, _ = build_dataset(True, args)

    def folder(rank: int = 0) -> Path:
        company = datasets.build_loader(images, True, settings, rank, 2).company
        assert company is not None
        return company.files.folder

    before = folder()
    assert folder(rank=1) != before
    images.labels = list(reversed(range(10)))
    assert folder() != before
    images.labels = None
    assert folder() == before
    monkeypatch.setattr(sharing, "version", lambda name: "0.0")
    assert folder() != before


def test_batches_of_processes_that_have_ended_are_not_read(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    assert loader.company is not None
    folder = loader.company.files.folder
    (folder / "processes").mkdir(parents=True)
    (folder / "processes" / "dead.position").write_bytes(bytes(8))
    black = torch.zeros(64, 16, 16, 3, dtype=torch.uint8)
    BatchFiles(folder).get(0, lambda number: Loaded([black, torch.zeros(64)], [(0, 0)] * 64, [""] * 64), end=1)
    assert batches_of(loader, [0]) == batches_of(loader_of(None), [0])
    assert loader.company.others() == []


def test_batches_that_cannot_be_written_are_told_once_and_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: object, array: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", full)
    loader = loader_of(tmp_path)
    assert batches_of(loader, [0]) == batches_of(loader_of(None), [0])
    assert [record.message for record in caplog.records] == [
        "batches are not shared, as they cannot be written: no space left on device"
    ]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_fast_process_waits_for_a_slow_one_and_few_batches_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = 3
    monkeypatch.setattr(sharing, "WINDOW_BYTES", window * 3 * 16 * 16 * 64)

    def load(loader: ImageLoader, seconds: float) -> tuple[int, int]:
        """The longest lead over the other one, and the most batches that were there."""
        lead = most = 0
        assert loader.company is not None
        loader.set_epoch(0)
        for _ in loader:
            others = loader.company.others()
            lead = max([lead, *(loader.company.position - other for other in others)])
            most = max(most, len(loader.company.files.numbers()))
            time.sleep(seconds)
        return lead, most

    loaders = [loader_of(tmp_path, aa=None) for _ in range(2)]
    (lead, most), _ = together(partial(load, loaders[0], 0.0), partial(load, loaders[1], 0.1))
    assert window <= lead <= window + 1
    assert most <= window + 3


def test_a_process_that_does_not_move_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WINDOW_BYTES", 1)
    monkeypatch.setattr(sharing, "SECONDS_OF_PATIENCE", 0.3)
    loader, stuck = loader_of(tmp_path), loader_of(tmp_path)
    stuck.set_epoch(0)
    assert batches_of(loader, [0]) == batches_of(loader_of(None), [0])


def test_a_process_that_waits_for_another_one_heeds_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WINDOW_BYTES", 1)
    monkeypatch.setattr(sharing, "noted_signal", lambda: signal.SIGTERM)
    loader, stuck = loader_of(tmp_path), loader_of(tmp_path)
    stuck.set_epoch(0)
    began = time.monotonic()
    batches_of(loader, [0])
    assert time.monotonic() - began < sharing.SECONDS_OF_PATIENCE


def test_shards_cannot_be_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--data-set", "WDS", "--data-path", tmp_path / "{0..1}.tar", "--eval-data-path", tmp_path / "{0..1}.tar")
    argv = ("--pe", "none", *flags, "--num-classes", 3, "--jobs", 2, "--share-batches", "--output_dir", tmp_path / "o")
    assert compare.main([str(word) for word in argv]) == 2
    assert "--share-batches means nothing to WDS" in capsys.readouterr().err


# ---- runs

FLAGS = (
    *("--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5, "--mixup", 0.8, "--cutmix", 1.0, "--smoothing", 0.1),
    *("--drop-path", 0.2, "--device", "cpu", "--epochs", 3, "--checkpoint-steps", 2),
)
JOINS = ("basic", "LaPE")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tiny.yaml").write_text(f"{tiny_run.RECIPE}\ndata-path: {tiny_run.make_images(folder / 'images')}\n")
    return folder / "tiny.yaml"


def train(recipe: Path, folder: Path, join_type: str, *flags: object, stop: tuple[int, int] | None = None) -> int:
    """The exit code of `main.py`; `stop`: a signal that comes before the update of this number."""
    if stop is not None:
        number, update = stop
        engine._update = at_update(update, lambda: os.kill(os.getpid(), number))  # of this process alone
    argv = ("--recipe", recipe, *FLAGS, "--join-type", join_type, "--output_dir", folder, "--auto-resume", *flags)
    return main.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A folder of the two runs, each trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for join in JOINS:
        assert together(partial(train, recipe, folder / join, join)) == [0]
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_runs_that_share_batches_and_are_killed_and_stopped_equal_those_that_do_not(
    tmp_path: Path, recipe: Path, alone: Path, num_workers: int
) -> None:
    flags = ("--shared-batches", tmp_path / "batches", "--num-workers", num_workers)
    killed, stopped = (tmp_path / join for join in JOINS)
    ends = together(
        lambda: train(recipe, killed, JOINS[0], *flags, stop=(signal.SIGKILL, 6)),
        lambda: train(recipe, stopped, JOINS[1], *flags, stop=(signal.SIGTERM, 9)),
    )
    assert ends == [-signal.SIGKILL, 143]
    ends = together(*(partial(train, recipe, tmp_path / join, join, *flags) for join in JOINS))
    assert ends == [0, 0]
    for join in JOINS:
        assert_same_run(tmp_path / join, alone / join, *(["num_workers"] if num_workers else []))


def test_a_comparison_that_shares_batches_equals_runs_that_do_not(
    tmp_path: Path, recipe: Path, alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    argv = ("--pe", "learnable", "--join-type", *JOINS, "--recipe", recipe, *FLAGS, "--output_dir", out)
    assert compare.main([str(word) for word in (*argv, "--jobs", 2, "--share-batches")]) == 0
    for join in JOINS:
        run = out / f"learnable_{join}_seed0"
        assert_same_run(run, alone / join)
        assert all(0 <= row["batches_made"] <= row["batches"] == 4 for row in log_of(run))
    assert "making batches: " in capsys.readouterr().out
    assert not (out / ".batches").exists()


def test_flags_of_a_comparison_without_sharing_have_no_folder(tmp_path: Path) -> None:
    plan = compare.make_plan(*compare.read_options(["--pe", "none", "--data-set", "DIGITS", "--output_dir", "x"]))
    (job,) = compare.training_jobs(plan, None)
    (sharing_job,) = compare.training_jobs(plan, tmp_path)
    assert "--shared-batches" not in job.argv
    assert dict(pairwise(sharing_job.argv))["--shared-batches"] == str(tmp_path)
