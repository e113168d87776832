"""Checkpoints of other code bases, sizes, encodings and joins.

LaPE's models (N tokens, D width) differ from ours in the norms' names, in one table per layer for ``unshare``, and in
fixed sinusoids that are stored. The compact 2D-PE ViT has names of its own, separate q, k and v, and stores its fixed
tables too.
"""

import copy
import math
import re
from collections import Counter
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from lape_vit.encodings.sinusoidal import Sinusoidal1D, Sinusoidal2D
from lape_vit.eva import convert_eva
from lape_vit.places import Grid, Places

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


def convert_checkpoint(state_dict: StateDict, model: Any = None) -> StateDict:
    """Rename an original's state dict to ours; one that is ours, or timm's, comes back as it is.

    Args:
        state_dict: of LaPE's DeiT, of the compact 2D-PE ViT, of RoPE-ViT, of DINOv3, or of one of our models. The
            prefix ``module.`` that DistributedDataParallel leaves is taken off.
        model: one of our models. It says how many heads there are where a checkpoint of RoPE-ViT's authors does not.

    Returns:
        A new dictionary that ``load_state_dict(strict=True)`` of the same model, built here, accepts.
    """
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if "embedding.conv1.weight" in state_dict:
        return _convert_vit2d(state_dict)
    return _convert_lape(convert_eva(state_dict, model))


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
    side = square_root(table.shape[1] - prefix)
    if side is None or table.shape[2] % 4:
        return False
    return any(
        torch.allclose(encoding(table.shape[2], (side, side), prefix)(Places((side, side)), table), table, atol=1e-5)
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


class WarmStart(NamedTuple):
    """What a checkpoint gives to a model."""

    state_dict: StateDict
    """Complete and in the model's shapes: what fits from the checkpoint, the rest as the model had it."""
    new: list[str]
    """The model's names that the checkpoint could not fill."""
    left_out: list[str]
    """The checkpoint's names that the model has no place for."""

    def report(self) -> list[str]:
        """One line on what is new and one on what was left out, where there is any."""
        parts = (("new, at its initial values", self.new), ("left out of the checkpoint", self.left_out))
        return [f"{title}: {summarise(names)}" for title, names in parts if names]


def warm_start(state_dict: StateDict, model: Any, grid: Grid | None = None) -> WarmStart:
    """Fit a checkpoint of either original, of timm or of ours to a model of another size, encoding or join.

    Args:
        state_dict: the checkpoint's.
        model: one of our models; it is not changed.
        grid: (H, W) patches that the checkpoint was trained on; by default the square that its tables show.

    Raises:
        ValueError: the tables fit no square grid and ``grid`` is not given, or nothing fits the model.
    """
    converted = convert_checkpoint(state_dict, model)
    source = grid or square_grid(converted, model) or model.patch_embed.grid_size
    resized = source != model.patch_embed.grid_size
    if resized:
        size, (height, width) = model.patch_embed.img_size, model.patch_embed.patch_size
        model = copy.deepcopy(model)
        model.set_input_size(img_size=(source[0] * height, source[1] * width))
    table = converted.pop("pos_embed", None)  # which timm would resample by rules of its own
    converted = checkpoint_filter_fn(converted, model, adapt_layer_scale=True)
    if table is not None:
        converted["pos_embed"] = table
    own = model.state_dict()
    kernel, in_chans = converted.get("patch_embed.proj.weight"), own["patch_embed.proj.weight"].shape[1]
    if kernel is not None and kernel.shape[1] == 3 != in_chans:  # from colours to as many channels as the model reads
        converted["patch_embed.proj.weight"] = adapt_input_conv(in_chans, kernel)
    fits = {name: value for name, value in converted.items() if name in own and own[name].shape == value.shape}
    if not fits:
        raise ValueError("no tensor of the checkpoint fits the model: it is one of another architecture or width")
    if resized:
        model.load_state_dict({**own, **fits})
        model.set_input_size(img_size=size)
        state = model.state_dict()
    else:
        state = {**own, **fits}
    new, left_out = ([name for name in names if name not in fits] for names in (own, converted))
    return WarmStart(state, new, left_out)


def square_grid(state_dict: StateDict, model: Any) -> Grid | None:
    """The grid behind the tables that a checkpoint and the model have in common; None where there are none.

    Where a table does not tell rows from columns, it is a square.

    Raises:
        ValueError: the tables stand for no square.
    """
    tokens = (state_dict[name] for name in ("cls_token", "dist_token", "reg_token") if name in state_dict)
    prefix = 0 if model.no_embed_class else sum(token.shape[1] for token in tokens)
    for name in state_dict.keys() & model.state_dict().keys():
        if name == "pos_embed":
            rows = state_dict[name].shape[1] - prefix
        elif name.endswith(".attn.encoding.table"):
            rows = len(state_dict[name])
        elif name.endswith(".pos_embed_y"):
            return (state_dict[name].shape[1], state_dict[f"{name.removesuffix('y')}x"].shape[1])
        else:
            continue
        side = square_root(rows)
        if side is None:
            raise ValueError(f"{name} of the checkpoint has {rows} rows for patches, no square grid: give its (H, W)")
        return (side, side) if name == "pos_embed" else ((side + 1) // 2, (side + 1) // 2)
    return None


def square_root(number: int) -> int | None:
    """The whole square root, if there is one."""
    root = math.isqrt(number)
    return root if root * root == number else None


def summarise(names: list[str]) -> str:
    """Names with their layers folded: ``blocks.*.norm1.weight (12), head.bias``."""
    folded = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in folded.items())
