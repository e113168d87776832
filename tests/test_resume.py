"""Runs that are stopped, killed or fed with numbers that are not finite: what is lost, and what they end with."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import assert_same_run, call, differences, load, log_of, train
from torch import Tensor, nn

import engine
import main
import training.setup
import training.state

ROOT = Path(__file__).resolve().parents[1]
RICH = (
    *("--model-ema", "--model-ema-decay", 0.9, "--mixup", 0.8, "--drop-path", 0.2, "--reprob", 0.5),
    *("--pos-shift", 0.2, "--pos-jitter", 1.3, "--pos-rescale", 1.5),
    *("--join-type", "LaPE", "--sched-on-updates", "--device", "cpu", "--epochs", 3),
)
UPDATES = 4  # per epoch


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    data = tiny_run.make_images(folder / "images")
    (folder / "tiny.yaml").write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The folder of a finished run; to be left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert call("--recipe", recipe, *RICH, "--output_dir", folder) == 0
    return folder


def at_update(number: int, act: Callable[[], object]) -> Callable[..., bool]:
    """`engine._update` that acts before the update of this number in this process."""
    update, count = engine._update, iter(range(1, 1000))

    def acting(*args: Any) -> bool:
        if next(count) == number:
            act()
        return update(*args)

    return acting


def place(folder: Path) -> tuple[int, int]:
    checkpoint = load(folder / "checkpoint.pth")
    return checkpoint["epoch"], checkpoint["progress"]["counts"]["step"]


# ---- killed

KILLED = """
import os, signal, sys
import engine, main, test_resume
engine._update = test_resume.at_update(int(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL))
main.main(sys.argv[2:])
"""


def python(*argv: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def test_a_run_killed_in_mid_epoch_and_resumed_equals_one_that_was_not(
    tmp_path: Path, recipe: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--recipe", recipe, *RICH, "--checkpoint-steps", 2, "--output_dir", tmp_path / "run", "--auto-resume")
    killed = python("-c", KILLED, UPDATES + 4, *flags, "--num-workers", 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert place(tmp_path / "run") == (1, 2)
    assert call(*flags, "--num-workers", 2) == 0  # the same command, but for what may differ
    assert (
        f"continues from {tmp_path / 'run' / 'checkpoint.pth'}, after epoch 1 and 2 updates" in capsys.readouterr().out
    )
    assert_same_run(tmp_path / "run", undisturbed, "checkpoint_steps", "num_workers")


SAVING = """
import os, signal, sys, time
from pathlib import Path
import torch
from training.checkpoint import save_checkpoint
path = Path(sys.argv[1])
random = torch.Generator().manual_seed(0)
caught = 0
def checkpoint(number):
    return {"model": {"weight": torch.full((300_000,), float(number))}, "number": number}
save_checkpoint(path, checkpoint(0))
for kill in range(50):
    child = os.fork()
    if not child:
        for number in range(1, 10_000):
            save_checkpoint(path, checkpoint(number))
        os._exit(0)
    time.sleep(0.01 + 0.03 * torch.rand((), generator=random).item())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    caught += path.with_name(".checkpoint.pth.tmp").exists()
    saved = torch.load(path, weights_only=True)
    assert bool((saved["model"]["weight"] == saved["number"]).all())
print(caught)
"""


def test_a_complete_checkpoint_is_there_whenever_the_run_is_killed(tmp_path: Path) -> None:
    done = python("-c", SAVING, tmp_path / "checkpoint.pth")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10  # of 50 kills came while a file was being written


# ---- stopped by a signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM])
def test_a_signal_finishes_the_update_saves_and_ends_with_its_code(
    number: signal.Signals,
    tmp_path: Path,
    recipe: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = signal.signal(number, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_update", at_update(UPDATES + 1, lambda: signal.raise_signal(number)))
            assert call("--recipe", recipe, *RICH, "--output_dir", tmp_path) == 128 + number
    finally:
        signal.signal(number, usual)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"interrupted by {number.name} in epoch 2, after update 2 of 4; last checkpoint: {tmp_path}" in line
    assert place(tmp_path) == (1, 2)
    assert call("--resume", tmp_path / "checkpoint.pth") == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_signal_during_evaluation_loses_nothing_of_the_epoch(
    tmp_path: Path, recipe: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    evaluate = training.evaluation.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(training.evaluation, "evaluate", interrupted)
            assert call("--recipe", recipe, *RICH, "--output_dir", tmp_path) == 143
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert place(tmp_path) == (0, UPDATES)
    assert call("--resume", tmp_path / "checkpoint.pth") == 0
    assert_same_run(tmp_path, undisturbed)


ALL = (
    *("--repeated-aug", "--train-crop", "random-resized", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5),
    *("--mixup", 0.8, "--cutmix", 1, "--batch-size", 6, "--accum-steps", 2, "--clip-grad", 1, "--lr-noise", 0.2, 0.9),
    *("--drop", 0.1, "--drop-path", 0.2, "--model-ema", "--model-ema-decay", 0.9, "--device", "cpu", "--epochs", 3),
)
ALSO = {
    "cosub": ("--join-type", "LaPE", "--opt", "lamb", "--bce-loss", "--cosub", "--sched-on-updates"),
    "plateau": ("--pe", "learnable+rope_mixed", "--amp-dtype", "bfloat16", "--sched", "plateau", "--smoothing", 0.1),
    "distillation": (
        *("--distillation-type", "soft", "--distillation-tau", 2, "--cooldown-epochs", 1, "--opt", "sgd"),
        *("--model", "deit_tiny_distilled_patch16_224", "--teacher-model", "vit_compact_patch4_32", "--teacher-path"),
    ),
}


@pytest.mark.parametrize("kind", ALSO)
def test_with_all_options_on_a_run_stopped_in_mid_epoch_equals_one_that_was_not(
    kind: str, tmp_path: Path, recipe: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = (undisturbed / "checkpoint.pth",) if kind == "distillation" else ()
    flags = ("--recipe", recipe, *ALL, *ALSO[kind], *teacher)
    assert call(*flags, "--output_dir", tmp_path / "whole") == 0
    usual = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_update", at_update(UPDATES + 2, lambda: signal.raise_signal(signal.SIGTERM)))
            assert call(*flags, "--output_dir", tmp_path / "parts") == 143
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert place(tmp_path / "parts") == (1, 3)
    assert call("--resume", tmp_path / "parts" / "checkpoint.pth") == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ---- found again


def test_without_a_checkpoint_the_run_starts_afresh_and_says_so(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").write_text("")  # of a run that was killed before it saved
    flags = ("--recipe", recipe, "--epochs", 1, "--auto-resume", "--output_dir", tmp_path)
    assert call(*flags) == 0
    assert "finds no checkpoint in" in capsys.readouterr().out
    assert len(log_of(tmp_path)) == 1


def test_a_truncated_checkpoint_is_skipped_and_said(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--recipe", recipe, "--epochs", 2, "--auto-resume", "--output_dir", tmp_path)
    assert call(*flags) == 0
    best, last = tmp_path / "best_checkpoint.pth", tmp_path / "checkpoint.pth"
    last.write_bytes(last.read_bytes()[:1000])
    os.utime(best, (1, 1))
    assert call(*flags) == 0
    out = capsys.readouterr().out
    assert f"skips a checkpoint: {last} is damaged" in out
    assert f"continues from {best}" in out


@pytest.mark.parametrize(
    ("flags", "word"), [((), "--output_dir"), (("--output_dir", "x", "--resume", "y.pth"), "leave out --resume")]
)
def test_auto_resume_needs_a_folder_and_nothing_else(
    flags: tuple[str, ...], word: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--recipe", recipe, "--auto-resume", *flags) == 2
    assert word in capsys.readouterr().err


def test_processes_that_see_different_folders_are_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.setup.distributed, "gather_over_ranks", lambda place, *_: [place, [3, 0]])
    assert call("--recipe", recipe) == 2
    assert "the processes found different checkpoints" in capsys.readouterr().err


def test_a_changed_batch_size_in_mid_epoch_is_announced_and_goes_on_at_the_same_image(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_update", at_update(2, lambda: signal.raise_signal(signal.SIGTERM)))
            assert call("--recipe", recipe, "--output_dir", tmp_path) == 143
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert place(tmp_path) == (0, 3)
    assert call("--resume", tmp_path / "checkpoint.pth", "--batch-size", 6, "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert "--batch-size is now 6; it was 12" in out
    assert "--epochs is now 1; it was 2" in out
    assert "epoch 1 continues after update 6 of 8; it was after update 3 of 4" in out
    (row,) = log_of(tmp_path)
    assert row["train_loss"] == pytest.approx(1.2, abs=0.4)  # of three classes


# ---- numbers that are not finite


class Spoiling(nn.Module):
    """A loss that is not finite in some of its calls."""

    def __init__(self, criterion: nn.Module, bad: set[int]) -> None:
        super().__init__()
        self.criterion, self.bad, self.calls = criterion, bad, 0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return self.criterion(logits, targets) + (torch.inf if self.calls in self.bad else 0)  # of finite gradient


def spoil(bad: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    build = training.state.build_criterion
    monkeypatch.setattr(training.state, "build_criterion", lambda *args: Spoiling(build(*args), bad))


def test_an_update_whose_loss_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil({2, 5, 6}, monkeypatch)
    train("--recipe", recipe, "--max-bad-steps", 3, "--output_dir", tmp_path)
    rows = log_of(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [1, 2]
    assert all(row["train_loss"] == pytest.approx(1.2, abs=0.4) for row in rows)


def test_skipped_updates_leave_weights_and_averages_as_they_were(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tiny_run.set_up("--recipe", recipe).model.state_dict()
    spoil(set(range(100)), monkeypatch)
    run = train("--recipe", recipe, "--model-ema", "--max-bad-steps", 100)
    assert differences(dict(run.model.state_dict()), dict(start)) == []
    assert run.training is not None
    assert run.training.ema is not None
    assert differences(dict(run.training.ema.module.state_dict()), dict(start)) == []


def test_too_many_in_a_row_over_epochs_end_the_run_with_the_last_checkpoint_intact(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil({4, 5, 6}, monkeypatch)
    assert call("--recipe", recipe, "--max-bad-steps", 3, "--output_dir", tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("epoch 2: 3 updates in a row", "loss inf", "learning rate 0.0", "scale 1", "gradient norm "):
        assert part in line
    assert re.search(r"last checkpoint: \S+; continue with --resume", line)
    assert place(tmp_path) == (1, 0)


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run.set_up("--recipe", recipe, "--output_dir", tmp_path)
    assert run.training is not None
    main.save(run, run.training)
    saved = (tmp_path / "checkpoint.pth").read_bytes()
    with torch.no_grad():
        run.model.head.bias[0] = torch.nan  # type: ignore[union-attr, index, operator]
    assert "not finite" in main.save(run, run.training)
    assert (tmp_path / "checkpoint.pth").read_bytes() == saved


# ---- several processes

TOGETHER = """
import os, signal, sys
import pytest
import engine, main, test_resume
stop_at, *argv = sys.argv[1:]
if os.environ["RANK"] == "1":
    patch = pytest.MonkeyPatch()
    if "--resume" not in argv:
        test_resume.spoil({2}, patch)
    patch.setattr(engine, "_update", test_resume.at_update(int(stop_at), lambda: signal.raise_signal(signal.SIGTERM)))
sys.exit(main.main(argv))
"""


def test_what_happens_to_one_process_skips_and_stops_all_and_the_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, recipe: Path
) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "together.py")
    flags = ("--recipe", recipe, *RICH, "--epochs", 2, "--batch-size", 6)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = python(*launcher, 99, *flags, "--output_dir", whole)
    assert done.returncode == 0, done.stderr
    assert [row["skipped_steps"] for row in log_of(whole)] == [1, 0]

    stopped = python(*launcher, UPDATES + 1, *flags, "--num-workers", 1, "--output_dir", parts)
    assert "main.py: interrupted by SIGTERM in epoch 2, after update 3 of 4; last checkpoint" in stopped.stderr
    assert place(parts) == (1, 3)
    done = python(*launcher, 99, "--resume", parts / "checkpoint.pth")
    assert done.returncode == 0, done.stderr
    assert_same_run(parts, whole, "num_workers")


# ---- accumulation


def test_two_accumulated_batches_equal_one_of_twice_the_size(tmp_path: Path, recipe: Path) -> None:
    flags = ("--recipe", recipe, "--reprob", 0.5, "--no-unscale-lr", "--lr", 5, "--opt", "sgd", "--clip-grad", 1)
    sizes = {"large": ("--batch-size", 12), "small": ("--batch-size", 6, "--accum-steps", 2)}
    weights = {}
    for name, of_batch in sizes.items():
        run = tiny_run.set_up(*flags, *of_batch, "--output_dir", tmp_path / name)
        assert run.training is not None
        start = {key: weight.clone() for key, weight in run.model.state_dict().items()}
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert main.train(run, run.training) == 0
        weights[name] = run.model.state_dict()
    large, small = weights.values()
    assert max((large[key] - start[key]).abs().max().item() for key in large) > 1e-3
    assert max((large[key] - small[key]).abs().max().item() for key in large) < 1e-5
    for one, other in zip(log_of(tmp_path / "large"), log_of(tmp_path / "small"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert one["train_lr"] == other["train_lr"]


# ---- no space


def test_a_file_that_cannot_be_written_leaves_the_old_checkpoint_and_is_told(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk() -> None:  # or what is like it, and needs no privilege
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))

    monkeypatch.setattr(engine, "_update", at_update(UPDATES + 1, fill_disk))
    try:
        assert call("--recipe", recipe, "--output_dir", tmp_path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be saved, and the one before stays" in line
    assert "File too large" in line
    assert f"continue with --resume {tmp_path / 'checkpoint.pth'}" in line
    assert place(tmp_path) == (1, 0)
    assert not list(tmp_path.glob(".*.tmp"))


# ---- unreadable images


def test_an_unreadable_image_ends_training_by_name_or_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_run.make_images(tmp_path / "images", num_train=8, num_val=3)
    (tmp_path / "tiny.yaml").write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    bad = sorted((data / "train").rglob("*.png"))[5]
    bad.write_text("no image")
    flags = ("--recipe", tmp_path / "tiny.yaml", "--epochs", 1, "--num-workers", 1)
    assert call(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{bad} cannot be read as an image" in line
    assert "--skip-bad-images" in line
    assert call(*flags, "--skip-bad-images", "--output_dir", tmp_path / "run") == 0
    assert log_of(tmp_path / "run")[0]["skipped_images"] == 1
