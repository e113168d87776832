"""The command line that draws checkpoints: what it reads, which files it writes, and how bad input is refused."""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from matplotlib.image import imread
from PIL import ExifTags, Image
from torch import Tensor

import similarity_visualize
from figures.checkpoints import load_model
from lape_vit import convert_checkpoint, encodings
from lape_vit.analysis.diagnosis import diagnose
from lape_vit.analysis.positions import layer_positions, position_views
from lape_vit.analysis.timm_attention import timm_attention
from lape_vit.images import pixels_of
from lape_vit.joins import legal_pairs
from similarity_visualize import main, read_options
from tests.models import COMPACT, DEIT, DISTILLED, SIZES, create, disturb, leave_as_downloaded
from training.checkpoint import save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
PAIRS = [(pe, join_type) for pe, join_type in legal_pairs() if pe in encodings.ENCODINGS]
PAIRS += [("learnable+rope_mixed", "LaPE"), ("2D_sin+2D_RPE", "share"), ("2D_sin+peg", "LaPE")]


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model with two layers and three heads, and pictures of few pixels."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("img_size", "num_classes")}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **sizes))
    monkeypatch.setattr(similarity_visualize, "DPI", 30)


def save(path: Path, pe: str, join_type: str, name: str = DEIT, input_size: Any = 32, **kwargs: Any) -> Any:
    """A checkpoint of our format, and its model."""
    model = disturb(create(pe, join_type, name, img_size=input_size, **kwargs)).eval()
    description = {
        "model": name,
        "pe": model.pe,
        "join_type": model.join_type,
        "num_classes": 5,
        "input_size": input_size,
        **model.pe_options,
    }
    save_checkpoint(path, {"model": model.state_dict(), "description": description})
    return model


def parse(*argv: str) -> argparse.Namespace:
    return read_options(argv)


def run(folder: Path, *argv: str) -> int:
    return main(["--ckpt_path", str(folder / "checkpoint.pth"), "--save_dir", str(folder / "pictures"), *argv])


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "pictures").iterdir()}


# ---- files


def expected_names(pe: str, join_type: str, token: int) -> set[str]:
    """Names less their ending, for two layers and three heads; those that the original has are its own."""
    parts = encodings.resolve(pe)
    of_layer = []
    if parts.absolute is not None:
        of_layer += ["sim_overall", f"sim_{token}thToken"]
    by_encoding = {
        "relative": ["table", "head0", "head1", "head2", "bias_offsets"],
        "lookhere": ["factor", "factor_offsets"],
    }
    if parts.attention is not None:
        turns = "rotate" in parts.attention.overridden
        of_bias = by_encoding.get(parts.attention.name, ["head0", "head1", "head2", "bias_offsets"])
        of_layer += ["kernel", "frequencies"] if turns else of_bias
    if (pe, join_type) == ("2D_RPE", "LaPE"):
        of_layer += ["bias_normed", f"bias_normed_{token}thToken", "bias_normed_offsets"]
    found = {f"{join_type}_layer{layer}_{name}" for layer in range(2) for name in of_layer}
    found |= {f"{join_type}_layer0_response"} if parts.token is not None else set()
    return found | {"overview"} | ({"PE_token_sim"} if parts.absolute is not None else set())


@pytest.mark.parametrize(("pe", "join_type"), [pair for pair in PAIRS if encodings.resolve(pair[0]).name != "none"])
def test_every_encoding_gets_an_overview_pictures_under_the_originals_names_and_raw_values(
    pe: str, join_type: str, tmp_path: Path
) -> None:
    model = save(tmp_path / "checkpoint.pth", pe, join_type)
    assert run(tmp_path) == 0
    pictures = {f"{name}.png" for name in expected_names(pe, join_type, 2 * 4 + 2)}
    assert names(tmp_path) == pictures | {"positions.npz"}
    for name in pictures:
        pixels = imread(tmp_path / "pictures" / name)
        assert pixels.min() < pixels.max()
    with np.load(tmp_path / "pictures" / "positions.npz") as values:
        for view in position_views(model):
            np.testing.assert_array_equal(values[view.name], torch.stack(view.values).numpy())
        assert (values["grid"].tolist(), values["token"].tolist()) == ([4, 4], [2, 2])


def test_without_an_encoding_a_line_says_that_there_is_nothing_to_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoint.pth", "none", "basic")
    assert run(tmp_path) == 0
    _, line = capsys.readouterr().out.splitlines()  # the first says what is being read
    assert "nothing to draw" in line
    assert str(tmp_path / "checkpoint.pth") in line
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("name", [COMPACT, DISTILLED])
def test_any_grid_and_any_prefix_tokens(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "unshare", name, input_size=[24, 40])
    assert run(tmp_path, "--token", "2,4") == 0
    pictures = {f"{name}.png" for name in expected_names("learnable", "unshare", 2 * 5 + 4)}
    assert names(tmp_path) == pictures | {"positions.npz"}
    assert str(tmp_path / "pictures") in capsys.readouterr().out


def test_the_patch_of_the_original_gets_the_originals_name(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "LaPE", input_size=112)
    assert run(tmp_path, "--token", "6,6") == 0
    assert {"LaPE_layer0_sim_90thToken.png", "LaPE_layer1_sim_overall.png", "PE_token_sim.png"} <= names(tmp_path)


@pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_format_is_that_of_every_picture(ending: str, begin: bytes, tmp_path: Path) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "LaPE")
    assert run(tmp_path, "--format", ending) == 0
    pictures = [path for path in (tmp_path / "pictures").iterdir() if path.suffix != ".npz"]
    assert len(pictures) == 6
    for path in pictures:
        assert path.suffix == f".{ending}"
        assert path.read_bytes().startswith(begin)


def test_a_token_that_no_picture_shows_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoint.pth", "rope", "basic")
    assert run(tmp_path, "--token", "1,1") == 0
    assert "--token: what pe='rope' shows is alike for every patch" in capsys.readouterr().out


def test_comparing_writes_one_sheet_curves_and_their_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{number}.pth" for number in range(3)]
    save(paths[0], "learnable", "LaPE")
    save(paths[1], "learnable+2D_RPE", "basic", COMPACT, input_size=[24, 40])
    save(paths[2], "none", "basic")
    assert main(["--compare", *map(str, paths), "--save_dir", str(tmp_path / "pictures")]) == 0
    assert names(tmp_path) == {"compare_overview.png", "compare_curves.png", "compare.npz"}
    assert f"{paths[2]}: nothing to draw" in capsys.readouterr().out
    with np.load(tmp_path / "pictures" / "compare.npz") as values:
        assert values["checkpoints"].tolist() == list(map(str, paths))
        assert values["0/similarity/distances"].tolist() == [1, 2, 3, 4]
        assert values["0/similarity/by_distance"].shape == (2, 4)
        assert values["1/bias/correlations"].shape == (1,)


def test_layers_and_heads_are_chosen_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoint.pth", "2D_RPE", "basic")
    assert run(tmp_path, "--layers", "1", "--heads", "0,2", "--full") == 0
    single = {"basic_layer1_head0.png", "basic_layer1_head2.png", "basic_layer1_bias_offsets.png"}
    assert names(tmp_path) == {"overview.png", "positions.npz"} | single
    capsys.readouterr()
    assert run(tmp_path, "--layers", "1-2") == 2
    assert "--layers 2: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="--heads: expected whole numbers"):
        read_options(["--heads", "first"])


@pytest.mark.parametrize(("text", "expected"), [("3", (3,)), ("8-10,0,9", (0, 8, 9, 10))])
def test_layers_are_numbers_and_ranges(text: str, expected: tuple[int, ...]) -> None:
    assert read_options(["--layers", text]).layers == expected


def test_a_model_of_one_patch_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("many.pth", "one.pth")]
    for path, input_size in zip(paths, (32, 8), strict=True):
        save(Path(path), "learnable", "LaPE", input_size=input_size)
    assert main(["--compare", *paths, "--save_dir", str(tmp_path / "pictures")]) == 2
    assert f"--compare {paths[1]}: its model has one patch" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def photograph(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.parametrize(
    ("pe", "join_type", "splits"),
    [("learnable", "LaPE", True), ("learnable", "basic", False), ("none", "basic", False), ("lookhere", "basic", True)],
)
def test_attention_over_an_image_is_drawn_with_its_position_part_where_there_is_one(
    pe: str, join_type: str, splits: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoint.pth", pe, join_type, input_size=[32, 48])
    assert run(tmp_path, "--image", str(photograph(tmp_path / "image.png")), "--token", "1,5") == 0
    attention = {"attention.png", f"{join_type}_layer0_attention.png", f"{join_type}_layer1_attention.png"}
    assert attention <= names(tmp_path)
    with np.load(tmp_path / "pictures" / "attention.npz") as values:
        parts = {"position_logits", "content_logits"} if splits else set()
        assert set(values) == {"attention"} | parts
        assert values["attention"].shape == (2, 3, 4, 6)
        assert 0 < values["attention"].sum(axis=(2, 3)).max() < 1  # the class token has the rest
    assert ("attention is drawn without a position part" in capsys.readouterr().out) != splits


def test_an_image_is_prepared_as_the_checkpoint_says(tmp_path: Path) -> None:
    save(tmp_path / "plain.pth", "learnable", "LaPE")
    checkpoint = torch.load(tmp_path / "plain.pth")
    preparation = {"mean": [0.1] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "eval_crop_ratio": 1.0}
    checkpoint["description"] |= {"data_set": "CIFAR10", "crop_mode": "squash", **preparation}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    photograph(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)) / 255
    model, _ = load_model(str(tmp_path / "checkpoint.pth"), {})
    normalised = similarity_visualize.prepare(model, str(tmp_path / "image.png"))
    pixels = pixels_of(model, normalised)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    np.testing.assert_allclose(normalised.permute(1, 2, 0), (expected - 0.1) / 0.5, atol=1e-5)

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down
    with Image.open(tmp_path / "image.png") as image:
        image.rotate(180).save(tmp_path / "turned.png", exif=exif)
    upright = pixels_of(model, similarity_visualize.prepare(model, str(tmp_path / "turned.png")))
    np.testing.assert_allclose(upright, pixels, atol=1e-6)

    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = pixels_of(model, similarity_visualize.prepare(model, str(tmp_path / "deep.png")))
    np.testing.assert_allclose(grey[..., 0] * 255, deep >> 8, atol=1e-3)


def test_dashes_and_underscores_in_flags_mean_the_same() -> None:
    flags = {"ckpt-path": "c", "save-dir": "d", "model-name": "m", "join-type": "j", "input-size": "8"}
    with_dashes, with_underscores = (
        parse(*(text for flag, value in flags.items() for text in (f"--{flag.replace('-', sign)}", value)))
        for sign in "-_"
    )
    assert with_dashes == with_underscores


# ---- what is read


def read(folder: Path, *argv: str) -> Any:
    """The model that the command line draws."""
    path = str(folder / "checkpoint.pth")
    return load_model(path, vars(parse("--ckpt_path", path, "--save_dir", "unused", *argv)))[0]


def assert_same_positions(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(layer_positions(actual), layer_positions(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [COMPACT, DEIT, DISTILLED])
def test_a_checkpoint_says_what_it_holds(name: str, tmp_path: Path) -> None:
    model = save(tmp_path / "checkpoint.pth", "learnable", "LaPE", name, input_size=[24, 40])
    assert_same_positions(read(tmp_path), model)


@pytest.mark.parametrize(("input_size", "flag"), [((24, 40), "24,40"), ((32, 32), "32")])
def test_of_a_bare_state_dict_the_flags_say_it(input_size: tuple[int, int], flag: str, tmp_path: Path) -> None:
    model = disturb(create("learnable", "unshare", DISTILLED, img_size=input_size)).eval()
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    flags = ["--model_name", DISTILLED, "--pe", "learn", "--join-type", "unshare", "--input-size", flag]
    assert_same_positions(read(tmp_path, *flags), model)


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and state dict of an original's model."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        state = {key.removeprefix("state/"): torch.from_numpy(arrays[key]) for key in arrays if "state/" in key}
    return json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))[name], state


@pytest.mark.parametrize(
    "name", ["lape-learnable-LaPE", "lape-learnable-unshare", "lape-2D_sin-share", "lape-2D_RPE-LaPE"]
)
def test_an_original_says_what_it_holds_in_its_namespace(name: str, tmp_path: Path) -> None:
    entry, state_dict = golden(name)
    args = {"model": DEIT, "pe": entry["pe"], "join_type": entry["join_type"], "input_size": entry["img_size"]}
    torch.save({"model": state_dict, "args": argparse.Namespace(**args)}, tmp_path / "checkpoint.pth")
    model = read(tmp_path)
    assert (model.pe, model.join_type) == (entry["pe"], entry["join_type"])
    for key, value in convert_checkpoint(state_dict).items():
        assert torch.equal(model.state_dict()[key], value.float())


def test_the_compact_original_is_a_bare_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, state_dict = golden("vit2d-learn")
    sizes = {"embed_dim": entry["embed_dim"], "num_heads": entry["n_attention_heads"]}
    sizes |= {"patch_size": entry["patch_size"], "mlp_ratio": entry["forward_mul"], "depth": entry["n_layers"]}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **sizes))
    torch.save(state_dict, tmp_path / "checkpoint.pth")
    flags = ["--model_name", COMPACT, "--pe", "learn", "--join-type", "basic"]
    model = read(tmp_path, *flags, "--input-size", str(entry["image_size"]))
    assert torch.equal(model.pos_embed, state_dict["embedding.pos_embedding"].float())


def test_the_readme_command_of_the_original_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("result/deit_t_LaPE").mkdir(parents=True)
    model = disturb(create("learnable", "LaPE", img_size=224, patch_size=8))
    torch.save({"model": model.state_dict()}, "result/deit_t_LaPE/best_checkpoint.pth")
    command = (
        "--ckpt_path result/deit_t_LaPE/best_checkpoint.pth --save_dir visualize/similarity --model_name deit_t_LaPE "
        "--pe learnable --join-type LaPE"
    )
    assert main(command.split()) == 0
    assert Path("visualize/similarity/LaPE_layer1_sim_overall.png").is_file()


@pytest.mark.parametrize(("letter", "size"), [("t", "tiny"), ("s", "small"), ("b", "base")])
@pytest.mark.parametrize(("distill", "distilled"), [("", ""), ("_distill", "_distilled")])
@pytest.mark.parametrize("join_type", ["basic", "LaPE"])
def test_a_short_name_says_model_and_join(
    letter: str, size: str, distill: str, distilled: str, join_type: str, tmp_path: Path
) -> None:
    name = f"deit_{size}{distilled}_patch16_224"
    model = disturb(create("learnable", join_type, name)).eval()
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    found = read(tmp_path, "--model_name", f"deit_{letter}{distill}_{join_type}", "--input-size", "32")
    assert found.join_type == join_type
    assert_same_positions(found, model)


def test_a_join_goes_before_that_of_a_short_name() -> None:
    args = parse("--ckpt_path", "c", "--save_dir", "d", "--model_name", "deit_t_basic", "--join-type", "share")
    assert (args.model, args.join_type) == (DEIT, "share")


def test_a_bare_state_dict_is_of_what_timm_builds_by_the_name_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = disturb(create()).eval()
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    assert run(tmp_path, "--model_name", DEIT, "--input-size", "32") == 0
    assert "join_type=basic, pe=learnable, as timm builds it" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["pth", "safetensors", "tar"])
def test_any_model_of_timm_with_a_table_is_drawn(ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "vit_small_patch16_224"
    model = disturb(timm.create_model(name, num_classes=7, img_size=(32, 48)))
    path = tmp_path / f"checkpoint.{ending}"
    if ending == "safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:  # tar: of timm's own training
        whole = {"state_dict": model.state_dict(), "args": argparse.Namespace(model=name), "epoch": 3}
        whole["args"].input_size = [3, 32, 48]
        torch.save(whole if ending == "tar" else model.state_dict(), path)
    flags = ["--input-size", "32,48", "--model_name", name] if ending != "tar" else []
    assert main(["--ckpt_path", str(path), "--save_dir", str(tmp_path / "pictures"), *flags]) == 0
    pictures = {f"{name}.png" for name in expected_names("learnable", "basic", 2 * 6 + 3)}
    assert names(tmp_path) == pictures | {"positions.npz"}


@pytest.mark.parametrize(
    ("name", "heading", "views", "class_token"),
    [
        ("vit_relpos_small_patch16_224", "pe=bias of timm's RelPosMlp", {"bias_offsets"}, False),
        ("beit_base_patch16_224", "pe=bias of timm's Attention", {"bias_offsets"}, True),
        ("eva02_tiny_patch14_224", "pe=learnable + timm's RotaryEmbeddingCat", {"similarity", "kernel"}, True),
        ("vit_small_patch16_dinov3", "pe=rope_dinov3", {"kernel"}, True),
        ("vit_base_patch16_rpn_224", "pe=learnable", {"similarity"}, False),
    ],
)
def test_models_of_timm_show_all_their_positions_and_attention_over_an_image(
    name: str, heading: str, views: set[str], class_token: bool, tmp_path: Path
) -> None:
    model = disturb(timm.create_model(name, num_classes=7, img_size=(32, 48)))
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    flags = ["--model_name", name, "--input-size", "32,48", "--html", "--format", "svg"]
    assert run(tmp_path, *flags, "--image", str(photograph(tmp_path / "image.png")), "--token", "1,5") == 0
    folder = tmp_path / "pictures"
    with np.load(folder / "positions.npz") as values:
        assert views <= set(values) <= views | {"encoding", "frequencies", "grid", "token"}
        for view in views:
            assert len(values[view]) == 2
    with np.load(folder / "attention.npz") as values:
        assert values["attention"].shape == (2, 3, 4, 6)
        sums = values["attention"].sum(axis=(2, 3))
        assert np.all(sums < 1) if class_token else np.allclose(sums, 1, atol=1e-5)
    page = (folder / "explore.html").read_text(encoding="utf-8")
    assert heading in page
    assert '"title":"attention weights over the image"' in page
    assert {"overview.svg", "attention.svg", "basic_layer1_attention.svg"} <= names(tmp_path)


def test_windows_of_several_stages_are_drawn_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, sizes = "swin_tiny_patch4_window7_224", {"depths": (2, 1), "num_heads": (2, 3), "window_size": 4}
    sizes |= {"img_size": (64, 96), "embed_dim": 12}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model.func, **sizes))  # type: ignore[attr-defined]
    torch.save(disturb(timm.create_model(name)).state_dict(), tmp_path / "checkpoint.pth")
    flags = ["--model_name", name, "--image", str(photograph(tmp_path / "image.png")), "--token", "9,20", "--html"]
    assert run(tmp_path, *flags) == 0
    parts = {f"basic_layer{layer}_bias_offsets_part{layer // 2}.png" for layer in range(3)}
    assert parts | {f"basic_layer{layer}_attention.png" for layer in range(3)} <= names(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{name} is timm's own" in said
    assert "attention over the image is not on the page, for it is not from every patch to every patch" in said
    assert '"attention"' not in (tmp_path / "pictures" / "explore.html").read_text(encoding="utf-8")
    with np.load(tmp_path / "pictures" / "attention.npz") as values:
        first, second = values["attention_part0"], values["attention_part1"]
    assert (first.shape, second.shape) == ((2, 2, 16, 24), (1, 3, 8, 12))
    assert np.argwhere(np.isfinite(first[0, 0])).tolist() == [[y, x] for y in range(8, 12) for x in range(20, 24)]
    assert np.allclose(np.nansum(second, axis=(2, 3)), 1)
    path = str(tmp_path / "checkpoint.pth")
    assert main(["--compare", path, path, "--model_name", name, "--save_dir", str(tmp_path / "compared")]) == 0
    with np.load(tmp_path / "compared" / "compare.npz") as values:
        assert values["1/bias_offsets_part0/distances"].tolist() == [1, 2, 3, 4]


# ---- published weights


DINOV3 = "vit_small_patch16_dinov3"


@pytest.mark.parametrize(
    "flags",
    [
        ["--model_name", DINOV3, "--pretrained"],
        ["--pretrained", "lvd1689m", "--model_name", DINOV3],
        ["--model_name", f"{DINOV3}.lvd1689m", "--pretrained"],
    ],
)
def test_published_weights_are_drawn_in_one_command(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = disturb(timm.create_model(DINOV3, num_classes=0)).eval()
    leave_as_downloaded(f"{DINOV3}.lvd1689m", published.state_dict(), tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    image = photograph(tmp_path / "image.png")
    assert main([*flags, "--image", str(image), "--html"]) == 0
    pictures = tmp_path / "visualize" / "similarity"
    assert {"overview.png", "basic_layer1_kernel.png", "attention.png"} <= {path.name for path in pictures.iterdir()}
    assert f"{DINOV3}.lvd1689m" in (pictures / "explore.html").read_text(encoding="utf-8")
    pixels = timm.data.create_transform(**timm.data.resolve_data_config(model=published))(Image.open(image))
    with np.load(pictures / "attention.npz") as values:
        token, grid = (16, 16), (32, 32)
        (expected, *_) = timm_attention(published, pixels[None], ((token[0] + 0.5) / 32, (token[1] + 0.5) / 32))
        assert values["attention"].shape == (2, 3, *grid)
        np.testing.assert_allclose(values["attention"][0], expected.weights, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--pretrained needs --model NAME"),
        (["--model_name", "no_such"], "unknown --model 'no_such'"),
        (["--model_name", COMPACT], f"--pretrained {COMPACT}: timm publishes no such weights"),
        (["--model_name", "vit_small_patch16_224.no_such"], "its tags of vit_small_patch16_224: augreg_in1k"),
        (["--model_name", f"{DINOV3}.lvd1689m", "--pretrained", "other"], "--pretrained other contradicts"),
        (["--model_name", "samvit_base_patch16"], "VisionTransformerSAM has no table pos_embed"),
        (["--model_name", "convit_tiny", "--pe", "rope"], "--pe: for models of models_lape"),
        (["--model_name", DINOV3], f"--pretrained {DINOV3}: the weights of timm's cannot be loaded"),
        (["--ckpt_path", "c.pth"], "not allowed with"),
    ],
)
def test_weights_that_are_not_published_are_refused_in_one_line(
    flags: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_as_downloaded("nothing", {}, tmp_path / "hub", monkeypatch)
    assert main(["--pretrained", *flags, "--save_dir", str(tmp_path / "pictures")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert expected in line
    assert not (tmp_path / "pictures").exists()


def test_an_encodings_options_are_read_from_the_checkpoint_or_else_the_flags(tmp_path: Path) -> None:
    model = save(tmp_path / "checkpoint.pth", "relative", "basic", max_relative_distance=3)
    assert read(tmp_path).pe_options == {"max_relative_distance": 3}
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    flags = ["--model_name", DEIT, "--pe", "relative", "--max-relative-distance", "3", "--input-size", "32"]
    assert read(tmp_path, *flags).pe_options == {"max_relative_distance": 3}


# ---- bad input


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that refuses the command line; nothing else happens but that a file is read."""
    assert run(folder, *argv) == 2
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if not line.startswith("reading ")] == []
    (line,) = captured.err.splitlines()
    assert line.startswith("similarity_visualize.py: error: ")
    assert not (folder / "pictures").exists()
    return line


@pytest.mark.parametrize(
    ("flags", "given", "held"),
    [
        (["--pe", "2D_sin"], "--pe 2D_sin", "learnable"),
        (["--join_type", "share"], "--join-type share", "LaPE"),
        (["--model-name", DISTILLED], f"--model {DISTILLED}", DEIT),
        (["--input-size", "32,40"], "--input-size (32, 40)", "(32, 32)"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(
    flags: list[str], given: str, held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "LaPE")
    line = refusal(tmp_path, capsys, *flags)
    assert line.endswith(f"{given} contradicts {tmp_path / 'checkpoint.pth'}, which has {held}")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("4,0", "grid of 4 x 6"),
        ("0,6", "grid of 4 x 6"),
        ("5", "two whole numbers such as 3,5, got '5'"),
        ("1,x", "two whole numbers such as 3,5, got '1,x'"),
    ],
)
def test_a_token_that_is_no_patch_is_refused(
    token: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "basic", input_size=[32, 48])
    assert expected in refusal(tmp_path, capsys, "--token", token)


def test_a_bare_state_dict_without_a_models_name_is_refused_with_the_flag_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(create("learnable", "LaPE").state_dict(), tmp_path / "checkpoint.pth")
    line = refusal(tmp_path, capsys, "--pe", "learnable")
    assert str(tmp_path / "checkpoint.pth") in line
    assert line.endswith("give --model")


ALL_FLAGS = {"--model_name": DEIT, "--pe": "learnable", "--join-type": "LaPE", "--input-size": "32"}


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--model_name", "deit_x_LaPE", "unknown --model 'deit_x_LaPE'"),
        ("--model_name", "convit_tiny", "--pe, --join-type: for models of models_lape"),
        ("--pe", "learned", "unknown encoding pe='learned'"),
        ("--join-type", "lape", "unknown join_type='lape'"),
        ("--join-type", "basic", "does not fit"),
        ("--input-size", "40", "does not fit"),
        ("--input-size", "x", "argument --input-size"),
        ("--format", "jpg", "argument --format"),
        ("--max-relative-distance", "3", "pe='learnable' takes no option 'max_relative_distance'"),
        ("--image", "missing.png", "missing.png"),
        ("--colour", "red", "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_flag_for_a_bare_state_dict_is_refused(
    flag: str, value: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(create("learnable", "LaPE").state_dict(), tmp_path / "checkpoint.pth")
    flags = [text for pair in ({**ALL_FLAGS, flag: value}).items() for text in pair]
    assert expected in refusal(tmp_path, capsys, *flags)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", "half"])
def test_a_file_that_is_no_whole_checkpoint_is_refused(
    content: bytes | str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pth"
    if content == "half":
        save(path, "learnable", "LaPE")
        content = path.read_bytes()[: path.stat().st_size // 2]
    if isinstance(content, bytes):
        path.write_bytes(content)
    assert str(path) in refusal(tmp_path, capsys)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_dict = create("learnable", "LaPE").state_dict()
    state_dict["join.norms.1.weight"][3] = float("nan")
    torch.save(state_dict, tmp_path / "checkpoint.pth")
    assert "NaN" in refusal(tmp_path, capsys, *[text for pair in ALL_FLAGS.items() for text in pair])


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "LaPE")
    (tmp_path / "pictures").write_text("mine")
    assert run(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "pictures") in line
    assert (tmp_path / "pictures").read_text() == "mine"


def test_a_model_of_timm_without_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"fc.weight": torch.zeros(5, 5)}, tmp_path / "checkpoint.pth")
    assert "resnet" in refusal(tmp_path, capsys, "--model_name", "resnet18").lower()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compare", "a.pth"], "--compare takes two"),
        (["--compare", "a.pth", "b.pth", "--image", "i.png"], "--image draws one checkpoint"),
        (["--compare", "a.pth", "b.pth", "--ckpt_path", "c.pth"], "not allowed with"),
        (["--compare", "a.pth", "b.pth"], "no checkpoint file a.pth"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--save_dir", str(tmp_path / "pictures")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (tmp_path / "pictures").exists()


def test_without_its_two_paths_it_takes_those_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "no checkpoint file result/deit_t_LaPE/best_checkpoint.pth" in capsys.readouterr().err
    (tmp_path / "result" / "deit_t_LaPE").mkdir(parents=True)
    save(tmp_path / "result" / "deit_t_LaPE" / "best_checkpoint.pth", "learnable", "LaPE")
    assert main([]) == 0
    assert (tmp_path / "visualize" / "similarity" / "PE_token_sim.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--diagnosis", "FILE"), ["--diagnosis", "--html", "give both"]),
        (("--html", "--diagnosis", "missing.json"), ["missing.json"]),
        (("--html", "--diagnosis", "FILE"), ["--diagnosis", "other checkpoints", "elsewhere.pth"]),
    ],
)
def test_a_diagnosis_of_nothing_that_is_shown_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: list[str]
) -> None:
    model = save(tmp_path / "a.pth", "learnable", "LaPE")
    batch = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    record = replace(diagnose(model, [(batch, None)], [(batch, None)]), about={"checkpoint": "elsewhere.pth"})
    (tmp_path / "diagnosis.json").write_text(json.dumps([record.as_dict()]))
    named = [str(tmp_path / "diagnosis.json") if flag == "FILE" else flag for flag in flags]
    assert main(["--ckpt_path", str(tmp_path / "a.pth"), *named, "--save_dir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line
