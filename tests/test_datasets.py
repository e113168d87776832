"""Data sets, transforms and loaders: a user's mistake is one line; what a run sees is exact and reproducible."""

import hashlib
import io
import json
import os
import pickle
import random
import signal
import socket
import struct
import tarfile
import threading
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import ExifTags, Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import (
    CenterCrop,
    ColorJitter,
    Compose,
    InterpolationMode,
    Normalize,
    RandomChoice,
    Resize,
    ToTensor,
)

import datasets
from datasets import DATA_SETS, canonical_data_set
from loading import transforms
from loading.images import Images, ImageSettings, UnreadableImageError, read_image, read_pixels
from loading.loader import ImageLoader, start_worker
from loading.transforms import TRAIN_CROPS
from runtime.interrupt import SIGNALS, leave_signals_to_parent
from training.options import AugmentationOptions, DataOptions

CIFARS = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}


def make_args(**changes) -> Namespace:
    args = Namespace(
        data_set="DIGITS",
        data_path=None,
        eval_data_path=None,
        num_classes=None,
        inat_category=None,
        where_task=None,
        where_cell=None,
        input_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        eval_crop_ratio=0.875,
        interpolation="bicubic",
        train_crop="none",
        fast_crop=None,
        scale=None,
        hflip=0.0,
        aa=None,
        src=False,
        three_augment=False,
        color_jitter=0.0,
        train_interpolation="bicubic",
        reprob=0.0,
        remode="pixel",
        recount=1,
        cutmix=0.0,
        cutmix_minmax=None,
        batch_size=4,
        num_workers=0,
        pin_mem=False,
        seed=0,
        repeated_aug=False,
        accum_steps=1,
        skip_bad_images=False,
        dist_eval=True,
        shared_batches=None,
    )
    assert changes.keys() <= vars(args).keys()
    return Namespace(**{**vars(args), **changes})


def settings_of(args: Namespace) -> ImageSettings:
    values = vars(args)
    sections = [
        section(**{one.name: values[one.name] for one in fields(section) if one.name in values})
        for section in (DataOptions, AugmentationOptions)
    ]
    others = ("input_size", "mean", "std", "num_classes", "seed", "accum_steps")
    return ImageSettings(*sections, **{name: values[name] for name in others})


def build_dataset(is_train: bool, args: Namespace, *others: Any) -> tuple[Images, list[str]]:
    return datasets.build_dataset(is_train, settings_of(args), *others)


def build_transform(is_train: bool, args: Namespace) -> Compose:
    settings = settings_of(args)
    return transforms.build_transform(is_train, settings, DATA_SETS[settings.data.data_set].small)


def build_loader(dataset: Images, is_train: bool, args: Namespace, *others: Any) -> ImageLoader:
    return datasets.build_loader(dataset, is_train, settings_of(args), *others)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def flatten(transform: Callable) -> list[Callable]:
    if not isinstance(transform, Compose):
        return [transform]
    return [step for part in transform.transforms for step in flatten(part)]


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def make_folders(root: Path, train=("cat", "dog"), val=("cat", "dog"), per_class: int = 2) -> Path:
    for split, classes in {"train": train, "val": val}.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                noise_image(40, 30, seed=index).save(folder / f"{index}.png")
    return root


# ---- names


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_is_known_in_any_case_and_with_separators(name):
    assert canonical_data_set(name) == canonical_data_set(name.lower()) == canonical_data_set(name.title()) == name
    assert canonical_data_set(name[:-1] + "-" + name[-1]) == canonical_data_set(name[:2] + "_" + name[2:]) == name


def test_cifar_is_cifar100_as_in_deit():
    assert canonical_data_set("cifar") == "CIFAR100"


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--data-set 'mnist'") as error:
        canonical_data_set("mnist")
    assert_one_line(error, *DATA_SETS)


# ---- DIGITS


def test_digits_are_split_into_1437_and_360_disjoint_images_that_make_up_all_of_scikit_learns():
    from sklearn.datasets import load_digits

    (train, classes), (test, _) = (build_dataset(is_train, make_args()) for is_train in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    assert classes == [str(digit) for digit in range(10)]
    whole = load_digits()
    parts = train.cropped, test.cropped
    ours = zip(np.concatenate([part.images for part in parts]), [*parts[0].targets, *parts[1].targets], strict=True)
    theirs = zip(np.rint(whole.images / 16 * 255).astype(np.uint8), whole.target.tolist(), strict=True)
    assert Counter((image.tobytes(), label) for image, label in ours) == Counter(
        (image.tobytes(), label) for image, label in theirs
    )


def test_digits_are_split_alike_in_every_class():
    train, test = (np.bincount(build_dataset(is_train, make_args())[0].cropped.targets) for is_train in (True, False))
    np.testing.assert_allclose(test, (train + test) * 360 / 1797, atol=1)


def test_digits_split_is_the_same_whatever_the_random_state():
    splits = []
    for seed in (1, 2):
        seed_all(seed)
        splits.append(build_dataset(False, make_args(seed=seed))[0].cropped)
    np.testing.assert_array_equal(splits[0].images, splits[1].images)
    assert splits[0].targets[:12] == [
        7,
        6,
        3,
        7,
        7,
        3,
        2,
        8,
        9,
        3,
        2,
        6,
    ]  # reported accuracies refer to it


def test_digits_use_the_whole_range_of_8_bits_in_three_equal_channels():
    args = make_args(input_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.stack([image for image, _ in build_dataset(False, args)[0]])
    assert images.shape == (360, 3, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_digits_refuse_a_data_path_that_they_would_not_read(tmp_path):
    with pytest.raises(ValueError, match="--data-path") as error:
        build_dataset(True, make_args(data_path=str(tmp_path)))
    assert_one_line(error, "DIGITS")


def test_digits_mean_and_std_are_those_of_the_training_images():
    images = build_dataset(True, make_args())[0].cropped.images / 255
    assert DATA_SETS["DIGITS"].mean == pytest.approx([images.mean()] * 3, abs=1e-4)
    assert DATA_SETS["DIGITS"].std == pytest.approx([images.std()] * 3, abs=1e-4)


# ---- folders


def folder_args(root: Path, **changes) -> Namespace:
    return make_args(data_set="FOLDER", data_path=str(root), **changes)


@pytest.mark.parametrize("data_set", ["IMNET", "FOLDER"])
@pytest.mark.parametrize("is_train", [True, False])
def test_a_folder_per_class_is_labelled_in_alphabetical_order(tmp_path, data_set, is_train):
    make_folders(tmp_path, train=("dog", "cat"), val=("dog", "cat"))
    images, classes = build_dataset(is_train, make_args(data_set=data_set, data_path=str(tmp_path), input_size=64))
    assert classes == ["cat", "dog"]
    assert [label for _, label in images] == [0, 0, 1, 1]
    assert all(image.shape == (3, 64, 64) for image, _ in images)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (["dog", "cow", "cat"], [2, 2, 1, 1, 0, 0]),
        (["dog", "cow", "pig"], [0, 0, 1, 1, 2, 2]),
        (None, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_labels_follow_the_classes_of_a_model_that_has_the_same(tmp_path, classes, labels):
    make_folders(tmp_path, *[("cat", "cow", "dog")] * 2)
    args = folder_args(tmp_path)
    images, names = build_dataset(False, args, classes)
    assert names == ["cat", "cow", "dog"]
    assert [label for _, label in images] == labels
    assert list(chain(*(batch.tolist() for _, batch in build_loader(images, False, args, 0, 1)))) == labels


def test_evaluation_needs_only_val(tmp_path):
    make_folders(tmp_path, train=())
    assert len(build_dataset(False, folder_args(tmp_path))[0]) == 4


def test_training_images_come_from_train(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "val" / "cat" / "0.png").unlink()
    assert [len(build_dataset(is_train, folder_args(tmp_path))[0]) for is_train in (True, False)] == [4, 3]


@pytest.mark.parametrize("data_set", ["IMNET", "FOLDER"])
def test_folders_without_a_data_path_name_the_flag(data_set):
    with pytest.raises(ValueError, match="--data-path") as error:
        build_dataset(True, make_args(data_set=data_set))
    assert_one_line(error)


@pytest.mark.parametrize("is_train", [True, False])
def test_a_missing_folder_is_named(tmp_path, is_train):
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(is_train, folder_args(tmp_path / "nowhere"))
    assert_one_line(error, str(tmp_path / "nowhere" / ("train" if is_train else "val")), "--data-path")


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(True, folder_args(tmp_path))
    assert_one_line(error, str(tmp_path / "train"), "no class folder")


def test_a_class_folder_without_images_is_named(tmp_path):
    make_folders(tmp_path)
    for file in (tmp_path / "val" / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(False, folder_args(tmp_path))
    assert_one_line(error, str(tmp_path / "val"), "dog")
    assert "cat" not in str(error.value)


@pytest.mark.parametrize("is_train", [True, False])
def test_differing_classes_are_named_with_their_side(tmp_path, is_train):
    make_folders(tmp_path, train=("bee", "cat", "dog"), val=("ant", "cat", "dog"))
    with pytest.raises(ValueError, match="differ") as error:
        build_dataset(is_train, folder_args(tmp_path))
    assert_one_line(error, str(tmp_path), "only in train/: bee", "only in val/: ant")
    assert "cat" not in str(error.value)


def test_only_a_few_of_many_differing_classes_are_named(tmp_path):
    make_folders(tmp_path, train=[f"class{index:03d}" for index in range(100)], val=("class000",), per_class=0)
    with pytest.raises(ValueError, match=r"class001, .* and 94 more") as error:
        build_dataset(True, folder_args(tmp_path))
    assert_one_line(error)
    assert "val/:" not in str(error.value)


# ---- CIFAR


def write_cifar(cifar: type[CIFAR10], root: Path, n_classes: int) -> dict:
    """Write three images a file in CIFAR's own format; return the attributes of `cifar` that hold the checksums."""
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    label_key = "labels" if cifar is CIFAR10 else "fine_labels"

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def write_images(name: str) -> list[str]:
        pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        return [name, write(name, {"data": pixels, label_key: [0, n_classes - 1, 1]})]

    names = [f"class {label}" for label in range(n_classes)]
    return {
        "train_list": [write_images(name) for name, _ in cifar.train_list],
        "test_list": [write_images(name) for name, _ in cifar.test_list],
        "meta": {**cifar.meta, "md5": write(cifar.meta["filename"], {cifar.meta["key"]: names})},
    }


def pack_cifar(cifar: type[CIFAR10], root: Path, archive: Path) -> dict:
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / cifar.base_folder, arcname=cifar.base_folder)
    return {"tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest()}


@pytest.fixture
def no_network(monkeypatch) -> str:
    """Let every download be refused at once: nobody listens at the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/cifar.tar.gz"
    for cifar in CIFARS.values():
        monkeypatch.setattr(cifar, "url", url)
    return url


@pytest.fixture
def web_server(tmp_path) -> Iterator[tuple[str, list[str]]]:
    """Serve tmp_path/web; yields the address and the list of the paths asked for so far."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "web"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(("data_set", "cifar"), CIFARS.items())
def test_cifar_on_disk_is_read_without_the_network(tmp_path, monkeypatch, no_network, data_set, cifar):
    n_classes = int(data_set.removeprefix("CIFAR"))
    for name, value in write_cifar(cifar, tmp_path, n_classes).items():
        monkeypatch.setattr(cifar, name, value)
    args = make_args(data_set=data_set, data_path=str(tmp_path), input_size=32)
    for is_train, files in ((True, cifar.train_list), (False, cifar.test_list)):
        images, classes = build_dataset(is_train, args)
        assert [label for _, label in images] == [0, n_classes - 1, 1] * len(files)
        assert images[0][0].shape == (3, 32, 32)
        assert classes == [f"class {label}" for label in range(n_classes)]


@pytest.mark.parametrize(("data_set", "cifar"), CIFARS.items())
@pytest.mark.parametrize("data_path", [None, "elsewhere"])
def test_absent_cifar_without_a_network_says_what_where_and_what_to_do(
    tmp_path, monkeypatch, no_network, data_set, cifar, data_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(True, make_args(data_set=data_set, data_path=data_path, input_size=32))
    where = str(Path(data_path or "data") / cifar.base_folder)
    assert_one_line(error, data_set, where, no_network, "refused", "--data-path", cifar.filename)


def test_damaged_cifar_without_a_network_is_not_read(tmp_path, monkeypatch, no_network):
    for name, value in write_cifar(CIFAR10, tmp_path, 10).items():
        monkeypatch.setattr(CIFAR10, name, value)
    file = tmp_path / CIFAR10.base_folder / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(True, make_args(data_set="CIFAR10", data_path=str(tmp_path), input_size=32))
    assert_one_line(error, "CIFAR10 is not complete", str(file.parent))


def test_absent_cifar_is_downloaded(tmp_path, monkeypatch, web_server):
    address, asked = web_server
    attributes = write_cifar(CIFAR10, tmp_path / "source", 10)
    attributes |= pack_cifar(CIFAR10, tmp_path / "source", tmp_path / "web" / CIFAR10.filename)
    for name, value in {**attributes, "url": f"{address}/{CIFAR10.filename}"}.items():
        monkeypatch.setattr(CIFAR10, name, value)
    images, _ = build_dataset(True, make_args(data_set="CIFAR10", data_path=str(tmp_path / "data"), input_size=32))
    assert len(images) == 15
    assert asked


def open_cifar_in_a_group(
    rank: int, local_ranks: list[int], root: str, attributes: dict, cases: list[tuple[str, list[str]]]
) -> None:
    """Body of one process: open CIFAR10 for each (address, data path by rank) in turn; write what became of it."""
    os.environ["LOCAL_RANK"] = str(local_ranks[rank])
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=len(local_ranks))
    outcomes = []
    for url, data_paths in cases:
        for name, value in {**attributes, "url": url}.items():
            setattr(CIFAR10, name, value)
        try:
            images, _ = build_dataset(True, make_args(data_set="CIFAR10", data_path=data_paths[rank], input_size=32))
            outcomes.append(f"{len(images)} images")
        except FileNotFoundError as error:
            outcomes.append(str(error))
        dist.barrier()
    dist.destroy_process_group()
    Path(root, f"outcomes{rank}.json").write_text(json.dumps(outcomes))


def test_a_group_of_processes_downloads_once_a_disk_and_each_hears_of_a_failure(
    tmp_path, monkeypatch, web_server, no_network
):
    address, asked = web_server
    attributes = write_cifar(CIFAR10, tmp_path / "source", 10)
    attributes |= pack_cifar(CIFAR10, tmp_path / "source", tmp_path / "web" / CIFAR10.filename)
    url = f"{address}/{CIFAR10.filename}"
    for name, value in {**attributes, "url": url}.items():
        monkeypatch.setattr(CIFAR10, name, value)
    build_dataset(True, make_args(data_set="CIFAR10", data_path=str(tmp_path / "alone"), input_size=32))
    requests_of_one_download = len(asked)
    asked.clear()

    local_ranks = [0, 1, 0]  # two machines
    one_disk = [str(tmp_path / "shared")] * 3
    two_disks = [str(tmp_path / disk) for disk in ("first", "first", "second")]
    mp.start_processes(
        open_cifar_in_a_group,
        (local_ranks, str(tmp_path), attributes, [(no_network, one_disk), (url, one_disk), (url, two_disks)]),
        nprocs=len(local_ranks),
        start_method="spawn",
    )
    for rank in range(len(local_ranks)):
        failure, *successes = json.loads((tmp_path / f"outcomes{rank}.json").read_text())
        assert "CIFAR10 is not complete" in failure
        assert ("refused" in failure) is (local_ranks[rank] == 0)  # the others did not try the network
        assert successes == ["15 images", "15 images"]
    assert len(asked) == (1 + 2) * requests_of_one_download


# ---- transforms


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("train_crop", TRAIN_CROPS)
@pytest.mark.parametrize("aa", [None, "torchvision", "rand-m9-mstd0.5-inc1"])
def test_training_images_have_the_input_size(size, train_crop, aa):
    args = make_args(input_size=size, train_crop=train_crop, aa=aa, hflip=0.5, reprob=0.5)
    transform = build_transform(True, args)
    for image in (noise_image(8, 8), noise_image(90, 50)):
        tensor = transform(image)
        assert tensor.shape == (3, size, size)
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_evaluation_images_have_the_input_size_and_do_not_vary(size, data_set):
    transform = build_transform(False, make_args(data_set=data_set, input_size=size))
    for image in (noise_image(8, 8), noise_image(90, 50)):
        first, second = transform(image), transform(image)
        assert first.shape == (3, size, size)
        assert torch.equal(first, second)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("train_crop", TRAIN_CROPS)
def test_mean_and_std_are_applied_channel_by_channel(is_train, train_crop):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    args = make_args(train_crop=train_crop, mean=mean, std=std)
    if train_crop == "pad":
        args.input_size = 7  # an eighth of it is no padding, which would be black
    tensor = build_transform(is_train, args)(Image.new("RGB", (20, 20), (255, 102, 0)))
    expected = [(value - m) / s for value, m, s in zip((1.0, 0.4, 0.0), mean, std, strict=True)]
    torch.testing.assert_close(tensor, torch.tensor(expected)[:, None, None].expand_as(tensor))


@pytest.mark.parametrize("train_interpolation", ["bicubic", "bilinear", "random"])
def test_the_random_resized_crop_gives_deits_own_images(train_interpolation):
    aa = "rand-m9-mstd0.5-inc1"
    deit = create_transform(
        48,
        is_training=True,
        color_jitter=0.0,
        auto_augment=aa,
        interpolation=train_interpolation,
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    args = make_args(
        data_set="IMNET",
        input_size=48,
        train_crop="random-resized",
        hflip=0.5,
        aa=aa,
        reprob=0.25,
        train_interpolation=train_interpolation,
        mean=DATA_SETS["IMNET"].mean,
        std=DATA_SETS["IMNET"].std,
    )
    ours = build_transform(True, args)
    for seed in range(5):
        results = []
        for transform in (deit, ours):
            seed_all(seed)
            results.append(transform(noise_image(70, 60)))
        assert torch.equal(*results)


def test_evaluation_gives_torchvisions_own_images():
    mean, std = DATA_SETS["IMNET"].mean, DATA_SETS["IMNET"].std
    ours = build_transform(False, make_args(data_set="IMNET", input_size=56, mean=mean, std=std))
    theirs = Compose([Resize(64, InterpolationMode.BICUBIC), CenterCrop(56), ToTensor(), Normalize(mean, std)])
    assert torch.equal(ours(noise_image(100, 80)), theirs(noise_image(100, 80)))


def test_the_cifar_recipe_crops_flips_augments_and_normalises_in_this_order():
    args = make_args(data_set="CIFAR10", input_size=32, train_crop="pad", hflip=0.5, aa="torchvision")
    steps = [step for step in flatten(build_transform(True, args)) if not isinstance(step, RandomChoice | ColorJitter)]
    names = [getattr(step, "__name__", type(step).__name__) for step in steps]
    assert names == ["RandomCrop", "RandomHorizontalFlip", "RandAugment", "to_pixels", "Normalise"]
    assert tuple(steps[0].padding) == (4, 4)


def test_the_padded_crop_shifts_the_image_by_up_to_an_eighth():
    transform = build_transform(True, make_args(input_size=32, train_crop="pad", mean=(0.0,) * 3, std=(1.0,) * 3))
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    black_rows = {int((transform(white)[0].amax(dim=1) == 0).sum()) for _ in range(100)}
    assert black_rows == set(range(5))


@pytest.mark.parametrize("train_interpolation", ["bicubic", "bilinear"])
def test_an_image_of_the_input_size_keeps_its_pixels(train_interpolation):
    args = make_args(train_interpolation=train_interpolation, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = noise_image(16, 16)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    for is_train in (True, False):
        assert torch.equal(build_transform(is_train, args)(image), pixels)


def test_the_interpolations_of_training_and_of_evaluation_are_those_asked_for():
    image = noise_image(8, 8)

    def resized(is_train: bool, **changes) -> torch.Tensor:
        return build_transform(is_train, make_args(**changes))(image)

    bicubic, bilinear = (resized(False, interpolation=mode) for mode in ("bicubic", "bilinear"))
    assert not torch.equal(bicubic, bilinear)
    assert torch.equal(resized(True, train_interpolation="bicubic"), bicubic)
    assert torch.equal(resized(True, train_interpolation="bilinear"), bilinear)
    random_modes = [resized(True, train_interpolation="random") for _ in range(30)]
    assert any(torch.equal(result, bicubic) for result in random_modes)
    assert any(torch.equal(result, bilinear) for result in random_modes)


def ring(size: int, border: int) -> Image.Image:
    """A white image with a black border."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[border:-border, border:-border] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("data_set", "size", "sees_the_border"),
    [("FOLDER", 64, False), ("FOLDER", 32, True), ("CIFAR10", 64, True), ("DIGITS", 64, True), ("IMNET", 64, False)],
)
def test_evaluation_crops_the_centre_of_large_images_only(data_set, size, sees_the_border):
    args = make_args(data_set=data_set, input_size=size, eval_crop_ratio=0.5, interpolation="nearest")
    tensor = build_transform(False, args)(ring(128, border=24))
    assert (tensor.min() < 0).item() is sees_the_border


def test_the_centre_crop_is_the_asked_part_of_the_shorter_side():
    args = make_args(data_set="FOLDER", input_size=56, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = noise_image(100, 64)
    centre = image.crop((22, 4, 78, 60))  # 56 is 0.875 of 64
    pixels = torch.from_numpy(np.array(centre)).permute(2, 0, 1) / 255
    assert torch.equal(build_transform(False, args)(image), pixels)


@pytest.mark.parametrize("train_crop", TRAIN_CROPS)
def test_each_augmentation_is_applied_when_asked_for_and_only_then(train_crop):
    def changes_image(**changes) -> bool:
        results = []
        for args in (make_args(train_crop=train_crop), make_args(train_crop=train_crop, **changes)):
            transform = build_transform(True, args)
            seed_all(0)
            results.append(torch.stack([transform(noise_image(16, 16)) for _ in range(8)]))
        return not torch.equal(*results)

    assert not changes_image()
    for option in (
        {"hflip": 1.0},
        {"aa": "torchvision"},
        {"aa": "rand-m9-mstd0.5-inc1"},
        {"color_jitter": 0.4},
        {"reprob": 1.0},
    ):
        assert changes_image(**option), option


def test_erasing_is_asked_for_by_probability_mode_and_count():
    transform = build_transform(True, make_args(reprob=0.3, remode="const", recount=2))
    (erasing,) = [step for step in flatten(transform) if isinstance(step, RandomErasing)]
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.3, "const", 2)


@pytest.mark.parametrize("aa", ["torchvision", "3a", "rand-m9-t3a", "none", None])
def test_colour_jitter_is_applied_beside_a_policy_that_allows_it(aa):
    steps = flatten(build_transform(True, make_args(aa=aa, color_jitter=0.4)))
    assert [step.brightness for step in steps if isinstance(step, ColorJitter)] == [(0.6, 1.4)]


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m3", "original", "v0"])
def test_colour_jitter_beside_a_policy_with_which_timm_ignores_it_is_refused(aa):
    with pytest.raises(ValueError, match="--color-jitter") as error:
        build_transform(True, make_args(aa=aa, color_jitter=0.4))
    assert_one_line(error, "--aa", aa)
    # timm itself would indeed leave it out
    steps = flatten(create_transform(32, is_training=True, auto_augment=aa, color_jitter=0.4))
    assert not any(isinstance(step, ColorJitter) for step in steps)


@pytest.mark.parametrize(
    "aa",
    [
        "rand",
        "rand-m9-mstd0.5-inc1",
        "rand-m9-n3-p0.7-mmax12-tweights",
        "rand-t3aw",
        "augmix",
        "augmix-m5-w4-d2-a1.0-b1-mstd0.5",
        "original",
        "originalr-mstd0.5",
        "v0",
        "v0r",
        "3a-mstd0.5",
    ],
)
def test_every_policy_of_timm_can_be_asked_for(aa):
    assert build_transform(True, make_args(aa=aa))(noise_image(16, 16)).shape == (3, 16, 16)


@pytest.mark.parametrize("aa", ["", "randaugment", "rand-m9-inc", "rand-tfoo", "rand-x3", "v1", "augmix-n2", "RAND-m9"])
def test_a_policy_of_which_timm_would_ignore_a_part_is_refused(aa):
    with pytest.raises(ValueError, match="--aa") as error:
        build_transform(True, make_args(aa=aa))
    assert_one_line(error, repr(aa))


@pytest.mark.parametrize(
    ("is_train", "flag", "value"),
    [
        (True, "--train-crop", "centre"),
        (True, "--train-interpolation", "cubic"),
        (True, "--remode", "black"),
        (False, "--interpolation", "cubic"),
        (False, "--eval-crop-ratio", 0.0),
        (False, "--eval-crop-ratio", 1.2),
    ],
)
def test_an_illegal_option_of_the_transform_names_its_flag(is_train, flag, value):
    with pytest.raises(ValueError, match=flag) as error:
        build_transform(is_train, make_args(**{flag[2:].replace("-", "_"): value}))
    assert_one_line(error, str(value))


# ---- what is an image


def logged(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [message for message in caplog.messages if word in message]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git"])
def test_hidden_folders_are_no_classes_and_hidden_files_no_images(tmp_path, caplog, hidden):
    make_folders(tmp_path)
    inside = noise_image(40, 30)
    for folder in (tmp_path / "train" / hidden, tmp_path / "train/cat" / hidden):
        folder.mkdir()
        inside.save(folder / "0-checkpoint.png")
    inside.save(tmp_path / "train/cat/._0.png")
    inside.save(tmp_path / "train/beside.png")
    (tmp_path / "train/cat/notes.txt").write_text("notes")
    with caplog.at_level("INFO"):
        images, classes = build_dataset(True, folder_args(tmp_path))
    assert classes == ["cat", "dog"]
    assert [label for _, label in images] == [0, 0, 1, 1]
    (line,) = logged(caplog, "left out")
    assert f"{tmp_path / 'train'}: 5 files or folders" in line
    for name in (hidden, f"cat/{hidden}/0-checkpoint.png", "cat/._0.png", "beside.png", "cat/notes.txt"):
        assert name in line


def test_nothing_is_said_where_nothing_is_left_out_and_a_hidden_root_hides_nothing(tmp_path, caplog):
    root = make_folders(tmp_path / ".cache" / "photos")
    with caplog.at_level("INFO"):
        assert len(build_dataset(True, folder_args(root))[0]) == 4
    assert logged(caplog, "left out") == []


WRITTEN = ("avif", "bmp", "dds", "gif", "icns", "ico", "jfif", "jp2", "jpe", "JPEG", "mpo", "pbm", "pcx", "pgm", "png")
WRITTEN += ("pnm", "ppm", "qoi", "sgi", "tga", "TIFF", "webp", "xbm")


@pytest.mark.parametrize("ending", WRITTEN)
def test_every_ending_of_an_image_that_pillow_reads_is_read(tmp_path, ending):
    make_folders(tmp_path)
    image = noise_image(32, 32)
    (image.convert("1") if ending in ("pbm", "xbm") else image).save(tmp_path / "train/cat" / f"more.{ending}")
    images, _ = build_dataset(True, folder_args(tmp_path, input_size=32))
    assert [label for _, label in images] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("ending", ["h5", "pdf", "eps", "json", "mpg", "heic", ""])
def test_other_endings_are_left_out_and_counted(tmp_path, caplog, ending):
    make_folders(tmp_path)
    (tmp_path / "val/dog" / f"x.{ending}").write_bytes(b"x")
    with caplog.at_level("INFO"):
        assert len(build_dataset(False, folder_args(tmp_path))[0]) == 4
    (line,) = logged(caplog, "left out")
    assert line.startswith(f"{tmp_path / 'val'}: 1 files or folders")
    assert line.endswith(f"dog/x.{ending}")


# ---- the fast crop


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, with a little noise, as photographs are."""
    smooth = np.asarray(noise_image(5, 4, seed).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    noise = np.random.default_rng(seed).normal(0, 4, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PHOTO = photo(50, 37)
JPEGS = {
    "halved colours": encoded(PHOTO),
    "full colours": encoded(PHOTO, subsampling=0),
    "progressive": encoded(PHOTO, progressive=True),
    "RGB": encoded(PHOTO, keep_rgb=True),
    "grey": encoded(PHOTO.convert("L")),
    "one pixel": encoded(photo(1, 1)),
}
OTHERS = {
    "CMYK": encoded(PHOTO.convert("CMYK")),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "webp": encoded(PHOTO, "WEBP"),
    "garbage before the end": encoded(PHOTO)[:-2] + b"garbage" + encoded(PHOTO)[-2:],
}


@pytest.mark.parametrize("content", [*JPEGS.values(), *OTHERS.values()], ids=[*JPEGS, *OTHERS])
def test_an_image_is_read_to_pils_pixels_and_by_pil_where_it_is_no_plain_jpeg(tmp_path, content):
    (file := tmp_path / "image").write_bytes(content)
    for source in (content, str(file)):
        pixels = read_pixels(source)
        assert isinstance(pixels, np.ndarray if content in JPEGS.values() else Image.Image)
        np.testing.assert_array_equal(pixels, read_image(source))


@pytest.mark.parametrize("content", [JPEGS["grey"][:-300], JPEGS["progressive"][:900], b"", b"no image", None])
def test_what_pil_cannot_read_is_the_same_error(tmp_path, content):
    file = tmp_path / "image.jpg"
    if content is not None:
        file.write_bytes(content)
    messages = []
    for read in (read_pixels, read_image):
        with pytest.raises(UnreadableImageError) as error:
            read(str(file))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert str(file) in messages[0]


def test_whether_an_image_is_too_large_is_for_pil_to_say(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(UnreadableImageError, match="bomb"):
        read_pixels(JPEGS["RGB"], "image")


GREY = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
"""Each grey of 8 bits, in 16: from black to white."""


def grey_tiff(data: bytes, bits: int, white_is_zero: bool = False) -> bytes:
    """An uncompressed TIFF of 16 x 16 values."""
    entries = [(256, 16), (257, 16), (258, bits), (259, 1), (262, int(not white_is_zero))]
    entries += [(273, 8), (277, 1), (278, 16), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + struct.pack("<H", len(entries)) + directory + bytes(4)


def in_12_bits(values: np.ndarray) -> bytes:
    """Two values up to 4095 in three bytes each."""
    even, odd = (values.reshape(-1)[first::2].astype(int) for first in (0, 1))
    return np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=1).astype(np.uint8).tobytes()


DEEP_GREY = {
    "PNG": encoded(Image.fromarray(GREY), "PNG"),
    "TIFF": encoded(Image.fromarray(GREY), "TIFF"),
    "compressed TIFF": encoded(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
    "TIFF of 12 bits": grey_tiff(in_12_bits(GREY >> 4), 12),
    "TIFF whose white is zero": grey_tiff((65535 - GREY).tobytes(), 16, white_is_zero=True),
    "TIFF of 8 bits whose white is zero": grey_tiff((255 - (GREY >> 8)).astype(np.uint8).tobytes(), 8, True),
    "big-endian TIFF": encoded(Image.frombytes("I;16B", (16, 16), GREY.astype(">u2").tobytes()), "TIFF"),
    "PGM": encoded(Image.fromarray(GREY), "PPM"),
    "JPEG 2000": encoded(Image.fromarray(GREY), "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("read", [read_image, read_pixels])
@pytest.mark.parametrize("content", DEEP_GREY.values(), ids=DEEP_GREY)
def test_grey_of_more_than_8_bits_keeps_all_its_levels(content, read):
    pixels = np.asarray(read(content))
    np.testing.assert_array_equal(pixels, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_grey_and_colours_of_16_bits_are_read_alike():
    values = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(values, 3, axis=1))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    colours = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    grey = encoded(Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(read_image(colours), read_image(grey))


@pytest.mark.parametrize(("kind", "word"), [(np.int32, "whole numbers"), (np.float32, "floats")])
def test_values_without_a_known_range_are_refused_by_name(tmp_path, kind, word):
    Image.fromarray(GREY.astype(kind)).save(file := tmp_path / "deep.tiff")
    for read in (read_image, read_pixels):
        with pytest.raises(UnreadableImageError) as error:
            read(str(file))
        assert_one_line(error, str(file), word, "save it with 8 or 16 unsigned bits")


def test_only_an_image_for_the_eye_is_turned_as_its_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter
    for name, image in (("colours.png", photo(30, 20)), ("grey.png", Image.fromarray(GREY[:8]))):
        image.save(file := tmp_path / name, exif=exif)
        stored, upright = read_image(str(file)), read_image(str(file), upright=True)
        np.testing.assert_array_equal(upright, np.rot90(stored, -1))
        np.testing.assert_array_equal(read_pixels(str(file)), stored)
    image = photo(32, 16)
    image.save(file := tmp_path / "photo.jpg", exif=exif)
    np.testing.assert_array_equal(read_pixels(str(file)), read_image(str(file)))  # simplejpeg turns nothing either
    assert read_image(str(file)).size == (32, 16)


def photo_folder(root: Path, sizes: list[tuple[int, int]]) -> Path:
    for split in ("train", "val"):
        (root / split / "class").mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            photo(width, height, number).save(root / split / "class" / f"{number:03}.jpg")
    return root


def seeded_item(dataset: Dataset, index: int, seed: int) -> tuple[torch.Tensor, tuple]:
    """An image, and the random numbers that come after it."""
    seed_all(seed)
    image, _ = dataset[index]
    return image, (random.random(), np.random.rand(), torch.rand(1).item())


SIZES = [(300, 200), (90, 400), (32, 32), (20, 11), (3, 60), (1, 1)]


@pytest.mark.parametrize("input_size", [32, [24, 40]])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "random"])
def test_the_fast_crop_is_pils_but_for_rounding(tmp_path, mode, input_size):
    options = {"train_crop": "random-resized", "train_interpolation": mode, "hflip": 0.5, "input_size": input_size}
    args = folder_args(photo_folder(tmp_path, SIZES), **options, mean=(0.0,) * 3, std=(1.0,) * 3)
    args.data_set = "IMNET"
    fast, exact = (build_dataset(True, Namespace(**{**vars(args), "fast_crop": flag}))[0] for flag in (None, False))
    differences = []
    for index in range(len(SIZES)):
        for seed in range(20):
            (ours, our_state), (pils, pils_state) = (seeded_item(dataset, index, seed) for dataset in (fast, exact))
            differences.append(((ours - pils) * 255).abs().round().flatten())
            assert our_state == pils_state
    assert torch.cat(differences).max() <= 2
    assert 0 < (torch.cat(differences) > 0).float().mean() < 0.02
    assert (torch.cat(differences) > 1).float().mean() < 1e-4


def test_the_fast_crop_draws_what_pils_does_before_policy_and_erasing(tmp_path):
    args = folder_args(photo_folder(tmp_path, SIZES[:2]), **AUGMENTED)
    fast, exact = (build_dataset(True, Namespace(**{**vars(args), "fast_crop": flag}))[0] for flag in (True, False))
    for seed in range(20):
        assert seeded_item(fast, seed % 2, seed)[1] == seeded_item(exact, seed % 2, seed)[1]


def test_without_the_fast_crop_jpegs_become_timms_own_images(tmp_path):
    mean, std = DATA_SETS["IMNET"].mean, DATA_SETS["IMNET"].std
    args = folder_args(photo_folder(tmp_path, SIZES), **AUGMENTED, input_size=48, mean=mean, std=std, fast_crop=False)
    deit = create_transform(
        48, is_training=True, auto_augment=AUGMENTED["aa"], interpolation="bicubic", re_prob=0.5, re_mode="pixel"
    )
    ours, _ = build_dataset(True, args)
    for index, (path, _) in enumerate(ours.cropped.samples):
        image, _ = seeded_item(ours, index, index)
        seed_all(index)
        assert torch.equal(image, deit(Image.open(path).convert("RGB")))


RANDOM_RESIZED = {"train_crop": "random-resized"}


@pytest.mark.parametrize(
    ("is_train", "options", "decoded"),
    [
        (True, RANDOM_RESIZED, 1),
        (True, {**RANDOM_RESIZED, "fast_crop": True}, 1),
        (True, {**RANDOM_RESIZED, "fast_crop": False}, 0),
        (True, {**RANDOM_RESIZED, "src": True}, 0),
        (True, {"train_crop": "pad"}, 0),
        (True, {"train_crop": "none"}, 0),
        (False, RANDOM_RESIZED, 0),
    ],
)
def test_only_the_random_resized_crops_of_training_are_fast(tmp_path, monkeypatch, is_train, options, decoded):
    count = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda content: count.append(1) or decode(content))
    dataset, _ = build_dataset(is_train, folder_args(photo_folder(tmp_path, [(40, 30)]), **options))
    assert dataset[0][0].shape == (3, 16, 16)
    assert len(count) == decoded


@pytest.mark.parametrize("flag", [True, False])
def test_a_fast_crop_that_is_asked_for_or_refused_in_vain_is_told(caplog, flag):
    for options in ({}, RANDOM_RESIZED, {**RANDOM_RESIZED, "data_set": "FOLDER"}):
        build_transform(True, make_args(**options))
    build_transform(True, make_args(**RANDOM_RESIZED, data_set="FOLDER", fast_crop=flag))
    build_transform(False, make_args(fast_crop=flag))
    assert caplog.messages == []
    for options in (
        {"data_set": "FOLDER"},
        {"data_set": "WDS", **RANDOM_RESIZED, "src": True},
        {"data_set": "CIFAR10", **RANDOM_RESIZED},
    ):
        caplog.clear()
        build_transform(True, make_args(**options, fast_crop=flag))
        (message,) = caplog.messages
        assert message.startswith("--fast-crop is without effect" if flag else "--no-fast-crop is without effect")


# ---- loaders


def indices(count: int) -> Images:
    return Images(TensorDataset(torch.arange(count), torch.zeros(count)), augment=lambda index: index)


def seen(loader: DataLoader) -> list[int]:
    return [index for batch, _ in loader for index in batch.tolist()]


def train_orders(args: Namespace, count: int, epoch: int, world_size: int = 1) -> list[list[int]]:
    orders = []
    for rank in range(world_size):
        loader = build_loader(indices(count), True, args, rank, world_size)
        loader.sampler.set_epoch(epoch)
        orders.append(seen(loader))
    return orders


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 37])
def test_evaluation_sees_each_image_exactly_once_over_all_processes(world_size, count):
    shards = [seen(build_loader(indices(count), False, make_args(), rank, world_size)) for rank in range(world_size)]
    assert sorted(chain(*shards)) == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(shard == sorted(shard) for shard in shards)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 1), (4, 6), (5, 7)])
def test_evaluation_batches_are_half_as_large_again(batch_size, expected):
    loader = build_loader(indices(37), False, make_args(batch_size=batch_size), 0, 1)
    assert len(next(iter(loader))[0]) == expected


def test_repeated_augmentation_does_not_touch_evaluation():
    assert seen(build_loader(indices(7), False, make_args(repeated_aug=True), 0, 1)) == list(range(7))


@pytest.mark.parametrize("repeated_aug", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_order_of_training_depends_on_seed_and_epoch_and_is_reproducible(repeated_aug, world_size):
    def orders(seed: int, epoch: int) -> list[list[int]]:
        return train_orders(make_args(seed=seed, repeated_aug=repeated_aug), 37, epoch, world_size)

    reference = orders(seed=3, epoch=5)
    torch.manual_seed(99)  # the process's own random state plays no part
    assert orders(seed=3, epoch=5) == reference
    assert orders(seed=3, epoch=6) != reference
    assert orders(seed=4, epoch=5) != reference


@pytest.mark.parametrize("repeated_aug", [False, True])
def test_before_any_epoch_is_set_the_order_is_that_of_epoch_0(repeated_aug):
    args = make_args(seed=3, repeated_aug=repeated_aug)
    assert [seen(build_loader(indices(37), True, args, 0, 1))] == train_orders(args, 37, epoch=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_batches_are_full_and_no_image_comes_twice_in_an_epoch(world_size):
    orders = train_orders(make_args(batch_size=4), 37, 0, world_size)
    assert [len(order) for order in orders] == [37 // world_size // 4 * 4] * world_size
    assert len(set(chain(*orders))) == sum(map(len, orders))


@pytest.mark.parametrize("count", [10, 37, 300])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeated_augmentation_takes_each_chosen_image_three_times(count, world_size):
    orders = train_orders(make_args(batch_size=1, repeated_aug=True), count, 0, world_size)
    assert [len(order) for order in orders] == [-(-count // world_size)] * world_size
    repeats = Counter(chain(*orders))
    *whole, last = sorted(repeats.values(), reverse=True)
    assert set(whole) == {3}
    assert last <= 3
    if world_size == 3:  # each process has its own augmentation of an image
        assert all(len(set(order)) == len(order) for order in orders)


def test_ten_images_train_with_repeated_augmentation():
    loader = build_loader(indices(10), True, make_args(batch_size=5, repeated_aug=True), 0, 1)
    assert len(loader) == len(list(loader)) == 2


@pytest.mark.parametrize("repeated_aug", [False, True])
@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(7, 8, 1), (31, 8, 4), (2, 1, 3), (0, 1, 1)])
def test_a_training_set_smaller_than_one_global_batch_is_refused(repeated_aug, count, batch_size, world_size):
    args = make_args(batch_size=batch_size, repeated_aug=repeated_aug)
    with pytest.raises(ValueError, match="--batch-size") as error:
        build_loader(indices(count), True, args, 0, world_size)
    assert_one_line(error, f"{count} training images")


@pytest.mark.parametrize("repeated_aug", [False, True])
@pytest.mark.parametrize("world_size", [1, 4])
def test_one_global_batch_is_enough(repeated_aug, world_size):
    args = make_args(batch_size=8, repeated_aug=repeated_aug)
    assert len(build_loader(indices(8 * world_size), True, args, 0, world_size)) == 1


@pytest.mark.parametrize("is_train", [True, False])
def test_a_batch_of_nothing_is_refused(is_train):
    with pytest.raises(ValueError, match="--batch-size 0") as error:
        build_loader(indices(10), is_train, make_args(batch_size=0), 0, 1)
    assert_one_line(error)


AUGMENTED = {"train_crop": "random-resized", "hflip": 0.5, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5}


def images_of(args: Namespace, epoch: int = 0, first: int = 0, rank: int = 0, world_size: int = 1) -> torch.Tensor:
    loader = build_loader(build_dataset(True, args)[0], True, args, rank, world_size)
    loader.sampler.set_epoch(epoch, first)
    return torch.cat([images for images, _ in islice(loader, 128 // args.batch_size)])  # 128 images


@pytest.mark.parametrize("repeated_aug", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_is_augmented_by_its_place_alone_so_that_an_epoch_starts_anywhere(num_workers, repeated_aug):
    options = {**AUGMENTED, "aa": "rand-m5-inc1", "repeated_aug": repeated_aug}
    whole = images_of(make_args(**options, batch_size=64))
    seed_all(99)  # the process's own random state plays no part
    part = images_of(make_args(**options, batch_size=16, num_workers=num_workers), first=48)
    assert torch.equal(part[:80], whole[48:])
    assert not torch.equal(images_of(make_args(**options, batch_size=64), epoch=1), whole)
    assert not torch.equal(images_of(make_args(**options, batch_size=64, seed=1)), whole)


def test_two_processes_see_the_batches_of_one_with_the_same_augmentations():
    options = {**AUGMENTED, "aa": "rand-m5-inc1"}
    whole = images_of(make_args(**options, batch_size=16))
    halves = [images_of(make_args(**options, batch_size=8), rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1)[:128], whole)


class Counting(Dataset):
    """Counts which of its items are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.read.append(index)
        return index, 0


def test_images_before_the_start_and_beyond_the_last_update_are_not_read():
    dataset = Counting()
    loader = build_loader(
        Images(dataset, augment=lambda index: index), True, make_args(batch_size=4, accum_steps=2), 0, 1
    )
    assert len(loader) == 8  # of 4, which are 4 updates
    loader.sampler.set_epoch(0, 24)
    assert len(list(loader)) == 2
    assert len(dataset.read) == 8


def damage(folder: Path, split: str) -> list[Path]:
    """Damage a few images; returns which."""
    text, half, *_ = damaged = sorted((folder / split).rglob("*.png"))[1:4]
    text.write_text("no image")
    half.write_bytes(half.read_bytes()[:100])
    damaged[2].write_bytes(b"")
    return damaged


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_an_error_that_names_it_and_is_skipped_in_training_on_demand(tmp_path, num_workers):
    folder = make_folders(tmp_path, per_class=4)
    bad = {split: damage(folder, split) for split in ("train", "val")}
    args = folder_args(folder, batch_size=1, num_workers=num_workers, skip_bad_images=True)
    train, test = (build_loader(build_dataset(is_train, args)[0], is_train, args, 0, 1) for is_train in (True, False))
    assert len(list(train)) == len(train)
    assert train.num_skipped == len(bad["train"])
    with pytest.raises(UnreadableImageError) as error:
        list(test)
    assert_one_line(error, str(bad["val"][0]))
    args.skip_bad_images = False
    train = build_loader(build_dataset(True, args)[0], True, args, 0, 1)
    with pytest.raises(UnreadableImageError, match=r"\.png cannot be read as an image"):
        list(train)


class InterruptProbe(Dataset):
    """The images of another data set, labelled with whether the process that loads them ignores Ctrl-C."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, bool]:
        return self.images[index][0], signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_spawned_worker_loads_the_same_images_and_ignores_ctrl_c():
    args = make_args(batch_size=256)
    dataset, _ = build_dataset(False, args)
    probe = Images(InterruptProbe(dataset.cropped), dataset.augment, dataset.finish)
    here = build_loader(probe, False, args, 0, 1)
    args.num_workers = 1
    there = build_loader(probe, False, args, 0, 1)
    there.multiprocessing_context = "spawn"
    (images, ignored), (images_of_worker, ignored_by_worker) = next(iter(here)), next(iter(there))
    assert torch.equal(images, images_of_worker)
    assert not ignored.any()
    assert ignored_by_worker.all()


def _get_signal_then_be_ready(worker_id: int) -> None:
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    leave_signals_to_parent(worker_id)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_signal_to_a_worker_that_is_not_ready_yet_does_not_end_it(start_method):
    loader = build_loader(build_dataset(False, make_args())[0], False, make_args(num_workers=1), 0, 1)
    loader.multiprocessing_context = start_method
    loader.worker_init_fn = _get_signal_then_be_ready
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert sum(len(labels) for _, labels in loader) == 360
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize("train_crop", TRAIN_CROPS)
@pytest.mark.parametrize("is_train", [True, False])
def test_data_sets_can_be_sent_to_a_spawned_worker(tmp_path, is_train, train_crop):
    options = {**AUGMENTED, "train_crop": train_crop, "train_interpolation": "random"}
    for args in (make_args(**options), folder_args(make_folders(tmp_path), **options)):
        dataset, _ = build_dataset(is_train, args)
        loader = build_loader(dataset, is_train, args, 0, 1)
        received, init = pickle.loads(pickle.dumps((dataset, loader.worker_init_fn)))
        assert init is start_worker
        results = []
        for images in (dataset, received):
            seed_all(0)
            results.append(images[0][0])
        assert torch.equal(*results)


# ---- DeiT III


def test_the_simple_random_crop_is_a_crop_of_the_resized_image_with_reflected_borders():
    image = noise_image(24, 48)
    seed_all(0)
    transform = build_transform(True, make_args(src=True, train_crop="random-resized", train_interpolation="bilinear"))
    whole = np.asarray(image.resize((16, 32), Image.Resampling.BILINEAR), dtype=np.float32)
    padded = np.pad(whole, ((4, 4), (4, 4), (0, 0)), mode="reflect") / 255
    places = set()
    for _ in range(30):
        pixels = (transform(image) * 0.5 + 0.5).permute(1, 2, 0).numpy()
        fits = [
            (top, left)
            for top in range(40 - 16 + 1)
            for left in range(24 - 16 + 1)
            if np.allclose(padded[top : top + 16, left : left + 16], pixels, atol=1.5 / 255)
        ]
        assert len(fits) == 1
        places |= set(fits)
    assert len(places) > 10


def test_the_simple_random_crop_in_place_of_another_is_told(caplog):
    build_transform(True, make_args(src=True, train_crop="random-resized"))
    assert caplog.messages == []
    build_transform(True, make_args(src=True, train_crop="pad"))
    assert caplog.messages == ["--src takes the place of --train-crop pad"]


def test_the_scale_bounds_the_part_of_the_image_that_a_crop_takes(caplog):
    ramp = Image.fromarray(
        np.tile(np.arange(240, dtype=np.uint8)[None, :, None], (240, 1, 3))
    )  # 0 to 239, to the right
    transform = build_transform(True, make_args(train_crop="random-resized", scale=[0.25, 0.25], hflip=0.0))
    seed_all(0)
    for _ in range(20):
        pixels = (transform(ramp) * 0.5 + 0.5)[0, 0] * 255
        width = (pixels[-1] - pixels[0]).item() * len(pixels) / (len(pixels) - 1)
        assert 240 * (0.25 * 3 / 4) ** 0.5 - 8 < width < 240 * (0.25 * 4 / 3) ** 0.5 + 8
    assert caplog.messages == []
    build_transform(True, make_args(train_crop="pad", scale=[0.25, 0.5]))
    assert caplog.messages == ["--scale 0.25 0.5 is without effect: it is of --train-crop random-resized"]


@pytest.mark.parametrize("scale", [[0.5, 0.25], [0.0, 1.0]])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match="--scale"):
        build_transform(True, make_args(train_crop="random-resized", scale=scale))


def test_three_augment_makes_each_image_grey_solarised_or_blurred(caplog):
    image = noise_image(16, 16)
    seed_all(0)
    transform = build_transform(True, make_args(three_augment=True, aa="rand-m9"))
    assert "--three-augment takes the place of --aa rand-m9" in caplog.text
    original = np.asarray(image, dtype=np.float32)
    solarised = np.where(original < 128, original, 255 - original)
    kinds = Counter()
    for _ in range(60):
        pixels = ((transform(image) * 0.5 + 0.5) * 255).permute(1, 2, 0).numpy()
        is_grey = np.allclose(pixels[..., 0], pixels[..., 2], atol=1)
        is_solarised = np.allclose(pixels, solarised, atol=1)
        kinds["grey" if is_grey else "solarised" if is_solarised else "blurred"] += 1
        assert is_grey or is_solarised or pixels.std() < original.std()
    assert min(kinds[kind] for kind in ("grey", "solarised", "blurred")) > 8


def test_without_shared_evaluation_every_process_evaluates_all():
    for rank in range(2):
        assert seen(build_loader(indices(7), False, make_args(dist_eval=False), rank, 2)) == list(range(7))


# ---- iNaturalist


def make_inaturalist(root: Path, year: int) -> Path:
    """Three species of two families, named by the annotations as the real files do; image i is of grey level i."""
    species = [("Parus major", "Paridae"), ("Quercus robur", "Fagaceae"), ("Fagus sylvatica", "Fagaceae")]
    categories = [{"id": index, "name": name, "family": family} for index, (name, family) in enumerate(species)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "categories.json").write_text(json.dumps(categories))
    for split, labels, first in (("train", [2, 0, 1, 2], 0), ("val", [1, 2], 100)):
        images = [
            {"id": first + index, "file_name": f"train_val{year}/Some/{label}/{first + index}.png"}
            for index, label in enumerate(labels)
        ]
        annotations = [
            {"id": 7 + index, "image_id": first + index, "category_id": label} for index, label in enumerate(labels)
        ]
        for image in images:
            path = root / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (image["id"],) * 3).save(path)
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images[::-1], "annotations": annotations}))
    return root


@pytest.mark.parametrize(("data_set", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize(
    ("category", "classes", "train", "val"),
    [
        (None, ["Fagus sylvatica", "Parus major", "Quercus robur"], [0, 1, 2, 0], [2, 0]),
        ("family", ["Fagaceae", "Paridae"], [0, 1, 0, 0], [0, 0]),
    ],
)
def test_inaturalist_takes_its_splits_and_classes_from_the_annotations(
    data_set, year, category, classes, train, val, tmp_path
):
    root = make_inaturalist(tmp_path, year)
    args = make_args(data_set=data_set, data_path=str(root), inat_category=category)
    for is_train, labels, first in ((True, train, 0), (False, val, 100)):
        images, names = build_dataset(is_train, args)
        assert names == classes
        assert [label for _, label in images] == labels
        assert images.cropped.read_file is read_image
        levels = [round((image.mean().item() * 0.5 + 0.5) * 255) for image, _ in images]
        assert levels == list(range(first, first + len(labels)))


def test_inaturalist_has_the_fast_crop(tmp_path):
    args = make_args(data_set="INAT", data_path=str(make_inaturalist(tmp_path, 2018)), train_crop="random-resized")
    assert build_dataset(True, args)[0].cropped.read_file is read_pixels


def damage_inaturalist(kind: str, root: Path) -> None:
    match kind:
        case "no annotations":
            (root / "val2018.json").unlink()
        case "no image":
            (root / "train_val2018/Some/1/100.png").unlink()
        case "damaged":
            (root / "categories.json").write_text("[")
        case "other categories":
            (root / "categories.json").write_text(json.dumps([{"id": 5, "name": "x"}]))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no annotations", "val2018.json"),
        ("no image", "100.png"),
        ("damaged", "categories.json is damaged"),
        ("other categories", "do not fit together"),
    ],
)
def test_damaged_inaturalist_folders_are_refused_in_one_line(kind, words, tmp_path):
    root = make_inaturalist(tmp_path, 2018)
    damage_inaturalist(kind, root)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        build_dataset(False, make_args(data_set="INAT", data_path=str(root)))
    assert_one_line(error)


def test_a_category_is_one_of_inaturalist_only(tmp_path):
    root = make_inaturalist(tmp_path, 2018)
    with pytest.raises(ValueError, match="unknown --inat-category 'colour': choose from name, family"):
        build_dataset(False, make_args(data_set="INAT", data_path=str(root), inat_category="colour"))
    with pytest.raises(ValueError, match="--inat-category name means nothing to DIGITS"):
        build_dataset(False, make_args(inat_category="name"))
    with pytest.raises(ValueError, match="--data-path is missing"):
        build_dataset(False, make_args(data_set="INAT"))


def test_no_operation_of_a_policy_fails_at_any_strength() -> None:
    """DeiT's policy draws strengths up to 10, at which its posterize keeps no bit."""
    transform = build_transform(True, make_args(aa="rand-m10-n40-inc1"))
    random.seed(0)
    np.random.seed(0)
    for _ in range(10):
        assert transform(Image.new("RGB", (32, 32), (200, 100, 50))).isfinite().all()
