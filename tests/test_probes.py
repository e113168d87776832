"""The probe for places: it finds what was planted, where it was planted, and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from lape_vit.analysis.probes import (
    Found,
    FoundSums,
    PlaceProbe,
    PlaceSums,
    patch_tokens,
    permute_contents,
    probe_places,
    ranked,
    remove_position,
    similarity_by_distance,
)
from lape_vit.places import Places
from tests.models import CCT, DISTILLED, disturb, sizes_of, tiny

DEEP = {"depth": 4}


def noise(number: int, seed: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, size, size, generator=generator, dtype=torch.float64)


FIT, JUDGE = noise(40, 1), noise(20, 2)


def sky(images: Tensor) -> Tensor:
    """Images that are redder towards the bottom and greener towards the right."""
    side = torch.arange(images.shape[-1], dtype=images.dtype).expand(images.shape[-2:])
    return images + torch.stack([side.mT, side, 0 * side])


def plant_places(model: nn.Module, layer: int) -> None:
    """Let the patch tokens carry x and y, each in one channel of its own, from this block on."""

    def add(module: nn.Module, args: tuple) -> tuple:
        tokens = args[0].clone()
        tokens[:, -16:, :2] = torch.stack(Places((4, 4)).coordinates(), dim=-1) - 1.5
        return (tokens, *args[1:])

    model.blocks[layer].register_forward_pre_hook(add, prepend=True)  # type: ignore[index, operator]


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_planted_places_are_found_in_their_layer_and_not_before(layer: int, permute: bool) -> None:
    model = tiny("none", **DEEP)
    plant_places(model, layer)
    layers = probe_places(model, [FIT], [JUDGE], permute)
    assert len(layers) == 4
    for before in layers[:layer]:
        for found in (before.input, before.read):
            assert found.r2 < 0.05
            assert found.error > 1.4  # the mean place is 1.5 away on the average
    assert layers[layer].input.r2 == pytest.approx(1, abs=1e-4)
    assert layers[layer].input.error < 0.02
    assert layers[layer].read.r2 > 0.5  # norm1 is not linear


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", DISTILLED, CCT])
@pytest.mark.parametrize("permute", [False, True])
def test_the_batch_size_changes_nothing_and_a_call_repeats_bit_for_bit(name: str, permute: bool) -> None:
    size = sizes_of(name)["img_size"]
    model, fit, judge = tiny("learnable", "LaPE", name), noise(13, 1, size), noise(7, 2, size)
    whole, again = (probe_places(model, [fit], [judge], permute, ridge=0.1, seed=3) for _ in range(2))
    parts = probe_places(model, fit.split(5), judge.split(2), permute, ridge=0.1, seed=3)
    for one, same, other in zip(whole, again, parts, strict=True):
        for spot in ("input", "read"):
            a, b, c = (getattr(layer, spot) for layer in (one, same, other))
            assert (a.r2, a.error) == (b.r2, b.error)
            assert (a.r2, a.error) == pytest.approx((c.r2, c.error), abs=1e-9)
            torch.testing.assert_close(a.probe.weight, c.probe.weight)


def test_lape_shows_in_what_attention_reads_and_not_in_what_the_first_block_is_given() -> None:
    first = probe_places(tiny("learnable", "LaPE"), [FIT], [JUDGE])[0]
    assert first.input.r2 < 0.05
    assert first.read.r2 > 0.3


def test_a_probe_that_reads_the_sky_finds_nothing_once_contents_are_permuted() -> None:
    model = tiny("none")
    as_they_are, permuted = (probe_places(model, [sky(FIT)], [sky(JUDGE)], permute) for permute in (False, True))
    assert as_they_are[0].input.r2 > 0.5
    assert all(found.r2 < 0.05 for layer in permuted for found in (layer.input, layer.read))


def test_without_positions_permuted_contents_give_the_same_tokens_at_other_places() -> None:
    model = tiny("none", **DEEP)
    permuted = permute_contents(JUDGE, (4, 4), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(16, generator=generator) for _ in JUDGE]
    with torch.no_grad():
        for tokens, moved in zip(patch_tokens(model, JUDGE), patch_tokens(model, permuted), strict=True):
            expected = torch.stack([image[order] for image, order in zip(tokens, orders, strict=True)])
            torch.testing.assert_close(moved, expected)


def test_permuted_contents_are_whole_parts_of_the_same_image_in_an_order_of_its_own() -> None:
    images = torch.arange(2 * 3 * 6 * 8, dtype=torch.float64).reshape(2, 3, 6, 8)
    moved = permute_contents(images, (3, 2), torch.Generator().manual_seed(0))
    assert moved.shape == images.shape

    def parts(image: Tensor) -> list[bytes]:
        return [image[:, 2 * y : 2 * y + 2, 4 * x : 4 * x + 4].numpy().tobytes() for y in range(3) for x in range(2)]

    for before, after in zip(images, moved, strict=True):
        assert sorted(parts(before)) == sorted(parts(after))
        assert parts(before) != parts(after)


def test_the_closed_form_is_that_of_all_tokens_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.stack(Places((3, 4)).coordinates(), dim=-1)
    tokens = torch.randn(10, 12, 5, generator=generator, dtype=torch.float64)
    tokens[..., 1] += places[:, 0]
    sums = PlaceSums()
    for part in tokens.split(3):
        sums.add(part, places)
    probe = sums.fit(ridge=0.5)
    X, Y = tokens.flatten(0, 1), places.repeat(10, 1)
    X, Y = X - X.mean(dim=0), Y - Y.mean(dim=0)
    penalty = 0.5 * X.square().mean() * len(X)  # as rows of data: sqrt(penalty) times the identity, at place 0
    rows = torch.cat([X, penalty.sqrt() * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([Y, torch.zeros(5, 2, dtype=torch.float64)])).solution
    torch.testing.assert_close(probe.weight, expected)
    torch.testing.assert_close(probe(tokens[0]), (tokens[0] - tokens.mean(dim=(0, 1))) @ expected + places.mean(dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_probe_finds_places_in_tokens_whose_position_was_removed(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.stack(Places((4, 4)).coordinates(), dim=-1)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)  # so that W and the covariance differ
    tokens = torch.randn(50, 16, 8, generator=generator, dtype=torch.float64)
    tokens[..., :2] += 3 * places
    tokens = (tokens @ mixing + 5).to(dtype)

    def fit(features: Tensor) -> tuple[float, PlaceSums]:
        sums = PlaceSums()
        sums.add(features, places)
        errors = (sums.fit()(features) - places).square().sum()
        return 1 - (errors / (50 * (places - places.mean(dim=0)).square().sum())).item(), sums

    r2, sums = fit(tokens)
    assert r2 > 0.9
    probe = sums.fit()
    left = remove_position(tokens, probe)
    assert left.dtype == dtype
    assert left.shape == tokens.shape
    assert fit(left)[0] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(remove_position(left, probe), left)
    assert torch.linalg.matrix_rank((tokens - left).double().flatten(0, 1), atol=1e-2) == 2


def test_equal_tokens_tell_no_place() -> None:
    first = probe_places(tiny("none"), [torch.ones_like(FIT)], [torch.ones_like(JUDGE)])[0]
    assert first.input.r2 == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_probed_is_refused() -> None:
    model = tiny("none")
    with pytest.raises(ValueError, match="no images to fit"):
        probe_places(model, [], [JUDGE])
    with pytest.raises(ValueError, match="no held-out images"):
        probe_places(model, [FIT], [])
    with pytest.raises(ValueError, match="one patch"):
        probe_places(tiny("none", img_size=8), [FIT[..., :8, :8]], [JUDGE[..., :8, :8]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        probe_places(model, [FIT * torch.nan], [JUDGE])


def test_probing_leaves_the_model_as_it_was() -> None:
    model = disturb(tiny("rope_axial", "basic"))
    before = model(JUDGE)
    probe_places(model, [FIT], [JUDGE])
    assert torch.equal(model(JUDGE), before)


def test_tokens_that_are_more_alike_the_nearer_they_are_have_a_correlation_of_minus_one() -> None:
    places = torch.stack(Places((1, 6)).coordinates(), dim=-1)
    alike = 1 - places[:, :1].sub(places[:, 0]).abs() / 10
    assert similarity_by_distance(alike, places) == pytest.approx(-1)
    assert similarity_by_distance(-alike, places) == pytest.approx(1)
    assert similarity_by_distance(torch.ones(6, 6, dtype=torch.float64), places) == 0


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranked(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def fitted(tokens: Tensor, grid: tuple[int, int]) -> PlaceProbe:
    sums = PlaceSums()
    sums.add(tokens, torch.stack(Places(grid).coordinates(), dim=-1))
    return sums.fit()


def found_in(tokens: Tensor, grid: tuple[int, int]) -> Found:
    places = torch.stack(Places(grid).coordinates(), dim=-1)
    judged = FoundSums(fitted(tokens, grid))
    for part in tokens.split(3):
        judged.add(part, places)
    return judged.found()


def test_the_share_of_position_is_the_part_of_the_variance_that_places_fix() -> None:
    generator = torch.Generator().manual_seed(0)
    of_places = torch.randn(1, 12, 5, generator=generator, dtype=torch.float64)
    of_images = torch.randn(400, 12, 5, generator=generator, dtype=torch.float64)
    assert found_in(of_places.expand(4, -1, -1), (3, 4)).share == pytest.approx(1)
    assert found_in(of_images + 7, (3, 4)).share == pytest.approx(0, abs=0.01)
    assert found_in(of_images[:5], (3, 4)).share == pytest.approx(0, abs=0.1)  # without a correction 1/5
    part = of_places.var(dim=1).sum() / (of_places.var(dim=1).sum() + 5)
    assert found_in(of_places + of_images, (3, 4)).share == pytest.approx(part.item(), abs=0.05)


def test_the_share_that_is_removed_is_the_variance_of_what_tells_places() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, 12, 6, generator=generator, dtype=torch.float64)
    places = torch.stack(Places((3, 4)).coordinates(), dim=-1)
    tokens[..., :2] += places
    removed = tokens - remove_position(tokens, fitted(tokens, (3, 4)))

    def variance(features: Tensor) -> Tensor:
        return features.flatten(0, 1).var(dim=0).sum()

    assert found_in(tokens, (3, 4)).removed_share == pytest.approx((variance(removed) / variance(tokens)).item())


def test_nothing_is_removed_where_no_position_is_to_be_found() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, 32, dtype=torch.float64)
    tokens = sizes * torch.randn(60, 12, 32, generator=generator, dtype=torch.float64)
    assert found_in(tokens, (3, 4)).removed_share == 0


def test_chance_seldom_passes_for_a_position() -> None:
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(2000, 20, 6, 8, generator=generator, dtype=torch.float64)
    removing = sum(bool(fitted(tokens, (2, 3)).along.any()) for tokens in many)
    assert removing <= 8  # 2 are expected


def test_the_direction_that_no_token_tells_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.stack(Places((4, 4)).coordinates(), dim=-1)
    tokens = torch.randn(50, 16, 8, generator=generator, dtype=torch.float64)
    tokens[..., 0] += places @ torch.tensor([1.0, 4.0], dtype=torch.float64)  # as in a count along the rows
    probe = fitted(tokens, (4, 4))
    assert torch.linalg.matrix_rank(probe.along) == 1
    left = remove_position(tokens, probe)
    assert (left - tokens)[..., 1:].std() < 0.1 * (left - tokens)[..., 0].std()
    assert fitted(left, (4, 4)).along.eq(0).all()
