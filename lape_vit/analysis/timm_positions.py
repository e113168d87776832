"""What the layers of timm's own models see of positions: tables that are added to the input, rotations, and biases.

Shapes: grid (H, W) of patches in row-major order, R rows of the table (some prefix tokens, then H*W), D width, h heads,
d head width, L layers, window (Y, X) of places that attend to each other, S = Y*X.
"""

import re
from dataclasses import replace
from functools import singledispatch
from itertools import groupby
from typing import Any

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp, to_2tuple
from timm.models import (
    beit,
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    levit,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tiny_vit,
)
from torch import Tensor, nn

from lape_vit.analysis.positions import PositionView, layer_titles, over_layers
from lape_vit.analysis.views import LayerView, cosine_similarity, mean_by_offset, merge_equal_heads
from lape_vit.joins import Basic
from lape_vit.places import Grid


@torch.no_grad()
def timm_position_views(model: Any) -> list[PositionView]:
    """What there is to see of a model of timm, as :func:`lape_vit.analysis.positions.position_views` shows ours.

    ``similarity`` of a table, ``kernel`` of rotations, ``bias_offsets`` of biases of the logits that depend on the
    offset alone; where heads or windows change between layers, ``bias_offsets_part0`` and so on. Other positions, such
    as those in convolutions or in products with the query, are not shown.

    Raises:
        ValueError: a model without any of them, or weights that are NaN or infinite.
    """
    check_drawable(model)
    return [*_similarity(model), *_kernel(model), *_biases(model)]


def timm_encoding(model: Any) -> str:
    """What :func:`timm_position_views` shows, in short: the table's name and timm's classes."""
    parts = ["learnable"] if has_table(model) else []
    if has_rotation(model):
        parts.append(f"timm's {type(model.rope).__name__}")
    biases = dict.fromkeys(type(module).__name__ for module in relative_biases(model).values())
    return " + ".join([*parts, *(f"bias of timm's {name}" for name in biases)])


def check_drawable(model: Any) -> None:
    """Raise ValueError where there is nothing to see of a model of timm; it says what is missing."""
    if has_table(model):
        check_blocks(model)
    elif not has_rotation(model) and not relative_biases(model):
        raise ValueError(
            f"timm's {type(model).__name__} has no table pos_embed with a row for each patch, no rotations and no "
            "biases by offset: nothing to draw"
        )


def timm_grid(model: Any) -> Grid:
    """(H, W) of the patches of a model of timm; of one without them, of the first window that has a bias.

    Raises:
        ValueError: there is nothing to see of the model.
    """
    check_drawable(model)
    grid = patch_grid(model)
    if grid is None:
        grid = relative_bias(next(iter(relative_biases(model).values())))[1]
    return grid


def patch_grid(model: Any) -> Grid | None:
    """(H, W) of a model that embeds patches, None of another one."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else (grid[0], grid[1])


# ---- tables


def has_table(model: Any) -> bool:
    """Whether a trained table with a row for each patch is added to the input."""
    table, grid = getattr(model, "pos_embed", None), patch_grid(model)
    return isinstance(table, Tensor) and table.ndim == 3 and grid is not None and table.shape[1] >= grid[0] * grid[1]


def timm_tables(model: Any) -> Tensor | None:
    """The rows of the patches, (1, H*W, D); None where there is no table."""
    if not has_table(model):
        return None
    height, width = timm_grid(model)
    return model.pos_embed[:, -height * width :]


def check_blocks(model: Any) -> None:
    """Raise ValueError where what attention reads of a table cannot be told."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Module) or not all(hasattr(block, "attn") for block in blocks.children()):
        name = type(model).__name__
        raise ValueError(f"timm's {name} has blocks without one attention each: what they see cannot be drawn")


def _similarity(model: Any) -> list[PositionView]:
    if not has_table(model):
        return []
    height, width = timm_grid(model)
    tokens = model.pos_embed
    if hasattr(model, "norm_pre"):
        tokens = model.norm_pre(tokens)
    views = []
    for block in model.blocks:
        similarity = cosine_similarity(received_by_attention(block, tokens)[0, -height * width :])[None]
        views.append(LayerView("similarity", "cosine similarity of positions", similarity, bounded=True))
    return [over_layers(views, layer_titles(len(views), Basic.name))]


def received_by_attention(block: Any, tokens: Tensor) -> Tensor:
    """What a block's attention reads if the block reads ``tokens`` (1, R, D): after whichever norms precede it."""
    received: list[Tensor] = []
    hook = block.attn.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    try:
        block(tokens)
    finally:
        hook.remove()
    return received[0]


# ---- rotations


def has_rotation(model: Any) -> bool:
    """Whether q and k are turned by places, as in timm's Eva."""
    return hasattr(getattr(model, "rope", None), "get_embed") and patch_grid(model) is not None


def _kernel(model: Any) -> list[PositionView]:
    """The mean of q.k over random unit vectors q = k by offset: (1 or h, 2H-1, 2W-1) per layer."""
    if not has_rotation(model):
        return []
    grid = timm_grid(model)
    embeds = model.rope.get_embed(shape=grid)  # (H*W, 2 d); of trained frequencies (L, h, H*W, 2 d)
    per_layer = embeds.unbind() if embeds.ndim == 4 else [embeds[None]]
    kernels = [merge_equal_heads(_turned_products(one.double(), grid)) for one in per_layer]
    title = "mean q.k of equal q and k by offset"
    views = [LayerView("kernel", title, kernel, by_offset=True) for kernel in kernels]
    views = views * len(model.blocks) if len(views) == 1 else views
    return [over_layers(views, layer_titles(len(views), Basic.name))]


def _turned_products(embeds: Tensor, grid: Grid) -> Tensor:
    sines, cosines = embeds.chunk(2, dim=-1)
    return mean_by_offset((sines @ sines.mT + cosines @ cosines.mT) / sines.shape[-1], grid)


# ---- biases


def relative_biases(model: Any) -> dict[str, nn.Module]:
    """The modules that hold a bias of the logits by offset, by their path, in the order of the layers."""
    return {path: module for path, module in model.named_modules() if relative_bias(module) is not None}


@singledispatch
def relative_bias(module: nn.Module) -> Any:
    """The bias (h, S, S) that a module of timm adds to the logits between places, and its window (Y, X); or None."""
    return None


@relative_bias.register(RelPosBias)
@relative_bias.register(RelPosBiasTf)
@relative_bias.register(RelPosMlp)
def _(module: Any) -> Any:
    area = module.window_area  # after the prefix tokens
    return module.get_bias()[..., -area:, -area:].flatten(0, -3), module.window_size


@relative_bias.register(beit.RelativePositionBias)
@relative_bias.register(beit.Attention)
@relative_bias.register(swin_transformer.WindowAttention)
def _(module: Any) -> Any:
    if module.relative_position_bias_table is None:  # all blocks share another module's
        return None
    area = module.window_size[0] * module.window_size[1]  # after the prefix tokens
    index = module.relative_position_index[-area:, -area:]
    return module.relative_position_bias_table[index].permute(2, 0, 1), module.window_size


@relative_bias.register(swin_transformer_v2.WindowAttention)
def _(module: Any) -> Any:
    table = module.cpb_mlp(module.relative_coords_table).flatten(0, 2)
    return 16 * table[module.relative_position_index].permute(2, 0, 1).sigmoid(), module.window_size


@relative_bias.register(swin_transformer_v2_cr.WindowMultiHeadAttention)
def _(module: Any) -> Any:
    area = module.window_size[0] * module.window_size[1]
    return module.meta_mlp(module.relative_coordinates_log).T.unflatten(1, (area, area)), module.window_size


@relative_bias.register(levit.Attention)
@relative_bias.register(tiny_vit.Attention)
@relative_bias.register(efficientformer.Attention)
@relative_bias.register(efficientformer_v2.Attention2d)
@relative_bias.register(efficientvit_msra.CascadedGroupAttention)
def _(module: Any) -> Any:
    index = module.attention_bias_idxs
    window = getattr(module, "resolution", round(len(index) ** 0.5))  # EfficientFormer's is square
    return module.attention_biases[:, index], to_2tuple(window)


def _biases(model: Any) -> list[PositionView]:
    """One view of all layers; several where the number of heads or the window changes from layer to layer."""
    paths, offsets = [], []
    for path, module in relative_biases(model).items():
        bias, window = relative_bias(module)
        paths.append(path)
        offsets.append(mean_by_offset(bias, window))
    parts = [[*layers] for _, layers in groupby(range(len(paths)), key=lambda layer: offsets[layer].shape)]
    found = []
    for number, layers in enumerate(parts):
        name, title = "bias_offsets", "bias by offset (logits)"
        if len(parts) > 1:
            height, width = ((side + 1) // 2 for side in offsets[layers[0]].shape[1:])
            name, title = f"{name}_part{number}", f"{title}, windows of {height} x {width}"
        views = [LayerView(name, title, offsets[layer], by_offset=True) for layer in layers]
        titles = [title_of(paths[layer]) for layer in layers]
        found.append(replace(over_layers(views, titles), first=layers[0]))
    return found


def title_of(path: str) -> str:
    """A title of the layer that holds a module, from the module's path."""
    plain = re.fullmatch(r"blocks\.(\d+)\.attn(\.\w+)?", path)
    return f"block {plain[1]}, {Basic.name}" if plain else re.sub(r"(\.attn)?(\.rel_pos)?$", "", path)
