"""``rope_dinov3`` and ``rope_golden`` against the published code's numbers, and against loops at other places."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lape_vit.encodings import ENCODINGS, LayerSpec, rotary
from lape_vit.places import Grid, Places
from tests.models import assert_near
from tests.references import rope_dinov3, rope_golden
from tests.test_references import INDEX, Arrays

HEADS, D = 3, 16
NORMALIZE = ["separate", "max", "min"]


def build(name: str, grid: Grid, prefix: int, heads: int = HEADS, head_dim: int = D, **options: Any) -> Any:
    spec = LayerSpec(head_dim, heads, grid, prefix, heads * head_dim)
    return ENCODINGS[name](spec, **options)  # type: ignore[arg-type]


def built_for(name: str, **options: Any) -> Any:
    entry = INDEX[name]
    return build(entry["name"], tuple(entry["grid"]), entry["prefix"], entry["heads"], entry["head_dim"], **options)


def of_family(family: str) -> list[str]:
    return [name for name, entry in INDEX.items() if entry["family"] == family]


def assert_turned_as_published(encoding: Any, name: str) -> None:
    entry, arrays = INDEX[name], Arrays(name)
    q, k = (torch.from_numpy(arrays[key]) for key in ("q", "k"))
    turned = encoding.rotate(q, k, Places(tuple(entry["grid"])))
    for key, ours in zip(("q_out", "k_out"), turned, strict=True):
        np.testing.assert_allclose(ours, arrays[key], rtol=0, atol=entry["tolerance"], err_msg=key)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PLACES = {
    "whole": Places((3, 5)),
    "another grid": Places((6, 2)),
    "some": Places((3, 5)).keep(torch.tensor([7, 0, 11])),
    "real": Places((3, 5)).scaled(0.7, 1.3).shifted(0.25, -4),
}
over_places = pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)


def q_and_k(places: Places, prefix: int) -> tuple[Tensor, Tensor]:
    tokens = prefix + len(places.coordinates()[0])
    return noise(2, HEADS, tokens, D), noise(2, HEADS, tokens, D, seed=1)


@pytest.mark.parametrize("name", of_family("rope_dinov3"))
def test_rope_dinov3_turns_as_published(name: str) -> None:
    options = INDEX[name]["options"]
    assert_turned_as_published(built_for(name, rope_theta=options["base"], rope_normalize=options["normalise"]), name)


@over_places
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("prefix", [0, 2])
def test_rope_dinov3_is_its_loops_at_any_places(places: Places, normalize: str, prefix: int) -> None:
    encoding = build("rope_dinov3", (3, 5), prefix, rope_theta=30.0, rope_normalize=normalize)
    q, k = q_and_k(places, prefix)
    x, y = (axis.tolist() for axis in places.coordinates())
    expected = rope_dinov3.rotate(q.numpy(), k.numpy(), places.grid, prefix, 30.0, normalize, x, y)
    assert_near(encoding.rotate(q, k, places), tuple(map(torch.from_numpy, expected)), 1e-11)


@pytest.mark.parametrize("side", [4, 7])
def test_rope_dinov3_is_rope_axial_with_faster_pairs_in_another_order(side: int, monkeypatch: Any) -> None:
    """On n x n, with all frequencies times 4 pi / n; products of q and k then agree."""
    dinov3, axial = (build(name, (side, side), 1, rope_theta=100.0) for name in ("rope_dinov3", "rope_axial"))
    places = Places((side, side))
    q, k = q_and_k(places, 1)
    expected = [turned.clone() for turned in dinov3.rotate(q, k, places)]
    slow = rotary.axial_frequencies
    monkeypatch.setattr(rotary, "axial_frequencies", lambda *args: slow(*args) * 4 * torch.pi / side)
    # DINOv3's pair i is (i, i + d/2), rows first; the axial form's is (2i, 2i + 1), columns first.
    pairs = [*range(D // 4, D // 2), *range(D // 4)]
    order = [channel for pair in pairs for channel in (pair, pair + D // 2)]
    turned_q, turned_k = axial.rotate(q[..., order], k[..., order], places)
    products, expected_products = turned_q @ turned_k.mT, expected[0] @ expected[1].mT
    assert_near(products[..., 1:, 1:], expected_products[..., 1:, 1:], 1e-11)
    # Against the class token they differ, for DINOv3's angles are 0 in the grid's middle.
    assert (products - expected_products).abs().max() > 1e-3


@pytest.mark.parametrize("name", of_family("rope_golden"))
def test_rope_golden_has_the_published_frequencies_with_the_exact_root(name: str) -> None:
    options = INDEX[name]["options"]
    ends = {f"rope_{end}_frequency": options[f"{end}_frequency"] for end in ("min", "max")}
    expected = Arrays(name)["frequencies_exact"]
    np.testing.assert_allclose(built_for(name, **ends).frequencies, expected, rtol=0, atol=INDEX[name]["tolerance"])


def test_the_golden_ratio_of_the_plane_is_the_root_of_its_equation() -> None:
    assert abs(rotary.PLASTIC**3 - rotary.PLASTIC - 1) < 1e-15


@pytest.mark.parametrize("name", [name for name in of_family("rope_golden") if name.endswith("-0.2-20-centred")])
def test_rope_golden_turns_as_published_by_default_but_for_the_root(name: str, monkeypatch: Any) -> None:
    published = rope_golden.golden_ratio_as_published()
    assert 1e-8 < published - rotary.PLASTIC < 1e-7
    monkeypatch.setattr(rotary, "PLASTIC", published)
    assert_turned_as_published(built_for(name), name)


@over_places
@pytest.mark.parametrize("prefix", [0, 2])
def test_rope_golden_is_its_loops_at_any_places(places: Places, prefix: int) -> None:
    encoding = build("rope_golden", (3, 5), prefix, rope_min_frequency=0.5, rope_max_frequency=7.0)
    q, k = q_and_k(places, prefix)
    x, y = (axis.tolist() for axis in places.coordinates())
    expected = rope_golden.rotate(q.numpy(), k.numpy(), places.grid, prefix, 0.5, 7.0, x=x, y=y)
    assert_near(encoding.rotate(q, k, places), tuple(map(torch.from_numpy, expected)), 1e-11)


def test_rope_golden_takes_a_head_width_of_one_pair_and_of_an_odd_number_of_pairs() -> None:
    for head_dim in (2, 6):
        encoding = build("rope_golden", (3, 5), 0, head_dim=head_dim)
        q = noise(1, HEADS, 15, head_dim)
        expected, _ = rope_golden.rotate(q.numpy(), q.numpy(), (3, 5))
        assert_near(encoding.rotate(q, q, Places((3, 5)))[0], torch.from_numpy(expected), 1e-11)
