"""Attention of timm's own models over an image, from one place to all that it may attend to.

Shapes: h heads, grid (H, W) of places in a layer, G windows, n tokens of a window (or prefix tokens, then all patches).
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lape_vit.analysis.timm_positions import patch_grid, title_of
from lape_vit.places import Grid


class SeenWeights(NamedTuple):
    """What one place attends to in one layer.

    Attributes:
        layer: a title.
        weights: (h, H, W); NaN beyond the window of the place.
    """

    layer: str
    weights: Tensor


class _Call(NamedTuple):
    """What one attention was given and made of it."""

    block_args: tuple[Any, ...]
    read: Tensor
    weights: Tensor


class _Reached(Exception):  # noqa: N818  it ends a forward pass, and is no error
    """Attention was called with ``args[0]``."""


@torch.no_grad()
def timm_attention(model: Any, image: Tensor, place: tuple[float, float]) -> list[SeenWeights]:
    """What each layer's attention gives the places of an image, as seen from one; prefix tokens are left out.

    Args:
        model: in evaluation mode.
        image: (1, C, height, width), normalised.
        place: row and column as shares of the height and the width, in [0, 1).

    Raises:
        ValueError: the model does not hand out attention weights.
    """
    modules, found = dict(model.named_modules()), []
    for path, (block_args, read, weights) in attention_calls(model, image).items():
        attn, block = modules[path], modules[path.rpartition(".")[0]]
        if read.ndim == 4 and len(weights) == 1:
            grid, tokens = places_of_map(attn, read)
        elif block_args[0].ndim == 4:
            grid, tokens = places_of_windows(block, block_args, attn)
        else:
            grid, tokens = places_of_sequence(patch_grid(model), weights)
        found.append(SeenWeights(title_of(path), seen_from(place, grid, tokens, weights)))
    return found


@torch.no_grad()
def timm_attention_of_patches(model: Any, image: Tensor) -> dict[str, Tensor] | None:
    """What each layer's attention gives every patch, as seen from every patch; prefix tokens are left out.

    Args:
        model: in evaluation mode.
        image: (1, C, height, width), normalised.

    Returns:
        (h, H*W, H*W) by a title of the layer; None where a layer attends in windows or on another grid than that of the
        patches, or layers differ in heads.

    Raises:
        ValueError: the model does not hand out attention weights.
    """
    grid, calls = patch_grid(model), attention_calls(model, image)
    patches = grid[0] * grid[1] if grid is not None else 0
    in_windows = any(len(weights) > 1 or (args[0].ndim == 4 != read.ndim) for args, read, weights in calls.values())
    tokens = {weights.shape[1:] for _, _, weights in calls.values()}
    if not patches or in_windows or len(tokens) > 1 or min(tokens)[-1] < patches:
        return None
    return {title_of(path): weights[0, :, -patches:, -patches:] for path, (_, _, weights) in calls.items()}


def attention_calls(model: Any, image: Tensor) -> dict[str, _Call]:
    """Each self-attention that a forward pass calls, by its module's path: weights are (G, h, n, n).

    Raises:
        ValueError: none hands out its weights.
    """
    modules = dict(model.named_modules())
    attns = {path: one for path, one in modules.items() if isinstance(getattr(one, "attn_drop", None), nn.Module)}
    seen: dict[str, dict[str, Any]] = {path: {} for path in attns}

    def note(path: str, name: str) -> Callable[..., None]:
        return lambda module, args: seen[path].update({name: args})

    with ExitStack() as undo:
        for path, attn in attns.items():
            watched = {"block": modules[path.rpartition(".")[0]], "read": attn, "weights": attn.attn_drop}
            for name, module in watched.items():
                undo.callback(module.register_forward_pre_hook(note(path, name)).remove)
            if getattr(attn, "fused_attn", False):  # which has no weights to hand out
                attn.fused_attn = False
                undo.callback(setattr, attn, "fused_attn", True)
        model.forward_features(image)
    calls = {
        path: _Call(of_one["block"], of_one["read"][0], of_one["weights"][0])
        for path, of_one in seen.items()
        if "weights" in of_one
    }
    of_self = {path: call for path, call in calls.items() if call.weights.shape[-1] == call.weights.shape[-2]}
    if not of_self:
        raise ValueError(f"timm's {type(model).__name__} does not hand out its attention weights")
    return of_self


def is_channels_first(attn: Any) -> bool:
    """Whether attention reads maps (B, C, H, W), not (B, H, W, C)."""
    return isinstance(getattr(attn, "qkv", None), nn.Conv2d)


def places_of_map(attn: Any, read: Tensor) -> tuple[Grid, Tensor]:
    """The grid of a map that is one window, and the places of its tokens: (1, n)."""
    height, width = read.shape[2:] if is_channels_first(attn) else read.shape[1:3]
    return (height, width), torch.arange(height * width)[None]


def places_of_sequence(grid: Grid | None, weights: Tensor) -> tuple[Grid, Tensor]:
    """The grid of patches, and the places of tokens in a sequence, -1 of prefix tokens: (1, n)."""
    assert grid is not None  # without patches there are maps
    prefix = weights.shape[-1] - grid[0] * grid[1]
    return grid, torch.arange(-prefix, grid[0] * grid[1]).clamp(min=-1)[None]


def places_of_windows(block: Any, args: tuple[Any, ...], attn: Any) -> tuple[Grid, Tensor]:
    """The grid of a map, and the places that a block hands its attention in windows, -1 of padding: (G, n).

    The block itself tells: it is given tokens that hold the numbers of their places.
    """

    def reached(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    x, axis = args[0], 1 if is_channels_first(attn) else -1
    height, width = x.movedim(axis, 0).shape[2:]
    numbers = torch.arange(1, height * width + 1, dtype=x.dtype).unflatten(0, (height, width))
    with ExitStack() as undo:
        undo.callback(attn.register_forward_pre_hook(reached).remove)
        for child in block.children():
            if child is not attn:  # such as a norm
                undo.callback(child.register_forward_hook(lambda module, args, output: args[0]).remove)
        try:
            block(numbers[None].unsqueeze(axis).expand_as(x), *args[1:])
        except _Reached as call:
            read = call.args[0]
    return (height, width), read.movedim(axis, 0)[0].flatten(1).long() - 1


def seen_from(place: tuple[float, float], grid: Grid, tokens: Tensor, weights: Tensor) -> Tensor:
    """The weights (h, H, W) of one place as the query, NaN where it has none.

    Args:
        tokens: the place of each token in each window, -1 of one without: (G, n).
        weights: (G, h, n, n).
    """
    row, column = (int(share * side) for share, side in zip(place, grid, strict=True))
    window, query = (tokens == row * grid[1] + column).nonzero()[0]
    keys = tokens[window]
    seen = weights.new_full((weights.shape[1], grid[0] * grid[1]), float("nan"))
    seen[:, keys[keys >= 0]] = weights[window, :, query][:, keys >= 0]
    return seen.unflatten(1, grid)
