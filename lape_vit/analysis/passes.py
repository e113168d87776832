"""A forward pass taken apart: what each block is given, and how the pass continues from there with a change.

Shapes: B batch, P prefix tokens, M = H*W patches, N = P + M tokens, D embedding width, L layers, C classes. Block l
reads the residual stream x_l (B, N, D).
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lape_vit.analysis.positions import Model
from lape_vit.attention import Block
from lape_vit.joins import Terms
from lape_vit.places import Places


class Pass(NamedTuple):
    """One forward pass over a batch.

    Attributes:
        inputs: x_l of each block l, before a term that its join adds to it: L times (B, N, D).
        reads: what attention of each block reads, after norm1 and all terms: L times (B, N, D).
        output: the tokens after the last norm, which the classifier is given, (B, N, D).
        logits: (B, C).
        places: of the patches, as attention reads them.
        terms: what the join adds.
    """

    inputs: list[Tensor]
    reads: list[Tensor]
    output: Tensor
    logits: Tensor
    places: Places
    terms: Terms

    def first(self, count: int) -> "Pass":
        """The pass over the first images of the batch."""
        return Pass(
            [x[:count] for x in self.inputs],
            [x[:count] for x in self.reads],
            self.output[:count],
            self.logits[:count],
            of_images(self.places, 0, count),
            self.terms.changed(lambda term: term[:count]),
        )


def of_images(places: Places, start: int, count: int) -> Places:
    """The places of some images of a batch, if images differ in them."""
    if places.x is None or places.y is None or not places.differs_by_image:
        return places
    return places._replace(x=places.x[start : start + count], y=places.y[start : start + count])


@torch.no_grad()
def observe(model: Model, images: Tensor) -> Pass:
    """Run a model in evaluation mode on images (B, C, height, width), and keep what each block is given."""
    inputs: list[Tensor] = []
    reads: list[Tensor] = []
    x, terms, places = model.embed(*model.tokens_of(images))
    with ExitStack() as hooks:
        for block in cast("Iterable[Block]", model.blocks):
            for module, found in ((block, inputs), (block.attn, reads)):
                handle = module.register_forward_pre_hook(lambda module, args, found=found: found.append(args[0]))
                hooks.callback(handle.remove)
        output = features_from(model, 0, x, terms, places)
    return Pass(inputs, reads, output, model.forward_head(output), places, terms)


def features_from(model: Model, layer: int, x: Tensor, terms: Terms, places: Places) -> Tensor:
    """x_l (B, N, D), the input of block `layer`, to the tokens after the last norm, (B, N, D)."""
    for number in range(layer, len(model.blocks)):
        x = model.after_block(number, model.forward_block(number, x, terms, places, None, False), places)
    return model.normalise(x, terms)


def logits_from(model: Model, layer: int, x: Tensor, terms: Terms, places: Places) -> Tensor:
    """x_l (B, N, D), the input of block `layer`, to logits (B, C)."""
    return model.forward_head(features_from(model, layer, x, terms, places))


def grid_of_images(model: Model, images: Tensor) -> tuple[int, int]:
    """(H, W) of the patches of images (B, C, height, width)."""
    return model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
