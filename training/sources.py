"""Flags of the source code bases that are said otherwise here; their models' names: `lape_vit.checkpoints`."""

import re
import shlex
from collections.abc import Collection, Sequence

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
