"""How far attention looks and how sharp it is, by layer and head.

Shapes: B batch, P prefix tokens, M = H*W patches, N = P + M tokens, h heads, L layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lape_vit.analysis.attention_maps import logits
from lape_vit.analysis.passes import Pass, grid_of_images, observe, of_images
from lape_vit.analysis.positions import Model, attentions
from lape_vit.attention import Attention
from lape_vit.places import Grid, Places

NUMBERS_AT_A_TIME = 2**24
"""Attention weights that are held at a time, at most, unless one image has more."""


@dataclass(frozen=True)
class AttentionStatistics:
    """Of one layer, the mean over images and over the patches as queries.

    Attributes:
        entropy: of the weights that a query gives to all N tokens, -sum a log a, in nats, by head: (h,), float64. It is
            log N where all tokens have the same weight, and 0 where one has it all.
        distance: mean distance of the patches that a query attends to, in patches, by head: (h,), float64; each
            counts by its weight, and prefix tokens, which have no place, do not count. In pixels, as in the ViT paper
            (https://arxiv.org/abs/2010.11929, figure 7 and appendix D.7), it is this times the patch's side.
    """

    entropy: Tensor
    distance: Tensor


@dataclass
class AttentionSums:
    """Sums over images from which the statistics of one layer are made."""

    images: int = 0
    sums: Tensor | None = None

    def add(self, attn: Attention, read: Tensor, places: Places, grid: Grid, num_prefix_tokens: int) -> None:
        """Add what attention makes of tokens (B, N, D).

        Args:
            places: as attention reads them.
            grid: (H, W) of the patches, in which distances are measured.
        """
        dx, dy = Places(grid, device=read.device).offsets(torch.float64)
        distances = torch.hypot(dx, dy).to(read.dtype)
        at_a_time = max(1, NUMBERS_AT_A_TIME // (attn.num_heads * read.shape[1] ** 2))
        for start in range(0, len(read), at_a_time):
            part = read[start : start + at_a_time]
            weights = logits(attn, part, of_images(places, start, len(part)))[:, :, num_prefix_tokens:].softmax(dim=-1)
            to_patches = weights[..., num_prefix_tokens:]
            looked = (to_patches * distances).sum(dim=-1) / to_patches.sum(dim=-1).clamp(min=1e-30)
            found = torch.stack([torch.special.entr(weights).sum(dim=-1).mean(dim=-1), looked.mean(dim=-1)])
            summed = found.double().sum(dim=1)
            self.sums = summed if self.sums is None else self.sums + summed
        self.images += len(read)

    def statistics(self) -> AttentionStatistics:
        """The result for all images added.

        Raises:
            ValueError: there are none.
        """
        if self.sums is None:
            raise ValueError("no images to see attention on")
        return AttentionStatistics(*(self.sums / self.images).cpu())


def add_pass(sums: Iterable[AttentionSums], model: Model, seen: Pass, grid: Grid) -> None:
    """Add a pass to the sums of all layers."""
    for of_layer, attn, read in zip(sums, attentions(model), seen.reads, strict=True):
        of_layer.add(attn, read, seen.places, grid, model.num_prefix_tokens)


@torch.no_grad()
def attention_statistics(model: Model, images: Iterable[Tensor]) -> list[AttentionStatistics]:
    """Entropy and mean distance of attention in every layer: one entry per block.

    Args:
        model: in evaluation mode. After :meth:`~lape_vit.VisionTransformer.extrapolate` and ``set_input_size`` it is
            seen as it works at that size.
        images: batches (B, C, height, width), normalised, all of one size.

    Raises:
        ValueError: there are no images.
    """
    sums = [AttentionSums() for _ in model.blocks]
    for batch in images:
        add_pass(sums, model, observe(model, batch), grid_of_images(model, batch))
    return [of_layer.statistics() for of_layer in sums]


def uniform_distance(grid: Grid) -> float:
    """The mean distance, in patches, of attention that gives the same weight to all patches of a grid (H, W)."""
    dx, dy = Places(grid).offsets()
    return torch.hypot(dx, dy).mean().item()
