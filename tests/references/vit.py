"""A plain vision transformer (Dosovitskiy et al., arXiv 2010.11929; timm's parameter names), to hold whole models.

It has the two openings that the references need: terms of a join, and a function of the tokens after a block.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.references.common import Array, gelu, softmax

if TYPE_CHECKING:
    from tests.references.joins import Terms

State = dict[str, Array]


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Over the last axis of (R, D)."""
    out = np.zeros_like(x)
    for row, vector in enumerate(x):
        mean = vector.mean()
        variance = ((vector - mean) ** 2).mean()
        out[row] = (vector - mean) / math.sqrt(variance + eps) * weight + bias
    return out


def linear(x: Array, state: State, name: str) -> Array:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: Array, state: State, name: str) -> Array:
    return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attend(x: Array, state: State, name: str, num_heads: int) -> Array:
    """Self-attention of one image's tokens (N, D)."""
    tokens, width = x.shape
    q, k, v = linear(x, state, f"{name}.qkv").reshape(tokens, 3, num_heads, width // num_heads).transpose(1, 2, 0, 3)
    gathered = np.zeros((tokens, num_heads, width // num_heads))
    for head in range(num_heads):
        for token in range(tokens):
            weights = softmax(k[head] @ q[head, token] / math.sqrt(width // num_heads))
            gathered[token, head] = weights @ v[head]
    return linear(gathered.reshape(tokens, width), state, f"{name}.proj")


def patches(image: Array, state: State) -> Array:
    """(M, D) of an image (3, height, width), row by row."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    size = weight.shape[-1]
    rows = []
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            pixels = image[:, top : top + size, left : left + size]
            rows.append([float((kernel * pixels).sum()) for kernel in weight] + bias)
    return np.array(rows)


def logits(
    image: Array,
    state: State,
    num_heads: int,
    terms: "Terms | None" = None,
    after_block: dict[int, Callable[[Array], Array]] | None = None,
) -> Array:
    """(classes,) of one image (3, height, width).

    A model without ``cls_token`` takes the mean over its patches, after its last norm or, where the state has
    ``fc_norm``, before it. Norms have eps 1e-6.

    Args:
        state: by timm's names.
        terms: of a join.
        after_block: block's number: what it leaves, (N, D), becomes this function of it.
    """
    x = patches(image, state)
    if terms is not None:
        x = x + terms.input
    prefix = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
    x = np.concatenate([*prefix, x])
    depth = 0
    while f"blocks.{depth}.norm1.weight" in state:
        name = f"blocks.{depth}"
        read = norm(x, state, f"{name}.norm1")
        if terms is not None and (term := terms.attention[depth]) is not None:
            read = read + term
        x = x + attend(read, state, f"{name}.attn", num_heads)
        hidden = np.vectorize(gelu)(linear(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
        x = x + linear(hidden, state, f"{name}.mlp.fc2")
        if after_block and depth in after_block:
            x = after_block[depth](x)
        depth += 1
    if "norm.weight" in state:
        x = norm(x, state, "norm")
    if terms is not None and terms.output is not None:
        x = x + terms.output
    pooled = x[:1] if "cls_token" in state else x.mean(0, keepdims=True)
    if "fc_norm.weight" in state:
        pooled = norm(pooled, state, "fc_norm")
    return linear(pooled, state, "head")[0]
