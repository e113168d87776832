"""Batches for one process."""

from collections.abc import Iterator
from logging import getLogger
from typing import Any

from torch.utils.data import DataLoader

from loading.images import Finishing, UnreadableImageError
from loading.samplers import Samples, TrainSampler
from loading.shards import ShardStream
from loading.sharing import Company, SharedBatches
from runtime.interrupt import hold_signals, leave_signals_to_parent
from runtime.memory import keep_freed_memory

_logger = getLogger(__name__)


class ImageLoader(DataLoader):
    """Batches of images, on the device of `finish`, and labels.

    Workers hand over pixels of 8 bits, a quarter of the images' size.

    Attributes:
        num_images: of the data set, of which this process loads its share.
        skips_unreadable: whether the next readable image stands in for an unreadable one; else it is an error.
        num_skipped: unreadable images so far, in the batches that were taken.
        num_taken, num_made: batches of the present epoch that were taken, and those that this process has made.
        making_seconds: of a core's time that it took to make those.

    Args:
        company: those that share the batches, if they are shared.
    """

    def __init__(
        self,
        samples: Samples | SharedBatches | ShardStream,
        finish: Finishing,
        num_images: int,
        skips_unreadable: bool,
        company: Company | None = None,
        **options: Any,
    ) -> None:
        super().__init__(samples, worker_init_fn=start_worker, **options)
        self.finish = finish
        self.num_images = num_images
        self.skips_unreadable = skips_unreadable
        self.company = company
        self.num_skipped = self.num_taken = self.num_made = 0
        self.making_seconds = 0.0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Of training: load `epoch` next, without this process's `first` images, which fill whole batches."""
        order = self.dataset if isinstance(self.dataset, ShardStream) else self.sampler
        assert isinstance(order, ShardStream | TrainSampler)
        order.set_epoch(epoch, first)
        self.num_taken = self.num_made = 0
        self.making_seconds = 0.0
        if self.company is not None:
            self.company.join(epoch * len(self) + first // (self.batch_size or 1))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is all that a loop needs
        keep_freed_memory()
        with hold_signals():
            batches = super().__iter__()  # which starts the workers
        for loaded in batches:
            if isinstance(loaded, Exception):
                raise loaded
            if self.company is not None:
                self.company.advance()
            self.num_taken += 1
            self.num_made += loaded.num_made
            self.making_seconds += loaded.seconds
            for complaint in filter(None, loaded.complaints):
                # raised here, as an exception from a worker comes with that worker's traceback in its message
                if not self.skips_unreadable:
                    raise UnreadableImageError(complaint)
                _logger.warning("%s; skipped", complaint)
                self.num_skipped += 1
            pixels, labels = loaded.batch
            yield self.finish(pixels, loaded.places), labels


def start_worker(worker_id: int) -> None:
    leave_signals_to_parent(worker_id)
    keep_freed_memory()
