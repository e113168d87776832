"""Data sets that fit in memory: CIFAR and scikit-learn's digits."""

from http.client import HTTPException
from logging import getLogger
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from loading.images import LabelledImages, one_line
from runtime.distributed import in_turns

_logger = getLogger(__name__)


def open_cifar(cifar: type[CIFAR10], is_train: bool, data_path: str | None) -> LabelledImages:
    assert data_path is not None  # the table of data sets has a default
    folder = Path(data_path).expanduser() / cifar.base_folder
    with in_turns() as may_download:
        if may_download and not folder.is_dir():
            _logger.info("%s is not in %s: downloading it from %s", cifar.__name__, folder, cifar.url)
        try:
            # torchvision downloads only what is not already there, whole and with the right checksums
            images = cifar(folder.parent, train=is_train, download=may_download)
        except (OSError, HTTPException, RuntimeError) as error:
            raise FileNotFoundError(
                f"{cifar.__name__} is not complete in {folder}, and its download from {cifar.url} failed "
                f"({one_line(error)}): connect to the network, or unpack {cifar.filename} in {folder.parent}, "
                f"or name by --data-path the folder that holds {cifar.base_folder}"
            ) from error
    return images, images.classes


class Digits(Dataset):
    """Scikit-learn's 1,797 scans of handwritten digits, 8 x 8 and installed with it: 1,437 to train and 360 to test.

    The split is fixed and stratified by class. An item is (PIL RGB image, label).
    """

    def __init__(self, is_train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target
        )
        split = train if is_train else test
        self.images = np.rint(digits.images[split] * (255 / 16)).astype(np.uint8)  # scanned in 17 grey levels, 0..16
        self.targets: list[int] = digits.target[split].tolist()
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.targets[index]


def open_digits(is_train: bool, data_path: str | None) -> LabelledImages:
    if data_path is not None:
        raise ValueError(
            f"--data-path {data_path} means nothing to DIGITS, which comes with scikit-learn: leave it out"
        )
    digits = Digits(is_train)
    return digits, digits.classes
