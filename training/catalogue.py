"""The encodings, their options and the joins, read from the sources of `lape_vit`, for the command line.

To import an encoding is to import torch, which takes seconds, and `--help` and a mistyped flag should not. What is read
here is what the registries of `lape_vit` hold once they are imported.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

LAPE_VIT = Path(__file__).parent.parent / "lape_vit"
ENCODINGS = LAPE_VIT / "encodings"


def encoding_options() -> dict[str, tuple[type, list[str]]]:
    """The options of all encodings: each one's type, and the names of the encodings that take it.

    The same as `lape_vit.encodings.all_options()`.

    Raises:
        TypeError: the default of an option is no literal.
    """
    found: dict[str, tuple[type, list[str]]] = {}
    for name, encoding in encodings().items():
        for option, default in options_of(encoding).items():
            found.setdefault(option, (type(default), []))[1].append(name)
    return found


def encodings_by_family() -> str:
    """All names, family by family; the same as `lape_vit.encodings.by_family()`."""
    families = value_of("FAMILIES", parse(ENCODINGS / "__init__.py").body)
    assert isinstance(families, ast.Dict)
    names = [ast.literal_eval(name) for name in families.keys if name is not None]
    bases = dict(zip(map(ast.unparse, families.values), names, strict=True))
    members: dict[str, list[str]] = {"": [], **{family: [] for family in bases.values()}}
    for name, encoding in encodings().items():
        family = next((bases[parent.name] for parent in with_parents(encoding) if parent.name in bases), "")
        members[family].append(name)
    without = members.pop("")
    return ", ".join([*without, *(f"{family} ({', '.join(names)})" for family, names in members.items() if names)])


def join_names() -> list[str]:
    """Every join; the same as those of `lape_vit.joins.JOINS`."""
    return list(named(parse(LAPE_VIT / "joins.py")))


# ---- syntax trees


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), path)


def encodings() -> dict[str, ast.ClassDef]:
    """The classes that the registry holds, by the names of the encodings, in its order."""
    files = value_of("FILES", parse(ENCODINGS / "__init__.py").body)
    assert files is not None
    found: dict[str, ast.ClassDef] = {}
    for file in ast.literal_eval(files):
        found |= named(parse(ENCODINGS / f"{file}.py"))
    return {name: one for name, one in found.items() if "Encoding" in (parent.name for parent in with_parents(one))}


def named(module: ast.Module) -> dict[str, ast.ClassDef]:
    """The classes of a module that have a `name` of their own, by that name."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    names = {node.name: value_of("name", node.body) for node in classes}
    return {ast.literal_eval(name): node for node in classes if (name := names[node.name]) is not None}


def value_of(name: str, body: list[ast.stmt]) -> ast.expr | None:
    """The value that statements assign to a name, with or without an annotation."""
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in (ast.unparse(one) for one in targets if one):
            return node.value
    return None


@cache
def all_classes() -> dict[str, ast.ClassDef]:
    """The classes of all modules of encodings, abstract ones included, by their names in Python."""
    bodies = [parse(path).body for path in sorted(ENCODINGS.glob("*.py"))]
    return {node.name: node for body in bodies for node in body if isinstance(node, ast.ClassDef)}


def with_parents(node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """A class, and those that it inherits from, the nearest first."""
    yield node
    for base in node.bases:
        if parent := all_classes().get(ast.unparse(base).rpartition(".")[2]):
            yield from with_parents(parent)


def options_of(encoding: ast.ClassDef) -> dict[str, Any]:
    """The keyword-only arguments of its `__init__`, which may be inherited, with their defaults."""
    functions = (node for one in with_parents(encoding) for node in one.body if isinstance(node, ast.FunctionDef))
    arguments = next(node.args for node in functions if node.name == "__init__")
    options = {}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        try:
            options[argument.arg] = ast.literal_eval(default or "")
        except (ValueError, SyntaxError) as error:
            raise TypeError(
                f"option {argument.arg!r} of {encoding.name} needs a default: a literal number, bool or string"
            ) from error
    return options
