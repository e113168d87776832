"""``peg`` against the published code's numbers, and against loops where patches are left out or moved."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from lape_vit.encodings.peg import PEG
from lape_vit.places import Places
from tests.models import DEIT, assert_equal, assert_near, create, disturb, images, tiny
from tests.test_references import INDEX, Arrays

D, GRID = 6, (3, 5)


def cases(kind: str) -> list[str]:
    return [name for name, entry in INDEX.items() if entry["family"] == "peg" and entry["kind"] == kind]


def build() -> PEG:
    return disturb(PEG(D, GRID).double())


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", cases("model"))
def test_a_model_gives_the_published_logits_and_input_gradients(name: str) -> None:
    entry, arrays = INDEX[name], Arrays(name)
    model = timm.create_model(DEIT, pe="learnable+peg", **entry["model"]).double().eval()
    state = {**arrays.state(), **{f"token_encoding.{part}": arrays[f"peg/{part}"] for part in ("weight", "bias")}}
    if "pos_embed" not in state:
        model = timm.create_model(DEIT, pe="peg", **entry["model"]).double().eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    pixels = torch.from_numpy(arrays["input"]).requires_grad_()
    logits = model(pixels)
    (grad_input,) = torch.autograd.grad(logits.square().sum(), pixels)
    tolerance = entry["tolerance"]
    torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"]), rtol=0, atol=tolerance)
    torch.testing.assert_close(grad_input, torch.from_numpy(arrays["grad_input"]), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", cases("module"))
@torch.no_grad()
def test_the_module_gives_the_published_tokens(name: str) -> None:
    entry, arrays = INDEX[name], Arrays(name)
    weight, bias, x, y = (torch.from_numpy(arrays[key]) for key in ("weight", "bias", "x", "y"))
    grid, prefix = tuple(entry["grid"]), entry["prefix"]
    encoding = PEG(x.shape[2], grid).double()
    encoding.load_state_dict({"weight": weight, "bias": bias})
    expected = y[:, prefix:]
    for places in (Places(grid), Places(grid).keep(torch.arange(grid[0] * grid[1]))):
        torch.testing.assert_close(encoding(x[:, prefix:], places), expected, rtol=0, atol=entry["tolerance"])


def by_loops(encoding: PEG, x: Tensor, columns: list[list[float]], rows: list[list[float]]) -> Tensor:
    """Each patch with those that stand, rounded, at most one cell away: their mean where there are several."""
    y = x.clone()
    for image in range(len(x)):
        for query in range(x.shape[1]):
            y[image, query] += encoding.bias
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    found = [
                        x[image, key]
                        for key in range(x.shape[1])
                        if round(columns[image][key] - columns[image][query]) == right
                        and round(rows[image][key] - rows[image][query]) == down
                    ]
                    if found:
                        y[image, query] += encoding.weight[:, 0, down + 1, right + 1] * torch.stack(found).mean(dim=0)
    return y


ORDERS = torch.stack([torch.randperm(15, generator=torch.Generator().manual_seed(seed))[:8] for seed in (0, 1)])


@pytest.mark.parametrize(
    "places",
    [
        Places(GRID).keep(ORDERS[0]),
        Places(GRID).keep(ORDERS),
        Places(GRID).scaled(0.6, 1.7).shifted(0.3, -2),
        Places(GRID).keep(ORDERS).scaled(0.4, 0.4),
    ],
    ids=["some", "some of each image", "between cells", "several in one cell"],
)
@torch.no_grad()
def test_neighbours_are_those_at_a_rounded_offset(places: Places) -> None:
    encoding = build()
    columns, rows = (axis.expand(2, -1).tolist() for axis in places.coordinates())
    x = noise(2, len(columns[0]), D)
    assert_near(encoding(x, places), by_loops(encoding, x, columns, rows))


@torch.no_grad()
def test_prefix_tokens_pass_by() -> None:
    model = tiny("peg", reg_tokens=2)
    x, places = model.tokens_of(images())
    assert_equal(model.after_block(0, x, places)[:, :3], x[:, :3])
    assert (model.after_block(0, x, places)[:, 3:] - x[:, 3:]).abs().min() > 0
    assert_equal(model.after_block(1, x, places), x)


def test_it_starts_as_in_its_source_with_ten_parameters_per_channel() -> None:
    torch.manual_seed(0)
    encoding = PEG(3000, GRID)
    assert sum(parameter.numel() for parameter in encoding.parameters()) == 10 * 3000
    assert encoding.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert not encoding.bias.any()


def without(model: Any, pe: str) -> Any:
    """The same model less a part of its encoding."""
    plain = tiny(pe)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    return plain


@pytest.mark.parametrize(
    ("pe", "rest"), [("2D_sin+peg", "2D_sin"), ("learnable+rope_mixed+peg", "learnable+rope_mixed")]
)
@torch.no_grad()
def test_it_adds_up_with_the_other_families(pe: str, rest: str) -> None:
    model = tiny(pe)
    plain = without(model, rest)
    assert (model(images()) - plain(images())).abs().max() > 1e-6
    plain.blocks[0].register_forward_hook(
        lambda block, args, x: torch.cat([x[:, :1], model.token_encoding(x[:, 1:], args[1])], dim=1)
    )
    assert_equal(model(images()), plain(images()))
    assert create(pe).pe == pe
