"""Tar files of images: shared out exactly, shuffled reproducibly, read on from any place; damage is one line."""

import io
import json
import pickle
import shutil
import tarfile
from argparse import Namespace
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import yaml
from PIL import Image
from tiny_run import call, load, log_of

import engine
from loading import shards
from loading.images import UnreadableImageError
from loading.loader import ImageLoader
from loading.shards import DamagedShardError, Shards
from tests.test_datasets import assert_one_line, build_dataset, build_loader, make_args
from tests.test_resume import ROOT, assert_same_run, at_update, python

LENGTHS = (3, 9, 5, 1, 7, 4, 8)  # 37 images in 7 shards
CLASSES = 3


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where counts are kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "shards"


def encoded(pixels: np.ndarray, suffix: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_shards(folder: Path, split: str = "train", lengths: tuple[int, ...] = LENGTHS) -> str:
    """Shards of grey images, each as light as its number; returns their pattern."""
    number = 0
    for shard, length in enumerate(lengths):
        files = {}
        for _ in range(length):
            files[f"{number:03}.png"] = encoded(np.full((8, 8, 3), number, dtype=np.uint8))
            files[f"{number:03}.cls"] = str(number % CLASSES).encode()
            files[f"{number:03}.json"] = b"{}"
            number += 1
        write_tar(folder / f"{split}-{shard:02}.tar", files)
    return f"{folder}/{split}-{{00..{len(lengths) - 1:02}}}.tar"


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    paths = {"data_path": make_shards(tmp_path / "s"), "eval_data_path": make_shards(tmp_path / "s", "val")}
    return make_args(data_set="WDS", input_size=8, **paths)


def changed(args: Namespace, **changes: object) -> Namespace:
    return Namespace(**{**vars(args), **changes})


def loader_of(args: Namespace, is_train: bool, rank: int = 0, world_size: int = 1, block: int = 6) -> ImageLoader:
    """A loader whose workers shuffle so few images that there are several blocks."""
    loader = build_loader(build_dataset(is_train, args)[0], is_train, args, rank, world_size)
    loader.dataset.block = block  # type: ignore[attr-defined]
    return loader


def batches(loader: ImageLoader, epoch: int = 0, first: int = 0) -> list[list[int]]:
    """The numbers of the images, whose labels are checked."""
    loader.set_epoch(epoch, first)
    found = []
    for images, labels in loader:
        numbers = (images[:, 0, 4, 4] * 127.5 + 127.5).round().long()
        assert torch.equal(numbers % CLASSES, labels)
        found.append(numbers.tolist())
    return found


def seen(loader: ImageLoader, epoch: int = 0, first: int = 0) -> list[int]:
    return list(chain(*batches(loader, epoch, first)))


# ---- exact shares


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_exactly_once_over_all_processes(args, world_size, num_workers):
    args = changed(args, num_workers=num_workers)
    loaders = [loader_of(args, False, rank, world_size) for rank in range(world_size)]
    found = [batches(loader) for loader in loaders]
    assert sorted(chain(*chain(*found))) == list(range(37))
    assert [len(process) for process in found] == [len(loader) for loader in loaders]
    assert all(len(batch) == 6 for process in found for batch in process[:-1])
    assert {loader.num_images for loader in loaders} == {37}


def test_without_shared_evaluation_every_process_sees_all(args):
    args = changed(args, dist_eval=False)
    assert [sorted(seen(loader_of(args, False, rank, 9))) for rank in range(2)] == [list(range(37))] * 2


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 1), (0, 4), (2, 4)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_is_in_equally_many_full_batches_and_shows_no_image_twice_in_an_epoch(
    args, world_size, num_workers, batch_size
):
    args = changed(args, num_workers=num_workers, batch_size=batch_size, accum_steps=2 if batch_size > 1 else 1)
    loaders = [loader_of(args, True, rank, world_size) for rank in range(world_size)]
    found = [batches(loader) for loader in loaders]
    number = 37 // world_size // 8 * 2 if batch_size > 1 else 37 // world_size
    assert [len(loader) for loader in loaders] == [len(process) for process in found] == [number] * world_size
    assert {len(batch) for process in found for batch in process} == {batch_size}
    assert max(Counter(chain(*chain(*found))).values()) == 1


def test_every_image_is_shown_in_some_epoch(args):
    loader = loader_of(changed(args, batch_size=30), True)
    assert set(chain(*(seen(loader, epoch) for epoch in range(10)))) == set(range(37))


# ---- order and augmentation


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_depends_on_seed_and_epoch_and_is_reproducible(args, num_workers):
    args = changed(args, num_workers=num_workers, seed=3)
    reference = seen(loader_of(args, True), 5)
    torch.manual_seed(99)  # the process's own random state plays no part
    assert seen(loader_of(args, True), 5) == reference
    assert seen(loader_of(args, True), 6) != reference
    assert seen(loader_of(changed(args, seed=4), True), 5) != reference
    assert seen(loader_of(args, True)) == seen(loader_of(args, True), 0)


def test_a_stream_can_be_sent_to_a_spawned_worker(args):
    loader = loader_of(args, True)
    loader.set_epoch(2, 8)
    sent = pickle.loads(pickle.dumps(loader.dataset))
    assert all(one == other for one, other in zip(loader.dataset, sent, strict=True))


def test_images_are_shuffled_within_and_across_shards(args):
    order = seen(loader_of(args, True, block=20))
    neighbours = sum(after == before + 1 for before, after in pairwise(order))
    assert neighbours < 8
    shard = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    assert sum(shard[after] != shard[before] for before, after in pairwise(order)) > 18


def test_each_block_is_shuffled_in_its_own_way(args, tmp_path):
    args = changed(args, data_path=make_shards(tmp_path / "one", lengths=(36,)))
    order = seen(loader_of(args, True, block=12))
    blocks = [order[first : first + 12] for first in (0, 12, 24)]
    assert [sorted(block) for block in blocks] == [list(range(first, first + 12)) for first in (0, 12, 24)]
    assert len({tuple(number % 12 for number in block) for block in blocks}) == 3


AUGMENTED = {"train_crop": "random-resized", "hflip": 0.5, "reprob": 0.5}


@pytest.mark.parametrize("repeated_aug", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_epoch_starts_anywhere_with_the_same_images_and_augmentations(args, num_workers, repeated_aug):
    args = changed(args, **AUGMENTED, num_workers=num_workers, repeated_aug=repeated_aug, batch_size=3)
    loader = loader_of(args, True, block=4)
    loader.set_epoch(1)
    whole = [images for images, _ in loader]
    for done in (1, 5, 10, 11, 12):
        loader.set_epoch(1, 3 * done)
        rest = [images for images, _ in loader]
        assert len(rest) == len(whole) - done
        assert torch.equal(torch.cat([*rest, whole[0]]), torch.cat([*whole[done:], whole[0]]))


def test_each_place_is_augmented_anew_in_each_epoch(args):
    loader = loader_of(changed(args, reprob=0.5, batch_size=37), True)
    erased = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        (images, _) = next(iter(loader))
        erased.append((images.flatten(1).std(dim=1) > 0).tolist())
    assert 0 < sum(erased[0]) < 37
    assert erased[0] != erased[1]


@pytest.mark.parametrize("world_size", [1, 3])
def test_repeated_augmentation_shows_a_third_of_the_images_three_times_in_a_row(args, world_size):
    args = changed(args, repeated_aug=True, batch_size=6, reprob=0.9)
    for rank in range(world_size):
        loader = loader_of(args, True, rank, world_size)
        images = torch.cat([images for images, _ in loader])
        assert len(images) == 37 // world_size // 6 * 6
        triples = images.unflatten(0, (-1, 3))
        assert not torch.equal(triples[:, 0], triples[:, 1])
        numbers = seen(loader_of(changed(args, reprob=0.0), True, rank, world_size))
        assert numbers == [number for number in numbers[::3] for _ in range(3)]
        assert len(set(numbers)) == len(numbers) // 3


def test_shards_before_the_place_are_not_opened(args, monkeypatch):
    opened: list[int] = []
    read = Shards._read
    monkeypatch.setattr(
        Shards, "_read", lambda self, number, *place: opened.append(number) or read(self, number, *place)
    )
    loader = loader_of(args, True, block=1)
    order = seen(loader)
    all_opened = opened[:]
    opened.clear()
    assert seen(loader, first=32) == order[32:]
    assert opened == all_opened[-len(opened) :]
    assert len(opened) <= 2


@pytest.mark.parametrize(("is_train", "fast_crop"), [(False, None), (True, None), (True, False)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_those_of_a_folder(tmp_path, suffix, is_train, fast_crop):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    content = encoded(pixels, suffix)
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", {f"a.{suffix.upper()}": content, "a.cls": b" 0\n"})
        (tmp_path / split / "class").mkdir(parents=True)
        (tmp_path / split / "class" / f"a.{suffix}").write_bytes(content)
    options = {"train_crop": "random-resized", "fast_crop": fast_crop, "batch_size": 1, "input_size": 64}
    paths = {"data_path": f"{tmp_path}/train.tar", "eval_data_path": f"{tmp_path}/val.tar"}
    images = []
    for args in (
        make_args(data_set="WDS", **paths, **options),
        make_args(data_set="FOLDER", data_path=str(tmp_path), **options),
        make_args(data_set="FOLDER", data_path=str(tmp_path), **{**options, "fast_crop": False}),
    ):
        images.append(next(iter(build_loader(build_dataset(is_train, args)[0], is_train, args, 0, 1)))[0])
    assert torch.equal(images[0], images[1])
    is_fast = is_train and fast_crop is None and suffix == "jpg"
    assert torch.equal(images[1], images[2]) is not is_fast


def test_a_truncated_jpeg_is_the_same_error_with_and_without_the_fast_crop(tmp_path):
    content = encoded(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8), "jpg")[:-500]
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", {"a.jpg": content, "a.cls": b"0"})
    paths = {"data_path": f"{tmp_path}/train.tar", "eval_data_path": f"{tmp_path}/val.tar"}
    messages = []
    for fast_crop in (True, False):
        args = make_args(data_set="WDS", **paths, train_crop="random-resized", batch_size=1, fast_crop=fast_crop)
        with pytest.raises(UnreadableImageError) as error:
            next(iter(build_loader(build_dataset(True, args)[0], True, args, 0, 1)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert_one_line(error, "a.jpg", "train.tar", "truncated")


# ---- classes and counts


def test_classes_are_as_many_as_the_labels_of_both_splits_ask_for(tmp_path, args, caplog):
    image = encoded(np.zeros((8, 8, 3), dtype=np.uint8))
    write_tar(tmp_path / "more.tar", {"a.png": image, "a.cls": b"4"})
    args = changed(args, eval_data_path=f"{tmp_path}/more.tar")
    assert [build_dataset(is_train, args)[1] for is_train in (True, False)] == [[*"01234"]] * 2
    assert "2 of 5 classes have no image to train" in caplog.text


def test_a_known_number_of_classes_needs_no_training_shards_and_bounds_the_labels(args):
    args = changed(args, data_path=None, num_classes=5)
    assert build_dataset(False, args)[1] == [*"01234"]
    with pytest.raises(ValueError, match="holds labels up to 2, but there are 2 classes") as error:
        build_dataset(False, changed(args, num_classes=2))
    assert_one_line(error, "--eval-data-path")


def test_images_are_counted_once_and_again_when_a_shard_has_changed(args, monkeypatch, kept):
    build_dataset(True, args)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_count", lambda path: pytest.fail("counted again"))
        assert len(build_dataset(True, args)[0]) == 37
    shard = Path(args.data_path.replace("{00..06}", "01"))
    with tarfile.open(shard) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive.getmembers()[:6]}
    write_tar(shard, files)
    assert len(build_dataset(True, args)[0]) == 37 - 9 + 2


def test_counts_that_cannot_be_kept_are_told_and_used(args, kept, caplog):
    kept.parent.mkdir(parents=True)
    kept.write_text("a file")
    assert len(build_dataset(True, args)[0]) == 37
    assert "the count of images is not kept" in caplog.text


# ---- what is refused


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_few_shards_are_refused_with_the_numbers(args, is_train, num_workers):
    args = changed(args, num_workers=num_workers, batch_size=1)
    world_size = 8 if num_workers == 0 else 4
    with pytest.raises(ValueError, match="too few") as error:
        build_loader(build_dataset(is_train, args)[0], is_train, args, 0, world_size)
    workers = max(1, num_workers)
    assert_one_line(error, "7 shards", f"{world_size} process(es) with {workers} worker(s)", "--num-workers")
    assert build_loader(build_dataset(is_train, args)[0], is_train, args, 0, world_size - 1)


def test_a_training_set_smaller_than_one_update_is_refused(args):
    with pytest.raises(ValueError, match="--batch-size"):
        loader_of(changed(args, batch_size=19), True, 0, 2)


@pytest.mark.parametrize("flag", ["--data-path", "--eval-data-path"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (None, ["is missing", "train-{0000..0099}.tar"]),
        ("absent/train-{00..04}.tar", ["no shard absent/train-00.tar (5 of 5 are missing)"]),
        ("folder", ["no shard"]),
    ],
)
def test_a_pattern_without_files_is_refused(args, flag, pattern, words, tmp_path):
    pattern = str(tmp_path) if pattern == "folder" else pattern
    args = changed(args, **{flag.strip("-").replace("-", "_"): pattern})
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        build_dataset(flag == "--data-path", args)
    assert_one_line(error, flag, *words)


PIXELS = encoded(np.zeros((8, 8, 3), dtype=np.uint8))
BAD_SHARDS = {
    "without a label": {"a.png": PIXELS, "b.png": PIXELS, "b.cls": b"0"},
    "without an image": {"a.cls": b"0"},
    "with two images": {"a.png": PIXELS, "a.jpg": PIXELS, "a.cls": b"0"},
    "with a name for a label": {"a.png": PIXELS, "a.cls": b"cat"},
    "with a negative label": {"a.png": PIXELS, "a.cls": b"-1"},
    "with a file twice": {"a.png": PIXELS, "a.PNG": PIXELS, "a.cls": b"0"},
    "with an image of another ending": {"a.bmp": PIXELS, "a.cls": b"0"},
}
DOTTED = {
    "beside another": {"x0.png": PIXELS, "x0.cls": b"0", "x0.copy.png": PIXELS, "x0.copy.cls": b"1"},
    "alone": {"x0.copy.png": PIXELS, "x0.copy.cls": b"1"},
    "in a folder": {"a.b/x0.copy.PNG": PIXELS, "a.b/x0.copy.CLS": b"1"},
}


@pytest.mark.parametrize("files", DOTTED.values(), ids=DOTTED)
def test_an_image_that_webdataset_takes_for_a_part_of_another_is_refused_by_name(args, files):
    bad = write_tar(Path(args.data_path.replace("{00..06}", "02")), files)
    with pytest.raises(DamagedShardError, match="a name ends at its first dot") as error:
        build_dataset(True, args)
    assert_one_line(error, f"x0.copy.png of shard {bad} has a label of its own", "x0_copy.png")


def test_images_that_are_left_out_are_counted_in_the_log(args, tmp_path, caplog):
    lights = [encoded(np.full((8, 8, 3), number, dtype=np.uint8)) for number in (0, 1)]
    labelled = {
        "0.png": lights[0],
        "0.cls": b"0",
        "0.seg.png": PIXELS,
        "0.txt": b"",
        "d/1.png": lights[1],
        "d/1.cls": b"1",
    }
    left_out = {"._0.png": b"", "d/._1.png": b"", "._1.cls": b"", "__MACOSX/._0.png": b"", "__meta__/a.png": PIXELS}
    pattern = str(write_tar(tmp_path / "val.tar", {**left_out, **labelled, "e.tif": PIXELS}))
    for _ in ("counted", "kept"):
        caplog.clear()
        with caplog.at_level("INFO"):
            loader = loader_of(changed(args, eval_data_path=pattern), False)
        assert seen(loader) == [0, 1]
        (line,) = [message for message in caplog.messages if "left out" in message]
        assert f"{pattern}: 6 files of images" in line
        assert all(name in line for name in ("._0.png", "d/._1.png", "__MACOSX/._0.png", "__meta__/a.png", "0.seg.png"))


def test_a_count_by_other_rules_is_not_used(args, monkeypatch):
    build_dataset(True, args)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "RULES", shards.RULES + 1)
        patch.setattr(shards, "_count", lambda path: (1, {0}, []))
        assert len(build_dataset(True, args)[0]) == len(LENGTHS)


@pytest.mark.parametrize("kind", [*BAD_SHARDS, "truncated", "text", "empty"])
def test_a_bad_shard_is_named_before_training(args, kind):
    bad = Path(args.data_path.replace("{00..06}", "02"))
    if kind in BAD_SHARDS:
        write_tar(bad, BAD_SHARDS[kind])
    else:
        content = bad.read_bytes()
        bad.write_bytes({"truncated": content[:3000], "text": b"no tar file" * 99, "empty": b""}[kind])
    with pytest.raises(DamagedShardError) as error:
        build_dataset(True, args)
    assert_one_line(error, f"shard {bad}")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_come_from_a_command_as_from_files(args, num_workers):
    args = changed(args, num_workers=num_workers)
    piped = changed(args, data_path=f"pipe:cat {args.data_path}", eval_data_path=f"pipe:cat {args.eval_data_path}")
    assert seen(loader_of(piped, False)) == seen(loader_of(args, False))
    assert seen(loader_of(piped, True), 1, 12) == seen(loader_of(args, True), 1, 12)


@pytest.mark.parametrize("url", ["pipe:cat /absent-{0..1}.tar 2> /dev/null", "s3://absent/{0..1}.tar"])
def test_a_shard_that_cannot_be_fetched_is_named(args, url):
    with pytest.raises(DamagedShardError) as error:
        build_dataset(True, changed(args, data_path=url))
    assert_one_line(error, f"shard {url.replace('{0..1}', '0')} cannot be read")


def test_shards_without_images_are_refused(args, tmp_path):
    write_tar(tmp_path / "none.tar", {"a.txt": b""})
    with pytest.raises(FileNotFoundError, match="no image in --eval-data-path"):
        build_dataset(False, changed(args, eval_data_path=f"{tmp_path}/none.tar"))


def test_a_path_of_test_shards_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="--eval-data-path x means nothing to DIGITS"):
        build_dataset(True, make_args(eval_data_path="x"))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["shorter", "longer", "truncated"])
def test_a_shard_that_changes_after_it_was_counted_ends_the_epoch_in_one_line(args, num_workers, kind):
    loader = loader_of(changed(args, num_workers=num_workers, skip_bad_images=True, batch_size=37), True)
    bad = Path(args.data_path.replace("{00..06}", "02"))
    files = {
        f"{number}.{suffix}": PIXELS if suffix == "png" else b"0" for number in range(6) for suffix in ("png", "cls")
    }
    write_tar(bad, dict(list(files.items())[: {"shorter": 4, "longer": 12, "truncated": 10}[kind]]))
    if kind == "truncated":
        bad.write_bytes(bad.read_bytes()[:3000])
    with pytest.raises(DamagedShardError) as error:
        list(loader)
    assert_one_line(error, f"shard {bad}", "cannot be read" if kind == "truncated" else "has changed")
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_an_error_that_names_it_and_is_skipped_in_training_on_demand(args, num_workers):
    half = encoded(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))[:150]
    for split in ("train", "val"):
        files = {"x.png": half, "x.cls": b"0", "y.png": b"", "y.cls": b"0", "z.png": PIXELS, "z.cls": b"0"}
        write_tar(Path(args.data_path.replace("train-{00..06}", f"{split}-04")), files)
    args = changed(args, num_workers=num_workers, skip_bad_images=True, batch_size=1)
    train = loader_of(args, True)
    assert len(list(train)) == len(train) == 33
    assert train.num_skipped == 2
    for is_train in (True, False):
        with pytest.raises(UnreadableImageError) as error:
            list(loader_of(changed(args, skip_bad_images=not is_train), is_train))
        assert_one_line(error, ".png of shard", "cannot be read as an image")
        assert "Traceback" not in str(error.value)


# ---- runs


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """To train on shards with the images of a folder, 12 updates an epoch."""
    folder = tmp_path_factory.mktemp("shards")
    images = tiny_run.make_images(folder / "images", num_val=7)
    for split, count in (("train", 5), ("val", 3)):
        paths = sorted((images / split).rglob("*.png"))
        for shard in range(count):
            files = {}
            for path in paths[shard::count]:
                label = tiny_run.CLASSES.index(path.parent.name)
                files |= {path.name: path.read_bytes(), f"{path.stem}.cls": str(label).encode()}
            write_tar(folder / f"{split}-{shard}.tar", files)
    paths = ("--data-path", f"{folder}/train-{{0..4}}.tar", "--eval-data-path", f"{folder}/val-{{0..2}}.tar")
    (folder / "tiny.yaml").write_text(tiny_run.RECIPE)
    return ("--recipe", folder / "tiny.yaml", "--data-set", "WDS", *paths, "--batch-size", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, command: tuple[object, ...]) -> Path:
    """The folder of a run; to be left as it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder.with_name("torch")))
        assert call(*command, "--epochs", 1, "--num-workers", 0, "--output_dir", folder) == 0
    return folder


def test_a_run_on_shards_stopped_in_mid_epoch_equals_one_that_was_not_and_evaluates_as_on_folders(
    tmp_path: Path,
    command: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = (*command, "--num-workers", 2, "--reprob", 0.5, "--checkpoint-steps", 5, "--auto-resume", "--output_dir")
    assert call(*flags, whole) == 0

    def stop() -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_update", at_update(12 + 8, stop))
        with pytest.raises(SystemExit):
            call(*flags, parts)
    shutil.copytree(parts, tmp_path / "others")
    capsys.readouterr()
    assert call(*flags, parts) == 0
    assert "may repeat images" not in capsys.readouterr().out
    assert_same_run(parts, whole)
    assert call(*flags, tmp_path / "others", "--num-workers", 1) == 0
    assert "the rest of epoch 2 may repeat images and skip others" in capsys.readouterr().out

    folder = Path(str(command[1])).parent / "images"
    evaluate = ("--eval", "--resume", whole / "checkpoint.pth", "--output_dir")
    assert call(*evaluate, tmp_path / "shards") == 0
    assert call(*evaluate, tmp_path / "folder", "--data-set", "FOLDER", "--data-path", folder) == 0
    ours, theirs = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("shards", "folder"))
    assert ours == {**theirs, "loss": pytest.approx(theirs["loss"], abs=1e-6)}
    assert ours["count"] == 7


def test_two_processes_train_on_shards_together_and_evaluate_exactly(
    tmp_path: Path, command: tuple[object, ...]
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    flags = (*command, "--epochs", 1, "--num-workers", 1, "--output_dir", tmp_path / "two")
    process = python(*launcher, ROOT / "main.py", *flags)
    assert process.returncode == 0, process.stderr
    assert "8 images per update, 6 updates and 48 different images per epoch" in process.stdout
    assert process.stdout.count("counting the images in 5 shards") == 1
    (row,) = log_of(tmp_path / "two")
    assert call("--eval", "--resume", tmp_path / "two" / "checkpoint.pth", "--output_dir", tmp_path / "eval") == 0
    alone = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert row["test_acc1"] == alone["acc1"]
    assert row["test_loss"] == pytest.approx(alone["loss"], abs=1e-6)


def test_a_damaged_shard_ends_a_run_in_one_line(
    tmp_path: Path, command: tuple[object, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = make_shards(tmp_path, lengths=(20, 20))
    bad = tmp_path / "train-00.tar"

    def damage() -> None:
        write_tar(bad, {"a.png": PIXELS, "a.cls": b"0"})

    monkeypatch.setattr(engine, "_update", at_update(10, damage))
    assert call(*command, "--num-workers", 0, "--data-path", pattern) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"main.py: error: shard {bad} has changed since its images were counted: start again"


@pytest.mark.parametrize("pattern", ["pipe:touch {}", "{}.tar::pipe:touch {}", "{{p,}}ipe:touch {}"])
@pytest.mark.parametrize("name", ["data_path", "eval_data_path"])
@pytest.mark.parametrize("source", ["--resume", "--recipe"])
def test_a_checkpoint_or_a_recipe_runs_no_command(
    tmp_path: Path,
    command: tuple[object, ...],
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    pattern: str,
    name: str,
    source: str,
) -> None:
    pattern = pattern.format(*[tmp_path / "touched"] * 2)
    if source == "--resume":
        checkpoint = load(finished / "checkpoint.pth")
        checkpoint["config"][name] = pattern
        path = tmp_path / "evil.pth"
        torch.save(checkpoint, path)
    else:
        path = tmp_path / "evil.yaml"
        config = {**yaml.safe_load((finished / "config.yaml").read_text()), name: pattern}
        path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert call(source, path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a command is run only if the command line has it" in line
    assert not (tmp_path / "touched").exists()
