"""The registry of encodings. A new encoding is a file beside this one and a line in ``ENCODINGS``."""

from typing import Any, NamedTuple

from lape_vit.encodings.base import AbsoluteEncoding, AttentionEncoding, Encoding, Grid, NoEncoding
from lape_vit.encodings.learnable import Learnable
from lape_vit.encodings.relative import Relative
from lape_vit.encodings.relative_bias import RelativeBias
from lape_vit.encodings.rotary import Rope, RopeAxial, RopeMixed
from lape_vit.encodings.sinusoidal import Sinusoidal1D, Sinusoidal2D

__all__ = [
    "ALIASES",
    "ENCODINGS",
    "AbsoluteEncoding",
    "AttentionEncoding",
    "Encoding",
    "Grid",
    "Resolved",
    "all_options",
    "canonical_name",
    "names",
    "resolve",
]

ENCODINGS: dict[str, type[Encoding]] = {
    encoding.name: encoding
    for encoding in (
        NoEncoding,
        Learnable,
        Sinusoidal1D,
        Sinusoidal2D,
        Relative,
        RelativeBias,
        Rope,
        RopeAxial,
        RopeMixed,
    )
}

ALIASES = {"learn": "learnable", "sinusoidal": "2D_sin", "": "none"}
"""Other accepted names: those of the compact 2D-PE ViT, and timm's ``pos_embed=""``."""


class Resolved(NamedTuple):
    """A ``pe`` taken apart: the part that the join carries and the part that lives in attention."""

    name: str
    absolute: type[AbsoluteEncoding] | None
    attention: type[AttentionEncoding] | None

    def options(self) -> dict[str, Any]:
        """The options that the parts take, with their defaults."""
        absolute, attention = (part.options() if part else {} for part in (self.absolute, self.attention))
        return {**absolute, **attention}


def names() -> list[str]:
    """Every legal ``pe``: the registry, and each sum of an absolute encoding with one that lives in attention."""
    absolute = [name for name, encoding in ENCODINGS.items() if issubclass(encoding, AbsoluteEncoding)]
    attention = [name for name, encoding in ENCODINGS.items() if issubclass(encoding, AttentionEncoding)]
    return [*ENCODINGS, *(f"{first}+{second}" for first in absolute for second in attention)]


def all_options() -> dict[str, tuple[type, list[str]]]:
    """The options of all encodings: each one's type, and the names of the encodings that take it."""
    found: dict[str, tuple[type, list[str]]] = {}
    for name, encoding in ENCODINGS.items():
        for option, default in encoding.options().items():
            found.setdefault(option, (type(default), []))[1].append(name)
    return found


def resolve(pe: str) -> Resolved:
    """Take a ``pe`` apart, such as ``learnable`` or ``learnable+rope_mixed`` (in either order; aliases are accepted).

    Raises:
        ValueError: an unknown encoding, or a sum of other things than one absolute and one relative or rotary encoding.
    """
    parts = [ALIASES.get(part.strip(), part.strip()) for part in pe.split("+")]
    unknown = [part for part in parts if part not in ENCODINGS]
    if unknown:
        raise ValueError(f"unknown encoding pe={unknown[0]!r}; known: {', '.join(ENCODINGS)}, and sums such as a+b")
    encodings = [ENCODINGS[part] for part in parts]
    absolute = [encoding for encoding in encodings if issubclass(encoding, AbsoluteEncoding)]
    attention = [encoding for encoding in encodings if issubclass(encoding, AttentionEncoding)]
    if len(parts) > 1 and (len(absolute), len(attention), len(parts)) != (1, 1, 2):
        raise ValueError(f"pe={pe!r} is no legal sum: add one absolute encoding and one relative or rotary encoding")
    return Resolved(
        name="+".join(encoding.name for encoding in [*absolute, *attention]) or parts[0],
        absolute=absolute[0] if absolute else None,
        attention=attention[0] if attention else None,
    )


def canonical_name(pe: str) -> str:
    """The registry's name for ``pe``; ValueError as in :func:`resolve`."""
    return resolve(pe).name
