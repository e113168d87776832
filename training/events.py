"""What TensorBoard shows of a run, along one axis for updates and epochs: thousandths of an epoch.

So curves of runs with another batch size lie over one another, and a run whose batch size changes continues in place.
"""

from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from runtime.distributed import sum_over_ranks
from training.state import Progress

_logger = getLogger(__name__)

POINTS_PER_EPOCH = 50
STEPS_PER_EPOCH = 1000


class Events:
    """Writes the rows of `log.txt` by their keys, and some fifty times an epoch `update/loss` and `update/lr`.

    All processes have one and call it alike; the main one writes. Where it cannot, it says so, and the run continues.

    Args:
        folder: receives the event files, beside those of a run that is resumed; None where this process does not write.
        epoch, progress: where the run continues: what older files hold beyond is not shown.
        updates: per epoch.
    """

    def __init__(self, folder: Path | None, epoch: int, progress: Progress, updates: int) -> None:
        self.updates = updates
        self.interval = max(1, updates // POINTS_PER_EPOCH)
        self.begin_epoch(progress)
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # which takes a second

            next_point = (progress.step // self.interval + 1) * self.interval
            self.writer = SummaryWriter(folder, purge_step=round(STEPS_PER_EPOCH * (epoch + next_point / updates)))

    def begin_epoch(self, progress: Progress) -> None:
        """The next point's mean is over the updates from here on."""
        self.loss_sum, self.done = progress.loss_sum.clone(), progress.done

    def after_update(self, epoch: int, progress: Progress, lr: float) -> None:
        """Now and then, write the mean loss of all processes over the updates since the last point.

        Args:
            epoch: epochs finished before the one under way.
            lr: of the last update.
        """
        if progress.step % self.interval:
            return
        since = progress.loss_sum - self.loss_sum.to(progress.loss_sum)
        loss_sum, done = sum_over_ranks(torch.stack([since, since.new_tensor(progress.done - self.done)])).tolist()
        if done:
            self.add({"update/loss": loss_sum / done, "update/lr": lr}, epoch + progress.step / self.updates)
        self.begin_epoch(progress)

    def add(self, values: Mapping[str, Any], epoch: float) -> None:
        """Write the numbers among `values` under their names, and see that they are on disk.

        Args:
            epoch: epochs finished, with the part of the one under way.
        """
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(name, value, round(STEPS_PER_EPOCH * epoch))
            self.writer.flush()
        except OSError as error:
            _logger.error("TensorBoard's events cannot be written, and no more will be: %s", error)
            self.writer = None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
