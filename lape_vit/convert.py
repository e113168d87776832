"""Checkpoints of other code bases, sizes, encodings and joins.

LaPE's models (N tokens, D width) differ from ours in the norms' names, in one table per layer for ``unshare``, and in
fixed sinusoids that are stored. The compact 2D-PE ViT has names of its own, separate q, k and v, and stores its fixed
tables too.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from lape_vit.encodings.sinusoidal import Sinusoidal1D, Sinusoidal2D
from lape_vit.eva import convert_eva
from lape_vit.places import Grid, Places

StateDict = dict[str, Tensor]

KERNEL, TABLE = "patch_embed.proj.weight", "pos_embed"
OFFSETS = ".attn.encoding.table"
"""End of the names of tables with a row for each offset between two patches."""
AXES = ("join.encoding.pos_embed_y", "join.encoding.pos_embed_x")
"""Tables of the rows and the columns of a grid, which tell its shape."""
HOLDERS = ("model.", "net.", "network.", "backbone.", "student.", "teacher.")
"""Usual names under which a training framework holds a model."""
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
"""The tokens before the patches, in their order."""
WRAPPERS = re.compile(
    r"^(module\.|_orig_mod\.)+"  # DistributedDataParallel and other wrappers of a whole model
    r"|\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\."  # of a part of one, too
)
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


def unwrap_names(state_dict: StateDict) -> StateDict:
    """The same weights without what wrappers put before a model's own names, in any order and any number.

    Wrappers are DistributedDataParallel, FSDP, ``torch.compile``, activation checkpointing, averages of weights (whose
    counter ``n_averaged`` is left out), and modules of a training framework that hold the model alone: under a usual
    name, such as ``model.``, or under any name where the model is a ViT.
    """
    names = {name: name for name in state_dict if name != "n_averaged"}
    before: dict[str, str] = {}
    while names != before:
        before, names = names, {name: WRAPPERS.sub("", new) for name, new in names.items()}
        holders = [*HOLDERS, *(new[: -len(KERNEL)] for new in names.values() if new.endswith(f".{KERNEL}"))]
        holder = next((holder for holder in holders if all(new.startswith(holder) for new in names.values())), "")
        names = {name: new.removeprefix(holder) for name, new in names.items()}
    return {new: state_dict[name] for name, new in names.items()}


def convert_checkpoint(state_dict: StateDict, model: Any = None) -> StateDict:
    """Rename an original's state dict to ours; one that is ours, or timm's, comes back as it is.

    Args:
        state_dict: of LaPE's DeiT, of the compact 2D-PE ViT, of RoPE-ViT, of DINOv3, or of one of our models. The names
            that wrappers leave are taken off (see :func:`unwrap_names`).
        model: one of our models. It says how many heads there are where a checkpoint of RoPE-ViT's authors does not.

    Returns:
        A new dictionary that ``load_state_dict(strict=True)`` of the same model, built here, accepts.
    """
    state_dict = unwrap_names(state_dict)
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
    if table.ndim != 3 or table.shape[0] != 1:
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
    remarks: list[str]
    """What was filled in part, and what had to be guessed; one sentence each."""

    def report(self) -> list[str]:
        """One line on what is new and one on what was left out, where there is any, and the remarks."""
        parts = (("new, at its initial values", self.new), ("left out of the checkpoint", self.left_out))
        return [f"{title}: {summarise(names)}" for title, names in parts if names] + self.remarks


class TableLayout(NamedTuple):
    """Which rows of a checkpoint's table of positions are whose."""

    tokens: dict[str, int]
    """Rows of each prefix token that has any, in their order before those of the patches."""
    grid: Grid
    remarks: list[str]


def warm_start(state_dict: StateDict, model: Any, grid: Grid | None = None) -> WarmStart:
    """Fit a checkpoint of either original, of timm, of a code base that timm reads, or of ours, to a model of another
    size, encoding or join, with other prefix tokens or other channels of its images.

    Where the tables of the checkpoint tell whose rows they are, they do; else a table is of the model's own grid if
    it fits that, else of a square one, and a remark says so.

    Args:
        state_dict: the checkpoint's.
        model: one of our models; it is not changed.
        grid: (H, W) patches that the checkpoint was trained on, if it is known (see :func:`grid_of`). One that the
            tables contradict is not used.

    Raises:
        ValueError: the tables fit neither the model's grid nor a square one and ``grid`` is not given, timm cannot
            read the checkpoint, or nothing fits the model.
    """
    source = read_foreign(convert_checkpoint(state_dict, model), model)
    layout = table_layout(source, model, grid)
    resized = layout.grid != model.patch_embed.grid_size
    if resized:
        size, (height, width) = model.patch_embed.img_size, model.patch_embed.feat_ratio(as_scalar=False)
        model = copy.deepcopy(model)
        model.set_input_size(img_size=(layout.grid[0] * height, layout.grid[1] * width))
    own, remarks = model.state_dict(), list(layout.remarks)
    filled = dict(source)
    if TABLE in own and is_table(source.get(TABLE), own[TABLE]):
        filled[TABLE], some = fill_rows(own, source, layout.tokens, prefix_rows(model))
        remarks += some
    if KERNEL in own and KERNEL in source and source[KERNEL].ndim == 4:
        filled[KERNEL] = adapt_channels(source[KERNEL], own[KERNEL].shape[1])
    fits = {name: value for name, value in filled.items() if name in own and own[name].shape == value.shape}
    if not fits:
        raise ValueError(f"no tensor of the checkpoint fits the model: {difference(source, own)}")
    if resized:
        model.load_state_dict({**own, **fits})
        model.set_input_size(img_size=size)
        state = model.state_dict()
    else:
        state = {**own, **fits}
    new, left_out = ([name for name in names if name not in fits] for names in (own, source))
    return WarmStart(state, new, left_out, remarks)


def read_foreign(state_dict: StateDict, model: Any) -> StateDict:
    """The names and shapes of timm's ViT, from those of the code bases that timm reads, such as DINOv2's.

    Raises:
        ValueError: timm fails at it.
    """
    # Without a table timm leaves that of the checkpoint alone, which it would resample by rules of its own.
    without_table = SimpleNamespace(patch_embed=model.patch_embed, head=model.head, pos_embed=None)
    try:
        return checkpoint_filter_fn(dict(state_dict), without_table, adapt_layer_scale=True)  # type: ignore[arg-type]
    except Exception as error:  # each code base has its own reader, which raises what it likes
        raise ValueError(f"timm cannot read the checkpoint ({type(error).__name__}: {error})") from error


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """A convolution (O, I, h, w) for images of as many channels as the model reads, as timm makes it."""
    return kernel if kernel.shape[1] == in_chans else adapt_input_conv(in_chans, kernel, base_chans=kernel.shape[1])


def grid_of(img_size: int | Sequence[int], state_dict: StateDict, model: Any) -> Grid:
    """(H, W) patches of a checkpoint that was trained on images of (height, width) pixels.

    A patch is as large as the checkpoint's kernel, where kernels of such models are as large as patches.
    """
    patch = tuple(model.patch_embed.feat_ratio(as_scalar=False))
    kernel, own = unwrap_names(state_dict).get(KERNEL), model.state_dict().get(KERNEL)
    if kernel is not None and kernel.ndim == 4 and own is not None and own.shape[-2:] == patch:
        patch = tuple(kernel.shape[-2:])
    height, width = to_2tuple(img_size)[-2:]
    return height // patch[0], width // patch[1]


def prefix_rows(model: Any) -> dict[str, int]:
    """How many rows of the model's own table each of its prefix tokens has, where they have any."""
    return {} if model.no_embed_class else tokens_of(model.state_dict())


def tokens_of(state_dict: StateDict) -> dict[str, int]:
    """How many prefix tokens there are of each name."""
    tokens = {name: state_dict[name] for name in PREFIX_TOKENS if name in state_dict}
    return {name: token.shape[1] for name, token in tokens.items() if token.ndim == 3}


def is_table(table: Tensor | None, own: Tensor) -> bool:
    """Whether a checkpoint's ``pos_embed`` differs from the model's in its rows alone."""
    return table is not None and table.ndim == 3 and table.shape[::2] == own.shape[::2]


def table_layout(state_dict: StateDict, model: Any, known: Grid | None = None) -> TableLayout:
    """Whose rows the tables are that a checkpoint and the model have in common.

    Raises:
        ValueError: they are neither of the known grid, nor of the model's, nor of a square one.
    """
    own, own_grid = model.state_dict(), model.patch_embed.grid_size
    tokens = tokens_of(state_dict)
    layouts = [{}, tokens, {name: rows for name, rows in tokens.items() if name != "reg_token"}]
    if not model.no_embed_class:
        layouts = layouts[1:] + layouts[:1]
    if all(name in own and name in state_dict and state_dict[name].ndim == 3 for name in AXES):
        known = (state_dict[AXES[0]].shape[1], state_dict[AXES[1]].shape[1])
    has_table = TABLE in own and is_table(state_dict.get(TABLE), own[TABLE])
    offsets = {name: len(state_dict[name]) for name in own if name.endswith(OFFSETS) and name in state_dict}
    if not has_table and not offsets:
        return TableLayout({}, own_grid if known is None else known, [])
    rows = state_dict[TABLE].shape[1] if has_table else 0
    name, number = (TABLE, rows) if has_table else next(iter(offsets.items()))

    def fitting(grid: Grid | None) -> list[TableLayout]:
        if grid is None or not set(offsets.values()) <= {(2 * grid[0] - 1) * (2 * grid[1] - 1)}:
            return []
        patches = grid[0] * grid[1]
        return [
            TableLayout(layout, grid, [])
            for layout in layouts
            if not has_table or rows - sum(layout.values()) == patches
        ]

    def square(layout: dict[str, int]) -> Grid | None:
        side = square_root(rows - sum(layout.values())) if has_table else square_root(number)
        return None if side is None else (side, side) if has_table else ((side + 1) // 2, (side + 1) // 2)

    if told := fitting(known):
        return told[0]
    of_model, of_squares = fitting(own_grid), [found for layout in layouts for found in fitting(square(layout))]
    if not of_model + of_squares:
        raise ValueError(
            f"{name} of the checkpoint has {number} rows, which fit no square grid: give its (H, W), or build the "
            "model for images of its size"
        )
    guess = (of_model + of_squares)[0]
    unsure = not of_model or any(found.grid != own_grid for found in of_squares if found.tokens == guess.tokens)
    rows_of = f" and {' and '.join(guess.tokens)}" if has_table and guess.tokens else ""
    remark = (
        f"{name} is taken for {guess.grid[0]} x {guess.grid[1]} patches{rows_of}; the checkpoint does not say its grid"
    )
    return guess._replace(remarks=[remark] if unsure else [])


def fill_rows(
    own: StateDict, source: StateDict, tokens: dict[str, int], own_tokens: dict[str, int]
) -> tuple[Tensor, list[str]]:
    """The model's table with the checkpoint's rows of the patches, and of the prefix tokens that both have.

    A token of the checkpoint that has no row of its own there receives zeros: this is what it received there too.

    Args:
        own: state dict of the model, on the checkpoint's grid.
        source: of the checkpoint.
        tokens, own_tokens: rows of the prefix tokens in either table.

    Returns:
        The table (T, R, D), and what to say of the prefix tokens.
    """
    *rows, patches = source[TABLE].split([*tokens.values(), source[TABLE].shape[1] - sum(tokens.values())], dim=1)
    given = dict(zip(tokens, rows, strict=True))
    own_rows, _ = own[TABLE].tensor_split([sum(own_tokens.values())], dim=1)
    parts, new = [], []
    for (name, number), initial in zip(own_tokens.items(), own_rows.split([*own_tokens.values()], dim=1), strict=True):
        if tokens.get(name) == number:
            parts.append(given[name])
        elif name in source and name not in tokens:
            parts.append(torch.zeros_like(initial).to(patches))
        else:
            parts.append(initial.to(patches))
            new.append(name)
    lost = [name for name in tokens if own_tokens.get(name) != tokens[name]]
    said = (("new, at their initial values", new), ("left out", lost))
    remarks = [f"{TABLE}: the rows of {', '.join(names)} are {state}" for state, names in said if names]
    return torch.cat([*parts, patches], dim=1), remarks


def difference(source: StateDict, own: StateDict) -> str:
    """Why no tensor of a checkpoint fits a model: the first of its names that the model has too, or that it lacks."""
    common = next((name for name in source if name in own), None)
    if common is not None:
        return f"{common} is {tuple(source[common].shape)} there and {tuple(own[common].shape)} in the model"
    return f"its names, such as {next(iter(source), 'none')}, are not those of the model, such as {next(iter(own))}"


def square_root(number: int) -> int | None:
    """The whole square root, if there is one."""
    root = math.isqrt(number)
    return root if root * root == number else None


def summarise(names: list[str]) -> str:
    """Names with their layers folded: ``blocks.*.norm1.weight (12), head.bias``."""
    folded = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in folded.items())
