"""The timm plugin: importing this module registers its models with timm, in place of timm's own of the same name.

    import models_lape, timm
    model = timm.create_model("deit_tiny_patch16_224", pe="learnable", join_type="LaPE")

Each entrypoint takes what timm's takes, and ``pe``, ``join_type`` and the encoding's options.
"""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import timm.models.deit
from timm.layers import Mlp, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from lape_vit import VisionTransformer, VisionTransformerDistilled, warm_start
from lape_vit.compact import CompactConvolutionalTransformer, ViTLite
from lape_vit.convert import KERNEL, grid_of, unwrap_names

__all__: list[str] = []  # register_model adds each entrypoint
_logger = logging.getLogger(__name__)


class CompactMlp(Mlp):
    """timm's MLP with dropout at its end only."""

    def __init__(self, *args: Any, drop: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "drop": (0.0, drop)})


class CompactVisionTransformer(VisionTransformer):
    """A ViT whose convolution and class token start as its linear layers do: truncated normal of deviation 0.02."""

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        super().init_weights(*args, **kwargs)
        trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)


DEIT3 = {"no_embed_class": True, "init_values": 1e-6}

LITE = {
    "img_size": 32,
    "embed_dim": 256,
    "depth": 7,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "qkv_bias": False,
    "attn_drop_rate": 0.1,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}

CIFAR_CFG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}

default_cfgs = {
    **timm.models.deit.default_cfgs,
    **generate_default_cfgs(
        dict.fromkeys(("vit_compact_patch4_32", "vit_lite_7_patch4_32", "cct_7_3x1_32"), CIFAR_CFG)
    ),
}


def _warm_start(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """timm hands the pretrained file's content here; it may be of another size, encoding or join."""
    for nested in ("model", "state_dict"):
        state_dict = state_dict.get(nested, state_dict)
    size = _size_of_pretraining(model)
    start = warm_start(state_dict, model, None if size is None else grid_of(size, state_dict, model))
    for line in start.report():
        _logger.warning("pretrained weights: %s", line)
    kernel, channels = unwrap_names(state_dict).get(KERNEL), model.pretrained_cfg["input_size"][0]
    if kernel is not None and (kernel.shape[1], kernel.shape[2:]) == (
        channels,
        model.patch_embed.proj.weight.shape[2:],
    ):
        return {**start.state_dict, KERNEL: kernel}  # timm adapts its channels, and says so
    return start.state_dict


def _size_of_pretraining(model: Any) -> Any:
    """Size of the images that the pretrained weights were trained on, in pixels; None where nothing says it.

    A file in place of the registered weights need not have their size.
    """
    cfg = model.pretrained_cfg
    registered = get_pretrained_cfg(cfg["architecture"])
    is_replaced = cfg.get("source") != "local-dir" and any(cfg.get(name) for name in ("file", "state_dict"))
    if is_replaced and registered is not None and tuple(cfg["input_size"]) == tuple(registered.input_size):
        return None
    return model.pretrained_model_args.get("img_size") or cfg["input_size"][1:]


def _create(variant: str, pretrained: bool, model_cls: type[VisionTransformer], **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=_warm_start,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _register(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Overwriting .* in registry", category=UserWarning)
        return register_model(entrypoint)


@_register
def deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Ti, 224 x 224 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs}
    return _create("deit_tiny_patch16_224", pretrained, VisionTransformer, **args)


@_register
def deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-S, 224 x 224 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs}
    return _create("deit_small_patch16_224", pretrained, VisionTransformer, **args)


@_register
def deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-B, 224 x 224 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}
    return _create("deit_base_patch16_224", pretrained, VisionTransformer, **args)


@_register
def deit_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-B, 384 x 384 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}
    return _create("deit_base_patch16_384", pretrained, VisionTransformer, **args)


@_register
def deit_tiny_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Ti with a distillation token, 224 x 224 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs}
    return _create("deit_tiny_distilled_patch16_224", pretrained, VisionTransformerDistilled, **args)


@_register
def deit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-S with a distillation token, 224 x 224 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs}
    return _create("deit_small_distilled_patch16_224", pretrained, VisionTransformerDistilled, **args)


@_register
def deit_base_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-B with a distillation token, 224 x 224 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}
    return _create("deit_base_distilled_patch16_224", pretrained, VisionTransformerDistilled, **args)


@_register
def deit_base_distilled_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-B with a distillation token, 384 x 384 (https://arxiv.org/abs/2012.12877)."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}
    return _create("deit_base_distilled_patch16_384", pretrained, VisionTransformerDistilled, **args)


@_register
def deit3_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-S, 224 x 224 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **DEIT3, **kwargs}
    return _create("deit3_small_patch16_224", pretrained, VisionTransformer, **args)


@_register
def deit3_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-S, 384 x 384 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **DEIT3, **kwargs}
    return _create("deit3_small_patch16_384", pretrained, VisionTransformer, **args)


@_register
def deit3_medium_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-M, 224 x 224 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 16, "embed_dim": 512, "depth": 12, "num_heads": 8, **DEIT3, **kwargs}
    return _create("deit3_medium_patch16_224", pretrained, VisionTransformer, **args)


@_register
def deit3_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-B, 224 x 224 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **DEIT3, **kwargs}
    return _create("deit3_base_patch16_224", pretrained, VisionTransformer, **args)


@_register
def deit3_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-B, 384 x 384 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **DEIT3, **kwargs}
    return _create("deit3_base_patch16_384", pretrained, VisionTransformer, **args)


@_register
def deit3_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-L, 224 x 224 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **DEIT3, **kwargs}
    return _create("deit3_large_patch16_224", pretrained, VisionTransformer, **args)


@_register
def deit3_large_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-L, 384 x 384 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **DEIT3, **kwargs}
    return _create("deit3_large_patch16_384", pretrained, VisionTransformer, **args)


@_register
def deit3_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT III-H, 224 x 224 (https://arxiv.org/abs/2204.07118)."""
    args = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **DEIT3, **kwargs}
    return _create("deit3_huge_patch14_224", pretrained, VisionTransformer, **args)


@_register
def vit_compact_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The 0.8 M parameter ViT for 32 x 32 images in which the compact 2D-PE ViT compares encodings."""
    args = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "no_embed_class": True,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "mlp_layer": CompactMlp,
        "norm_layer": partial(nn.LayerNorm, eps=1e-5),
        **kwargs,
    }
    return _create("vit_compact_patch4_32", pretrained, CompactVisionTransformer, **args)


@_register
def vit_lite_7_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Lite-7/4 for 32 x 32 images, 3.72 M parameters (https://arxiv.org/abs/2104.05704)."""
    args = {"patch_size": 4, **LITE, **kwargs}
    return _create("vit_lite_7_patch4_32", pretrained, ViTLite, **args)


@_register
def cct_7_3x1_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CCT-7/3x1 for 32 x 32 images, 3.76 M parameters (https://arxiv.org/abs/2104.05704)."""
    args = {"patch_size": 2, **LITE, **kwargs}
    return _create("cct_7_3x1_32", pretrained, CompactConvolutionalTransformer, **args)
