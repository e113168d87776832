"""The timm plugin: importing this module lets timm's vision transformers take an encoding and a join.

    import models_lape, timm
    model = timm.create_model("vit_small_patch16_224", pe="rope_mixed")
    model = timm.create_model("deit_tiny_patch16_224", pe="learnable", join_type="LaPE")

``timm.list_models(module="models_lape")`` lists them. Each entrypoint takes what timm's takes, and ``pe``,
``join_type``, the encoding's options and ``pos_shift``, ``pos_jitter`` and ``pos_rescale``. Without any of these it
gives timm's own model.
"""

import functools
import logging
import sys
import typing
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from lape_vit import encodings
from lape_vit.compact import CompactConvolutionalTransformer, CompactMlp, CompactVisionTransformer, ViTLite
from lape_vit.convert import KERNEL, grid_of, unwrap_names, warm_start
from lape_vit.timm_models import TIMMS_CLASSES, from_timm

__all__: list[str] = []  # register_model adds each entrypoint
_logger = logging.getLogger(__name__)

OURS = {"pe", "join_type", "pos_shift", "pos_jitter", "pos_rescale"}
"""The arguments that an entrypoint takes beside timm's, and the encodings' options."""
TIMMS_POS_EMBED = {"", "none", "learn"}
"""What timm's own argument ``pos_embed`` says; anything else is taken for ``pe``."""
OF_FEATURES = {"features_only", "out_indices", "feature_cls"}
"""timm's arguments that wrap a model which is built, so that it hands out features."""


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

default_cfgs = generate_default_cfgs(
    dict.fromkeys(("vit_compact_patch4_32", "vit_lite_7_patch4_32", "cct_7_3x1_32"), CIFAR_CFG)
)


def _warm_start(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """timm hands the pretrained file's content here; it may be of another size, encoding or join."""
    for nested in ("model", "state_dict"):
        state_dict = state_dict.get(nested, state_dict)
    size = _size_of_pretraining(model)
    start = warm_start(state_dict, model, None if size is None else grid_of(size, state_dict, model))
    for line in start.report():
        _logger.warning("pretrained weights: %s", line)
    kernel, own = unwrap_names(state_dict).get(KERNEL), start.state_dict.get(KERNEL)
    channels = model.pretrained_cfg["input_size"][0]
    if kernel is not None and own is not None and (kernel.shape[1], kernel.shape[2:]) == (channels, own.shape[2:]):
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


def _create(build: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=_warm_start,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _takes_an_encoding(entrypoint: Callable[..., nn.Module]) -> bool:
    """Whether one of timm's entrypoints says that it makes a model of a class that :func:`from_timm` takes."""
    return typing.get_type_hints(entrypoint).get("return") in TIMMS_CLASSES


def _with_encodings(timms: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same entrypoint, which takes our arguments, too."""

    @functools.wraps(timms, assigned=("__name__", "__qualname__", "__doc__", "__annotations__"))
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        ours = {name: kwargs.pop(name) for name in (OURS | encodings.all_options().keys()) & kwargs.keys()}
        pos_embed = kwargs.get("pos_embed")
        if pos_embed is not None and "pe" in ours:
            raise ValueError(f"pe={ours['pe']!r} and pos_embed={pos_embed!r} say the same thing: give one of them")
        if pos_embed is not None and pos_embed not in TIMMS_POS_EMBED:
            ours["pe"] = kwargs.pop("pos_embed")
        if not ours:
            return timms(pretrained=pretrained, **kwargs)
        of_model = {name: value for name, value in kwargs.items() if name not in OF_FEATURES}

        def build(**_: Any) -> nn.Module:  # timm's entrypoint adds the defaults of the configuration by itself
            return from_timm(timms(**of_model), **ours)

        return _create(build, timms.__name__, pretrained, kwargs_filter=("img_size",), **kwargs)

    return entrypoint


def _replace_timms() -> None:
    """Register our entrypoint in place of each of timm's that can take an encoding, with the same weights and tags."""
    for name in timm.list_models():
        timms = timm.model_entrypoint(name)
        if not _takes_an_encoding(timms):
            continue
        of_module = sys.modules[timms.__module__].default_cfgs
        if name in of_module:
            default_cfgs[name] = of_module[name]
        entrypoint = globals()[name] = _with_encodings(timms)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Overwriting .* in registry", category=UserWarning)
            register_model(entrypoint)


_replace_timms()


@register_model
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
    return _create(CompactVisionTransformer, "vit_compact_patch4_32", pretrained, **args)


@register_model
def vit_lite_7_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Lite-7/4 for 32 x 32 images, 3.72 M parameters (https://arxiv.org/abs/2104.05704)."""
    args = {"patch_size": 4, **LITE, **kwargs}
    return _create(ViTLite, "vit_lite_7_patch4_32", pretrained, **args)


@register_model
def cct_7_3x1_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CCT-7/3x1 for 32 x 32 images, 3.76 M parameters (https://arxiv.org/abs/2104.05704)."""
    args = {"patch_size": 2, **LITE, **kwargs}
    return _create(CompactConvolutionalTransformer, "cct_7_3x1_32", pretrained, **args)
