"""Attention with a trained bias on a CPU, in memory that does not grow with the square of the tokens.

Shapes: B batch, h heads, N tokens, d head width.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import Bias

BLOCK = 2**19
"""How many weights of attention the backward pass makes at once."""


class Making(nn.Module):
    """Makes a bias, as a module, so that other tensors can stand in for the encoding's parameters."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.encoding, self.places = bias

    def forward(self, q: Tensor, k: Tensor) -> Tensor | None:
        return self.encoding.logits_bias(q, k, self.places)


class BiasedAttention(torch.autograd.Function):
    """softmax(scale q k^T + temperature b(q, k)) v for q, k and v (B, h, N, d).

    torch's fused attention gives a bias no gradient on a CPU, and the plain formula holds the weights of each layer
    (B, h, N, N) for the backward pass. Here the bias and, block by block, the weights are made once more in the
    backward pass. With w the weights and g the gradient of the result o, the gradient of the logits is
    w (g v^T - (g . o)).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        bias: Bias, scale: float, temperature: float, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> Tensor:
        """
        Args:
            parameters: those of the bias, in the order of ``bias.parameters()``.
        """
        term = bias.make(q, k)
        assert term is not None
        mask = times(term, temperature).expand(*q.shape[:3], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bias, ctx.scale, ctx.temperature, *tensors = inputs
        ctx.autocast = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered, q, k, v, *parameters = ctx.saved_tensors
        with ctx.autocast:
            with torch.enable_grad():
                term = times(made_with(ctx.bias, parameters, q, k), ctx.temperature)
                term = term if term.dim() == 4 else term[None]
            of_q, of_k, of_v, of_term = gradients(q, k, v, term, gathered, grad, ctx.scale)
        by_term: list[Tensor | None] = [None] * (2 + len(parameters))
        if term.requires_grad:
            inputs = (q, k, *parameters)
            trained = [number for number, one in enumerate(inputs) if one.requires_grad]
            again = torch.is_grad_enabled()  # where gradients of gradients are asked for
            found = torch.autograd.grad(
                term, [inputs[number] for number in trained], of_term, allow_unused=True, create_graph=again
            )
            for number, of in zip(trained, found, strict=True):
                by_term[number] = of
        of_q, of_k = (of if by is None else of + by for of, by in zip((of_q, of_k), by_term[:2], strict=True))
        return None, None, None, of_q, of_k, of_v, *by_term[2:]


def times(term: Tensor, temperature: float) -> Tensor:
    """Their product, without a pass over the memory where the temperature is 1."""
    return term if temperature == 1 else term * temperature


def made_with(bias: Bias, parameters: Sequence[Tensor], q: Tensor, k: Tensor) -> Tensor:
    """The bias of these parameters, even where the encoding has others by now."""
    stand_ins = {f"encoding.{name}": one for name, one in zip(bias.parameters(), parameters, strict=True)}
    return torch.func.functional_call(Making(bias), stand_ins, (q, k))


def gradients(
    q: Tensor, k: Tensor, v: Tensor, term: Tensor, gathered: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v and the term of the logits (1 or B, 1 or h, 1 or N, N).

    Args:
        gathered: the result of attention.
        grad: its gradient.
    """
    of_q = torch.zeros_like(q)
    # In float32 or better, as each is a sum over blocks.
    of_k, of_v, of_term = (
        torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in (k, v, term)
    )
    along = (grad * gathered).sum(dim=-1, keepdim=True)
    for block in blocks(q):
        images, rows = block
        query, key, value, of_rows = q[images, :, rows], k[images], v[images], grad[images, :, rows]
        weights = (query * scale @ key.mT + part(term, block)).softmax(dim=-1)
        of_logits = weights * (of_rows @ value.mT - along[images, :, rows])
        of_q[images, :, rows] = of_logits @ key * scale
        of_k[images] += of_logits.mT @ query * scale
        of_v[images] += weights.mT @ of_rows
        of_part = part(of_term, block)
        of_part += of_logits.sum_to_size(of_part.shape)
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype), of_term.to(term.dtype)


def blocks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and queries of q (B, h, N, d) of which at most about ``BLOCK`` weights are made at once."""
    B, h, N, _ = q.shape
    images, rows = max(BLOCK // (h * N * N), 1), min(max(BLOCK // (h * N), 1), N)
    return product(slices(B, images), slices(N, rows))


def slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def part(term: Tensor, block: tuple[slice, slice]) -> Tensor:
    """A block of what broadcasts to (B, h, N, N)."""
    images, rows = (each if length > 1 else slice(None) for each, length in zip(block, term.shape[::2], strict=True))
    return term[images, :, rows]
