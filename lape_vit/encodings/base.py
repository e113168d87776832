"""The contracts of the three families of encodings.

Shapes: B batch, P prefix tokens (class, distillation, registers), H x W cells of the grid, M patches at some places,
N = P + M tokens, R rows of an absolute encoding (P or fewer, then M), T tables, D embedding width, h heads, d head
width.

An author writes formulas of places. The base classes pad for prefix tokens, cast, and keep results for a whole grid: of
a module without parameters always, of one with parameters in evaluation on a CPU. A parameter can be written in ways
that nobody sees, so that its values are compared with those that the result was made of; elsewhere it is computed in
every forward.
"""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.offsets import for_each_pair
from lape_vit.places import Grid, Places

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | Bias | None"], Tensor]
"""From q, k, v (B, h, N, E) and a term of the logits, which broadcasts to (B, h, N, N), to what is gathered."""


def autograd_keeps() -> bool:
    """Whether autograd keeps tensors until the backward pass: not in a traced graph, nor where a compiler chooses."""
    return torch.is_grad_enabled() and not torch.jit.is_tracing() and not torch.compiler.is_compiling()


class Kept:
    """Results of formulas, the last one of each, with what it was made of: grid, device, dtype, and values."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Any, list[Tensor], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": {}}  # neither copied nor saved with the model

    def get(self, name: str, key: Any, values: Sequence[Tensor], make: Callable[[], Tensor], limit: float) -> Tensor:
        """The result of this name, if it was made of the same key and equal values; else a new one.

        Args:
            limit: in bytes; a larger result is not kept.
        """
        old_key, old_values, result = self.entries.get(name, (None, [], None))
        if result is not None and old_key == key and all(map(is_equal, old_values, values)):
            return result
        with torch.inference_mode(False), torch.no_grad():  # so that it can be used outside inference mode, too
            result = make()
            if result.numel() * result.element_size() <= limit:
                self.entries[name] = (key, [value.clone() for value in values], result)
        return result


LAYER_LIMIT = 2**22
"""In bytes. Results of layers that differ are kept up to this size, as there is one of each layer."""


def is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU have the same dtype, shape and values."""
    return one.dtype == other.dtype and torch.equal(one, other)


class Encoding(nn.Module):
    """What position information looks like. An encoding belongs to one of the families below.

    Options of an encoding are the keyword-only arguments of its ``__init__``: numbers, bools and strings with defaults.
    An option of few values has the type ``Literal[...]``.
    """

    name: ClassVar[str]
    divisor: ClassVar[int] = 1
    """What the width that the encoding fills must be a multiple of: D of an absolute one, d of one in attention."""

    hooks: ClassVar[tuple[str, ...]] = ()
    """Of a family: the methods of which its members define at least one."""
    overridden: frozenset[str] = frozenset()
    """Of a member: those that it defines. An instance whose options need fewer takes the others out."""

    differs_by_layer: ClassVar[bool] = False
    """True where layers differ in more than their parameters: they then do not share what is kept for a grid."""

    reads_real_places: ClassVar[bool] = True
    """False where places or offsets are rounded to cells, so that a move by part of a cell has no effect or a jump."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "hooks" not in vars(cls):  # a family defines them, a member does not
            cls._check_hooks()

    @classmethod
    def _check_hooks(cls) -> None:
        """Raise TypeError where a hook would never be called, or none is there to be called."""
        family = next(parent for parent in cls.__mro__ if issubclass(parent, Encoding) and "hooks" in vars(parent))
        defined = {hook for hook in family.hooks if getattr(cls, hook) is not getattr(family, hook)}
        cls.overridden = frozenset(defined)
        if family.hooks and not defined:
            raise TypeError(f"{cls.__name__} defines none of {', '.join(family.hooks)}: it would be no encoding")
        if len(defined & {"widen", "narrow"}) == 1:
            raise TypeError(f"{cls.__name__} must define widen and narrow together")
        if defined == {"patch_vectors", "forward"}:
            raise TypeError(f"{cls.__name__} defines forward, so its patch_vectors would never be called")
        foreign = {hook for other in Encoding.__subclasses__() for hook in other.hooks} - set(family.hooks)
        if never_called := sorted(foreign & vars(cls).keys() - {"forward"}):
            raise TypeError(
                f"{cls.__name__} defines {never_called[0]}, a hook of another family: it would never be called"
            )

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.kept = Kept()  # the layers may share it
        self.kept_of_layer = Kept()

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options that this encoding takes, with their defaults."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {
            parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
        }

    @classmethod
    def choices(cls) -> dict[str, tuple[Any, ...]]:
        """The legal values of each option whose type is a ``Literal``."""
        hints = get_type_hints(cls.__init__)
        return {option: get_args(hints[option]) for option in cls.options() if get_origin(hints.get(option)) is Literal}

    @classmethod
    def check_width(cls, width: int, what: str) -> None:
        """Raise ValueError where a width is no multiple of ``divisor``."""
        if width % cls.divisor:
            raise ValueError(f"pe={cls.name!r} needs {what} divisible by {cls.divisor}, not {width}")

    def set_grid(self, grid: Grid) -> None:
        """Rebuild for another grid. The model calls it after its trained tables were resampled."""
        self.grid = grid

    def no_weight_decay(self) -> set[str]:
        """Names of this module's own parameters that an optimiser must not decay."""
        return set()

    def compute(self, formula: Callable[[Places, torch.dtype], Tensor], places: Places, like: Tensor) -> Tensor:
        """``formula(places, like.dtype)``, which is kept as by :meth:`fixed` where the module has no parameters.

        Where it has some, the result is kept in evaluation on a CPU, until one of their values differs. On a GPU the
        comparison would make the host wait.
        """
        parameters = list(self.parameters())
        if not parameters:
            return self.fixed(formula, places, like)
        # Other tensors may stand in for parameters: those of a transform, which cannot be compared.
        are_ordinary = all(type(one) is nn.Parameter and one.device.type == "cpu" for one in parameters)
        if self.training or torch.is_grad_enabled() or not are_ordinary or not can_be_kept(places, like):
            return formula(places, like.dtype)
        key, values = (places.grid, places.device, like.dtype), [*parameters, *self.buffers()]
        return self.kept_of_layer.get(formula.__name__, key, values, lambda: formula(places, like.dtype), LAYER_LIMIT)

    def fixed(self, formula: Callable[[Places, torch.dtype], Tensor], places: Places, like: Tensor) -> Tensor:
        """``formula(places, like.dtype)`` of a formula that reads no parameter; kept for a whole grid."""
        if not can_be_kept(places, like):
            return formula(places, like.dtype)
        key, limit = (places.grid, places.device, like.dtype), LAYER_LIMIT if self.differs_by_layer else math.inf
        return self.kept.get(formula.__name__, key, [], lambda: formula(places, like.dtype), limit)


def can_be_kept(places: Places, like: Tensor) -> bool:
    """Not while a model is compiled, exported or traced, nor with stand-ins of tensors."""
    is_ordinary = type(like) in (Tensor, nn.Parameter)
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return places.is_whole and is_ordinary and not is_recorded


class NoEncoding(Encoding):
    """No position information at all: without it a transformer sees a bag of patches."""

    name = "none"
    reads_real_places = False


class AbsoluteEncoding(Encoding):
    """A vector per token, which a join carries to the layers. A subclass defines :meth:`patch_vectors`.

    Args:
        dim: D.
        grid: (H, W) that the model is built for.
        prefix_rows: how many prefix tokens have a row of their own; they come first.
    """

    learned: ClassVar[bool] = False
    """True where w is a trained table. The model keeps it, under timm's own name ``pos_embed``, and hands it in."""

    hooks = ("patch_vectors", "forward")

    def __init__(self, dim: int, grid: Grid, prefix_rows: int) -> None:
        self.check_width(dim, "an embed_dim")
        super().__init__(grid)
        self.dim = dim
        self.prefix_rows = prefix_rows

    def patch_vectors(self, places: Places) -> Tensor:
        """The vector of each patch, (M, D) or (B, M, D), in any dtype."""
        raise NotImplementedError

    def prefix_vectors(self, patches: Tensor) -> Tensor:
        """The row of each prefix token that has one, (R - M, D), in the dtype and on the device of ``patches``."""
        return patches.new_zeros(self.prefix_rows, self.dim)

    def forward(self, places: Places, like: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        """w, (1, R, D), or (B, R, D) where the places of images differ.

        Args:
            like: has the dtype that w is to have.
            pos_embed: one of the model's trained tables (1, R, D) for ``self.grid``; None where ``learned`` is False.
        """
        return self.compute(self._rows, places, like)

    def _rows(self, places: Places, dtype: torch.dtype) -> Tensor:
        patches = self.patch_vectors(places)
        patches = patches if places.differs_by_image else patches[None]
        prefix = self.prefix_vectors(patches).expand(patches.shape[0], -1, -1)
        return torch.cat([prefix, patches], dim=1).to(dtype)


class LayerSpec(NamedTuple):
    """The attention layer that an encoding is built for.

    Attributes:
        head_dim: d.
        num_heads: h.
        grid: (H, W) that the model is built for.
        num_prefix_tokens: P.
        dim: D, the width of what attention reads.
        layer: number of the block, from 0.
        depth: L, how many blocks there are.
    """

    head_dim: int
    num_heads: int
    grid: Grid
    num_prefix_tokens: int
    dim: int
    layer: int = 0
    depth: int = 1


class AttentionEncoding(Encoding):
    """Position inside attention; one module per layer. A subclass defines any of the hooks, each of which does nothing
    by default: :meth:`rotate`, :meth:`offset_bias`, :meth:`patch_bias`, :meth:`bias`, and :meth:`widen` with
    :meth:`narrow`.
    """

    takes_norm: ClassVar[bool] = False
    """True where a join may normalise the bias: :meth:`add_norm` is defined."""

    biases: ClassVar = ("offset_bias", "patch_bias", "bias")
    hooks = ("rotate", *biases, "widen", "narrow")

    def __init__(self, spec: LayerSpec) -> None:
        self.check_width(spec.head_dim, "a head width")
        super().__init__(spec.grid)
        self.head_dim = spec.head_dim
        self.num_heads = spec.num_heads
        self.num_prefix_tokens = spec.num_prefix_tokens

    def add_norm(self) -> None:
        """Normalise the bias before it is added, from now on."""
        raise NotImplementedError

    def rotate(self, q: Tensor, k: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """q and k (B, h, N, d) turned by their positions."""
        return q, k

    def offset_bias(self, dx: Tensor, dy: Tensor) -> Tensor:
        """A term of the logits between patches that depends on their offset alone.

        Args:
            dx, dy: columns and rows from query to key, in cells, (..., 1, Q, K) in float64.

        Returns:
            (..., h, Q, K), or (..., 1, Q, K) for all heads alike; in any dtype. Pairs with a prefix token get 0.
        """
        raise NotImplementedError

    def patch_bias(self, places: Places) -> Tensor:
        """A term of the logits between patches that depends on places alone.

        It broadcasts to (h, M, M). Where the places of images differ, it is (B, M, M) for all heads alike, or
        broadcasts to (B, h, M, M). In any dtype. Pairs with a prefix token get 0.
        """
        raise NotImplementedError

    def bias(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
        """A term of the logits that depends on q and k (B, h, N, d), after :meth:`rotate`; q is not yet scaled.

        It broadcasts to (B, h, N, N), prefix tokens included.
        """
        raise NotImplementedError

    def widen(self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, h, N, d) with more channels E, alike: (B, h, N, d + E).

        The product of the new channels of q and k is a term of the logits, not yet scaled by d^-1/2. What attention
        gathers from those of v is for :meth:`narrow`. So no term is ever held for each pair of tokens, and fused
        kernels can be used.

        Args:
            read: what attention reads, (B, N, D).
        """
        return q, k, v

    def narrow(self, x: Tensor, places: Places) -> Tensor:
        """What attention gathers from wide values (B, h, N, d + E), to (B, h, N, d)."""
        return x

    def forward(self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, places: Places, attend: Attend) -> Tensor:
        """Attention with this encoding: what each token gathers, (B, h, N, d).

        All that the encoding does with its parameters happens in here, so that a wrapper which gathers or loads the
        parameters of a module for its forward is in time.

        Args:
            read: what attention reads, (B, N, D).
            attend: the rest of attention.
        """
        q, k = self.rotate(q, k, places)
        if "rotate" in self.overridden and autograd_keeps():
            v = v.clone()  # it is a part of one tensor, and would keep the memory of q and k before their turn
        if "widen" not in self.overridden:
            return attend(q, k, v, Bias(self, places) if self.overridden.intersection(self.biases) else None)
        bias = self.logits_bias(q, k, places)
        return self.narrow(attend(*self.widen(q, k, v, read, places), bias), places)

    def logits_bias(self, q: Tensor, k: Tensor, places: Places) -> Tensor | None:
        """The sum of :meth:`offset_bias`, :meth:`patch_bias` and :meth:`bias`; None without any of them."""
        terms = [
            self.compute(formula, places, q)
            for hook, formula in (("offset_bias", self._of_offsets), ("patch_bias", self._of_patches))
            if hook in self.overridden
        ]
        if "bias" in self.overridden:
            terms.append(self.bias(q, k, places))
        return reduce(operator.add, terms) if terms else None

    def _of_offsets(self, places: Places, dtype: torch.dtype) -> Tensor:
        def formula(dx: Tensor, dy: Tensor) -> Tensor:
            return self.offset_bias(dx.unsqueeze(-3), dy.unsqueeze(-3)).to(dtype)

        return self._for_tokens(for_each_pair(formula, places), dtype)

    def _of_patches(self, places: Places, dtype: torch.dtype) -> Tensor:
        bias = self.patch_bias(places)
        return self._for_tokens(bias[:, None] if places.differs_by_image and bias.dim() == 3 else bias, dtype)

    def _for_tokens(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        P = self.num_prefix_tokens
        return F.pad(bias.to(dtype), (P, 0, P, 0))


class Bias(NamedTuple):
    """A term of the logits that is yet to be made: it can be made twice, so that it need not be held for long."""

    encoding: AttentionEncoding
    places: Places

    def make(self, q: Tensor, k: Tensor) -> Tensor | None:
        """The term for q and k (B, h, N, d), which broadcasts to (B, h, N, N)."""
        return self.encoding.logits_bias(q, k, self.places)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.encoding.named_parameters())

    def needs_gradient(self, q: Tensor) -> bool:
        """Whether a gradient flows through the term."""
        reads_content = "bias" in self.encoding.overridden
        return (reads_content and q.requires_grad) or any(one.requires_grad for one in self.encoding.parameters())


class TokenEncoding(Encoding):
    """A function of the patch tokens, placed after a block. A subclass defines ``forward(x, places)``.

    Args:
        dim: D.
        grid: (H, W) that the model is built for.
        after: number of the block after which it acts, from 0; negative numbers count from the end.
    """

    hooks = ("forward",)

    def __init__(self, dim: int, grid: Grid, *, after: int = 0) -> None:
        self.check_width(dim, "an embed_dim")
        super().__init__(grid)
        self.dim = dim
        self.after = after

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """Patch tokens (B, M, D), without prefix tokens, to (B, M, D)."""
        raise NotImplementedError
