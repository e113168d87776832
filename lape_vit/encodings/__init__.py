"""The registry of encodings. A new encoding is a file beside this one and a line in ``FILES``."""

import ast
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lape_vit.encodings.base import (
    AbsoluteEncoding,
    AttentionEncoding,
    Encoding,
    LayerSpec,
    NoEncoding,
    TokenEncoding,
)

__all__ = [
    "ALIASES",
    "ENCODINGS",
    "FAMILIES",
    "AbsoluteEncoding",
    "AttentionEncoding",
    "Encoding",
    "LayerSpec",
    "Resolved",
    "TokenEncoding",
    "all_options",
    "by_family",
    "canonical_name",
    "names",
    "register",
    "resolve",
    "sums",
]

FILES = (
    "base",
    "learnable",
    "sinusoidal",
    "factorized",
    "fourier",
    "relative",
    "relative_bias",
    "rotary",
    "distance",
    "continuous_bias",
    "image_relative",
    "parabolic",
    "peg",
)
"""The modules whose encodings are offered, in this order: all classes of theirs that have a ``name``."""

FAMILIES: dict[str, type[Encoding]] = {
    "absolute": AbsoluteEncoding,
    "attention": AttentionEncoding,
    "token": TokenEncoding,
}
"""The families, in the order of the parts of a sum."""

ENCODINGS: dict[str, type[Encoding]] = {}

ALIASES = {"learn": "learnable", "sinusoidal": "2D_sin", "": "none"}
"""Other accepted names: those of the compact 2D-PE ViT, and timm's ``pos_embed=""``."""


def register(*encodings: type[Encoding]) -> None:
    """Add encodings to the registry.

    Raises:
        TypeError: one belongs to no family, or an option has no default of a plain type.
        ValueError: a name is taken.
    """
    for encoding in encodings:
        if not issubclass(encoding, (NoEncoding, *FAMILIES.values())):
            raise TypeError(f"{encoding.__name__} belongs to no family: derive it from one of {', '.join(FAMILIES)}")
        for option, default in encoding.options().items():
            if not isinstance(default, bool | int | float | str):
                raise TypeError(
                    f"option {option!r} of {encoding.__name__} needs a default: a number, a bool or a string"
                )
        if encoding.name in ENCODINGS or not re.fullmatch(r"\w+", encoding.name):
            raise ValueError(f"{encoding.__name__}.name = {encoding.name!r} is taken, or is no word")
        ENCODINGS[encoding.name] = encoding


def _register_file(file: str) -> None:
    module = importlib.import_module(f"{__name__}.{file}")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Encoding)]
    own = [encoding for encoding in found if encoding.__module__ == module.__name__ and "name" in vars(encoding)]
    if not own:
        raise TypeError(f"{module.__file__} defines no encoding: a subclass of a family, with a name")
    register(*own)


for _file in FILES:
    _register_file(_file)


@dataclass(frozen=True)
class Resolved:
    """A ``pe`` taken apart, at most one part of each family.

    Attributes:
        absolute: the part that the join carries.
        attention: the part that lives in attention.
        token: the part that is a function of the tokens.
        given: the options that differ from their defaults.
    """

    absolute: type[AbsoluteEncoding] | None
    attention: type[AttentionEncoding] | None
    token: type[TokenEncoding] | None
    given: dict[str, Any]

    @property
    def parts(self) -> list[type[Encoding]]:
        """The parts that are there; :class:`NoEncoding` where there are none."""
        return [part for part in (self.absolute, self.attention, self.token) if part is not None] or [NoEncoding]

    @property
    def name(self) -> str:
        """The canonical form: parts in the order of the families, each with the options that are no defaults."""
        return "+".join(_spelled(part, self.given) for part in self.parts)

    def check_real_places(self, what: str) -> None:
        """Raise ValueError, with ``what`` as its first words, where a part does not read real places."""
        for part in self.parts:
            if not part.reads_real_places:
                raise ValueError(f"{what} cannot be used with pe={part.name!r}: it does not read places between cells")

    def options(self) -> dict[str, Any]:
        """All options that the parts take, with their values."""
        return {option: value for part in self.parts for option, value in self.options_of(part).items()}

    def options_of(self, part: type[Encoding]) -> dict[str, Any]:
        """The options of one part, with their values."""
        return {**part.options(), **{name: self.given[name] for name in part.options().keys() & self.given.keys()}}


def _spelled(part: type[Encoding], given: Mapping[str, Any]) -> str:
    options = ",".join(f"{name}={_text(given[name])}" for name in part.options() if name in given)
    return f"{part.name}({options})" if options else part.name


def _text(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else str(value)


def names() -> list[str]:
    """Every single encoding."""
    return list(ENCODINGS)


def sums() -> list[str]:
    """Every sum of encodings of different families."""
    by_family = [
        ["", *(name for name, encoding in ENCODINGS.items() if issubclass(encoding, family))]
        for family in FAMILIES.values()
    ]
    found = [""]
    for family_names in by_family:
        found = [f"{first}+{second}".strip("+") for first in found for second in family_names]
    return [name for name in found if "+" in name]


def all_options() -> dict[str, tuple[type, list[str]]]:
    """The options of all encodings: each one's type, and the names of the encodings that take it."""
    found: dict[str, tuple[type, list[str]]] = {}
    for name, encoding in ENCODINGS.items():
        for option, default in encoding.options().items():
            found.setdefault(option, (type(default), []))[1].append(name)
    return found


def resolve(pe: str, options: Mapping[str, Any] | None = None) -> Resolved:
    """Take a ``pe`` apart.

    Args:
        pe: a name, with options in brackets where they are no defaults, or a sum of such, in any order:
            ``learnable``, ``rope_axial(rope_theta=10)``, ``learnable+rope_mixed``. Aliases are accepted.
        options: more options, by name; they must agree with those in ``pe``.

    Raises:
        ValueError: an unknown encoding, an option of the wrong type, two values of one option, or a sum that has
            two encodings of one family.
        TypeError: an option that none of the parts takes.
    """
    found: list[type[Encoding]] = []
    given = dict(options or {})
    for text in re.split(r"\+(?![^(]*\))", pe):
        name, in_brackets = _read_part(text, pe)
        encoding = ENCODINGS[name]
        found.append(encoding)
        for option, value in in_brackets.items():
            if option not in encoding.options():
                raise TypeError(f"pe={name!r} takes no option {option!r}" + _known(encoding.options()))
            if given.setdefault(option, value) != value:
                raise ValueError(f"pe={pe!r} says {option}={value}, and {option}={given[option]} was given as well")
    members = {family: [part for part in found if issubclass(part, FAMILIES[family])] for family in FAMILIES}
    if len(found) > 1 and (any(len(parts) > 1 for parts in members.values()) or NoEncoding in found):
        raise ValueError(f"pe={pe!r} is no legal sum: add at most one encoding of each family: {by_family()}")
    taken = {option: default for part in found for option, default in part.options().items()}
    if refused := sorted(given.keys() - taken.keys()):
        raise TypeError(f"pe={pe!r} takes no option {refused[0]!r}" + _known(taken))
    values = {option: _of_type_of(taken[option], value, option) for option, value in given.items()}
    choices = {option: values for part in found for option, values in part.choices().items()}
    for option in values.keys() & choices.keys():
        if values[option] not in choices[option]:
            legal = ", ".join(map(str, choices[option]))
            raise ValueError(f"option {option}={values[option]!r}: it is one of {legal}")
    parts: dict[str, Any] = {family: next(iter(of_family), None) for family, of_family in members.items()}
    return Resolved(**parts, given={option: value for option, value in values.items() if value != taken[option]})


def by_family() -> str:
    """All names, family by family, for messages."""
    members = {
        family: [name for name, encoding in ENCODINGS.items() if issubclass(encoding, base)]
        for family, base in FAMILIES.items()
    }
    listed = [f"{family} ({', '.join(of_family)})" for family, of_family in members.items() if of_family]
    return ", ".join([NoEncoding.name, *listed])


def _known(options: Iterable[str]) -> str:
    return f"; its options: {', '.join(options)}" if options else ""


def _read_part(text: str, pe: str) -> tuple[str, dict[str, Any]]:
    """A name of the registry and its options, of one part of a ``pe``."""
    match = re.fullmatch(r"\s*(\w*)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise ValueError(f"pe={pe!r} cannot be read: write a name, as name(option=value), or a sum such as a+b")
    name = ALIASES.get(match[1], match[1])
    if name not in ENCODINGS:
        raise ValueError(f"unknown encoding pe={match[1]!r}; known: {by_family()}; and sums with one of each family")
    options = {}
    for item in filter(str.strip, (match[2] or "").split(",")):
        option, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"pe={pe!r} cannot be read: {item.strip()!r} is no option=value")
        try:
            options[option.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[option.strip()] = value.strip()
    return name, options


def _of_type_of(default: Any, value: Any, option: str) -> Any:
    """The value in the type of the option's default; ValueError where it is of another type."""
    kind = type(default)
    if kind is bool:
        value = {"true": True, "false": False}.get(str(value).lower(), value)
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif kind is str and not isinstance(value, str):
        value = str(value)
    if type(value) is not kind:
        article = {int: "a whole number", float: "a number", bool: "True or False", str: "a word"}[kind]
        raise ValueError(f"option {option}={value!r}: expected {article}")
    return value


def canonical_name(pe: str, options: Mapping[str, Any] | None = None) -> str:
    """The canonical form of ``pe``; errors as in :func:`resolve`."""
    return resolve(pe, options).name
