"""One epoch of training and one evaluation: two loops."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from logging import getLogger

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from training.distributed import World, largest_over_ranks, sum_over_ranks
from training.interrupt import Interrupted, noted_signal
from training.logs import LoopDisplay
from training.seeding import STEP, seed_everything
from training.state import Progress

_logger = getLogger(__name__)


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: Scheduler,
    scaler: GradScaler,
    *,
    progress: Progress,
    epoch: int,
    title: str,
    world: World,
    device: torch.device,
    amp_dtype: torch.dtype,
    seed: int,
    accum_steps: int,
    clip_grad: float | None,
    max_bad_steps: int,
    train_mode: bool = True,
    mixup: Mixup | None,
    ema: ModelEmaV3 | None,
    display: LoopDisplay,
    after_update: Callable[[], None],
) -> dict[str, float]:
    """Train the updates of an epoch that are left, on the batches of `loader`, which starts where they do.

    An update whose loss is not finite in any process is skipped in all of them.

    Args:
        model: maps images (B, 3, S, S) to logits (B, C); it may be wrapped for several processes.
        criterion: maps the model, images and targets to the mean loss, as those of `training.losses`.
        progress: is kept up to date.
        epoch: epochs finished before this one; the schedule depends on it.
        title: what to show before the progress.
        seed: what is random here depends on this, the epoch, the step and the process alone.
        accum_steps: batches per update.
        clip_grad: largest norm of the gradient; None for any.
        max_bad_steps: skipped updates in a row that end the training.
        train_mode: whether the model is in training mode, with its dropout.
        ema: of the unwrapped model.
        after_update: is called after each update, in all processes.

    Returns:
        `loss`, the mean over the updates, not the skipped ones, of all processes; `lr`, the learning rate of the last
        update; `images_per_second` of all processes; and `waiting_share`, the part of the time (0..1) for which they
        waited for data, on average.

    Raises:
        FloatingPointError: `max_bad_steps` updates in a row were skipped.
        Interrupted: a signal asked one of the processes to stop; all of them do, after the same update.
    """
    model.train(train_mode)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    updates = len(loader) // accum_steps
    progress.loss_sum = progress.loss_sum.to(device)

    def status() -> str:
        return f"loss {progress.loss_sum.item() / max(1, progress.done):.4f}  lr {optimizer.param_groups[0]['lr']:.2e}"

    scheduler.step(epoch)
    scheduler.step_update(epoch * updates + max(0, progress.step - 1))  # of the last update, should none be left
    with display.show(title, updates, progress.step) as loop:
        batches = loop.batches(loader)
        while progress.step < updates:
            scheduler.step_update(epoch * updates + progress.step)
            optimizer.zero_grad()
            loss, num_images = torch.zeros((), device=device), 0
            for part in range(accum_steps):
                images, targets = next(batches)
                images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                num_images += len(images)
                seed_everything(seed, STEP, epoch, progress.step * accum_steps + part, world.rank)
                if mixup is not None:
                    images, targets = mixup(images, targets)

                is_last = part == accum_steps - 1
                with nullcontext() if is_last else _without_reduction(model):
                    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                        part_loss = criterion(model, images, targets) / accum_steps
                    loss += part_loss.detach()
                    if is_last:  # asked here and answered below, so that a GPU never waits: it has the backward to do
                        answer = largest_over_ranks(_report(loss))
                    scaler.scale(part_loss).backward()

            is_bad, signal_number = answer()
            if not is_bad:
                is_bad = not _update(optimizer, scaler, parameters, clip_grad)
            progress.step += 1
            if is_bad:
                progress.skip()
                _logger.warning("%s: update %d is skipped: its loss or gradient is not finite", title, progress.step)
                if progress.bad_in_a_row >= max_bad_steps:
                    raise FloatingPointError(_describe_divergence(loss, optimizer, scaler, parameters, progress, world))
            else:
                progress.bad_in_a_row = 0
                progress.loss_sum += loss
                progress.done += 1
                if ema is not None:
                    ema.update(model)

            loop.advance(num_images, status)  # which reads the loss now and then, so that the device need not wait
            after_update()
            if signal_number:
                raise Interrupted(signal_number)

    rate, share, loss_sum = loop.images_per_second(), loop.waiting_share(), progress.loss_sum
    of_this_process = torch.stack([loss_sum, *loss_sum.new_tensor([progress.done, share])])
    total, done, shares = sum_over_ranks(of_this_process).tolist()
    return {
        "loss": total / done if done else math.nan,
        "lr": optimizer.param_groups[0]["lr"],
        "images_per_second": rate,
        "waiting_share": shares / world.size,
    }


def _without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients are averaged over the processes once per update, with its last batch."""
    return getattr(model, "no_sync", nullcontext)()  # not by the type, which a compiled model hides


def _report(loss: Tensor) -> Tensor:
    """What the processes have to agree on: whether to skip the update, and which signal came; on the loss's device."""
    signal_number = torch.full((), noted_signal(), device=loss.device)  # which, unlike a copy, needs not wait
    return torch.stack([(~loss.isfinite()).long(), signal_number])


def _update(optimizer: Optimizer, scaler: GradScaler, parameters: list[nn.Parameter], clip_grad: float | None) -> bool:
    """Change the weights; False where the scaler found an overflow, and left them as they were."""
    scale = scaler.get_scale()
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


def _describe_divergence(
    loss: Tensor,
    optimizer: Optimizer,
    scaler: GradScaler,
    parameters: list[nn.Parameter],
    progress: Progress,
    world: World,
) -> str:
    mean_loss = sum_over_ranks(loss.clone()).item() / world.size
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item() / scaler.get_scale()
    return (
        f"{progress.bad_in_a_row} updates in a row were skipped (--max-bad-steps), up to update {progress.step} of the "
        f"epoch: loss {mean_loss:g}, learning rate {optimizer.param_groups[0]['lr']:g}, scale {scaler.get_scale():g}, "
        f"gradient norm {norm:g}"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    *,
    num_images: int,
    title: str,
    device: torch.device,
    amp_dtype: torch.dtype,
    display: LoopDisplay,
) -> dict[str, float]:
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
    right = torch.zeros(2, dtype=torch.int64, device=device)  # by the best guess, by the best five
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def status() -> str:
        return f"acc@1 {100 * right[0].item() / loop.images:.2f} %"

    with display.show(title, len(loader)) as loop:
        for images, targets in loop.batches(loader):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
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
