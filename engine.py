"""One epoch of training and one evaluation: two loops."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from logging import getLogger

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from runtime.distributed import largest_over_ranks, sum_over_ranks
from runtime.interrupt import Interrupted, noted_signal
from runtime.process import Runtime
from runtime.seeding import STEP, seed_everything
from training.optimisation import epoch_of_schedule
from training.state import Training

_logger = getLogger(__name__)


def train_one_epoch(
    training: Training, runtime: Runtime, title: str, after_update: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Train the updates of an epoch that are left, on the batches of its loader, which starts where they do.

    What is random depends on `--seed`, the epoch, the step and the process alone. An update whose loss is not finite in
    any process is skipped in all of them.

    Args:
        training: whose progress is kept up to date.
        title: what to show before the progress.
        after_update: is called after each update, in all processes.

    Returns:
        `loss`, the mean over the updates, not the skipped ones, of all processes; `lr`, the learning rate of the last
        update; `images_per_second` of all processes; and `waiting_share`, the part of the time (0..1) for which they
        waited for data, on average.

    Raises:
        FloatingPointError: `--max-bad-steps` updates in a row were skipped.
        Interrupted: a signal asked one of the processes to stop; all of them do, after the same update.
    """
    model, progress, optimizer, scheduler = training.model, training.progress, training.optimizer, training.scheduler
    run, accum_steps = training.options.run, training.options.optimisation.accum_steps
    device, first_update = runtime.device, training.epoch * training.updates
    progress.loss_sum = progress.loss_sum.to(device)

    def status() -> list[str]:
        accuracy = [f"acc@1 {training.rows[-1]['test_acc1']:.2f} %"] if training.rows else []
        return [f"loss {progress.loss_sum.item() / max(1, progress.done):.4f}", *accuracy, f"lr {training.lr:.2e}"]

    model.train(training.options.model.train_mode)
    scheduler.step(epoch_of_schedule(training.options.optimisation, training.epoch))
    scheduler.step_update(first_update + max(0, progress.step - 1))  # of the last update, should none be left
    with runtime.display.show(title, training.updates, progress.step) as loop:
        batches = loop.batches(training.loader)
        while progress.step < training.updates:
            scheduler.step_update(first_update + progress.step)
            optimizer.zero_grad()
            loss, num_images = torch.zeros((), device=device), 0
            for part in range(accum_steps):
                images, targets = next(batches)
                images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                num_images += len(images)
                batch = progress.step * accum_steps + part
                seed_everything(run.seed, STEP, training.epoch, batch, runtime.world.rank)
                if training.mixup is not None:
                    images, targets = training.mixup(images, targets)

                is_last = part == accum_steps - 1
                with nullcontext() if is_last else _without_reduction(model):
                    with runtime.autocast():
                        part_loss = training.criterion(model, images, targets) / accum_steps
                    loss += part_loss.detach()
                    if is_last:  # asked here and answered below, so that a GPU never waits: it has the backward to do
                        answer = largest_over_ranks(_report(loss))
                    training.scaler.scale(part_loss).backward()

            is_bad, signal_number = answer()
            if is_bad or not _update(training):
                progress.skip()
                _logger.warning("%s: update %d is skipped: its loss or gradient is not finite", title, progress.step)
                if progress.bad_in_a_row >= run.max_bad_steps:
                    raise FloatingPointError(_describe_divergence(training, loss, runtime.world.size))
            else:
                progress.add(loss)
                if training.ema is not None:
                    training.ema.update(model)

            loop.advance(num_images, status)  # which reads the loss now and then, so that the device need not wait
            after_update()
            if signal_number:
                raise Interrupted(signal_number)

    rate, share, loss_sum = loop.images_per_second(), loop.waiting_share(), progress.loss_sum
    of_this_process = torch.stack([loss_sum, *loss_sum.new_tensor([progress.done, share])])
    total, done, shares = sum_over_ranks(of_this_process).tolist()
    return {
        "loss": total / done if done else math.nan,
        "lr": training.lr,
        "images_per_second": rate,
        "waiting_share": shares / runtime.world.size,
    }


def _without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients are averaged over the processes once per update, with its last batch."""
    return getattr(model, "no_sync", nullcontext)()  # not by the type, which a compiled model hides


def _report(loss: Tensor) -> Tensor:
    """What the processes have to agree on: whether to skip the update, and which signal came; on the loss's device."""
    signal_number = torch.full((), noted_signal(), device=loss.device)  # which, unlike a copy, needs not wait
    return torch.stack([(~loss.isfinite()).long(), signal_number])


def _update(training: Training) -> bool:
    """Change the weights; False where the scaler found an overflow, and left them as they were."""
    optimizer, scaler, clip_grad = training.optimizer, training.scaler, training.options.optimisation.clip_grad
    scale = scaler.get_scale()
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(_trained_parameters(training.model), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


def _trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _describe_divergence(training: Training, loss: Tensor, world_size: int) -> str:
    progress, scale = training.progress, training.scaler.get_scale()
    mean_loss = sum_over_ranks(loss.clone()).item() / world_size
    gradients = [parameter.grad for parameter in training.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item() / scale
    return (
        f"{progress.bad_in_a_row} updates in a row were skipped (--max-bad-steps), up to update {progress.step} of the "
        f"epoch: loss {mean_loss:g}, learning rate {training.lr:g}, scale {scale:g}, gradient norm {norm:g}"
    )


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, num_images: int, runtime: Runtime, title: str) -> dict[str, float]:
    """Evaluate on every image once, over all processes.

    Args:
        model: not wrapped; maps images (B, 3, S, S) to logits (B, C).
        loader: this process's share of the images.
        num_images: of all processes, which must be the number seen.

    Returns:
        `acc1` and `acc5` in per cent (`acc5` is the accuracy of the best C guesses where C < 5), `loss`, the mean cross
        entropy in nats, and `count`, the number of images.

    Raises:
        RuntimeError: another number of images was seen.
        Interrupted: a signal asked one of the processes to stop; all of them do.
    """
    model.eval()
    device = runtime.device
    right = torch.zeros(2, dtype=torch.int64, device=device)  # by the best guess, by the best five
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def status() -> list[str]:
        return [f"acc@1 {100 * right[0].item() / loop.images:.2f} %"]

    with runtime.display.show(title, len(loader)) as loop:
        for images, targets in loop.batches(loader):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with runtime.autocast():
                logits = model(images)
            loss_sum += F.cross_entropy(logits.double(), targets, reduction="sum")
            is_right = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            right += torch.stack([is_right[:, 0].sum(), is_right.sum()])
            loop.advance(len(images), status)
            if noted_signal():
                break  # to tell the others, which come as far when they have seen their share

    (signal_number,) = largest_over_ranks(right.new_tensor([noted_signal()]))()
    if signal_number:
        raise Interrupted(signal_number)
    right1, right5, count = sum_over_ranks(torch.cat([right, right.new_tensor([loop.images])])).tolist()
    if count != num_images:
        raise RuntimeError(f"{count} images were evaluated in place of {num_images}: the processes' shares are wrong")
    loss = sum_over_ranks(loss_sum).item() / count
    return {"acc1": 100 * right1 / count, "acc5": 100 * right5 / count, "loss": loss, "count": count}
