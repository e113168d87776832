"""Vision transformers that timm built, made ours."""

from typing import Any

from torch import nn

from lape_vit.augmentation import PlaceAugmentation
from lape_vit.vit import CLASSES, VisionTransformer, adopt, resolve

TIMMS_CLASSES = tuple(CLASSES)
"""timm's classes of which :func:`from_timm` takes instances."""


def from_timm(
    model: nn.Module,
    pe: str | None = None,
    join_type: str = "basic",
    pos_shift: float = 0.0,
    pos_jitter: float = 1.0,
    pos_rescale: float = 1.0,
    **options: Any,
) -> VisionTransformer:
    """Give a vision transformer of timm any encoding under any join, with its weights.

    With neither ``pe`` nor ``join_type`` its parameters and logits stay the same. Of another encoding or join, what it
    has in common with the model's own stays, the rest is new, as in a model without training.

    Args:
        model: an instance of timm's VisionTransformer or VisionTransformerDistilled, with timm's usual blocks. It is
            changed in place.
        pe: an encoding of :mod:`lape_vit.encodings`, or a sum of some; default: what the model has.
        join_type: a join of :mod:`lape_vit.joins`.
        pos_shift, pos_jitter, pos_rescale: as those of :class:`lape_vit.VisionTransformer`.
        options: of the encoding.

    Returns:
        The same instance, now of our class.

    Raises:
        ValueError: the model is of another class or has other blocks; unknown names, an illegal pair, a width that the
            encoding cannot divide. The model is unchanged.
        TypeError: an option that the encoding does not take.
    """
    if type(model) not in CLASSES:
        if isinstance(model, VisionTransformer):
            raise ValueError(f"the model is ours already, with pe={model.pe!r}: build another one with pe=...")
        known = ", ".join(known.__name__ for known in CLASSES)
        raise ValueError(f"a model of class {type(model).__name__} cannot take an encoding; timm's that can: {known}")
    own = "none" if model.pos_embed is None else "learnable"
    encoding = resolve(own if pe is None else pe, join_type, options)
    adopt(model, encoding, join_type, PlaceAugmentation(pos_shift, pos_jitter, pos_rescale))
    assert isinstance(model, VisionTransformer)
    return model
