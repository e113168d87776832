"""Mixup, loss, optimizer and schedule from the options, with timm's parts."""

import argparse
import inspect
import warnings
from logging import getLogger
from typing import Any

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

_logger = getLogger(__name__)

OPTIONS = {
    *("lr", "initial_lr", "lr_scale", "max_lr_snapshot", "weight_decay"),
    *("eps", "betas", "betas_1d", "beta1", "momentum", "fused"),
}
"""Entries of an optimizer's `param_groups` that the options and the device decide; all others are its state."""


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup and cutmix of a batch, with the labels smoothed; None where both are off.

    Raises:
        ValueError: a batch of odd size, which timm cannot mix, or a box that is larger at the low end.
    """
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        if args.mixup_off_epoch is not None:
            _logger.warning("--mixup-off-epoch %d is without effect without --mixup or --cutmix", args.mixup_off_epoch)
        return None
    if args.batch_size % 2:
        raise ValueError(f"--batch-size {args.batch_size} is odd: mixup and cutmix need pairs of images")
    if args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise ValueError(f"--cutmix-minmax {args.cutmix_minmax}: the first number must be the smaller one")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_criterion(args: argparse.Namespace, mixup: Mixup | None) -> nn.Module:
    """Mean loss of logits (B, C) against labels (B,), or against the (B, C) targets that mixup makes; in nats.

    With `--bce-loss` each class is a binary question, and all classes of a mixed image are right answers (DeiT III).

    Raises:
        ValueError: `--bce-loss` with smoothed labels, by which every class would be a right answer.
    """
    if args.bce_loss:
        if args.smoothing:
            raise ValueError(f"--smoothing {args.smoothing:g} does not go with --bce-loss: set it to 0")
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    if args.cosub:
        return BinaryCrossEntropy(args.smoothing)
    if mixup is not None:
        return SoftTargetCrossEntropy()  # mixup has smoothed the labels
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def images_per_update(args: argparse.Namespace, world_size: int) -> int:
    """The effective batch, of all processes."""
    return args.batch_size * args.accum_steps * world_size


def learning_rate(args: argparse.Namespace, world_size: int) -> float:
    """The peak learning rate: DeiT's linear scaling, unless `--unscale-lr`."""
    return args.lr if args.unscale_lr else args.lr * images_per_update(args, world_size) / 512


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> Optimizer:
    """timm's optimizer, without weight decay on what the model exempts.

    Raises:
        ValueError: an unknown optimizer, one that does not take the options, or one that needs a loop of its own.
    """
    name = args.opt.lower().removeprefix("lookahead_")
    if name not in list_optimizers():
        raise ValueError(
            f"unknown --opt {args.opt!r}: choose from timm.optim.list_optimizers(), such as adamw, lamb or sgd"
        )
    info = get_optimizer_info(name)
    if info.second_order:
        raise ValueError(f"--opt {args.opt} needs second derivatives, which this training loop does not compute")
    options: dict[str, Any] = {}
    for option, value, is_known in (
        ("eps", args.opt_eps, info.has_eps),
        ("betas", args.opt_betas, info.has_betas),
        ("momentum", args.momentum, info.has_momentum),
    ):
        if value is not None and is_known:
            options[option] = value
        elif value is not None:
            _logger.warning("%s has no %s: %s is without effect", args.opt, option, value)
    if isinstance(info.opt_class, type) and "fused" in inspect.signature(info.opt_class).parameters:
        options["fused"] = True  # one kernel for all weights
    try:
        return create_optimizer_v2(model, args.opt, lr, args.weight_decay, **options)
    except Exception as error:  # each optimizer has its own checks and dependencies, and raises what it likes
        raise ValueError(f"--opt {args.opt} cannot be made with {options}: {error}") from error


def build_scheduler(args: argparse.Namespace, optimizer: Optimizer, updates_per_epoch: int) -> Scheduler:
    """The learning rate as a function of the epoch or, with `--sched-on-updates`, of the update.

    Only `plateau` looks at more: at the accuracies that `step` is told after each epoch.

    Raises:
        ValueError: options that do not go together.
    """
    if args.sched == "plateau" and args.sched_on_updates:
        raise ValueError("--sched-on-updates does not go with --sched plateau, which looks at whole epochs")
    cooldown = args.cooldown_epochs or 0
    if cooldown >= args.epochs:
        raise ValueError(f"--cooldown-epochs {cooldown} leaves nothing of --epochs {args.epochs}")
    if args.lr_noise and args.lr_noise != sorted(set(args.lr_noise))[:2]:
        raise ValueError(f"--lr-noise {args.lr_noise}: give where it starts and, if it ends, a larger number for where")
    tell_unused_schedule_options(args)
    constant = {"sched": "step", "decay_rate": 1.0}  # a step by a factor of 1 still has the warm-up
    decay_rate = 0.1 if args.decay_rate is None else args.decay_rate
    warmup_lr = 1e-6 if args.warmup_lr is None else args.warmup_lr
    with warnings.catch_warnings():  # timm deprecates plateau as it does not save its state; ours is restored
        warnings.filterwarnings("ignore", message="PlateauLRScheduler is deprecated", category=FutureWarning)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            **(constant if args.sched == "constant" else {"sched": args.sched, "decay_rate": decay_rate}),
            num_epochs=args.epochs - cooldown,
            decay_epochs=30 if args.decay_epochs is None else args.decay_epochs,
            patience_epochs=10 if args.patience_epochs is None else args.patience_epochs,
            min_lr=1e-5 if args.min_lr is None else args.min_lr,
            # timm's plateau starts from here even where there is no warm-up
            warmup_lr=warmup_lr if args.warmup_epochs else optimizer.param_groups[0]["lr"],
            warmup_epochs=args.warmup_epochs,
            noise=args.lr_noise,
            noise_pct=0.67 if args.lr_noise_pct is None else args.lr_noise_pct,
            noise_std=1.0 if args.lr_noise_std is None else args.lr_noise_std,
            noise_seed=args.seed,
            step_on_epochs=not args.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
    return scheduler


def tell_unused_schedule_options(args: argparse.Namespace) -> None:
    """Warn of each option that was given and that the schedule does not look at."""
    for flag, value, schedules in (
        ("--decay-epochs", args.decay_epochs, ("step",)),
        ("--decay-rate", args.decay_rate, ("step", "plateau", "poly")),
        ("--patience-epochs", args.patience_epochs, ("plateau",)),
        ("--cooldown-epochs", args.cooldown_epochs, ("cosine", "tanh", "poly")),
        ("--min-lr", args.min_lr, ("cosine", "tanh", "poly", "plateau")),
    ):
        if value is not None and args.sched not in schedules:
            _logger.warning("%s %g is without effect under --sched %s", flag, value, args.sched)
    if args.warmup_lr is not None and not args.warmup_epochs:
        _logger.warning("--warmup-lr %g is without effect without --warmup-epochs", args.warmup_lr)
    for flag, value in (("--lr-noise-pct", args.lr_noise_pct), ("--lr-noise-std", args.lr_noise_std)):
        if value is not None and args.lr_noise is None:
            _logger.warning("%s %g is without effect without --lr-noise", flag, value)
