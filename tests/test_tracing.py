"""Every way in which timm's models are compiled, traced and exported."""

import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from timm.models import create_feature_extractor
from torch import Tensor

from lape_vit import encodings
from tests.models import MODELS, create, disturb, over_pairs

over_single_encodings = pytest.mark.parametrize("pe", list(encodings.ENCODINGS))


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


@over_pairs
def test_every_pair_compiles_into_one_graph(pe: str, join_type: str) -> None:
    torch.compiler.reset()
    model, images = model_and_images(pe, join_type)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


@over_pairs
def test_every_pair_trains_without_compiling_again(pe: str, join_type: str) -> None:
    torch.compiler.reset()
    model, images = model_and_images(pe, join_type)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def train_and_evaluate() -> None:
        compiled.train()(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(images), model(images))

    train_and_evaluate()
    with torch.compiler.set_stance("fail_on_recompile"):
        train_and_evaluate()
        train_and_evaluate()


@over_single_encodings
def test_every_encoding_exports_with_a_dynamic_batch(pe: str) -> None:
    model, images = model_and_images(pe)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (2, 3):
        torch.testing.assert_close(program(images[:batch]), model(images[:batch]))


@over_single_encodings
def test_every_encoding_runs_under_onnxruntime(pe: str, tmp_path: Path) -> None:
    model, images = model_and_images(pe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            model, (images,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images[:2].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images[:2]), atol=1e-4, rtol=1e-4)
