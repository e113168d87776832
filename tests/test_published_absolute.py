"""``factorized`` and ``fourier`` against the published code's numbers, and against loops at other places."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lape_vit.encodings import ENCODINGS
from lape_vit.places import Grid, Places
from tests.models import assert_equal, assert_near, disturb, images, tiny
from tests.references import factorized, fourier
from tests.test_references import INDEX, Arrays

D, GRID = 8, (3, 5)
DOUBLE = torch.empty(0, dtype=torch.float64)
PLACES = {
    "whole": Places(GRID),
    "another grid": Places((6, 2)),
    "some": Places(GRID).keep(torch.tensor([7, 0, 11])),
    "real": Places(GRID).scaled(0.7, 1.3).shifted(0.25, -4),
    "real on another grid": Places((6, 2)).scaled(0.7, 1.3),
}
over_places = pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
over_prefix_rows = pytest.mark.parametrize("prefix_rows", [0, 2])


def build(name: str, prefix_rows: int = 0, dim: int = D, grid: Grid = GRID, **options: Any) -> Any:
    torch.manual_seed(0)
    return disturb(ENCODINGS[name](dim, grid, prefix_rows, **options).double())  # type: ignore[arg-type]


def axes_of(encoding: Any) -> tuple[Any, Any]:
    return tuple(table[0].detach().numpy() for table in (encoding.pos_embed_y, encoding.pos_embed_x))  # type: ignore


def xy(places: Places) -> dict[str, list[float]]:
    x, y = places.coordinates()
    return {"x": x.tolist(), "y": y.tolist()}


@pytest.mark.parametrize("name", [name for name, entry in INDEX.items() if entry["family"] == "factorized"])
def test_factorized_is_the_published_table_on_its_own_grid_and_on_another(name: str) -> None:
    entry, arrays = INDEX[name], Arrays(name)
    grid, other = tuple(entry["grid"]), tuple(entry["other_grid"])
    state = {key: torch.from_numpy(arrays[key]) for key in ("pos_embed_y", "pos_embed_x")}
    encoding = build("factorized", entry["prefix"], state["pos_embed_x"].shape[2], grid)
    encoding.load_state_dict(state)
    table, resized = encoding(Places(grid), DOUBLE), encoding(Places(other), DOUBLE)
    encoding.set_grid(other)
    for ours, key in ((table, "table"), (resized, "resized"), (encoding(Places(other), DOUBLE), "resized")):
        expected = torch.from_numpy(arrays[key])
        torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=entry["tolerance"])


@over_places
@over_prefix_rows
def test_factorized_is_its_loops_at_any_places(places: Places, prefix_rows: int) -> None:
    encoding = build("factorized", prefix_rows)
    expected = factorized.table(*axes_of(encoding), places.grid, prefix_rows, **xy(places))
    assert_near(encoding(places, DOUBLE)[0], torch.from_numpy(expected))


@over_places
@over_prefix_rows
def test_fourier_is_its_loops_at_any_places(places: Places, prefix_rows: int) -> None:
    encoding = build("fourier", prefix_rows, fourier_hidden=5)
    parts = (encoding.frequencies, encoding.fc1.weight, encoding.fc1.bias, encoding.fc2.weight, encoding.fc2.bias)
    parameters = [part.detach().numpy() for part in parts]
    expected = fourier.table(places.grid, *parameters, prefix_rows, **xy(places))
    assert_near(encoding(places, DOUBLE)[0], torch.from_numpy(expected))


def test_each_axis_of_factorized_is_resampled_by_itself() -> None:
    model = tiny("factorized")
    encoding = model.join.encoding
    encoding.pos_embed_x.requires_grad_(False)
    rows, columns = encoding.pos_embed_y, axes_of(encoding)[1]
    model.set_input_size(img_size=(32, 48))  # as many rows, more columns
    assert encoding.pos_embed_y is rows
    assert not encoding.pos_embed_x.requires_grad
    expected = np.stack([factorized.read(columns, (place + 0.5) * 4 / 6 - 0.5) for place in range(6)])
    assert_near(encoding.pos_embed_x[0], torch.from_numpy(expected))
    assert model(images(1, 32, 48)).isfinite().all()


def test_fourier_starts_with_places_alike_up_to_gamma() -> None:
    """The mean of r.r' over draws of W_r is exp(-distance^2 / 2 gamma^2) / 2."""
    torch.manual_seed(0)
    frequencies = ENCODINGS["fourier"](20000, (4, 4), 0, fourier_gamma=0.3, fourier_hidden=1).frequencies  # type: ignore
    for distance in (0.1, 0.3, 0.6):
        alike = (frequencies[:, 0] * distance).cos().mean().item()
        assert alike == pytest.approx(np.exp(-((distance / 0.3) ** 2) / 2), abs=0.03)


@torch.no_grad()
def test_fourier_keeps_its_precision_under_autocast() -> None:
    encoding, places = build("fourier").float(), Places((30, 30))
    features: list[Tensor] = []
    encoding.fc1.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    encoding(places, torch.empty(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding(places, torch.empty(0))
    assert_equal(features[1], features[0])


@pytest.mark.parametrize(
    ("options", "named"), [({"fourier_gamma": 0.0}, "fourier_gamma=0.0"), ({"fourier_hidden": 0}, "fourier_hidden=0")]
)
def test_an_option_of_fourier_out_of_range_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny("fourier", **options)
