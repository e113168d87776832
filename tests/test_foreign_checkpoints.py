"""Checkpoint files as other code bases write them, for each option that reads one."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import tiny_run
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tiny_run import call, set_up
from torch import Tensor

import lape_vit
import training.models
from figures.checkpoints import load_model
from lape_vit.checkpoints import description_of
from tests.models import COMPACT, disturb
from training.checkpoint import load_checkpoint
from training.options import Options

PAIR = {"pe": "learnable", "join_type": "LaPE"}
SIZE = (16, 24)
TIMMS = {"model": COMPACT, "num_classes": 3, "mean": None, "std": None, "interpolation": "", "crop_pct": None}


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(COMPACT, num_classes=3, img_size=SIZE, **PAIR)
    return dict(disturb(model, seed).state_dict())


def of_timm(**args: Any) -> dict[str, Any]:
    """What timm's `train.py --model-kwargs pe=learnable join_type=LaPE` saves, with more of its options."""
    content = {"epoch": 3, "arch": "VisionTransformer", "state_dict": weights(0), "state_dict_ema": weights(1)}
    return {**content, "args": argparse.Namespace(**TIMMS | {"model_kwargs": PAIR} | args), "version": 2}


FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "input_size": lambda: of_timm(input_size=[3, *SIZE], img_size=None),
    "img_size": lambda: of_timm(input_size=None, model_kwargs={**PAIR, "img_size": list(SIZE)}),
    "tag": lambda: of_timm(input_size=[3, *SIZE], model=f"{COMPACT}.some_tag"),
    "state_dict": lambda: {"state_dict": weights(0)},
    "bare": lambda: weights(0),
    "compiled": lambda: {"model": {f"_orig_mod.module.{name}": value for name, value in weights(0).items()}},
    "average": lambda: {"model_ema": weights(0)},
    "timm's average": lambda: {"state_dict_ema": weights(0)},
    "safetensors": lambda: weights(0),
}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    data = tiny_run.make_images(folder / "images")
    text = tiny_run.RECIPE.replace("input-size: 16", "input-size: 16,24")
    (folder / "tiny.yaml").write_text(text + f"data-path: {data}\n")
    return folder / "tiny.yaml"


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    content = FILES[request.param]()
    if request.param == "safetensors":
        safetensors.torch.save_file(content, tmp_path / "file.safetensors")
        return tmp_path / "file.safetensors"
    torch.save(content, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def by_flags(path: Path) -> tuple[object, ...]:
    """What a file does not say has to be given."""
    description = description_of(load_checkpoint(str(path)))
    flags = {
        "model": ("--model", COMPACT),
        "join_type": ("--join-type", "LaPE"),
        "input_size": ("--input-size", "16,24"),
    }
    return tuple(token for name, pair in flags.items() if name not in description for token in pair)


def assert_holds(model: Any, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert model.patch_embed.img_size == SIZE


def test_it_is_evaluated(file: Path, recipe: Path) -> None:
    run = set_up("--eval", "--resume", file, "--recipe", recipe, *by_flags(file))
    assert_holds(run.model, weights(0))


def test_a_run_starts_from_it(file: Path, recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = set_up("--finetune", file, "--recipe", recipe, *by_flags(file))
    assert_holds(run.model, weights(0))
    assert not [record for record in caplog.messages if "is taken for" in record or "left out" in record]


def test_it_teaches(file: Path) -> None:
    described = "input_size" in description_of(load_checkpoint(str(file)))
    options = Options.of({"teacher_model": COMPACT, "teacher_path": str(file), "input_size": list(SIZE)})
    if described:
        assert_holds(training.models.build_teacher(options, [*"abc"]), weights(0))
    else:  # there is no flag for what such a file does not say
        with pytest.raises(ValueError, match=f"--teacher-path .* does not fit {COMPACT}"):
            training.models.build_teacher(options, [*"abc"])


def test_it_is_drawn(file: Path) -> None:
    flags = {"model": COMPACT, "input_size": SIZE, **PAIR}
    assert_holds(load_model(str(file), flags)[0], weights(0))


def test_the_average_of_timms_training_is_evaluated(tmp_path: Path, recipe: Path) -> None:
    torch.save(of_timm(input_size=[3, *SIZE]), tmp_path / "file.pth")
    run = set_up("--eval", "--eval-ema", "--resume", tmp_path / "file.pth", "--recipe", recipe)
    assert_holds(run.model, weights(1))


def test_timms_options_say_how_the_images_are_prepared_for_evaluation(tmp_path: Path) -> None:
    said = {"interpolation": "bilinear", "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save(of_timm(input_size=[3, *SIZE], num_classes=10, **said) | {"state_dict": digits()}, tmp_path / "file.pth")
    flags = ("--eval", "--resume", tmp_path / "file.pth", "--data-set", "DIGITS")
    run = set_up(*flags)
    assert (run.options.data.interpolation, run.options.data.eval_crop_ratio) == ("bilinear", 0.8)
    assert (run.description["mean"], run.description["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert set_up(*flags, "--interpolation", "bicubic").options.data.interpolation == "bicubic"


def digits() -> dict[str, Tensor]:
    """Weights of a model of ten classes."""
    return {name: torch.zeros(10, *value.shape[1:]) if "head" in name else value for name, value in weights(0).items()}


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema"])
def test_a_file_with_nothing_but_an_average_says_so(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({name: weights(0)}, tmp_path / "file.pth")
    with caplog.at_level(logging.INFO):
        load_checkpoint(str(tmp_path / "file.pth"))
    assert f"{tmp_path / 'file.pth'} holds no weights but their running average, which is taken" in caplog.messages


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"input_size": [3, 32, 32]}, {"input_size": 32}),
        ({"img_size": 32}, {"input_size": 32}),
        ({"img_size": 64, "input_size": [3, 32, 48]}, {"input_size": [32, 48]}),
        ({"input_size": 224, "nb_classes": 5}, {"input_size": 224, "num_classes": 5}),  # DeiT's and LaPE's
        ({"mean": [0.1, 0.2, 0.3], "crop_pct": 0.9}, {"mean": [0.1, 0.2, 0.3], "eval_crop_ratio": 0.9}),
        ({"interpolation": "bilinear"}, {"interpolation": "bilinear"}),
        ({"interpolation": "random", "mean": None, "num_classes": None}, {}),
        ({"input_size": "three", "args": 5}, {}),
        ({"model": "resnet50.a1_in1k"}, {"model": "resnet50"}),
        (
            {"model_kwargs": {"pe": "rope", "rope_theta": 9, "img_size": 8}},
            {"pe": "rope", "rope_theta": 9, "input_size": 8, "model_kwargs": {"rope_theta": 9}},
        ),
    ],
)
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_what_options_say_of_a_model(args: dict[str, Any], expected: dict[str, Any], kind: Callable[..., Any]) -> None:
    assert description_of({"model": {}, "args": kind(**args)}) == expected


def test_a_model_of_timms_that_was_trained_compiled_is_drawn_and_teaches(tmp_path: Path) -> None:
    name = "test_vit"
    model = timm.create_model(name, num_classes=3, img_size=(32, 48))
    wrapped = {f"_orig_mod.{key}": value for key, value in model.state_dict().items()}
    args = argparse.Namespace(model=name, img_size=None, input_size=[3, 32, 48])
    torch.save({"state_dict": wrapped, "args": args}, tmp_path / "file.pth")
    drawn, _ = load_model(str(tmp_path / "file.pth"), {})
    teacher = {"teacher_model": name, "teacher_path": str(tmp_path / "file.pth"), "input_size": [32, 48]}
    for loaded in (drawn, training.models.build_teacher(Options.of(teacher), [*"abc"])):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_dinov2_with_registers_is_fine_tuned(tmp_path: Path, recipe: Path) -> None:
    state = weights(0)
    width = state["cls_token"].shape[2]
    table = torch.randn(1, 1 + 24, width)
    tokens = {"mask_token": torch.zeros(1, width), "register_tokens": torch.zeros(1, 4, width), "pos_embed": table}
    torch.save({**state, **tokens}, tmp_path / "file.pth")
    run = set_up("--finetune", tmp_path / "file.pth", "--recipe", recipe, "--join-type", "LaPE")
    assert torch.equal(run.model.pos_embed, table[:, 1:])
    assert torch.equal(run.model.cls_token, state["cls_token"] + table[:, :1])


def test_what_timm_cannot_read_is_refused_in_one_line(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"mask_token": torch.zeros(1), "register_tokens": torch.zeros(1)}, tmp_path / "file.pth")
    assert call("--finetune", tmp_path / "file.pth", "--recipe", recipe) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--finetune {tmp_path / 'file.pth'}: timm cannot read the checkpoint (KeyError: 'cls_token')" in line


# ---- what a model says of its images


def test_a_model_of_a_checkpoint_says_how_its_images_are_prepared(tmp_path: Path) -> None:
    flags = ("--data-set", "DIGITS", "--interpolation", "bilinear", "--eval-crop-ratio", 0.75, "--input-size", "16,24")
    run = set_up(*flags, "--model", COMPACT, "--join-type", "LaPE")
    content = {"format": "lape-vit", "version": 1, "model": run.model.state_dict(), "description": run.description}
    torch.save(content, tmp_path / "file.pth")
    drawn, _ = load_model(str(tmp_path / "file.pth"), {})
    evaluated = set_up("--eval", "--resume", tmp_path / "file.pth", *flags[:6]).model
    timm.models.save_for_hf(drawn, tmp_path / "hub")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert_holds(loaded, dict(drawn.state_dict()))
    for model in (run.model, drawn, evaluated, loaded):
        assert prepared(model) == {
            "mean": run.description["mean"],
            "std": run.description["std"],
            "input_size": [3, *SIZE],
            "interpolation": "bilinear",
            "crop_pct": 1.0,  # evaluation takes them whole
            "crop_mode": "squash",
        }
        assert model.pretrained_cfg["num_classes"] == 10
        assert list(model.pretrained_cfg["label_names"]) == run.description["classes"]


@pytest.mark.parametrize("size", ["48", "48,72", "16"])
def test_timm_prepares_an_image_for_a_loaded_model_as_evaluation_does(size: str, tmp_path: Path, recipe: Path) -> None:
    flags = ("--recipe", recipe, "--model", COMPACT, "--eval-crop-ratio", 0.75, "--input-size", size)
    run = set_up(*flags)
    content = {"format": "lape-vit", "version": 1, "model": run.model.state_dict(), "description": run.description}
    torch.save(content, tmp_path / "file.pth")
    transform = create_transform(**resolve_data_config(model=lape_vit.load(tmp_path / "file.pth")))
    images, _ = next(iter(run.test_loader))
    files = sorted((Path(run.options.data.data_path) / "val").rglob("*.png"))
    for image, path in zip(images, files, strict=False):
        with Image.open(path) as picture:
            assert torch.equal(transform(picture.convert("RGB")), image)


def prepared(model: Any) -> dict[str, Any]:
    """What timm says of a model's images, with lists for tuples, as JSON has them."""
    config = resolve_data_config(model=model)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
