"""Images in tar files ("shards", as webdataset writes them), each read from its start to its end.

webdataset reads the files. How they are shared out is our own, as no rule of webdataset's, and so of timm's reader, is
exact: a process gets whole shards, and images are repeated or left out so that all processes have equally many. Here
the shards, in an order that seed and epoch decide, are one sequence of images, and every worker of every process reads
a part of it that begins and ends at any image. So evaluation sees each image once, an epoch of training none twice, and
all processes take the same number of steps. To shuffle, a worker reads `BLOCK` images ahead.

The order depends on the numbers of processes and of workers. An image's augmentation depends on its place alone.
"""

import hashlib
import json
import math
import re
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from loading.classes import first_few
from loading.images import Crop, ImageSettings, Reader, Sample, UnreadableImageError, image_endings, one_line
from runtime.distributed import in_turns
from runtime.files import atomic_write
from runtime.seeding import CROP, seed_everything

_logger = getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
LABEL_SUFFIX = "cls"
BLOCK = 1000
"""Images that a worker shuffles among one another; it holds up to two blocks in memory, as they are in the files."""
METADATA = re.compile(r"__[^/]*__($|/)")
"""What webdataset passes over."""
READERS = 8
"""Threads that count images."""
RULES = 2
"""Version of the rules by which images are counted: what was counted by others is counted again."""


class DamagedShardError(ValueError):
    """A tar file that cannot be read to its end, or holds what it should not; the message names it."""


@dataclass(frozen=True)
class Contents:
    """What shards hold: the number of images of each, and the labels of all; and what files of images are left out."""

    lengths: list[int]
    labels: list[int]
    num_left_out: int
    left_out: str  # the names of a few


class Shards(Dataset):
    """Images and labels in tar files, one after the other; `ShardStream` reads them.

    Args:
        urls: of the files: paths, or what else webdataset opens, such as `https:` URLs or `pipe:` and a command.
        crop: of what `read_file` reads.
        read_file: the bytes of an image's file, and its name for errors -> what `crop` takes.

    Raises:
        DamagedShardError: a file is not as it should be.
    """

    def __init__(self, urls: Sequence[str], crop: Crop, read_file: Reader) -> None:
        self.urls = list(urls)
        self.crop = crop
        self.read_file = read_file
        contents = find_contents(self.urls)
        self.lengths, self.labels = contents.lengths, contents.labels
        if contents.num_left_out:
            _logger.info(
                "%s: %d files of images are left out, as they are hidden, parts of another image, or none of %s: %s",
                first_few(self.urls, 1),
                contents.num_left_out,
                ", ".join(IMAGE_SUFFIXES),
                contents.left_out,
            )

    def __len__(self) -> int:
        return sum(self.lengths)

    def read(self, order: Iterable[int], start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The images from `start` to `stop` of the sequence that the shards make in this order, not yet decoded.

        Shards before `start` are not opened; in its own, the images before it are read over.
        """
        begin = 0
        for number in order:
            length = self.lengths[number]
            first, last = max(start - begin, 0), min(stop - begin, length)
            if first < last:
                yield from self._read(number, first, last)
            begin += length

    def _read(self, number: int, first: int, last: int) -> Iterator[dict[str, Any]]:
        url, length = self.urls[number], self.lengths[number]
        count = 0
        try:
            with webdataset.gopen(url) as stream:
                source = {"url": url, "stream": stream}
                for sample in group_by_keys(tar_file_expander([source], select_files=_is_part)):
                    count += 1
                    if first < count <= last:
                        yield sample
                    if count == last < length:
                        return
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DamagedShardError(f"shard {url} cannot be read: {_first_argument(error)}") from error
        if count != length:
            raise DamagedShardError(f"shard {url} has changed since its images were counted: start again")


def _is_part(name: str) -> bool:
    """Whether to read a file: an image or a label that is not hidden, nor one of those that webdataset passes over."""
    if METADATA.match(name) or name.rpartition("/")[2].startswith("."):
        return False
    return name.rpartition(".")[2].lower() in (*IMAGE_SUFFIXES, LABEL_SUFFIX)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in image_endings()


def _first_argument(error: Exception) -> str:
    """An error's own message: webdataset adds what it was about, as further arguments."""
    return one_line(error) if not error.args or isinstance(error, OSError) else " ".join(str(error.args[0]).split())


# ---- which shards, and what they hold


def open_shards(
    is_train: bool,
    data_path: str | None,
    crop: Crop,
    read_file: Reader,
    eval_data_path: str | None,
    num_classes: int | None,
) -> tuple[Shards, list[str]]:
    """The images to train or to test with, and their classes, which are numbers.

    Args:
        data_path, eval_data_path: patterns of the shards to train and to test with.
        num_classes: of a checkpoint; without one, as many as the labels ask for, be they of train or test.

    Raises:
        FileNotFoundError: no such shards, or no image in them.
        ValueError: no pattern, a damaged shard, or labels that there is no class for.
    """
    patterns = {"--data-path": data_path, "--eval-data-path": eval_data_path}
    flag = "--data-path" if is_train else "--eval-data-path"
    images = Shards(find_shards(flag, patterns[flag]), crop, read_file)
    if not len(images):
        raise FileNotFoundError(f"no image in {flag} {patterns[flag]}")
    labels = {*images.labels}
    if num_classes is None:
        (other,) = patterns.keys() - {flag}
        labels.update(find_contents(find_shards(other, patterns[other])).labels)
    classes = [str(label) for label in range(num_classes or max(labels) + 1)]
    if max(labels) >= len(classes):
        raise ValueError(
            f"{flag} {patterns[flag]} holds labels up to {max(labels)}, but there are {num_classes} classes"
        )
    if is_train and len(images.labels) < len(classes):
        _logger.warning("%d of %d classes have no image to train", len(classes) - len(images.labels), len(classes))
    return images, classes


def find_shards(flag: str, pattern: str | None) -> list[str]:
    """The files that a pattern such as `shards/train-{0000..0099}.tar` names: paths, or what else webdataset opens.

    Raises:
        FileNotFoundError: a file of this machine is not there.
        ValueError: no pattern.
    """
    example = "such as 'shards/train-{0000..0099}.tar'"
    if pattern is None:
        raise ValueError(f"{flag} is missing: WDS needs a pattern of tar files for it, {example}")
    urls = [url if is_remote(url) else str(Path(url).expanduser()) for url in _expand(pattern)]
    if missing := [url for url in urls if not is_remote(url) and not Path(url).is_file()]:
        raise FileNotFoundError(
            f"no shard {missing[0]} ({len(missing)} of {len(urls)} are missing): {flag} takes a pattern of tar files, "
            f"{example}"
        )
    return urls


def runs_commands(pattern: str) -> bool:
    """Whether to read these shards is to run commands, which webdataset hands to the shell."""
    return any(url.startswith("pipe:") for url in _expand(pattern))


def _expand(pattern: str) -> list[str]:
    return [source["url"] for source in webdataset.SimpleShardList(pattern)]


def is_remote(url: str) -> bool:
    return re.match(r"[A-Za-z]\w+:", url) is not None


def find_contents(urls: Sequence[str]) -> Contents:
    """Count the images of shards; once, as the result is kept beside torch's downloads.

    Of a file of this machine only the headers are read, while any other shard has to come here whole.

    Raises:
        DamagedShardError: a shard is no tar file, or an image is not beside a label, a whole number from 0 on.
    """
    digest = hashlib.sha256(json.dumps([RULES, *(_identity(url) for url in urls)]).encode()).hexdigest()
    kept = Path(torch.hub.get_dir()) / "shards" / f"{digest}.json"
    with in_turns():  # so that all but the first find what it has kept
        if kept.is_file():
            return Contents(**json.loads(kept.read_text()))
        _logger.info("counting the images in %d shards; the result is kept in %s", len(urls), kept)
        with ThreadPoolExecutor(READERS) as threads:
            counted = list(threads.map(_count, urls))
        lengths, labels, left_out = zip(*counted, strict=True)
        names = list(chain(*left_out))
        contents = Contents([*lengths], sorted(set().union(*labels)), len(names), first_few(names))
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept) as file:
                file.write(json.dumps(asdict(contents)).encode())
        except OSError as error:
            _logger.warning("the count of images is not kept, and will be made again: %s", error)
    return contents


def _identity(url: str) -> tuple[str | int, ...]:
    """What changes when a shard does, as far as can be told without reading it."""
    if is_remote(url):
        return (url,)
    path = Path(url).resolve()
    return (str(path), path.stat().st_size, path.stat().st_mtime_ns)


def _count(url: str) -> tuple[int, set[int], list[str]]:
    """The number of images in a shard, their labels, and the names of images that are left out."""
    left_out: list[str] = []

    def parts(archive: tarfile.TarFile) -> Iterator[dict[str, Any]]:
        for member in filter(tarfile.TarInfo.isreg, archive):
            if _is_part(member.name):
                yield {"fname": member.name, "data": _label_in(archive, member), "__url__": url}
            elif _is_image(member.name):
                left_out.append(member.name)

    labels = []
    try:
        with (
            webdataset.gopen(url) as stream,
            tarfile.open(fileobj=stream, mode="r|*" if is_remote(url) else "r") as tar,
        ):
            for sample in group_by_keys(parts(tar)):
                labels.append(_label_of(sample))
                left_out += [f"{sample['__key__']}.{suffix}" for suffix in _further_images(sample)]
    except DamagedShardError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DamagedShardError(f"shard {url} cannot be read: {_first_argument(error)}") from error
    return len(labels), set(labels), left_out


def _label_in(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) if member.name.lower().endswith(f".{LABEL_SUFFIX}") else None
    return b"" if file is None else file.read()


def _further_images(sample: dict[str, Any]) -> list[str]:
    """The endings of a sample's other images from their first dot on, as `seg.png` of `x.seg.png` beside `x.jpg`."""
    return [suffix for suffix in sample if "." in suffix and suffix.rpartition(".")[2] in IMAGE_SUFFIXES]


def _label_of(sample: dict[str, Any]) -> int:
    key, url = sample["__key__"], sample["__url__"]
    for suffix in _further_images(sample):
        stem, _, ending = suffix.rpartition(".")
        if f"{stem}.{LABEL_SUFFIX}" in sample:
            raise DamagedShardError(
                f"{key}.{suffix} of shard {url} has a label of its own, but for webdataset it is a part of {key}, as a "
                f"name ends at its first dot: call it {key}_{stem.replace('.', '_')}.{ending}, and its label alike"
            )
    suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix in sample]
    text = sample.get(LABEL_SUFFIX, b"").strip()
    if len(suffixes) != 1 or not re.fullmatch(rb"\d+", text):
        raise DamagedShardError(
            f"{key} of shard {url} is no labelled image: it must be one file of {', '.join(IMAGE_SUFFIXES)} and one of "
            f"{LABEL_SUFFIX}, with the number of the class, and nothing but the ending after the first dot of its name"
        )
    return int(text)


# ---- reading them


class ShardStream(IterableDataset):
    """One process's share of an epoch, from any place on, for a loader of any number of workers.

    An item is a `Sample`; or an error, again and again: what a worker raises comes with that worker's traceback in its
    message.

    Args:
        begin: this process's first image in the sequence of all.
        num_images: that this process shows, repeated ones counted.
        batch_size: of the loader; its batches are full, except for the last.
        repeats: how often each image is shown, one time after the other.
        shuffles: whether `seed` and the epoch decide the order; else it is that of the files.
        seed: of order and crops.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        begin: int,
        num_images: int,
        batch_size: int,
        repeats: int = 1,
        shuffles: bool,
        seed: int,
    ) -> None:
        self.shards = shards
        self.begin = begin
        self.num_images = num_images
        self.batch_size = batch_size
        self.repeats = repeats
        self.shuffles = shuffles
        self.seed = seed
        self.block = BLOCK
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Yield the images of `epoch` without this process's `first`, which fill whole batches.

        A worker reads over up to a shard and a block of those; it opens no other shard before its place, and decodes
        none of them.
        """
        self.epoch = epoch
        self.first = first

    def __len__(self) -> int:
        return self.num_images  # of the whole epoch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        try:
            yield from self._part(0, 1) if worker is None else self._part(worker.id, worker.num_workers)
        except (DamagedShardError, UnreadableImageError) as error:
            yield from repeat(error)

    def _part(self, worker: int, num_workers: int) -> Iterator[Any]:
        """What a worker loads: the loader takes its next batch from worker 0, the one after that from worker 1, ..."""
        sizes = [min(self.batch_size, self.num_images - first) for first in range(0, self.num_images, self.batch_size)]
        done = self.first // self.batch_size
        part = (done + worker) % num_workers  # which holds every num_workers-th batch of the whole epoch
        shown = [sum(sizes[other::num_workers]) for other in range(num_workers)]
        begin = self.begin + sum(math.ceil(images / self.repeats) for images in shown[:part])
        end = begin + math.ceil(shown[part] / self.repeats)
        skipped = sum(sizes[part:done:num_workers])
        return islice(self._showings(begin, end, skipped), shown[part] - skipped)

    def _showings(self, begin: int, end: int, skipped: int) -> Iterator[Any]:
        """The images from `begin` to `end`, block by block, each shown `repeats` times, without the first showings."""
        blocks, inside = divmod(skipped, self.block * self.repeats)
        begin += blocks * self.block
        order = self._order(len(self.shards.urls), 0, self.epoch)
        source = self.shards.read(order, begin, end)
        block = list(islice(source, self.block))
        while block:
            places = np.repeat(self._order(len(block), 1, self.epoch, begin), self.repeats)
            following: list[dict[str, Any]] = []
            for showing, place in islice(enumerate(places), inside, None):
                yield self._item(block, place, (begin + int(place)) * self.repeats + showing % self.repeats)
                if showing % self.repeats == 0:
                    following += islice(source, 1)  # so that there is no pause between two blocks
            following += islice(source, self.block - len(following))
            begin, block, inside = begin + len(block), following, 0

    def _order(self, length: int, *place: int) -> np.ndarray:
        if not self.shuffles:
            return np.arange(length)
        return np.random.default_rng((self.seed, *place)).permutation(length)

    def _item(self, block: list[dict[str, Any]], place: int, number: int) -> Sample:
        """The image at a place of the block, cropped as the showing of this number."""
        start = time.thread_time()
        seed_everything(self.seed, CROP, self.epoch, number)
        complaint = ""
        for other in range(len(block)):
            sample = block[(place + other) % len(block)]
            suffix = next(suffix for suffix in IMAGE_SUFFIXES if suffix in sample)
            try:
                image = self.shards.read_file(
                    sample[suffix], f"{sample['__key__']}.{suffix} of shard {sample['__url__']}"
                )
            except UnreadableImageError as error:
                complaint = complaint or str(error)
            else:
                cropped, label = self.shards.crop(image), int(sample[LABEL_SUFFIX])
                return Sample(cropped, label, (self.epoch, number), complaint, time.thread_time() - start)
        raise UnreadableImageError(complaint)


def share_of_shards(
    shards: Shards, is_train: bool, settings: ImageSettings, rank: int, world_size: int, repeats: int
) -> ShardStream:
    """What process `rank` of `world_size` trains with in an epoch, in whole updates, or tests with.

    Raises:
        ValueError: fewer shards than workers, who would read most of what they read in vain.
    """
    workers = max(1, settings.data.num_workers)
    if len(shards.urls) < world_size * workers:
        raise ValueError(
            f"{len(shards.urls)} shards to {'train' if is_train else 'test'} are too few for {world_size} process(es) "
            f"with {workers} worker(s) each: lower --num-workers or the number of processes, or write more shards"
        )
    begin, end = (len(shards) * place // world_size for place in (rank, rank + 1))
    per_update = settings.data.batch_size * settings.accum_steps
    return ShardStream(
        shards,
        begin=begin,
        num_images=len(shards) // world_size // per_update * per_update if is_train else end - begin,
        batch_size=settings.data.batch_size if is_train else int(1.5 * settings.data.batch_size),
        repeats=repeats,
        shuffles=is_train,
        seed=settings.seed,
    )
