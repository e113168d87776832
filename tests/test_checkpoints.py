"""Warm starts: checkpoints of other sizes, encodings, joins and code bases; timm's ways to save and load."""

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models.deit
import timm.models.vision_transformer
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lape_vit import convert_checkpoint, warm_start
from lape_vit.convert import unwrap_names
from tests.models import (
    CCT,
    COMPACT,
    DEIT,
    DISTILLED,
    SIZES,
    assert_equal,
    assert_near,
    create,
    disturb,
    images,
    over_pairs,
    tiny,
)


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
    source, target = tiny(img_size=(24, 56)), tiny(img_size=48)
    with pytest.raises(ValueError, match=r"pos_embed .* has 22 rows, which fit no square grid"):
        warm_start(source.state_dict(), target)
    target.load_state_dict(warm_start(source.state_dict(), target, grid=(3, 7)).state_dict)
    source.set_input_size(img_size=48)
    assert_equal(target(images(1, 48, 48)), source(images(1, 48, 48)))


@over_pairs
@pytest.mark.parametrize("size", [(24, 40), (16, 64)])
def test_a_table_that_fits_a_model_that_is_not_square_is_taken_as_it_is(
    pe: str, join_type: str, size: tuple[int, int]
) -> None:
    source, target = tiny(pe, join_type, img_size=size), create(pe, join_type, img_size=size).double()
    start = warm_start(source.state_dict(), target)
    assert_equal(dict(start.state_dict), dict(source.state_dict()))
    assert start.new == start.left_out == []
    for line in start.report():  # 16 rows could also be of 4 x 4 patches
        assert re.fullmatch(
            r"\S+ is taken for 2 x 8 patches( and cls_token)?; the checkpoint does not say its grid", line
        )
    assert bool(start.report()) == ("learnable" in pe and "2D_RPE" not in pe and size == (16, 64))


def test_a_known_grid_goes_before_that_of_the_model_and_one_that_the_tables_contradict_is_not_used() -> None:
    source, target = tiny(img_size=(16, 64)), tiny(img_size=32)
    known = warm_start(source.state_dict(), target, grid=(2, 8))
    target.load_state_dict(known.state_dict)
    assert known.report() == []
    assert_equal(dict(warm_start(source.state_dict(), tiny(), grid=(9, 9)).state_dict)["pos_embed"], source.pos_embed)
    source.set_input_size(img_size=32)
    assert_equal(target(images()), source(images()))


def test_a_square_grid_that_is_guessed_is_told() -> None:
    assert warm_start(tiny().state_dict(), tiny(img_size=48)).report() == [
        "pos_embed is taken for 4 x 4 patches and cls_token; the checkpoint does not say its grid"
    ]


PREFIXES: dict[str, dict[str, Any]] = {
    "class": {},
    "none": {"class_token": False, "global_pool": "avg"},
    "distilled": {"name": DISTILLED},
    "registers": {"reg_tokens": 4},
    "class without a row": {"no_embed_class": True},
    "registers without rows": {"reg_tokens": 4, "no_embed_class": True},
}


def rows_of(model: Any) -> dict[str, Tensor]:
    """The rows of a model's table, by whose they are."""
    names = [] if model.no_embed_class else [name for name in PREFIX if getattr(model, name) is not None]
    numbers = [getattr(model, name).shape[1] for name in names]
    parts = model.pos_embed.split([*numbers, model.pos_embed.shape[1] - sum(numbers)], dim=1)
    return dict(zip([*names, "patches"], parts, strict=True))


PREFIX = ("cls_token", "dist_token", "reg_token")


@pytest.mark.parametrize(("join_type", "size"), [("basic", 48), ("unshare", 32)])
@pytest.mark.parametrize("target", PREFIXES)
@pytest.mark.parametrize("source", PREFIXES)
def test_tables_with_other_prefix_rows_give_those_of_the_patches_and_of_the_tokens_that_both_have(
    source: str, target: str, join_type: str, size: int
) -> None:
    old = tiny("learnable", join_type, **PREFIXES[source])
    new = disturb(create("learnable", join_type, img_size=size, **PREFIXES[target]).double(), seed=1)
    before, start = rows_of(new), warm_start(old.state_dict(), new)
    new.load_state_dict(start.state_dict)
    assert "pos_embed" not in start.new + start.left_out
    old.set_input_size(img_size=size)
    given, after = rows_of(old), rows_of(new)
    assert_equal(after["patches"], given["patches"])
    for name in after.keys() - {"patches"}:
        without_row = torch.zeros_like(before[name]) if getattr(old, name) is not None else before[name]
        assert_equal(after[name], given.get(name, without_row))
    told = " ".join(line for line in start.report() if line.startswith("pos_embed: "))
    assert [name for name in PREFIX if name in told] == [
        name
        for name in PREFIX
        if name in given.keys() - after.keys() | {*after} - {*given}
        if not (name in after and getattr(old, name) is not None)
    ]


@pytest.mark.parametrize(("source", "target"), [(DISTILLED, DEIT), (DEIT, DISTILLED)])
def test_distilled_and_other_models_start_from_each_other(source: str, target: str) -> None:
    start = warm_start(tiny(name=source).state_dict(), tiny(name=target))
    assert {*start.new, *start.left_out} == {"dist_token", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("options", [{"no_embed_class": True}, {}], ids=str)
def test_dinov2_with_registers_loads_and_is_the_same_function(options: dict[str, Any], size: int) -> None:
    parts: dict[str, Any] = {"reg_tokens": 4, "init_values": 1e-5, "num_classes": 0}
    timms = disturb(timm.models.vision_transformer.VisionTransformer(**SIZES | parts, no_embed_class=True)).eval()
    ours = create(**parts, **options, img_size=size).eval()
    start = warm_start(as_dinov2(timms.state_dict()), ours)
    assert start.new == start.left_out == []
    ours.load_state_dict(start.state_dict)
    timms.set_input_size(img_size=size)
    assert_near(ours(images(2, size, size).float()), timms(images(2, size, size).float()), 1e-5)


def as_dinov2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm model's weights as DINOv2's code names them, with a row of the table for the class token."""
    row = torch.ones_like(state_dict["cls_token"])
    return {
        **{name: value for name, value in state_dict.items() if name != "reg_token"},
        "register_tokens": state_dict["reg_token"],
        "cls_token": state_dict["cls_token"] - row,
        "pos_embed": torch.cat([row, state_dict["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, row.shape[2]),
    }


@pytest.mark.parametrize(
    ("state_dict", "words"),
    [
        (
            {"mask_token": torch.zeros(1), "register_tokens": torch.zeros(1)},
            r"timm cannot read .*KeyError: 'cls_token'",
        ),
        ({"patch_embed.proj.weight": torch.zeros(7, 5)}, r"timm cannot read .*RuntimeError: shape"),
        (
            {"layer1.weight": torch.zeros(3)},
            "no tensor of the checkpoint fits .* layer1.weight, are not those of the model",
        ),
        (
            {"norm.weight": torch.zeros(7)},
            r"no tensor of the checkpoint fits .* norm.weight is \(7,\) there and \(24,\)",
        ),
        ({"pos_embed": torch.zeros(1, 4, 4, 24)}, r"no tensor of the checkpoint fits .* pos_embed is \(1, 4, 4, 24\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_true_reason(
    state_dict: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        warm_start(state_dict, tiny())


@pytest.mark.parametrize(
    "prefixes",
    [
        *itertools.product(("module.", "_orig_mod.", ""), repeat=3),
        *[(name,) for name in ("model.", "vit.", "module.model.backbone.")],
    ],
    ids="".join,
)
def test_what_wrappers_put_before_names_is_taken_off(prefixes: tuple[str, ...]) -> None:
    source = tiny().state_dict()
    wrapped = {"".join(prefixes) + name: value for name, value in source.items()}
    assert_equal(convert_checkpoint(wrapped), dict(source))


def test_what_holds_a_model_is_taken_off_only_where_it_holds_all() -> None:
    weights = {"conv.weight": torch.zeros(1), "fc.bias": torch.ones(1)}
    held = {f"model.{name}": value for name, value in weights.items()}
    assert_equal(unwrap_names({f"_orig_mod.{name}": value for name, value in held.items()}), weights)
    mixed = {**held, "loss.weight": torch.zeros(1)}
    assert_equal(unwrap_names(mixed), mixed)


def test_tokens_and_tables_of_other_shapes_are_left_out() -> None:
    odd = {"cls_token": torch.zeros(24), "pos_embed": torch.zeros(1, 4, 4, 24), "patch_embed.proj.bias": torch.ones(24)}
    start = warm_start(odd, tiny())
    assert start.left_out == ["cls_token", "pos_embed"]
    assert_equal(start.state_dict["patch_embed.proj.bias"], odd["patch_embed.proj.bias"])


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_what_wrappers_of_a_block_put_inside_names_is_taken_off(part: str) -> None:
    source = tiny("learnable", "LaPE").state_dict()
    wrapped = {re.sub(r"^(blocks\.\d+|join)\.", rf"\1.{part}.", name): value for name, value in source.items()}
    assert wrapped.keys() != source.keys()
    assert_equal(convert_checkpoint(wrapped), dict(source))


def test_what_torchs_own_wrappers_save_is_read() -> None:
    model = tiny()
    for wrapped in (torch.compile(model), AveragedModel(model), torch.compile(nn.DataParallel(model))):
        assert_equal(convert_checkpoint(wrapped.state_dict()), dict(model.state_dict()))


def test_what_is_new_and_what_is_left_out_is_said_in_a_line_each() -> None:
    start = warm_start(tiny("learnable").state_dict(), tiny("rope_mixed"))
    assert start.report() == [
        "new, at its initial values: blocks.*.attn.encoding.frequencies (2)",
        "left out of the checkpoint: pos_embed",
    ]


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

    @pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 7, 8])
    def test_the_convolution_is_adapted_to_the_channels_as_timm_does(
        self, channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        timms, ours = self.create(tmp_path, in_chans=channels)
        kernel = timms.patch_embed.proj.weight.detach()
        assert_equal(ours.patch_embed.proj.weight.detach(), adapt_input_conv(channels, kernel))
        assert "already match the model" not in caplog.text  # timm's, of weights that need no adaptation

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


@pytest.mark.parametrize("name", [DEIT, COMPACT, CCT])
@pytest.mark.parametrize(
    ("pe", "join_type"),
    [("learnable", "basic"), ("learnable", "LaPE"), ("2D_RPE", "LaPE"), ("learnable+2D_RPE", "basic")],
)
@pytest.mark.parametrize("cells", [(5, 7), (4, 16)])
def test_a_model_that_is_not_square_survives_saving_and_loading(
    name: str, pe: str, join_type: str, cells: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("timm").setLevel(logging.WARNING)
    patch = {DEIT: 16, COMPACT: 4, CCT: 2}[name]
    size = (cells[0] * patch, cells[1] * patch)
    model = disturb(timm.create_model(name, pe=pe, join_type=join_type, img_size=size, depth=2)).eval()
    timm.models.save_for_hf(model, tmp_path)
    pixels = images(1, *size).float()
    assert_equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(pixels), model(pixels))
    assert "taken for" not in caplog.text  # the folder says the size
    square = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=8 * patch).eval()
    assert "taken for" not in caplog.text
    overlay = {"file": str(tmp_path / "pytorch_model.bin"), "num_classes": model.num_classes}
    options = {"pe": pe, "join_type": join_type, "img_size": size, "depth": 2}
    by_file = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    assert_equal(by_file(pixels), model(pixels))
    model.set_input_size(img_size=(8 * patch, 8 * patch))
    pixels = images(1, 8 * patch, 8 * patch).float()
    assert_equal(square(pixels), model(pixels))


@pytest.mark.parametrize(("source", "target"), [(4, 8), (6, 3), (6, 1), (1, 3)])
def test_a_saved_model_of_any_channels_starts_one_of_any_other(source: int, target: int, tmp_path: Path) -> None:
    logging.getLogger("timm").setLevel(logging.ERROR)
    model = create(in_chans=source)
    timm.models.save_for_hf(model, tmp_path)
    kernel = model.patch_embed.proj.weight.detach()
    expected = adapt_input_conv(target, kernel, base_chans=source)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=target)
    assert_equal(loaded.patch_embed.proj.weight.detach(), expected)
    start = warm_start(model.state_dict(), create(in_chans=target))
    assert_equal(start.state_dict["patch_embed.proj.weight"], expected)
