"""The page to explore positions: what is written into it, and what it does in a real browser."""

import json
import math
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import decompress

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from selenium.webdriver.common.keys import Keys
from torch import Tensor

from figures import explore
from figures.explore import Exhibit, explore_page, quantise
from lape_vit import encodings
from lape_vit.joins import legal_joins
from lape_vit.similarity import PositionView, position_views
from tests.browser import Page, find_browser, open_browser
from tests.models import tiny

GRID = (4, 6)
OTHER_GRID = (8, 3)
LAYERS, HEADS = 3, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def view(
    name: str, grid: tuple[int, int] = GRID, layers: int = LAYERS, heads: int = HEADS, by_offset: bool = False
) -> PositionView:
    """Noise between patches."""
    patches = grid[0] * grid[1]
    shape = (2 * grid[0] - 1, 2 * grid[1] - 1) if by_offset else (patches, patches)
    values = [noise(heads, *shape, seed=layer) for layer in range(layers)]
    titles = [f"block {layer}, LaPE" for layer in range(layers)]
    return PositionView(name, f"the {name}", values, by_offset, (-1.0, 1.0), titles)


def exhibit(*views: PositionView, name: str = "runs/a.pth", grid: tuple[int, int] = GRID) -> Exhibit:
    return Exhibit(name, "a model", grid, views)


def token_map(shown: PositionView, layer: int, head: int, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """What a patch's map must show (H, W)."""
    (row, column), (H, W) = patch, grid
    values = shown.values[layer][head]
    if shown.by_offset:
        return values[H - 1 - row : 2 * H - 1 - row, W - 1 - column : 2 * W - 1 - column]
    return values[row * W + column].unflatten(0, grid)


# ---- what is written


def data_of(page: bytes) -> list[dict]:
    """The checkpoints as the page is told of them."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.decode())
    return json.loads(text)["checkpoints"]


def unpack(layer: dict, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Values as the page reads them."""
    content = np.frombuffer(decompress(b64decode(layer["levels"])), np.uint8).astype(np.float64)
    low, high = content.reshape(2, -1)
    return (layer["low"] + layer["step"] * (low + 256 * high)).reshape(shape)


@pytest.mark.parametrize("bits", [8, 11, 16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_values_are_kept_to_half_a_step(bits: int, scale: float) -> None:
    values = noise(2, 5, 7) * scale
    kept = quantise(values, bits)
    assert kept["step"] == pytest.approx((values.max() - values.min()).item() / (2**bits - 1))
    assert np.abs(unpack(kept, (2, 5, 7)) - values.numpy()).max() <= kept["step"] / 2 * (1 + 1e-9)


def test_values_that_are_all_the_same_are_kept_exactly() -> None:
    kept = quantise(torch.full((1, 2, 2), 0.1, dtype=torch.float64), 16)
    assert (unpack(kept, (1, 2, 2)) == 0.1).all()


def test_values_are_kept_less_finely_only_as_far_as_the_page_would_be_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = view("small", heads=1), view("large", heads=40)
    free = explore_page([exhibit(small, large)])
    steps = [data_of(free)[0]["views"][i]["layers"][0]["step"] for i in range(2)]
    assert steps == pytest.approx([2 / 65535] * 2, rel=0.02)
    monkeypatch.setattr(explore, "LIMIT", len(free) - 20_000)
    page = explore_page([exhibit(small, large)])
    assert len(page) <= explore.LIMIT
    steps = [data_of(page)[0]["views"][i]["layers"][0]["step"] for i in range(2)]
    assert steps[0] == pytest.approx(2 / 65535, rel=0.02)
    assert 2 / 65535 < steps[1] < 2 / 255


def test_a_name_stays_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>&amp;{{data}}"
    page = explore_page([exhibit(view("bias"), name=name)]).decode()
    assert data_of(page.encode())[0]["name"] == name
    assert page.count("<script") == explore_page([exhibit(view("bias"))]).decode().count("<script")
    assert "<title>&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;{{data}}</title>" in page


# ---- in a browser

pytest_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome, and chromedriver"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


Open = Callable[..., Page]


@pytest.fixture
def open_page(driver, tmp_path: Path) -> Iterator[Open]:
    """Open a page of some checkpoints; whatever the browser had to complain about it is a failure."""

    def open_(*exhibits: Exhibit, **options) -> Page:
        file = tmp_path / "explore.html"
        file.write_bytes(explore_page(exhibits))
        return Page(driver, file, **options)

    driver.get_log("browser")
    yield open_
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource')") == []


class TestInBrowser:
    pytestmark = pytest_browser

    @pytest.mark.parametrize("by_offset", [False, True])
    def test_pointing_at_a_patch_shows_its_relation_to_all_others(self, open_page: Open, by_offset: bool) -> None:
        shown = view("bias", by_offset=by_offset)
        page = open_page(exhibit(shown))
        np.testing.assert_allclose(page.values("map"), token_map(shown, 0, 0, (2, 3), GRID), atol=2e-5)
        for patch in ((0, 0), (3, 5), (1, 4)):
            page.point("map", *patch, GRID)
            page.until("args[0] in document.querySelector('.reading').textContent.split(':')" if 0 else
                       "document.querySelector('.reading').textContent.startsWith(args[0])", f"row {patch[0]}, column {patch[1]}:")
            np.testing.assert_allclose(page.values("map"), token_map(shown, 0, 0, patch, GRID), atol=2e-5)
