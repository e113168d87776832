"""timm's vision transformers with any encoding under any join.

Shapes: B batch, C channels, P prefix tokens, grid (H, W) of patches, N = P + H*W tokens, T tables, R rows, D embedding width, h heads,
d head width, L layers. Block l reads the residual stream x_l (B, N, D).
"""

import copy
from collections.abc import Sequence
from typing import Any

import timm.layers
import timm.models.deit
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lape_vit import encodings, joins
from lape_vit.encodings import AttentionEncoding, Grid


class Attention(timm.layers.Attention):
    """timm's self-attention, in which an :class:`AttentionEncoding` may turn q and k and add its terms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoding: AttentionEncoding | None = None

    def forward(self, x: Tensor, grid: Grid, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, N, D) to (B, N, D).

        Args:
            attn_mask: broadcasts to (B, h, N, N); boolean (True takes part) or added to the logits.
        """
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.encoding is not None:
            q, k = self.encoding.rotate(q, k, grid)
            attn_mask = merge_masks(self.encoding.bias(q, grid), attn_mask)

        dropout = self.attn_drop.p if self.training else 0.0
        if self.fused_attn and not (self.encoding is not None and self.encoding.has_value_term):
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            attention = self.attn_drop(merge_masks(logits, attn_mask).softmax(dim=-1))
            x = attention @ v
            if self.encoding is not None and self.encoding.has_value_term:
                x = x + self.encoding.value_term(attention, grid)

        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        return self.proj_drop(self.proj(x))


def merge_masks(logits: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """Apply a boolean or an additive mask to a term of the logits; either may be missing."""
    if logits is None or attn_mask is None:
        return attn_mask if logits is None else logits
    if attn_mask.dtype == torch.bool:
        return logits.masked_fill(~attn_mask, float("-inf"))
    return logits + attn_mask


class Block(timm.models.vision_transformer.Block):
    """timm's pre-norm block, to which a join may hand a term."""

    term_to_residual: bool = False

    def forward(self, x: Tensor, term: Tensor | None, grid: Grid, attn_mask: Tensor | None = None) -> Tensor:
        """x_l to x_{l+1}, both (B, N, D).

        Args:
            term: (1, N, D), added to x_l if ``term_to_residual``, else to what attention reads.
        """
        if term is not None and self.term_to_residual:
            x = x + term
        y = self.norm1(x)
        if term is not None and not self.term_to_residual:
            y = y + term
        x = x + self.drop_path1(self.ls1(self.attn(y, grid, attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PositionMixin:
    """Gives a timm vision transformer the arguments ``pe`` and ``join_type``, and the paths they need.

    Args:
        pe: an encoding of :mod:`lape_vit.encodings`, or a sum of two; default ``learnable``. timm's own argument
            ``pos_embed`` is taken for it, if given.
        join_type: a join of :mod:`lape_vit.joins`; default ``basic``.
        kwargs: options of the encoding, and all arguments of timm's class. With neither ``pe`` nor ``join_type`` the model is
            timm's, bit for bit.

    Raises:
        ValueError: unknown names, an illegal pair, a width that the encoding cannot divide.
        TypeError: an option that the encoding does not take, or an argument that timm does not know.
    """

    def __init__(
        self, *args: Any, pe: str | None = None, join_type: str = "basic", pos_embed: str | None = None, **kwargs: Any
    ) -> None:
        if pe is not None and pos_embed is not None:
            raise ValueError(f"pe={pe!r} and pos_embed={pos_embed!r} say the same thing: give one of them")
        encoding = encodings.resolve(next((name for name in (pe, pos_embed) if name is not None), "learnable"))
        joins.check_pair(encoding.name, join_type)
        options = {option: kwargs.pop(option) for option in encodings.all_options() & kwargs.keys()}
        if refused := options.keys() - encoding.options():
            raise TypeError(f"pe={encoding.name!r} takes no option {sorted(refused)[0]!r}")
        layers_use_positions = joins.JOINS[join_type].target != "input" or encoding.attention is not None
        if kwargs.get("patch_drop_rate") and layers_use_positions:
            raise ValueError(
                f"patch_drop_rate cannot be used with pe={encoding.name!r}, join_type={join_type!r}: its layers need the"
                " places of all patches; use an absolute encoding with join_type='basic'"
            )

        super().__init__(*args, **kwargs, block_fn=Block, attn_layer=Attention)
        self.pe, self.join_type = encoding.name, join_type
        self._attach(encoding, options)

    def _attach(self, encoding: encodings.Resolved, options: dict[str, Any]) -> None:
        grid, depth = self.patch_embed.grid_size, len(self.blocks)
        absolute = None
        if encoding.absolute is not None:
            taken = {name: options[name] for name in encoding.absolute.options() & options.keys()}
            prefix_rows = 0 if self.no_embed_class else self.num_prefix_tokens
            absolute = encoding.absolute(self.embed_dim, grid, prefix_rows, **taken)
        join = joins.JOINS[self.join_type]
        self.join = join(absolute, self.num_prefix_tokens, depth, norm=lambda: copy.deepcopy(self.blocks[0].norm1))

        if absolute is None or not absolute.learned:
            self.pos_embed = None
        else:
            shape = (join.num_tables(depth), absolute.prefix_rows + grid[0] * grid[1], self.embed_dim)
            if self.pos_embed.shape != shape:
                self.pos_embed = nn.Parameter(self.pos_embed.new_empty(shape))
                timm.layers.trunc_normal_(self.pos_embed, std=0.02)

        for block in self.blocks:
            block.term_to_residual = join.target == "residual"
            if encoding.attention is not None:
                attn = block.attn
                taken = {name: options[name] for name in encoding.attention.options() & options.keys()}
                attn.encoding = encoding.attention(attn.head_dim, attn.num_heads, grid, self.num_prefix_tokens, **taken)
                self.join.prepare(attn.encoding)

    def position_terms(self, grid: Grid | None = None) -> tuple[Tensor | None, list[Tensor | None]]:
        """What the join adds to the input and hands to block 0 .. L-1: each (1, N, D) or None.

        Args:
            grid: (H, W) patches; default: what the model is built for.
        """
        return self.join(grid or self.patch_embed.grid_size, self.pos_embed)

    def embed(self, x: Tensor) -> tuple[Tensor, list[Tensor | None], Grid]:
        """Images (B, C, height, width) to x_0 (B, N, D), the blocks' terms and the grid."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        input_term, block_terms = self.position_terms(grid)
        prefix = (self.cls_token, getattr(self, "dist_token", None), self.reg_token)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix if token is not None), x], dim=1)
        if input_term is not None:
            x = x + input_term
        return self.norm_pre(self.patch_drop(self.pos_drop(x))), block_terms, grid

    def run_blocks(
        self,
        x: Tensor,
        take: Sequence[int] = (),
        stop: int | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Images to the last x_l, before the final norm, and to the outputs of the blocks in ``take``; ``stop`` blocks run."""
        x, terms, grid = self.embed(x)
        if is_causal:
            causal = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
            attn_mask = merge_masks(causal, attn_mask)
        taken = []
        for index, (block, term) in enumerate(zip(self.blocks[:stop], terms, strict=False)):
            if self.grad_checkpointing:
                x = checkpoint(block, x, term, grid, attn_mask, use_reentrant=False)
            else:
                x = block(x, term, grid, attn_mask)
            if index in take:
                taken.append(x)
        return x, taken

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (B, C, height, width) to normalised tokens (B, N, D)."""
        x, _ = self.run_blocks(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Outputs of chosen blocks, as timm's method of this name returns them.

        Args:
            indices: block numbers (negative ones count from the end), or how many of the last blocks; None for all.
            return_prefix_tokens: hand out (patches, prefix tokens) of each block.
            norm: apply the final norm to each.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: ``NCHW`` (B, D, H, W) or ``NLC`` (B, H*W, D).
            intermediates_only: leave out the final features.
            output_dict: return a dictionary with timm's keys.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: it is NCHW or NLC")
        take = block_indices(indices, len(self.blocks))
        stop = max(take) + 1 if stop_early else None
        features, outputs = self.run_blocks(x, take, stop, attn_mask, is_causal)
        if norm:
            outputs = [self.norm(y) for y in outputs]
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        patches = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]

        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(features)
            return result
        intermediates = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (self.norm(features), intermediates)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Rebuild for images of (height, width) ``img_size`` pixels: trained tables are resampled, the rest is recomputed.

        On the same size nothing changes, bit for bit.
        """
        old, table = self.patch_embed.grid_size, self.pos_embed
        self.pos_embed = None  # timm would resample it as one square table
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.pos_embed = table
        grid = self.patch_embed.grid_size
        if grid == old:
            return
        if table is not None:
            with torch.no_grad():
                resized = self.join.encoding(grid, table)
            self.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)
        for module in self.modules():
            if isinstance(module, encodings.Encoding):
                module.set_grid(grid)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's names and those that the encodings declare."""
        declared = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, encodings.Encoding)
            for name in module.no_weight_decay()
        }
        return super().no_weight_decay() | declared

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for, with what the join holds for them."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.join.keep_layers(len(self.blocks))
        return taken


class VisionTransformer(PositionMixin, timm.models.vision_transformer.VisionTransformer):
    """timm's ViT (class token, optional registers)."""


class VisionTransformerDistilled(PositionMixin, timm.models.deit.VisionTransformerDistilled):
    """timm's DeiT with a distillation token and a second head."""


def block_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """timm's ``indices`` as block numbers in 0 .. depth - 1.

    Raises:
        ValueError: a block that is not there.
    """
    if indices is None:
        return list(range(depth))
    wanted = range(depth - indices, depth) if isinstance(indices, int) else indices
    numbers = [index + depth if index < 0 else index for index in wanted]
    if not numbers or not all(0 <= number < depth for number in numbers):
        raise ValueError(f"indices={indices}: the model has blocks 0 to {depth - 1}")
    return numbers
