"""Warm starts: checkpoints of other sizes, encodings, joins and code bases; timm's ways to save and load."""

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models.deit
import torch

from lape_vit import warm_start
from tests.models import COMPACT, DEIT, DISTILLED, SIZES, assert_equal, assert_near, images, over_pairs, tiny


@over_pairs
def test_a_checkpoint_of_the_same_kind_and_size_loads_bit_for_bit(pe: str, join_type: str) -> None:
    source, target = tiny(pe, join_type), tiny(pe, join_type, num_classes=5).float()
    start = warm_start(source.state_dict(), target)
    assert start.new == start.left_out == start.report() == []
    assert_equal(dict(start.state_dict), dict(source.state_dict()))


@over_pairs
@pytest.mark.parametrize("size", [(48, 48), (24, 40)])
def test_a_checkpoint_of_another_size_becomes_what_set_input_size_makes_of_it(
    pe: str, join_type: str, size: tuple[int, int]
) -> None:
    source, target = tiny(pe, join_type), tiny(pe, join_type, img_size=size)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    start = warm_start(source.state_dict(), target)
    assert start.new == start.left_out == []
    assert_equal(dict(target.state_dict()), before)  # the model is not changed by looking
    target.load_state_dict(start.state_dict)
    source.set_input_size(img_size=size)
    pixels = images(1, *size)
    assert_equal(target(pixels), source(pixels))


@over_pairs
@pytest.mark.parametrize("size", [(384, 384), (160, 224), (32, 32)])
def test_models_for_224_pixels_work_at_the_sizes_of_the_field(pe: str, join_type: str, size: tuple[int, int]) -> None:
    sizes: dict[str, Any] = {"patch_size": 16, "embed_dim": 24, "depth": 1}
    source = tiny(pe, join_type, img_size=224, **sizes)
    created = tiny(pe, join_type, img_size=size, **sizes)
    dynamic = tiny(pe, join_type, img_size=224, dynamic_img_size=True, **sizes)
    created.load_state_dict(warm_start(source.state_dict(), created).state_dict)
    pixels = images(1, *size)
    expected = dynamic(pixels)
    source.set_input_size(img_size=size)
    assert_equal(created(pixels), source(pixels))
    assert_near(source(pixels), expected)


def test_a_grid_that_is_no_square_must_be_told() -> None:
    source, target = tiny(img_size=(24, 40)), tiny(img_size=48)
    with pytest.raises(ValueError, match=r"pos_embed .* 15 rows for patches, no square grid"):
        warm_start(source.state_dict(), target)
    target.load_state_dict(warm_start(source.state_dict(), target, grid=(3, 5)).state_dict)
    source.set_input_size(img_size=48)
    assert_equal(target(images(1, 48, 48)), source(images(1, 48, 48)))


@pytest.mark.parametrize(("source", "target"), [(DISTILLED, DEIT), (DEIT, DISTILLED)])
def test_distilled_and_other_models_start_from_each_other(source: str, target: str) -> None:
    start = warm_start(tiny(name=source).state_dict(), tiny(name=target))
    new_or_left_out = {"pos_embed", "dist_token", "head_dist.weight", "head_dist.bias"}
    assert {*start.new, *start.left_out} == new_or_left_out


def test_what_is_new_and_what_is_left_out_is_said_in_a_line_each() -> None:
    start = warm_start(tiny("learnable").state_dict(), tiny("rope_mixed"))
    assert start.report() == [
        "new, at its initial values: blocks.*.attn.encoding.frequencies (2)",
        "left out of the checkpoint: pos_embed",
    ]


def test_a_checkpoint_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor of the checkpoint fits"):
        warm_start({"layer1.weight": torch.zeros(3)}, tiny())


class TestPretrained:
    """`pretrained=True`, with timm's own weights in a local file in place of the download."""

    @staticmethod
    def create(tmp_path: Path, **kwargs: Any) -> tuple[Any, Any]:
        torch.manual_seed(1)
        timms = timm.models.deit.deit_tiny_patch16_224(**SIZES).eval()
        torch.save(timms.state_dict(), tmp_path / "weights.pth")
        overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
        ours = timm.create_model(DEIT, pretrained=True, pretrained_cfg_overlay=overlay, **{**SIZES, **kwargs})
        return timms, ours.eval()

    def test_the_default_pair_is_timms_model(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        timms, ours = self.create(tmp_path)
        pixels = images().float()
        assert_equal(ours(pixels), timms(pixels))
        assert not [record for record in caplog.records if record.name == "models_lape"]

    @over_pairs
    def test_every_pair_starts_from_all_that_fits(
        self, pe: str, join_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        timms, ours = self.create(tmp_path, pe=pe, join_type=join_type)
        source, weights = timms.state_dict(), ours.state_dict()
        fits = [name for name, value in source.items() if name in weights and weights[name].shape == value.shape]
        assert set(source) - set(fits) <= {"pos_embed"}
        for name in fits:
            assert_equal(weights[name], source[name])
        new = weights.keys() - fits
        said = [record.getMessage() for record in caplog.records if record.name == "models_lape"]
        assert bool(new) == any("new, at its initial values" in line for line in said)

    def test_another_head_and_size(self, tmp_path: Path) -> None:
        timms, ours = self.create(tmp_path, num_classes=7, img_size=48)
        assert ours.head.weight.shape == (7, 24)
        timms.set_input_size(img_size=48)
        assert_near(
            ours.forward_features(images(1, 48, 48).float()), timms.forward_features(images(1, 48, 48).float()), 1e-6
        )


@pytest.mark.parametrize(("pe", "options"), [("learnable+rope_mixed", {"rope_theta": 20.0}), ("learnable", {})])
def test_a_hub_folder_keeps_encoding_join_and_options(pe: str, options: dict[str, Any], tmp_path: Path) -> None:
    logging.getLogger("timm").setLevel(logging.WARNING)
    model = timm.create_model(COMPACT, pe=pe, join_type="LaPE", img_size=16, depth=2, **options).eval()
    timm.models.save_for_hf(
        model, tmp_path, model_args={"pe": pe, "join_type": "LaPE", "img_size": 16, "depth": 2, **options}
    )
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (loaded.pe, loaded.join_type) == (model.pe, "LaPE")
    assert_equal(loaded(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)))
