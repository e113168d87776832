"""The parts of `training`: options, recipe files, checkpoint files, seeds, optimisation, display, curves."""

import ast
import io
import json
import logging
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

import main
from engine import evaluate
from lape_vit.encodings import all_options
from lape_vit.from_checkpoint import load_weights
from runtime import distributed, interrupt, logs
from runtime.distributed import check_size, pick_device
from runtime.files import atomic_write
from runtime.interrupt import defer_interrupts, noted_signal
from runtime.logs import LoopDisplay, clock
from runtime.process import Runtime
from runtime.seeding import seed_everything
from runtime.tables import print_table
from runtime.world import World, world_from_environment
from training.checkpoint import load_checkpoint, save_checkpoint
from training.curves import draw_curves
from training.folder import read_log
from training.optimisation import (
    build_criterion,
    build_mixup,
    build_optimizer,
    build_scheduler,
    highest_rate,
    images_per_update,
    learning_rate,
)
from training.options import (
    OF_ONE_CALL,
    SECTIONS,
    OptimisationOptions,
    Options,
    build_parser,
    config_text,
    describe,
    find_recipe,
    flag_of,
    read_recipe,
)

ROOT = Path(__file__).resolve().parents[1]
PARSER = build_parser(all_options())


def options(**changed: Any) -> Options:
    assert changed.keys() <= PARSER.defaults.keys()
    return Options.of({**PARSER.defaults, "device": "cpu", "amp_dtype": "float32", **changed})


# ---- options


def test_every_option_is_read_somewhere() -> None:
    read = set()
    files = ("main", "engine", "datasets")
    rooms = (path for room in ("training", "loading") for path in (ROOT / room).glob("*.py"))
    for path in [*(ROOT / f"{file}.py" for file in files), *rooms]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id=section) | ast.Attribute(attr=section), attr=name, ctx=ast.Load()):
                    if section in SECTIONS or section == "wanted":
                        read.add(name)
                case ast.DictComp(
                    value=ast.Call(func=ast.Name(id="getattr")), generators=[ast.comprehension(iter=named)]
                ):
                    read |= {name.value for name in ast.walk(named) if isinstance(name, ast.Constant)}
                case ast.Constant(value=str(flag)) if flag in PARSER.flags:
                    read.add(PARSER.flags[flag])  # before the others are read
    assert PARSER.defaults.keys() - read == all_options().keys()  # which training/models.py reads as these very names


@pytest.mark.parametrize("name", PARSER.defaults)
def test_options_are_in_one_section_each_and_keep_their_values(name: str) -> None:
    value = object()
    chosen = options().changed(**{name: value})
    assert {other for other, found in chosen.by_name().items() if found is value} == {name}
    assert list(chosen.by_name()) == list(PARSER.defaults)


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        (int, ["--size", "-3"], -3),
        (float, ["--size", "-1e-5"], -1e-5),
        (float, ["--size=-.5"], -0.5),
        (str, ["--size", "large"], "large"),
        (bool, ["--size"], True),
        (bool, ["--no-size"], False),
    ],
)
def test_options_of_encodings_are_read_by_their_type(
    kind: type, words: list[str], value: object, tmp_path: Path
) -> None:
    parser = build_parser({"size": (kind, ["learnable"])})
    assert parser.read(words) == {"size": value}
    assert read_recipe(parser, recipe_file(tmp_path, f"size: {json.dumps(value)}")) == {"size": value}
    assert Options.of({**parser.defaults, "size": value}).model.encoding == {"size": value}


@pytest.mark.parametrize(("kind", "word"), [(int, "1.5"), (int, "many"), (float, "nan"), (float, "much"), (bool, "1")])
def test_options_of_encodings_of_another_type_are_refused_by_name(kind: type, word: str) -> None:
    with pytest.raises(ValueError, match="--size"):
        build_parser({"size": (kind, ["learnable"])}).read([f"--size={word}"])


@pytest.mark.parametrize(
    ("flag", "known"), [("--warmup-epoch", "--warmup-epochs"), ("--auto_augment", "main.py --help")]
)
def test_an_unknown_flag_is_refused_with_what_may_be_meant(flag: str, known: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"unknown option {flag.replace('_', '-')}.*{known}"):
        PARSER.read([flag, "3"])
    with pytest.raises(ValueError, match=f"unknown option '{flag[2:]}'.*{known}"):
        read_recipe(PARSER, recipe_file(tmp_path, f"{flag[2:]}: 3"))


def test_the_help_shows_each_flag_with_its_default() -> None:
    shown = PARSER.format_help()
    assert all(flag in shown for flag in PARSER.flags)
    assert shown.count("default:") == len(PARSER.defaults)
    assert max(map(len, shown.splitlines())) <= 110


def test_help_ends_with_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["--help"])
    assert end.value.code == 0
    assert "--join-type" in capsys.readouterr().out


@pytest.mark.parametrize("name", PARSER.defaults)
def test_each_flag_is_read_with_dashes_and_with_underscores(name: str) -> None:
    dashes = next(flag for flag, option in PARSER.flags.items() if option == name)
    underscores = "--" + dashes[2:].replace("-", "_")
    values = {
        "cutmix_minmax": ["0", "1"],
        "scale": ["0", "1"],
        "amp_dtype": ["float32"],
        "mixup_mode": ["pair"],
        "sched": ["tanh"],
    }
    values |= {"distillation_type": ["soft"], "pin_mem": [], "fast_crop": [], "model_kwargs": ["depth=1"]}
    value = values.get(name, [] if isinstance(PARSER.defaults[name], bool) else ["1"])
    assert PARSER.read([dashes, *value]) == PARSER.read([underscores, *value])
    assert PARSER.read([dashes, *value]).keys() == {name}


def test_only_what_is_given_is_read() -> None:
    assert PARSER.read([]) == {}
    given = {"lr": 0.1, "pe": "learn", "model_ema": False, "aa": None, "data_set": "cifar_10", "opt_betas": [0.9, 0.99]}
    flags = "--lr 1e-1 --pos_embed learn --no_model_ema --aa none --dataset cifar_10 --opt-betas 0.9 0.99"
    assert PARSER.read(flags.split()) == given


@pytest.mark.parametrize(
    "flags",
    ["--lr nan", "--lr inf", "--lr fast", "--mixup-prob 1.1", "--epochs 0", "--epochs 1.5", "--seed -1",
     "--clip-grad 0", "--sched linear", "--opt-betas", "--warmup 3", "lonely", "--eval=1", "--cutmix-minmax 0.1"],
)  # fmt: skip
def test_illegal_values_are_refused_by_name(flags: str) -> None:
    with pytest.raises(ValueError, match=flags.split("=")[0].split(" ")[0]):
        PARSER.read(flags.split())


def test_the_description_is_aligned_and_marks_what_was_given() -> None:
    chosen = options(lr=0.25, model_ema=True, opt_betas=[0.9, 0.99])
    text = describe(chosen, PARSER, {"lr": 0.25})
    assert "lr* 0.25" in text
    assert "model-ema on" in text
    assert "opt-betas 0.9 0.99" in text
    assert text.count("*") == 1
    assert max(map(len, text.splitlines())) <= 110
    starts = {len(line) - len(line[14:].lstrip()) for line in text.splitlines()}
    assert starts == {14}


# ---- recipe files


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


def test_a_recipe_takes_any_spelling_and_any_way_to_write_a_number(tmp_path: Path) -> None:
    text = (
        "batch_size: 8\nlr: 1e-3\ndataset: CIFAR\npos-embed: none\nopt-betas: [0.9, 1e-1]\nmodel-ema: true\ndrop: null"
    )
    assert read_recipe(PARSER, recipe_file(tmp_path, text)) == {
        "batch_size": 8,
        "lr": 0.001,
        "data_set": "CIFAR",
        "pe": "none",
        "opt_betas": [0.9, 0.1],
        "model_ema": True,
        "drop": None,
    }


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("batch-sise: 3", "batch-sise"),
        ("batch-size: many", "--batch-size"),
        ("batch-size: true", "--batch-size"),
        ("batch-size: null", "--batch-size"),
        ("batch-size: {a: 1}", "--batch-size"),
        ("model-ema: 1", "--model-ema"),
        ("no-model-ema: true", "no-model-ema"),
        ("model: [a, b]", "b"),
        ("sched: linear", "--sched"),
        ("output_dir: runs", "output_dir"),
        ("lr: 1\nbatch-size: 3\nbatch_size: 4", "batch_size"),
        ("- lr", "mapping"),
        ("lr: [", "YAML"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line_by_file_and_option(tmp_path: Path, text: str, word: str) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(ValueError, match=word) as error:
        read_recipe(PARSER, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.*deit, digits, finetune, lape, vit2d_cifar"):
        find_recipe("nothing")
    with pytest.raises(FileNotFoundError, match="gone"):
        find_recipe(str(tmp_path / "gone.yaml"))


def test_saved_options_read_back_as_they_were(tmp_path: Path) -> None:
    saved = {name: value for name, value in PARSER.defaults.items() if name not in OF_ONE_CALL}
    saved |= {"pe": "none", "lr": 1e-7, "opt_betas": [0.9, 0.95], "aa": None, "model_ema": True}
    text = config_text(saved, "main.py --lr 1e-7")
    assert "# main.py --lr 1e-7" in text.splitlines()
    assert read_recipe(PARSER, recipe_file(tmp_path, text)) == saved


# ---- processes and devices


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(5, 8, 1)


@pytest.mark.parametrize("name", ["toaster", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        pick_device(name, World())


def test_another_number_of_processes_than_asked_for_is_refused() -> None:
    check_size(None, World(0, 2, 0))
    check_size(2, World(1, 2, 0))
    with pytest.raises(ValueError, match=r"--world-size 2, but there are 1 process.*torchrun"):
        check_size(2, World())


def test_processes_meet_at_the_address_given(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'meeting'}"
    torch.multiprocessing.spawn(meet, (url,), nprocs=2)


def meet(rank: int, url: str) -> None:
    distributed.start(World(rank, 2, rank), torch.device("cpu"), url, 60.0)
    assert distributed.sum_over_ranks(torch.tensor([rank + 1])).item() == 3
    distributed.stop()


@pytest.mark.parametrize(
    ("environment", "warnings"),
    [
        ({}, 0),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, 0),
        ({"TORCHELASTIC_MAX_RESTARTS": "3"}, 1),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", distributed.UNSHARED_STORE: "1"}, 0),
    ],
)
def test_restarts_that_would_fail_are_told(
    environment: dict[str, str],
    warnings: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError):
        distributed.start(World(0, 2, 0), torch.device("cpu"), f"file://{tmp_path / 'meeting'}", 0.1)
    assert len([line for line in caplog.messages if f"{distributed.UNSHARED_STORE}=1" in line]) == warnings


def test_a_process_that_waits_in_vain_says_so_in_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path / 'meeting'}"
    with pytest.raises(ConnectionError, match=r"process 0 of 2 .*--dist-url file:.* --init-timeout 1 s"):
        distributed.start(World(0, 2, 0), torch.device("cpu"), url, 1.0)
    distributed.start(World(), torch.device("cpu"), url)
    assert "without effect" in caplog.text


def test_several_processes_may_not_share_one_gpu() -> None:
    with pytest.raises(ValueError, match="one GPU for 2 processes"):
        pick_device("cuda:0", World(0, 2, 0))


def test_a_process_that_fails_alone_says_who_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited: list[float] = []
    monkeypatch.setattr(main.time, "sleep", waited.append)
    assert main.main(["--epochs", "x"]) == 2
    assert capsys.readouterr().err.startswith("main.py: process 1: error: argument --epochs")
    assert waited  # for the main process to tell it, and torchrun to end this one


# ---- checkpoint files


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"new and half")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = {"model": {"weight": torch.arange(3.0)}, "epoch": 3, "config": {"lr": 0.1, "aa": None}}
    save_checkpoint(tmp_path / "some.pth", saved)
    loaded = load_checkpoint(str(tmp_path / "some.pth"))
    assert torch.equal(loaded["model"].pop("weight"), saved["model"].pop("weight"))  # type: ignore[attr-defined]
    assert loaded == {"format": "lape-vit", "version": 1, **saved}


def test_weights_that_do_not_fit_are_named_few_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    state = {**model.state_dict(), "0.weight": torch.zeros(3, 3), "extra": torch.zeros(1)}
    del state["1.bias"]
    with pytest.raises(
        ValueError, match=r"some.pth does not fit tiny: 0.weight is \(3, 3\), not \(2, 2\); 1.bias is missing"
    ):
        load_weights(model, state, "some.pth", "tiny")
    with pytest.raises(ValueError, match=r"; and 6 more$"):
        load_weights(model, {"extra": torch.zeros(1)}, "some.pth", "tiny")


# ---- seeds


def draw(seed: int, epoch: int, rank: int) -> tuple[float, float, float]:
    seed_everything(seed, epoch, rank)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_states_follow_seed_epoch_and_process() -> None:
    assert draw(1, 2, 3) == draw(1, 2, 3)
    draws = [draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(2, 1, 3)]
    for numbers in zip(*draws, strict=True):
        assert len(set(numbers)) == len(draws)


# ---- optimisation


class Exempting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 2))
        self.linear = nn.Linear(2, 2)

    def no_weight_decay(self) -> set[str]:
        return {"table"}


def test_weight_decay_spares_biases_and_what_the_model_exempts() -> None:
    model = Exempting()
    optimizer = build_optimizer(options(weight_decay=0.3).optimisation, model, 0.1)
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]]
    assert len(decayed) == 1
    assert decayed[0] is model.linear.weight


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "sgd", "lamb"])
def test_an_optimizer_is_fused_where_it_can_be(opt: str) -> None:
    model = Exempting()
    optimizer = build_optimizer(options(opt=opt).optimisation, model, 0.1)
    assert [group.get("fused", False) for group in optimizer.param_groups] == [opt != "lamb"] * 2
    before = model.linear.weight.detach().clone()
    model.linear(model.table).sum().backward()
    optimizer.step()
    assert not torch.equal(model.linear.weight, before)


def test_an_option_that_the_optimizer_does_not_have_is_told(caplog: pytest.LogCaptureFixture) -> None:
    build_optimizer(options(opt="sgd", opt_eps=1e-8, momentum=0.5).optimisation, Exempting(), 0.1)
    assert "sgd has no eps" in caplog.text
    assert "momentum" not in caplog.text


def test_the_learning_rate_is_scaled_by_the_images_per_update() -> None:
    def rate(**changes: Any) -> float:
        chosen = options(lr=0.5, batch_size=64, **changes)
        return learning_rate(chosen.optimisation, images_per_update(chosen.data, chosen.optimisation, 4))

    assert (rate(), rate(accum_steps=2), rate(unscale_lr=True)) == (0.25, 0.5, 0.5)


SHAPES = [
    ({"sched": "step", "decay_epochs": 2, "decay_rate": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
    ({"sched": "poly", "decay_rate": 1.0}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ({"sched": "poly", "decay_rate": 1.0, "cooldown_epochs": 3}, [1, 2 / 3, 1 / 3, 0, 0, 0]),
    ({"sched": "cosine", "cooldown_epochs": 4}, [1, 0.5, 0, 0, 0, 0]),
    # the accuracy grows up to the third epoch
    ({"sched": "plateau", "patience_epochs": 0, "decay_rate": 0.5}, [1, 1, 1, 1, 0.5, 0.25]),
    ({"sched": "plateau", "patience_epochs": 1, "decay_rate": 0.5}, [1, 1, 1, 1, 1, 0.5]),
    ({"sched": "plateau", "patience_epochs": 0, "decay_rate": 0.5, "min_lr": 0.4}, [1, 1, 1, 1, 0.5, 0.4]),
]


def schedule_of(optimisation: OptimisationOptions, lr: float = 1.0, seed: int = 0) -> tuple[Optimizer, Scheduler]:
    """An optimizer and its schedule of ten updates an epoch."""
    optimizer = build_optimizer(optimisation, Exempting(), lr)
    return optimizer, build_scheduler(optimisation, optimizer, 10, seed)


def rates_of(chosen: Options) -> list[float]:
    """The learning rate of each epoch."""
    optimizer, scheduler = schedule_of(chosen.optimisation, seed=chosen.run.seed)
    rates = []
    for epoch in range(chosen.optimisation.epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1, min(epoch, 2))
    return rates


@pytest.mark.parametrize(("changes", "expected"), SHAPES)
def test_a_schedule_follows_its_options(
    changes: dict[str, Any], expected: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    rates = rates_of(options(epochs=6, warmup_epochs=0, **changes))
    assert rates == pytest.approx(expected, abs=1e-3)
    assert caplog.messages == []


def test_noise_is_where_it_should_be_as_large_as_it_may_be_and_repeats() -> None:
    def noise(**changes: Any) -> list[float]:
        common = {"sched": "constant", "epochs": 10, "warmup_epochs": 0, "lr_noise": [0.2, 0.8]}
        return [rate - 1 for rate in rates_of(options(**{**common, **changes}))]

    first = noise()
    assert [value == 0 for value in first] == [True] * 2 + [False] * 6 + [True] * 2
    assert [value == 0 for value in noise(lr_noise=[0.2])] == [True] * 2 + [False] * 8
    assert noise() == first
    assert noise(seed=1) != first
    assert 0 < max(map(abs, noise(lr_noise_std=0.001))) < 0.01
    assert 0.01 < max(map(abs, noise(lr_noise_pct=0.02))) < 0.02


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"decay_epochs": 3}, "--decay-epochs 3 is without effect under --sched cosine"),
        ({"sched": "step", "min_lr": 1e-4}, "--min-lr 0.0001 is without effect under --sched step"),
        ({"warmup_epochs": 0, "warmup_lr": 1e-4}, "--warmup-lr 0.0001 is without effect without --warmup-epochs"),
        ({"decay_rate": 0.5}, "--decay-rate 0.5 is without effect under --sched cosine"),
        ({"patience_epochs": 3, "sched": "step"}, "--patience-epochs 3 is without effect under --sched step"),
        ({"cooldown_epochs": 3, "sched": "plateau"}, "--cooldown-epochs 3 is without effect under --sched plateau"),
        ({"lr_noise_std": 1.0}, "--lr-noise-std 1 is without effect without --lr-noise"),
        ({"lr_noise_pct": 0.5}, "--lr-noise-pct 0.5 is without effect without --lr-noise"),
    ],
)
def test_an_option_that_the_schedule_does_not_look_at_is_told(
    changes: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    rates_of(options(epochs=6, **changes))
    assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sched": "plateau", "sched_on_updates": True}, "--sched-on-updates"),
        ({"cooldown_epochs": 6}, "--cooldown-epochs 6"),
        ({"lr_noise": [0.8, 0.2]}, "--lr-noise"),
        ({"lr_noise": [0.2, 0.4, 0.8]}, "--lr-noise"),
    ],
)
def test_options_of_a_schedule_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rates_of(options(epochs=6, **changes))


@pytest.mark.parametrize(
    ("sched", "expected"),
    [("cosine", [0.1, 0.55, 0.505, 0.155]), ("constant", [0.1, 0.55, 1, 1]), ("tanh", [0.1, 0.541, 0.982, 0.276])],
)
def test_the_schedule_warms_up_and_then_takes_its_shape(sched: str, expected: list[float]) -> None:
    chosen = options(sched=sched, epochs=4, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    optimizer, scheduler = schedule_of(chosen.optimisation)
    rates = []
    for epoch in range(4):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, rel=0.01)


def test_a_schedule_by_updates_changes_between_them() -> None:
    chosen = options(epochs=4, warmup_epochs=2, warmup_lr=0.0, sched_on_updates=True)
    optimizer, scheduler = schedule_of(chosen.optimisation)
    rates = []
    for update in (0, 1, 5, 20, 40):
        scheduler.step(update // 10)
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0, 0.05, 0.25, 0.5, 1e-5], abs=1e-4)


PEAKS: list[dict[str, Any]] = [
    *(changes for changes, _ in SHAPES),
    *({"sched": sched, "warmup_epochs": 2} for sched in ("cosine", "tanh", "poly", "step", "constant")),
    {"min_lr": 2.0},  # which the schedule rises to
    {"min_lr": 2.0, "cooldown_epochs": 2},
    {"warmup_epochs": 2, "warmup_lr": 3.0},  # which it falls from
    {"start_epoch": 3},
]


@pytest.mark.parametrize(
    "changes",
    [*PEAKS, *({**changes, "sched_on_updates": True} for changes in PEAKS if changes.get("sched") != "plateau")],
    ids=str,
)
def test_the_highest_rate_is_that_of_all_updates(changes: dict[str, Any]) -> None:
    optimisation = options(**{"epochs": 6, "warmup_epochs": 0, **changes}).optimisation
    optimizer, scheduler = schedule_of(optimisation)
    rates = []
    for update in range(10 * optimisation.start_epoch, 10 * optimisation.epochs):
        if update % 10 == 0:
            scheduler.step(update // 10, update)
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert highest_rate(optimisation, 1.0, 10) == max(rates)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({}, "--min-lr 1e-05"),
        ({"unscale_lr": True, "lr": 3e-6}, "--min-lr 1e-05"),
        ({"min_lr": 1e-6, "warmup_lr": 1e-5}, "--warmup-lr 1e-05"),
        ({"min_lr": 1e-6}, None),
        ({"sched": "step"}, None),
    ],
)
def test_an_unscaled_rate_above_the_scaled_one_is_told(
    changes: dict[str, Any], flag: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    schedule_of(options(epochs=20, **changes).optimisation, lr=3.125e-6)
    assert [line.split(" lies above the learning rate 3.125e-06")[0] for line in caplog.messages] == [flag] * bool(flag)


def test_the_loss_is_the_one_of_the_labels_at_hand() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    plain = nn.functional.cross_entropy(logits, labels)
    smoothed = nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert torch.allclose(build_criterion(options().optimisation, None)(logits, labels), plain)
    assert torch.allclose(build_criterion(options(smoothing=0.3).optimisation, None)(logits, labels), smoothed)

    chosen = options(mixup=1.0, mixup_prob=0.0, smoothing=0.3)  # mixes nothing, and makes the labels soft
    mixup = build_mixup(chosen.augmentation, 0.3, 64, 3)
    assert mixup is not None
    _, targets = mixup(torch.zeros(4, 3, 2, 2), labels)
    assert torch.allclose(build_criterion(chosen.optimisation, mixup)(logits, targets), smoothed)
    assert build_mixup(options().augmentation, 0.3, 64, 3) is None


def test_binary_cross_entropy_takes_every_class_of_a_mixed_image_as_right() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    right = nn.functional.one_hot(labels, 3).float()
    plain = nn.functional.binary_cross_entropy_with_logits(logits, right)
    assert torch.allclose(build_criterion(options(bce_loss=True).optimisation, None)(logits, labels), plain)

    chosen = options(bce_loss=True, mixup=1.0)
    mixup = build_mixup(chosen.augmentation, 0.0, 64, 3)
    both = nn.functional.binary_cross_entropy_with_logits(logits, right.maximum(right.flip(0)))
    assert torch.allclose(build_criterion(chosen.optimisation, mixup)(logits, 0.3 * right + 0.7 * right.flip(0)), both)
    with pytest.raises(ValueError, match=r"--smoothing 0\.1 .* --bce-loss"):
        build_criterion(options(bce_loss=True, smoothing=0.1).optimisation, None)


# ---- evaluation


class Echo(nn.Module):
    """Logits that are the image's first pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, : self.classes]


def loader_of(images: torch.Tensor, labels: torch.Tensor) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)


CPU = Runtime(World(), torch.device("cpu"), torch.float32, LoopDisplay(None))


@pytest.mark.parametrize("classes", [3, 12])
def test_evaluation_counts_every_image_once(classes: int) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(7, 3, 2, 2), torch.randint(0, classes, (7,))
    result = evaluate(Echo(classes), loader_of(images, labels), 7, CPU, "test")
    logits = images.flatten(1)[:, :classes]
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result == {
        "acc1": 100 * (ranks < 1).sum().item() / 7,
        "acc5": 100 * (ranks < 5).sum().item() / 7,
        "loss": pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6),
        "count": 7,
    }


def test_evaluation_of_another_number_of_images_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="7 images were evaluated in place of 8"):
        evaluate(Echo(3), loader_of(torch.randn(7, 3, 2, 2), torch.zeros(7).long()), 8, CPU, "test")


# ---- display


def show(console: Console | None, monkeypatch: pytest.MonkeyPatch, seconds_per_step: float) -> int:
    """A loop of 20 steps on a clock of our own; how often its status was asked for."""
    now = [100.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    asked = []

    def status() -> list[str]:
        asked.append(now[0])
        return ["loss 1.2500", "[x]"]

    def slow_batches() -> Iterator[None]:
        for _ in range(20):
            now[0] += 0.25 * seconds_per_step
            yield

    with LoopDisplay(console, num_ranks=2).show("epoch 1/2", 20) as loop:
        for _ in loop.batches(slow_batches()):
            now[0] += 0.75 * seconds_per_step
            loop.advance(8, status)
    return len(asked)


def test_a_terminal_gets_a_bar_with_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, file=io.StringIO(), width=120)
    assert show(console, monkeypatch, 0.1) < 12  # asking for the status makes the device wait
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    for part in ("epoch 1/2", "20/20", "loss 1.2500  [x]", "160 images/s", "25 % waiting for data", "0:00 left"):
        assert part in drawn


@pytest.mark.parametrize(("width", "others"), [(28, 0), (50, 1), (80, 4), (120, 5)])
def test_the_bar_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int, others: int) -> None:
    console = Console(force_terminal=True, file=io.StringIO(), width=width)
    show(console, monkeypatch, 0.1)
    assert isinstance(console.file, io.StringIO)
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()))
    assert max(map(len, frames)) <= width
    last = [frame for frame in frames if frame.strip()][-1]
    for part in ("━", "20/20", "0:00 left"):
        assert part in last
    parts = ("epoch 1/2", "loss 1.2500", "[x]", "160 images/s", "25 % waiting for data")
    assert [part in last for part in parts] == [number < others for number in range(5)]


@pytest.mark.parametrize("width", [10, 25, 60])
def test_a_line_breaks_between_fields_alone(width: int) -> None:
    line = "epoch 1/3  train loss 2.3026  acc@1 12.34 %  /a/long path/of a file  0:12 left"
    lines = logs.break_between_fields(line, width).splitlines()
    assert [part for text in lines for part in text.strip().split("  ")] == line.split("  ")
    assert all(len(text) <= width or "  " not in text.strip() for text in lines)
    assert logs.break_between_fields(line, len(line)) == line


def test_elsewhere_a_long_loop_gets_ten_lines_and_a_short_one_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    console = Console(force_terminal=False, file=io.StringIO())
    show(console, monkeypatch, 0.01)
    assert caplog.messages == []
    show(console, monkeypatch, 10)
    assert len(caplog.messages) == 10
    assert caplog.messages[4] == "epoch 1/2  10/20  loss 1.2500  [x]  2 images/s  25 % waiting for data  1:40 left"


def test_an_activity_is_told_at_once_and_later_ones_in_their_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = [100.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    with logs.show_activity(Console(force_terminal=False, file=io.StringIO()), "drawing") as show:
        assert caplog.messages == ["drawing"]
        for number in range(12):
            now[0] += 1
            show(f"drawing {number}")
    assert caplog.messages == ["drawing", "drawing 4", "drawing 9"]


def test_on_a_terminal_an_activity_leaves_no_line_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = Console(force_terminal=True, file=io.StringIO(), width=80)
    with logs.show_activity(console, "drawing") as show:
        show("drawing [b] of c")
    assert isinstance(console.file, io.StringIO)
    assert "drawing [b] of c" in console.file.getvalue()
    assert console.file.getvalue().endswith("\x1b[1A\x1b[2K")
    assert caplog.messages == []


def test_other_processes_show_nothing_but_look_at_the_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    assert show(None, monkeypatch, 10) == 10
    assert caplog.messages == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_piped_output_has_no_escapes_whatever_the_environment_says(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "1")  # as notebooks and CI do
    console = logs.start_logging(is_main=True)
    show(console, monkeypatch, 10)
    print_table(console, "title", [{"name": "a"}], ["name"])
    out = capsys.readouterr().out
    assert "epoch 1/2  20/20" in out
    assert "\x1b" not in out


def test_log_lines_come_without_markup_and_wrapping(capsys: pytest.CaptureFixture[str]) -> None:
    logs.start_logging(is_main=True)
    logging.getLogger("some").info("[bold]%s", "word " * 40)
    logging.getLogger("some").warning("careful")
    logs.start_logging(is_main=False)
    logging.getLogger("some").info("other process")
    assert capsys.readouterr().out.splitlines() == ["[bold]" + "word " * 40, "warning: careful"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_times_are_shown_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# ---- curves


def row(epoch: int) -> dict[str, float]:
    return {
        "epoch": epoch,
        "train_loss": 2 / epoch,
        "test_loss": 2.5 / epoch,
        "test_acc1": 90 - 9 / epoch,
        "test_acc5": 99,
    }


def with_average(epoch: int) -> dict[str, float]:
    return {**row(epoch), "test_ema_loss": 3 / epoch, "test_ema_acc1": 80 - 9 / epoch, "test_ema_acc5": 98}


def draw_to_pixels(rows: list[dict[str, float]]) -> np.ndarray:
    file = io.BytesIO()
    draw_curves(rows, file, "a model")
    return np.asarray(Image.open(file).convert("RGB"))


def test_curves_are_drawn_from_the_first_epoch_on() -> None:
    pictures = [
        draw_to_pixels([make(epoch) for epoch in range(1, epochs + 1)])
        for make, epochs in ((row, 1), (row, 5), (with_average, 5), (row, 100))
    ]
    assert {picture.shape for picture in pictures} == {pictures[0].shape}
    for index, picture in enumerate(pictures):
        assert picture.std() > 5
        assert not any(np.array_equal(picture, other) for other in pictures[:index])


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_a_repeated_one_is_ignored(number: signal.Signals) -> None:
    usual = signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    try:
        with defer_interrupts():
            assert noted_signal() == 0
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert noted_signal() == number
        assert signal.getsignal(number) is not None
        assert interrupt.Interrupted(number).exit_code == 128 + number
        with defer_interrupts():
            assert noted_signal() == 0  # the next run starts afresh
    finally:
        signal.signal(number, usual)


def test_a_second_ctrl_c_a_while_later_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "SECONDS_UNTIL_IMPATIENT", -1)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with defer_interrupts():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert noted_signal() == 0
    finally:
        signal.signal(signal.SIGINT, usual)


SIGNAL_BETWEEN_TWO_LOADERS = """
import os, signal, time
from runtime.interrupt import defer_interrupts, hold_signals, noted_signal

with defer_interrupts():
    with hold_signals():
        pass
    os.killpg(0, signal.{name})
    time.sleep(0.5)
    with hold_signals():
        pass
    assert noted_signal() == signal.{name}
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGALRM"])
def test_a_signal_to_all_processes_ends_none_that_a_loader_needs(name: str) -> None:
    """Python's resource tracker is one; if it has ended, the next loader warns and starts another."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_BETWEEN_TWO_LOADERS.format(name=name)],
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- the log


def test_a_damaged_log_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert read_log(path, 3) == []
    path.write_text(json.dumps({"epoch": 1}) + '\n{"epo')
    with pytest.raises(ValueError, match=r"log\.txt is damaged"):
        read_log(path, 3)


def test_flags_are_named_as_they_are_typed() -> None:
    assert all(flag_of(name) in PARSER.flags for name in PARSER.defaults)
