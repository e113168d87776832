"""timm's vision transformers with any encoding under any join.

Shapes: B batch, C channels, P prefix tokens, grid (H, W) of patches, N = P + H*W tokens, T tables, R rows, D embedding
width, h heads, d head width, L layers. Block l reads the residual stream x_l (B, N, D).
"""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import timm.layers
import timm.models.deit
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lape_vit import encodings, joins
from lape_vit.encodings import AttentionEncoding, Grid
from lape_vit.encodings.caching import Cache


class Attention(timm.layers.Attention):
    """timm's self-attention, in which an :class:`AttentionEncoding` may turn q and k and add its terms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoding: AttentionEncoding | None = None
        self.widens = False

    def set_encoding(self, encoding: AttentionEncoding) -> None:
        """Let ``encoding`` take part."""
        self.encoding = encoding
        self.widens = encoding.widens

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) to q, k and v, each (B, h, N, d), before any encoding."""
        B, N, _ = x.shape
        # Taken apart before they are transposed: their gradients then need one copy to lie side by side, not two.
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        return self.q_norm(q.transpose(1, 2)), self.k_norm(k.transpose(1, 2)), v.transpose(1, 2)

    def forward(self, x: Tensor, grid: Grid, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, D) to (B, N, D).

        Args:
            attn_mask: broadcasts to (B, h, N, N); boolean (True takes part) or added to the logits.
            is_causal: token i attends to tokens 0 .. i only.
        """
        B, N, _ = x.shape
        q, k, v = self.project(x)
        bias: Tensor | None = None
        if self.encoding is not None:
            q, k = self.encoding.rotate(q, k, grid)
            if self.widens:
                q, k, v = self.encoding.widen(q, k, v, grid)
            else:
                bias = self.encoding.bias(q, grid)

        if self.fused_attn and not is_trained_on_cpu(bias):
            if bias is not None:
                attn_mask, is_causal = mask_logits(bias, attn_mask, is_causal), False
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
            )
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            if bias is not None:
                logits = logits + bias
            x = self.attn_drop(mask_logits(logits, attn_mask, is_causal).softmax(dim=-1)) @ v

        if self.encoding is not None:
            x = self.encoding.narrow(x, grid)
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        return self.proj_drop(self.proj(x))


def is_trained_on_cpu(bias: Tensor | None) -> bool:
    """Whether a bias needs what torch's fused attention cannot give on a CPU: a gradient."""
    return isinstance(bias, Tensor) and bias.requires_grad and bias.device.type == "cpu"


@torch.fx.wrap
def mask_logits(logits: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Logits, or a term of them, (..., N, N) with a boolean or additive mask and with the causal one."""
    if is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    if attn_mask is None:
        return logits
    if attn_mask.dtype == torch.bool:
        return logits.masked_fill(~attn_mask, float("-inf"))
    return logits + attn_mask


class Block(timm.models.vision_transformer.Block):
    """timm's pre-norm block, to which a join may hand a term."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.term_to_residual = False

    def forward(
        self, x: Tensor, term: Tensor | None, grid: Grid, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x_l to x_{l+1}, both (B, N, D).

        Args:
            term: (1, N, D), added to x_l if ``term_to_residual``, else to what attention reads.
            attn_mask, is_causal: as in :meth:`Attention.forward`.
        """
        if term is not None and self.term_to_residual:
            x = x + term
        y = self.norm1(x)
        if term is not None and not self.term_to_residual:
            y = y + term
        x = x + self.drop_path1(self.ls1(self.attn(y, grid, attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    """timm's ViT (class token, optional registers) with any encoding under any join.

    Args:
        pe: an encoding of :mod:`lape_vit.encodings`, or a sum of two; default ``learnable``. timm's own argument
            ``pos_embed`` is taken for it, if given.
        join_type: a join of :mod:`lape_vit.joins`; default ``basic``.
        kwargs: options of the encoding, and all arguments of timm's class. With neither ``pe`` nor ``join_type`` the
            model is timm's, bit for bit.

    Attributes:
        pe, join_type: canonical names.
        pe_options: every option of the encoding with its value.

    Raises:
        ValueError: unknown names, an illegal pair, a width that the encoding cannot divide.
        TypeError: an option that the encoding does not take, or an argument that timm does not know.
    """

    if TYPE_CHECKING:
        dist_token: Any  # a parameter in distilled models, None in others

    def __init__(
        self, *args: Any, pe: str | None = None, join_type: str = "basic", pos_embed: str | None = None, **kwargs: Any
    ) -> None:
        if pe is not None and pos_embed is not None:
            raise ValueError(f"pe={pe!r} and pos_embed={pos_embed!r} say the same thing: give one of them")
        encoding = encodings.resolve(next((name for name in (pe, pos_embed) if name is not None), "learnable"))
        joins.check_pair(encoding.name, join_type)
        options = {option: kwargs.pop(option) for option in encodings.all_options().keys() & kwargs.keys()}
        if refused := options.keys() - encoding.options().keys():
            raise TypeError(f"pe={encoding.name!r} takes no option {sorted(refused)[0]!r}")
        layers_use_positions = joins.JOINS[join_type].target != "input" or encoding.attention is not None
        if kwargs.get("patch_drop_rate") and layers_use_positions:
            raise ValueError(
                f"patch_drop_rate cannot be used with pe={encoding.name!r}, join_type={join_type!r}: layers need the "
                "places of all patches; use an absolute encoding with join_type='basic'"
            )

        # A caller's own block_fn or attn_layer is a TypeError that names it, which mypy foresees.
        super().__init__(*args, **kwargs, block_fn=Block, attn_layer=Attention)  # type: ignore[misc]
        self.pe, self.join_type = encoding.name, join_type
        self.cache = Cache()
        self.pe_options = {**encoding.options(), **options}
        if not hasattr(self, "dist_token"):
            self.register_parameter("dist_token", None)
        elif self.reg_token is not None:
            raise ValueError("reg_tokens: a distilled model has none, in timm too; use a model without distillation")
        # A Sequential could not hand a block its term and the grid.
        self.blocks = nn.ModuleList(self.blocks)  # type: ignore[assignment]
        weight = self.patch_embed.proj.weight
        with weight.device:
            self._add_join(encoding)
            self._add_attention_encodings(encoding)
        self.join.to(weight.dtype)

    def _options_of(self, part: type[encodings.Encoding]) -> dict[str, Any]:
        return {option: self.pe_options[option] for option in part.options()}

    def _add_join(self, encoding: encodings.Resolved) -> None:
        grid, depth = self.patch_embed.grid_size, len(self.blocks)
        part, absolute = encoding.absolute, None
        if part is not None:
            prefix_rows = 0 if self.no_embed_class else self.num_prefix_tokens
            absolute = part(self.embed_dim, grid, prefix_rows, **self._options_of(part))
        join, norm = joins.JOINS[self.join_type], cast("Block", self.blocks[0]).norm1
        self.join = join(absolute, self.num_prefix_tokens, depth, norm=lambda: copy.deepcopy(norm))
        for block in cast("Iterable[Block]", self.blocks):
            block.term_to_residual = join.target == "residual"

        if absolute is None or not absolute.learned:
            self.pos_embed = None
        else:
            shape = (join.num_tables(depth), absolute.prefix_rows + grid[0] * grid[1], self.embed_dim)
            assert self.pos_embed is not None
            if self.pos_embed.shape != shape:
                self.pos_embed = nn.Parameter(self.pos_embed.new_empty(shape))
                timm.layers.trunc_normal_(self.pos_embed, std=0.02)

    def _add_attention_encodings(self, encoding: encodings.Resolved) -> None:
        part = encoding.attention
        if part is None:
            return
        grid, options = self.patch_embed.grid_size, self._options_of(part)
        for attn in (cast("Attention", block.attn) for block in self.blocks):
            module = part(attn.head_dim, attn.num_heads, grid, self.num_prefix_tokens, **options)
            self.join.prepare(module)
            attn.set_encoding(module.to(attn.qkv.weight.dtype))

    def train(self, mode: bool = True) -> "VisionTransformer":
        self.cache.clear()
        return super().train(mode)

    def position_terms(self, grid: Grid | None = None) -> tuple[Tensor | None, list[Tensor | None]]:
        """What the join adds to the input and hands to block 0 .. L-1: each (1, N, D) or None.

        Args:
            grid: (H, W) patches; default: what the model is built for.
        """
        return self.join(grid or self.patch_embed.grid_size, self.pos_embed)

    def terms_for(self, x: Tensor, grid: Grid) -> tuple[Tensor | None, list[Tensor | None]]:
        """The same for tokens x (B, N, D), computed once as long as no gradient flows and no parameter changes."""
        if torch.jit.is_scripting():
            terms = self.join(grid, self.pos_embed)
        else:
            sources = list(self.join.parameters())
            if self.pos_embed is not None:
                sources.append(self.pos_embed)
            terms = self.cache.get(x, sources, self.position_terms, grid)
        return terms

    def embed(self, x: Tensor) -> tuple[Tensor, list[Tensor | None], Grid]:
        """Images (B, C, height, width) to x_0 (B, N, D), the blocks' terms and the grid."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        tokens = []
        for token in (self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                tokens.append(token.expand(x.shape[0], -1, -1))
        tokens.append(x.reshape(x.shape[0], -1, x.shape[-1]))
        x = torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0]
        input_term, block_terms = self.terms_for(x, grid)
        if input_term is not None:
            x = x + input_term
        return self.norm_pre(self.patch_drop(self.pos_drop(x))), block_terms, grid

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (B, C, height, width) to normalised tokens (B, N, D)."""
        x, terms, grid = self.embed(x)
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, terms[index], grid, attn_mask, is_causal, use_reentrant=False)
            else:
                x = block(x, terms[index], grid, attn_mask, is_causal)
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
        blocks = self.blocks[: max(take) + 1] if stop_early else self.blocks
        features, terms, grid = self.embed(x)
        outputs = []
        for index, block in enumerate(blocks):
            if self.grad_checkpointing:
                features = checkpoint(block, features, terms[index], grid, attn_mask, is_causal, use_reentrant=False)
            else:
                features = block(features, terms[index], grid, attn_mask, is_causal)
            if index in take:
                outputs.append(self.norm(features) if norm else features)
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        patches = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
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
        """Rebuild for images of (height, width) ``img_size`` pixels: trained tables are resampled, the rest is
        recomputed.

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
                assert self.join.encoding is not None  # a table has an encoding
                resized = self.join.encoding(grid, table)
            self.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)
        for module in self.modules():
            if isinstance(module, encodings.Encoding):
                module.set_grid(grid)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise decay; a layer's norm in the join belongs to that layer's block."""
        groups = super().group_matcher(coarse)
        groups["blocks"] = [*groups["blocks"], (r"^join\.norms\.(\d+)", None)]
        return groups

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
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for, with what the join holds for them."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        depth = len(self.blocks)
        self.join.keep_layers(depth)
        if self.pos_embed is not None:
            tables = self.pos_embed[: self.join.num_tables(depth)]
            self.pos_embed = nn.Parameter(tables.detach().clone(), requires_grad=self.pos_embed.requires_grad)
        return taken


class VisionTransformerDistilled(VisionTransformer, timm.models.deit.VisionTransformerDistilled):
    """timm's DeiT with a distillation token and a second head, likewise."""


def block_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """timm's ``indices`` as block numbers in 0 .. depth - 1.

    Raises:
        ValueError: a block that is not there.
    """
    if indices is None:
        return list(range(depth))
    wanted = range(-indices, 0) if isinstance(indices, int) else indices
    numbers = [index + depth if index < 0 else index for index in wanted]
    if not numbers or not all(0 <= number < depth for number in numbers):
        raise ValueError(f"indices={indices}: the model has blocks 0 to {depth - 1}")
    return numbers
