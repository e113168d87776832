"""timm's class Eva, in which RoPE-ViT's and DINOv3's models are built, as plain vision transformers.

Shapes: D embedding width, h heads, d head width, L layers.
"""

import re
from typing import Any, NamedTuple

import torch
from timm.layers import LayerScale, RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.models import VisionTransformer
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn

from lape_vit.encodings.rotary import RopeAxial, RopeDINOv3, RopeMixed


class Rotation(NamedTuple):
    """How an Eva turns q and k by places.

    Attributes:
        pe: our name of it, with its options; empty where nothing turns.
        augmentation: shift, jitter and rescale of the places in training, as far as there is any.
    """

    pe: str
    augmentation: dict[str, float]


def rotation_of(model: Any) -> Rotation:
    """The rotation of an Eva.

    Raises:
        ValueError: it is none of ours.
    """
    rope = model.rope
    if rope is None:
        return Rotation("", {})
    name, augmentation = type(rope).__name__, {}
    expected: dict[str, Any]
    if isinstance(rope, RotaryEmbeddingMixed):
        expected = {"grid_indexing": "xy", "aug_active": False}
        pe = f"{RopeMixed.name}(rope_theta={rope.temperature})"
    elif isinstance(rope, RotaryEmbeddingCat):
        expected = {"grid_indexing": "xy", "aug_active": False, "rotate_half": False, "grid_type": "index"}
        expected |= {"grid_offset": 0, "ref_feat_shape": None}
        pe = f"{RopeAxial.name}(rope_theta={rope.temperature})"
    elif isinstance(rope, RotaryEmbeddingDinoV3):
        expected = {"grid_indexing": "ij", "rotate_half": True, "grid_offset": 0, "min_period": None}
        pe = f"{RopeDINOv3.name}(rope_theta={rope.temperature},rope_normalize={rope.normalize_coords})"
        augmentation = {"shift": rope.shift_coords, "jitter": rope.jitter_coords, "rescale": rope.rescale_coords}
    else:
        raise ValueError(f"timm's {name} is none of our encodings: give pe=..., which takes its place")
    for setting, value in expected.items():
        if getattr(rope, setting) != value:
            raise ValueError(
                f"timm's {name} with {setting}={getattr(rope, setting)!r} is none of our encodings, only with "
                f"{setting}={value!r}: give pe=..., which takes its place"
            )
    return Rotation(pe, {name: value for name, value in augmentation.items() if value is not None})


def mixed_frequencies(model: Any) -> Tensor | None:
    """The trained frequencies of an Eva's layers, as our encoding has them: (L, 2, h, d/2); None where it has none."""
    rope = model.rope
    if not isinstance(rope, RotaryEmbeddingMixed) or rope.grid_indexing != "xy":
        return None
    return rope.freqs.detach().transpose(0, 1)


def as_vision_transformer(model: Any) -> VisionTransformer:
    """An Eva's parts, put together to timm's VisionTransformer; without its rotations.

    The parts are shared with the Eva. Only q's and v's biases become one new bias, with zeros for k.

    Raises:
        ValueError: its blocks are of another kind, or its heads share keys.
    """
    for block in model.blocks:
        if type(block) is not EvaBlock:
            raise ValueError(
                f"an encoding has no place in blocks of timm's class {type(block).__name__}, only of EvaBlock"
            )
        if getattr(block.attn, "num_kv_groups", 1) > 1:
            raise ValueError("an encoding has no place in attention whose heads share keys (num_kv_heads)")
    first = model.blocks[0].attn
    arguments = {
        name: getattr(model, name)
        for name in ("in_chans", "num_classes", "global_pool", "embed_dim", "no_embed_class", "dynamic_img_size")
    }
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    with torch.device("meta"):  # every part is replaced below
        plain: Any = VisionTransformer(
            **arguments,
            img_size=model.patch_embed.img_size,
            patch_size=model.patch_embed.patch_size,
            depth=len(model.blocks),
            num_heads=first.num_heads,
            class_token=model.cls_token is not None,
            reg_tokens=registers,
            pool_include_prefix=model.attn_pool is not None,
        )
    for name in ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "norm_pre", "norm", "attn_pool"):
        setattr(plain, name, getattr(model, name))
    for name in ("fc_norm", "head_drop", "head", "feature_info", "grad_checkpointing"):
        setattr(plain, name, getattr(model, name))
    plain.patch_drop = nn.Identity() if model.patch_drop is None else model.patch_drop
    for block, of_eva in zip(plain.blocks, model.blocks, strict=True):
        _take_block(block, of_eva)
    # what timm's factory writes on a model: the weights that it is for, and the arguments that build it
    for name in vars(model).keys() - vars(plain).keys() - vars(nn.Module()).keys():
        if "cfg" in name or "args" in name or "traits" in name:
            setattr(plain, name, getattr(model, name))
    return plain.train(model.training)


def _take_block(block: Any, of_eva: Any) -> None:
    for name in ("norm1", "norm2", "mlp", "drop_path1", "drop_path2"):
        setattr(block, name, getattr(of_eva, name))
    for number in (1, 2):
        gamma = getattr(of_eva, f"gamma_{number}")
        if gamma is None:
            setattr(block, f"ls{number}", nn.Identity())
        else:
            scale = LayerScale(len(gamma), device="meta")
            scale.gamma = gamma
            setattr(block, f"ls{number}", scale)
    attn, theirs = block.attn, of_eva.attn
    for name in ("num_heads", "head_dim", "scale", "fused_attn"):
        setattr(attn, name, getattr(theirs, name))
    attn.attn_dim = theirs.num_heads * theirs.head_dim
    for name in ("q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"):
        setattr(attn, name, getattr(theirs, name))
    attn.qkv = _joint_projection(theirs)


def _joint_projection(attn: Any) -> nn.Linear:
    """q, k and v by one layer; a bias that k lacks is zero."""
    bias = q_bias = k_bias = v_bias = None
    if attn.qkv is None:
        parts = attn.q_proj, attn.k_proj, attn.v_proj
        weight = nn.Parameter(torch.cat([part.weight for part in parts]).detach())
        q_bias, k_bias, v_bias = (part.bias for part in parts)
    else:
        weight, bias = attn.qkv.weight, attn.qkv.bias
        if isinstance(attn, EvaAttention):
            q_bias, k_bias, v_bias = attn.q_bias, attn.k_bias, attn.v_bias
    if q_bias is not None and v_bias is not None:
        k_bias = torch.zeros_like(q_bias) if k_bias is None else k_bias
        bias = nn.Parameter(torch.cat([q_bias, k_bias, v_bias]).detach())
    qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    qkv.weight = weight
    if bias is not None:
        qkv.bias = bias
    return qkv


STORED = re.compile(r"^freqs_t_[xy]$")
"""What RoPE-ViT's code stores and our models compute."""
STORED_BY_DINOV3 = re.compile(r"^rope_embed\.|\.bias_mask$|^mask_token$|^(local_)?cls_norm\.")
"""Likewise, and what has no use without DINOv3's training. Other code bases are known by these names."""
NAMES = (
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^storage_tokens$", "reg_token"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def convert_eva(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """Rename a state dict of timm's Eva, of RoPE-ViT's authors or of DINOv3's to ours; others come back as they are.

    Args:
        model: one of our models; it says how many heads there are where the checkpoint does not.

    Raises:
        ValueError: the checkpoint does not say how many heads there are, and ``model`` is not given.
    """
    converted = {}
    is_dinov3 = "storage_tokens" in state_dict
    for name, value in state_dict.items():
        if STORED.search(name) or (is_dinov3 and STORED_BY_DINOV3.search(name)):
            continue
        block, _, part = name.rpartition(".attn.")
        if part in ("v_bias", "k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
            continue
        if part in ("q_bias", "q_proj.weight", "q_proj.bias"):
            k, v = (state_dict.get(f"{block}.attn.{part.replace('q', one, 1)}") for one in "kv")
            assert v is not None
            name = f"{block}.attn.qkv.{'weight' if part.endswith('weight') else 'bias'}"
            value = torch.cat([value, torch.zeros_like(value) if k is None else k, v])
        elif part == "qkv.bias" and is_dinov3:  # masked there
            value = value.clone()
            value[len(value) // 3 : 2 * len(value) // 3] = 0
        elif name in ("freqs", "rope.freqs"):
            converted.update(_frequencies(value, model))
            continue
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        converted[name] = value
    return converted


def _frequencies(freqs: Tensor, model: Any) -> dict[str, Tensor]:
    """Trained frequencies (2, L, h, d/2), or (2, L, D/2) of RoPE-ViT's authors, layer by layer, under our names."""
    if freqs.ndim == 3:
        if model is None:
            raise ValueError("freqs of the checkpoint do not say how many heads there are: give the model, too")
        freqs = freqs.unflatten(-1, (model.blocks[0].attn.num_heads, -1))
    return {f"blocks.{layer}.attn.encoding.frequencies": one for layer, one in enumerate(freqs.unbind(1))}
