"""Arguments of the model on the command line, published weights, and LaPE's own schedule."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_run import call, load, log_of, set_up
from torch import Tensor, nn
from torch.optim import SGD

import models_lape  # noqa: F401  (registers the models)
from figures.checkpoints import load_model
from tests.models import leave_as_downloaded
from training.models import build_published_teacher
from training.optimisation import build_scheduler, epoch_of_schedule
from training.options import OptimisationOptions, config_text, saved_options

DIGITS = ("--data-set", "DIGITS", "--batch-size", 256, "--epochs", 1, "--warmup-epochs", 0, "--device", "cpu")
TINY = {"depth": 1, "embed_dim": 24, "num_heads": 3, "class_token": False, "fc_norm": False}
MEAN_OF_PATCHES = ("--global-pool", "avg", "--model-kwargs", *(f"{name}={value}" for name, value in TINY.items()))
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
OF_SMALL = ("--model-kwargs", *(f"{name}={value}" for name, value in SMALL.items()), "--input-size", 16)
DEIT = "deit_tiny_patch16_224"


# ---- arguments of the model


@pytest.mark.parametrize("join_type", ["PVG", "MPVG", "LaPE"])
def test_a_model_without_class_token_is_trained_evaluated_resumed_and_drawn(join_type: str, tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint.pth"
    model = ("--model", "vit_compact_patch4_32", "--join-type", join_type)
    assert call(*DIGITS, *model, *MEAN_OF_PATCHES, "--output_dir", run) == 0
    description = load(checkpoint)["description"]
    assert description["global_pool"] == "avg"
    assert description["model_kwargs"] == TINY
    assert set_up("--eval", "--resume", checkpoint).model.cls_token is None
    assert call("--resume", checkpoint, "--epochs", 2) == 0
    assert len(log_of(run)) == 2
    assert load_model(str(checkpoint), {})[0].global_pool == "avg"


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose model has arguments; to be left as it is."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert call(*DIGITS, *MEAN_OF_PATCHES, "--model-kwargs", "init_values=1e-3", "--output_dir", run) == 0
    return run


def test_the_saved_configuration_has_the_arguments(averaged: Path) -> None:
    again = set_up("--recipe", averaged / "config.yaml").options.model
    assert again.global_pool == "avg"
    assert again.model_kwargs == {**TINY, "init_values": 1e-3}
    other = set_up("--recipe", averaged / "config.yaml", "--model", "vit_lite_7_patch4_32").options.model
    assert other.model_kwargs is None  # they are of the model that the recipe names


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--global-pool", "token"), "--global-pool token contradicts"),
        (("--model-kwargs", "class_token=True"), "contradicts"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    flags: tuple[str, ...], told: str, averaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--eval", "--resume", averaged / "checkpoint.pth", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_arguments_of_timms_training_that_are_options_here_come_as_such(tmp_path: Path) -> None:
    model = timm.create_model(DEIT, img_size=16, num_classes=10, pe="rope_axial", rope_theta=9.0, **SMALL)
    arguments = {**SMALL, "pe": "rope_axial", "rope_theta": 9.0, "drop_path_rate": 0.1}
    args = argparse.Namespace(model=DEIT, img_size=16, model_kwargs=arguments)
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "timm.pth")
    options = set_up(*DIGITS, "--finetune", tmp_path / "timm.pth").options
    assert options.model.model_kwargs == SMALL
    assert options.model.encoding["rope_theta"] == 9.0
    recipe = tmp_path / "config.yaml"
    recipe.write_text(config_text(saved_options(options), "main.py"))
    assert set_up("--recipe", recipe).options.by_name() == {**options.by_name(), "recipe": str(recipe)}


# ---- published weights


def small(num_classes: int = 1000) -> Any:
    torch.manual_seed(7)
    return timm.create_model(DEIT, img_size=16, num_classes=num_classes, **SMALL)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights of a tiny model where timm's download would leave those of DeiT-Ti."""
    state = {name: value.clone() for name, value in small().state_dict().items()}
    leave_as_downloaded(f"{DEIT}.fb_in1k", state, tmp_path / "hub", monkeypatch)
    return state


@pytest.mark.parametrize(
    "flags", [("--model", DEIT, "--pretrained"), ("--model", DEIT, "--pretrained", "fb_in1k"),
              ("--model", f"{DEIT}.fb_in1k", "--pretrained")]
)  # fmt: skip
def test_a_run_starts_from_published_weights(flags: tuple[str, ...], published: dict[str, Tensor]) -> None:
    weights = set_up(*DIGITS, *flags, *OF_SMALL).model.state_dict()
    heads = {"head.weight", "head.bias"}  # for ten classes in place of a thousand
    assert weights.keys() == published.keys()
    different = {name for name, value in weights.items() if not torch.equal(value, published.get(name, value))}
    assert {name for name in weights if weights[name].shape != published[name].shape} == heads
    assert different <= heads


def test_published_weights_start_another_encoding_too(published: dict[str, Tensor]) -> None:
    model = set_up(*DIGITS, "--model", DEIT, "--pretrained", "--pe", "rope_mixed", *OF_SMALL).model
    assert model.pe == "rope_mixed"
    assert torch.equal(model.blocks[0].attn.qkv.weight, published["blocks.0.attn.qkv.weight"])


def test_a_resumed_run_does_not_start_from_them_again(published: dict[str, Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(*DIGITS, "--model", DEIT, "--pretrained", *OF_SMALL, "--output_dir", run) == 0
    trained = load(run / "checkpoint.pth")["model"]
    model = set_up("--resume", run / "checkpoint.pth", "--epochs", 2).model
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_published_weights_of_other_classes_are_not_evaluated(
    published: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*DIGITS, "--model", DEIT, "--pretrained", "--eval", *OF_SMALL) == 2
    assert "DIGITS has 10 classes, but the published weights 1000" in capsys.readouterr().err


def test_weights_that_cannot_be_loaded_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_as_downloaded("nothing", {}, tmp_path, monkeypatch)
    assert call(*DIGITS, "--model", DEIT, "--pretrained", *OF_SMALL) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--pretrained {DEIT}: the weights of timm's cannot be loaded" in line


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), f"--teacher-model {DEIT}.fb_in1k is for 1000 classes, and the data has 10"),
        (("--teacher-model", f"{DEIT}.no_such"), "its tags of deit_tiny_patch16_224: fb_in1k"),
        (("--teacher-model", DEIT), "--teacher-path FILE"),
    ],
)
def test_a_teacher_by_its_tag_that_cannot_teach_is_refused(
    flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled = ("--model", "deit_tiny_distilled_patch16_224", *OF_SMALL, "--distillation-type", "hard")
    assert call(*DIGITS, *distilled, "--teacher-model", f"{DEIT}.fb_in1k", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_teacher_by_its_tag_has_the_published_weights(
    published: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, img_size=16, **SMALL))
    teacher = build_published_teacher(DEIT, "fb_in1k", 1000)
    assert all(torch.equal(value, published[name]) for name, value in teacher.state_dict().items())


# ---- LaPE's schedule


def test_one_epoch_late_is_the_loop_of_deit() -> None:
    late = OptimisationOptions(epochs=8, warmup_epochs=3, sched_one_epoch_late=True)

    def schedule() -> tuple[SGD, Any]:
        optimizer = SGD([nn.Parameter(torch.zeros(()))], 0.1)
        return optimizer, build_scheduler(late, optimizer, 5, 0)

    optimizer, scheduler = schedule()
    theirs = []
    for epoch in range(8):  # they train an epoch, and only then step the schedule to its number
        theirs.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    optimizer, scheduler = schedule()
    ours = []
    for epoch in range(8):
        scheduler.step(epoch_of_schedule(late, epoch))
        ours.append(optimizer.param_groups[0]["lr"])
    assert ours == theirs
    assert ours[0] == ours[1] < ours[2]


def test_the_log_of_a_late_run_has_its_rates_one_epoch_later(tmp_path: Path) -> None:
    rates = {}
    for name, flags in (("on time", ()), ("late", ("--sched-one-epoch-late",))):
        folder = tmp_path / name
        changed = ("--model", "vit_compact_patch4_32", *MEAN_OF_PATCHES, "--epochs", 3)
        assert call(*DIGITS, *changed, "--no-sched-on-updates", *flags, "--output_dir", folder) == 0
        rates[name] = [row["train_lr"] for row in log_of(folder)]
    assert rates["late"] == [rates["on time"][0], *rates["on time"][:2]]
