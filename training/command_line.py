"""The command line of `main.py`, and all that can be wrong with it alone, found without torch: in a moment."""

from collections.abc import Sequence
from typing import Any

from runtime.download import is_url
from training.catalogue import encoding_options, encodings_by_family, join_names
from training.options import OptionParser, build_parser, find_recipe, flag_of, read_recipe, with_dashes

CHOOSES_DATA = {"data_set", "recipe", "resume", "auto_resume", "finetune"}
"""Options that choose a data set, or that no code base without a choice of data sets has."""


def parser_of_main() -> OptionParser:
    """The parser of `main.py`, with the options of all encodings."""
    return build_parser(encoding_options(), {"pe": encodings_by_family(), "join_type": ", ".join(join_names())})


def check_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """The options that a command line of `main.py` names; the recipe, if it names one, can be read, too.

    Raises:
        SystemExit: the help was asked for, and has been printed.
        ValueError, OSError: something is wrong with it, or with the recipe.
    """
    parser = parser_of_main()
    if "--list-encodings" in map(with_dashes, argv):
        return parser.read(argv)
    given = read_flags(parser, argv)
    if "recipe" in given:
        read_recipe(parser, find_recipe(given["recipe"]))
    return given


def read_flags(parser: OptionParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that a command line names.

    Raises:
        ValueError: an unknown flag, an illegal value, or flags that contradict each other.
    """
    given = parser.read(argv)
    if any(with_dashes(word).partition("=")[0] == "--pos-embed" for word in argv) and not CHOOSES_DATA & given.keys():
        raise ValueError(
            "--pos_embed without a data set means CIFAR-10 in its source, and ImageNet here: add --data-set CIFAR10 or "
            "--data-set IMNET"
        )
    if given.get("finetune") == "huggingface":
        raise ValueError(
            "--finetune huggingface: give the file, "
            "--finetune https://huggingface.co/naver-ai/NAME/resolve/main/pytorch_model.bin#sha256=HASH"
        )
    if given.get("eval") and "resume" not in given and "finetune" in given:  # as RoPE-ViT evaluates
        given["resume"] = given.pop("finetune")
    starts = {name for name in ("finetune", "pretrained", "resume") if given.get(name) is not None}
    if given.get("eval") and not {"resume", "pretrained"} & starts:
        raise ValueError("--eval needs --resume FILE, the checkpoint to evaluate, or --pretrained")
    if given.get("eval_ema") and not given.get("eval"):
        raise ValueError("--eval-ema says what --eval evaluates: give both")
    for name in ("reference_grid", "log_n"):
        if given.get(name) and not ("input_size" in given and given.get("eval")):
            raise ValueError(f"{flag_of(name)} is of an evaluation at another size: give --eval and --input-size, too")
    if "pretrained" in starts and (others := starts - {"pretrained"}):
        raise ValueError(f"--pretrained and {flag_of(min(others))} both say what to start from: give one of them")
    if {"finetune", "resume"} <= starts:
        raise ValueError("--finetune starts a run and --resume continues one: give one of them")
    if "start_epoch" in given and ("resume" in given or given.get("auto_resume")):
        raise ValueError("--start-epoch is for a run that starts; --resume continues where its checkpoint was")
    if is_url(given.get("resume", "")) and not given.get("eval") and "output_dir" not in given:
        raise ValueError(f"--resume {given['resume']} needs --output_dir DIR, where the training continues")
    if given.get("eval") and given.get("tensorboard"):
        raise ValueError("--tensorboard shows how a training goes: leave it out with --eval")
    return given
