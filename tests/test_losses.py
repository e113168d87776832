"""What training minimises: with a teacher, with oneself, and what does not go together."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_training import options
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

import training.models
from training.losses import CosubLoss, DistillationLoss, build_loss
from training.optimisation import build_criterion
from training.options import Options

torch.manual_seed(0)
IMAGES, LABELS = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
ONE, OTHER = torch.randn(4, 3), torch.randn(4, 3)


class Fixed(nn.Module):
    """Answers what it was made with."""

    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self.answers = [nn.Parameter(answer) for answer in answers]
        self.asked: list[Tensor] = []

    def forward(self, images: Tensor) -> Any:
        self.asked.append(images)
        return tuple(self.answers) if len(self.answers) > 1 else self.answers[0]


def test_soft_distillation_is_that_of_the_paper_averaged_over_classes() -> None:
    teacher = torch.randn(4, 3)
    loss = DistillationLoss(nn.CrossEntropyLoss(), Fixed(teacher), is_hard=False, alpha=0.3, tau=2.0)
    p, q = (teacher / 2).softmax(1), (OTHER / 2).softmax(1)
    divergence = (p * (p / q).log()).sum() * 4 / 12
    expected = 0.7 * F.cross_entropy(ONE, LABELS) + 0.3 * divergence
    assert torch.allclose(loss(Fixed(ONE, OTHER), IMAGES, LABELS), expected)


def test_hard_distillation_learns_the_teachers_best_guess_from_the_same_images() -> None:
    teacher = Fixed(F.one_hot(torch.tensor([2, 2, 0, 1])).float())
    student = Fixed(ONE, OTHER)
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, is_hard=True, alpha=0.25)(student, IMAGES, LABELS)
    expected = 0.75 * F.cross_entropy(ONE, LABELS) + 0.25 * F.cross_entropy(OTHER, torch.tensor([2, 2, 0, 1]))
    assert torch.allclose(loss, expected)
    assert torch.equal(teacher.asked[0], IMAGES)
    loss.backward()
    assert teacher.answers[0].grad is None
    assert all(answer.grad is not None for answer in student.answers)


def test_cosub_learns_from_the_targets_and_from_the_other_pass() -> None:
    student = Fixed(torch.cat([ONE, OTHER]))
    loss = CosubLoss(BinaryCrossEntropy(0.0))(student, IMAGES, LABELS)
    right, bce = F.one_hot(LABELS, 3).float(), F.binary_cross_entropy_with_logits
    expected = bce(ONE, right) + bce(OTHER, right) + bce(ONE, OTHER.sigmoid()) + bce(OTHER, ONE.sigmoid())
    assert torch.allclose(loss, expected / 4)
    assert torch.equal(student.asked[0], torch.cat([IMAGES, IMAGES]))
    loss.backward()
    grads = student.answers[0].grad.chunk(2)
    for grad, logits, other in zip(grads, (ONE, OTHER), (OTHER, ONE), strict=True):
        own = bce(logits := logits.clone().requires_grad_(), right) + bce(logits, other.sigmoid())
        own.backward()  # the other pass is no way for the gradient
        assert torch.allclose(grad, logits.grad / 4)


# ---- the teacher


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": timm.create_model("test_resnet", num_classes=3).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def student() -> Any:
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, depth=1)


def distilled(path: Path, **changes: Any) -> Options:
    common = {"distillation_type": "hard", "teacher_model": "test_resnet", "teacher_path": str(path), "input_size": 32}
    return options(**{**common, **changes})


def loss_of(chosen: Options, model: nn.Module) -> nn.Module:
    has_teacher = chosen.distillation.distillation_type != "none"
    teacher = training.models.build_teacher(chosen, [*"abc"]) if has_teacher else None
    return build_loss(chosen, model, build_criterion(chosen.optimisation, None), teacher)


def test_the_teacher_is_the_one_of_the_file_and_stays_as_it_is(teacher_file: Path, student: Any) -> None:
    loss = loss_of(distilled(teacher_file, distillation_type="soft", distillation_tau=3.0), student)
    assert isinstance(loss, DistillationLoss)
    saved = torch.load(teacher_file)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in loss.teacher.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    loss(student.train(), images, torch.tensor([0, 2])).backward()
    assert all(torch.equal(value, saved[name]) for name, value in loss.teacher.state_dict().items())
    assert student.head.weight.grad is not None
    assert student.head_dist.weight.grad is not None
    assert student.eval()(images).shape == (2, 3)  # evaluation takes the mean of both heads
    assert (loss.alpha, loss.tau, loss.is_hard) == (0.5, 3.0, False)


def test_one_of_our_own_models_teaches_with_its_encoding_and_join(tmp_path: Path, student: Any) -> None:
    name, parts = "deit_tiny_patch16_224", {"pe": "learnable", "join_type": "LaPE"}
    teacher = timm.create_model(name, num_classes=3, img_size=32, **parts)
    description = {"model": name, "input_size": 32, **parts}
    checkpoint = {"format": "lape-vit", "version": 1, "model": teacher.state_dict(), "description": description}
    torch.save(checkpoint, tmp_path / "ours.pth")
    loss = loss_of(distilled(tmp_path / "ours.pth", teacher_model=name), student)
    assert isinstance(loss, DistillationLoss)
    assert loss.teacher.join_type == "LaPE"
    with pytest.raises(ValueError, match="cannot take images of --input-size"):
        loss_of(distilled(tmp_path / "ours.pth", teacher_model=name, input_size=48), student)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cosub": True}, "--cosub"),
        ({"train_mode": False}, "--no-train-mode"),
        ({"teacher_path": None}, "--teacher-path"),
        ({"teacher_model": None}, "--teacher-model"),
        ({"teacher_model": "resnet19"}, "resnet19"),
        ({"teacher_path": "nowhere.pth"}, "nowhere.pth"),
        ({"teacher_model": "test_vit"}, "--teacher-path .* does not fit test_vit of 3 classes"),
    ],
)
def test_what_does_not_go_with_distillation_is_refused(
    changes: dict[str, Any], words: str, teacher_file: Path, student: Any
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        loss_of(distilled(teacher_file, **changes), student)
    assert "\n" not in str(error.value)


def test_a_student_with_one_head_and_a_teacher_of_other_classes_are_refused(teacher_file: Path, student: Any) -> None:
    with pytest.raises(ValueError, match="needs a model with two heads, such as deit_tiny_distilled"):
        loss_of(distilled(teacher_file), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"of 5 classes: fc.bias is \(3,\), not \(5,\)"):
        training.models.build_teacher(distilled(teacher_file), [*"abcde"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teacher_model": "test_resnet"}, "--teacher-model test_resnet is without effect"),
        ({"teacher_path": "x.pth"}, "--teacher-path x.pth is without effect"),
        ({"distillation_alpha": 0.1}, "--distillation-alpha 0.1 is without effect"),
        ({"distillation_tau": 2.0}, "--distillation-tau 2 is without effect"),
        ({"cosub": True}, "--cosub without --drop-path"),
    ],
)
def test_options_of_a_teacher_that_is_not_there_are_told(
    changes: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    loss_of(options(**changes), nn.Linear(2, 2))
    (message,) = caplog.messages
    assert message.startswith(line)
