"""Figures of a model in memory, and the notebook that shows them."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lape_vit import plot
from lape_vit.images import image_transform
from tests.models import DEIT, SIZES, create, disturb, sampled_sums

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
SMALL: dict[str, Any] = {name: value for name, value in SIZES.items() if name != "num_classes"}


def shown(figure: Any) -> np.ndarray:
    """The pixels that a notebook shows."""
    assert isinstance(figure, Figure)
    with Image.open(io.BytesIO(figure._repr_png_())) as image:  # type: ignore[attr-defined]  # IPython's protocol
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 5
    return pixels


def model_of(pe: str = "learnable", join_type: str = "LaPE") -> Any:
    return disturb(create(pe, join_type)).eval()


@pytest.mark.parametrize(("pe", "join_type"), [("learnable", "LaPE"), ("rope_mixed", "basic"), ("alibi", "basic")])
def test_positions_of_every_kind_are_shown(pe: str, join_type: str) -> None:
    trained, other = model_of(pe, join_type), disturb(model_of(pe, join_type), seed=3)
    figure = plot.positions(trained)
    assert any(axes.get_title(loc="left").startswith("block") for axes in figure.axes)
    if pe != "alibi":  # which learns nothing
        assert not np.array_equal(shown(figure), shown(plot.positions(other)))


def test_the_sum_of_encodings_and_a_model_of_timms_are_shown() -> None:
    shown(plot.positions(model_of(sampled_sums()[0], "basic")))
    shown(plot.positions(timm.models.vision_transformer.VisionTransformer(**SMALL)))


def test_another_token_is_another_picture() -> None:
    model = model_of()
    pictures = [shown(plot.positions(model, token=token)) for token in ((0, 0), (3, 2))]
    assert not np.array_equal(*pictures)
    with pytest.raises(ValueError, match="grid of 4 x 4"):
        plot.positions(model, token=(4, 0))


def test_attention_takes_a_file_a_picture_and_a_tensor(tmp_path: Path) -> None:
    model = model_of()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 40, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "image.png")
    tensor = image_transform(model)(picture)
    assert tensor.shape == (3, 32, 32)
    drawn = [data_of(plot.attention(model, image)) for image in (picture, tensor, str(tmp_path / "image.png"))]
    for other in drawn[1:]:
        assert all(np.array_equal(one, another) for one, another in zip(drawn[0], other, strict=True))
    figure = plot.attention(model, tmp_path / "image.png", token=(0, 1))
    shown(figure)
    assert any("image.png, seen from the patch in row 0, column 1" in text.get_text() for text in figure.texts)


def data_of(figure: Figure) -> list[np.ndarray]:
    """All that is drawn as an image."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def test_what_has_no_positions_or_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to draw: pe='none' has no positions"):
        plot.positions(model_of("none", "basic"))
    timms = timm.models.vision_transformer.VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match=r"VisionTransformer is timm's own: lape_vit\.from_timm"):
        plot.attention(timms, torch.zeros(3, 32, 32))


def test_drawing_leaves_a_model_as_it_was() -> None:
    model = timm.create_model(DEIT, pe="learnable", join_type="LaPE", **SMALL).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plot.positions(model)
    plot.attention(model, torch.zeros(3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_matplotlib_a_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import lape_vit; from lape_vit import plot"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == ("ImportError: lape_vit.plot needs matplotlib: pip install 'lape-vit[plot]'")


# ---- the notebook


def test_the_notebook_runs_and_is_stored_without_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in cells] == [[] for _ in cells]
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["accuracy"] > 0.7
    pictures = [shown(names[name]) for name in ("before", "after", "seen", "kernels")]
    assert not np.array_equal(pictures[0], pictures[1])
    assert isinstance(names["images"], Tensor)
    assert "\nimport models_lape " in "".join(cells[0]["source"])  # without which timm takes no encoding
