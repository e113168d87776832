"""The order of an epoch, and one image of it."""

import time
from collections.abc import Iterator, Sequence

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler

from loading.images import Images, Sample, UnreadableImageError, crop_in_groups

REPEATS = 3
"""How often repeated augmentation shows an image in an epoch."""


class SeededRepeatAugSampler(RepeatAugSampler):
    """Repeated augmentation (Hoffer et al. 2020) as in DeiT: a third of the images an epoch, each three times.

    timm's sampler shuffles by the epoch alone; this one by seed + epoch, as `DistributedSampler` does. Its length is
    not rounded down to a multiple of 256, so that a small data set is not left without a batch.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, num_repeats=REPEATS, selected_round=0)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)


class TrainSampler(Sampler[tuple[int, int, int]]):
    """One process's share of an epoch, from any place on: (index of the image, epoch, place in the order of all).

    The place is counted over all processes, so the same global batch has the same images and augmentations however
    many processes share it.

    Args:
        order: of the indices in this process.
        images_per_update: of this process; the rest that does not fill an update is left out.
    """

    def __init__(self, order: DistributedSampler | SeededRepeatAugSampler, images_per_update: int) -> None:
        self.order = order
        self.num_images = len(order) // images_per_update * images_per_update
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Yield the order of `epoch` after this process's `first` images, which are skipped without a read."""
        self.order.set_epoch(epoch)
        self.indices: list[int] = []  # of the epoch, in order, from the first one that is asked for
        self.epoch = epoch
        self.first = first

    def batch(self, number: int, size: int) -> list[tuple[int, int, int]]:
        """Batch `number` of `size` images of the whole epoch."""
        return [self._entry(place) for place in range(number * size, (number + 1) * size)]

    def __len__(self) -> int:
        return self.num_images  # of the whole epoch

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return map(self._entry, range(self.first, self.num_images))

    def _entry(self, number: int) -> tuple[int, int, int]:
        self.indices = self.indices or list(self.order)
        return self.indices[number], self.epoch, number * self.order.num_replicas + self.order.rank


class Samples(Dataset[Sample]):
    """The items of a data set, each cropped by its own seed; the next one where one is unreadable.

    An index is what `TrainSampler` yields. A loader asks for those of a batch together.
    """

    def __init__(self, images: Images, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index_and_place: tuple[int, int, int]) -> Sample:
        return self.__getitems__([index_and_place])[0]

    def __getitems__(self, indices_and_places: Sequence[tuple[int, int, int]]) -> list[Sample]:
        return list(crop_in_groups(map(self._read, indices_and_places), self.images.crop, self.seed))

    def _read(self, index_and_place: tuple[int, int, int]) -> Sample:
        start = time.thread_time()
        index, epoch, number = index_and_place
        complaint = ""
        for other in range(len(self)):
            try:
                image, label = self.images.pictures[(index + other) % len(self)]
            except UnreadableImageError as error:
                complaint = complaint or str(error)
            else:
                return Sample(image, label, (epoch, number), complaint, time.thread_time() - start)
        raise UnreadableImageError(complaint)
