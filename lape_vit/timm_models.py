"""Vision transformers that timm built, made ours."""

from typing import Any

from timm.models import Eva
from torch import nn

from lape_vit.augmentation import PlaceAugmentation
from lape_vit.encodings.rotary import RopeMixed
from lape_vit.eva import Rotation, as_vision_transformer, mixed_frequencies, rotation_of
from lape_vit.vit import CLASSES, VisionTransformer, adopt, resolve

TIMMS_CLASSES = (*CLASSES, Eva)
"""timm's classes of which :func:`from_timm` takes instances."""


def from_timm(
    model: nn.Module,
    pe: str | None = None,
    join_type: str = "basic",
    pos_shift: float | None = None,
    pos_jitter: float | None = None,
    pos_rescale: float | None = None,
    **options: Any,
) -> VisionTransformer:
    """Give a vision transformer of timm any encoding under any join, with its weights.

    With neither ``pe`` nor ``join_type`` its parameters and logits stay the same. Of another encoding or join, what it
    has in common with the model's own stays, the rest is new, as in a model without training.

    Args:
        model: an instance of timm's VisionTransformer or VisionTransformerDistilled with timm's usual blocks, which is
            changed in place; or of Eva, as RoPE-ViT and DINOv3 are, whose parts go into a new instance.
        pe: an encoding of :mod:`lape_vit.encodings`, or a sum of some; default: what the model has.
        join_type: a join of :mod:`lape_vit.joins`.
        pos_shift, pos_jitter, pos_rescale: as of :class:`lape_vit.VisionTransformer`; default: what the model has.
        options: of the encoding.

    Returns:
        The model, now of our class.

    Raises:
        ValueError: the model is of another class, has other blocks, or an encoding of its own that is none of ours;
            unknown names, an illegal pair, a width that the encoding cannot divide. The model is unchanged.
        TypeError: an option that the encoding does not take.
    """
    if type(model) not in TIMMS_CLASSES:
        if isinstance(model, VisionTransformer):
            raise ValueError(f"the model is ours already, with pe={model.pe!r}: build another one with pe=...")
        known = ", ".join(known.__name__ for known in TIMMS_CLASSES)
        raise ValueError(f"a model of class {type(model).__name__} cannot take an encoding; timm's that can: {known}")
    rotation = rotation_of(model) if isinstance(model, Eva) and pe is None else Rotation("", {})
    own = "+".join(part for part in ("" if model.pos_embed is None else "learnable", rotation.pe) if part)
    encoding = resolve(own if pe is None else pe, join_type, options)
    places = {"shift": pos_shift, "jitter": pos_jitter, "rescale": pos_rescale}
    given = {name: value for name, value in places.items() if value is not None}
    ours: Any = as_vision_transformer(model) if isinstance(model, Eva) else model
    adopt(ours, encoding, join_type, PlaceAugmentation(**{**rotation.augmentation, **given}))
    frequencies = mixed_frequencies(model) if isinstance(model, Eva) else None
    if frequencies is not None and encoding.attention is RopeMixed:
        for block, of_layer in zip(ours.blocks, frequencies, strict=True):
            block.attn.encoding.frequencies.data.copy_(of_layer)
    return ours
