"""Names of classes: labels are matched by name wherever a checkpoint and a data set meet, or the difference is told."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_run
import torch
from test_losses import distilled
from tiny_run import as_original, call, differences, load, set_up

import training.models
from loading.classes import first_few, name_differences, order_of_classes
from tests.test_shards import make_shards

CLASSES = list(tiny_run.CLASSES)
TURNED = CLASSES[1:] + CLASSES[:1]
PLACES = [CLASSES.index(name) for name in TURNED]  # of the turned classes among the others
UNCOMPARED = "its classes cannot be compared by name with those of FOLDER: equal numbers are taken for equal classes"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, but a circle is called a zircle."""
    names = ["zircle" if name == "circle" else name for name in CLASSES]
    return tiny_run.make_images(tmp_path_factory.mktemp("others"), classes=names)


@pytest.fixture(scope="module")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class more."""
    return tiny_run.make_images(tmp_path_factory.mktemp("more"), classes=[*CLASSES, "zebra"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """Of a finished run, with both kinds of weights; to be left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    flags = ("--model-ema", "--model-ema-decay", 0.5, "--lr", 3e-3)
    assert call("--recipe", recipe, *flags, "--output_dir", folder) == 0
    return folder / "checkpoint.pth"


def changed(checkpoint: Path, path: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """A copy of a checkpoint, with a change if there is one."""
    content = load(checkpoint)
    if change is not None:
        change(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def turn_classes(content: dict[str, Any]) -> None:
    """Number a model's classes as in `TURNED`."""
    content["description"]["classes"] = TURNED
    for weights in (content["model"], content["model_ema"]):
        for name in ("head.weight", "head.bias"):
            weights[name] = weights[name][PLACES]


def train_on_shards(content: dict[str, Any]) -> None:
    """What training on shards would say: classes are numbers."""
    content["description"] |= {"data_set": "WDS", "classes": ["0", "1", "2"]}


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main.py: error: ")
    return line


# ---- evaluation and resumption


@pytest.mark.parametrize("flags", [(), ("--eval-ema",)])
def test_evaluation_gives_each_class_its_number_in_the_checkpoint(
    flags: tuple[str, ...], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = changed(checkpoint, tmp_path / "turned.pth", turn_classes)
    results = []
    for path in (checkpoint, turned):
        assert call("--eval", *flags, "--resume", path, "--output_dir", tmp_path / path.stem) == 0
        results.append(json.loads((tmp_path / path.stem / "eval.json").read_text()))
    assert results[0] == pytest.approx(results[1])
    told = f"{turned}: its classes are those of FOLDER in another order, and matched by name"
    assert capsys.readouterr().out.count(told) == 1


def test_resumed_training_gives_each_class_its_number_in_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    turned = changed(checkpoint, tmp_path / "run" / "checkpoint.pth", turn_classes)
    same = changed(checkpoint, tmp_path / "same" / "checkpoint.pth")
    runs = [set_up("--resume", path, "--epochs", 3) for path in (turned, same)]
    (images, labels), (same_images, others) = (next(iter(run.training.loader)) for run in runs)
    assert torch.equal(images, same_images)
    assert [TURNED[label] for label in labels] == [CLASSES[label] for label in others]
    assert call("--resume", turned, "--epochs", 3) == 0
    assert load(turned)["description"]["classes"] == TURNED


@pytest.mark.parametrize("mode", [("--eval",), ()])
def test_other_classes_are_refused_by_name(
    mode: tuple[str, ...], checkpoint: Path, other_data: Path, more_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*mode, "--resume", checkpoint, "--data-path", other_data) == 2
    assert refused(capsys).endswith(
        f"FOLDER has other classes than the model of {checkpoint}: only in FOLDER: zircle; only in {checkpoint}: circle"
    )
    assert call(*mode, "--resume", checkpoint, "--data-path", more_data) == 2
    line = f"FOLDER has 4 classes, but the model of {checkpoint} has 3: only in FOLDER: zebra"
    assert refused(capsys).endswith(line)


def test_a_checkpoint_without_names_is_told_in_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(as_original(load(checkpoint)), foreign := tmp_path / "foreign.pth")
    assert call("--eval", "--resume", foreign, "--data-set", "FOLDER", "--data-path", data) == 0
    assert capsys.readouterr().out.count(f"{foreign}: {UNCOMPARED}") == 1
    assert call("--eval", "--resume", checkpoint) == 0
    assert "compared by name" not in capsys.readouterr().out


def test_a_run_on_shards_that_goes_on_with_folders_gets_their_names(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(checkpoint, tmp_path / "checkpoint.pth", train_on_shards)
    assert call("--resume", path, "--epochs", 3) == 0
    assert f"{path}: {UNCOMPARED}" in capsys.readouterr().out
    assert load(path)["description"]["classes"] == CLASSES


def test_shards_leave_a_checkpoint_its_names(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    patterns = ("--data-path", make_shards(tmp_path), "--eval-data-path", make_shards(tmp_path, "val"))
    named = changed(checkpoint, tmp_path / "named.pth")
    assert set_up("--resume", named, "--epochs", 3, "--data-set", "WDS", *patterns).description["classes"] == CLASSES


def test_shards_of_a_checkpoint_that_calls_its_classes_by_numbers_are_matched_by_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = changed(
        checkpoint, tmp_path / "numbers.pth", lambda content: content["description"].update(classes=["1", "2", "0"])
    )
    pattern = make_shards(tmp_path, "val")
    run = set_up("--eval", "--resume", path, "--data-set", "WDS", "--eval-data-path", pattern)
    labels = torch.cat([labels for _, labels in run.test_loader])
    assert labels.tolist() == [(number + 2) % 3 for number in range(len(labels))]  # the shards have 0, 1, 2, 0, 1, ...


# ---- the teacher


def teacher_checkpoint(path: Path, classes: list[str] | None, order: list[int]) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, depth=1, pe="learnable")
    weights = {name: value[order] if name.startswith("head") else value for name, value in model.state_dict().items()}
    description = {
        "model": "deit_tiny_distilled_patch16_224",
        "input_size": 32,
        "pe": "learnable",
        "data_set": "FOLDER",
    }
    description |= {"classes": classes} if classes else {}
    torch.save({"format": "lape-vit", "version": 1, "model": weights, "description": description}, path)
    return path


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one layer."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **{"depth": 1, **options}))


@pytest.mark.usefixtures("shallow")
def test_a_teacher_answers_in_the_students_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, images = "deit_tiny_distilled_patch16_224", torch.randn(2, 3, 32, 32)
    answers = []
    with caplog.at_level(logging.INFO):
        for classes, order in ((CLASSES, [0, 1, 2]), (TURNED, PLACES), (None, [0, 1, 2])):
            path = teacher_checkpoint(tmp_path / f"{order}.pth", classes, order)
            args = distilled(path, teacher_model=name, data_set="FOLDER")
            answers.append(training.models.build_teacher(args, CLASSES)(images))
    assert torch.allclose(answers[0], answers[1], atol=1e-6)
    assert not torch.allclose(answers[0], answers[0][:, PLACES], atol=1e-2)
    matched, uncompared = (message for message in caplog.messages if "name" in message)
    assert "another order" in matched
    assert UNCOMPARED in uncompared


@pytest.mark.usefixtures("shallow")
def test_a_teacher_of_other_classes_is_refused_by_name(tmp_path: Path) -> None:
    path = teacher_checkpoint(tmp_path / "teacher.pth", ["a", "circle", "square"], [0, 1, 2])
    args = distilled(path, teacher_model="deit_tiny_distilled_patch16_224", data_set="FOLDER")
    with pytest.raises(ValueError, match="other classes") as error:
        training.models.build_teacher(args, CLASSES)
    told = f"only in FOLDER: triangle; only in {path}: a"
    assert str(error.value) == f"--teacher-path {path} was trained on other classes: {told}"


# ---- fine-tuning


def test_fine_tuning_takes_the_classifier_over_class_by_class(checkpoint: Path, recipe: Path, tmp_path: Path) -> None:
    turned = changed(checkpoint, tmp_path / "turned.pth", turn_classes)
    model = set_up("--recipe", recipe, "--finetune", turned).model.state_dict()
    assert differences(model, load(checkpoint)["model"]) == []


def test_fine_tuning_on_other_classes_starts_the_classifier_afresh(
    checkpoint: Path, recipe: Path, other_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run = set_up("--recipe", recipe, "--finetune", checkpoint, "--data-path", other_data)
    different = differences(dict(run.model.state_dict()), load(checkpoint)["model"])
    assert different == [".head.weight", ".head.bias"]
    assert f"{checkpoint}: new, at its initial values: head.weight, head.bias" in caplog.messages
    left_out = f"{checkpoint}: its classifier is for other classes and left out: "
    assert f"{left_out}only in FOLDER: zircle; only in {checkpoint}: circle" in caplog.messages
    assert run.description["classes"] == ["square", "triangle", "zircle"]


def test_fine_tuning_from_a_checkpoint_without_names_tells_that_its_classifier_is_kept(
    checkpoint: Path, recipe: Path, more_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(as_original(load(checkpoint)), foreign := tmp_path / "foreign.pth")
    with caplog.at_level(logging.INFO):
        run = set_up("--recipe", recipe, "--finetune", foreign)
    assert torch.equal(run.model.state_dict()["head.weight"], load(checkpoint)["model"]["head.weight"])
    assert caplog.messages.count(f"{foreign}: {UNCOMPARED}") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        set_up("--recipe", recipe, "--finetune", foreign, "--data-path", more_data)
    assert f"{foreign}: {UNCOMPARED}" not in caplog.messages  # of a classifier that does not fit


# ---- names


def test_an_order_needs_the_same_names() -> None:
    assert order_of_classes(["b", "a", "c"], ["a", "b", "c"]) == [1, 0, 2]
    assert order_of_classes(["a", "b"], ["a", "b", "c"]) is None
    assert order_of_classes(["a", "b", "d"], ["a", "b", "c"]) is None


def test_only_a_few_of_many_differences_are_named() -> None:
    assert first_few([*"abcdefg"]) == "a, b, c, d, e and 2 more"
    told = name_differences([f"{number}" for number in range(10, 20)], "here", ["10"], "there")
    assert told == "only in here: 11, 12, 13, 14, 15 and 4 more"
