"""The pictures of a checkpoint: what they show, which files they go to, and how bad input is refused."""

import argparse
import json
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from torch import Tensor

import similarity_visualize
from lape_vit import convert_checkpoint, encodings
from lape_vit.joins import legal_joins, legal_pairs
from lape_vit.similarity import cosine_similarity, layer_positions
from similarity_visualize import Similarities, draw_layer_map, draw_layer_matrix, draw_overview, main
from tests.models import COMPACT, DEIT, DISTILLED, SIZES, create, disturb
from training.checkpoint import save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
PAIRS = [
    (pe, join_type)
    for pe, join_type in legal_pairs()
    if encodings.resolve(pe).absolute is not None and encodings.resolve(pe).attention is None
]
FILES = {"layer_00_matrix.png", "layer_01_matrix.png", "overview.png"}
"""Of a model with two layers, but for the maps, whose names say the patch."""


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered models with two layers, and pictures of few pixels."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("img_size", "num_classes")}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **sizes))
    monkeypatch.setattr(similarity_visualize, "DPI", 40)


def save(path: Path, pe: str, join_type: str, name: str = DEIT, input_size: Any = 32) -> Any:
    """A checkpoint of our format, and its model."""
    model = disturb(create(pe, join_type, name, img_size=input_size)).eval()
    description = {
        "model": name,
        "pe": model.pe,
        "join_type": model.join_type,
        "num_classes": 5,
        "input_size": input_size,
    }
    save_checkpoint(path, {"model": model.state_dict(), "description": description})
    return model


def parse(*argv: str) -> argparse.Namespace:
    return similarity_visualize.build_parser().parse_args(argv)


def run(folder: Path, *argv: str) -> int:
    return main(["--ckpt_path", str(folder / "checkpoint.pth"), "--save_dir", str(folder / "pictures"), *argv])


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "pictures").iterdir()}


# ---- files


@pytest.mark.parametrize(("pe", "join_type"), PAIRS)
def test_every_layer_gets_two_pictures_and_all_of_them_an_overview(pe: str, join_type: str, tmp_path: Path) -> None:
    save(tmp_path / "checkpoint.pth", pe, join_type)
    assert run(tmp_path) == 0
    assert names(tmp_path) == FILES | {"layer_00_token_2_2.png", "layer_01_token_2_2.png"}
    for name in names(tmp_path):
        pixels = imread(tmp_path / "pictures" / name)
        assert pixels.min() < pixels.max()


@pytest.mark.parametrize("name", [COMPACT, DISTILLED])
def test_any_grid_and_any_prefix_tokens(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "unshare", name, input_size=[24, 40])
    assert run(tmp_path, "--token", "2,4") == 0
    assert names(tmp_path) == FILES | {"layer_00_token_2_4.png", "layer_01_token_2_4.png"}
    assert str(tmp_path / "pictures") in capsys.readouterr().out


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
    args = parse("--ckpt_path", str(folder / "checkpoint.pth"), "--save_dir", "unused", *argv)
    return similarity_visualize.load_model(args)[0]


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


@pytest.mark.parametrize("name", ["lape-learnable-LaPE", "lape-learnable-unshare", "lape-2D_sin-share"])
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


# ---- what is shown


def similarities(grid: tuple[int, int], depth: int, token: tuple[int, int] = (1, 2)) -> Similarities:
    """Of random positions, under names as long as they come."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(depth, grid[0] * grid[1], 8, generator=generator)
    matrices = [cosine_similarity(layer) for layer in rows]
    maps = [matrix[token[0] * grid[1] + token[1]].reshape(grid) for matrix in matrices]
    return Similarities("deit_base_distilled_patch16_384", "learnable", "LaPE_share", grid, token, matrices, maps)


def panels(figure: Figure) -> list[Axes]:
    """All but the colour bar."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_the_overview_shows_every_matrix_and_every_map_on_one_scale() -> None:
    shown = similarities((3, 5), depth=8)
    figure = draw_overview(shown)
    images = [axes.images[0] for axes in panels(figure)]
    expected = [tensor for pair in zip(shown.matrices, shown.maps, strict=True) for tensor in pair]
    for image, tensor in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image.get_array(), tensor)
        assert image.get_clim() == (-1, 1)
    assert len(figure.axes) == len(images) + 1
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles[::2] == [f"layer {layer}, LaPE_share" for layer in range(8)]
    heading = figure.get_suptitle()
    for part in (shown.model, "learnable", "LaPE_share", "3 x 5", "row 1, column 2"):
        assert part in heading


@pytest.mark.parametrize("draw", [draw_layer_matrix, draw_layer_map])
def test_a_layers_picture_shows_that_layer_on_the_same_scale(draw: Any) -> None:
    shown = similarities((3, 5), depth=2)
    figure = draw(shown, 1)
    (axes,) = panels(figure)
    assert axes.images[0].get_clim() == (-1, 1)
    assert axes.get_title().startswith("layer 1, LaPE_share")
    np.testing.assert_array_equal(
        axes.images[0].get_array(), shown.maps[1] if draw is draw_layer_map else shown.matrices[1]
    )


def test_the_chosen_patch_is_marked_on_its_map() -> None:
    (axes,) = panels(draw_layer_map(similarities((3, 5), depth=1, token=(2, 4)), 0))
    (mark,) = axes.lines
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([4], [2])
    assert "row 2, column 4" in axes.get_title()


@pytest.mark.parametrize(("grid", "depth"), [((4, 4), 6), ((14, 14), 12), ((10, 14), 7), ((3, 24), 1), ((24, 3), 3)])
def test_no_text_covers_another_or_leaves_the_page(grid: tuple[int, int], depth: int) -> None:
    shown = similarities(grid, depth)
    for figure in (draw_overview(shown), draw_layer_map(shown, 0), draw_layer_matrix(shown, 0)):
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        boxes = [text.get_window_extent() for text in texts]
        page = figure.bbox.padded(1)
        for text, box in zip(texts, boxes, strict=True):
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, text
        for (one, box), (other, other_box) in combinations(zip(texts, boxes, strict=True), 2):
            assert not box.overlaps(other_box), (one, other)


# ---- bad input


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that refuses the command line; nothing else happens."""
    assert run(folder, *argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("similarity_visualize.py: error: ")
    assert not (folder / "pictures").exists()
    return line


@pytest.mark.parametrize(
    ("flags", "given", "held"),
    [
        (["--pe", "2D_sin"], "--pe 2D_sin", "learnable"),
        (["--join_type", "share"], "--join-type share", "LaPE"),
        (["--model-name", DISTILLED], f"--model_name {DISTILLED}", DEIT),
        (["--input-size", "32,40"], "--input-size (32, 40)", "(32, 32)"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(
    flags: list[str], given: str, held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoint.pth", "learnable", "LaPE")
    line = refusal(tmp_path, capsys, *flags)
    assert line.endswith(f"{given} contradicts {tmp_path / 'checkpoint.pth'}, which has {held}")


@pytest.mark.parametrize("pe", [pe for pe in encodings.names() if encodings.resolve(pe).absolute is None])
def test_without_an_absolute_encoding_there_is_nothing_to_draw(
    pe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoint.pth", pe, legal_joins(pe)[0])
    line = refusal(tmp_path, capsys)
    assert repr(pe) in line
    assert "nothing to draw" in line


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


def test_a_bare_state_dict_without_flags_is_refused_with_the_flags_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(create("learnable", "LaPE").state_dict(), tmp_path / "checkpoint.pth")
    line = refusal(tmp_path, capsys, "--pe", "learnable")
    assert str(tmp_path / "checkpoint.pth") in line
    assert line.endswith("give --model_name, --join-type")


ALL_FLAGS = {"--model_name": DEIT, "--pe": "learnable", "--join-type": "LaPE", "--input-size": "32"}


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--model_name", "resnet18", "unknown --model_name 'resnet18'"),
        ("--pe", "learned", "unknown encoding pe='learned'"),
        ("--join-type", "lape", "unknown join_type='lape'"),
        ("--join-type", "basic", "does not fit"),
        ("--input-size", "40", "does not fit"),
        ("--input-size", "x", "argument --input-size"),
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


@pytest.mark.parametrize("missing", ["--ckpt_path", "--save_dir"])
def test_a_required_flag_is_asked_for(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"--ckpt_path": "c.pth", "--save_dir": str(tmp_path / "pictures")}
    del flags[missing]
    assert main([text for pair in flags.items() for text in pair]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert missing in line
    assert not (tmp_path / "pictures").exists()
