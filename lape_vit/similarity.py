"""How alike the positions are that a layer sees: cosine similarity, on tensors only.

Shapes: P prefix tokens, grid (H, W) of patches in row-major order, N = P + H*W tokens, D embedding width, L layers.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_vit.encodings import Grid
from lape_vit.vit import Block, VisionTransformer, VisionTransformerDistilled

Model = VisionTransformer | VisionTransformerDistilled


@torch.no_grad()
def layer_positions(model: Model, grid: Grid | None = None) -> list[Tensor]:
    """What the attention of block 0 .. L-1 reads of the patches' positions, by the model's own norms and their eps.

    Where positions are added after norm1 (LaPE), that is block l's term as it is. Where they are added before it, norm1
    is not linear, so the answer is what it makes of the positions alone: ``norm1_l(w)`` if w is added to the input,
    ``norm1_l(term_l)`` if block l adds a term of its own to the residual stream. What earlier blocks' terms have left
    in that stream counts as its content.

    Args:
        grid: (H, W) patches; default: what the model is built for.

    Returns:
        One (H*W, D) per block, without the prefix tokens.

    Raises:
        ValueError: the model's encoding has no absolute part.
    """
    input_term, terms = model.position_terms(grid)
    if input_term is not None:
        terms = [model.norm_pre(input_term) for _ in model.blocks]
    positions = []
    for block, term in zip(cast("Iterable[Block]", model.blocks), terms, strict=True):
        if term is None:
            raise ValueError(f"pe={model.pe!r} is no absolute encoding: it has no vector per patch, so nothing to draw")
        read = term if model.join.target == "attention" else block.norm1(term)
        positions.append(read[0, model.num_prefix_tokens :])
    return positions


def cosine_similarity(rows: Tensor) -> Tensor:
    """Cosine of the angle between any two rows, in float64.

    It is exactly symmetric, exactly 1 on the diagonal and never outside [-1, 1]. A row of zeros has no direction: its
    similarity is 0 with every other row and, by the diagonal's rule, 1 with itself.

    Args:
        rows: (M, D), any floating dtype and any scale.

    Returns:
        (M, M).

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not rows.isfinite().all():
        raise ValueError("positions hold NaN or infinite values: they have no similarity")
    rows = rows.double()
    # Taken out first, since the squares of tiny or huge values leave float64's range.
    largest = rows.abs().amax(dim=1, keepdim=True)
    directions = F.normalize(rows / largest.where(largest > 0, 1), dim=1)
    similarity = directions @ directions.T
    similarity = ((similarity + similarity.T) / 2).clamp(-1, 1)
    return similarity.fill_diagonal_(1)


def token_map(similarity: Tensor, grid: Grid, token: tuple[int, int]) -> Tensor:
    """One patch's similarity to every patch, laid out as the patches are.

    Args:
        similarity: (H*W, H*W).
        grid: (H, W).
        token: (row, column) of the patch, from 0.

    Returns:
        (H, W).

    Raises:
        ValueError: the token lies outside the grid.
    """
    (row, column), (height, width) = token, grid
    assert similarity.shape == (height * width, height * width)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"token {row},{column} lies outside the grid of {height} x {width} patches: "
            f"rows are 0 to {height - 1}, columns 0 to {width - 1}"
        )
    return similarity[row * width + column].unflatten(0, grid)
