"""Training batches for several processes: made once, and handed on through files.

Processes that train on the same batches at the same time name the same folder. Whoever needs a batch first makes it,
and the others read it; who needs it while it is being made makes a later one meanwhile. Nothing depends on who does
what: a batch is a function of its number, so it is the same to the bit whether it is made or read.

A folder holds, beneath a key of all that shapes a batch,

    N.batch       batch N, counted from 0 over all epochs: pixels, labels, places, complaints, each a numpy array
    making        byte N is locked while batch N is being made
    processes/    X.position is the number of the batch that process X takes next, 8 bytes; locked while X lives
    joining       locked while a process joins

A process that has gone ahead of another one by `window` batches waits for it, so that what is kept stays small. It does
not wait for a process that has ended, that is further behind, or that takes no batch for five minutes.

No batch outlives the processes that share it: the first one to join removes what is there. So none is of an earlier
state of the data set.
"""

import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from tempfile import mkstemp
from typing import IO

import numpy as np
import torch
from torch.utils.data import Dataset

from loading.images import Batching, Loaded
from loading.samplers import Samples, TrainSampler
from runtime.interrupt import noted_signal

_logger = getLogger(__name__)

WINDOW_BYTES = 2**28
"""Of pixels that a process may be ahead of another one that shares its batches, and may make before it needs them."""
SECONDS_OF_PATIENCE = 300.0
"""That a process waits for another one that takes no batch, as it may evaluate."""
SECONDS_BETWEEN_LOOKS = 0.01
CLEANINGS_PER_WINDOW = 16
BATCH, POSITION = ".batch", ".position"
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "simplejpeg", "numpy")
"""Whose versions may change what a batch is."""


def key_of(*shaping: object) -> str:
    """A name for batches that are shaped by these values, which need a `repr` that tells all, and by `LIBRARIES`."""
    return sha256(repr([shaping, [version(name) for name in LIBRARIES]]).encode()).hexdigest()[:16]


def window_of(batch_bytes: int) -> int:
    """How many batches a process may be ahead of another one, and may make before it needs them."""
    return max(1, WINDOW_BYTES // batch_bytes)


class BatchFiles:
    """The batches in a folder; all that a loader's workers need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has_warned = False

    def path(self, number: int) -> Path:
        return self.folder / f"{number}{BATCH}"

    def numbers(self) -> list[int]:
        """Of the batches that are there."""
        return [int(path.stem) for path in self.folder.glob(f"[0-9]*{BATCH}")]

    def get(self, number: int, make: Callable[[int], Loaded], end: int) -> Loaded:
        """Read a batch, or make it; while another process makes it, make others before `end` that nobody makes."""
        seconds, num_made = 0.0, 0
        while (batch := self._read(number)) is None:
            with self._to_make(number, end) as chosen:
                if chosen is None:
                    continue
                batch = make(chosen)
                self._write(chosen, batch)
                seconds, num_made = seconds + batch.seconds, num_made + 1
            if chosen == number:
                break
        return batch._replace(seconds=seconds, num_made=num_made)

    @contextmanager
    def _to_make(self, number: int, end: int) -> Iterator[int | None]:
        """The first batch from `number` on that is missing and that nobody makes, for this process to make.

        None: `number` is there by now. Where all others are there or are being made, it waits for `number`.
        """
        with (self.folder / "making").open("ab") as lock:  # whose locks end when it is closed, or this process dies
            for chosen in range(number, number + 1 if self.has_warned else end):
                if self.path(number).exists():
                    break
                if not self.path(chosen).exists() and _try_lock(lock, chosen) and not self.path(chosen).exists():
                    yield chosen
                    return
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, number)
            yield None if self.path(number).exists() else number

    def _read(self, number: int) -> Loaded | None:
        try:
            with self.path(number).open("rb") as file:
                pixels, labels, places, complaints = (np.load(file) for _ in range(4))
        except FileNotFoundError:
            return None
        batch = [torch.from_numpy(pixels), torch.from_numpy(labels)]
        return Loaded(batch, list(map(tuple, places.tolist())), complaints.tolist())

    def _write(self, number: int, made: Loaded) -> None:
        path = self.path(number)
        try:
            with whole_file(path) as file:
                for part in (*made.batch, made.places, made.complaints):
                    np.save(file, np.asarray(part))
        except OSError as error:
            if not self.has_warned:
                _logger.warning("batches are not shared, as they cannot be written: %s", error)
            self.has_warned = True


def _try_lock(file: IO[bytes], byte: int) -> bool:
    """Lock this byte of the file for this process, unless another one has."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):  # POSIX leaves open which
        return False
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is whole or absent for other processes; not after a power failure, which no reader outlives."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class SharedBatches(Dataset):
    """Whole batches of `samples`: made by `batching`, or read if another process has made them.

    Args:
        sampler: of the batches' images, of this process of the run.
        batch_size: of this process of the run.
        window: how far from the batch that is asked for one may be that is made.
    """

    def __init__(
        self,
        samples: Samples,
        batching: Batching,
        sampler: TrainSampler,
        files: BatchFiles,
        batch_size: int,
        window: int,
    ) -> None:
        self.samples = samples
        self.batching = batching
        self.sampler = sampler
        self.files = files
        self.batch_size = batch_size
        self.batches_per_epoch = len(sampler) // batch_size
        self.window = window

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: Sequence[tuple[int, int, int]]) -> Loaded:
        """The batch of these indices, which are as `TrainSampler` yields them."""
        _, epoch, place = indices[0]
        first = epoch * self.batches_per_epoch
        number = first + place // (self.batch_size * self.sampler.order.num_replicas)
        return self.files.get(number, self._make, min(number + self.window, first + self.batches_per_epoch))

    def _make(self, number: int) -> Loaded:
        """A batch of the sampler's present epoch."""
        indices = self.sampler.batch(number % self.batches_per_epoch, self.batch_size)
        made = self.batching(self.samples.__getitems__(indices))
        assert isinstance(made, Loaded)  # for `Samples` raises its errors
        return made


class Company:
    """The processes that share the batches of a folder, as one of them sees the others.

    Args:
        window: batches that one may be ahead of another.
        ahead: batches that a process may load before it takes them.
    """

    def __init__(self, files: BatchFiles, window: int, ahead: int) -> None:
        self.files = files
        self.processes = files.folder / "processes"
        self.window = window
        self.ahead = ahead
        self.position = 0
        self.path: Path | None = None  # of this process, once it has joined

    def join(self, number: int) -> None:
        """Say that this process takes this batch next; if no other one lives, what is there is removed."""
        self.position = number
        if self.path is not None:
            self._publish()
            return
        self.processes.mkdir(parents=True, exist_ok=True)
        with (self.files.folder / "joining").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.file, unseen = mkstemp(dir=self.processes)
            weakref.finalize(self, os.close, self.file)
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self._publish()
            if not self.others():
                for other in self.files.numbers():
                    self.files.path(other).unlink(missing_ok=True)
            self.path = Path(unseen + POSITION)
            Path(unseen).rename(self.path)  # which nobody takes for one of a dead process, as it is locked

    def advance(self) -> None:
        """Take the batch at this process's position: wait until nobody is a whole window behind, and clean up."""
        self._wait_for(self.position - self.window)
        self.position += 1
        self._publish()
        if self.position % max(1, self.window // CLEANINGS_PER_WINDOW) == 0:
            self._clean_up()

    def others(self) -> list[int]:
        """The positions of the other processes that live."""
        positions = []
        for path in self.processes.glob(f"*{POSITION}"):
            if path == self.path:
                continue
            try:
                with path.open("rb") as file:
                    positions.append(int.from_bytes(file.read(8), "little"))
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (FileNotFoundError, BlockingIOError):  # it has been removed meanwhile; or it is locked
                continue
            positions.pop()
            path.unlink(missing_ok=True)
        return positions

    def _publish(self) -> None:
        os.pwrite(self.file, self.position.to_bytes(8, "little"), 0)

    def _wait_for(self, position: int) -> None:
        start = time.monotonic()
        while position in self.others() and not noted_signal():
            if time.monotonic() - start > SECONDS_OF_PATIENCE:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _clean_up(self) -> None:
        """Remove the batches that no process needs soon."""
        reach = self.window + self.ahead + 1
        positions = [self.position, *self.others()]
        for number in self.files.numbers():
            if not any(position <= number <= position + reach for position in positions):
                self.files.path(number).unlink(missing_ok=True)
