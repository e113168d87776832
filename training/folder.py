"""The folder of a run: which files it holds, how one is found, opened and read."""

import json
from logging import getLogger
from pathlib import Path
from typing import Any

from lape_vit.checkpoints import is_ours
from training.checkpoint import load_checkpoint
from training.options import RunOptions

_logger = getLogger(__name__)

CHECKPOINTS = ("checkpoint.pth", "best_checkpoint.pth", "best_ema_checkpoint.pth")
RUN_FILES = (*CHECKPOINTS, "config.yaml", "log.txt")


def open_output_dir(run: RunOptions) -> Path | None:
    """Make the folder of `--output_dir`, if one is given.

    Raises:
        OSError: it holds another run, or cannot be made.
    """
    if run.output_dir is None:
        return None
    folder = Path(run.output_dir)
    held = [name for name in RUN_FILES if (folder / name).exists()]
    is_resumed = run.resume is not None and Path(run.resume).resolve().parent == folder.resolve()
    if held and not (run.eval or is_resumed or run.auto_resume):
        raise FileExistsError(
            f"--output_dir {folder} holds a run already ({', '.join(held)}): continue it by "
            f"--resume {folder / RUN_FILES[0]}, or name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {folder} cannot be made: {error.strerror}") from error
    return folder


def find_checkpoint(given: dict[str, Any]) -> dict[str, Any]:
    """The newest readable checkpoint of `--output_dir`, which becomes the one to resume; empty if there is none.

    Raises:
        ValueError: options that do not go with `--auto-resume`.
    """
    if "output_dir" not in given:
        raise ValueError("--auto-resume needs --output_dir DIR, where to look for a checkpoint")
    for flag in {"resume", "eval"} & given.keys():
        raise ValueError(f"--auto-resume continues from the newest checkpoint of --output_dir: leave out --{flag}")
    files = [path for path in (Path(given["output_dir"]) / name for name in CHECKPOINTS) if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            checkpoint = load_checkpoint(str(path))
        except ValueError as error:
            _logger.warning("--auto-resume skips a checkpoint: %s", error)
            continue
        if not is_ours(checkpoint):
            _logger.warning("--auto-resume skips a checkpoint: %s holds no training to continue", path)
            continue
        epoch, step = checkpoint["epoch"], checkpoint["progress"]["counts"]["step"]
        _logger.info("--auto-resume continues from %s, after epoch %d and %d updates", path, epoch, step)
        given["resume"] = str(path)
        given.pop("finetune", None)  # it started the run
        return checkpoint
    _logger.info("--auto-resume finds no checkpoint in %s: the run starts afresh", given["output_dir"])
    return {}


def last_checkpoint(folder: Path | None) -> str:
    """The last checkpoint, and how to continue from it."""
    path = None if folder is None else folder / CHECKPOINTS[0]
    return f"last checkpoint: {path}; continue with --resume {path}" if path and path.exists() else "no checkpoint yet"


def read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The rows of the first `epochs` epochs in a `log.txt`, if there is one.

    Raises:
        ValueError: not such a file.
    """
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row["epoch"] <= epochs]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: it must hold one JSON object per line; repair it or move it away"
        ) from error
