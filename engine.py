"""One epoch of training and one evaluation: two loops."""

import math

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from training.distributed import sum_over_ranks
from training.interrupt import raise_if_interrupted
from training.logs import LoopDisplay


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: Scheduler,
    scaler: GradScaler,
    *,
    epoch: int,
    title: str,
    device: torch.device,
    amp_dtype: torch.dtype,
    clip_grad: float | None,
    train_mode: bool = True,
    mixup: Mixup | None,
    ema: ModelEmaV3 | None,
    display: LoopDisplay,
) -> dict[str, float]:
    """Train on every batch of `loader` once.

    Args:
        model: maps images (B, 3, S, S) to logits (B, C); it may be wrapped for several processes.
        criterion: maps the model, images and targets to the mean loss, as those of `training.losses`.
        epoch: epochs finished before this one; the schedule depends on it.
        title: what to show before the progress.
        clip_grad: largest norm of the gradient; None for any.
        train_mode: whether the model is in training mode, with its dropout.
        ema: of the unwrapped model.

    Returns:
        `loss`, the mean over the batches of all processes; `lr`, the learning rate of the last update; and
        `images_per_second` of all processes.

    Raises:
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    model.train(train_mode)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def status() -> str:
        mean_loss = loss_sum.item() / loop.step
        lr = optimizer.param_groups[0]["lr"]
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"{title}: the loss became {mean_loss} at a learning rate of {lr:g}")
        return f"loss {mean_loss:.4f}  lr {lr:.2e}"

    scheduler.step(epoch)
    with display.show(title, len(loader)) as loop:
        for update, (images, targets) in enumerate(loader, start=epoch * len(loader)):
            scheduler.step_update(update)
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if mixup is not None:
                images, targets = mixup(images, targets)

            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                loss = criterion(model, images, targets)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, clip_grad)
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update(model)

            loss_sum += loss.detach()
            loop.advance(len(images), status)  # which reads the loss now and then, so that the device need not wait
            raise_if_interrupted()

    status()  # looks at the last batches too
    total, steps = sum_over_ranks(torch.stack([loss_sum, loss_sum.new_tensor(loop.step)])).tolist()
    rate = loop.images_per_second()
    return {"loss": total / steps, "lr": optimizer.param_groups[0]["lr"], "images_per_second": rate}


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
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    model.eval()
    right = torch.zeros(2, dtype=torch.int64, device=device)  # by the best guess, by the best five
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def status() -> str:
        return f"acc@1 {100 * right[0].item() / loop.images:.2f} %"

    with display.show(title, len(loader)) as loop:
        for images, targets in loader:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                logits = model(images)
            loss_sum += F.cross_entropy(logits.double(), targets, reduction="sum")
            is_right = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            right += torch.stack([is_right[:, 0].sum(), is_right.sum()])
            loop.advance(len(images), status)
            raise_if_interrupted()

    right1, right5, count = sum_over_ranks(torch.cat([right, right.new_tensor([loop.images])])).tolist()
    if count != num_images:
        raise RuntimeError(f"{count} images were evaluated in place of {num_images}: the processes' shares are wrong")
    loss = sum_over_ranks(loss_sum).item() / count
    return {"acc1": 100 * right1 / count, "acc5": 100 * right5 / count, "loss": loss, "count": count}
