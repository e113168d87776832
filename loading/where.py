"""A synthetic data set that asks a model only where patches are: noise, with one to three cells in a plain colour.

After the idea of LOOPE's Three Cell Experiment (Chowdhury et al. 2025, https://arxiv.org/abs/2504.14386), which tests
what encodings tell about place on images of almost nothing else. The tasks and the images are this project's own: they
are not LOOPE's, and the accuracies cannot be compared with those of the paper.

An image is a grid of square cells. The cells that hold a mark are red, green or blue; each pixel of the others is a
grey level near the middle, drawn at random. The label decides where the marks are, and nothing else. The cells of an
image, taken without their places, are therefore the same whatever its label is: a model that does not know where its
patches are can only guess.

Shapes: H rows and W columns of cells; a place is the number of a cell in reading order, 0 .. HW - 1.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import ClassVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from loading.images import LabelledImages
from training.options import AugmentationOptions

SEED = 0
NUM_TRAIN, NUM_TEST = 9216, 1152  # multiples of the number of classes of each task on 8 x 8 cells
CELL = 4
"""Pixels of a side, unless told."""
GREYS = (120, 136)
"""Range of the grey levels, the last one excluded: narrow, so that tokens differ by their places more than by noise."""
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Task:
    """What is asked about the marks.

    Attributes:
        marks: their colours.
        classes: their names, in the order of the labels.

    Args:
        shape: (H, W).

    Raises:
        ValueError: so few cells that a class has no image.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    classes: Sequence[str]

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def draw_places(self, label: int, random: np.random.Generator) -> np.ndarray:
        """One place for each mark, of all the choices that have this label each as likely as the others."""
        raise NotImplementedError

    def too_few_cells(self) -> ValueError:
        height, width = self.shape
        return ValueError(
            f"{height} x {width} cells are too few for --where-task {self.name}: raise --input-size, or lower "
            "--where-cell"
        )


class CellTask(Task):
    """Which cell holds the mark? Only an absolute place answers it."""

    name = "cell"
    marks = ("red",)

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        height, width = shape
        if height * width < 2:
            raise self.too_few_cells()
        self.classes = [f"row {row} column {column}" for row in range(1, height + 1) for column in range(1, width + 1)]

    def draw_places(self, label: int, random: np.random.Generator) -> np.ndarray:
        return np.array([label])


class OrderTask(Task):
    """In which order do the three marks come, in reading order: row by row, each from left to right?"""

    name = "order"
    marks = ("red", "green", "blue")

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        if shape[0] * shape[1] < len(self.marks):
            raise self.too_few_cells()
        self.orders = list(permutations(range(len(self.marks))))
        self.classes = [" ".join(self.marks[mark] for mark in order) for order in self.orders]

    def draw_places(self, label: int, random: np.random.Generator) -> np.ndarray:
        height, width = self.shape
        places = np.empty(len(self.marks), dtype=int)
        places[list(self.orders[label])] = np.sort(random.choice(height * width, len(self.marks), replace=False))
        return places


class OffsetTask(Task):
    """A task about the offset from the first of two marks to the second."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        height, width = shape
        dy, dx = np.mgrid[1 - height : height, 1 - width : width].reshape(2, -1)
        dy, dx = (offsets[(dy != 0) | (dx != 0)] for offsets in (dy, dx))
        labels = self.labels_of(dy, dx)
        num_pairs = (height - abs(dy)) * (width - abs(dx))
        self.offsets = [np.stack([dy, dx], axis=-1)[labels == label] for label in range(len(self.classes))]
        if not all(map(len, self.offsets)):
            raise self.too_few_cells()
        pairs = [num_pairs[labels == label] for label in range(len(self.classes))]
        self.probabilities = [numbers / numbers.sum() for numbers in pairs]

    def labels_of(self, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """The label of each offset in cells, y downwards: (...) and (...) to (...)."""
        raise NotImplementedError

    def draw_places(self, label: int, random: np.random.Generator) -> np.ndarray:
        offset = random.choice(self.offsets[label], p=self.probabilities[label])
        first = random.integers(np.maximum(0, -offset), self.shape - np.maximum(0, offset))
        return np.ravel_multi_index(np.stack([first, first + offset], axis=-1), self.shape)


class DirectionTask(OffsetTask):
    """In which of eight directions is the green mark, seen from the red one? Each is a sector of 45 degrees."""

    name = "direction"
    marks = ("red", "green")
    classes = ("right", "lower right", "below", "lower left", "left", "upper left", "above", "upper right")

    def labels_of(self, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return np.rint(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % len(self.classes)


class DistanceTask(OffsetTask):
    """How far are two equal marks from each other? The classes are quarters of the longest distance in the image."""

    name = "distance"
    marks = ("red", "red")
    classes = ("up to 1/4", "1/4 to 2/4", "2/4 to 3/4", "above 3/4")

    def labels_of(self, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
        longest, parts = (self.shape[0] - 1) ** 2 + (self.shape[1] - 1) ** 2, len(self.classes)
        squares = dy**2 + dx**2  # squared distances are whole numbers, which makes the comparison exact
        return sum((parts**2 * squares > part**2 * longest).astype(int) for part in range(1, parts))


TASKS: dict[str, type[Task]] = {task.name: task for task in (CellTask, DirectionTask, OrderTask, DistanceTask)}


class Where(Dataset):
    """9,216 images to train or 1,152 to test, each made when it is asked for. An item is (PIL image, label).

    An image depends on its split, its index, the task, the cell and the size alone, not on `--seed`. Each class has as
    many images as any other, or one more.

    Args:
        size: height and width of the images, pixels.
        cell: side of a cell, pixels.
    """

    def __init__(self, task: Task, is_train: bool, size: tuple[int, int], cell: int) -> None:
        self.task, self.is_train, self.size, self.cell = task, is_train, size, cell
        self.classes = list(task.classes)
        self.marks = np.array([COLOURS[mark] for mark in task.marks], dtype=np.uint8)[:, None, None]
        labels = np.arange(NUM_TRAIN if is_train else NUM_TEST) % len(task.classes)
        self.targets: list[int] = np.random.default_rng((SEED, is_train)).permutation(labels).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = self.targets[index]
        return Image.fromarray(self.draw(index, label)), label

    def draw(self, index: int, label: int) -> np.ndarray:
        """The image of this index as if its label were `label`: uint8 (height, width, 3), of the same cells for all."""
        height, width = self.task.shape
        cells = np.empty((height * width, self.cell, self.cell, 3), dtype=np.uint8)
        random = np.random.default_rng((SEED, self.is_train, index))
        noise = random.integers(*GREYS, size=(len(cells) - len(self.marks), self.cell, self.cell, 1), dtype=np.uint8)
        places = self.task.draw_places(label, random)  # after the noise, which cannot depend on the label
        cells[places] = self.marks
        cells[np.delete(np.arange(len(cells)), places)] = noise
        rows = cells.reshape(height, width, self.cell, self.cell, 3).swapaxes(1, 2)
        return rows.reshape(*self.size, 3)


def open_where(is_train: bool, data_path: str | None, size: tuple[int, int], task: str, cell: int) -> LabelledImages:
    if data_path is not None:
        raise ValueError(f"--data-path {data_path} means nothing to WHERE, whose images are computed: leave it out")
    if task not in TASKS:
        raise ValueError(f"unknown --where-task {task!r}: choose from {', '.join(TASKS)}")
    height, width = size
    if height % cell or width % cell:
        raise ValueError(
            f"--input-size {height},{width} is not a whole number of cells of {cell} pixels: give multiples of {cell}, "
            "or another --where-cell"
        )
    images = Where(TASKS[task]((height // cell, width // cell)), is_train, size, cell)
    return images, images.classes


def refuse_moved_cells(augmentation: AugmentationOptions) -> None:
    """Refuse options of training that move, cover or recolour cells, after which the label would be wrong.

    Raises:
        ValueError: there are some; names them all.
    """
    wrong = {
        f"--train-crop {augmentation.train_crop}": augmentation.train_crop != "none",
        "--src": augmentation.src,
        f"--hflip {augmentation.hflip}": augmentation.hflip,
        f"--aa {augmentation.aa}": augmentation.aa not in (None, "none"),
        "--three-augment": augmentation.three_augment,
        f"--reprob {augmentation.reprob}": augmentation.reprob,
        f"--cutmix {augmentation.cutmix}": augmentation.cutmix,
        "--cutmix-minmax": augmentation.cutmix_minmax is not None,
    }
    if given := [flag for flag, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"{', '.join(given)}: would change where the marks of WHERE are, but not the label: train with --recipe "
            "where, or with --train-crop none and these off"
        )
