"""Own photos: which recipe a folder gets, from which weights it starts, and that it learns."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_model_options import OF_SMALL, published  # noqa: F401  (a fixture)
from tiny_run import call, log_of, set_up

import datasets
from loading.folders import has_fewer_images

DEIT = "deit_tiny_patch16_224"


COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of a colour each, 40 per class to train and 20 to test."""
    return make_photos(tmp_path_factory.mktemp("photos"), COLOURS)


def make_photos(folder: Path, classes: Mapping[str, tuple[int, int, int]]) -> Path:
    generator = np.random.default_rng(0)
    for name, colour in classes.items():
        for index in range(60):
            pixels = np.add(colour, generator.normal(0, 50, (20, 24, 3))) + generator.normal(0, 40)
            path = folder / ("train" if index < 40 else "val") / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def test_a_folder_is_small_by_its_images_to_train(photos: Path, tmp_path: Path) -> None:
    assert not has_fewer_images(str(photos), 120)
    assert has_fewer_images(str(photos), 121)
    (photos / "train" / "red" / "notes.txt").touch()
    assert has_fewer_images(str(photos), 121)
    assert has_fewer_images(str(tmp_path), 1)


@pytest.mark.parametrize(
    ("name", "few", "recipe"), [("FOLDER", 121, "finetune"), ("FOLDER", 120, "deit"), ("IMNET", 121, "deit")]
)
def test_the_default_recipe_of_a_folder_depends_on_its_size(
    name: str, few: int, recipe: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "FEW", few)
    flags = ("--data-set", name, "--data-path", photos, "--pretrained", "none", "--input-size", 32)
    assert set_up(*flags, "--batch-size", 8).options.run.recipe == recipe


def test_every_photo_is_shown_once_an_epoch_and_nothing_keeps_the_first_weights(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run = set_up("--data-set", "FOLDER", "--data-path", photos, "--pretrained", "none", "--input-size", 32)
    assert run.training is not None
    assert run.training.ema is None
    assert run.training.updates == 120 // run.options.data.batch_size
    assert not run.options.augmentation.repeated_aug
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    told = "fewer than 100,000 images to train: recipe finetune, from random weights; --recipe deit is for more"
    assert caplog.messages.count(told) == 1


@pytest.mark.parametrize("flags", [(), ("--model", DEIT), ("--model", f"{DEIT}.fb_in1k")])
def test_it_starts_from_timms_weights(
    flags: tuple[str, ...],
    published: dict[str, torch.Tensor],  # noqa: F811
    photos: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        run = set_up("--data-set", "FOLDER", "--data-path", photos, *flags, *OF_SMALL)
    assert torch.equal(run.model.blocks[0].attn.qkv.weight, published["blocks.0.attn.qkv.weight"])
    assert any(f"recipe finetune, from timm's weights of {DEIT}, a download" in line for line in caplog.messages)


def test_a_model_without_published_weights_starts_from_random_ones(photos: Path) -> None:
    run = set_up("--data-set", "FOLDER", "--data-path", photos, "--model", "vit_compact_patch4_32")
    assert run.options.run.pretrained is None


def test_a_checkpoint_takes_the_place_of_timms_weights(photos: Path, tmp_path: Path) -> None:
    torch.save({"model": timm.create_model("vit_compact_patch4_32").state_dict()}, tmp_path / "file.pth")
    flags = ("--finetune", tmp_path / "file.pth", "--model", "vit_compact_patch4_32")
    run = set_up("--data-set", "FOLDER", "--data-path", photos, *flags)
    assert (run.options.run.recipe, run.options.run.pretrained) == ("finetune", None)
    assert set_up("--data-set", "FOLDER", "--data-path", photos, *flags, "--pretrained", "none").options == run.options


def test_the_weights_that_cannot_be_had_end_in_one_line_that_tells_what_to_do(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert call("--data-set", "FOLDER", "--data-path", photos) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--pretrained {DEIT}: the weights of timm's cannot be loaded" in line
    assert line.endswith("--pretrained none starts from random weights")


def test_the_learning_rate_follows_the_batch(photos: Path) -> None:
    flags = ("--data-set", "FOLDER", "--data-path", photos, "--pretrained", "none", "--input-size", 32)
    rates = [highest(set_up(*flags, *more)) for more in ((), ("--batch-size", 32))]
    assert rates == pytest.approx([2.5e-4, 5e-4])


def highest(run: Any) -> float:
    return run.training.optimizer.param_groups[0]["initial_lr"]


def test_the_recipe_learns_other_classes_from_weights_that_know_colours(photos: Path, tmp_path: Path) -> None:
    others = {"orange": (200, 130, 60), "violet": (130, 60, 200), "teal": (60, 170, 150), "rose": (200, 60, 130)}
    before = make_photos(tmp_path / "before", others)
    model = ("--model", "vit_compact_patch4_32", "--model-kwargs", "depth=2", "--input-size", 16, "--num-workers", 0)
    first = ("--data-path", before, "--lr", 0.1, "--epochs", 5, "--output_dir", tmp_path / "first")
    assert call("--data-set", "FOLDER", *first, *model) == 0
    start = ("--finetune", tmp_path / "first" / "checkpoint.pth", "--num-workers", 0, "--epochs", 8)
    assert call("--data-set", "FOLDER", "--data-path", photos, *start, "--output_dir", tmp_path / "own") == 0
    assert log_of(tmp_path / "own")[-1]["test_acc1"] > 80
