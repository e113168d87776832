"""Draw what every layer of a checkpoint sees of positions: `python similarity_visualize.py --help`.

What is drawn of each encoding: see :func:`lape_vit.analysis.positions.position_views`.
"""

from figures.options import read_options
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("similarity_visualize.py", read_options, "torch, timm and matplotlib")

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from diagnosis.tables import read_records
from figures import comparison
from figures.checkpoints import load_model, load_published
from figures.explore import explore_page
from lape_vit import VisionTransformer
from lape_vit.analysis.attention_maps import why_no_split
from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.drawing import attention, positions
from lape_vit.drawing.positions import Positions
from lape_vit.encodings import all_options
from lape_vit.from_checkpoint import OF_MODEL
from lape_vit.images import image_transform
from loading.images import read_image
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import end_in_one_line, show_activity, start_logging
from training.checkpoint import load_checkpoint

_logger = getLogger(__name__)

DPI = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own).

    Returns:
        The exit code: 0; 2 for bad input, told in one line; 130 if interrupted.
    """
    console = start_logging(is_main=True)
    try:
        draw(read_options(argv), console)
    except (ValueError, OSError) as error:
        return _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _stop("interrupted", 130)
    return 0


_stop = partial(end_in_one_line, "similarity_visualize.py")


# ---- pictures


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's model, what is known of it, and what there is to see."""

    model: Any
    description: dict[str, Any]
    positions: Positions


def draw(args: argparse.Namespace, console: Console) -> None:
    """Everything that the options ask for, into the folder that they name, which is made if need be."""
    given = [None] if args.pretrained is not None else args.compare or [args.ckpt_path]
    checkpoints = []
    for path in given:
        with show_activity(console, f"reading {path or args.model}"):
            checkpoints.append(read(path, args))
    choice = positions.Choice(args.layers, args.heads, args.full)
    for checkpoint in checkpoints:
        positions.check_choice(checkpoint.positions, choice)
    diagnoses = read_diagnoses(args.diagnosis, [checkpoint.positions for checkpoint in checkpoints])
    maps = [over_image(checkpoint, args.image) for checkpoint in checkpoints if args.image and not args.compare]
    every = from_every_patch(checkpoints, args.image) if args.image and args.html else {}
    shown = [checkpoint.positions for checkpoint in checkpoints]
    for positions_of_one in shown:
        if not positions_of_one.views:
            _logger.info("%s: nothing to draw, pe=%r has no positions", positions_of_one.source, positions_of_one.pe)
    folder = Path(args.save_dir).expanduser()
    if args.compare:
        if single := next((one.source for one in shown if one.grid == (1, 1)), None):
            raise ValueError(f"--compare {single}: its model has one patch, and so no distances to compare")
        if any(one.views for one in shown):
            write(folder, args.format, comparison.pictures(shown, choice), console)
            save_values(folder / "compare.npz", comparison.raw_curves(shown))
    elif shown[0].views:
        write(folder, args.format, positions.pictures(shown[0], choice), console)
        save_values(folder / "positions.npz", positions.raw_values(shown[0]))
    if args.html and (every or any(one.views for one in shown)):
        folder.mkdir(parents=True, exist_ok=True)
        with show_activity(console, "writing explore.html"):
            save_page(folder / "explore.html", shown, diagnoses, every)
    for seen in maps:
        write(folder, args.format, attention.pictures(seen), console)
        save_values(folder / "attention.npz", attention.raw_values(seen))


def read(path: str | None, args: argparse.Namespace) -> Checkpoint:
    """A checkpoint, or without a path the published weights, and what there is to see of them.

    Raises:
        ValueError, OSError: no checkpoint, one that does not fit the flags, a token outside its grid.
    """
    flags = {name: getattr(args, name) for name in (*OF_MODEL, *all_options())}
    if path is None:
        model, description, path = load_published(args.pretrained, flags)
    else:
        model, description = load_model(path, flags)
    shown = positions.measure(model, path, description["model"], args.token, args.scale)
    if args.compare:
        shown = replace(shown, config=load_checkpoint(path).get("config"))
    if args.token is not None and not shown.uses_token and args.image is None and not args.html:
        _logger.warning("--token: what pe=%r shows is alike for every patch", shown.pe)
    return Checkpoint(model, description, shown)


def over_image(checkpoint: Checkpoint, file: str) -> attention.TokenAttention:
    """What the chosen patch attends to on an image, prepared as in evaluation.

    Raises:
        ValueError, OSError: no image, or a model of timm's own that does not hand out its attention.
    """
    model, shown = checkpoint.model, checkpoint.positions
    reason = why_no_split(model) if isinstance(model, VisionTransformer) else f"{shown.model} is timm's own"
    if reason is not None:
        _logger.info("--image: attention is drawn without a position part, for %s", reason)
    return attention.over_image(shown, model, prepare(model, file), file)


def from_every_patch(checkpoints: Sequence[Checkpoint], file: str) -> dict[str, attention.PatchAttention]:
    """What every patch attends to on an image, by the source of each checkpoint that has this.

    Raises:
        ValueError, OSError: as of :func:`over_image`.
    """
    found = {}
    for checkpoint in checkpoints:
        model, shown = checkpoint.model, checkpoint.positions
        seen = attention.from_every_patch(shown, model, prepare(model, file), file)
        if seen is None:
            reason = "it is not from every patch to every patch"
            _logger.info("%s: attention over the image is not on the page, for %s", shown.source, reason)
        else:
            found[shown.source] = seen
    return found


def prepare(model: Any, file: str) -> Tensor:
    """An image, turned upright, as the model reads it (3, height, width)."""
    return image_transform(model)(read_image(str(Path(file).expanduser()), upright=True))


def write(folder: Path, file_format: str, pictures: Iterable[tuple[str, Figure]], console: Console) -> None:
    """Save each picture under its name, and show which one is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    with show_activity(console, "drawing pictures") as show:
        for name, figure in pictures:
            names.append(f"{name}.{file_format}")
            show(f"drawing picture {len(names)}, {names[-1]}")
            figure.savefig(folder / names[-1], dpi=DPI)
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    _logger.info("%s: %s%s", folder, names[0], rest)


def read_diagnoses(path: str | None, shown: Sequence[Positions]) -> dict[str, Diagnosis]:
    """What was measured of the checkpoints that are shown, by their sources.

    Raises:
        ValueError, OSError: no diagnosis.json, or one of none of them.
    """
    if path is None:
        return {}
    records = {Path(record.about["checkpoint"]).resolve(): record for record in read_records(Path(path).expanduser())}
    files = {one.source: Path(one.source).expanduser().resolve() for one in shown}
    found = {source: records[file] for source, file in files.items() if file in records}
    if not found:
        raise ValueError(f"--diagnosis {path} is of other checkpoints: {', '.join(map(str, records))}")
    return found


def save_page(
    path: Path,
    shown: Sequence[Positions],
    diagnoses: Mapping[str, Diagnosis],
    every: Mapping[str, attention.PatchAttention],
) -> None:
    """The page to explore what is shown."""
    page = explore_page(shown, diagnoses, every)
    path.write_bytes(page)
    _logger.info("%s: %.1f MB, opens in any browser", path, len(page) / 1e6)


def save_values(path: Path, values: dict[str, Any]) -> None:
    """The raw values, compressed."""
    np.savez_compressed(path, **values)


if __name__ == "__main__":
    raise_on_ctrl_c()
    sys.exit(main())
