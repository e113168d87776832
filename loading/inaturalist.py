"""iNaturalist 2018 and 2019, as their annotation files describe them."""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from loading.images import LabelledImages, Picture, Reader, one_line


class INaturalist(Dataset):
    """A split of iNaturalist 2018 or 2019, which its annotation files tell, with classes of any taxonomic rank.

    torchvision's class of this name knows no splits. Labels number the classes in the order in which the training
    annotations first name them, as DeiT's do. An item is (what `read_file` reads, label).

    Args:
        folder: holds `train{year}.json`, `val{year}.json`, `categories.json` and the images they name.
        category: a key of `categories.json`: name (the species), genus, family, order, class, phylum, kingdom or
            supercategory.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a damaged file, or an unknown category.
    """

    def __init__(self, folder: Path, year: int, is_train: bool, category: str, read_file: Reader) -> None:
        self.read_file = read_file
        groups = {entry["id"]: entry for entry in _read_json(folder / "categories.json")}
        if unknown := [entry for entry in groups.values() if category not in entry]:
            known = ", ".join(key for key in unknown[0] if key != "id")
            raise ValueError(f"unknown --inat-category {category!r}: choose from {known}")
        train = _read_json(folder / f"train{year}.json")
        names = [groups[annotation["category_id"]][category] for annotation in train["annotations"]]
        labels = {name: label for label, name in enumerate(dict.fromkeys(names))}
        self.classes = list(labels)

        split = train if is_train else _read_json(folder / f"val{year}.json")
        files = {image["id"]: folder / image["file_name"] for image in split["images"]}
        self.samples = [
            (files[annotation["image_id"]], labels[groups[annotation["category_id"]][category]])
            for annotation in split["annotations"]
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        path, label = self.samples[index]
        return self.read_file(str(path)), label


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --data-path must hold iNaturalist's annotation files and images")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error


def open_inaturalist(
    year: int, is_train: bool, data_path: str | None, read_file: Reader, category: str
) -> LabelledImages:
    if data_path is None:
        raise ValueError(f"--data-path is missing: name the folder that holds train{year}.json and the images")
    try:
        images = INaturalist(Path(data_path).expanduser(), year, is_train, category, read_file)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the annotation files in --data-path {data_path} do not fit together: {error!r}") from error
    if missing := next((path for path, _ in images.samples if not path.is_file()), None):
        raise FileNotFoundError(f"no image {missing}, which the annotations name: unpack iNaturalist {year} there")
    return images, images.classes
