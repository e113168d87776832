"""The command line that predicts and exports: what it prints, what it writes, and how bad input is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import tiny_run
import torch
from PIL import Image
from tiny_run import call
from torch import nn

import lape_vit
import lape_vit.export
import predict
from lape_vit.images import image_transform
from tests.models import COMPACT, create
from training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with its average; to be left as it is."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(tiny_run.RECIPE + f"data-path: {data}\nmodel-ema: true\nmodel-ema-decay: 0.5\n")
    assert call("--recipe", folder / "tiny.yaml", "--join-type", "LaPE", "--output_dir", folder / "run") == 0
    return folder / "run" / "checkpoint.pth"


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert predict.main([str(word) for word in argv]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(capsys, *argv, "--json", code=code)[0].splitlines()]


# ---- predictions


@pytest.mark.parametrize("ema", [False, True])
def test_a_folder_is_predicted_as_evaluation_sees_it(
    ema: bool, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ("--eval", "--resume", checkpoint, "--output_dir", tmp_path, *["--eval-ema"] * ema)
    assert call(*evaluate) == 0
    answers = as_json(capsys, checkpoint, data / "val", "--batch-size", 4, *["--use-ema"] * ema)
    files = [str(path) for path in sorted((data / "val").rglob("*.png"))]
    assert [answer["image"] for answer in answers] == files
    assert all(sum(one["probability"] for one in answer["classes"]) == pytest.approx(1) for answer in answers)
    right = [answer["classes"][0]["class"] == Path(answer["image"]).parent.name for answer in answers]
    assert 100 * sum(right) / len(right) == pytest.approx(json.loads((tmp_path / "eval.json").read_text())["acc1"])


def test_the_most_probable_classes_come_first(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next((data / "val").rglob("*.png"))
    model: Any = lape_vit.load(checkpoint)
    with torch.no_grad(), Image.open(file) as image:
        expected = model(image_transform(model)(image.convert("RGB"))[None]).softmax(-1)[0]
    (answer,) = as_json(capsys, checkpoint, "--top", 2, file)  # flags may stand anywhere
    order = expected.argsort(descending=True).tolist()[:2]
    assert [one["index"] for one in answer["classes"]] == order
    assert [one["class"] for one in answer["classes"]] == [tiny_run.CLASSES[index] for index in order]
    assert [one["probability"] for one in answer["classes"]] == pytest.approx([expected[i].item() for i in order])
    lines, told = run(capsys, checkpoint, file, "--top_k"[:5], 2)
    assert lines.splitlines() == [
        str(file), *(f"{100 * expected[index]:7.2f} %  {tiny_run.CLASSES[index]}" for index in order)
    ]  # fmt: skip
    assert told == f"predict.py: {checkpoint} is read\n"


def test_a_folder_for_the_hub_predicts_as_the_checkpoint(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm.models.save_for_hf(lape_vit.load(checkpoint), tmp_path / "hub", safe_serialization=True)
    answers = [as_json(capsys, source, data / "val") for source in (checkpoint, tmp_path / "hub")]
    assert answers[0] == answers[1]


def test_an_image_that_cannot_be_read_is_told_and_the_others_are_predicted(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")
    for name in ("a.png", "c.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(next((data / "val").rglob("*.png")).read_bytes())
    first, second, third = as_json(capsys, checkpoint, tmp_path, code=2)
    assert first["classes"] == third["classes"]
    assert "b.png cannot be read as an image" in second["error"]
    out, err = run(capsys, checkpoint, tmp_path, code=2)
    assert "b.png" not in out
    (line,) = (line for line in err.splitlines() if "error" in line)
    assert line.startswith(f"predict.py: error: {tmp_path / 'b.png'} cannot be read")


@pytest.mark.parametrize(
    ("classes", "shown", "label"),
    [
        (None, "(n01440764)", "n01440764"),  # as many as ImageNet has
        (["n02123045", "b"], "tabby, tabby cat (n02123045)", "n02123045"),
        (["a", "b"], "a", "a"),
    ],
)
def test_classes_have_the_names_that_people_know(classes: list[str] | None, shown: str, label: str) -> None:
    model = nn.Module()
    cfg: Any = {"num_classes": 1000 if classes is None else len(classes), "label_names": classes}
    model.pretrained_cfg = cfg
    names, labels = predict.class_names(model)
    assert labels[0] == label
    assert shown in names[0]
    cfg |= {"num_classes": 3, "label_names": None}
    assert predict.class_names(model) == (["class 0", "class 1", "class 2"], [None] * 3)


# ---- exports


@pytest.mark.parametrize("kind", predict.EXPORTS)
def test_an_exported_model_computes_the_same_and_says_what_it_is_of(
    kind: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"model.{kind}"
    out, err = run(capsys, checkpoint, "--export", kind, file)
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["predict.py", "predict.py", str(file)]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    images, model = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), lape_vit.load(checkpoint)
    if kind == "onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        said = {one.key: one.value for one in onnx.load(file).metadata_props}["pretrained_cfg"]
    else:
        extra = {"pretrained_cfg": ""}
        logits = torch.export.load(str(file), extra_files=extra).module()(images)
        said = extra["pretrained_cfg"]
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)
    assert json.loads(said)["label_names"] == list(tiny_run.CLASSES)
    assert json.loads(said)["crop_mode"] == "squash"


def test_an_export_that_computes_something_else_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(program: Any, path: Path, text: str) -> Any:
        path.write_bytes(b"a file")
        return lambda images: program.module()(images) + 0.1

    monkeypatch.setitem(lape_vit.export.EXPORTERS, "pt2", write)
    (tmp_path / "model.pt2").write_text("the one before")
    _, err = run(capsys, checkpoint, "--export", "pt2", tmp_path / "model.pt2", code=1)
    assert err.splitlines()[-1].endswith("the logits of the pt2 file differ from the model's by up to 0.1")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the one before"]


def test_a_package_that_is_missing_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, err = run(capsys, checkpoint, "--export", "onnx", tmp_path / "model.onnx", code=2)
    assert "--export onnx needs onnxruntime: pip install onnx onnxscript onnxruntime" in err.splitlines()[-1]


def test_the_command_line_knows_the_kinds_of_files_that_the_library_writes() -> None:
    assert {*predict.EXPORTS} == lape_vit.export.EXPORTERS.keys()


# ---- what is refused


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["CHECKPOINT"], "name the images, or --export KIND FILE"),
        (["CHECKPOINT", "no.png"], "no image no.png"),
        (["no.pth", "IMAGE"], "no checkpoint file no.pth"),
        (["CHECKPOINT", "EMPTY"], "no image in "),
        (["CHECKPOINT", "--export", "coreml", "x"], "--export coreml: choose from onnx, pt2"),
        (["CHECKPOINT", "IMAGE", "--top", "0"], "argument --top/--topk: expected a whole number of at least 1"),
        (["CHECKPOINT", "IMAGE", "--join-type", "basic"], "--join-type basic contradicts"),
        (["BARE", "IMAGE"], "bare.pth does not say what model it holds: give --model"),
        (["BARE", "IMAGE", "--model", "no_such"], "unknown --model 'no_such'"),
        (["BARE", "IMAGE", "--model", COMPACT, "--use_ema"], "holds no averaged weights: leave --use-ema out"),
        (["HEADLESS", "IMAGE"], "holds a model without classes"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    argv: list[str], told: str, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    torch.save(create(name=COMPACT).state_dict(), tmp_path / "bare.pth")
    model = timm.create_model(COMPACT, num_classes=0)
    description = {"model": COMPACT, "pe": "learnable", "join_type": "basic", "num_classes": 0, "input_size": 32}
    save_checkpoint(tmp_path / "headless.pth", {"model": model.state_dict(), "description": description})
    files = {"CHECKPOINT": checkpoint, "EMPTY": tmp_path / "empty", "BARE": tmp_path / "bare.pth"}
    files |= {"HEADLESS": tmp_path / "headless.pth", "IMAGE": next((data / "val").rglob("*.png"))}
    out, err = run(capsys, *(files.get(word, word) for word in argv), code=2)
    assert out == ""
    assert told in err.splitlines()[-1]
    assert [line for line in err.splitlines() if "error" in line] == err.splitlines()[-1:]


def test_torch_is_imported_only_after_the_first_line(tmp_path: Path) -> None:
    code = "import predict, sys; predict.read_options(sys.argv[1:]); assert 'torch' not in sys.modules"
    (tmp_path / "image.png").touch()
    argv = [sys.executable, "-c", code, str(tmp_path / "image.png"), str(tmp_path / "image.png")]
    subprocess.run(argv, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
