"""Checkpoints of runs, written whole, and read from a path or a URL; `lape_vit.checkpoints` says what they hold."""

from pathlib import Path
from typing import Any

import torch

from lape_vit.checkpoints import FORMAT, VERSION, read_checkpoint
from runtime.download import fetch, is_url
from runtime.files import atomic_write


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of our format; `path` holds a complete one at every moment.

    Raises:
        OSError: it cannot be written; `path` stays as it was.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, file)
        except RuntimeError as error:  # where a write fails torch raises this on top
            raise OSError(f"{path} cannot be written: {error.__context__ or error}") from error


def load_checkpoint(path: str) -> dict[str, Any]:
    """As `lape_vit.checkpoints.read_checkpoint`, from a URL, too.

    Args:
        path: of a file or a folder, or the https: URL of a file, with its hash (see `runtime.download.fetch`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_checkpoint`, or a URL that is refused.
        OSError: a URL that cannot be downloaded.
    """
    return read_checkpoint(fetch(path) if is_url(path) else path)
