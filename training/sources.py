"""What the commands of the source code bases say that is said otherwise here: their flags, and their models' names."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

STARTER = {
    "--nodes": "--nodes={}",
    "--ngpus": "--gpus-per-node={}",
    "--timeout": "--time={}",
    "--partition": "--partition={}",
    "--comment": "--comment={}",
    "--use-volta32": "--constraint=volta32gb",
}
"""Flags of DeiT's `run_with_submitit.py`, and what SLURM's `sbatch` calls them."""
INSTEAD = {
    "--patch-size": "the patches are the model's: type --model-kwargs patch_size=N",
    "--model-path": "checkpoints go to the folder of --output_dir, too: leave --model_path out",
    "--load-model": "type --resume FILE, the checkpoint to continue from",
}
"""Other flags of the sources that have no counterpart, and what to do."""

LAYER_SCALE = {"init_values": 1e-4}
"""Of the models named `_LS`; those of timm, with which DeiT III's weights are fine-tuned, start at 1e-6."""
MODELS: dict[str, dict[str, Any]] = {
    f"deit_{name}_LS": {"model": f"deit3_{name}_224", "model_kwargs": LAYER_SCALE}
    for name in ("small_patch16", "medium_patch16", "base_patch16", "large_patch16", "huge_patch14")
}
MODELS |= {
    f"rope_{kind}_{ape}deit_{size}_patch16_LS": {
        **MODELS[f"deit_{size}_patch16_LS"],
        "pe": f"{'learnable+' if ape else ''}rope_{kind}",
    }
    for kind in ("axial", "mixed")
    for ape in ("", "ape_")
    for size in ("small", "base", "large")
}
"""Models of DeiT III's code and of RoPE-ViT's, by their names there: the options that make them here."""


def in_our_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """These options, with a model that has a source's name spelt out: the model, its encoding, and its arguments.

    Raises:
        ValueError: another encoding than the name's.
    """
    known = MODELS.get(values.get("model", ""))
    if known is None:
        return dict(values)
    pe = values.get("pe")
    if pe is not None and known.get("pe", pe) != pe:
        raise ValueError(
            f"--pe {pe} contradicts --model {values['model']}, which has {known['pe']}: give --model {known['model']}"
        )
    arguments = {**known["model_kwargs"], **(values.get("model_kwargs") or {})}
    return {**values, **known, "model_kwargs": arguments}


def advice(flag: str, words: Sequence[str], takes: Collection[str]) -> str | None:
    """What to type in place of an unknown flag of a source; None where it is of none.

    Args:
        words: of the command line, in whose flags `-` stands for `_`.
        takes: the known flags.
    """
    name = flag.partition("=")[0]
    if name in STARTER or name == "--job-dir":
        return f"is of DeiT's run_with_submitit.py: type {shlex.join(sbatch(words, takes))}"
    if name in INSTEAD:
        return INSTEAD[name]
    parts = apart(name, takes)
    return f"type {' '.join(parts)}, with a space" if len(parts) > 1 else None


def apart(word: str, takes: Collection[str]) -> list[str]:
    """The flags of a word such as `--repeated-aug--bce-loss`, as DeiT's README has it; else the word alone."""
    parts = re.split(r"(?<=\w)(?=--\w)", word)
    return parts if all(part in takes for part in parts) else [word]


def sbatch(words: Sequence[str], takes: Collection[str]) -> list[str]:
    """The command that gives to `slurm/train.sbatch` what DeiT's starter takes."""
    of_slurm, rest = [], []
    left = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while left:
        word = left.pop(0)
        if word not in STARTER:
            rest += ["--output-dir"] if word == "--job-dir" else apart(word, takes)
        elif "{}" not in STARTER[word]:
            of_slurm.append(STARTER[word])
        elif left:
            of_slurm.append(STARTER[word].format(left.pop(0)))
    return ["sbatch", *of_slurm, "slurm/train.sbatch", *rest]
