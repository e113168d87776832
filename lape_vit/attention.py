"""timm's attention and block, which an encoding and a join may take part in.

Shapes: B batch, N tokens, D embedding width, h heads, d head width. Block l reads the residual stream x_l (B, N, D).
"""

import math
from functools import partial
from typing import TYPE_CHECKING

import timm.layers
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from torch import Tensor

from lape_vit.biased_attention import BiasedAttention
from lape_vit.encodings import AttentionEncoding
from lape_vit.encodings.base import Bias, autograd_keeps
from lape_vit.places import Places


class Attention(timm.layers.Attention):
    """timm's self-attention, in which an :class:`AttentionEncoding` may turn q and k and add its terms."""

    if TYPE_CHECKING:  # as an attribute of the class it would hide a module of the name
        encoding: AttentionEncoding | None
    trained_tokens: int | None = None
    """Where it is set, logits are multiplied by log(N) / log(trained_tokens) (https://arxiv.org/abs/2202.12172)."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) to q, k and v, each (B, h, N, d), before any encoding."""
        B, N, _ = x.shape
        # Taken apart before they are transposed: their gradients then need one copy to lie side by side, not two.
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        return self.q_norm(q.transpose(1, 2)), self.k_norm(k.transpose(1, 2)), v.transpose(1, 2)

    def temperature(self, num_tokens: int) -> float:
        """What the logits of N tokens are multiplied by: 1 unless ``trained_tokens`` is set."""
        return 1.0 if self.trained_tokens is None else math.log(num_tokens) / math.log(self.trained_tokens)

    def forward(  # type: ignore[override]  # it needs the places, too
        self, x: Tensor, places: Places, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, N, D) to (B, N, D).

        Args:
            attn_mask: broadcasts to (B, h, N, N); boolean (True takes part) or added to the logits.
            is_causal: token i attends to tokens 0 .. i only.
        """
        B, N, _ = x.shape
        q, k, v = self.project(x)
        attend = partial(self.attend, attn_mask=attn_mask, is_causal=is_causal)
        gathered = attend(q, k, v, None) if self.encoding is None else self.encoding(q, k, v, x, places, attend)
        gathered = self.norm(gathered.transpose(1, 2).reshape(B, N, self.attn_dim))
        if self.gate is not None:
            gathered = gathered * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(gathered))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | Bias | None,
        attn_mask: Tensor | None,
        is_causal: bool | Tensor,
    ) -> Tensor:
        """What each token gathers of v (B, h, N, E): (B, h, N, E).

        Args:
            bias: is added to the logits, broadcasts to (B, h, N, N).
        """
        if isinstance(is_causal, Tensor):  # so the older exporter to ONNX hands in a constant
            is_causal = bool(is_causal)
        temperature = self.temperature(q.shape[2])
        scale, dropout = self.scale * temperature, self.attn_drop.p if self.training else 0.0
        if isinstance(bias, Bias):
            is_plain = dropout == 0 and attn_mask is None and not is_causal
            if self.fused_attn and is_plain and q.device.type == "cpu" and autograd_keeps() and bias.needs_gradient(q):
                return BiasedAttention.apply(bias, scale, temperature, q, k, v, *bias.parameters().values())
            bias = bias.make(q, k)
        if bias is not None and self.trained_tokens is not None:
            bias = bias * temperature
        if self.fused_attn and not is_trained_on_cpu(bias):
            if bias is not None:
                attn_mask, is_causal = mask_logits(bias, attn_mask, is_causal), False
                # Of this very shape: on a CPU torch's fused attention takes no other without loss.
                attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
            )
        logits = (q * scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        return self.attn_drop(mask_logits(logits, attn_mask, is_causal).softmax(dim=-1)) @ v


def is_trained_on_cpu(bias: Tensor | None) -> bool:
    """Whether a bias needs what torch's fused attention cannot give on a CPU: a gradient."""
    if not isinstance(bias, Tensor) or torch.jit.is_tracing():
        return False
    return bias.requires_grad and bias.device.type == "cpu"


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
    """timm's pre-norm block, to which a join may hand terms."""

    attn: Attention

    def forward(  # type: ignore[override]  # it needs terms and places, too
        self,
        x: Tensor,
        places: Places,
        residual_term: Tensor | None = None,
        attention_term: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x_l to x_{l+1}, both (B, N, D).

        Args:
            residual_term: (1 or B, N, D), added to x_l.
            attention_term: (1 or B, N, D), added to what attention reads, after norm1.
            attn_mask, is_causal: as in :meth:`Attention.forward`.
        """
        if residual_term is not None:
            x = x + residual_term
        read = self.norm1(x)
        if attention_term is not None:
            read = read + attention_term
        x = x + self.drop_path1(self.ls1(self.attn(read, places, attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
