"""What training changes as it goes on, apart from the model, and how it is saved and restored."""

import argparse
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from typing import Any

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from training.checkpoint import is_ours
from training.distributed import World
from training.losses import build_loss
from training.optimisation import (
    OPTIONS,
    build_criterion,
    build_mixup,
    build_optimizer,
    build_scheduler,
    learning_rate,
)
from training.options import flag_of

_logger = getLogger(__name__)


@dataclass
class Progress:
    """How far the epoch under way is; the same in every process, but for the sum."""

    step: int = 0  # updates done or skipped
    done: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0  # skipped ones at the end, those of the epoch before included
    loss_sum: Tensor = field(default_factory=partial(torch.zeros, (), dtype=torch.float64))  # of those done, here

    def skip(self) -> None:
        """Count the last update as skipped."""
        self.skipped += 1
        self.bad_in_a_row += 1

    def counts(self) -> dict[str, int]:
        """Plain data, for a checkpoint, which keeps the sums of all processes beside it."""
        return {name: getattr(self, name) for name in ("step", "done", "skipped", "bad_in_a_row")}


@dataclass
class TrainingState:
    """Mixup, loss, optimizer, schedule, gradient scaler and weight average; how far training is, and its log so far."""

    mixup: Mixup | None
    criterion: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: GradScaler
    ema: ModelEmaV3 | None
    epoch: int = 0  # epochs finished, or left out at the start
    progress: Progress = field(default_factory=Progress)  # of the next one
    best_acc1: float = -1.0  # so that the first epoch is better
    best_ema_acc1: float = -1.0
    accuracies: list[float] = field(default_factory=list)  # on the test images, one per finished epoch
    rows: list[dict[str, Any]] = field(default_factory=list)  # of log.txt, one per finished epoch

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


def build_state(
    args: argparse.Namespace,
    model: nn.Module,
    num_classes: int,
    updates_per_epoch: int,
    world_size: int,
    teacher: nn.Module | None,
) -> TrainingState:
    """The state before the first epoch of `model`, which is on its device, as the teacher is, and not wrapped.

    Raises:
        ValueError: illegal options; names them.
    """
    mixup = build_mixup(args, num_classes)
    optimizer = build_optimizer(args, model, learning_rate(args, world_size))
    if args.warmup_epochs >= args.epochs:
        _logger.warning("the warm-up (%d epochs) does not end in %d epochs", args.warmup_epochs, args.epochs)
    return TrainingState(
        mixup=mixup,
        criterion=build_loss(args, model, build_criterion(args, mixup), teacher),
        optimizer=optimizer,
        scheduler=build_scheduler(args, optimizer, updates_per_epoch),
        scaler=GradScaler(torch.device(args.device).type, enabled=args.amp_dtype == "float16"),
        ema=build_ema(args, model),
        epoch=args.start_epoch,
    )


def build_ema(args: argparse.Namespace, model: nn.Module) -> ModelEmaV3 | None:
    """The average of the model's weights, where the model is or in the CPU's memory; None if it is off."""
    if not args.model_ema:
        if args.model_ema_force_cpu:
            _logger.warning("--model-ema-force-cpu is without effect without --model-ema")
        return None
    return ModelEmaV3(model, args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None)


def restore_state(state: TrainingState, checkpoint: dict[str, Any], args: argparse.Namespace) -> None:
    """Take over the state of a checkpoint. The options stay those of this run; what differs is logged.

    Raises:
        ValueError: a checkpoint that is not of our format, or of another optimizer.
    """
    if not is_ours(checkpoint):
        raise ValueError(f"{args.resume} holds weights, but no training to go on with: pass --eval to evaluate it")
    saved = checkpoint["config"]
    for name, value in (("opt", args.opt), ("attn_only", args.attn_only)):
        if value != saved[name]:
            raise ValueError(f"{flag_of(name)} {value} contradicts {args.resume}, which has {saved[name]}")
    for name, value in saved.items():
        if getattr(args, name) != value:
            _logger.info("%s is now %s; it was %s", flag_of(name), getattr(args, name), value)

    restore_optimizer(state.optimizer, checkpoint["optimizer"])
    if checkpoint["scaler"]:
        state.scaler.load_state_dict(checkpoint["scaler"])
    if state.ema is not None and checkpoint["model_ema"] is not None:
        state.ema.module.load_state_dict(checkpoint["model_ema"])
    state.epoch = checkpoint["epoch"]
    state.best_acc1 = checkpoint["best_acc1"]
    state.best_ema_acc1 = checkpoint["best_ema_acc1"]
    state.accuracies = checkpoint["accuracies"]
    for epoch, accuracy in enumerate(state.accuracies, start=state.epoch - len(state.accuracies) + 1):
        state.scheduler.step(epoch, accuracy)  # a schedule may depend on them


def restore_optimizer(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Take over what an optimizer has gathered, in its groups too; its options stay those that it was made with."""
    fresh = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state_dict)
    for group, own in zip(optimizer.param_groups, fresh, strict=True):
        group.update({name: value for name, value in own.items() if name in OPTIONS or name not in group})


def restore_progress(state: TrainingState, saved: dict[str, Any], updates: int, world: World) -> int:
    """Take over the place in the epoch under way; where an epoch has another number of updates now, the nearest one.

    Returns:
        The unreadable images that this process has skipped in this epoch.
    """
    state.progress = Progress(**saved["counts"])
    if saved["updates"] != updates:
        state.progress.step = saved["counts"]["step"] * updates // saved["updates"]
        _logger.info(
            "epoch %d goes on after update %d of %d; it was after update %d of %d",
            state.epoch + 1,
            state.progress.step,
            updates,
            saved["counts"]["step"],
            saved["updates"],
        )
    sums = saved["sums_by_rank"]
    if len(sums) != world.size:  # the sum over all processes is what counts
        sums = [[sum(column) for column in zip(*sums, strict=True)], *([[0.0, 0.0]] * (world.size - 1))]
    loss_sum, num_bad_images = sums[world.rank]
    state.progress.loss_sum += loss_sum
    return int(num_bad_images)
