"""Every command that the READMEs and scripts of the sources print runs as it stands, or says what to type instead."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import main
import similarity_visualize
import training.setup
from lape_vit.checkpoints import MODELS
from lape_vit.encodings import all_options
from loading.transforms import build_transform
from training.models import build_model
from training.optimisation import build_criterion, build_mixup
from training.options import Options, build_parser

PARSER = build_parser(all_options())
LINES = (Path(__file__).parent / "sources.tsv").read_text().splitlines()
STARTER = r"--(nodes|ngpus|use_volta32)\b"
"""Flags of DeiT's own starter for SLURM."""


def commands(program: str) -> list[str]:
    """The commands of `program` that the sources print, each once."""
    found = [line.split("\t")[1] for line in LINES]
    return sorted({command for command in found if command.startswith(program)})


def is_refused(command: str) -> bool:
    return re.search(f"{STARTER}|huggingface", command) is not None


COMMANDS = commands("main.py") + commands("run_with_submitit.py")
ACCEPTED = [command for command in COMMANDS if not is_refused(command)]
REFUSED = [command for command in COMMANDS if is_refused(command)]


def words(command: str) -> list[str]:
    """What follows the program, with a name for the one that a README leaves open."""
    return shlex.split(command.replace("${model_name}", "rope_mixed_deit_small_patch16_LS"))[1:]


def resolve(*argv: str) -> Options:
    """The options of a run whose checkpoints, if it names any, say nothing of the model."""
    given = training.setup.read_given(PARSER, argv)
    return training.setup.resolve_options(PARSER, given, training.setup.pick_recipe(PARSER, given, {}), {}, {})


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line by which `main.py` refuses a command."""
    assert main.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("main.py: error: ")


def test_the_list_has_commands_of_each_source_and_program() -> None:
    assert {line.partition("/")[0] for line in LINES} == {
        "2D-Positional-Encoding-Vision-Transformer", "LaPE", "deit", "rope-vit"
    }  # fmt: skip
    assert len(ACCEPTED) > 20
    assert len(REFUSED) > 10
    assert len(COMMANDS) + len(commands("similarity_visualize.py")) == len({line.split("\t")[1] for line in LINES})


@pytest.mark.parametrize("command", ACCEPTED)
def test_a_command_of_the_sources_is_understood_and_its_options_go_together(command: str) -> None:
    options = resolve(*words(command))
    optimisation, augmentation = options.optimisation, options.augmentation
    mixup = build_mixup(augmentation, optimisation.smoothing, options.data.batch_size, 10)
    build_criterion(optimisation, mixup)
    build_transform(True, training.setup.image_settings(options, {}), False)


@pytest.mark.parametrize("command", REFUSED)
def test_any_other_is_refused_in_one_line_that_says_what_to_type(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *words(command))
    if "huggingface" in command:
        assert "--finetune https://huggingface.co/naver-ai/" in line
    else:
        match = re.search(r"type sbatch ((?:--\S+ )*)slurm/train\.sbatch (.*)", line)
        assert match is not None
        assert resolve(*shlex.split(match[2]))
        assert re.findall(r"--nodes=(\d+)", match[1]) == re.findall(r"--nodes (\d+)", command)
        assert re.findall(r"--gpus-per-node=(\d+)", match[1]) == re.findall(r"--ngpus (\d+)", command)


@pytest.mark.parametrize("command", [*commands("similarity_visualize.py"), "similarity_visualize.py"])
def test_the_pictures_are_asked_for_as_in_the_source(command: str) -> None:
    args = similarity_visualize.read_options(words(command))
    assert args.ckpt_path == "result/deit_t_LaPE/best_checkpoint.pth"
    assert args.save_dir == "visualize/similarity"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataset cifar100 --n_classes 100", {"data_set": "CIFAR100", "num_classes": 100}),
        ("--nb-classes 1000", {"num_classes": 1000}),
        ("--num-classes 1000", {"num_classes": 1000}),
        ("--n_workers 3", {"num_workers": 3}),
        ("--output_path outputs", {"output_dir": "outputs"}),
        ("--image_size 64", {"input_size": 64}),
        ("--img-size 64", {"input_size": 64}),
        ("--batch 32", {"batch_size": 32}),
        ("-b 32", {"batch_size": 32}),
        ("--dr 0.5", {"decay_rate": 0.5}),
        ("--opt-betas 0.9 0.95", {"opt_betas": [0.9, 0.95]}),
        ("--distributed", {"distributed": True}),
        ("--finetune F --eval", {"resume": "F", "finetune": None}),
    ],
)
def test_a_flag_of_the_sources_means_what_it_meant(words: str, expected: dict[str, Any]) -> None:
    options = resolve(*words.split()).by_name()
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--patch_size 4", "type --model-kwargs patch_size=N"),
        ("--repeated-aug--bce-loss", "type --repeated-aug --bce-loss, with a space"),
        ("--load_model True", "type --resume FILE"),
        ("--model_path ./model", "leave --model_path out"),
        ("--pos_embed rope", "add --data-set CIFAR10"),
        ("--distributed --data-set DIGITS", "torchrun"),
        ("--data-set DIGITS --nb-classes 100", "DIGITS has 10 classes"),
        ("--model rope_mixed_deit_small_patch16_LS --pe rope_axial", "give --model deit3_small_patch16_224"),
        ("--job_dir=runs/a --partition=learn --lr=1e-3",
         "sbatch --partition=learn slurm/train.sbatch --output-dir runs/a --lr 1e-3"),
    ],
)  # fmt: skip
def test_a_flag_that_means_nothing_here_is_refused_with_what_to_do(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, *words.split())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_sources_is_built_under_its_name(name: str) -> None:
    size = 56 if "patch14" in name else 64
    options = resolve("--model", name, "--model-kwargs", "depth=1", "--input-size", str(size))
    model, _ = build_model(options, 5, size)
    kind = re.match("(rope_[a-z]+)_(ape_)?deit", name)
    parts = [] if kind is None else [kind[1]] if kind[2] is None else ["learnable", kind[1]]
    assert model.pe == ("+".join(parts) or "learnable")
    assert model.blocks[0].ls1.gamma.detach().unique().tolist() == pytest.approx([1e-4])
