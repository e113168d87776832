"""The evaluation of a run's model on all test images."""

import json
from logging import getLogger

from torch import nn

from engine import evaluate
from runtime.files import write_text
from training.setup import Setup

_logger = getLogger(__name__)


def evaluate_checkpoint(setup: Setup) -> None:
    """Evaluate the model, show the result, and write `eval.json`."""
    result = evaluate_model(setup, setup.model, "test")
    top5 = f" Acc@5 {result['acc5']:.3f}" if "acc5" in result else ""
    _logger.info("* Acc@1 %.3f%s loss %.3f", result["acc1"], top5, result["loss"])
    if setup.output_dir is not None:
        write_text(setup.output_dir / "eval.json", json.dumps(result) + "\n")


def evaluate_model(setup: Setup, model: nn.Module, title: str) -> dict[str, float]:
    """Evaluate `model` on the test images; of five classes or fewer, the best five guesses have no accuracy."""
    times = 1 if setup.options.data.dist_eval else setup.runtime.world.size
    result = evaluate(model, setup.test_loader, times * setup.num_test_images, setup.runtime, title)
    if setup.description["num_classes"] <= 5:
        del result["acc5"]
    return {**result, "count": setup.num_test_images}
