"""Draw how alike the patches' positions are in every layer of a checkpoint: `python similarity_visualize.py --help`.

What is compared is what a layer's attention reads of them: see :func:`lape_vit.similarity.layer_positions`.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, NoReturn, cast

import timm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from timm.layers import to_2tuple
from torch import Tensor

import models_lape  # noqa: F401  (registers the models)
from lape_vit import convert_checkpoint
from lape_vit.encodings import Grid, all_options, canonical_name
from lape_vit.similarity import Model, cosine_similarity, layer_positions, token_map
from training.checkpoint import description_of, load_checkpoint, load_weights
from training.logs import start_logging

_logger = getLogger(__name__)

FLAGS = {"model": "--model_name", "pe": "--pe", "join_type": "--join-type", "input_size": "--input-size"}
"""What a checkpoint may say of its model, and the flags for one that does not."""

COLOURS: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1.0, "vmax": 1.0}
"""One scale for every picture: white is 0, red alike, blue opposite."""
COLUMNS = 6
"""Layers side by side on the overview."""
TICKS = 5
"""Most tick labels along the longer side of a picture."""
DPI = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own).

    Returns:
        The exit code: 0; 2 for bad input, told in one line; 130 if interrupted.
    """
    start_logging(is_main=True)
    try:
        args = build_parser().parse_args(argv)
        model, name = load_model(args)
        write_pictures(measure(model, name, args.token), Path(args.save_dir).expanduser())
    except (ValueError, OSError) as error:
        return _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _stop("interrupted", 130)
    return 0


def _stop(message: str, code: int) -> int:
    print("similarity_visualize.py:", " ".join(message.split()), file=sys.stderr)
    return code


# ---- options


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `ValueError` of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_parser() -> Parser:
    """All options of this command; each flag in the spelling with `-` and the one with `_`."""
    parser = Parser(
        prog="similarity_visualize.py",
        usage="%(prog)s --ckpt_path FILE --save_dir DIR [options]",
        description="Draw how alike the patches' positions are in every layer of a checkpoint.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt_path", "--ckpt-path", required=True, metavar="FILE", help="a checkpoint, ours or an original's")
    add("--save_dir", "--save-dir", required=True, metavar="DIR", help="receives the pictures")
    add("--token", type=pair, metavar="ROW,COLUMN", help="the patch to draw alone, counted from 0; default: the centre")
    group = parser.add_argument_group("for a checkpoint that does not say what model it holds")
    add = group.add_argument
    add("--model_name", "--model-name", dest="model", metavar="NAME", help="a model of models_lape")
    add("--pe", metavar="NAME", help="its positional encoding")
    add("--join-type", "--join_type", metavar="NAME", help="how that reaches the layers")
    add("--input-size", "--input_size", type=size, metavar="S", help="side of its images, or HEIGHT,WIDTH, in pixels; "
        "default: the model's own")  # fmt: skip
    return parser


def pair(text: str) -> tuple[int, int]:
    """`3,5`."""
    first, _, second = text.partition(",")
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected two whole numbers such as 3,5, got {text!r}")
    return int(first), int(second)


def size(text: str) -> tuple[int, int]:
    """`32`, or `32,48` for height and width."""
    return pair(text if "," in text else f"{text},{text}")


# ---- the checkpoint


def load_model(args: argparse.Namespace) -> tuple[Model, str]:
    """The model of a checkpoint, with its weights (not their running average), and its name.

    Raises:
        ValueError, OSError: no checkpoint, a flag that contradicts it, something that neither says, other weights.
    """
    checkpoint = load_checkpoint(args.ckpt_path)
    description = complete(description_of(checkpoint), args)
    name = description.pop("model")
    if name not in (known := timm.list_models(module="models_lape")):
        raise ValueError(f"unknown {FLAGS['model']} {name!r}: choose from {', '.join(known)}")
    state_dict = convert_checkpoint(checkpoint["model"])
    num_classes = len(state_dict.get("head.weight", ()))
    img_size = description.pop("input_size")
    model = cast("Model", timm.create_model(name, num_classes=num_classes, img_size=img_size, **description))
    load_weights(model, state_dict, args.ckpt_path, f"{name} with {model.pe} and {model.join_type}")
    return model.eval(), name


def complete(description: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint says of its model, and from the flags what it does not; `input_size` is None if neither says.

    Raises:
        ValueError: a flag that contradicts the checkpoint, or something else that neither says.
    """
    completed = {option: description[option] for option in all_options() if option in description}
    for name, flag in FLAGS.items():
        values = [description.get(name), getattr(args, name)]
        said, given = (None if value is None else canonical(name, value) for value in values)
        if said is not None and given is not None and said != given:
            raise ValueError(f"{flag} {given} contradicts {args.ckpt_path}, which has {said}")
        completed[name] = given if said is None else said
    missing = [FLAGS[name] for name in ("model", "pe", "join_type") if completed[name] is None]
    if missing:
        raise ValueError(f"{args.ckpt_path} does not say what model it holds: give {', '.join(missing)}")
    return completed


def canonical(name: str, value: Any) -> Any:
    """The value of `name` in one spelling of those that mean the same."""
    spell = {"pe": canonical_name, "input_size": to_2tuple}
    return spell[name](value) if name in spell else value


# ---- the similarities and their pictures


@dataclass(frozen=True)
class Similarities:
    """What the pictures show of a model.

    Attributes:
        grid: (H, W).
        token: (row, column) of the chosen patch.
        matrices: every patch to every patch, (H*W, H*W) per layer.
        maps: the chosen patch to every patch, (H, W) per layer.
    """

    model: str
    pe: str
    join_type: str
    grid: Grid
    token: tuple[int, int]
    matrices: list[Tensor]
    maps: list[Tensor]

    @property
    def heading(self) -> str:
        height, width = self.grid
        return f"{self.model}\npe={self.pe}, join_type={self.join_type}, {height} x {width} patches"

    def title(self, layer: int) -> str:
        return f"layer {layer}, {self.join_type}"


def measure(model: Model, name: str, token: tuple[int, int] | None) -> Similarities:
    """The similarities in every layer of a model; the chosen patch is, unless told, the one in the centre.

    Raises:
        ValueError: an encoding without an absolute part, a token outside the grid, weights that are NaN or infinite.
    """
    height, width = grid = model.patch_embed.grid_size
    token = token or (height // 2, width // 2)
    matrices = [cosine_similarity(positions) for positions in layer_positions(model)]
    maps = [token_map(matrix, grid, token) for matrix in matrices]
    return Similarities(name, model.pe, model.join_type, grid, token, matrices, maps)


def write_pictures(similarities: Similarities, folder: Path) -> None:
    """Draw everything into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in draw_pictures(similarities):
        figure.savefig(folder / name, dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    _logger.info("%s: two pictures of each of %d layers, and overview.png", folder, len(similarities.matrices))


def draw_pictures(similarities: Similarities) -> Iterator[tuple[str, Figure]]:
    """Each picture with its file's name: two per layer, then the overview."""
    row, column = similarities.token
    for layer in range(len(similarities.matrices)):
        yield f"layer_{layer:02d}_matrix.png", draw_layer_matrix(similarities, layer)
        yield f"layer_{layer:02d}_token_{row}_{column}.png", draw_layer_map(similarities, layer)
    yield "overview.png", draw_overview(similarities)


def draw_layer_matrix(similarities: Similarities, layer: int) -> Figure:
    """One layer: every patch to every patch."""
    figure = Figure(figsize=(6.4, 6.0), layout="compressed")
    axes = figure.subplots()
    image = show_matrix(axes, similarities, layer)
    axes.set(title=similarities.title(layer), xlabel="patch, row by row", ylabel="patch, row by row")
    add_heading_and_scale(figure, image, similarities.heading)
    return figure


def draw_layer_map(similarities: Similarities, layer: int) -> Figure:
    """One layer: the chosen patch to every patch, each at its place in the image."""
    (height, width), (row, column) = similarities.grid, similarities.token
    figure = Figure(figsize=(6.4, 1.8 + 4.2 * min(1.0, height / width)), layout="compressed")
    axes = figure.subplots()
    image = show_map(axes, similarities, layer)
    title = f"{similarities.title(layer)}, patch in row {row}, column {column}"
    axes.set(title=title, xlabel="column", ylabel="row")
    add_heading_and_scale(figure, image, similarities.heading)
    return figure


def draw_overview(similarities: Similarities) -> Figure:
    """All layers on one page: in each band the matrices of some layers, and their maps below."""
    (height, width), (row, column) = similarities.grid, similarities.token
    depth = len(similarities.matrices)
    columns = min(depth, COLUMNS)
    bands = math.ceil(depth / columns)
    ratio = min(1.0, height / width)  # of a map's height to a matrix's
    inches = max(6.4, 1.9 * columns + 1.4), (2.6 + 1.5 * ratio) * bands + 1.0
    # compressed, every column would become as narrow as the map of a grid that is higher than wide
    figure = Figure(figsize=inches, layout="compressed" if height <= width else "constrained")
    panels = figure.add_gridspec(2 * bands, columns, height_ratios=[1.0, ratio] * bands)
    for layer in range(depth):
        band, place = divmod(layer, columns)
        upper, lower = (figure.add_subplot(panels[2 * band + half, place]) for half in range(2))
        show_matrix(upper, similarities, layer)
        image = show_map(lower, similarities, layer)
        upper.set_title(similarities.title(layer), fontsize="medium")
        for axes, label in ((upper, "patch"), (lower, "row")):
            axes.tick_params(labelsize="x-small")
            if place == 0:
                axes.set_ylabel(label, fontsize="small")
    legend = f"above: every patch to every patch; below: the patch in row {row}, column {column} to every patch"
    add_heading_and_scale(figure, image, f"{similarities.heading}\n{legend}")
    return figure


def add_heading_and_scale(figure: Figure, image: AxesImage, heading: str) -> None:
    """Write above the figure, and beside it what the colours mean."""
    figure.suptitle(heading, fontsize="medium")
    figure.colorbar(image, ax=figure.axes, label="cosine similarity", panchor=False)


def show_matrix(axes: Axes, similarities: Similarities, layer: int) -> AxesImage:
    """Every patch to every patch; a tick is where a row of patches begins."""
    height, width = similarities.grid
    starts = [row * width for row in spread(height, TICKS)]
    axes.set(xticks=starts, yticks=starts)
    return axes.imshow(similarities.matrices[layer].numpy(), **COLOURS)


def show_map(axes: Axes, similarities: Similarities, layer: int) -> AxesImage:
    """The chosen patch to every patch; a dot marks it."""
    (height, width), (row, column) = similarities.grid, similarities.token
    ticks_per_patch = TICKS / max(height, width)
    axes.set(xticks=spread(width, width * ticks_per_patch), yticks=spread(height, height * ticks_per_patch))
    axes.plot(column, row, marker="o", markersize=4, markerfacecolor="white", markeredgecolor="black")
    return axes.imshow(similarities.maps[layer].numpy(), **COLOURS)


def spread(count: int, most: float) -> range:
    """Evenly spaced numbers of 0 .. count - 1: at most `most` of them, rounded up."""
    return range(0, count, math.ceil(count / math.ceil(most)))


if __name__ == "__main__":
    sys.exit(main())
