"""One training: what the loop reads and changes, and how it is saved and restored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from typing import Any, Protocol

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lape_vit.checkpoints import is_ours
from runtime.world import World
from training.folder import CHECKPOINTS
from training.losses import build_loss
from training.optimisation import OF_OPTIONS, build_criterion, build_mixup, build_optimizer, build_scheduler
from training.options import ModelOptions, Options, flag_of

_logger = getLogger(__name__)


class TrainLoader(Protocol):
    """Batches of images (B, 3, H, W) and labels (B,), as many as fill whole updates.

    Attributes:
        num_images: of the data set.
        num_skipped: unreadable images so far.
        num_taken, num_made: batches of the present epoch that were taken, and those that this process has made.
        making_seconds: of a core's time that it took to make those.
    """

    num_images: int
    num_skipped: int
    num_taken: int
    num_made: int
    making_seconds: float

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Load `epoch` next, without this process's `first` images."""


@dataclass
class Progress:
    """How far the epoch under way is; the same in every process, except for the sum."""

    step: int = 0  # updates done or skipped
    done: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0  # skipped ones at the end, those of the epoch before included
    loss_sum: Tensor = field(default_factory=partial(torch.zeros, (), dtype=torch.float64))  # of those done, here

    def add(self, loss: Tensor) -> None:
        """Count an update, which had this loss."""
        self.step += 1
        self.done += 1
        self.bad_in_a_row = 0
        self.loss_sum += loss

    def skip(self) -> None:
        """Count an update that is skipped."""
        self.step += 1
        self.skipped += 1
        self.bad_in_a_row += 1

    def counts(self) -> dict[str, int]:
        """Plain data, for a checkpoint, which keeps the sums of all processes beside it."""
        return {name: getattr(self, name) for name in ("step", "done", "skipped", "bad_in_a_row")}


@dataclass
class Training:
    """A training under way.

    Attributes:
        model: maps images (B, 3, H, W) to logits (B, C); it may be wrapped for several processes, and compiled.
        criterion: maps the model, images and targets to the mean loss, as those of `training.losses`.
        ema: the average of the weights of the model, which is not wrapped for it.
        epoch: epochs finished, or left out at the start.
        progress: of the next one.
        accuracies: on the test images, one per finished epoch.
        rows: of log.txt, one per finished epoch.
    """

    options: Options
    model: nn.Module
    loader: TrainLoader
    criterion: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: GradScaler
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    progress: Progress = field(default_factory=Progress)
    best_acc1: float = -1.0  # so that the first epoch is better
    best_ema_acc1: float = -1.0
    accuracies: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def updates(self) -> int:
        """Of an epoch."""
        return len(self.loader) // self.options.optimisation.accum_steps

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def begin_epoch(self) -> None:
        """Let the loader and mixup know which epoch comes, and from which update on."""
        done = self.progress.step * self.options.optimisation.accum_steps * self.options.data.batch_size
        self.loader.set_epoch(self.epoch, done)
        off = self.options.augmentation.mixup_off_epoch
        if self.mixup is not None and off is not None:
            self.mixup.mixup_enabled = self.epoch < off

    def end_epoch(self, row: dict[str, Any]) -> Sequence[str]:
        """Count an epoch that is trained and evaluated.

        Args:
            row: what log.txt says of it.

        Returns:
            The names of the checkpoints that this epoch's replaces as the best so far.
        """
        acc1, ema_acc1 = row["test_acc1"], row.get("test_ema_acc1", -1.0)
        is_best = (acc1 > self.best_acc1, ema_acc1 > self.best_ema_acc1)
        self.best_acc1, self.best_ema_acc1 = max(self.best_acc1, acc1), max(self.best_ema_acc1, ema_acc1)
        self.epoch += 1
        self.progress = Progress(bad_in_a_row=self.progress.bad_in_a_row)
        self.loader.num_skipped = 0
        self.accuracies.append(acc1)
        self.scheduler.step(self.epoch, acc1)
        self.rows.append(row)
        return [name for name, best in zip(CHECKPOINTS[1:], is_best, strict=True) if best]

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best_acc1": self.best_acc1,
            "best_ema_acc1": self.best_ema_acc1,
            "accuracies": self.accuracies,
        }


def build_training(
    options: Options, model: nn.Module, loader: TrainLoader, teacher: nn.Module | None, lr: float, num_classes: int
) -> Training:
    """The training before its first epoch.

    Args:
        model: on its device, as the teacher is, and not wrapped.
        lr: the learning rate that the schedule scales.

    Raises:
        ValueError: illegal options; names them.
    """
    run, optimisation = options.run, options.optimisation
    mixup = build_mixup(options.augmentation, optimisation.smoothing, options.data.batch_size, num_classes)
    optimizer = build_optimizer(optimisation, model, lr)
    if optimisation.warmup_epochs >= optimisation.epochs:
        _logger.warning(
            "the warm-up (%d epochs) does not end in %d epochs", optimisation.warmup_epochs, optimisation.epochs
        )
    updates = len(loader) // optimisation.accum_steps
    assert run.device is not None  # it is resolved
    return Training(
        options,
        model,
        loader,
        criterion=build_loss(options, model, build_criterion(optimisation, mixup), teacher),
        optimizer=optimizer,
        scheduler=build_scheduler(optimisation, optimizer, updates, run.seed),
        scaler=GradScaler(torch.device(run.device).type, enabled=run.amp_dtype == "float16"),
        mixup=mixup,
        ema=build_ema(options.model, model),
        epoch=optimisation.start_epoch,
    )


def build_ema(wanted: ModelOptions, model: nn.Module) -> ModelEmaV3 | None:
    """The average of the model's weights, where the model is or in the CPU's memory; None if it is off."""
    force_cpu = wanted.model_ema_force_cpu
    if not wanted.model_ema:
        if force_cpu:
            _logger.warning("--model-ema-force-cpu is without effect without --model-ema")
        return None
    return ModelEmaV3(model, wanted.model_ema_decay, device=torch.device("cpu") if force_cpu else None)


def restore_state(training: Training, checkpoint: dict[str, Any]) -> None:
    """Take over the state of a checkpoint. The options stay those of this run; what differs is logged.

    Raises:
        ValueError: a checkpoint that is not of our format, or of another optimizer.
    """
    options = training.options
    path, now = options.run.resume, options.by_name()
    if not is_ours(checkpoint):
        raise ValueError(f"{path} holds weights, but no training to continue: pass --eval to evaluate it")
    saved = checkpoint["config"]
    for name in ("opt", "attn_only"):
        if now[name] != saved[name]:
            raise ValueError(f"{flag_of(name)} {now[name]} contradicts {path}, which has {saved[name]}")
    for name, value in saved.items():
        if name in now and now[name] != value:
            _logger.info("%s is now %s; it was %s", flag_of(name), now[name], value)

    restore_optimizer(training.optimizer, checkpoint["optimizer"])
    if checkpoint["scaler"]:
        training.scaler.load_state_dict(checkpoint["scaler"])
    if training.ema is not None and checkpoint["model_ema"] is not None:
        training.ema.module.load_state_dict(checkpoint["model_ema"])
    training.epoch = checkpoint["epoch"]
    training.best_acc1 = checkpoint["best_acc1"]
    training.best_ema_acc1 = checkpoint["best_ema_acc1"]
    training.accuracies = checkpoint["accuracies"]
    for epoch, accuracy in enumerate(training.accuracies, start=training.epoch - len(training.accuracies) + 1):
        training.scheduler.step(epoch, accuracy)  # a schedule may depend on them


def restore_optimizer(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Take over what an optimizer has gathered, in its groups too; its options stay those that it was made with."""
    fresh = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state_dict)
    for group, own in zip(optimizer.param_groups, fresh, strict=True):
        group.update({name: value for name, value in own.items() if name in OF_OPTIONS or name not in group})


def restore_progress(training: Training, saved: dict[str, Any], world: World) -> None:
    """Take over the place in the epoch under way; where an epoch has another number of updates now, the nearest one."""
    training.progress = Progress(**saved["counts"])
    if saved["updates"] != training.updates:
        training.progress.step = saved["counts"]["step"] * training.updates // saved["updates"]
        _logger.info(
            "epoch %d continues after update %d of %d; it was after update %d of %d",
            training.epoch + 1,
            training.progress.step,
            training.updates,
            saved["counts"]["step"],
            saved["updates"],
        )
    sums = saved["sums_by_rank"]
    if len(sums) != world.size:  # the sum over all processes is what counts
        sums = [[sum(column) for column in zip(*sums, strict=True)], *([[0.0, 0.0]] * (world.size - 1))]
    loss_sum, num_bad_images = sums[world.rank]
    training.progress.loss_sum += loss_sum
    training.loader.num_skipped = int(num_bad_images)
