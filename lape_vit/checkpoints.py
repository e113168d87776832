"""State dicts of the two original code bases, in our names.

LaPE's models (N tokens, D width) differ from ours in the norms' names, in one table per layer for ``unshare``, and in fixed sinusoids
that are stored. The compact 2D-PE ViT has names of its own, separate q, k and v, and stores its fixed tables too.
"""

import re

import torch
from torch import Tensor

from lape_vit.encodings.sinusoidal import Sinusoidal1D, Sinusoidal2D

StateDict = dict[str, Tensor]

LAPE_NAMES = (
    (r"^blocks\.(\d+)\.pe_norm\.", r"join.norms.\1."),
    (r"^blocks\.(\d+)\.attn\.pe_norm\.", r"blocks.\1.attn.encoding.norm."),
    (r"^blocks\.(\d+)\.attn\.relative_position_bias_table$", r"blocks.\1.attn.encoding.table"),
)
LAPE_CONSTANTS = re.compile(r"\.relative_position_index$")
VIT2D_NAMES = (
    (r"^embedding\.conv1\.", "patch_embed.proj."),
    (r"^embedding\.cls_token$", "cls_token"),
    (r"^embedding\.pos_embedding$", "pos_embed"),
    (r"^encoder\.(\d+)\.attention\.out_projection\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.(\d+)\.attention\.query_pos_embedding\.([xy])_\w+\.weight$", r"blocks.\1.attn.encoding.key_\2"),
    (r"^encoder\.(\d+)\.attention\.value_pos_embedding\.([xy])_\w+\.weight$", r"blocks.\1.attn.encoding.value_\2"),
    (r"^encoder\.(\d+)\.(fc\d)\.", r"blocks.\1.mlp.\2."),
    (r"^encoder\.(\d+)\.(norm\d)\.", r"blocks.\1.\2."),
    (r"^classifier\.fc\.", "head."),
)
VIT2D_CONSTANTS = re.compile(r"\.pos_embedding\.pos_embedding$|\.[xy]_(cos|sin|distances)$")


def convert_checkpoint(state_dict: StateDict) -> StateDict:
    """Rename an original's state dict to ours; one that is ours, or timm's, comes back as it is.

    Args:
        state_dict: of LaPE's DeiT, of the compact 2D-PE ViT, or of one of our models. The prefix ``module.`` that
            DistributedDataParallel leaves is taken off.

    Returns:
        A new dictionary that ``load_state_dict(strict=True)`` of the same model, built here, accepts.
    """
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if "embedding.conv1.weight" in state_dict:
        return _convert_vit2d(state_dict)
    return _convert_lape(state_dict)


def _convert_lape(state_dict: StateDict) -> StateDict:
    converted = {}
    for name, value in state_dict.items():
        if not LAPE_CONSTANTS.search(name):
            for pattern, ours in LAPE_NAMES:
                name = re.sub(pattern, ours, name)
            converted[name] = value
    layers = [name for name in converted if re.fullmatch(r"pos_embed\d+", name)]
    if layers:
        converted["pos_embed"] = torch.cat([converted.pop(f"pos_embed{layer}") for layer in range(len(layers))])
    elif "pos_embed" in converted and _is_fixed(converted["pos_embed"], converted):
        del converted["pos_embed"]
    return converted


def _is_fixed(table: Tensor, state_dict: StateDict) -> bool:
    """Whether a stored table is a sinusoid, computed in float32 or better, that our models recompute."""
    if table.ndim == 2:  # LaPE stores only its 1D sinusoid without the leading 1
        return True
    if table.shape[0] != 1:
        return False
    prefix = sum(token in state_dict for token in ("cls_token", "dist_token"))
    side = round((table.shape[1] - prefix) ** 0.5)
    if side * side != table.shape[1] - prefix or table.shape[2] % 4:
        return False
    return any(
        torch.allclose(encoding(table.shape[2], (side, side), prefix)((side, side)).to(table), table, atol=1e-5)
        for encoding in (Sinusoidal1D, Sinusoidal2D)
    )


def _convert_vit2d(state_dict: StateDict) -> StateDict:
    converted = {}
    for name, value in state_dict.items():
        if VIT2D_CONSTANTS.search(name):
            continue
        if match := re.fullmatch(r"encoder\.(\d+)\.attention\.queries\.(weight|bias)", name):
            layer, kind = match.groups()
            parts = [state_dict[f"encoder.{layer}.attention.{part}.{kind}"] for part in ("queries", "keys", "values")]
            converted[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
        elif not re.search(r"\.attention\.(keys|values)\.", name):
            for pattern, ours in VIT2D_NAMES:
                name = re.sub(pattern, ours, name)
            converted[name] = value
    return converted
