"""Rules that keep the house in order, checked on the syntax tree of every file.

Imports run downward only; only ``lape_vit/encodings/`` and ``lape_vit/joins.py`` compare with an encoding's or a join's
name; torch, torchvision, timm and argparse are used by their public names. Each checker takes the root of a tree and
returns its faults as ``path:line: what``, so that each rule is also shown to catch a bad tree.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

from lape_vit import encodings
from lape_vit.joins import JOINS

ROOT = Path(__file__).resolve().parents[1]
NAMES = {*encodings.names(), *encodings.ALIASES, *JOINS} - {""}
EVERYDAY = {"none"}
"""Names that options of other things share: a fault only in a comparison of what ``POSITION`` recognises."""
POSITION = re.compile(r"\bpe\b|pos_embed|encoding|join")
LIBRARIES = ("torch", "torchvision", "timm", "argparse")

BENEATH: dict[str, tuple[str, ...]] = {
    "places": (),
    "augmentation": ("places",),
    "encodings/offsets": ("places",),
    "encodings/base": ("encodings/offsets",),
    "encodings/tables": ("places",),
    "encodings/*": ("encodings/base", "encodings/tables"),
    "encodings": ("encodings/*",),
    "joins": ("encodings",),
    "biased_attention": ("encodings/base",),
    "attention": ("biased_attention", "joins"),
    "dropout": (),
    "vit": ("attention", "augmentation"),
    "compact": ("dropout", "vit"),
    "eva": ("encodings",),
    "convert": ("vit", "eva"),
    "timm_models": ("vit", "eva"),
    "analysis": ("vit",),
    "checkpoints": (),
    "images": (),
    "export": ("images",),
    "drawing": ("analysis", "images"),
    "plot": ("drawing",),
    "models_lape": ("analysis", "compact", "convert", "timm_models"),
    "from_checkpoint": ("checkpoints", "models_lape"),
    "lape_vit": ("export", "from_checkpoint", "plot"),
    "runtime": (),
    "options": ("runtime",),
    "loading": ("options",),
    "training": ("checkpoints", "options"),
    "datasets": ("loading",),
    "engine": ("training",),
    "setup": ("datasets", "engine", "lape_vit"),
    "figures": ("setup",),
    "comparison": ("setup",),
    "diagnosis": ("comparison",),
    "commands": ("diagnosis", "figures"),
    "benchmarks": ("commands",),
}
"""Layer: the layers directly beneath it. A module may import its own layer and all that lies beneath."""
COMMANDS = ("main", "compare", "diagnose", "predict", "similarity_visualize")


def layer_of(module: str) -> str:
    """The layer of a module; empty where it has none."""
    match module.split("."):
        case ["lape_vit"]:
            return "lape_vit"
        case ["lape_vit", "encodings"]:
            return "encodings"
        case ["lape_vit", "encodings", ("base" | "offsets" | "tables") as name]:
            return f"encodings/{name}"
        case ["lape_vit", "encodings", _]:
            return "encodings/*"
        case ["lape_vit", name, *_]:
            return name if name in BENEATH else ""
        case ["training", "options" | "sources" | "catalogue" | "command_line"]:
            return "options"
        case ["training", "setup" | "models" | "evaluation"]:
            return "setup"
        case [name] if name in COMMANDS:
            return "commands"
        case [name, *_]:
            return name if name in BENEATH else ""
    return ""


def within_reach(layer: str) -> set[str]:
    """A layer and all that lies beneath it."""
    return {layer}.union(*(within_reach(lower) for lower in BENEATH[layer]))


def sources(root: Path) -> list[Path]:
    """The Python files at the root and in the folders beside them that hold Python, tests included."""
    folders = {path.parent for path in root.glob("[!.]*/*.py")}
    return sorted([*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def modules(root: Path) -> dict[str, Path]:
    """Dotted name: file, tests excluded."""
    named = {}
    for path in sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != "tests":
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str, str]]:
    """Every import as (line, absolute dotted name, the name that it binds)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}", alias.asname or alias.name


def upward_imports(root: Path) -> list[str]:
    """Imports of a module from a layer that is not beneath the importer's."""
    known = modules(root)
    faults = []
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for line, target, _ in imports(ast.parse(path.read_text(encoding="utf-8")), package):
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and layer_of(target) not in within_reach(layer_of(module)):
                faults.append(f"{path.relative_to(root)}:{line}: {module} imports {target}")
    return faults


def imported_commands(root: Path) -> list[str]:
    """Imports of a command by a module: what both need lies beneath."""
    faults = []
    for module, path in modules(root).items():
        for line, target, _ in imports(ast.parse(path.read_text(encoding="utf-8")), module.rpartition(".")[0]):
            if target.partition(".")[0] in COMMANDS:
                faults.append(f"{path.relative_to(root)}:{line}: {module} imports the command {target}")
    return faults


def name_comparisons(root: Path) -> list[str]:
    """Comparisons with one of ``NAMES``, by an operator or by a match, where only encodings and joins may know them."""
    faults = []
    for module, path in modules(root).items():
        if layer_of(module).startswith(("encodings", "joins")):
            continue
        for line, subject, value in comparisons(ast.parse(path.read_text(encoding="utf-8"))):
            if value in NAMES and (value not in EVERYDAY or POSITION.search(subject)):
                faults.append(f"{path.relative_to(root)}:{line}: {module} compares with {value!r}")
    return faults


def comparisons(tree: ast.Module) -> Iterator[tuple[int, str, object]]:
    """Every constant that something is compared with, as (line, source of what is compared, constant)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            subject, values = node, [value for side in (node.left, *node.comparators) for value in elements(side)]
        elif isinstance(node, ast.Match):
            patterns = [pattern for case in node.cases for pattern in ast.walk(case.pattern)]
            subject, values = (
                node.subject,
                [pattern.value for pattern in patterns if isinstance(pattern, ast.MatchValue)],
            )
        else:
            continue
        yield from (
            (value.lineno, ast.unparse(subject), value.value) for value in values if isinstance(value, ast.Constant)
        )


def elements(side: ast.expr) -> list[ast.expr]:
    """The elements of a display, such as the right side of ``in (a, b)``; of anything else, itself."""
    return side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]


def private_uses(root: Path) -> list[str]:
    """Imports of, and reaches into, what a library keeps to itself by a leading underscore; tests are no exception."""
    faults = set()
    for path in sources(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = ".".join(path.relative_to(root).parent.parts)
        found = [(line, target, name) for line, target, name in imports(tree, package) if from_library(target)]
        uses = [(line, target) for line, target, _ in found]
        uses += reaches(tree, {name for _, _, name in found})
        faults |= {
            f"{path.relative_to(root)}:{line}: {dotted} is private" for line, dotted in uses if is_private(dotted)
        }
    return sorted(faults)


def from_library(dotted: str) -> bool:
    return dotted.partition(".")[0] in LIBRARIES


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in dotted.split("."))


def reaches(tree: ast.Module, bound: Collection[str]) -> Iterator[tuple[int, str]]:
    """Every chain of attributes, such as ``timm.models.vit``, that begins at one of the ``bound`` names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).partition(".")[0] in bound:
            yield node.lineno, ast.unparse(node)


def tree_of(root: Path, files: dict[str, str]) -> Path:
    """Write ``files`` (path: text) over a small tree that keeps every rule."""
    good = {
        "lape_vit/__init__.py": "from lape_vit.vit import Attention",
        "lape_vit/encodings/__init__.py": "from .learnable import Learnable",
        "lape_vit/places.py": "",
        "lape_vit/encodings/base.py": "from lape_vit import places",
        "lape_vit/encodings/learnable.py": "from . import base",
        "lape_vit/joins.py": "from lape_vit import encodings\nif pe == 'LaPE': pass",
        "lape_vit/attention.py": "from lape_vit import encodings",
        "lape_vit/vit.py": "from lape_vit import attention, encodings, joins",
        "lape_vit/analysis/__init__.py": "from lape_vit import vit",
        "lape_vit/convert.py": "import lape_vit.vit",
        "lape_vit/checkpoints.py": "",
        "lape_vit/from_checkpoint.py": "from lape_vit import checkpoints\nimport models_lape",
        "models_lape.py": "import lape_vit.convert",
        "loading/images.py": "",
        "training/__init__.py": "",
        "training/losses.py": "from lape_vit.checkpoints import is_ours",
        "engine.py": "from training import losses",
        "datasets.py": "",
        "figures/__init__.py": "",
        "figures/sheet.py": "import models_lape\nfrom training import losses",
        "main.py": "import datasets, engine, models_lape\nfrom training.losses import device",
        "tests/test_main.py": "import main\nassert main.pe == 'LaPE'",
    }
    for name, text in (good | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    layers = {module: layer_of(module) for module in modules(ROOT)}
    assert [module for module, layer in layers.items() if not layer] == []
    assert {*layers.values()} == BENEATH.keys()


def test_a_command_is_imported_by_no_module_but_benchmarks() -> None:
    assert [layer for layer in BENEATH if layer != "commands" and "commands" in within_reach(layer)] == ["benchmarks"]


def test_imports_run_downward() -> None:
    assert upward_imports(ROOT) == []


def test_no_module_imports_a_command() -> None:
    assert imported_commands(ROOT) == []


@pytest.mark.parametrize("text", ["import main", "def run():\n    from main import train"])
def test_an_imported_command_is_a_fault(tmp_path: Path, text: str) -> None:
    (fault,) = imported_commands(tree_of(tmp_path, {"comparison/forecast.py": text}))
    assert fault.startswith("comparison/forecast.py:")


def test_only_encodings_and_joins_compare_with_their_names() -> None:
    assert name_comparisons(ROOT) == []


def test_libraries_are_used_by_their_public_names() -> None:
    assert private_uses(ROOT) == []


def test_the_plugin_imports_without_a_warning() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import models_lape"], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_tree_that_keeps_the_rules_has_no_faults(tmp_path: Path) -> None:
    root = tree_of(
        tmp_path, {"benchmarks/speed.py": "import torch\nif crop == 'none': print(torch.__version__, 'LaPE')"}
    )
    assert upward_imports(root) + name_comparisons(root) + private_uses(root) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("lape_vit/places.py", "from lape_vit.encodings.base import Encoding"),
        ("lape_vit/attention.py", "from lape_vit import vit"),
        ("lape_vit/vit.py", "from lape_vit import analysis"),
        ("lape_vit/encodings/base.py", "from lape_vit.encodings.learnable import Learnable"),
        ("lape_vit/encodings/learnable.py", "from lape_vit.encodings import ENCODINGS"),
        ("lape_vit/encodings/learnable.py", "from . import ENCODINGS"),
        ("lape_vit/encodings/__init__.py", "from .. import joins"),
        ("lape_vit/joins.py", "from .vit import Attention"),
        ("lape_vit/vit.py", "from lape_vit import convert_checkpoint"),
        ("lape_vit/vit.py", "import lape_vit.convert as convert"),
        ("lape_vit/convert.py", "import models_lape"),
        ("lape_vit/checkpoints.py", "from lape_vit import convert"),
        ("models_lape.py", "from lape_vit.from_checkpoint import load"),
        ("lape_vit/convert.py", "def load():\n    from training.losses import device"),
        ("lape_vit/analysis/views.py", "import datasets"),
        ("models_lape.py", "import main"),
        ("models_lape.py", "import engine"),
        ("training/losses.py", "import engine"),
        ("training/losses.py", "from lape_vit.vit import Attention"),
        ("engine.py", "import main"),
        ("engine.py", "import datasets"),
        ("engine.py", "import models_lape"),
        ("engine.py", "from lape_vit import joins"),
        ("datasets.py", "import engine"),
        ("datasets.py", "import lape_vit"),
        ("figures/sheet.py", "import main"),
        ("lape_vit/drawing/panels.py", "from figures import sheet"),
        ("lape_vit/analysis/views.py", "from lape_vit.drawing import panels"),
        ("loading/images.py", "import datasets"),
        ("lape_vit/analysis/views.py", "from figures import sheet"),
        ("training/losses.py", "import figures"),
    ],
)
def test_an_upward_import_is_a_fault(tmp_path: Path, file: str, text: str) -> None:
    (fault,) = upward_imports(tree_of(tmp_path, {file: text}))
    assert fault.startswith(f"{file}:")


@pytest.mark.parametrize(
    "text",
    [
        "if pe == 'learnable': pass",
        "if 'LaPE' != join_type: pass",
        "plain = join_type in ('share', 'unshare')[:1] or join_type in {'basic', other}",
        "found = [pe for pe in all if pe not in ['2D_sin']]",
        "absolute = args.pe != 'none'",
        "sine = '1D_sin' in pe",
        "match join_type:\n    case 'x' | 'LaPE_share':\n        pass",
        "match pe, join_type:\n    case ('sinusoidal', _):\n        pass",
    ],
)
@pytest.mark.parametrize("file", ["main.py", "models_lape.py", "lape_vit/vit.py", "training/losses.py"])
def test_a_comparison_with_a_name_is_a_fault(tmp_path: Path, file: str, text: str) -> None:
    (fault,) = name_comparisons(tree_of(tmp_path, {file: text}))
    assert fault.startswith(f"{file}:")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_registered_name_is_guarded(tmp_path: Path, name: str) -> None:
    assert len(name_comparisons(tree_of(tmp_path, {"main.py": f"if pe == {name!r}: pass"}))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import timm.models._registry",
        "from timm.models._registry import register_model",
        "from timm.models import _manipulate",
        "import torch._dynamo as dynamo",
        "import torch\ntorch._C",
        "from torch import nn\nnn.functional._no_grad_embedding_renorm_()",
        "import torch.nn.functional as F\nF._something(x)",
        "import argparse\nkind: argparse._SubParsersAction",
        "from torchvision.transforms import functional\nfunctional._interpolation",
        "from timm.models.vision_transformer import VisionTransformer\nVisionTransformer._init_weights(m)",
    ],
)
@pytest.mark.parametrize("file", ["main.py", "lape_vit/encodings/base.py", "tests/test_main.py"])
def test_a_private_name_is_a_fault(tmp_path: Path, file: str, text: str) -> None:
    (fault,) = private_uses(tree_of(tmp_path, {file: text}))
    assert fault.startswith(f"{file}:")
