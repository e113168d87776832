"""timm's vision transformers with any encoding under any join.

Shapes: B batch, C channels, P prefix tokens, grid (H, W) of patches, M patches, N = P + M tokens, T tables, R rows,
D embedding width, h heads, d head width, L layers. Block l reads the residual stream x_l (B, N, D).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import timm.layers
import timm.models.deit
import timm.models.vision_transformer
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lape_vit import encodings, joins
from lape_vit.attention import Attention, Block
from lape_vit.augmentation import PlaceAugmentation
from lape_vit.encodings import AttentionEncoding, LayerSpec, Resolved, TokenEncoding
from lape_vit.joins import Terms
from lape_vit.places import Grid, Places


class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    """timm's ViT (class token, optional registers) with any encoding under any join.

    Args:
        pe: an encoding of :mod:`lape_vit.encodings`, or a sum of some, with options in brackets or as arguments of
            their own; default ``learnable``. timm's own argument ``pos_embed`` is taken for it, if given.
        join_type: a join of :mod:`lape_vit.joins`; default ``basic``.
        pos_shift, pos_jitter, pos_rescale: augmentation of places in training, off by default; see
            :class:`lape_vit.augmentation.PlaceAugmentation`.
        kwargs: options of the encoding, and all arguments of timm's class. With neither ``pe`` nor ``join_type`` the
            model is timm's, bit for bit.

    Attributes:
        pe, join_type: canonical names; ``pe`` with the options that are no defaults.
        pe_options: every option of the encoding with its value.

    Raises:
        ValueError: unknown names, an illegal pair, a width that the encoding cannot divide.
        TypeError: an option that the encoding does not take, or an argument that timm does not know.
    """

    if TYPE_CHECKING:  # what adopt adds; as attributes of the class they would hide modules of these names
        dist_token: Any  # a parameter in distilled models, None in others
        pe: str
        join_type: str
        pe_options: dict[str, Any]
        join: joins.Join
        token_encoding: TokenEncoding | None
        augment_places: PlaceAugmentation
        reference_grid: Grid | None

    def __init__(
        self,
        *args: Any,
        pe: str | None = None,
        join_type: str = "basic",
        pos_embed: str | None = None,
        pos_shift: float = 0.0,
        pos_jitter: float = 1.0,
        pos_rescale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if pe is not None and pos_embed is not None:
            raise ValueError(f"pe={pe!r} and pos_embed={pos_embed!r} say the same thing: give one of them")
        options = {option: kwargs.pop(option) for option in encodings.all_options().keys() & kwargs.keys()}
        pe = next((name for name in (pe, pos_embed) if name is not None), "learnable")
        encoding, augmentation = resolve(pe, join_type, options), PlaceAugmentation(pos_shift, pos_jitter, pos_rescale)
        super().__init__(*args, **kwargs)
        adopt(self, encoding, join_type, augmentation)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "torch.jit.script is deprecated and cannot read this model: use torch.export.export, or torch.onnx.export "
            "with dynamo=True; torch.jit.trace works, too"
        )

    def extrapolate(self, reference_grid: Grid | None = None, log_n: bool = False) -> None:
        """Choose how attention treats images of another size than those of the training; both are off by default.

        Args:
            reference_grid: (H, W) of the training: attention then reads the places in its cells, so that the same part
                of the image has the same place at every size. Tables of a join are resampled as always.
            log_n: multiply logits by log(N) / log(N of the size that the model is built for), so that attention over
                more tokens is as sharp (Chiang and Cholak 2022, https://arxiv.org/abs/2202.12172).

        Raises:
            ValueError: the encoding does not live in attention, or rounds places.
        """
        if reference_grid is not None:
            resolved = encodings.resolve(self.pe)
            if resolved.attention is None:
                raise ValueError(f"pe={self.pe!r} has no part in attention, which a reference grid could place")
            resolved.check_real_places("a reference grid")
        self.reference_grid = reference_grid
        height, width = self.patch_embed.grid_size
        for block in cast("Any", self.blocks):
            block.attn.trained_tokens = self.num_prefix_tokens + height * width if log_n else None

    def position_terms(self, places: Places | None = None) -> Terms:
        """What the join adds, and where: terms (1, N, D), or (B, N, D) where the places of images differ.

        Args:
            places: default: the whole grid that the model is built for.
        """
        weight = first_weight(self)
        places = places or Places(self.patch_embed.grid_size, device=weight.device)
        # Not the weight itself, which a wrapper may keep elsewhere until it is used.
        return self.join(places, torch.empty(0, dtype=weight.dtype, device=places.device), self.pos_embed)

    def tokens_of(self, images: Tensor) -> tuple[Tensor, Places]:
        """Images (B, C, height, width) to tokens (B, N, D), before any position reaches them, and their places."""
        x = self.patch_embed(images)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        tokens = []
        for token in (self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                tokens.append(token.expand(x.shape[0], -1, -1))
        tokens.append(x.reshape(x.shape[0], -1, x.shape[-1]))
        # A stand-in that traces the model has no device.
        device = x.device if isinstance(x, Tensor) else next(self.parameters()).device
        return torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0], Places(grid, device=device)

    def embed(self, x: Tensor, places: Places) -> tuple[Tensor, Terms, Places]:
        """Tokens (B, N, D) to x_0, with the terms and places of those that are left after dropout of patches."""
        if self.training:
            places = self.augment_places(places)
        terms = self.position_terms(places)
        if terms.input is not None:
            x = x + terms.input
        x, drop = self.pos_drop(x), cast("Any", self.patch_drop)
        x, kept = (x, None) if isinstance(drop, nn.Identity) else drop(x)
        if kept is not None:
            prefix = torch.arange(self.num_prefix_tokens, device=kept.device).expand(len(kept), -1)
            tokens = torch.cat([prefix, kept + self.num_prefix_tokens], dim=1)[..., None]
            terms = terms.changed(
                lambda term: term.expand(len(kept), -1, -1).gather(1, tokens.expand(-1, -1, term.shape[-1]))
            )
            places = places.keep(kept)
        return self.norm_pre(x), terms, places if self.reference_grid is None else places.on(self.reference_grid)

    def forward_block(
        self, layer: int, x: Tensor, terms: Terms, places: Places, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """x_l (B, N, D) to what block l makes of it."""
        block, inputs = self.blocks[layer], (x, places, *terms.of_block(layer), attn_mask, is_causal)
        return checkpoint(block, *inputs, use_reentrant=False) if self.grad_checkpointing else block(*inputs)

    def after_block(self, layer: int, x: Tensor, places: Places) -> Tensor:
        """What block l made (B, N, D), with the token encoding if it acts here."""
        if self.token_encoding is None or self.token_encoding.after != layer:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, self.token_encoding(patches, places)], dim=1)

    def normalise(self, x: Tensor, terms: Terms) -> Tensor:
        """The last norm, and the term that a join adds after it."""
        x = self.norm(x)
        return x if terms.output is None else x + terms.output

    def forward_tokens(
        self, x: Tensor, places: Places, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens of :meth:`tokens_of`, (B, N, D), at any places, to normalised tokens (B, N, D)."""
        x, terms, places = self.embed(x, places)
        for layer in range(len(self.blocks)):
            x = self.after_block(layer, self.forward_block(layer, x, terms, places, attn_mask, is_causal), places)
        return self.normalise(x, terms)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (B, C, height, width) to normalised tokens (B, N, D)."""
        return self.forward_tokens(*self.tokens_of(x), attn_mask, is_causal)

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
            norm: apply the final norm to each, and what a join adds after it.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: ``NCHW`` (B, D, H, W) or ``NLC`` (B, H*W, D).
            intermediates_only: leave out the final features.
            output_dict: return a dictionary with timm's keys.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: it is NCHW or NLC")
        take = block_indices(indices, len(self.blocks))
        features, terms, places = self.embed(*self.tokens_of(x))
        outputs = []
        for layer in range(max(take) + 1 if stop_early else len(self.blocks)):
            features = self.forward_block(layer, features, terms, places, attn_mask, is_causal)
            if layer in take:
                outputs.append(self.normalise(features, terms) if norm else features)
            features = self.after_block(layer, features, places)
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        patches = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, places.grid).contiguous() for y in patches]

        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.normalise(features, terms)
            return result
        intermediates = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (self.normalise(features, terms), intermediates)

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
                whole = Places(grid, device=table.device)
                resized = torch.cat([self.join.encoding(whole, table, one) for one in table.split(1)])
            self.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)
        for module in self.modules():
            if isinstance(module, encodings.Encoding):
                module.set_grid(grid)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise decay: what acts in a block is of that block.

        A layer's norm in the join belongs to that layer's block, one after the last norm to the last norm, a token
        encoding to the block before it, and what an absolute encoding has of its own to the patches.
        """
        groups = super().group_matcher(coarse)
        after = 0 if self.token_encoding is None else self.token_encoding.after
        groups["stem"] = rf"{groups['stem']}|^join\.encoding"
        groups["blocks"] = [
            *groups["blocks"],
            (r"^join\.norms\.(\d+)", None),
            (r"^join\.output_norm", (99999,)),  # timm's number of the last norm
            (r"^token_encoding", (after,)),
        ]
        return groups

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
        if self.token_encoding is not None and self.token_encoding.after >= depth:
            self.token_encoding = None
        if self.pos_embed is not None:
            tables = self.pos_embed[: self.join.num_tables(depth)]
            self.pos_embed = nn.Parameter(tables.detach().clone(), requires_grad=self.pos_embed.requires_grad)
        return taken


class VisionTransformerDistilled(VisionTransformer, timm.models.deit.VisionTransformerDistilled):
    """timm's DeiT with a distillation token and a second head, likewise."""


CLASSES: dict[type[nn.Module], type[VisionTransformer]] = {
    timm.models.vision_transformer.VisionTransformer: VisionTransformer,
    timm.models.deit.VisionTransformerDistilled: VisionTransformerDistilled,
}
"""timm's classes, and what their instances become."""


def resolve(pe: str, join_type: str, options: Mapping[str, Any]) -> Resolved:
    """Take a ``pe`` apart; ValueError or TypeError where it, a join or an option is not legal."""
    encoding = encodings.resolve(pe, options)
    joins.check_pair(encoding.name, join_type)
    return encoding


def adopt(model: Any, encoding: Resolved, join_type: str, augmentation: PlaceAugmentation) -> None:
    """Make ours of a vision transformer that timm built, in place: its parts stay, and take on our classes.

    Its table of positions stays where the encoding and the join have one of this shape, else it is drawn anew. On an
    error the model is unchanged.

    Args:
        model: of one of ``CLASSES``, or of ours, as timm's constructor left it.

    Raises:
        ValueError: the model has parts that are not timm's usual ones, or the encoding does not fit it.
    """
    check_parts(model)
    if augmentation.is_on:
        encoding.check_real_places("pos_shift, pos_jitter and pos_rescale")
    like = first_weight(model)
    with like.device:
        join, pos_embed = make_join(model, encoding, join_type, like)
        in_attention = make_attention_encodings(model, encoding, join)
        token_encoding = make_token_encoding(model, encoding)
    for module in (join, *in_attention, token_encoding):
        if module is not None:
            module.to(like.dtype).train(model.training)

    if not isinstance(model, VisionTransformer):
        model.__class__ = CLASSES[type(model)]
    for block, module in zip(model.blocks, in_attention, strict=True):
        block.__class__, block.attn.__class__ = Block, Attention
        block.attn.encoding, block.attn.trained_tokens = module, None
    # A Sequential could not hand a block its terms and places.
    model.blocks = nn.ModuleList(model.blocks).train(model.training)
    if isinstance(model.patch_drop, timm.layers.PatchDropout):
        drop = timm.layers.PatchDropoutWithIndices(model.patch_drop.prob, model.num_prefix_tokens)
        model.patch_drop = drop.train(model.training)
    if not hasattr(model, "dist_token"):
        model.register_parameter("dist_token", None)
    model.pe, model.pe_options, model.join_type = encoding.name, encoding.options(), join_type
    model.augment_places, model.reference_grid = augmentation, None
    model.pos_embed, model.join, model.token_encoding = pos_embed, join, token_encoding


def first_weight(model: Any) -> Tensor:
    """The weight that reads the images first; it has the model's dtype and device."""
    convolution = model.patch_embed.proj
    # Of an embedding by a convolutional network, the projection after it may be nothing.
    return convolution.weight if hasattr(convolution, "weight") else next(model.patch_embed.parameters())


def check_parts(model: Any) -> None:
    """Raise ValueError where a model of timm has parts in which an encoding or a join has no place."""
    usual = {"blocks": timm.models.vision_transformer.Block, "attention": timm.layers.Attention}
    for block in model.blocks:
        # A block of another kind may have no attention of its own.
        for part, module in {"blocks": block, "attention": getattr(block, "attn", None)}.items():
            if type(module) is not usual[part]:
                name = type(module).__name__
                raise ValueError(
                    f"an encoding has no place in {part} of timm's class {name}, only of {usual[part].__name__}"
                )
    if getattr(model, "dist_token", None) is not None and model.reg_token is not None:
        raise ValueError("reg_tokens: a distilled model has none, in timm too; use a model without distillation")


def make_join(model: Any, encoding: Resolved, join_type: str, like: Tensor) -> tuple[joins.Join, nn.Parameter | None]:
    """The join of an encoding, and the trained tables that it needs: the model's own if they have their shape."""
    grid, depth, prefix = model.patch_embed.grid_size, len(model.blocks), model.num_prefix_tokens
    part, absolute = encoding.absolute, None
    if part is not None:
        absolute = part(model.embed_dim, grid, 0 if model.no_embed_class else prefix, **encoding.options_of(part))

    def norm() -> nn.Module:
        new = copy.deepcopy(model.blocks[0].norm1).requires_grad_()
        new.reset_parameters()
        return new

    join = joins.JOINS[join_type](absolute, prefix, depth, norm=norm)
    if absolute is None or not absolute.learned:
        return join, None
    shape = (join.num_tables(depth), absolute.prefix_rows + grid[0] * grid[1], model.embed_dim)
    table = model.pos_embed
    if table is None or table.shape != shape:
        table = nn.Parameter(draw_tables(shape, like))
    return join, table


def draw_tables(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Tables (T, R, D) as they are before training."""
    # A short dtype cannot hold the steps by which the normal distribution is drawn.
    drawn = like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))
    return timm.layers.trunc_normal_(drawn, std=0.02).to(like.dtype)


def make_attention_encodings(model: Any, encoding: Resolved, join: joins.Join) -> list[AttentionEncoding | None]:
    """The part of an encoding that lives in attention, of each block."""
    part, depth = encoding.attention, len(model.blocks)
    if part is None:
        return [None] * depth
    grid, prefix, options = model.patch_embed.grid_size, model.num_prefix_tokens, encoding.options_of(part)
    made: list[AttentionEncoding] = []
    for layer, attn in enumerate(block.attn for block in model.blocks):
        spec = LayerSpec(attn.head_dim, attn.num_heads, grid, prefix, model.embed_dim, layer, depth)
        module = part(spec, **options)
        join.prepare(module)
        if made and not part.differs_by_layer:
            module.kept = made[0].kept
        made.append(module)
    return [*made]


def make_token_encoding(model: Any, encoding: Resolved) -> TokenEncoding | None:
    """The part of an encoding that acts on the tokens after a block."""
    part, depth = encoding.token, len(model.blocks)
    if part is None:
        return None
    module = part(model.embed_dim, model.patch_embed.grid_size, **encoding.options_of(part))
    if not -depth <= module.after < depth:
        raise ValueError(f"pe={encoding.name!r}: after={module.after}, and the blocks are 0 to {depth - 1}")
    module.after %= depth
    return module


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
