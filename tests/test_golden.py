"""The originals' numbers, and the conversion of their state dicts, on the models kept in ``golden/``."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from lape_vit import convert_checkpoint, encodings
from tests.models import COMPACT, DEIT, DISTILLED, MODELS, assert_equal, create, over_pairs

GOLDEN = Path(__file__).parent / "golden"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))


def is_known(pe: str) -> bool:
    try:
        encodings.resolve(pe)
    except ValueError:
        return False
    return True


KNOWN = [name for name, entry in INDEX.items() if is_known(entry["pe"])]
over_golden = pytest.mark.parametrize("name", KNOWN)


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def original_state(name: str) -> dict[str, Tensor]:
    """The original's state dict, under its own names."""
    return {key.removeprefix("state/"): value for key, value in arrays(name).items() if key.startswith("state/")}


def build(name: str) -> Any:
    """Our model of a golden entry, as the issue's call of ``timm.create_model`` builds it."""
    entry = INDEX[name]
    if entry["source"] == "LaPE":
        model_name = DISTILLED if entry.get("distilled") else DEIT
        same_name = (
            "img_size",
            "patch_size",
            "embed_dim",
            "depth",
            "num_heads",
            "mlp_ratio",
            "num_classes",
            "qkv_bias",
        )
        arguments = {argument: entry[argument] for argument in ("join_type", *same_name)}
    else:
        model_name = COMPACT
        arguments = {
            "img_size": entry["image_size"],
            "patch_size": entry["patch_size"],
            "embed_dim": entry["embed_dim"],
            "depth": entry["n_layers"],
            "num_heads": entry["n_attention_heads"],
            "mlp_ratio": entry["forward_mul"],
            "num_classes": entry["n_classes"],
        }
    options = {option: entry[option] for option in encodings.resolve(entry["pe"]).options().keys() & entry.keys()}
    norm_layer = partial(nn.LayerNorm, eps=entry["norm_eps"])
    return timm.create_model(model_name, pe=entry["pe"], norm_layer=norm_layer, **arguments, **options).double().eval()


def test_no_golden_model_is_left_out_unnoticed() -> None:
    assert len(KNOWN) >= 19
    assert {path.stem for path in GOLDEN.glob("*.npz")} == INDEX.keys()


@over_golden
def test_a_converted_original_gives_its_logits_and_input_gradients(name: str) -> None:
    golden, model = arrays(name), build(name)
    model.load_state_dict(convert_checkpoint(original_state(name)), strict=True)
    pixels = golden["input"].requires_grad_()
    logits = model(pixels)
    (grad_input,) = torch.autograd.grad(logits.square().sum(), pixels)
    tolerance = 1e-5 if name.startswith("lape-1D_sin") else 1e-9  # the original builds this table in float32
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=tolerance)
    torch.testing.assert_close(grad_input, golden["grad_input"], rtol=0, atol=tolerance)


@over_golden
def test_a_converted_original_has_as_many_parameters(name: str) -> None:
    original = original_state(name)
    converted = convert_checkpoint(original)
    # LaPE counts its fixed sinusoids as parameters; we compute them.
    fixed = original["pos_embed"].numel() if "pos_embed" in original.keys() - converted.keys() else 0
    assert sum(parameter.numel() for parameter in build(name).parameters()) == INDEX[name]["params"] - fixed


@over_golden
def test_converting_twice_is_converting_once(name: str) -> None:
    converted = convert_checkpoint(original_state(name))
    assert_equal(convert_checkpoint(converted), converted)


@over_golden
def test_the_prefix_of_distributed_training_makes_no_difference(name: str) -> None:
    original = original_state(name)
    prefixed = {f"module.{key}": value for key, value in original.items()}
    assert_equal(convert_checkpoint(prefixed), convert_checkpoint(original))


@over_golden
def test_conversion_leaves_its_argument_alone(name: str) -> None:
    original = original_state(name)
    convert_checkpoint(original)
    assert_equal(original, original_state(name))


@over_golden
def test_an_original_in_float32_converts_to_the_same_names(name: str) -> None:
    original = original_state(name)
    single = {key: value.float() if value.is_floating_point() else value for key, value in original.items()}
    assert list(convert_checkpoint(single)) == list(convert_checkpoint(original))


def float32_sinusoid(positions: np.ndarray, dim: int) -> np.ndarray:
    """As the originals compute it, with every step in float32."""
    frequencies = np.float32(1) / np.float32(10000) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    angles = positions.astype(np.float32)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), dim)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize(("side", "dim"), [(14, 192), (14, 768), (24, 768)])
def test_fixed_tables_of_full_size_models_are_recognised(side: int, dim: int, prefix: int) -> None:
    tokens = {name: torch.zeros(1, 1, dim) for name in ("cls_token", "dist_token")[:prefix]}
    columns, rows = np.tile(np.arange(side), side), np.repeat(np.arange(side), side)
    patches = np.concatenate([float32_sinusoid(columns, dim // 2), float32_sinusoid(rows, dim // 2)], axis=1)
    in_2d = torch.from_numpy(np.concatenate([np.zeros((prefix, dim), np.float32), patches])[None])
    in_1d = torch.from_numpy(float32_sinusoid(np.arange(prefix + side**2), dim))
    for table in (in_2d, in_1d):
        assert "pos_embed" not in convert_checkpoint({**tokens, "pos_embed": table})
    learned = in_2d + 0.02 * torch.randn(in_2d.shape, generator=torch.Generator().manual_seed(0))
    assert "pos_embed" in convert_checkpoint({**tokens, "pos_embed": learned})


@pytest.mark.parametrize("name", MODELS)
def test_the_state_of_each_model_comes_back_unchanged(name: str) -> None:
    state = create(name=name).state_dict()
    assert_equal(convert_checkpoint(state), dict(state))


@over_pairs
def test_our_own_state_comes_back_unchanged(pe: str, join_type: str) -> None:
    for changes in ({}, {"no_embed_class": True}, {"img_size": (16, 32)}):
        state = create(pe, join_type, **changes).state_dict()
        assert_equal(convert_checkpoint(state), dict(state))
        assert_equal(convert_checkpoint({f"module.{key}": value for key, value in state.items()}), dict(state))
