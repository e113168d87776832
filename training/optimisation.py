"""Mixup, loss, optimizer and schedule from the options, with timm's parts."""

import inspect
import warnings
from collections.abc import Sequence
from logging import getLogger
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Muon, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import SGD, Optimizer

from training.options import AugmentationOptions, DataOptions, OptimisationOptions

_logger = getLogger(__name__)

ENDS_AT_MIN_LR = ("cosine", "tanh", "poly")
"""Schedules that end at `--min-lr`."""
OF_OPTIONS = {
    *("lr", "initial_lr", "lr_scale", "max_lr_snapshot", "weight_decay"),
    *("eps", "betas", "betas_1d", "beta1", "momentum", "fused"),
}
"""Entries of an optimizer's `param_groups` that the options and the device decide; all others are its state."""


def build_mixup(augmentation: AugmentationOptions, smoothing: float, batch_size: int, num_classes: int) -> Mixup | None:
    """Mixup and cutmix of a batch, with the labels smoothed; None where both are off.

    Raises:
        ValueError: a batch of odd size, which timm cannot mix, or a box that is larger at the low end.
    """
    box = augmentation.cutmix_minmax
    if not (augmentation.mixup or augmentation.cutmix or box):
        if augmentation.mixup_off_epoch is not None:
            _logger.warning(
                "--mixup-off-epoch %d is without effect without --mixup or --cutmix", augmentation.mixup_off_epoch
            )
        return None
    if batch_size % 2:
        raise ValueError(f"--batch-size {batch_size} is odd: mixup and cutmix need pairs of images")
    if box and box[0] >= box[1]:
        raise ValueError(f"--cutmix-minmax {box}: the first number must be the smaller one")
    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        cutmix_minmax=box,
        prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def build_criterion(optimisation: OptimisationOptions, mixup: Mixup | None) -> nn.Module:
    """Mean loss of logits (B, C) against labels (B,), or against the (B, C) targets that mixup makes; in nats.

    With `--bce-loss` each class is a binary question, and all classes of a mixed image are right answers (DeiT III).

    Raises:
        ValueError: `--bce-loss` with smoothed labels, by which every class would be a right answer.
    """
    smoothing = optimisation.smoothing
    if optimisation.bce_loss:
        if smoothing:
            raise ValueError(f"--smoothing {smoothing:g} does not go with --bce-loss: set it to 0")
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    if optimisation.cosub:
        return BinaryCrossEntropy(smoothing)
    if mixup is not None:
        return SoftTargetCrossEntropy()  # mixup has smoothed the labels
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def images_per_update(data: DataOptions, optimisation: OptimisationOptions, world_size: int) -> int:
    """The effective batch, of all processes."""
    return data.batch_size * optimisation.accum_steps * world_size


def learning_rate(optimisation: OptimisationOptions, images_per_update: int) -> float:
    """The learning rate before its schedule: DeiT's linear scaling, unless `--unscale-lr`."""
    return optimisation.lr if optimisation.unscale_lr else optimisation.lr * images_per_update / 512


def build_optimizer(optimisation: OptimisationOptions, model: nn.Module, lr: float) -> Optimizer:
    """timm's optimizer, without weight decay on what the model exempts.

    Raises:
        ValueError: an unknown optimizer, one that does not take the options, or one that needs a loop of its own.
    """
    name = optimisation.opt.lower().removeprefix("lookahead_")
    if name not in list_optimizers():
        raise ValueError(
            f"unknown --opt {optimisation.opt!r}: choose from timm.optim.list_optimizers(), such as adamw, lamb or sgd"
        )
    info = get_optimizer_info(name)
    if info.second_order:
        raise ValueError(
            f"--opt {optimisation.opt} needs second derivatives, which this training loop does not compute"
        )
    options: dict[str, Any] = {}
    if isinstance(info.opt_class, type) and issubclass(info.opt_class, Muon):
        options["fallback_no_weight_decay"] = True  # a table of positions is a matrix by its shape alone
    for option, value, is_known in (
        ("eps", optimisation.opt_eps, info.has_eps),
        ("betas", optimisation.opt_betas, info.has_betas),
        ("momentum", optimisation.momentum, info.has_momentum),
    ):
        if value is not None and is_known:
            options[option] = value
        elif value is not None:
            _logger.warning("%s has no %s: %s is without effect", optimisation.opt, option, value)
    if isinstance(info.opt_class, type) and "fused" in inspect.signature(info.opt_class).parameters:
        options["fused"] = True  # one kernel for all weights
    try:
        return create_optimizer_v2(model, optimisation.opt, lr, optimisation.weight_decay, **options)
    except Exception as error:  # each optimizer has its own checks and dependencies, and raises what it likes
        raise ValueError(f"--opt {optimisation.opt} cannot be made with {options}: {error}") from error


def build_scheduler(
    optimisation: OptimisationOptions, optimizer: Optimizer, updates_per_epoch: int, seed: int
) -> Scheduler:
    """The learning rate as a function of the epoch or, with `--sched-on-updates`, of the update.

    Only `plateau` looks at more: at the accuracies that `step` is told after each epoch.

    Args:
        seed: of `--lr-noise`.

    Raises:
        ValueError: options that do not go together.
    """
    if optimisation.sched_one_epoch_late and (optimisation.sched == "plateau" or optimisation.sched_on_updates):
        raise ValueError("--sched-one-epoch-late does not go with --sched plateau or --sched-on-updates")
    if optimisation.sched == "plateau" and optimisation.sched_on_updates:
        raise ValueError("--sched-on-updates does not go with --sched plateau, which looks at whole epochs")
    cooldown = optimisation.cooldown_epochs or 0
    if cooldown >= optimisation.epochs:
        raise ValueError(f"--cooldown-epochs {cooldown} leaves nothing of --epochs {optimisation.epochs}")
    if optimisation.lr_noise and list(optimisation.lr_noise) != sorted(set(optimisation.lr_noise))[:2]:
        raise ValueError(
            f"--lr-noise {optimisation.lr_noise}: give where it starts and, if it ends, a larger number for where"
        )
    warn_of_unused_schedule_options(optimisation)
    warn_of_rates_above_the_peak(optimisation, optimizer.param_groups[0]["lr"])
    return _scheduler(optimisation, optimizer, updates_per_epoch, optimisation.lr_noise, seed)


def _scheduler(
    optimisation: OptimisationOptions,
    optimizer: Optimizer,
    updates_per_epoch: int,
    noise: Sequence[float] | None = None,
    seed: int = 0,
) -> Scheduler:
    sched, decay_rate = optimisation.sched, 0.1 if optimisation.decay_rate is None else optimisation.decay_rate
    if sched == "constant":
        sched, decay_rate = "step", 1.0  # a step by a factor of 1 still has the warm-up
    with warnings.catch_warnings():  # timm deprecates plateau as it does not save its state; ours is restored
        warnings.filterwarnings("ignore", message="PlateauLRScheduler is deprecated", category=FutureWarning)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=sched,
            decay_rate=decay_rate,
            num_epochs=optimisation.epochs - (optimisation.cooldown_epochs or 0),
            decay_epochs=30 if optimisation.decay_epochs is None else optimisation.decay_epochs,
            patience_epochs=10 if optimisation.patience_epochs is None else optimisation.patience_epochs,
            min_lr=_min_lr(optimisation),
            # timm's plateau starts from here even where there is no warm-up
            warmup_lr=_warmup_lr(optimisation) if optimisation.warmup_epochs else optimizer.param_groups[0]["lr"],
            warmup_epochs=optimisation.warmup_epochs,
            noise=noise,  # type: ignore[arg-type]  # timm takes None for none
            noise_pct=0.67 if optimisation.lr_noise_pct is None else optimisation.lr_noise_pct,
            noise_std=1.0 if optimisation.lr_noise_std is None else optimisation.lr_noise_std,
            noise_seed=seed,
            step_on_epochs=not optimisation.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
    return scheduler


def epoch_of_schedule(optimisation: OptimisationOptions, epoch: int) -> int:
    """The epoch whose learning rate the schedule gives to `epoch`; both count from 0."""
    return max(0, epoch - 1) if optimisation.sched_one_epoch_late else epoch


def _min_lr(optimisation: OptimisationOptions) -> float:
    return 1e-5 if optimisation.min_lr is None else optimisation.min_lr


def _warmup_lr(optimisation: OptimisationOptions) -> float:
    return 1e-6 if optimisation.warmup_lr is None else optimisation.warmup_lr


def highest_rate(optimisation: OptimisationOptions, lr: float, updates_per_epoch: int) -> float:
    """The highest learning rate of the run, without `--lr-noise`.

    Within an epoch every schedule only rises or only falls, so its first and its last update tell.

    Args:
        lr: the learning rate that the schedule scales.
    """
    optimizer = SGD([nn.Parameter(torch.zeros(()))], lr)
    scheduler = _scheduler(optimisation, optimizer, updates_per_epoch)
    rates = []
    for epoch in range(optimisation.start_epoch, optimisation.epochs):
        # as if the accuracy grew with every epoch, so that plateau does not decay
        scheduler.step(epoch_of_schedule(optimisation, epoch), epoch)
        for update in (epoch * updates_per_epoch, (epoch + 1) * updates_per_epoch - 1):
            scheduler.step_update(update)
            rates.append(optimizer.param_groups[0]["lr"])
    return max(rates)


def warn_of_rates_above_the_peak(optimisation: OptimisationOptions, lr: float) -> None:
    """Warn of the rates that are not scaled where they lie above the learning rate, which is.

    Args:
        lr: the learning rate that the schedule scales.
    """
    scaled = "--lr" if optimisation.unscale_lr else f"--lr {optimisation.lr:g} scaled to the images per update"
    if optimisation.sched in ENDS_AT_MIN_LR and _min_lr(optimisation) > lr:
        _logger.warning(
            "--min-lr %g lies above the learning rate %g (%s): the learning rate rises to it; give a smaller --min-lr",
            _min_lr(optimisation),
            lr,
            scaled,
        )
    if optimisation.warmup_epochs and _warmup_lr(optimisation) > lr:
        _logger.warning(
            "--warmup-lr %g lies above the learning rate %g (%s): the warm-up falls to it; give a smaller --warmup-lr",
            _warmup_lr(optimisation),
            lr,
            scaled,
        )


def warn_of_unused_schedule_options(optimisation: OptimisationOptions) -> None:
    """Warn of each option that was given and that the schedule does not look at."""
    for flag, value, schedules in (
        ("--decay-epochs", optimisation.decay_epochs, ("step",)),
        ("--decay-rate", optimisation.decay_rate, ("step", "plateau", "poly")),
        ("--patience-epochs", optimisation.patience_epochs, ("plateau",)),
        ("--cooldown-epochs", optimisation.cooldown_epochs, ENDS_AT_MIN_LR),
        ("--min-lr", optimisation.min_lr, (*ENDS_AT_MIN_LR, "plateau")),
    ):
        if value is not None and optimisation.sched not in schedules:
            _logger.warning("%s %g is without effect under --sched %s", flag, value, optimisation.sched)
    if optimisation.warmup_lr is not None and not optimisation.warmup_epochs:
        _logger.warning("--warmup-lr %g is without effect without --warmup-epochs", optimisation.warmup_lr)
    for flag, value in (("--lr-noise-pct", optimisation.lr_noise_pct), ("--lr-noise-std", optimisation.lr_noise_std)):
        if value is not None and optimisation.lr_noise is None:
            _logger.warning("%s %g is without effect without --lr-noise", flag, value)
