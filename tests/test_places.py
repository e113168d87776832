"""Places, and what every pair makes of patches that are left out, in another order, or somewhere between the cells."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lape_vit.encodings import ENCODINGS
from lape_vit.places import Places
from tests.models import assert_equal, assert_near, images, over_pairs, tiny

WHOLE = Places((2, 3))
X, Y = torch.tensor([0.0, 1, 2, 0, 1, 2]).double(), torch.tensor([0.0, 0, 0, 1, 1, 1]).double()


def test_a_whole_grid_has_a_patch_in_each_cell_row_by_row() -> None:
    assert WHOLE.is_whole
    assert_equal(WHOLE.coordinates(), (X, Y))
    dx, dy = WHOLE.offsets()
    assert (dx[1, 5], dy[1, 5]) == (1, 1)  # from the query to the key
    assert (dx[5, 1], dy[5, 1]) == (-1, -1)


def test_kept_and_permuted_patches_keep_their_places() -> None:
    order = torch.tensor([5, 0, 3])
    for places in (WHOLE.keep(order), WHOLE.permuted(order)):
        assert not places.is_whole
        assert_equal(places.coordinates(), (X[order], Y[order]))
    per_image = WHOLE.keep(torch.tensor([[5, 0], [1, 2]]))
    x, y = per_image.coordinates()
    assert (x.tolist(), y.tolist()) == ([[2, 0], [1, 2]], [[1, 0], [0, 0]])
    assert_equal(per_image.keep(torch.tensor([1])).coordinates()[0], torch.tensor([[0.0], [2]]).double())


def test_a_shift_moves_and_a_scale_keeps_the_centre() -> None:
    assert_equal(WHOLE.shifted(0.5, -1).coordinates(), (X + 0.5, Y - 1))
    assert_equal(WHOLE.scaled(2, 3).coordinates(), (1 + (X - 1) * 2, 0.5 + (Y - 0.5) * 3))
    by_image = WHOLE.shifted(torch.tensor([[0.0], [1.0]]), 0)
    assert_equal(by_image.coordinates()[0], torch.stack([X, X + 1]))


def test_a_place_outside_the_grid_comes_in_on_the_other_side() -> None:
    places = Places((2, 4)).shifted(-0.5, 1).wrapped()
    x, y = places.coordinates()
    assert x.tolist() == [-0.5, 0.5, 1.5, 2.5] * 2
    assert y.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert Places((2, 4)).shifted(1.75, 0).wrapped().coordinates()[0].tolist()[:4] == [1.75, 2.75, -0.25, 0.75]


def run(model: Any, tokens: Tensor, places: Places) -> Tensor:
    return model.forward_tokens(tokens, places)


def chosen(tokens: Tensor, order: Tensor) -> Tensor:
    """The class token, and patches (B, M) or (M,) of tokens (B, 1 + 16, D)."""
    order = order.expand(len(tokens), -1)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], dim=1)


@over_pairs
@torch.no_grad()
def test_all_patches_at_the_places_of_their_cells_are_the_whole(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    tokens, whole = model.tokens_of(images())
    expected = model.forward_features(images())
    assert_equal(run(model, tokens, whole), expected)
    assert_near(run(model, tokens, whole.keep(torch.arange(16))), expected, 1e-10)
    assert_near(run(model, tokens, whole.keep(torch.arange(16).expand(2, -1))), expected, 1e-10)


@over_pairs
@torch.no_grad()
def test_patches_in_another_order_with_their_places_are_the_same(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    tokens, whole = model.tokens_of(images())
    expected = model.forward_features(images())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert_near(run(model, chosen(tokens, order), whole.permuted(order)), chosen(expected, order), 1e-10)
    orders = torch.stack([order, torch.arange(16).flip(0)])
    assert_near(run(model, chosen(tokens, orders), whole.permuted(orders)), chosen(expected, orders), 1e-10)


@over_pairs
@torch.no_grad()
def test_patches_at_the_places_of_others_are_told_by_every_encoding(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    tokens, whole = model.tokens_of(images())
    moved = run(model, tokens, whole.permuted(torch.randperm(16, generator=torch.Generator().manual_seed(0))))
    assert ((moved - model.forward_features(images()))[:, 0].abs().max() > 1e-6) == (pe != "none")


@over_pairs
def test_a_dropped_patch_leaves_the_others_at_their_places(pe: str, join_type: str) -> None:
    model, without = tiny(pe, join_type, patch_drop_rate=0.5).train(), tiny(pe, join_type)
    kept: list[Tensor] = []
    model.patch_drop.register_forward_hook(lambda module, args, output: kept.append(output[1]))
    features = model.forward_features(images())
    tokens, whole = without.tokens_of(images())
    assert features.shape == (2, 1 + 8, 24)
    assert not torch.equal(*kept[0])  # each image loses patches of its own
    assert_near(features, run(without, chosen(tokens, kept[0]), whole.keep(kept[0])), 1e-10)
    features.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert_equal(model.eval()(images()), without(images()))


def test_a_distillation_token_is_never_dropped() -> None:
    model = tiny("learnable", "LaPE", "deit_tiny_distilled_patch16_224", patch_drop_rate=0.9).train()
    assert model.forward_features(images()).shape == (2, 2 + 1, 24)
    model.patch_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.patch_drop.register_forward_hook(lambda module, args, output: after.append(output[0]))
    seen: list[Tensor] = []
    after: list[Tensor] = []
    model.forward_features(images())
    assert_equal(after[0][:, :2], seen[0][:, :2])


READ_OFFSETS = ["relative", "2D_RPE", "rope", "rope_axial", "rope_mixed", "rope_dinov3", "rope_golden"]
READ_OFFSETS += ["alibi", "lookhere", "cpb", "irpe", "pape", "peg"]


@pytest.mark.parametrize("pe", READ_OFFSETS)
@torch.no_grad()
def test_a_shift_of_all_patches_changes_nothing_that_reads_offsets(pe: str) -> None:
    """Without a class token: it is not turned, so that rotations place the patches relative to it."""
    model = tiny(pe, "basic", class_token=False, global_pool="avg")
    tokens, whole = model.tokens_of(images())
    for dx, dy in ((3, -2), (0.25, 0.75), (0.1, 1 / 3)):
        assert_near(run(model, tokens, whole.shifted(dx, dy)), model.forward_features(images()), 1e-9)


@pytest.mark.parametrize("name", [name for name in ENCODINGS if ENCODINGS[name].reads_real_places])
@torch.no_grad()
def test_places_between_cells_give_what_lies_between(name: str) -> None:
    """A small move makes a small difference: none that reads real places jumps from cell to cell."""
    model = tiny(name)
    tokens, whole = model.tokens_of(images())
    at, near, far = (run(model, tokens, whole.scaled(by, by)) for by in (0.9, 0.9 + 1e-7, 0.6))
    assert (near - at).abs().max() < 1e-4
    assert (far - at).abs().max() > 1e-4


@torch.no_grad()
def test_a_table_is_read_linearly_between_cells() -> None:
    model = tiny("learnable")
    encoding, table = model.join.encoding, model.pos_embed
    halfway = encoding(Places((4, 4), torch.tensor([0.5]), torch.tensor([0.25])), table, table)[0, 1]
    rows = table[0, 1:].unflatten(0, (4, 4))
    assert_near(halfway, 0.75 * (rows[0, 0] + rows[0, 1]) / 2 + 0.25 * (rows[1, 0] + rows[1, 1]) / 2)
    beyond = encoding(Places((4, 4), torch.tensor([-2.0]), torch.tensor([9.0])), table, table)[0, 1]
    assert_equal(beyond, rows[3, 0])
