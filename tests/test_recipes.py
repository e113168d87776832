"""The recipe files: each is legal, says where it comes from, and is what its data sets train with."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import training.setup
from datasets import DATA_SETS
from lape_vit.encodings import all_options
from training.options import RECIPES, build_parser, read_recipe

FILES = sorted(RECIPES.glob("*.yaml"))
PARSER = build_parser(all_options())


def resolve(command: str) -> dict[str, Any]:
    """The options of a command line."""
    given = PARSER.read(shlex.split(command.split("main.py", 1)[1]))
    if "data_set" in given:
        given["data_set"] = training.setup.canonical_data_set(given["data_set"])
    return training.setup.resolve_options(
        PARSER, given, training.setup.pick_recipe(PARSER, given, {}), {}, {}
    ).by_name()


def header(path: Path) -> str:
    """The opening comment, its marks taken off and its continued lines joined."""
    lines = path.read_text().splitlines()
    comment = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    return "\n".join(comment).replace("\\\n", "")


def commands(path: Path) -> list[str]:
    return [line[line.index("main.py") :].split("  ")[0] for line in header(path).splitlines() if "main.py" in line]


def test_every_data_set_has_its_recipe() -> None:
    names = {path.stem for path in FILES}
    assert {data_set.recipe for data_set in DATA_SETS.values()} <= names
    assert {"deit", "digits", "vit2d_cifar"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_legal_and_tells_source_command_result_and_time(path: Path) -> None:
    assert read_recipe(PARSER, path)
    assert re.findall(r"^(Source|Command|Result|Time)\b", header(path), re.MULTILINE) == [
        "Source",
        "Command",
        "Result",
        "Time",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_run_it(path: Path) -> None:
    assert commands(path)
    for command in commands(path):
        assert resolve(command)["recipe"] == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_can_be_named_alone_and_leaves_no_choice_to_the_defaults(path: Path) -> None:
    assert resolve(f"main.py --recipe {path.stem}")["recipe"] == path.stem
    told = read_recipe(PARSER, path)
    must_tell = {
        "data_set",
        "model",
        "batch_size",
        "epochs",
        "opt",
        "lr",
        "weight_decay",
        "sched",
        "warmup_epochs",
        "min_lr",
    }
    must_tell |= {"train_crop", "hflip", "eval_crop_ratio"}
    assert must_tell <= told.keys()


def test_the_command_of_lape_trains_as_deit_does() -> None:
    options = resolve(
        "main.py --model deit_tiny_patch16_224 --batch-size 256 --data-path D --output_dir O --join-type LaPE"
    )
    expected = {
        "data_set": "IMNET",
        "model": "deit_tiny_patch16_224",
        "join_type": "LaPE",
        "batch_size": 256,
        "data_path": "D",
        "output_dir": "O",
        "input_size": 224,
        "epochs": 300,
        "opt": "adamw",
        "opt_eps": 1e-8,
        "lr": 5e-4,
        "unscale_lr": False,
        "weight_decay": 0.05,
        "sched": "cosine",
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "smoothing": 0.1,
        "aa": "rand-m9-mstd0.5-inc1",
        "mixup": 0.8,
        "cutmix": 1.0,
        "reprob": 0.25,
        "remode": "pixel",
        "repeated_aug": True,
        "model_ema": True,
        "model_ema_decay": 0.99996,
        "drop_path": 0.1,
        "train_crop": "random-resized",
        "train_interpolation": "bicubic",
        "recipe": "deit",
    }
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(("name", "data_set"), [("cifar10", "CIFAR10"), ("CIFAR", "CIFAR100")])
def test_the_command_of_the_compact_vit_trains_as_it_does(name: str, data_set: str) -> None:
    options = resolve(f"main.py --dataset {name} --pos_embed sinusoidal")
    expected = {
        "data_set": data_set,
        "model": "vit_compact_patch4_32",
        "pe": "2D_sin",
        "input_size": 32,
        "epochs": 200,
        "warmup_epochs": 10,
        "batch_size": 128,
        "opt": "adamw",
        "lr": 5e-4,
        "unscale_lr": True,
        "weight_decay": 1e-3,
        "sched": "cosine",
        "min_lr": 1e-5,
        "train_crop": "pad",
        "hflip": 0.5,
        "aa": "torchvision",
        "mixup": 0,
        "cutmix": 0,
        "cutmix_minmax": None,
        "smoothing": 0,
        "reprob": 0,
        "model_ema": False,
        "repeated_aug": False,
        "drop_path": 0,
        "recipe": "vit2d_cifar",
    }
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--pos_embed none", {"pe": "none"}),
        ("--pos_embed learn", {"pe": "learnable"}),
        ("--pos_embed rope", {"pe": "rope"}),
        ("--pos_embed relative --max_relative_distance 2", {"pe": "relative", "max_relative_distance": 2}),
    ],
)
def test_each_encoding_of_the_compact_vit_has_its_command(flags: str, expected: dict[str, object]) -> None:
    options = resolve(f"main.py --dataset cifar10 {flags}")
    expected = {"model": "vit_compact_patch4_32", "recipe": "vit2d_cifar", **expected}
    assert {name: options[name] for name in expected} == expected
