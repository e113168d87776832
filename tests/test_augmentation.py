"""Augmented places in training, and attention's places and temperature at other sizes."""

import math
from typing import Any

import pytest
import torch

from lape_vit.augmentation import PlaceAugmentation
from lape_vit.encodings import ENCODINGS, resolve
from lape_vit.places import Places
from tests.models import PAIRS, assert_equal, assert_near, create, gradients, images, tiny
from tests.references import augmentation

REAL = [pair for pair in PAIRS if all(part.reads_real_places for part in resolve(pair[0]).parts)]
ROUNDED = [name for name, encoding in ENCODINGS.items() if not encoding.reads_real_places]
DRAWS = {"pos_shift": 0.3, "pos_jitter": 1.5, "pos_rescale": 2.0}
over_real_pairs = pytest.mark.parametrize(("pe", "join_type"), REAL)


def test_a_draw_is_shift_then_jitter_then_rescale_about_the_centre() -> None:
    places, drawn = Places((3, 5)), PlaceAugmentation(0.3, 1.5, 2.0)
    torch.manual_seed(1)
    x, y = drawn(places).coordinates()
    torch.manual_seed(1)
    draw = (2 * torch.rand(5, dtype=torch.float64) - 1).tolist()
    expected = augmentation.augmented(
        (3, 5),
        shift=(0.3 * draw[1], 0.3 * draw[0]),
        jitter=(1.5 ** draw[3], 1.5 ** draw[2]),
        rescale=2.0 ** draw[4],
        normalize="separate",
    )
    assert_near(x, torch.tensor(expected[0], dtype=torch.float64))
    assert_near(y, torch.tensor(expected[1], dtype=torch.float64))


def test_draws_fill_their_ranges_evenly() -> None:
    grid = (4, 4)
    torch.manual_seed(0)
    shifts = torch.stack([PlaceAugmentation(shift=0.5)(Places(grid)).coordinates()[0][0] for _ in range(2000)])
    assert shifts.min() >= -0.5 * 2
    assert shifts.max() <= 0.5 * 2
    assert abs(shifts.mean().item()) < 0.05
    assert abs(shifts.std().item() - 1 / math.sqrt(3)) < 0.03
    widths = []
    for _ in range(2000):
        x, _ = PlaceAugmentation(rescale=2.0)(Places(grid)).coordinates()
        widths.append(math.log2(((x[3] - x[0]) / 3).item()))
    logs = torch.tensor(widths)
    assert logs.abs().max() <= 1 + 1e-9
    assert abs(logs.mean().item()) < 0.05
    assert abs(logs.std().item() - 1 / math.sqrt(3)) < 0.03


@over_real_pairs
def test_training_draws_once_per_forward_and_evaluation_never(pe: str, join_type: str) -> None:
    model, plain = tiny(pe, join_type, **DRAWS), tiny(pe, join_type)
    assert_equal(model(images()), plain(images()))
    model.train()
    torch.manual_seed(3)
    first = model(images())
    assert not torch.allclose(first, plain(images()))
    torch.manual_seed(3)
    assert_equal(model(images()), first)
    assert not torch.equal(model(images()), first)
    torch.manual_seed(3)
    tokens, whole = plain.tokens_of(images())
    moved = plain.forward_head(plain.forward_tokens(tokens, PlaceAugmentation(0.3, 1.5, 2.0)(whole)))
    assert_near(first, moved, 1e-10)  # the same places in all layers


@over_real_pairs
def test_augmented_training_has_gradients_and_checkpoints(pe: str, join_type: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny(pe, join_type, patch_drop_rate=0.25, **DRAWS).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        tokens = model.forward_features(images())
        found.append(gradients(model, torch.cat([tokens.flatten(), model.forward_head(tokens).flatten()])))
    assert_near(found[0], found[1])
    assert all(gradient.isfinite().all() for gradient in found[0].values())


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("draw", DRAWS)
def test_an_encoding_that_rounds_places_refuses_in_one_line(name: str, draw: str) -> None:
    with pytest.raises(ValueError, match=f"pos_shift.* pe='{name}'") as error:
        create(name, **{draw: DRAWS[draw]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "draw", [{"pos_shift": -0.1}, {"pos_jitter": 0.5}, {"pos_rescale": 0.0}, {"pos_jitter": math.nan}]
)
def test_a_draw_out_of_range_is_refused_by_name(draw: dict[str, float]) -> None:
    (name,) = draw
    with pytest.raises(ValueError, match=f"{name}="):
        create("rope_axial", **draw)


# ---- other sizes


def resized(pe: str, size: tuple[int, int], **kwargs: Any) -> Any:
    model = tiny(pe, class_token=False, global_pool="avg", dynamic_img_size=True, **kwargs)
    return model, images(1, *size)


@pytest.mark.parametrize("pe", ["rope", "rope_axial", "rope_mixed"])
@torch.no_grad()
def test_on_a_reference_grid_a_place_means_the_same_part_of_the_image(pe: str) -> None:
    model, pixels = resized(pe, (64, 64))
    tokens, whole = model.tokens_of(pixels)
    plain, expected = model.forward_features(pixels), model.forward_tokens(tokens, whole.scaled(0.5, 0.5))
    model.extrapolate(reference_grid=(4, 4))
    x, y = whole.on((4, 4)).coordinates()
    assert (x.min(), x.max(), y.min(), y.max()) == (-0.25, 3.25, -0.25, 3.25)
    assert_near(model.forward_features(pixels), expected, 1e-9)  # offsets are halved
    assert not torch.allclose(model.forward_features(pixels), plain)
    assert_equal(model(images(1)), tiny(pe, class_token=False, global_pool="avg")(images(1)))  # the trained size
    model.extrapolate()
    assert_equal(model.forward_features(pixels), plain)


@pytest.mark.parametrize("pe", ["none", "2D_RPE", "rope", "relative"])
@torch.no_grad()
def test_log_n_multiplies_all_logits_by_the_ratio_of_logarithms(pe: str) -> None:
    model, pixels = resized(pe, (64, 64))
    attn = model.blocks[0].attn
    tokens, places = model.tokens_of(pixels)
    attn.fused_attn = False
    logits: list[torch.Tensor] = []
    attn.attn_drop.register_forward_pre_hook(lambda module, args: logits.append(args[0].log()))
    for log_n in (False, True):
        model.extrapolate(log_n=log_n)
        attn(tokens, places)
    plain, scaled = (weights - weights[..., :1] for weights in logits)
    assert_near(scaled, plain * math.log(64) / math.log(16), 1e-9)
    before = model(images(1))
    model.extrapolate()
    assert_near(before, model(images(1)))  # at the trained size nothing changes


@pytest.mark.parametrize("pe", ["none", "learnable"])
def test_a_reference_grid_needs_an_encoding_in_attention(pe: str) -> None:
    with pytest.raises(ValueError, match="no part in attention"):
        tiny(pe).extrapolate(reference_grid=(4, 4))
    with pytest.raises(ValueError, match="a reference grid cannot be used with pe='relative'"):
        tiny("relative").extrapolate(reference_grid=(4, 4))
