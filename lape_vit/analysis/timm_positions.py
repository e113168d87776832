"""What the layers of timm's own vision transformers see of positions: models with a table that is added to the input.

Shapes: grid (H, W) of patches in row-major order, R rows of the table (some prefix tokens, then H*W), D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lape_vit.analysis.positions import PositionView, layer_titles, over_layers
from lape_vit.analysis.views import LayerView, cosine_similarity
from lape_vit.joins import Basic
from lape_vit.places import Grid


@torch.no_grad()
def timm_position_views(model: Any) -> list[PositionView]:
    """The view ``similarity`` of :func:`lape_vit.analysis.positions.position_views`, of a model of timm.

    Positions that such a model has besides, in the logits or as rotations, are not shown.

    Args:
        model: with a table ``pos_embed`` (1, R, D) and blocks that each have an ``attn``.

    Raises:
        ValueError: another kind of model, or weights that are NaN or infinite.
    """
    height, width = timm_grid(model)
    tokens = model.pos_embed
    if hasattr(model, "norm_pre"):
        tokens = model.norm_pre(tokens)
    views = []
    for block in model.blocks:
        similarity = cosine_similarity(received_by_attention(block, tokens)[0, -height * width :])[None]
        views.append(LayerView("similarity", "cosine similarity of positions", similarity, bounded=True))
    return [over_layers(views, layer_titles(len(views), Basic.name))]


def timm_grid(model: Any) -> Grid:
    """(H, W) of a model whose positions can be shown.

    Raises:
        ValueError: no table, no grid that fits it, or blocks of another kind; says which.
    """
    table, grid = getattr(model, "pos_embed", None), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    name = type(model).__name__
    if not isinstance(table, Tensor) or table.ndim != 3 or grid is None or table.shape[1] < grid[0] * grid[1]:
        raise ValueError(f"timm's {name} has no table pos_embed with a row for each patch: nothing to draw")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Module) or not all(hasattr(block, "attn") for block in blocks.children()):
        raise ValueError(f"timm's {name} has blocks without one attention each: what they see cannot be drawn")
    return grid[0], grid[1]


def received_by_attention(block: Any, tokens: Tensor) -> Tensor:
    """What a block's attention reads if the block reads ``tokens`` (1, R, D): after whichever norms precede it."""
    received: list[Tensor] = []
    hook = block.attn.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    try:
        block(tokens)
    finally:
        hook.remove()
    return received[0]
