"""What training minimises, as a function of the model, its images and their targets: with a teacher, or with oneself.

Shapes: B batch, C classes; images (B, 3, H, W), targets (B,) labels or (B, C) probabilities, logits (B, C).
"""

from logging import getLogger
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.options import DistillationOptions, Options

_logger = getLogger(__name__)


class SupervisedLoss(nn.Module):
    """`criterion` of the model's logits and the targets."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(model(images).float(), targets)


class DistillationLoss(nn.Module):
    """DeiT's distillation (https://arxiv.org/abs/2012.12877, section 3): the targets teach the head of the class token,
    a teacher teaches that of the distillation token.

    Args:
        criterion: of the class token's logits and the targets.
        teacher: maps images to logits; it is never trained.
        is_hard: the teacher's best guess is the label of a cross entropy; else its probabilities are to be matched.
        alpha: the teacher's weight in the sum, the criterion having 1 - alpha.
        tau: temperature of both probabilities, if they are to be matched.
    """

    def __init__(
        self, criterion: nn.Module, teacher: nn.Module, is_hard: bool, alpha: float = 0.5, tau: float = 1.0
    ) -> None:
        super().__init__()
        self.criterion, self.teacher, self.is_hard = criterion, teacher.eval().requires_grad_(False), is_hard
        self.alpha, self.tau = alpha, tau

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """`model` maps images to the logits of both heads."""
        logits, distilled = (head.float() for head in model(images))
        with torch.no_grad():
            taught = self.teacher(images).float()
        if self.is_hard:
            distillation = F.cross_entropy(distilled, taught.argmax(1))
        else:
            distillation = F.kl_div(
                F.log_softmax(distilled / self.tau, 1),
                F.log_softmax(taught / self.tau, 1),
                reduction="sum",
                log_target=True,
            ) * (self.tau**2 / distilled.numel())  # the mean over B and C, as in DeiT's code
        return (1 - self.alpha) * self.criterion(logits, targets) + self.alpha * distillation


class CosubLoss(nn.Module):
    """Co-training of two submodels (https://arxiv.org/abs/2212.04884): images pass twice, through different blocks as
    `--drop-path` has it; each pass learns from the targets and from the other pass.

    Args:
        criterion: binary cross entropy of logits and targets.
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        one, other = model(torch.cat([images, images])).float().chunk(2)
        supervised = self.criterion(one, targets) + self.criterion(other, targets)
        mutual = F.binary_cross_entropy_with_logits(one, other.detach().sigmoid())
        mutual = mutual + F.binary_cross_entropy_with_logits(other, one.detach().sigmoid())
        return (supervised + mutual) / 4


def build_loss(options: Options, model: Any, criterion: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """The loss of the options; a model that is to be distilled, as it is with a teacher, is told so.

    Raises:
        ValueError: options that do not go together.
    """
    warn_of_unused_options(options)
    if teacher is None:
        return CosubLoss(criterion) if options.optimisation.cosub else SupervisedLoss(criterion)
    what = f"--distillation-type {options.distillation.distillation_type}"
    if options.optimisation.cosub:
        raise ValueError(f"{what} does not go with --cosub: give one of them")
    if not options.model.train_mode:
        raise ValueError(f"{what} does not go with --no-train-mode, in which the two heads are one")
    if not hasattr(model, "set_distilled_training"):
        raise ValueError(f"{what} needs a model with two heads, such as deit_tiny_distilled_patch16_224")
    model.set_distilled_training(True)
    return build_distillation(options.distillation, criterion, teacher)


def build_distillation(distillation: DistillationOptions, criterion: nn.Module, teacher: nn.Module) -> DistillationLoss:
    """Distillation by the teacher."""
    return DistillationLoss(
        criterion,
        teacher,
        is_hard=distillation.distillation_type == "hard",
        alpha=0.5 if distillation.distillation_alpha is None else distillation.distillation_alpha,
        tau=1.0 if distillation.distillation_tau is None else distillation.distillation_tau,
    )


def warn_of_unused_options(options: Options) -> None:
    """Warn of each option that was given and that the loss does not look at."""
    distillation = options.distillation
    kind, tau = distillation.distillation_type, distillation.distillation_tau
    for flag, value in (
        ("--teacher-model", distillation.teacher_model),
        ("--teacher-path", distillation.teacher_path),
        ("--distillation-alpha", distillation.distillation_alpha),
    ):
        if value is not None and kind == "none":
            _logger.warning("%s %s is without effect under --distillation-type none", flag, value)
    if tau is not None and kind != "soft":
        _logger.warning("--distillation-tau %g is without effect under --distillation-type %s", tau, kind)
    if options.optimisation.cosub and not (options.model.drop_path and options.model.train_mode):
        _logger.warning("--cosub without --drop-path in training mode: both passes go through the same blocks")
