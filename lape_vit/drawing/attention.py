"""Attention over an image from one patch, beside the part of its logits that positions bring in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from lape_vit.analysis.attention_maps import LayerAttention, attention_maps
from lape_vit.analysis.positions import layer_titles, token_map
from lape_vit.analysis.timm_attention import SeenWeights, timm_attention, timm_attention_of_patches
from lape_vit.drawing.panels import SIGNED, Token, cut_note, layers_band, limit_of, show_map
from lape_vit.drawing.positions import Positions
from lape_vit.drawing.sheet import Band, Colours, Panel, Sheet, draw_sheets, single
from lape_vit.images import pixels_of
from lape_vit.places import Grid
from lape_vit.vit import VisionTransformer

UNSIGNED = "viridis"
"""Perceptually uniform."""
TITLES = {"attention": "attention weights", "position_logits": "what positions add to the logits"}
"""Of the parts that are drawn."""
STRENGTH = 0.6
"""Of the colours of attention that are drawn over the image."""


@dataclass(frozen=True)
class TokenAttention:
    """What the chosen patch attends to on an image; what goes to prefix tokens is left out.

    Attributes:
        pixels: the image as the model sees it, without normalisation: (height, width, 3), in [0, 1].
        parts: (h, H, W) of each layer, by name: ``attention``, the weights, and, where the logits split,
            ``position_logits`` and ``content_logits``. Layers of a model of timm's own may differ in heads and grid.
        layers: a title of each layer.
    """

    positions: Positions
    file: str
    pixels: Tensor
    parts: dict[str, list[Tensor]]
    layers: list[str]

    def mark(self, grid: Grid) -> Token:
        """The chosen patch in a layer of another grid."""
        row, column = (int(share * side) for share, side in zip(place_of(self.positions), grid, strict=True))
        return row, column


def place_of(positions: Positions) -> tuple[float, float]:
    """The middle of the chosen patch, as shares of the image's height and width."""
    row, column = ((index + 0.5) / side for index, side in zip(positions.token, positions.grid, strict=True))
    return row, column


def over_image(positions: Positions, model: Any, image: Tensor, file: str) -> TokenAttention:
    """What the chosen patch attends to on an image.

    Args:
        model: ours, or one of timm's own that hands out its attention.
        image: (3, height, width), as the model reads it, on the CPU.
        file: what to call the image.

    Raises:
        ValueError: a model of timm's own that does not.
    """
    pixels, batch = pixels_of(model, image), image[None].to(next(model.parameters()).device)
    if isinstance(model, VisionTransformer):
        return of_token(positions, file, pixels, attention_maps(model, batch))
    return of_timm(positions, file, pixels, timm_attention(model, batch, place_of(positions)))


def of_token(positions: Positions, file: str, pixels: Tensor, layers: Sequence[LayerAttention]) -> TokenAttention:
    """The chosen patch's share of what attention does in every layer."""
    patches = positions.grid[0] * positions.grid[1]
    parts: dict[str, list[Tensor]] = {"attention": [], "position_logits": [], "content_logits": []}
    for layer in layers:
        for name, values in zip(parts, (layer.weights, layer.position, layer.content), strict=True):
            if values is not None:
                parts[name].append(token_map(values[:, -patches:, -patches:], positions.grid, positions.token))
    titles = layer_titles(len(layers), positions.join_type)
    return TokenAttention(positions, file, pixels, {name: maps for name, maps in parts.items() if maps}, titles)


def of_timm(positions: Positions, file: str, pixels: Tensor, layers: Sequence[SeenWeights]) -> TokenAttention:
    """The same of a model of timm's own."""
    parts = {"attention": [layer.weights for layer in layers]}
    return TokenAttention(positions, file, pixels, parts, [layer.layer for layer in layers])


@dataclass(frozen=True)
class PatchAttention:
    """What every patch attends to on an image; what goes to prefix tokens is left out.

    Attributes:
        pixels: the image as the model sees it, without normalisation: (height, width, 3), in [0, 1].
        weights: (h, H*W, H*W) of each layer, from query (row) to key (column) patch.
        layers: a title of each layer.
    """

    file: str
    pixels: Tensor
    weights: list[Tensor]
    layers: list[str]


def from_every_patch(positions: Positions, model: Any, image: Tensor, file: str) -> PatchAttention | None:
    """What every patch attends to on an image; None where attention is not from every patch to every patch of one grid.

    Args:
        model: ours, or one of timm's own that hands out its attention.
        image: (3, height, width), as the model reads it, on the CPU.
        file: what to call the image.

    Raises:
        ValueError: a model of timm's own that does not; weights that are NaN.
    """
    batch = image[None].to(next(model.parameters()).device)
    found: dict[str, Tensor] | None
    if isinstance(model, VisionTransformer):
        patches = positions.grid[0] * positions.grid[1]
        maps = [layer.weights[:, -patches:, -patches:] for layer in attention_maps(model, batch)]
        found = dict(zip(layer_titles(len(maps), positions.join_type), maps, strict=True))
    else:
        found = timm_attention_of_patches(model, batch)
    if found is None:
        return None
    if broken := next((layer for layer, weights in found.items() if not weights.isfinite().all()), None):
        raise ValueError(f"{positions.source}: attention of {broken} is NaN on {file}")
    return PatchAttention(file, pixels_of(model, image), list(found.values()), list(found))


def alike(maps: Sequence[Tensor]) -> list[slice]:
    """Successive layers with as many heads on the same grid."""
    runs = [len([*run]) for _, run in groupby(maps, key=lambda of_layer: of_layer.shape)]
    return [slice(sum(runs[:number]), sum(runs[: number + 1])) for number in range(len(runs))]


def pictures(shown: TokenAttention) -> Iterator[tuple[str, Figure]]:
    """Each picture with its file's name less the ending: all layers, then each."""
    row, column = shown.positions.token
    heading = [*shown.positions.heading, f"{shown.file}, seen from the patch in row {row}, column {column}"]
    sheets = [Sheet([], [image_band(shown.pixels, shown.positions)], box=2.4)]
    drawn = [name for name in TITLES if name in shown.parts]
    notes = {name: cut_note([finite(shown, name)], scale(shown, name).limits) for name in drawn}
    heading += [f"{TITLES[name]}: {note}" for name, note in notes.items() if note]
    for name in drawn:
        bands = []
        for run in alike(maps := shown.parts[name]):
            blank = ", blank beyond the window" if maps[run][0].isnan().any() else ""
            title = f"{TITLES[name]}: {len(maps[run][0])} heads, row by row{blank}"
            bands.append(layers_band(title, shown.layers[run], maps[run], scale(shown, name)))
        sheets.append(Sheet([], bands, per_row=4))
    yield "attention", draw_sheets(sheets, heading)
    for layer, title in enumerate(shown.layers):
        sheets = []
        for name in drawn:
            band = heads_band(f"{title}: {TITLES[name]}", shown, name, layer)
            sheets.append(single([], band))
        yield f"{shown.positions.join_type}_layer{layer}_attention", draw_sheets(sheets, heading)


def scale(shown: TokenAttention, name: str) -> Colours:
    """One for all layers and heads, which ends where those of positions do."""
    values = finite(shown, name)
    most = values.abs().max().item() or 1.0
    limit = limit_of(values, shown.positions.scale, most, most)
    if name == "attention" and values.min() >= 0:  # mixed over heads, as in CaiT, weights may be negative
        return Colours(UNSIGNED, (0.0, limit), cut=most > limit)
    return Colours(SIGNED, (-limit, limit), cut=most > limit)


def finite(shown: TokenAttention, name: str) -> Tensor:
    """All values of a part; an encoding may hide keys by logits of -inf, which stay blank."""
    return torch.cat([maps[maps.isfinite()] for maps in shown.parts[name]])


def heads_band(title: str, shown: TokenAttention, name: str, layer: int) -> Band:
    """One layer, a panel for each head, with ticks; attention weights lie over the image."""
    maps, colours = shown.parts[name][layer], scale(shown, name)
    grid = (maps.shape[1], maps.shape[2])
    draw = partial(show_map, colours=colours, grid=grid, mark=shown.mark(grid))
    if name == "attention":
        title += " over the image"
        draw = partial(show_over_image, colours=colours, grid=grid, mark=shown.mark(grid), pixels=shown.pixels)
    panels = [Panel(f"head {head}", partial(draw, values=values)) for head, values in enumerate(maps)]
    return Band(title, panels, grid[0] / grid[1], colours, with_ticks=True)


def show_over_image(axes: Axes, values: Tensor, colours: Colours, grid: Grid, mark: Token, pixels: Tensor) -> None:
    """A map (H, W) in colours that let the image (height, width, 3), in grey, show through."""
    show_map(axes, values, colours, grid, mark)
    for picture in axes.images:
        picture.set_alpha(STRENGTH)
    extent = (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)
    axes.imshow(pixels.mean(dim=-1).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto", zorder=-1)


def image_band(pixels: Tensor, positions: Positions) -> Band:
    """The image, with the chosen patch framed."""
    draw = partial(show_image, pixels=pixels, grid=positions.grid, token=positions.token)
    return Band("the image as the model sees it", [Panel("", draw)], pixels.shape[0] / pixels.shape[1], None)


def show_image(axes: Axes, pixels: Tensor, grid: tuple[int, int], token: Token) -> None:
    """Pixels (height, width, 3), and a frame around one patch."""
    axes.imshow(pixels.numpy(), aspect="auto")
    height, width = pixels.shape[0] / grid[0], pixels.shape[1] / grid[1]
    corner = (token[1] * width - 0.5, token[0] * height - 0.5)
    for colour, thick in (("black", 2.5), ("white", 1.0)):
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=thick))


def raw_values(shown: TokenAttention) -> dict[str, NDArray[Any]]:
    """All numbers behind the pictures, (L, h, H, W) by the part's name; by ``attention_part0`` and so on where layers
    differ in heads or grid."""
    values = {}
    for name, maps in shown.parts.items():
        runs = alike(maps)
        for number, run in enumerate(runs):
            values[f"{name}_part{number}" if len(runs) > 1 else name] = torch.stack(maps[run]).numpy()
    return values
