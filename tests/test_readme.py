"""What the README and the page on encodings show works as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny

ROOT = Path(__file__).parents[1]
README, ENCODINGS = ((ROOT / page).read_text() for page in ("README.md", "docs/encodings.md"))
PYTHON = r"```python\n(.*?)```"
(PLUGIN,) = re.findall(PYTHON, README, re.DOTALL)
ENCODING, REGISTRY = re.findall(PYTHON, ENCODINGS, re.DOTALL)


def test_the_plugin_runs() -> None:
    namespace: dict[str, Any] = {}
    exec(PLUGIN, namespace)
    assert namespace["logits"].shape == (1, 1000)
    assert (namespace["model"].pe, namespace["model"].join_type) == ("learnable", "LaPE")


def snippets(page: str) -> list[str]:
    return re.findall(PYTHON, (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_plugin_in_python_does_what_its_page_says() -> None:
    (snippet,) = snippets("plugin.md")
    namespace: dict[str, Any] = {}
    exec(snippet, namespace)
    assert namespace["model"].pe == "learnable+rope_axial(rope_theta=10)"
    assert torch.equal(namespace["ours"].eval()(namespace["images"]), namespace["logits"])
    assert (namespace["changed"].pe, namespace["changed"].join_type) == ("2D_sin", "PVG")


def test_a_diagnosis_in_python_does_what_its_page_says() -> None:
    (snippet,) = snippets("diagnosis.md")
    model = tiny("learnable", "LaPE")
    generator = torch.Generator().manual_seed(0)
    images, held_out = (torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    features = torch.randn(2, 16, 24, generator=generator, dtype=torch.float64)
    namespace = {"model": model, "images": images, "labels": None, "held_out": held_out, "features": features}
    exec(snippet, namespace)
    assert namespace["record"].pe == "learnable"
    assert namespace["features"].shape == features.shape


def run_in(folder: Path, *command: str) -> str:
    """What a Python command prints, in a folder of its own modules."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the encoding that `docs/encodings.md` adds: one file, and one line in the registry."""
    folder = tmp_path_factory.mktemp("extended") / "tree"
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "data", "golden*", "*.png")
    shutil.copytree(ROOT, folder, ignore=kept_out)
    path, code = re.fullmatch(r"# (\S+)\n(.*)", ENCODING, re.DOTALL).groups()  # type: ignore[union-attr]
    (folder / path).write_text(code)
    place, line = re.fullmatch(r"# (\S+), in FILES\n(.*\n)", REGISTRY).groups()  # type: ignore[union-attr]
    registry = (folder / place).read_text()
    last = re.search(r'FILES = \((?:\n    "\w+",)*\n', registry)
    assert last is not None
    (folder / place).write_text(registry.replace(last.group(), last.group() + line))
    return folder


TESTS_OF_THE_REGISTRY = ("encodings", "joins", "vit", "places", "caching", "tracing", "similarity", "attention_maps")


def test_the_tests_of_the_registry_hold_for_the_added_encoding(extended: Path) -> None:
    files = [f"tests/test_{name}.py" for name in TESTS_OF_THE_REGISTRY]
    printed = run_in(extended, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "fading", *files)
    assert int(re.search(r"(\d+) passed", printed).group(1)) > 50  # type: ignore[union-attr]


def test_every_command_line_offers_the_added_encoding(extended: Path) -> None:
    for command in ("main.py", "compare.py", "diagnose.py", "similarity_visualize.py"):
        assert "fading" in run_in(extended, command, "--help")
    data = ("--data-set", "DIGITS", "--output_dir", "unused", "--dry-run")
    printed = run_in(extended, "compare.py", "--pe", "fading", "--seeds", "0", *data)
    assert "fading" in printed


def test_the_added_encoding_does_what_it_says_and_gets_pictures(extended: Path) -> None:
    script = """
import timm, torch, models_lape
from lape_vit.analysis.positions import position_views
size = dict(img_size=(24, 40), patch_size=8, embed_dim=24, depth=2, num_heads=3)
model = timm.create_model("deit_tiny_patch16_224", pe="learnable+fading(slope=0.2)", join_type="LaPE", **size)
views = {view.name: view for view in position_views(model)}
print(model.pe, *views, round(views["bias_offsets"].values[0][0, 0, 7].item(), 6), sep="\\n")
"""
    printed = run_in(extended, "-c", script).split()
    assert printed[:4] == ["learnable+fading(slope=0.2)", "similarity", "bias", "bias_offsets"]
    assert float(printed[4]) == pytest.approx(-0.2 * 13**0.5, abs=1e-5)  # two rows up, three columns right
