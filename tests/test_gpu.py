"""What only a GPU can show; skipped without one."""

from pathlib import Path

import pytest
import tiny_run
import torch
import torch.nn.functional as F
from tiny_run import call, differences, load, log_of, timeless

from lape_vit.encodings import ENCODINGS
from tests.models import images, over_pairs, tiny

pytestmark = pytest.mark.gpu


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{tiny_run.RECIPE}data-path: {tiny_run.make_images(tmp_path / 'images')}\n")
    return path


@pytest.mark.parametrize("amp_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("flags", [(), ("--compile",), ("--model-ema", "--model-ema-force-cpu")])
def test_a_run_trains_goes_on_and_is_evaluated(
    amp_dtype: str, flags: tuple[str, ...], tmp_path: Path, recipe: Path
) -> None:
    assert call("--recipe", recipe, "--amp-dtype", amp_dtype, *flags, "--output_dir", tmp_path) == 0
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert bool(checkpoint["scaler"]) == (amp_dtype == "float16")
    assert call("--resume", tmp_path / "checkpoint.pth", "--epochs", 3) == 0
    skipped = [row["skipped_steps"] for row in log_of(tmp_path)]
    assert len(skipped) == 3
    assert not any(skipped) or amp_dtype == "float16"  # whose scale is lowered by steps that overflow
    assert call("--eval", "--resume", tmp_path / "checkpoint.pth", "--output_dir", tmp_path) == 0


def test_a_deterministic_run_repeats_bit_for_bit(tmp_path: Path, recipe: Path) -> None:
    for name in ("one", "other"):
        assert call("--recipe", recipe, "--deterministic", "--output_dir", tmp_path / name) == 0
    checkpoints = [load(tmp_path / name / "checkpoint.pth") for name in ("one", "other")]
    assert differences(*checkpoints) == []
    assert timeless(tmp_path / "one") == timeless(tmp_path / "other")


@over_pairs
@torch.no_grad()
def test_a_move_to_the_gpu_and_back_leaves_nothing_stale(pe: str, join_type: str) -> None:
    model, pixels = tiny(pe, join_type), images()
    before = model(pixels)
    torch.testing.assert_close(model.cuda()(pixels.cuda()).cpu(), before)
    for parameter in model.parameters():
        parameter.add_(0.1)
    changed = model(pixels.cuda()).cpu()
    torch.testing.assert_close(model.cpu()(pixels), changed)
    assert not torch.equal(changed, before)


@pytest.mark.parametrize("pe", list(ENCODINGS))
def test_every_encoding_trains_compiled_in_one_graph_and_once(pe: str) -> None:
    torch.compiler.reset()
    model, pixels = tiny(pe, depth=1).float().cuda(), images().float().cuda()
    compiled = torch.compile(model, fullgraph=True)
    compiled(pixels).square().mean().backward()
    of_compiled = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(pixels).square().mean().backward()
    for grad, parameter in zip(of_compiled, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-3, rtol=1e-2)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(pixels.flip(0)).square().mean().backward()


@over_pairs
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_gpu(pe: str, join_type: str) -> None:
    model, pixels = tiny(pe, join_type).float().cuda(), images().float().cuda()
    labels = torch.zeros(len(pixels), dtype=torch.long, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(is_training: bool) -> None:
        model.train(is_training)
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(is_training):
            loss = F.cross_entropy(model(pixels), labels)
        if is_training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for is_training in (True, False):
        step(is_training)  # the first one may fill what is kept
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(is_training)
        finally:
            torch.cuda.set_sync_debug_mode("default")
