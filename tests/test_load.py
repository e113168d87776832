"""``lape_vit.load`` and ``lape_vit.describe``: every kind of checkpoint, as a file and as a folder of the Hub."""

import argparse
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from test_golden import INDEX, KNOWN, arrays, original_state
from timm.data import resolve_data_config
from torch import nn

import lape_vit
from lape_vit import encodings
from tests.models import COMPACT, DEIT, DISTILLED, assert_equal, create, disturb
from training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PREPARATION: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
CLASSES = ["cat", "dog", "emu", "fox", "gnu"]
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3}


# ---- the originals'


def original(name: str, path: Path) -> dict[str, Any]:
    """Write a golden model as its own code does; returns what that file does not say of it."""
    entry, state = INDEX[name], original_state(name)
    norm_layer = partial(nn.LayerNorm, eps=entry["norm_eps"])
    options = {option: entry[option] for option in encodings.resolve(entry["pe"]).options().keys() & entry.keys()}
    if entry["source"] == "LaPE":
        same = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
        args = argparse.Namespace(
            model=DISTILLED if entry.get("distilled") else DEIT,
            pe=entry["pe"],
            join_type=entry["join_type"],
            nb_classes=1000,  # its default, whatever the data has
            input_size=entry["img_size"],
        )
        torch.save({"model": state, "epoch": 299, "args": args}, path)
        return {**{argument: entry[argument] for argument in same}, "norm_layer": norm_layer, **options}
    torch.save(state, path)
    sizes = {"depth": "n_layers", "num_heads": "n_attention_heads", "mlp_ratio": "forward_mul"}
    sizes |= {"img_size": "image_size", "patch_size": "patch_size", "embed_dim": "embed_dim"}
    arguments = {ours: entry[theirs] for ours, theirs in sizes.items()}
    return {"model_name": COMPACT, "pe": entry["pe"], **arguments, "norm_layer": norm_layer, **options}


@pytest.mark.parametrize("name", KNOWN)
def test_an_originals_checkpoint_gives_its_logits(name: str, tmp_path: Path) -> None:
    arguments = original(name, tmp_path / "best_checkpoint.pth")
    model = lape_vit.load(tmp_path / "best_checkpoint.pth", **arguments)
    golden = arrays(name)
    with torch.no_grad():
        logits = model(golden["input"].float())
    torch.testing.assert_close(logits, golden["logits"].float(), rtol=1e-4, atol=1e-4)
    again = timm.create_model(**lape_vit.describe(tmp_path / "best_checkpoint.pth", **arguments))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


# ---- ours


@pytest.fixture(params=[("learnable", "LaPE"), ("learnable+rope_mixed", "basic")], ids="+".join)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, Any]:
    """A file of this project, its model, and the average of that."""
    pe, join_type = request.param
    options: dict[str, Any] = {"rope_theta": 20.0} if "rope" in pe else {}
    build = partial(timm.create_model, COMPACT, pe=pe, join_type=join_type, num_classes=5, img_size=(40, 56), **SMALL)
    model, average = (disturb(build(**options), seed).eval() for seed in (0, 1))
    description = {
        "model": COMPACT,
        "pe": pe,
        "join_type": join_type,
        **options,
        "model_kwargs": SMALL,
        "num_classes": 5,
        "classes": CLASSES,
        "input_size": [40, 56],
        "data_set": "FOLDER",
        **PREPARATION,
        "eval_crop_ratio": 0.8,
        "crop_mode": "center",
    }
    weights = {"model": model.state_dict(), "model_ema": average.state_dict()}
    save_checkpoint(tmp_path / "checkpoint.pth", {**weights, "description": description})
    return tmp_path / "checkpoint.pth", model, average


def assert_same(loaded: Any, model: Any) -> None:
    assert (loaded.pe, loaded.join_type) == (model.pe, model.join_type)
    assert_equal(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not loaded.training
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in
              resolve_data_config(model=loaded).items()}  # fmt: skip
    assert config == {**PREPARATION, "input_size": [3, 40, 56], "crop_pct": 0.8, "crop_mode": "center"}
    assert list(loaded.pretrained_cfg["label_names"]) == CLASSES


def test_a_checkpoint_of_ours_gives_model_images_and_classes(saved: tuple[Path, Any, Any]) -> None:
    path, model, average = saved
    assert_same(lape_vit.load(path), model)
    assert_same(lape_vit.load(str(path), use_ema=True), average)


def test_timm_builds_the_model_that_a_checkpoint_describes(saved: tuple[Path, Any, Any]) -> None:
    path, model, _ = saved
    built = timm.create_model(**lape_vit.describe(path)).eval()
    built.load_state_dict(model.state_dict())
    images = torch.ones(1, 3, 40, 56)
    assert_equal(built(images), model(images))


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_for_the_hub_gives_the_same_model_again(
    safe: bool, saved: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    path, model, _ = saved
    timm.models.save_for_hf(lape_vit.load(path), tmp_path / "hub", safe_serialization=safe)
    loaded = lape_vit.load(tmp_path / "hub")
    assert_same(loaded, model)
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval(), model)
    timm.models.save_for_hf(loaded, tmp_path / "again")
    assert_same(lape_vit.load(tmp_path / "again"), model)


# ---- timm's


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_any_model_of_timms_is_loaded_from_a_folder_and_from_a_file(name: str, tmp_path: Path) -> None:
    model = disturb(timm.create_model(name, num_classes=3)).eval()
    timm.models.save_for_hf(model, tmp_path / "hub", model_config={"label_names": ["a", "b", "c"]})
    torch.save(model.state_dict(), tmp_path / "file.pth")
    args = argparse.Namespace(model=name, model_kwargs={})
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "run.pth.tar")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "file.safetensors")
    images = torch.randn(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    for loaded in (
        lape_vit.load(tmp_path / "hub"),
        lape_vit.load(tmp_path / "file.pth", name),
        lape_vit.load(tmp_path / "run.pth.tar"),
        lape_vit.load(tmp_path / "file.safetensors", model_name=name),
    ):
        torch.testing.assert_close(loaded(images), model(images))
        assert resolve_data_config(model=loaded) == resolve_data_config(model=model)
    assert list(lape_vit.load(tmp_path / "hub").pretrained_cfg["label_names"]) == ["a", "b", "c"]


def test_the_library_alone_loads_and_registers_nothing_before(saved: tuple[Path, Any, Any]) -> None:
    code = (
        "import lape_vit, timm, sys\n"
        "assert timm.list_models(module='models_lape') == [] and 'matplotlib' not in sys.modules\n"
        f"print(lape_vit.load({str(saved[0])!r}).pe)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == saved[1].pe, run.stderr


# ---- the page


def test_what_the_page_shows_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    model = timm.create_model(COMPACT, pe="learnable", join_type="LaPE", num_classes=2, img_size=16, **SMALL)
    description = {"model": COMPACT, "pe": "learnable", "join_type": "LaPE", "model_kwargs": SMALL, "num_classes": 2}
    description |= {"classes": ["cat", "dog"], "input_size": 16}
    save_checkpoint(Path("runs/photos/best_checkpoint.pth"), {"model": model.state_dict(), "description": description})
    torch.save(timm.create_model(DEIT, pe="learnable", join_type="LaPE").state_dict(), "original.pth")
    monkeypatch.setattr(
        timm.models, "push_to_hf_hub", lambda model, to: timm.models.save_for_hf(model, Path("hub") / to)
    )
    Image.new("RGB", (20, 30), "orange").save("cat.jpg")
    page = (ROOT / "docs" / "python.md").read_text().replace("hf-hub:", "local-dir:hub/")
    shown: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, shown)
    assert (shown["model"].pe, shown["model"].join_type, shown["names"]) == ("learnable", "LaPE", ("cat", "dog"))
    assert_equal(dict(lape_vit.load("hub/you/photos").state_dict()), dict(model.state_dict()))


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, r"file.pth does not say what model it holds: give model_name$"),
        ({"model_name": "no_such"}, "unknown model_name 'no_such'"),
        ({"model_name": DEIT, "img_size": 32}, "file.pth does not fit deit_tiny_patch16_224 "),
        ({"model_name": "resnet18", "pe": "none"}, "pe: for models of models_lape; resnet18 is timm's own"),
        ({"model_name": DEIT, "depht": 2}, "cannot be built with .*depht"),
        ({"model_name": DEIT, "use_ema": True}, "file.pth holds no averaged weights: leave use_ema out"),
        ({"model_name": DEIT, "pretrained": True}, "pretrained: leave it out"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    torch.save(create("none").state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=told) as error:
        lape_vit.load(tmp_path / "file.pth", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"pe": "2D_sin"}, "pe 2D_sin contradicts .*, which has learnable"),
        ({"img_size": 40}, r"img_size \(40, 40\) contradicts .*, which has \(40, 56\)"),
        ({"depth": 3}, "depth 3 contradicts .*, which has 2"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    arguments: dict[str, Any], told: str, saved: tuple[Path, Any, Any]
) -> None:
    with pytest.raises(ValueError, match=told):
        lape_vit.load(saved[0], **arguments)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "is a folder without config.json"),
        ({"config.json": "{"}, "is a folder without config.json and model.safetensors"),
        ({"config.json": "{", "pytorch_model.bin": ""}, "config.json is damaged, or not timm's"),
        ({"config.json": json.dumps({"model_type": "bert"}), "pytorch_model.bin": ""}, "KeyError: 'architecture'"),
        ({"config.json": json.dumps({"architecture": DEIT}), "pytorch_model.bin": ""}, "bin is damaged"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(files: dict[str, str], told: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        lape_vit.load(tmp_path)
