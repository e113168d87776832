"""WHERE: the label says where the marks are, and the contents of the cells say nothing about the label."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_datasets import assert_one_line, build_dataset, make_args, seed_all
from test_recipes import PARSER, resolve

import models_lape  # noqa: F401  registers the models
from datasets import DATA_SETS
from loading.where import COLOURS, NUM_TEST, NUM_TRAIN, TASKS, Where
from training.options import Options
from training.setup import pick_recipe


def open_split(task: str, is_train: bool = False, size: Any = 32, cell: int | None = None) -> Where:
    args = make_args(data_set="WHERE", where_task=task, where_cell=cell, input_size=size)
    images = build_dataset(is_train, args)[0].pictures
    assert isinstance(images, Where)
    return images


def cells_of(pixels: np.ndarray, cell: int) -> np.ndarray:
    """An image (height, width, 3) as cells (H, W, cell, cell, 3), cut by slices."""
    height, width = pixels.shape[0] // cell, pixels.shape[1] // cell
    rows = [[pixels[cell * y : cell * (y + 1), cell * x : cell * (x + 1)] for x in range(width)] for y in range(height)]
    return np.array(rows)


def marks_of(image: Image.Image, cell: int = 4) -> dict[str, list[tuple[int, int]]]:
    """(row, column) of all cells of each colour."""
    cells = cells_of(np.asarray(image), cell)
    return {
        name: [(int(y), int(x)) for y, x in np.argwhere((cells == colour).all(axis=(2, 3, 4)))]
        for name, colour in COLOURS.items()
    }


def name_of_cell(marks: dict[str, list[tuple[int, int]]], shape: tuple[int, int]) -> str:
    ((row, column),) = marks["red"]
    return f"row {row + 1} column {column + 1}"


def name_of_direction(marks: dict[str, list[tuple[int, int]]], shape: tuple[int, int]) -> str:
    (red,), (green,) = marks["red"], marks["green"]
    down, right = green[0] - red[0], green[1] - red[1]
    steep, flat = abs(down) > abs(right) / (2**0.5 - 1), abs(down) < abs(right) * (2**0.5 - 1)
    if flat:
        return "right" if right > 0 else "left"
    if steep:
        return "below" if down > 0 else "above"
    return ("lower" if down > 0 else "upper") + (" right" if right > 0 else " left")


def name_of_order(marks: dict[str, list[tuple[int, int]]], shape: tuple[int, int]) -> str:
    assert [len(places) for places in marks.values()] == [1, 1, 1]
    return " ".join(sorted(marks, key=lambda name: marks[name][0]))


def name_of_distance(marks: dict[str, list[tuple[int, int]]], shape: tuple[int, int]) -> str:
    (y, x), (v, u) = marks["red"]
    part = np.hypot(y - v, x - u) / np.hypot(shape[0] - 1, shape[1] - 1)
    assert not np.isclose(4 * part % 1, 0) or part == 1  # no distance of these grids is on a border
    return ["up to 1/4", "1/4 to 2/4", "2/4 to 3/4", "above 3/4"][int(np.ceil(4 * part)) - 1]


NAMES = {"cell": name_of_cell, "direction": name_of_direction, "order": name_of_order, "distance": name_of_distance}


@pytest.mark.parametrize(("size", "cell"), [((32, 32), None), ((24, 40), None), ((48, 32), 8)])
@pytest.mark.parametrize("task", TASKS)
def test_the_class_says_where_the_marks_are(task: str, size: tuple[int, int], cell: int | None) -> None:
    images = open_split(task, size=size, cell=cell)
    side = cell or 4
    for index in range(0, len(images), 3):
        image, label = images[index]
        assert image.size == size[::-1]
        assert images.classes[label] == NAMES[task](marks_of(image, side), (size[0] // side, size[1] // side))


@pytest.mark.parametrize("task", TASKS)
def test_the_cells_of_an_image_are_the_same_whatever_its_label(task: str) -> None:
    images = open_split(task)
    for index in range(5):
        drawn = [images.draw(index, label) for label in range(len(images.classes))]
        contents = [sorted(cell.tobytes() for row in cells_of(image, 4) for cell in row) for image in drawn]
        assert all(content == contents[0] for content in contents)
        assert len({image.tobytes() for image in drawn}) == len(drawn)


@pytest.mark.parametrize(("pe", "sees_the_label"), [("none", False), ("learnable", True), ("rope_axial", True)])
@pytest.mark.parametrize("task", TASKS)
def test_a_model_without_positions_gives_all_labels_the_same_logits(task: str, pe: str, sees_the_label: bool) -> None:
    """So it cannot beat chance, however it is trained."""
    images = open_split(task)
    torch.manual_seed(0)
    model = timm.create_model("vit_compact_patch4_32", pe=pe, join_type="basic", num_classes=len(images.classes))
    with torch.no_grad():
        for parameter in model.parameters():  # weights of a size at which positions matter
            parameter.add_(0.2 * torch.randn_like(parameter))
        drawn = np.stack([images.draw(0, label) for label in range(4)])
        logits = model.double().eval()(torch.tensor(drawn).permute(0, 3, 1, 2).double() / 255)
    differences = (logits - logits[0]).abs().max(dim=1).values[1:]
    assert (differences > 1e-4).all() if sees_the_label else (differences < 1e-9).all()


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_every_class_has_as_many_images_as_any_other(task: str, is_train: bool) -> None:
    images = open_split(task, is_train)
    assert len(images) == (NUM_TRAIN if is_train else NUM_TEST)
    assert {*np.bincount(images.targets)} == {len(images) // len(images.classes)}
    counts = np.bincount(open_split("cell", is_train, size=20).targets)  # 25 classes, which divide neither number
    assert counts.max() - counts.min() == 1


@pytest.mark.parametrize(("task", "side"), [("cell", 3), ("direction", 4), ("order", 3), ("distance", 4)])
def test_all_places_that_have_a_label_are_drawn_and_no_others(task: str, side: int) -> None:
    images = open_split(task, size=4 * side)
    expected: dict[str, set[tuple[int, ...]]] = {name: set() for name in images.classes}
    for places in permutations(range(side**2), len(images.marks)):
        marks: dict[str, list[tuple[int, int]]] = {name: [] for name in COLOURS}
        for colour, place in zip(images.task.marks, places, strict=True):
            marks[colour].append(divmod(place, side))
        expected[NAMES[task](marks, (side, side))].add(places)
    random = np.random.default_rng(0)
    for label, name in enumerate(images.classes):
        assert {tuple(images.task.draw_places(label, random).tolist()) for _ in range(2000)} == expected[name]


def test_training_and_test_images_share_no_cell_of_noise() -> None:
    noise = []
    for is_train in (True, False):
        images = open_split("cell", is_train)
        cells = np.stack([cells_of(np.asarray(images[index][0]), 4) for index in range(200)]).reshape(200 * 64, -1)
        noise.append({cell.tobytes() for cell in cells} - {np.full((4, 4, 3), COLOURS["red"], np.uint8).tobytes()})
        assert len(noise[-1]) == 200 * 63
    assert not noise[0] & noise[1]


@pytest.mark.parametrize("is_train", [True, False])
def test_an_image_depends_on_no_random_state_and_no_seed(is_train: bool) -> None:
    found = []
    for seed in (1, 2):
        seed_all(seed)
        images = build_dataset(is_train, make_args(data_set="WHERE", input_size=32, seed=seed))[0]
        found.append([images[index] for index in (7, 3, 7)])
    for (image, label), (other, same) in zip(*found, strict=True):
        assert torch.equal(image, other)
        assert label == same
    assert torch.equal(found[0][0][0], found[0][2][0])
    assert not torch.equal(found[0][0][0], found[0][1][0])


def test_mean_and_std_are_those_of_the_training_images() -> None:
    images = open_split("cell", is_train=True, size=16)
    pixels = np.stack([np.asarray(images[index][0]) for index in range(len(images))]) / 255
    assert DATA_SETS["WHERE"].mean == pytest.approx(pixels.mean(axis=(0, 1, 2)), abs=1e-4)
    assert DATA_SETS["WHERE"].std == pytest.approx(pixels.std(axis=(0, 1, 2)), abs=1e-4)


def test_the_task_is_cell_unless_another_is_asked_for() -> None:
    assert [build_dataset(False, make_args(data_set="WHERE", where_task=task))[1] for task in (None, "cell")] == [
        [f"row {row} column {column}" for row in range(1, 5) for column in range(1, 5)]
    ] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"where_task": "colour"}, ["--where-task 'colour'", *TASKS]),
        ({"data_path": "x"}, ["--data-path x", "WHERE"]),
        ({"input_size": 30}, ["--input-size 30,30", "--where-cell", "4"]),
        ({"input_size": (32, 30)}, ["--input-size 32,30"]),
        ({"where_cell": 12}, ["--input-size 16,16", "12"]),
        ({"where_cell": 16}, ["1 x 1 cells", "--where-task cell"]),
        ({"where_task": "distance", "where_cell": 8}, ["2 x 2 cells", "--where-task distance"]),
        ({"where_task": "direction", "input_size": (4, 32)}, ["1 x 8 cells", "--where-task direction"]),
        ({"where_task": "order", "input_size": (4, 8)}, ["1 x 2 cells", "--where-task order"]),
    ],
)
def test_what_has_no_images_is_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--\w+") as error:
        build_dataset(False, make_args(data_set="WHERE", **changes))
    assert_one_line(error, *words)


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--train-crop pad", {"train_crop": "pad"}),
        ("--src", {"src": True}),
        ("--hflip 0.5", {"hflip": 0.5}),
        ("--aa rand-m9", {"aa": "rand-m9"}),
        ("--three-augment", {"three_augment": True}),
        ("--reprob 0.25", {"reprob": 0.25}),
        ("--cutmix 1.0", {"cutmix": 1.0}),
        ("--cutmix-minmax", {"cutmix_minmax": (0.2, 0.8)}),
    ],
)
def test_training_refuses_what_moves_or_covers_cells(flag: str, changes: dict[str, Any]) -> None:
    args = make_args(data_set="WHERE", **changes)
    with pytest.raises(ValueError, match=flag) as error:
        build_dataset(True, args)
    assert_one_line(error, "WHERE", "--recipe where")
    build_dataset(False, args)


@pytest.mark.parametrize("option", [{"where_task": "cell"}, {"where_cell": 4}])
def test_its_options_mean_nothing_to_other_data_sets(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value} means nothing to DIGITS"):
        build_dataset(False, make_args(**option))


def test_a_checkpoint_of_where_keeps_its_task_for_evaluation_and_for_no_other_data_set() -> None:
    saved = resolve("main.py --data-set WHERE --where-task order --where-cell 8")
    for call, expected in (
        ({"eval": True}, ("order", 8)),
        ({}, ("order", 8)),
        ({"eval": True, "data_set": "DIGITS"}, (None, None)),
    ):
        options = pick_recipe(PARSER, {"resume": "file.pth", **call}, {"config": saved})
        assert (options["where_task"], options["where_cell"]) == expected


def test_the_recipe_shows_the_images_as_they_are() -> None:
    options = Options.of(resolve("main.py --data-set WHERE --where-task order"))
    args = make_args(data_set="WHERE", **{name: options.by_name()[name] for name in ("where_task", "train_crop")})
    images = build_dataset(True, args)[0]
    for index in range(3):
        image = np.asarray(images.crop(images.pictures[index][0]))
        np.testing.assert_array_equal(image, images.pictures.draw(index, images.pictures.targets[index]))  # type: ignore[attr-defined]
