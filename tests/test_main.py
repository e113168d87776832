"""The command line: what it trains, writes, evaluates and refuses."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from PIL import Image
from tiny_run import as_original, call, contents, differences, load, log_of, set_up, timeless, train
from torch import nn

import engine
import main
import similarity_visualize
import training.evaluation
import training.setup
from lape_vit.encodings import ENCODINGS, all_options
from runtime.world import World
from training.state import Training

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The folder of a finished run; to be left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert call("--recipe", recipe, "--join-type", "LaPE", "--output_dir", folder) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main.py: error: ")
    return line


# ---- training


def test_training_writes_all_that_it_promises(trained: Path) -> None:
    files = {"checkpoint.pth", "best_checkpoint.pth", "config.yaml", "log.txt", "curves.png"}
    assert set(contents(trained)) == files

    rows = log_of(trained)
    assert [row["epoch"] for row in rows] == [1, 2]
    promised = {"epoch", "train_loss", "train_lr", "test_loss", "test_acc1", "n_parameters", "seconds"}
    assert all(promised <= row.keys() for row in rows)
    assert [row["train_lr"] for row in rows] == pytest.approx([1e-4, 5.05e-4])  # warm-up, then half of the cosine
    assert all(0 <= row["test_acc1"] <= 100 for row in rows)

    checkpoint = load(trained / "checkpoint.pth")
    assert checkpoint["epoch"] == 2
    assert checkpoint["best_acc1"] == max(row["test_acc1"] for row in rows)
    assert rows[0]["n_parameters"] == sum(
        p.numel() for p in set_up("--resume", trained / "checkpoint.pth").model.parameters()
    )
    assert checkpoint["description"] == {
        "model": "vit_compact_patch4_32",
        "pe": "learnable",
        "join_type": "LaPE",
        "global_pool": "token",
        "num_classes": 3,
        "classes": list(tiny_run.CLASSES),
        "input_size": 16,
        "data_set": "FOLDER",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "eval_crop_ratio": 1.0,  # as evaluation takes images of up to 32 x 32 pixels whole
        "crop_mode": "squash",
    }
    with Image.open(trained / "curves.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_the_best_checkpoint_is_that_of_the_best_epoch(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([50.0, 70.0, 70.0, 60.0])
    result = {"acc5": 100.0, "loss": 1.0, "count": 13}
    monkeypatch.setattr(training.evaluation, "evaluate", lambda *args, **kwargs: {"acc1": next(accuracies), **result})
    train("--recipe", recipe, "--epochs", 4, "--output_dir", tmp_path / "run")
    assert load(tmp_path / "run" / "best_checkpoint.pth")["epoch"] == 2
    assert load(tmp_path / "run" / "checkpoint.pth")["epoch"] == 4
    assert load(tmp_path / "run" / "checkpoint.pth")["best_acc1"] == 70


def test_without_output_dir_nothing_is_written(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("--recipe", recipe, "--epochs", 1) == 0
    assert contents(tmp_path) == {}
    out = capsys.readouterr().out
    assert re.search(r"output +none", out)
    assert "no checkpoint" in out
    assert "next:" not in out


def test_a_run_opens_with_what_differs_from_its_recipe_and_ends_with_what_to_type_next(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    flags = ("--epochs", 2, "--weight_decay=0.25", "--lr", 0.001)
    assert call("--recipe", recipe, *flags, "--output_dir", folder) == 0
    out = capsys.readouterr().out
    opening = out[: out.index("epoch 1/2")]
    (told,) = (line for line in opening.splitlines() if line.startswith("recipe"))
    assert "weight-decay 0.25 (was 0.05)" in told
    assert "lr" not in told.replace(str(recipe), "")  # it is the recipe's own
    assert "mixup-switch-prob" not in opening
    assert len(opening.splitlines()) < 15
    rows = log_of(folder)
    best = max(rows, key=lambda row: row["test_acc1"])
    assert f"epoch {best['epoch']}, acc@1 {best['test_acc1']:.2f} %" in out
    (evaluation,) = re.findall(r"next: python main.py (.*)", out)
    assert call(*shlex.split(evaluation)) == 0
    (picture,) = re.findall(r"^ +python similarity_visualize.py (.*)", out, re.MULTILINE)
    assert similarity_visualize.read_options(shlex.split(picture)).ckpt_path == str(folder / "best_checkpoint.pth")


def test_the_run_prints_its_options_and_marks_those_given(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("--recipe", recipe, "--epochs", 1, "--weight_decay=0.25", "--show-options")
    out = capsys.readouterr().out
    assert re.search(r"weight-decay\* 0.25\b", out)
    assert re.search(r"\blr 0.001\b", out)
    assert re.search(r"join-type basic\b", out)
    assert re.search(r"device cpu|device cuda", out)
    assert re.search(r"epoch 1/1 .*train loss .*acc@1 .* s, .* % waiting for data .* left", out)


@pytest.mark.parametrize("flags", [("--output-dir", "--weight-decay"), ("--output_dir", "--weight_decay")])
def test_dash_and_underscore_mean_the_same(tmp_path: Path, recipe: Path, flags: tuple[str, str]) -> None:
    folder, decay = flags
    run = set_up("--recipe", recipe, folder, tmp_path / "a_b", f"{decay}=0.125")
    assert run.output_dir == tmp_path / "a_b"
    assert run.options.optimisation.weight_decay == 0.125


def test_the_command_line_overrides_the_recipe_and_that_the_defaults(recipe: Path) -> None:
    options = set_up("--recipe", recipe, "--lr", "0.5").options
    assert (options.optimisation.lr, options.data.batch_size, options.optimisation.weight_decay) == (0.5, 12, 0.05)


def test_the_saved_configuration_repeats_the_run(tmp_path: Path, trained: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (config["join_type"], config["device"], config["input_size"]) == ("LaPE", set_up_device(), 16)
    run = train("--recipe", trained / "config.yaml", "--output_dir", tmp_path)
    saved = load(trained / "checkpoint.pth")["model"]
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in run.model.state_dict().items())
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config


def set_up_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_without_an_average_there_is_none_and_with_one_it_is_evaluated(
    tmp_path: Path, recipe: Path, trained: Path
) -> None:
    assert load(trained / "checkpoint.pth")["model_ema"] is None
    run = train("--recipe", recipe, "--epochs", 1, "--model-ema", "--model-ema-decay", 0.5, "--output_dir", tmp_path)
    assert {"test_ema_loss", "test_ema_acc1"} <= log_of(tmp_path)[0].keys()
    average = load(tmp_path / "checkpoint.pth")["model_ema"]
    weights = run.model.state_dict()
    assert average.keys() == weights.keys()
    assert not torch.equal(average["head.weight"], weights["head.weight"].cpu())


def test_the_average_may_stay_in_the_cpus_memory(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train("--recipe", recipe, "--epochs", 1, "--model-ema", "--model-ema-force-cpu")
    assert run.training is not None
    ema = run.training.ema
    assert ema is not None
    assert ema.device == torch.device("cpu")
    assert {value.device.type for value in ema.module.state_dict().values()} == {"cpu"}
    assert "without effect" not in caplog.text
    set_up("--recipe", recipe, "--model-ema-force-cpu")
    assert "--model-ema-force-cpu is without effect without --model-ema" in caplog.text


def test_evaluating_all_on_every_process_gives_the_same_result(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = set_up("--recipe", recipe, "--no-dist-eval")
    alone = training.evaluation.evaluate_model(run, run.model, "alone")
    run.runtime = replace(run.runtime, world=World(0, 2, 0))
    monkeypatch.setattr(engine, "sum_over_ranks", lambda tensor: 2 * tensor)  # of two processes with all images each
    assert training.evaluation.evaluate_model(run, run.model, "one of two") == alone
    assert alone["count"] == tiny_run.NUM_VAL


def test_attention_alone_is_trained_with_positions_and_classifier(recipe: Path) -> None:
    flags = ("--recipe", recipe, "--join-type", "LaPE", "--attn-only")
    before = {name: value.clone() for name, value in set_up(*flags).model.state_dict().items()}
    after = train(*flags).model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value.cpu(), before[name].cpu())}
    kinds = (".attn.", "pos_embed", "join.", "head.")
    assert changed == {name for name in after if any(kind in name for kind in kinds)}


def test_dropout_without_training_mode_is_told(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_up("--recipe", recipe, "--drop", 0.1)
    assert "without effect" not in caplog.text
    set_up("--recipe", recipe, "--drop", 0.1, "--no-train-mode")
    assert "without effect under --no-train-mode" in caplog.text


def test_compiled_training_follows_plain_training_and_saves_a_plain_checkpoint(
    tmp_path: Path, recipe: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, graphs = torch.compile, []

    def backend(graph: nn.Module, inputs: list[torch.Tensor]) -> nn.Module:
        graphs.append(graph)  # runs as it is; to turn it into machine code would take a minute
        return graph

    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    # Of dropout: compiled, it is torch's own, whose random numbers are others.
    without = ("--model-kwargs", "pos_drop_rate=0.0", "proj_drop_rate=0.0")
    flags = ("--recipe", recipe, "--data-path", few_images, "--epochs", 1, "--model-ema", *without)
    for name, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        assert call(*flags, flag, "--output_dir", tmp_path / name) == 0
        assert any("blocks" in str(graph) for graph in graphs) == (name == "compiled")
    assert len(graphs) == 2  # that of the trial, and one without a break for every update
    plain, compiled = (load(tmp_path / name / "checkpoint.pth")["model"] for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-4, rtol=0)
    assert call("--resume", tmp_path / "compiled" / "checkpoint.pth", "--no-compile", "--epochs", 2) == 0


def test_without_a_compiler_compile_is_refused_before_anything_is_written(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("InvalidCxxCompiler: None found\nand a long explanation")

    monkeypatch.setattr(torch, "compile", lambda model: fail)
    assert call("--recipe", recipe, "--compile", "--output_dir", tmp_path / "run") == 2
    assert refused(capsys).endswith(
        "--compile does not work here: InvalidCxxCompiler: None found; "
        "leave it out, or install what it needs, such as g++"
    )
    assert not (tmp_path / "run").exists()


def test_deterministic_lets_torch_use_no_other_algorithms(recipe: Path) -> None:
    set_up("--recipe", recipe)
    assert not torch.are_deterministic_algorithms_enabled()
    set_up("--recipe", recipe, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()


def test_a_run_may_start_later_in_its_schedule(
    tmp_path: Path, recipe: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--recipe", recipe, "--start-epoch", 1, "--output_dir", tmp_path) == 0
    (row,) = log_of(tmp_path)
    assert (row["epoch"], row["train_lr"]) == (2, log_of(trained)[1]["train_lr"])
    assert call("--resume", tmp_path / "checkpoint.pth", "--epochs", 3) == 0
    assert [row["epoch"] for row in log_of(tmp_path)] == [2, 3]
    capsys.readouterr()
    assert call("--resume", trained / "checkpoint.pth", "--start-epoch", 1) == 2
    assert "--start-epoch" in refused(capsys)


def test_the_average_has_a_best_checkpoint_of_its_own_and_is_evaluated_from_it(
    tmp_path: Path, recipe: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies = iter([50.0, 20.0, 40.0, 60.0, 30.0, 55.0])  # of the model and of the average, in turn
    with monkeypatch.context() as patch:
        result = {"acc5": 100.0, "loss": 1.0}
        patch.setattr(training.evaluation, "evaluate", lambda *args, **kwargs: {"acc1": next(accuracies), **result})
        train("--recipe", recipe, "--epochs", 3, "--model-ema", "--model-ema-decay", 0.5, "--output_dir", tmp_path)
    assert load(tmp_path / "best_checkpoint.pth")["epoch"] == 1
    path = tmp_path / "best_ema_checkpoint.pth"
    assert load(path)["epoch"] == 2
    assert load(tmp_path / "checkpoint.pth")["best_ema_acc1"] == 60

    average = load(path)["model_ema"]
    weights = set_up("--eval", "--eval-ema", "--resume", path).model.state_dict()
    assert all(torch.equal(value.cpu(), average[name]) for name, value in weights.items())
    assert call("--eval", "--eval-ema", "--resume", trained / "checkpoint.pth") == 2
    assert "holds no averaged weights" in refused(capsys)
    assert call("--eval-ema", "--resume", path) == 2
    assert "--eval" in refused(capsys)


def test_an_average_too_slow_for_the_run_is_told(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--recipe", recipe, "--model-ema", "--model-ema-decay")  # of 2 epochs of 4 updates
    set_up(*flags, 0.7)
    set_up(*flags, 0.9)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "--model-ema-decay 0.9 is slow for 8 updates: the average keeps 43 % of the first weights"


@pytest.mark.parametrize(("flags", "images"), [((), 48), (("--repeated-aug",), 16), (("--batch-size", 20), 40)])
def test_the_run_says_how_much_an_epoch_shows(
    flags: tuple[object, ...], images: int, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = set_up("--recipe", recipe, *flags)
    assert run.training is not None
    shown = {index for index, _, _ in run.training.loader.sampler}  # type: ignore[attr-defined]
    assert len(shown) == images == training.setup.unique_images(run.training, 1)


# What to compare with beside the bare recipe, and a change of the option that the weights after two epochs must show.
EFFECTS: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "seed": ((), ("--seed", 1)),
    "amp_dtype": ((), ("--amp-dtype", "bfloat16")),
    "pe": ((), ("--pe", "2D_sin")),
    "join_type": ((), ("--join-type", "LaPE")),
    "input_size": ((), ("--input-size", 8)),
    "drop": ((), ("--drop", 0.9)),
    "drop_path": ((), ("--drop-path", 0.9)),
    "batch_size": ((), ("--batch-size", 6)),
    "train_crop": ((), ("--train-crop", "random-resized")),
    "train_interpolation": (("--input-size", 12), ("--train-interpolation", "bilinear")),
    "hflip": ((), ("--hflip", 0)),
    "aa": ((), ("--aa", "rand-m9-mstd0.5-inc1")),
    "color_jitter": ((), ("--color-jitter", 0.5)),
    "reprob": ((), ("--reprob", 1)),
    "remode": (("--reprob", 1), ("--remode", "const")),
    "recount": (("--reprob", 1), ("--recount", 3)),
    "repeated_aug": ((), ("--repeated-aug",)),
    "mixup": ((), ("--mixup", 1)),
    "cutmix": ((), ("--cutmix", 1)),
    "cutmix_minmax": (("--cutmix", 1), ("--cutmix-minmax", 0.4, 0.6)),
    "mixup_prob": (("--mixup", 1), ("--mixup-prob", 0.1)),
    "mixup_switch_prob": (("--mixup", 1, "--cutmix", 1), ("--mixup-switch-prob", 0)),
    "mixup_mode": (("--mixup", 1), ("--mixup-mode", "elem")),
    "smoothing": ((), ("--smoothing", 0.3)),
    "epochs": ((), ("--epochs", 1)),
    "accum_steps": (("--batch-size", 6), ("--batch-size", 6, "--accum-steps", 2)),
    "opt": ((), ("--opt", "sgd")),
    "opt_eps": ((), ("--opt-eps", 1)),
    "opt_betas": ((), ("--opt-betas", 0.1, 0.2)),
    "momentum": (("--opt", "sgd"), ("--momentum", 0.1)),
    "weight_decay": ((), ("--weight-decay", 10)),
    "clip_grad": (("--opt", "sgd"), ("--clip-grad", 0.01)),
    "lr": ((), ("--lr", 5e-3)),
    "unscale_lr": ((), ("--no-unscale-lr",)),
    "sched": ((), ("--sched", "constant")),
    "sched_on_updates": ((), ("--sched-on-updates",)),
    "warmup_epochs": ((), ("--warmup-epochs", 0)),
    "warmup_lr": ((), ("--warmup-lr", 5e-4)),
    "min_lr": ((), ("--min-lr", 9e-4)),
    "cooldown_epochs": ((), ("--cooldown-epochs", 1)),
    "decay_epochs": (("--sched", "step"), ("--decay-epochs", 1)),
    "decay_rate": (("--sched", "poly"), ("--decay-rate", 2)),
    "lr_noise": ((), ("--lr-noise", 0.1)),
    "lr_noise_pct": (("--lr-noise", 0.1), ("--lr-noise-pct", 0.02)),
    "lr_noise_std": (("--lr-noise", 0.1), ("--lr-noise-std", 0.1)),
    "bce_loss": ((), ("--bce-loss",)),
    "cosub": (("--drop-path", 0.5, "--bce-loss"), ("--drop-path", 0.5, "--bce-loss", "--cosub")),
    "src": ((), ("--src",)),
    "scale": (("--train-crop", "random-resized"), ("--train-crop", "random-resized", "--scale", 0.5, 0.6)),
    "mixup_off_epoch": (("--mixup", 0.8), ("--mixup", 0.8, "--mixup-off-epoch", 1)),
    "three_augment": ((), ("--three-augment",)),
    "train_mode": (("--drop", 0.9), ("--drop", 0.9, "--no-train-mode")),
    "attn_only": ((), ("--attn-only",)),
    "start_epoch": ((), ("--start-epoch", 1)),
}


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_images(tmp_path_factory.mktemp("few"), num_train=8, num_val=3)


@pytest.fixture(scope="session")
def compared() -> dict[tuple[object, ...], torch.Tensor]:
    return {}


@pytest.mark.parametrize("option", EFFECTS)
def test_each_option_of_training_changes_the_weights(
    option: str, recipe: Path, few_images: Path, compared: dict[tuple[object, ...], torch.Tensor]
) -> None:
    def weights(*flags: object) -> torch.Tensor:
        if flags not in compared:
            run = train("--recipe", recipe, "--data-path", few_images, *flags)
            compared[flags] = run.model.state_dict()["blocks.0.mlp.fc1.weight"].clone()
        return compared[flags]

    base, change = EFFECTS[option]
    assert not torch.equal(weights(*base), weights(*base, *change))


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--lr", 1e30, "--warmup-epochs", 0, "--opt", "sgd", "--max-bad-steps", 2)
    assert call("--recipe", recipe, *flags, "--output_dir", tmp_path / "run") == 1
    message = (
        r"epoch 1: 2 updates in a row were skipped .*: loss (nan|inf), learning rate 1e\+30, scale 1, "
        r"gradient norm (nan|inf); no checkpoint yet"
    )
    assert re.search(message, refused(capsys))
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


# ---- evaluation


@pytest.mark.parametrize("num_classes", [5, 6])
def test_the_best_five_guesses_have_an_accuracy_only_where_they_may_be_wrong(
    num_classes: int, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = set_up("--eval", "--resume", trained / "checkpoint.pth", "--output_dir", tmp_path)
    setup.description["num_classes"] = num_classes
    result = training.evaluation.evaluate_model(setup, setup.model, "test")
    row = {f"test_{name}": value for name, value in result.items()}
    row |= {"epoch": 1, "train_loss": 1.0, "train_lr": 1e-3, "seconds": 1.0, "waiting_share": 0.0}
    training.evaluation.evaluate_checkpoint(setup)
    shown = [result, json.loads((tmp_path / "eval.json").read_text())]
    assert ["acc5" in one for one in shown] == [num_classes > 5] * 2
    lines = main.summarise(row, 1), capsys.readouterr().out
    assert ["@5" in line for line in lines] == [num_classes > 5] * 2


def test_evaluation_of_a_checkpoint_alone_repeats_what_training_measured(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--eval", "--resume", trained / "checkpoint.pth", "--output_dir", tmp_path) == 0
    row = log_of(trained)[-1]
    line = f"* Acc@1 {row['test_acc1']:.3f} loss {row['test_loss']:.3f}"
    assert line in capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "eval.json").read_text())
    expected = {"acc1": row["test_acc1"], "loss": row["test_loss"], "count": tiny_run.NUM_VAL}
    assert result == expected
    assert set(contents(tmp_path)) == {"eval.json"}


def test_evaluation_into_the_folder_of_a_run_leaves_the_run_alone(tmp_path: Path, trained: Path) -> None:
    copy = copy_of(trained, tmp_path)
    before = contents(copy)
    assert call("--eval", "--resume", copy / "checkpoint.pth", "--output_dir", copy) == 0
    after = contents(copy)
    del after["eval.json"]
    assert after == before


def copy_of(folder: Path, parent: Path) -> Path:
    copy = parent / "copy"
    copy.mkdir()
    for name, content in contents(folder).items():
        (copy / name).write_bytes(content)
    return copy


CONTRADICTIONS = {
    "model": ("deit_tiny_patch16_224", "vit_compact_patch4_32"),
    "pe": ("2D_sin", "learnable"),
    "join_type": ("share", "LaPE"),
    "input_size": ("32", "16"),
}


@pytest.mark.parametrize(
    ("option", "mode"),
    [(option, mode) for option in CONTRADICTIONS for mode in ("--eval", "--no-pin-mem")  # evaluate, or train on
     if (option, mode) != ("input_size", "--eval")],
)  # fmt: skip
def test_a_flag_that_contradicts_the_checkpoint_is_refused_with_both_values(
    option: str, mode: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, saved = CONTRADICTIONS[option]
    flag = "--" + option.replace("_", "-")
    before = contents(trained)
    assert call(mode, "--resume", trained / "checkpoint.pth", flag, given) == 2
    line = refused(capsys)
    assert f"{flag} {given}" in line
    assert saved in line
    assert contents(trained) == before


@pytest.fixture(scope="session")
def rotary(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The folder of a finished run whose encoding has options; to be left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "rotary"
    flags = ("--pe", "learnable+rope_mixed", "--join-type", "LaPE", "--rope-theta", "20")
    assert call("--recipe", recipe, "--output_dir", folder, *flags) == 0
    return folder


@pytest.mark.parametrize("name", all_options())
def test_every_option_of_an_encoding_reaches_it_and_comes_back_from_the_checkpoint(
    name: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, pe = f"--{name}", all_options()[name][1][0]
    legal = ENCODINGS[pe].choices().get(name, (3, 5))
    value = next(value for value in legal if value != ENCODINGS[pe].options()[name])
    other = next(other for other in legal if other != value)
    assert call("--recipe", recipe, "--epochs", "1", "--pe", pe, flag, value, "--output_dir", tmp_path) == 0
    checkpoint = tmp_path / "checkpoint.pth"
    assert set_up("--eval", "--resume", checkpoint).model.pe_options[name] == value
    assert call("--eval", "--resume", checkpoint, flag, other) == 2
    assert re.search(rf" {other}(\.0)? contradicts .* which has {value}", refused(capsys))
    assert call("--recipe", recipe, "--pe", "none", flag, value) == 2
    assert re.search(rf"--pe none: pe='none' takes no option '{name}'", refused(capsys))


@pytest.mark.parametrize("size", ["32", "24,16"])
def test_a_checkpoint_is_evaluated_at_another_size(size: str, rotary: Path, tmp_path: Path) -> None:
    checkpoint = rotary / "checkpoint.pth"
    run = set_up("--eval", "--resume", checkpoint, "--input-size", size)
    height, width = (int(side) for side in (size if "," in size else f"{size},{size}").split(","))
    images, _ = next(iter(run.test_loader))
    assert images.shape[2:] == (height, width)
    original = set_up("--eval", "--resume", checkpoint).model
    original.set_input_size(img_size=(height, width))
    assert torch.equal(run.model.eval()(images), original.eval()(images))
    assert call("--eval", "--resume", checkpoint, "--input-size", size, "--output_dir", tmp_path) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["count"] == tiny_run.NUM_VAL


class TestFinetune:
    def test_without_other_flags_it_starts_from_the_checkpoints_model_and_weights(
        self, rotary: Path, recipe: Path
    ) -> None:
        run = set_up("--recipe", recipe, "--finetune", rotary / "checkpoint.pth")
        model = run.options.model
        assert (model.pe, model.join_type) == ("learnable+rope_mixed(rope_theta=20)", "LaPE")
        assert model.encoding["rope_theta"] == 20
        saved = load(rotary / "checkpoint.pth")["model"]
        assert all(torch.equal(value, saved[name]) for name, value in run.model.state_dict().items())
        assert run.training is not None
        assert run.training.epoch == 0

    def test_another_encoding_join_and_size_load_what_fits_and_say_the_rest(
        self, rotary: Path, recipe: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        flags = ("--pe", "rope", "--join-type", "basic", "--input-size", "24,32")
        with caplog.at_level(logging.INFO):
            run = set_up("--recipe", recipe, "--finetune", rotary / "checkpoint.pth", *flags)
        saved = load(rotary / "checkpoint.pth")["model"]
        assert all(torch.equal(value, saved[name]) for name, value in run.model.state_dict().items())
        (left_out,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert all(name in left_out for name in ("pos_embed", "join.norms.*.weight (6)", "encoding.frequencies (6)"))
        assert run.model.patch_embed.img_size == (24, 32)

    def test_the_saved_configuration_starts_from_it_too(self, rotary: Path, recipe: Path, tmp_path: Path) -> None:
        flags = ("--recipe", recipe, "--finetune", rotary / "checkpoint.pth", "--epochs", "1", "--output_dir", tmp_path)
        assert call(*flags) == 0
        (saved,) = (set_up("--recipe", tmp_path / "config.yaml").model.state_dict()[name] for name in ("pos_embed",))
        assert torch.equal(saved, load(rotary / "checkpoint.pth")["model"]["pos_embed"])

    def test_together_with_resume_it_is_refused(self, rotary: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("--resume", rotary / "checkpoint.pth", "--finetune", rotary / "checkpoint.pth") == 2
        assert "--finetune" in refused(capsys)

    def test_a_checkpoint_of_another_architecture_is_refused_by_name(
        self, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
        assert call("--recipe", recipe, "--finetune", tmp_path / "other.pth") == 2
        assert "other.pth: no tensor" in refused(capsys)


def test_flags_that_agree_with_the_checkpoint_are_accepted_under_any_name(trained: Path) -> None:
    flags = ("--pos_embed", "learn", "--join_type=LaPE")
    model = set_up("--eval", "--resume", trained / "checkpoint.pth", *flags).options.model
    assert (model.pe, model.join_type) == ("learnable", "LaPE")


def test_the_checkpoint_decides_over_a_recipe(tmp_path: Path, trained: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        "pe: none\njoin-type: basic\ninput-size: 32\n" + f"data-set: FOLDER\ndata-path: {data_path(trained)}\n"
    )
    model = set_up("--eval", "--resume", trained / "checkpoint.pth", "--recipe", other).options.model
    assert (model.pe, model.join_type, model.input_size) == ("learnable", "LaPE", 16)


def data_path(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["data_path"]


def test_the_originals_checkpoints_evaluate_as_ours(
    tmp_path: Path, trained: Path, data: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = as_original(load(trained / "checkpoint.pth"))
    row = log_of(trained)[-1]
    line = f"* Acc@1 {row['test_acc1']:.3f} loss {row['test_loss']:.3f}"

    torch.save(original, tmp_path / "namespace.pth")
    assert call("--eval", "--resume", tmp_path / "namespace.pth", "--data-set", "FOLDER", "--data-path", data) == 0
    assert line in capsys.readouterr().out.splitlines()

    torch.save(original["model"], tmp_path / "weights.pth")  # which say nothing of the model
    flags = ("--recipe", recipe, "--join-type", "LaPE")
    assert call("--eval", "--resume", tmp_path / "weights.pth", *flags) == 0
    assert line in capsys.readouterr().out.splitlines()

    assert call("--resume", tmp_path / "namespace.pth", *flags) == 2
    assert "no training to continue" in refused(capsys)


def test_a_namespace_that_is_contradicted_is_refused(
    tmp_path: Path, trained: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(as_original(load(trained / "checkpoint.pth")), tmp_path / "namespace.pth")
    assert call("--eval", "--resume", tmp_path / "namespace.pth", "--recipe", recipe, "--join-type", "share") == 2
    assert "--join-type share contradicts" in refused(capsys)


# ---- resuming

RICH = (
    "--model-ema",
    "--model-ema-decay",
    0.9,
    "--mixup",
    0.8,
    "--drop-path",
    0.2,
    "--reprob",
    0.5,
    "--join-type",
    "LaPE",
)


def interrupt_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(training: Training, *args: object) -> dict[str, float]:
        if training.epoch == epochs:
            raise KeyboardInterrupt
        return train_one_epoch(training, *args)  # type: ignore[arg-type]

    train_one_epoch = main.train_one_epoch
    monkeypatch.setattr(main, "train_one_epoch", stopped)


def test_four_epochs_equal_two_and_two_bit_for_bit(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--recipe", recipe, "--epochs", 4, "--sched-on-updates", "--device", "cpu", *RICH)
    assert call(*flags, "--output_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert call(*flags, "--output_dir", tmp_path / "parts") == 130
    checkpoint = tmp_path / "parts" / "checkpoint.pth"
    message = f"main.py: interrupted in epoch 3; last checkpoint: {checkpoint}; continue with --resume {checkpoint}"
    assert capsys.readouterr().err.splitlines() == [message]
    assert call("--resume", checkpoint) == 0  # no other flag

    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        whole, parts = load(tmp_path / "whole" / name), load(tmp_path / "parts" / name)
        assert differences(whole, parts) == []
        assert whole["epoch"] > 0
    rows = timeless(tmp_path / "whole")
    assert len(rows) == 4
    assert rows == timeless(tmp_path / "parts")
    assert yaml.safe_load((tmp_path / "whole/config.yaml").read_text()) == yaml.safe_load(
        (tmp_path / "parts/config.yaml").read_text()
    )


def test_a_schedule_that_looks_at_the_accuracies_goes_on_where_it_was(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, *flags: object) -> list[float]:
        monkeypatch.setattr(
            training.evaluation, "evaluate", lambda *args, **kwargs: {"acc1": next(accuracies), **result}
        )
        call(*flags, "--output_dir", folder)
        return [row["train_lr"] for row in log_of(folder)]

    result = {"acc5": 100.0, "loss": 1.0, "count": 13}
    flags = ("--recipe", recipe, "--sched", "plateau", "--patience-epochs", 1, "--warmup-epochs", 1, "--epochs", 7)
    series = [50.0, 60.0, 70.0, 65.0, 64.0, 63.0, 62.0]
    accuracies = iter(series)
    whole = run(tmp_path / "whole", *flags, "--lr-noise", 0.5)
    assert whole[5] < 0.5 * whole[2]  # it has decayed
    accuracies = iter(series)
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        run(tmp_path / "parts", *flags, "--lr-noise", 0.5)
    assert run(tmp_path / "parts", "--resume", tmp_path / "parts" / "checkpoint.pth") == whole


def test_resuming_drops_log_rows_beyond_the_checkpoint_and_tells_changed_options(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(trained, tmp_path)
    with (copy / "log.txt").open("a") as file:
        file.write(json.dumps({"epoch": 3, "test_acc1": 99.0}) + "\n")
    assert call("--resume", copy / "checkpoint.pth", "--epochs", 3, "--weight-decay", 0.5) == 0
    out = capsys.readouterr().out
    assert "--epochs is now 3; it was 2" in out
    assert "--weight-decay is now 0.5; it was 0.05" in out
    rows = log_of(copy)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[2]["test_acc1"] != 99
    decays = {group["weight_decay"] for group in load(copy / "checkpoint.pth")["optimizer"]["param_groups"]}
    assert decays == {0.0, 0.5}


def test_resuming_a_finished_run_does_nothing_and_says_so(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(trained)
    assert call("--resume", trained / "checkpoint.pth") == 0
    assert "all 2 epochs" in capsys.readouterr().out
    after = contents(trained)
    before["config.yaml"] = after["config.yaml"] = b""  # says the last command
    assert after == before


def test_other_trained_weights_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--resume", trained / "checkpoint.pth", "--epochs", 3, "--attn-only") == 2
    assert "--attn-only True contradicts" in refused(capsys)


def test_another_optimizer_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--resume", trained / "checkpoint.pth", "--epochs", 3, "--opt", "sgd") == 2
    line = refused(capsys)
    assert "--opt sgd" in line
    assert "adamw" in line


# ---- bad input


def damaged_data(kind: str, folder: Path) -> Path:
    if kind == "absent":
        return folder / "nowhere"
    root = folder / "images"
    if kind == "empty":
        root.mkdir()
    else:
        circles = tiny_run.make_images(root, num_train=2, num_val=3) / "val" / "circle"
        circles.rename(circles.with_name("ellipse") if kind == "other classes" else root / "circles")
        if kind == "empty class":
            circles.mkdir()
    return root


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "nowhere"),
        ("empty", "train/ and val/"),
        ("other classes", "ellipse"),
        ("empty class", "no image in class folder circle of "),
    ],
)
def test_bad_data_folders_are_refused(
    kind: str, words: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged_data(kind, tmp_path)
    assert call("--recipe", recipe, "--data-path", path, "--output_dir", tmp_path / "run") == 2
    assert words in refused(capsys)
    assert not (tmp_path / "run").exists()


def test_cifar_without_files_and_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    command = ("--dataset", "cifar10", "--pos_embed", "sinusoidal", "--data-path", tmp_path / "data")
    assert call(*command, "--output_dir", tmp_path / "run") == 2
    assert "no network" in refused(capsys)
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = [
    (("--pe", "2D_cos"), ["2D_cos", "2D_sin"]),
    (("--pe", "2D_sin", "--join-type", "unshare"), ["unshare", "2D_sin", "LaPE"]),
    (("--join-type", "lapel"), ["lapel", "LaPE"]),
    (("--model", "resnet18"), ["resnet18", "deit_tiny_patch16_224"]),
    (("--data-set", "MNIST"), ["MNIST", "CIFAR100"]),
    (("--epochs", "many"), ["--epochs", "many"]),
    (("--epoch", "3"), ["--epoch"]),
    (("--lr", "-1"), ["--lr", "-1"]),
    (("--opt", "adamx"), ["--opt", "adamx"]),
    (("--opt", "adahessian"), ["second derivatives"]),
    (("--device", "toaster"), ["--device", "toaster"]),
    (("--device", "cuda:99"), ["--device cuda:99"]),
    (("--input-size", "18"), ["--input-size 18", "4 pixels"]),
    (("--batch-size", "1000"), ["--batch-size", "1000"]),
    (("--mixup", "1", "--batch-size", "5"), ["--batch-size 5", "mixup"]),
    (("--cutmix-minmax", "0.8", "0.2"), ["--cutmix-minmax"]),
    (("--aa", "rainbow"), ["--aa", "rainbow"]),
    (("--recipe", "deot"), ["deot", "deit, digits, finetune, lape, vit2d_cifar"]),
    (("--resume", "nowhere.pth"), ["nowhere.pth"]),
    (("--eval",), ["--resume", "--pretrained"]),
    (("--model-kwargs", "depht=2"), ["depht=2", "unexpected keyword argument"]),
    (("--model-kwargs", "depth"), ["--model-kwargs", "KEY=VALUE", "'depth'"]),
    (("--model-kwargs", "drop_rate=0.1"), ["type --drop 0.1"]),
    (("--model-kwargs", "pe=none"), ["type --pe none"]),
    (("--model-kwargs", "checkpoint_path=x.pth"), ["checkpoint_path", "leave it out"]),
    (("--model-kwargs", "fc_norm=None"), ["fc_norm=None", "leave it out"]),
    (("--global-pool", "mean"), ["global_pool=mean", "avg"]),
    (("--pretrained",), ["--pretrained vit_compact_patch4_32", "none"]),
    (("--pretrained", "fb_in21k", "--model", "deit_tiny_patch16_224"), ["fb_in21k", "fb_in1k"]),
    (("--model", "deit_tiny_patch16_224.fb_in1k"), ["add --pretrained"]),
    (("--pretrained", "--finetune", "x.pth"), ["--pretrained and --finetune"]),
    (("--sched-one-epoch-late", "--sched", "plateau"), ["--sched-one-epoch-late", "plateau"]),
    (("--start-epoch", "2"), ["--start-epoch 2", "--epochs 2"]),
    (("--world-size", "3"), ["--world-size 3", "torchrun"]),
    (("--resplit",), ["unknown option --resplit", "leave it out"]),
    (("--eval-data-path", "x.tar"), ["--eval-data-path x.tar", "FOLDER"]),
]


@pytest.mark.parametrize(("flags", "words"), BAD_OPTIONS, ids=[" ".join(flags) for flags, _ in BAD_OPTIONS])
def test_bad_options_are_refused_in_one_line(
    flags: tuple[str, ...], words: list[str], tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--recipe", recipe, "--output_dir", tmp_path / "run", *flags) == 2
    line = refused(capsys)
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "run").exists()


MIXERS = {"mixup": ("--mixup", 1), "cutmix": ("--cutmix", 1), "box": ("--cutmix-minmax", 0.2, 0.8)}
LOSSES = {"one pass": (), "cosub": ("--cosub", "--bce-loss"), "accumulated": ("--accum-steps", 3)}


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_a_batch_without_pairs_is_refused_where_images_are_mixed_and_the_smallest_pair_is_not(
    mixer: tuple[object, ...],
    mode: str,
    tmp_path: Path,
    few_images: Path,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--recipe", recipe, "--data-path", few_images, *mixer, "--mixup-mode", mode, "--epochs", 1)
    for size in (1, 3):
        assert call(*flags, "--batch-size", size, "--output_dir", tmp_path / "run") == 2
        assert f"--batch-size {size} is odd: mixup and cutmix need pairs" in refused(capsys)
        assert not (tmp_path / "run").exists()
    assert call(*flags, "--batch-size", 2) == 0


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_without_pairs_trains_where_nothing_is_mixed(
    size: int, loss: tuple[object, ...], few_images: Path, recipe: Path
) -> None:
    assert call("--recipe", recipe, "--data-path", few_images, *loss, "--batch-size", size, "--epochs", 1) == 0


def test_a_folder_with_a_run_is_not_overwritten(
    tmp_path: Path, trained: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(trained)
    assert call("--recipe", recipe, "--output_dir", trained) == 2
    assert f"--resume {trained / 'checkpoint.pth'}" in refused(capsys)
    other = copy_of(trained, tmp_path)
    assert call("--resume", other / "checkpoint.pth", "--epochs", 3, "--output_dir", trained) == 2
    assert "holds a run already" in refused(capsys)
    assert contents(trained) == before


def test_an_output_dir_that_is_a_file_is_refused(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    assert call("--recipe", recipe, "--output_dir", tmp_path / "file") == 2
    assert "--output_dir" in refused(capsys)
    assert (tmp_path / "file").read_text() == "precious"


class Evil:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.touched}",)


def make_bad_checkpoint(kind: str, path: Path, good: Path) -> None:
    content = good.read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint\n" * 20)
        case "malicious":
            torch.save({"model": load(good)["model"], "args": Evil(path.with_name("touched"))}, path)
        case "of another model":
            other = load(good)
            del other["model"]["blocks.3.attn.qkv.weight"]
            other["model"]["head.weight"] = torch.zeros(5, 5)
            other["model"]["stem.weight"] = torch.zeros(1)
            torch.save(other, path)
        case "of other classes":
            other = load(good)
            other["description"]["num_classes"] = 5
            torch.save(other, path)
        case "of a later version":
            torch.save({**load(good), "version": 99}, path)
        case "without weights":
            torch.save({"epoch": 3}, path)


BAD_CHECKPOINTS = {
    "truncated": ["damaged"],
    "empty": ["damaged"],
    "text": ["no checkpoint"],
    "malicious": ["more than plain data"],
    "of another model": [
        "vit_compact_patch4_32",
        "LaPE",
        "head.weight is (5, 5), not (3, 128)",
        "qkv.weight is missing",
    ],
    "of other classes": ["5", "3 classes"],
    "of a later version": ["version 99"],
    "without weights": ["no state dict"],
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
@pytest.mark.parametrize("mode", ["--eval", "--no-pin-mem"])
def test_bad_checkpoints_are_refused_and_run_no_code(
    kind: str, mode: str, tmp_path: Path, trained: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pth"
    make_bad_checkpoint(kind, path, trained / "checkpoint.pth")
    before = contents(tmp_path)
    assert call(mode, "--resume", path, "--recipe", recipe, "--output_dir", tmp_path) == 2
    line = refused(capsys)
    assert [word for word in [str(path), *BAD_CHECKPOINTS[kind]] if word not in line] == []
    assert contents(tmp_path) == before


# ---- as a process


def start(*argv: object, launcher: tuple[str, ...] = (), **kwargs: object) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **kwargs,  # type: ignore[call-overload]
    )


def test_bad_input_ends_the_process_with_code_2_and_one_line(tmp_path: Path, recipe: Path) -> None:
    process = start("--recipe", recipe, "--pe", "foo", "--output_dir", tmp_path / "run", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    loading, error = err.splitlines()
    assert (loading, "foo" in error) == ("loading torch and timm", True)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("command", "argv"),
    [("main.py", ()), ("compare.py", ("--pe", "none", "--output-dir", "unused")), ("similarity_visualize.py", ())],
)
def test_ctrl_c_while_a_command_imports_its_libraries_ends_it_in_one_line(
    command: str, argv: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, ROOT / command, *argv],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        check=False,
    )
    _, interrupted = done.stderr.splitlines()
    assert (done.returncode, done.stdout, interrupted) == (130, "", f"{command}: interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_ends_it_in_one_line_with_whole_files(
    number: signal.Signals, tmp_path: Path, recipe: Path
) -> None:
    folder = tmp_path / "run"
    flags = ("--recipe", recipe, "--epochs", 500, "--num-workers", 1, "--output_dir", folder)
    process = start(
        *flags,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "curves.png").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # loader workers included, as a terminal, torchrun and SLURM do
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(err.splitlines())) == (128 + number, 2), err
    _, line = err.splitlines()  # the first says what is being loaded
    where = rf"interrupted by {number.name} in epoch \d+, after update \d of 4"
    assert re.fullmatch(rf"main.py: {where}; last checkpoint: (\S+); continue with --resume \1", line)
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))
    assert load(folder / "checkpoint.pth")["epoch"] >= 1


DISTILLED = ("--model", "deit_tiny_distilled_patch16_224", "--epochs", 1, "--teacher-model", "vit_compact_patch4_32")


def test_a_distilled_run_changes_with_its_teacher_and_is_resumed(
    tmp_path: Path, recipe: Path, few_images: Path, trained: Path
) -> None:
    def train_loss(folder: str, *flags: object) -> float:
        run = ("--recipe", recipe, "--data-path", few_images, *DISTILLED, "--teacher-path", trained / "checkpoint.pth")
        assert call(*run, *flags, "--output_dir", tmp_path / folder) == 0
        return log_of(tmp_path / folder)[0]["train_loss"]

    kinds = (("none",), ("hard",), ("soft",), ("hard", "--distillation-alpha", 0.1), ("soft", "--distillation-tau", 3))
    losses = [train_loss(str(index), "--distillation-type", *flags) for index, flags in enumerate(kinds)]
    assert len(set(losses)) == len(kinds)
    assert call("--resume", tmp_path / "1" / "checkpoint.pth", "--epochs", 2) == 0


@pytest.mark.parametrize("flags", [("--finetune",), (*DISTILLED, "--distillation-type", "hard", "--teacher-path")])
def test_other_checkpoints_that_would_run_code_are_refused(
    flags: tuple[str, ...], tmp_path: Path, recipe: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bad_checkpoint("malicious", tmp_path / "bad.pth", trained / "checkpoint.pth")
    assert call("--recipe", recipe, "--input-size", 32, *flags, tmp_path / "bad.pth") == 2
    assert "more than plain data" in refused(capsys)
    assert not (tmp_path / "touched").exists()


def test_a_process_whose_others_do_not_come_ends_in_one_line(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    flags = ("--device", "cpu", "--world-size", 2, "--init-timeout", 1)
    assert call("--recipe", recipe, *flags, "--dist-url", f"file://{tmp_path / 'meeting'}") == 2
    line = refused(capsys)
    assert "file://" in line
    assert "--init-timeout 1 s" in line


def test_two_processes_train_together_and_evaluate_exactly(tmp_path: Path, recipe: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    flags = ("--recipe", recipe, "--epochs", 1, "--batch-size", 6, "--device", "cpu", "--output_dir", tmp_path / "two")
    process = start(*flags, launcher=launcher)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "2 processes on cpu" in out
    assert out.count("epoch 1/1") == 1  # only one of them tells
    update = "12 images per update, 4 updates and 48 different images per epoch"
    assert update in out
    assert "learning rate at most 0.0001\n" in out

    (row,) = log_of(tmp_path / "two")
    assert call("--eval", "--resume", tmp_path / "two" / "checkpoint.pth", "--output_dir", tmp_path / "eval") == 0
    alone = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert alone["count"] == tiny_run.NUM_VAL
    assert row["test_acc1"] == alone["acc1"]
    assert row["test_loss"] == pytest.approx(alone["loss"], abs=1e-6)


# ---- places


def test_places_move_in_training_alone(tmp_path: Path, recipe: Path) -> None:
    moves = ("--pos-shift", "0.5", "--pos-jitter", "1.5", "--pos-rescale", "2")
    run = set_up("--recipe", recipe, "--pe", "rope_axial", *moves)
    drawn = run.model.augment_places
    assert (drawn.shift, drawn.jitter, drawn.rescale) == (0.5, 1.5, 2.0)
    assert call("--recipe", recipe, "--pe", "rope_axial", *moves, "--epochs", 1, "--output_dir", tmp_path) == 0
    assert not set_up("--eval", "--resume", tmp_path / "checkpoint.pth").model.augment_places.is_on


def test_places_of_an_encoding_that_rounds_do_not_move(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--recipe", recipe, "--pe", "relative", "--pos-shift", "0.5") == 2
    assert "pe='relative': it does not read places between cells" in refused(capsys)


def test_an_evaluation_at_another_size_may_keep_the_trained_grid_and_sharpen_attention(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--recipe", recipe, "--pe", "rope", "--epochs", 1, "--output_dir", tmp_path) == 0
    checkpoint = tmp_path / "checkpoint.pth"
    at_size = ("--eval", "--resume", checkpoint, "--input-size", 24)
    model = set_up(*at_size, "--reference-grid", "--log-n").model
    assert model.reference_grid == (4, 4)
    assert {block.attn.trained_tokens for block in model.blocks} == {model.num_prefix_tokens + 16}
    plain = set_up(*at_size).model
    assert (plain.reference_grid, plain.blocks[0].attn.trained_tokens) == (None, None)
    assert call("--eval", "--resume", checkpoint, "--log-n") == 2
    assert "--log-n is of an evaluation at another size" in refused(capsys)


def test_the_list_of_encodings_says_what_each_takes_and_adds(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--list-encodings", "--model", "vit_compact_patch4_32") == 0
    rows = {line.split("|")[1].strip(): line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert rows.keys() >= ENCODINGS.keys()
    assert [cell.strip() for cell in rows["learnable"][2:5]] == ["absolute", "", "8,192"]
    assert "rope_theta=100.0" in rows["rope_axial"][3]
