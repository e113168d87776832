"""Our models in the libraries that people use with timm's: one of each family of encodings, and of LaPE."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import DEIT, SIZES, create, disturb

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]  # the libraries' own
PAIRS = [
    ("learnable", "LaPE"),
    ("rope_mixed", "basic"),
    ("relative", "basic"),
    ("2D_RPE", "LaPE"),
    ("2D_sin+peg", "PVG"),
]
over_pairs = pytest.mark.parametrize(("pe", "join_type"), PAIRS)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(pe: str, join_type: str, **kwargs: Any) -> Any:
    return disturb(create(pe, join_type, **kwargs)).eval()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@over_pairs
def test_lora_of_peft_trains_and_merges(pe: str, join_type: str, pixels: Tensor) -> None:
    import peft

    model = model_of(pe, join_type)
    expected = model(pixels)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(pixels), expected)
    optimizer = torch.optim.SGD([part for part in adapted.parameters() if part.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(pixels).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = adapted(pixels)
    assert not torch.allclose(trained, expected)
    torch.testing.assert_close(adapted.merge_and_unload()(pixels), trained, rtol=1e-4, atol=1e-4)


@over_pairs
def test_captums_integrated_gradients_are_complete(pe: str, join_type: str, pixels: Tensor) -> None:
    from captum.attr import IntegratedGradients

    model = model_of(pe, join_type).double()
    pixels = pixels.double()
    found = IntegratedGradients(model).attribute(pixels, target=1, n_steps=200)
    difference = (model(pixels) - model(torch.zeros_like(pixels)))[:, 1]
    torch.testing.assert_close(found.flatten(1).sum(dim=1), difference, rtol=5e-2, atol=5e-2)


@over_pairs
def test_grad_cam_of_a_block_has_the_images_size(pe: str, join_type: str, pixels: Tensor) -> None:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = model_of(pe, join_type)

    def on_the_grid(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, model.patch_embed.grid_size)

    with GradCAM(model, [model.blocks[0].norm1], reshape_transform=on_the_grid) as cam:
        maps = cam(pixels, [ClassifierOutputTarget(1)] * 2)
    assert maps.shape == (2, 32, 32)
    assert maps.max() > 0


@over_pairs
def test_torchao_quantises_to_int8(pe: str, join_type: str, pixels: Tensor) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = model_of(pe, join_type)
    expected = model(pixels)
    quantize_(model, Int8WeightOnlyConfig())
    found = model(pixels)
    assert not found.equal(expected)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.98


@over_pairs
def test_transformers_trains_it(pe: str, join_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer, TrainingArguments

    # The datasets.py of this checkout is not the library of this name.
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of(pe, join_type)

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": number % 5} for number, image in enumerate(images)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    classifier = Classifier()
    trainer = Trainer(classifier, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@over_pairs
def test_a_timm_wrapper_of_transformers_saves_and_loads_it(
    pe: str, join_type: str, pixels: Tensor, tmp_path: Path
) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    arguments = {**SIZES, "pe": pe, "join_type": join_type}
    labels = arguments.pop("num_classes")
    config = TimmWrapperConfig(architecture=DEIT, model_args=arguments, num_labels=labels)
    wrapper = TimmWrapperForImageClassification(config).eval()
    disturb(wrapper)
    model = model_of(pe, join_type)
    model.load_state_dict(wrapper.timm_model.state_dict())
    assert (wrapper.timm_model.pe, wrapper.timm_model.join_type) == (model.pe, model.join_type)
    expected = model(pixels)
    torch.testing.assert_close(wrapper(pixels).logits, expected)
    wrapper.save_pretrained(tmp_path)
    loaded = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(pixels).logits, expected)


@pytest.mark.parametrize(("pe", "join_type"), PAIRS[:4])
def test_timms_own_tests_pass(pe: str, join_type: str) -> None:
    folder = Path(sys.prefix) / "timm-tests"
    if not folder.is_dir():
        pytest.skip("make test-ecosystem downloads timm's tests")
    options = ["-p", "tests.timm_suite", "--pair", pe, join_type, "-c", os.devnull, "--rootdir", folder, folder]
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-5000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 30


@over_pairs
def test_fully_sharded_it_trains_as_alone(pe: str, join_type: str, pixels: Tensor, process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    losses = []
    for is_sharded in (False, True):
        model = model_of(pe, join_type).train()
        if is_sharded:
            mesh = init_device_mesh("cpu", (1,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        of_run = []
        for _ in range(3):
            loss = model(pixels).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_run.append(loss.item())
        losses.append(of_run)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
