"""Models as files that run without this project: ONNX, and torch's exported programs (`.pt2`), each checked."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lape_vit.images import data_config

TOLERANCE = 1e-3
"""Of each logit, absolute and relative: other kernels round otherwise, a wrong graph is far off."""
LARGEST_ONNX = 2**31 - 2**20
"""Bytes of a file's weights, which ONNX counts in 32 bits."""


class ExportError(RuntimeError):
    """What was exported does not compute what the model does, and is not written."""


def export_model(model: nn.Module, path: str | Path, kind: str) -> float:
    """Write a model for batches of any number of images, and check the file against the model.

    The file's input ``images`` is (B, 3, H, W) of the model's size, normalised; its output ``logits`` is (B, C). What
    the images and the classes are, `pretrained_cfg`, is stored in it as JSON: in ONNX under ``metadata_props``, in a
    `.pt2` file under ``extra_files``, by the name ``pretrained_cfg`` each.

    Args:
        model: ours or timm's, on the CPU; it is put into evaluation mode.
        kind: one of ``EXPORTERS``: `onnx`, which needs the packages onnx, onnxscript and onnxruntime, or `pt2`.

    Returns:
        The largest difference between a logit of the file and one of the model, over batches of two sizes.

    Raises:
        ExportError: the file's logits are not the model's.
        ImportError: a package is missing.
        ValueError: an unknown kind, or a model too large for it.
        OSError: the file cannot be written.
    """
    if kind not in EXPORTERS:
        raise ValueError(f"unknown kind {kind!r} of file: choose from {', '.join(EXPORTERS)}")
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.tmp")
    images, others = (_noise(model, batch) for batch in (2, 3))
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' own, of their next releases
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            run = EXPORTERS[kind](program, temporary, about(model))
            difference = max(_compare(run(batch), model(batch), kind) for batch in (others, images[:1]))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def about(model: Any) -> str:
    """What the images and the classes of a model are, as JSON."""
    cfg = getattr(model, "pretrained_cfg", {})
    return json.dumps({**data_config(model), **{name: cfg[name] for name in ("label_names",) if name in cfg}})


def _noise(model: nn.Module, batch: int) -> Tensor:
    return torch.randn(batch, *data_config(model)["input_size"], generator=torch.Generator().manual_seed(0))


def _compare(actual: Tensor, expected: Tensor, kind: str) -> float:
    difference = (actual - expected).abs().max().item()
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise ExportError(f"the logits of the {kind} file differ from the model's by up to {difference:g}")
    return difference


def _write_pt2(program: Any, path: Path, text: str) -> Callable[[Tensor], Tensor]:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"pretrained_cfg": text})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(program: Any, path: Path, text: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    size = sum(weight.numel() * weight.element_size() for weight in program.state_dict.values())
    if size > LARGEST_ONNX:
        raise ValueError(f"the model's {size / 1e9:.1f} GB do not fit into one ONNX file: export pt2")
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    exported: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    exported.model.metadata_props["pretrained_cfg"] = text
    exported.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


EXPORTERS: dict[str, Callable[[Any, Path, str], Callable[[Tensor], Tensor]]] = {"onnx": _write_onnx, "pt2": _write_pt2}
"""What writes a program with a text to a file, and returns what computes the file's logits, by the file's kind."""
