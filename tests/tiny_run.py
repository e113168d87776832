"""Images, options and calls so small that a whole run of `main.py` takes a second."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import main
import training.setup
from runtime.logs import LoopDisplay
from runtime.world import World

CLASSES = ("circle", "square", "triangle")
NUM_TRAIN, NUM_VAL = 16, 13  # per class, and a prime number in all

RECIPE = """
data-set: FOLDER
model: vit_compact_patch4_32
input-size: 16
batch-size: 12
num-workers: 0
train-crop: none
epochs: 2
lr: 1e-3
unscale-lr: true
warmup-epochs: 1
warmup-lr: 1e-4
"""


def make_images(
    folder: Path, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL, classes: Sequence[str] = CLASSES
) -> Path:
    """An ImageFolder tree of noisy 16 x 16 images, `num_train` per class and `num_val` in all; returns `folder`."""
    generator = np.random.default_rng(0)
    for index in range(len(classes) * num_train + num_val):
        split = "train" if index < len(classes) * num_train else "val"
        label = index % len(classes)
        pixels = generator.integers(0, 200, (16, 16, 3))
        pixels[4 * label : 4 * label + 4] += 55
        path = folder / split / classes[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def set_up(*argv: object) -> training.setup.Setup:
    """A run, ready to go."""
    return training.setup.set_up([str(token) for token in argv], World(), LoopDisplay(None))


def train(*argv: object) -> training.setup.Setup:
    """A run that has trained, with what it then holds."""
    run = set_up(*argv)
    assert run.training is not None
    assert main.train(run, run.training) == 0
    return run


def call(*argv: object) -> int:
    """The exit code of `main.py`."""
    return main.main([str(token) for token in argv])


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of a log without how fast they came."""
    timings = {"seconds", "images_per_second", "waiting_share", "making_seconds", "batches", "batches_made"}
    return [{key: value for key, value in row.items() if key not in timings} for row in log_of(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differences(a: object, b: object, at: str = "") -> list[str]:
    """Where two checkpoints differ by a bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for index in range(len(a)) for found in differences(a[index], b[index], f"{at}[{index}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [at]


def assert_same_run(one: Path, other: Path, *different_options: str) -> None:
    """Same checkpoints and same log, to the bit."""
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        a, b = load(one / name), load(other / name)
        for option in different_options:
            del a["config"][option], b["config"][option]
        assert differences(a, b) == []
    assert timeless(one) == timeless(other)


def as_original(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of ours as LaPE's own code would have written it."""
    description = checkpoint["description"]
    names = {f"join.norms.{layer}.": f"blocks.{layer}.pe_norm." for layer in range(12)}
    state_dict = {}
    for name, value in checkpoint["model"].items():
        prefix = next((ours for ours in names if name.startswith(ours)), None)
        state_dict[name.replace(prefix, names[prefix]) if prefix else name] = value
    args = argparse.Namespace(
        model=description["model"],
        pe=description["pe"],
        join_type=description["join_type"],
        nb_classes=description["num_classes"],
        input_size=description["input_size"],
        lr=5e-4,
        output_dir="result",
    )
    return {"model": state_dict, "optimizer": {}, "epoch": 299, "args": args}
