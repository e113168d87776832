"""Several processes train what one does, evaluate exactly, take as many steps as each other, and may be killed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest
import tiny_run
from test_resume import RICH, UPDATES, python
from tiny_run import assert_same_run, call, load, log_of

from runtime.distributed import UNSHARED_STORE

ROOT = Path(__file__).resolve().parents[1]
CLASSES = [f"class{number}" for number in range(11)]  # so that five guesses may be wrong
NUM_TRAIN, NUM_VAL = 5, 23  # per class, 55 in all, which neither 2 nor 3 divides; and a prime number
SECONDS = 180  # until a run is given up


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    data = tiny_run.make_images(folder / "images", NUM_TRAIN, NUM_VAL, CLASSES)
    (folder / "tiny.yaml").write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    return folder / "tiny.yaml"


@pytest.fixture
def call_in(tmp_path: Path) -> Callable[..., None]:
    """What runs `main.py` in a number of processes, each of which has to end with code 0."""
    meetings = (f"file://{tmp_path / f'meeting{number}'}" for number in range(100))

    def run(world_size: int, *argv: object) -> None:
        if world_size == 1:
            assert call(*argv) == 0
        else:
            _call_in(world_size, [*map(str, argv), "--dist-url", next(meetings)])

    return run


def _call_in(world_size: int, words: list[str]) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload(["main"])  # so that each process starts at once
    processes = [context.Process(target=_call_as, args=(rank, world_size, words)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world_size


def _call_as(rank: int, world_size: int, argv: Sequence[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    sys.exit(call(*argv))


# ---- numbers

# Dropout, dropped blocks and mixup are drawn by each process for its own batch; all else is drawn by image. So without
# the former it makes no difference how many processes share a batch.
BY_IMAGE = (
    *("--no-train-mode", "--train-crop", "random-resized", "--reprob", 0.5, "--color-jitter", 0.4, "--repeated-aug"),
    *("--smoothing", 0.1, "--clip-grad", 0.5, "--model-ema", "--model-ema-decay", 0.5),
)


def test_the_same_global_batch_gives_the_same_losses_in_any_number_of_processes(
    call_in: Callable[..., None], tmp_path: Path, recipe: Path
) -> None:
    flags = ("--recipe", recipe, *BY_IMAGE, "--device", "cpu", "--no-unscale-lr", "--lr", 1e-2, "--epochs", 5)
    ways = {
        1: (24, 2),
        2: (12, 2),
        3: (16, 1),
    }  # batch and batches per update: 48 images, so that an epoch is an update
    logs = {}
    for world_size, (batch_size, batches) in ways.items():
        sizes = ("--batch-size", batch_size, "--accum-steps", batches)
        call_in(world_size, *flags, *sizes, "--output_dir", tmp_path / str(world_size))
        logs[world_size] = log_of(tmp_path / str(world_size))
    assert len({row["train_loss"] for row in logs[1]}) == 5
    for world_size in (2, 3):
        for key in ("train_loss", "train_lr", "test_loss", "test_ema_loss"):
            alone = [row[key] for row in logs[1]]
            assert [row[key] for row in logs[world_size]] == pytest.approx(alone, abs=1e-5), (world_size, key)


def test_any_number_of_processes_evaluates_a_prime_number_of_images_alike(
    call_in: Callable[..., None], tmp_path: Path, recipe: Path
) -> None:
    call_in(1, "--recipe", recipe, "--device", "cpu", "--output_dir", tmp_path / "run")
    checkpoint, results = tmp_path / "run" / "checkpoint.pth", []
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        call_in(world_size, "--eval", "--resume", checkpoint, "--device", "cpu", "--output_dir", folder)
        results.append(json.loads((folder / "eval.json").read_text()))
    assert results[0]["count"] == NUM_VAL
    assert 0 < results[0]["acc5"] < 100
    for other in results[1:]:
        assert other == {**results[0], "loss": pytest.approx(results[0]["loss"], abs=1e-6)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_images_that_the_processes_cannot_share_out_make_no_process_wait(
    world_size: int, call_in: Callable[..., None], tmp_path: Path, recipe: Path
) -> None:
    flags = ("--device", "cpu", "--batch-size", 2, "--accum-steps", 2, "--init-timeout", 60)
    call_in(world_size, "--recipe", recipe, *flags, "--output_dir", tmp_path / "run")
    (rows, checkpoint) = log_of(tmp_path / "run"), load(tmp_path / "run" / "checkpoint.pth")
    assert len(rows) == checkpoint["epoch"] == 2
    assert checkpoint["config"]["batch_size"] == 2


# ---- a process fails alone

QUICKLY = """
import os, sys
import main
seconds, *argv = sys.argv[1:]
main.SECONDS_FOR_OTHERS = float(seconds.split(",")[int(os.environ["RANK"])])
sys.exit(main.main(argv))
"""


@pytest.fixture
def one_unreadable(tmp_path: Path) -> Callable[[int], tuple[Path, Path]]:
    """Images one of which, among those that the process `rank` of two evaluates, cannot be read; and its path."""

    def make(rank: int) -> tuple[Path, Path]:
        data = tiny_run.make_images(tmp_path / "images", NUM_TRAIN, NUM_VAL, CLASSES)
        unreadable = sorted((data / "val").glob("*/*.png"))[rank]
        unreadable.write_bytes(b"no image")
        return data, unreadable

    return make


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_fails_each_tells_it_in_one_line(
    rank: int, one_unreadable: Callable[[int], tuple[Path, Path]], tmp_path: Path, recipe: Path
) -> None:
    data, unreadable = one_unreadable(rank)
    (tmp_path / "quickly.py").write_text(QUICKLY)
    flags = ("--recipe", recipe, "--data-path", data, "--device", "cpu", "--dist-url", f"file://{tmp_path / 'meeting'}")
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "quickly.py", "2,2", *map(str, flags)],
            env={**os.environ, "RANK": str(one), "WORLD_SIZE": "2", "LOCAL_RANK": str(one), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for one in range(2)
    ]
    (_, failed), (_, other) = (processes[one].communicate(timeout=SECONDS) for one in (rank, 1 - rank))
    assert (processes[rank].returncode, processes[1 - rank].returncode) == (2, 1)
    (line,) = failed.splitlines()
    assert f"{unreadable} cannot be read" in line
    assert other == f"main.py: process {1 - rank}: error: another process has ended before its time\n"


def test_torchrun_names_the_process_that_failed(
    one_unreadable: Callable[[int], tuple[Path, Path]], tmp_path: Path, recipe: Path
) -> None:
    data, unreadable = one_unreadable(1)
    (tmp_path / "quickly.py").write_text(QUICKLY)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "quickly.py")
    done = python(*launcher, "60,2", "--recipe", recipe, "--data-path", data, "--device", "cpu")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("main.py: "))
    assert line.startswith(f"main.py: process 1: error: {unreadable} cannot be read")
    assert re.search(r"Root Cause .*?rank +: (\d).*?exitcode +: (\S+)", done.stderr, re.DOTALL).groups() == ("1", "2")  # type: ignore[union-attr]


# ---- a process is killed

KILLED_ONCE = """
import os, signal, sys
import engine, main, test_resume
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    engine._update = test_resume.at_update(int(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(main.main(sys.argv[2:]))
"""


def test_a_run_one_process_of_which_is_killed_restarts_and_equals_one_that_was_not_disturbed(
    call_in: Callable[..., None], tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UNSHARED_STORE, "1")
    flags = ("--recipe", recipe, *RICH, "--batch-size", 6, "--auto-resume", "--checkpoint-steps", 2)
    call_in(2, *flags, "--output_dir", tmp_path / "whole")
    (tmp_path / "killed.py").write_text(KILLED_ONCE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1")
    done = python(*launcher, tmp_path / "killed.py", UPDATES + 4, *flags, "--output_dir", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert "checkpoint.pth, after epoch 1 and 2 updates" in done.stdout
    assert UNSHARED_STORE not in done.stdout
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
