"""Every way in which timm's models are compiled, traced and exported."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from timm.models import create_feature_extractor
from torch import Tensor

from lape_vit import encodings
from lape_vit.joins import legal_joins
from tests.models import MODELS, create, disturb, over_pairs, sampled_sums

over_single_encodings = pytest.mark.parametrize("pe", list(encodings.ENCODINGS))
SAMPLED = [
    (pe, joins[turn % len(joins)])
    for turn, (pe, joins) in enumerate((pe, legal_joins(pe)) for pe in [*encodings.ENCODINGS, *sampled_sums()[:2]])
]
"""Every encoding under one join, the joins taking turns; and every join."""
SAMPLED += [("learnable", join) for join in legal_joins("learnable") if join not in {of for _, of in SAMPLED}]
over_sampled_pairs = pytest.mark.parametrize(("pe", "join_type"), SAMPLED)


def noise(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def model_and_images(pe: str | None = None, join_type: str | None = None, **kwargs: Any) -> tuple[Any, Tensor]:
    model = disturb(create(pe, join_type, **kwargs)).eval()
    return model, torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_fx_extracts_the_features_of_every_model(name: str) -> None:
    model, images = model_and_images(name=name)
    extracted = create_feature_extractor(model, return_nodes={"blocks.1": "last"})(images)
    last = model.forward_intermediates(images, [1], output_fmt="NLC", return_prefix_tokens=True)[1][0]
    tokens = torch.cat(last[::-1], dim=1) if model.num_prefix_tokens else last
    torch.testing.assert_close(extracted["last"], tokens)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_is_refused_with_a_way_that_works(name: str) -> None:
    model, _ = model_and_images(name=name)
    with pytest.raises(NotImplementedError, match=r"torch\.export") as error:
        torch.jit.script(model)
    assert "\n" not in str(error.value)


@over_pairs
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_every_pair_traces_without_complex_numbers(pe: str, join_type: str) -> None:
    model, images = model_and_images(pe, join_type)
    model(images)  # so that whatever is kept is there
    traced = torch.jit.trace(model, (images,))
    assert "complex" not in str(traced.inlined_graph).lower()
    torch.testing.assert_close(traced(images[:2]), model(images[:2]))


@over_pairs
def test_fx_extracts_the_features_of_every_pair(pe: str, join_type: str) -> None:
    model, images = model_and_images(pe, join_type)
    extracted = create_feature_extractor(model, return_nodes={"blocks.0": "first", "head": "logits"})(images)
    first = model.forward_intermediates(images, [0], output_fmt="NLC", return_prefix_tokens=True)[1][0]
    torch.testing.assert_close(extracted["first"], torch.cat(first[::-1], dim=1))
    torch.testing.assert_close(extracted["logits"], model(images))


@over_sampled_pairs
def test_training_and_evaluation_compile_into_one_graph_and_once(pe: str, join_type: str) -> None:
    torch.compiler.reset()
    model, images = model_and_images(pe, join_type)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def train_and_evaluate() -> None:
        compiled.train()(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        compiled.eval()
        for with_gradients in (True, False):  # encodings may keep their terms where there are none
            with torch.set_grad_enabled(with_gradients):
                torch.testing.assert_close(compiled(images), model(images))

    train_and_evaluate()
    with torch.compiler.set_stance("fail_on_recompile"):
        train_and_evaluate()
        train_and_evaluate()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++")
@torch.no_grad()
def test_relative_compiles_where_parts_are_joined_as_on_a_gpu() -> None:
    torch.compiler.reset()
    model, images = model_and_images("relative", depth=1)
    compiled = torch.compile(model, options={"force_pointwise_cat": True})
    torch.testing.assert_close(compiled(images), model(images))


@over_sampled_pairs
def test_one_graph_serves_every_size_in_torch_and_in_onnxruntime(pe: str, join_type: str, tmp_path: Path) -> None:
    model, _ = model_and_images(pe, join_type, dynamic_img_size=True, depth=1)
    patch, (height, width) = model.patch_embed.patch_size, (torch.export.Dim(name, min=2, max=16) for name in "hw")
    sizes = {0: torch.export.Dim("batch"), 2: patch[0] * height, 3: patch[1] * width}
    program = torch.export.export(model, (noise(2, 40, 56),), dynamic_shapes=(sizes,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(program, (), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for images in (noise(3, *model.patch_embed.img_size), noise(1, 40, 56), noise(2, 64, 24)):
        torch.testing.assert_close(program.module()(images), model(images))
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=1e-4)


@over_single_encodings
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_the_older_exporter_serves_every_size_or_says_that_it_cannot(pe: str, dynamic: bool, tmp_path: Path) -> None:
    model, _ = model_and_images(pe, dynamic_img_size=dynamic, depth=1)
    axes = {"images": {0: "batch", **({2: "height", 3: "width"} if dynamic else {})}}
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": axes}
    refusal = ""
    try:
        torch.onnx.export(model, (noise(2, 32, 32),), tmp_path / "m.onnx", dynamo=False, **names)
    except NotImplementedError as error:
        refusal = str(error)
    if refusal:
        assert dynamic
        assert refusal.startswith("the older exporter to ONNX cannot resample")
        assert "\n" not in refusal
        return
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    others = (noise(1, 40, 56), noise(2, 64, 24)) if dynamic else ()
    for images in (noise(3, 32, 32), *others):
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=1e-4)


@over_single_encodings
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_one_trace_serves_every_size(pe: str) -> None:
    model, images = model_and_images(pe, dynamic_img_size=True)
    traced = torch.jit.trace(model, (images,))
    for other in (images, noise(1, 40, 56)):
        torch.testing.assert_close(traced(other), model(other))
