"""Image folders: a folder per class in train/ and in val/."""

import os
from itertools import islice
from logging import getLogger
from pathlib import Path

from torchvision.datasets import ImageFolder

from loading.classes import first_few, name_differences
from loading.images import LabelledImages, Reader, image_endings

_logger = getLogger(__name__)


def open_folders(is_train: bool, data_path: str | None, read_file: Reader) -> LabelledImages:
    if data_path is None:
        raise ValueError("--data-path is missing: name the folder that holds train/ and val/")
    splits = {split: Path(data_path).expanduser() / split for split in ("train", "val")}
    folder = splits["train" if is_train else "val"]
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: --data-path must hold train/ and val/, with a folder per class")
    classes = {split: _class_folders(path) for split, path in splits.items() if path.is_dir()}
    _check_same_classes(data_path, classes.get("train"), classes.get("val"))

    left_out = [path.name for path in sorted(folder.iterdir()) if not _is_class_folder(path)]
    endings, within, hidden = image_endings(), f"{folder}{os.sep}", f"{os.sep}."

    def is_image(path: str) -> bool:
        name = path.removeprefix(within)
        if hidden in name or os.path.splitext(name)[1].lower() not in endings:  # the class folder is not hidden
            left_out.append(name)
            return False
        return True

    images = _ClassFolders(str(folder), loader=read_file, is_valid_file=is_image, allow_empty=True)
    if left_out:
        _logger.info(
            "%s: %d files or folders are left out, as they are hidden, in no class folder, or without the ending of "
            "an image: %s",
            folder,
            len(left_out),
            first_few(left_out),
        )
    if empty := set(range(len(images.classes))).difference(images.targets):
        names = first_few([images.classes[label] for label in sorted(empty)])
        raise FileNotFoundError(f"no image in class folder {names} of {folder}: add images or remove the folder")
    return images, images.classes


def has_fewer_images(data_path: str, number: int) -> bool:
    """Whether `train/` holds fewer images than a number; also where there is no such folder."""
    endings, folder = image_endings(), Path(data_path).expanduser() / "train"
    names = (name for _, _, files in os.walk(folder, followlinks=True) for name in files)
    images = (name for name in names if os.path.splitext(name)[1].lower() in endings)
    return next(islice(images, number - 1, None), None) is None


class _ClassFolders(ImageFolder):
    """torchvision's, without hidden folders such as `.ipynb_checkpoints`."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(_class_folders(Path(directory)))
        return names, {name: label for label, name in enumerate(names)}


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _class_folders(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir() if _is_class_folder(path)}
    if not names:
        raise FileNotFoundError(f"no class folder in {folder}: it must hold a folder of images per class")
    return names


def _check_same_classes(data_path: str, train: set[str] | None, val: set[str] | None) -> None:
    if train is None or val is None or train == val:
        return
    differences = name_differences(train, "train/", val, "val/")
    raise ValueError(f"the classes of train/ and val/ in --data-path {data_path} differ: {differences}")
