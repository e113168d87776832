"""Knock-outs change what they name and nothing else; the statistics of attention; the record of all measures."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lape_vit import encodings
from lape_vit.analysis import diagnosis as of_all
from lape_vit.analysis.attention_maps import attention_maps
from lape_vit.analysis.attention_statistics import attention_statistics, uniform_distance
from lape_vit.analysis.diagnosis import ALL_TAKEN_AWAY, Diagnosis, at_size, diagnose
from lape_vit.analysis.knock_outs import (
    ALL,
    INPUT,
    OUTPUT,
    PERMUTED_CONTENTS,
    PERMUTED_PLACES,
    answer_shifted,
    answer_without,
    knock_outs,
    layers_taken_away,
    places_changed,
    spots_of_positions,
)
from lape_vit.analysis.passes import logits_from, observe
from tests.models import CCT, DISTILLED, assert_equal, assert_near, images, over_pairs, sizes_of, tiny

IMAGES = images(4)
LABELS = torch.arange(4)


def answers(model: Any, batch: Tensor = IMAGES) -> dict[str, Tensor]:
    """The logits under every change of places."""
    seen = observe(model, batch)
    return {change.name: change.answer(batch, seen) for change in places_changed(model)}


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", DISTILLED, CCT])
def test_a_pass_is_that_of_the_model_and_continues_from_every_block(name: str) -> None:
    model, batch = tiny("learnable+peg", "LaPE", name), images(3, *[sizes_of(name)["img_size"]] * 2)
    seen = observe(model, batch)
    with torch.no_grad():
        assert_equal(seen.logits, model(batch))
        assert_equal(seen.output, model.forward_features(batch))
        for layer, x in enumerate(seen.inputs):
            assert_equal(logits_from(model, layer, x, seen.terms, seen.places), seen.logits)


@over_pairs
def test_a_knock_out_changes_the_answer_and_leaves_the_model_as_it_was(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type, class_token=False, global_pool="avg")
    seen = observe(model, IMAGES)
    for spot, knock_out in layers_taken_away(model).items():
        changed = not torch.allclose(knock_out.answer(IMAGES, seen), seen.logits)
        assert changed == (spot != OUTPUT)  # the mean of the terms after the last norm stays, and is all that is read
        assert_equal(observe(model, IMAGES).logits, seen.logits)


@over_pairs
def test_a_layer_without_position_loses_nothing(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    seen, spots = observe(model, IMAGES), spots_of_positions(model)
    others = {INPUT, 0, 1, OUTPUT} - {*spots}
    assert len(others) < 4 or pe == "none"
    for spot in others:
        assert_equal(answer_without(model, {spot}, IMAGES, seen), seen.logits)


@over_pairs
def test_without_any_position_a_model_is_blind_to_the_order_of_the_patches(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    blind = layers_taken_away(model).get(ALL)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    parts = IMAGES.unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).movedim((2, 4), (1, 2)).flatten(1, 2)[:, order]
    moved = parts.unflatten(1, (4, 4)).movedim((1, 2), (2, 4)).flatten(-2).flatten(-3, -2)
    one, other = (
        (observe(model, batch).logits if blind is None else blind.answer(batch, observe(model, batch)))
        for batch in (IMAGES, moved)
    )
    assert_near(one, other)


def test_a_model_without_positions_does_not_notice_other_places_bit_for_bit() -> None:
    model = tiny("none")
    seen, found = observe(model, IMAGES), answers(model)
    assert layers_taken_away(model) == {}
    for name in (PERMUTED_PLACES, "places shifted by 1"):
        assert_equal(found[name], seen.logits)
    assert_equal(found["image and places shifted by 0.5"], found["image shifted by 0.5"])


@over_pairs
def test_every_encoding_notices_permuted_places(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    changed = not torch.allclose(answers(model)[PERMUTED_PLACES], observe(model, IMAGES).logits)
    assert changed == (pe != "none")


@over_pairs
def test_an_image_shifted_by_whole_patches_with_its_places_is_the_same_image(pe: str, join_type: str) -> None:
    model = tiny(pe, join_type)
    seen = observe(model, IMAGES)
    assert_near(answer_shifted(model, 8, 16, True, IMAGES, seen), seen.logits, 1e-11)
    changed = not torch.allclose(answer_shifted(model, 8, 16, False, IMAGES, seen), seen.logits)
    assert changed == (pe != "none")


@pytest.mark.parametrize("pe", ["rope_axial", "rope_mixed", "alibi", "relative", "2D_RPE"])
def test_what_reads_offsets_alone_does_not_notice_shifted_places(pe: str) -> None:
    model = tiny(pe, class_token=False, global_pool="avg")  # a class token is not turned: it tells where patches are
    assert_near(answers(model)["places shifted by 1"], observe(model, IMAGES).logits, 1e-10)


def test_what_reads_places_themselves_notices_shifted_places() -> None:
    model = tiny("2D_sin")
    assert not torch.allclose(answers(model)["places shifted by 1"], observe(model, IMAGES).logits)


def test_places_between_cells_are_asked_only_of_encodings_that_read_them() -> None:
    for pe in encodings.names():
        reads = encodings.ENCODINGS[pe].reads_real_places or pe == "none"
        assert ("image and places shifted by 0.5" in answers(tiny(pe))) == reads


def test_taking_a_term_away_leaves_every_patch_the_mean_term() -> None:
    model = tiny("learnable", "LaPE")
    seen = observe(model, IMAGES)
    taken = answer_without(model, {1}, IMAGES, seen)
    mean = seen.terms.attention[1][:, 1:].mean(dim=1, keepdim=True).expand(-1, 16, -1)  # type: ignore[index]
    alike = torch.cat([seen.terms.attention[1][:, :1], mean], dim=1)  # type: ignore[index]
    terms = seen.terms._replace(attention=[seen.terms.attention[0], alike])
    with torch.no_grad():
        assert_equal(taken, logits_from(model, 1, seen.inputs[1], terms, seen.places))


def test_accuracy_and_agreement_are_counted_over_batches_of_any_size() -> None:
    model = tiny("learnable", "LaPE", depth=3)
    whole = knock_outs(model, [(IMAGES, LABELS)])
    assert knock_outs(model, [(IMAGES[:1], LABELS[:1]), (IMAGES[1:], LABELS[1:])]) == whole
    assert list(whole)[:4] == ["intact", "block 0", "block 1", "block 2"]
    assert whole["intact"].agreement == 100
    with torch.no_grad():
        right = (model(IMAGES).argmax(dim=-1) == LABELS).double().mean().item()
    assert whole["intact"].accuracy == pytest.approx(100 * right)
    unlabelled = knock_outs(model, [(IMAGES, None)])
    assert all(outcome.accuracy is None for outcome in unlabelled.values())
    assert [outcome.agreement for outcome in unlabelled.values()] == [one.agreement for one in whole.values()]
    with pytest.raises(ValueError, match="no images"):
        knock_outs(model, [])


# ---- attention


@pytest.mark.parametrize("pe", ["learnable", "relative", "rope_mixed+peg", "lookhere", "irpe"])
def test_entropy_and_distance_are_those_of_the_attention_maps(pe: str) -> None:
    model = tiny(pe, name=DISTILLED)
    found = attention_statistics(model, [IMAGES[:3], IMAGES[3:]])
    for layer, statistics in enumerate(found):
        weights = torch.stack([attention_maps(model, image[None])[layer].weights[:, 2:] for image in IMAGES])
        logs = torch.where(weights > 0, weights.log(), 0)
        assert_near(statistics.entropy, -(weights * logs).sum(dim=-1).mean(dim=(0, 2)))
        total = torch.zeros(3, dtype=torch.float64)
        for query in range(16):
            for head in range(3):
                of_keys = weights[:, head, query, 2:]
                far = [math.dist(divmod(query, 4), divmod(key, 4)) for key in range(16)]
                looked = (of_keys * torch.tensor(far, dtype=torch.float64)).sum(dim=-1) / of_keys.sum(dim=-1)
                total[head] += looked.mean() / 16
        assert_near(statistics.distance, total, 1e-10)


def test_attention_that_ignores_content_is_uniform() -> None:
    model = tiny("none")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    for statistics in attention_statistics(model, [IMAGES]):
        assert_near(statistics.entropy, torch.full((3,), math.log(17), dtype=torch.float64))
        assert_near(statistics.distance, torch.full((3,), uniform_distance((4, 4)), dtype=torch.float64))


def test_a_temperature_of_log_n_sharpens_the_attention_that_is_seen() -> None:
    plain, sharp = tiny("rope_axial"), tiny("rope_axial")
    sharp.extrapolate(log_n=True)
    for model in (plain, sharp):
        model.set_input_size(img_size=64)
    large = images(2, 64, 64)
    entropies = [attention_statistics(model, [large])[0].entropy for model in (plain, sharp)]
    assert (entropies[1] < entropies[0]).all()
    weights = attention_maps(sharp, large[:1])[0].weights
    assert_near(
        attention_statistics(sharp, [large[:1]])[0].entropy, torch.special.entr(weights[:, 1:]).sum(-1).mean(-1)
    )


# ---- the record


def test_a_diagnosis_has_every_measure_and_survives_json() -> None:
    model = tiny("learnable+peg", "MPVG", depth=3)
    fit, held_out = images(8, seed=1), images(6, seed=2)
    record = diagnose(
        model, [(fit, None)], [(held_out, torch.arange(6) % 5)], untrained=tiny("learnable+peg", "MPVG", depth=3)
    )
    assert Diagnosis.of(json.loads(json.dumps(record.as_dict()))) == record
    assert (record.fitted, record.held_out, record.grid, record.tokens) == (8, 6, (4, 4), 17)
    assert (record.judged, record.floor) == (6, 8)
    assert len(record.layers) == 3
    assert len(record.untrained) == 7
    assert all(layer.taken_away is not None for layer in record.layers)  # PEG after block 0, terms in blocks 1 and 2
    assert record.input_taken_away is not None
    assert record.output_taken_away is not None
    assert {PERMUTED_CONTENTS, PERMUTED_PLACES, ALL_TAKEN_AWAY} < record.knock_outs.keys()
    assert record.accuracy is not None


def test_a_diagnosis_is_independent_of_the_batch_size_and_repeats() -> None:
    model, fit, held_out = tiny("2D_sin", "LaPE"), images(9, seed=1), images(7, seed=2)

    def numbers(step: int) -> list[float]:
        batches = [[(part, None) for part in half.split(step)] for half in (fit, held_out)]
        values = diagnose(model, *batches, ridge=0.1).as_dict()
        del values["seconds"]
        return list(flat(values))

    assert numbers(9) == numbers(9)
    assert numbers(2) == pytest.approx(numbers(9), abs=1e-9)


@pytest.mark.parametrize(("pe", "join_type"), [("learnable", "basic"), ("2D_sin", "LaPE"), ("none", "basic")])
def test_knock_outs_and_attention_are_of_the_first_images_and_probes_of_all(pe: str, join_type: str) -> None:
    model, (fit, held_out) = tiny(pe, join_type), (images(9, seed=1), images(7, seed=2))
    labels = torch.arange(7) % 5

    def measured(held_out: list[tuple[Tensor, Tensor]], judged: int | None = None) -> Diagnosis:
        return diagnose(model, [(fit, None)], held_out, ridge=0.1, judged=judged)

    whole = measured([(held_out, labels)])
    by_hand = knock_outs(model, [(held_out[:3], labels[:3])])
    for step in (7, 2):
        part = measured([*zip(held_out.split(step), labels.split(step), strict=True)], judged=3)
        assert (part.held_out, part.judged, part.accuracy) == (7, 3, whole.accuracy)
        assert part.intact == by_hand["intact"].accuracy
        for name in (PERMUTED_PLACES, *({ALL_TAKEN_AWAY} & part.knock_outs.keys())):
            assert part.knock_outs[name] == by_hand[ALL if name == ALL_TAKEN_AWAY else name]
        for layer, (of_part, of_whole) in enumerate(zip(part.layers, whole.layers, strict=True)):
            assert of_part.read.permuted.r2 == pytest.approx(of_whole.read.permuted.r2)
            assert of_part.taken_away == by_hand.get(f"block {layer}")
        entropy = attention_statistics(model, [held_out[:3]])[1].entropy
        assert part.layers[1].entropy == pytest.approx(entropy.tolist())
        assert part.removed.agreement in (0, pytest.approx(100 / 3), pytest.approx(200 / 3), 100)
    assert whole.judged == 7


def test_no_answer_changes_where_there_is_no_position_to_be_removed() -> None:
    record = diagnose(tiny("none", depth=3), [(images(60, seed=1), None)], [(images(20, seed=2), None)])
    assert [layer.removed.agreement for layer in record.layers] == [100, 100, 100]
    assert record.removed.agreement == 100


def test_the_default_numbers_of_images_depend_on_the_patches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_all, "FLOOR_PATCHES", 50)
    monkeypatch.setattr(of_all, "JUDGED_PATCHES", 64)
    model, fit, held_out = tiny("2D_sin", "LaPE"), images(9, seed=1), images(7, seed=2)
    for step in (9, 2):
        batches = [[(part, None) for part in half.split(step)] for half in (fit, held_out)]
        record = diagnose(model, *batches, untrained=tiny("2D_sin", "LaPE"))
        assert (record.fitted, record.held_out, record.floor, record.judged) == (9, 7, 4, 4)


def flat(value: Any) -> Any:
    """All numbers of plain data, in order."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for one in value:
            yield from flat(one)
    elif isinstance(value, int | float):
        yield value


def test_a_model_at_another_size() -> None:
    model = tiny("rope_axial")
    model.set_input_size(img_size=48)
    record = at_size(model, [(images(3, 48, 48), LABELS[:3])], "plain")
    assert (record.size, record.grid, record.tokens, record.way) == ((48, 48), (6, 6), 37, "plain")
    assert len(record.entropy) == 2
    assert len(record.entropy[0]) == 3
    assert record.accuracy is not None
