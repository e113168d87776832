"""Attention of each layer on an image, and the part of its logits that positions bring in.

Shapes: P prefix tokens, N = P + H*W tokens, D embedding width, h heads.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lape_vit.analysis.positions import Model, attentions
from lape_vit.attention import Attention, Block
from lape_vit.places import Places


@dataclass(frozen=True)
class LayerAttention:
    """One layer on one image; query first, key second.

    Attributes:
        weights: what attention gives each key, rows sum to 1: (h, N, N).
        content: the part of the logits that would be there without positions: (h, N, N).
        position: all that positions add to it, so that the softmax of the sum of both are the weights: (h, N, N).
            Both parts are None where the logits do not split; see :func:`why_no_split`.
    """

    weights: Tensor
    content: Tensor | None
    position: Tensor | None


def why_no_split(model: Model) -> str | None:
    """Why the logits are no sum of content and position, in words; None where they are.

    They are where norm1 reads content alone: positions reach attention after it, or as a bias.
    """
    pair = f"pe={model.pe!r}, join_type={model.join_type!r}"
    first, terms = attentions(model)[0], model.position_terms()
    if model.join.encoding is None and first.encoding is None:
        return f"{pair}: there are no positions"
    if first.encoding is not None and "rotate" in first.encoding.overridden:
        return f"{pair}: positions turn q and k, and are no term of q.k"
    if terms.input is not None or any(term is not None for term in terms.residual):
        return f"{pair}: norm1 reads the sum of content and positions"
    if model.join.encoding is not None and not isinstance(first.q_norm, nn.Identity):
        return f"{pair}: q and k are normalised after positions were added"
    return None


@torch.no_grad()
def attention_maps(model: Model, image: Tensor) -> list[LayerAttention]:
    """Attention of every layer on an image.

    Args:
        model: in evaluation mode.
        image: (1, C, height, width), normalised.
    """
    normed: list[Tensor] = []
    calls: list[tuple[Tensor, Places]] = []
    with ExitStack() as hooks:
        for block in cast("Iterable[Block]", model.blocks):
            for handle in (
                block.norm1.register_forward_hook(lambda module, args, output: normed.append(output)),
                block.attn.register_forward_pre_hook(lambda module, args: calls.append(args[:2])),
            ):
                hooks.callback(handle.remove)
        model.forward_features(image)
    splits = why_no_split(model) is None
    layers = []
    for attn, content, (read, places) in zip(attentions(model), normed, calls, strict=True):
        weights = logits(attn, read, places)[0].softmax(dim=-1)
        parts = split_logits(attn, content, read, places) if splits else (None, None)
        layers.append(LayerAttention(weights, *parts))
    return layers


def logits(attn: Attention, read: Tensor, places: Places) -> Tensor:
    """The logits of tokens (B, N, D), as attention computes them: (B, h, N, N)."""
    q, k, _ = attn.project(read)
    temperature = attn.temperature(read.shape[1])
    if attn.encoding is None:
        return temperature * (attn.scale * q @ k.mT)
    q, k = attn.encoding.rotate(q, k, places)
    bias = attn.encoding.logits_bias(q, k, places)
    if "widen" in attn.encoding.overridden:
        q, k, _ = attn.encoding.widen(q, k, k, read, places)
    return temperature * (attn.scale * q @ k.mT + (0 if bias is None else bias))


def split_logits(attn: Attention, content: Tensor, read: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """What content gives to the logits alone, and what positions add: each (h, N, N).

    With c of content alone, q = qc + qw and k = kc + kw, that is qc.kc, and all that the logits have besides.

    Args:
        content: what norm1 gives, (1, N, D).
        read: the same with positions, (1, N, D).
    """
    q_content, k_content, _ = attn.project(content)
    of_content = attn.temperature(content.shape[1]) * (attn.scale * q_content @ k_content.mT)[0]
    return of_content, logits(attn, read, places)[0] - of_content
