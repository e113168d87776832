"""Tiny models in float64, and images for them, that the tests of the library share."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import models_lape  # noqa: F401  registers the models
from lape_vit import encodings
from lape_vit.joins import legal_joins, legal_pairs

DEIT = "deit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
COMPACT = "vit_compact_patch4_32"
VIT_LITE, CCT = "vit_lite_7_patch4_32", "cct_7_3x1_32"
HYBRID = "vit_tiny_r_s16_p8_224"
TIMMS = [
    DEIT,
    DISTILLED,
    "deit3_small_patch16_224",
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_medium_patch16_reg4_gap_256",
    "aimv2_large_patch14_224",
]
"""One of timm's names of each family of plain vision transformers."""
FAMILIES = [
    *TIMMS,
    "beit3_base_patch16_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "eva_giant_patch14_224",
    "flexivit_small",
    "test_vit4",
    "vit_base_mci_224",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_base_resnet26d_224",
    "vit_giantopt_patch16_siglip_256",
    "vit_intern300m_patch14_448",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_lang_large_patch14_448",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_base_patch16_lingbot",
    "vit_small_r26_s32_224",
    "vit_so150m_patch16_reg4_map_256",
    HYBRID,
    "vit_wee_patch16_reg1_gap_256",
    "vitamin_small_224",
]
"""One name of each family of timm's registry that takes an encoding."""
MODELS = [*TIMMS, COMPACT, VIT_LITE, CCT]
SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": 5,
}
"""A grid of 4 x 4 patches and heads of width 8."""


def sizes_of(name: str) -> dict[str, Any]:
    """The same for any model; CCT's patches have one size, and a hybrid's are of a map that is 16 times smaller."""
    others = {CCT: {"img_size": 8, "patch_size": 2}, HYBRID: {"patch_size": 1}}
    return SIZES | others.get(name, {})


def sampled_sums() -> list[str]:
    """Sums in which each encoding takes part, with partners that take turns."""
    by_family = [
        [name for name, encoding in encodings.ENCODINGS.items() if issubclass(encoding, family)]
        for family in encodings.FAMILIES.values()
    ]
    families = [names for names in by_family if names]
    return ["+".join(names[turn % len(names)] for names in families) for turn in range(max(map(len, families)))]


def sampled_pairs() -> list[tuple[str, str]]:
    """Every legal pair of a single encoding, and sums, each under one join, the joins taking turns."""
    sums = [(pe, legal_joins(pe)) for pe in sampled_sums()]
    return legal_pairs() + [(pe, joins[turn % len(joins)]) for turn, (pe, joins) in enumerate(sums)]


PAIRS = sampled_pairs()
over_pairs = pytest.mark.parametrize(("pe", "join_type"), PAIRS)
over_encodings = pytest.mark.parametrize("pe", [*encodings.names(), *sampled_sums()])


def create(pe: str | None = None, join_type: str | None = None, name: str = DEIT, **kwargs: Any) -> Any:
    """A tiny model of ours as it comes from timm, in float32 and training mode; the same at every call."""
    torch.manual_seed(0)
    if pe is None and "pos_embed" not in kwargs:
        pe = "learnable"
    return timm.create_model(name, pe=pe, join_type=join_type, **{**sizes_of(name), **kwargs})


def tiny(pe: str | None = None, join_type: str | None = None, name: str = DEIT, **kwargs: Any) -> Any:
    """The same in float64 and evaluation mode, with no parameter at a value, such as 0 or 1, that would hide a term."""
    return disturb(create(pe, join_type, name, **kwargs).double()).eval()


@torch.no_grad()
def disturb(model: Any, seed: int = 0) -> Any:
    """Add N(0, 0.3^2) to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def leave_as_downloaded(full_name: str, state: dict[str, Tensor], hub: Path, patch: pytest.MonkeyPatch) -> None:
    """Put weights where a download of those that timm publishes under NAME.TAG leaves them, and the network out of
    reach."""
    repository = hub / f"models--timm--{full_name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789")
    (repository / "snapshots" / "0123456789").mkdir(parents=True)
    save_file(state, repository / "snapshots" / "0123456789" / "model.safetensors")
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def norm1_reads_content_alone(model: Any) -> bool:
    """Whether the join adds nothing before any block's norm1."""
    terms = model.position_terms()
    return terms.input is None and all(term is None for term in terms.residual)


def images(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Noise (batch, 3, height, width) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def gradients(model: Any, output: Tensor) -> dict[str, Tensor]:
    """Of the output's sum of squares, by the parameters' names."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(output.square().sum(), parameters), strict=True))


def assert_equal(actual: Any, expected: Any) -> None:
    """Bit for bit, through lists, tuples and dictionaries of tensors, dtypes and the order of keys included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=False)
    if isinstance(actual, dict):
        assert list(actual) == list(expected)


def assert_same_model(ours: Any, theirs: Any, pixels: Tensor) -> None:
    """Bit for bit: parameters with their names, logits, and in training logits and gradients with the same draws."""
    assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert_equal(ours.eval()(pixels), theirs.eval()(pixels))
    found = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        logits = model(pixels)
        found.append((logits, gradients(model, logits)))
    assert_equal(found[0], found[1])


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """To rounding."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
