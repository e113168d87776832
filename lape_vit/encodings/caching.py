"""What does not depend on the images: computed once, and again where something that it depends on has changed."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Cache:
    """The last result of one computation on parameters, for as long as these are what they were.

    An optimiser's step, a loaded checkpoint, a cast and a move to another device are all seen. What is written through
    ``parameter.data`` is not, as torch does not count it: it is seen at the next ``model.train()`` or ``model.eval()``,
    which forget the result. No result is kept where gradients flow to a parameter, nor while a model is compiled,
    exported or traced.
    """

    def __init__(self) -> None:
        self.entry: _Entry | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"entry": None}  # it is neither copied nor saved with the model

    def clear(self) -> None:
        self.entry = None

    def get(self, x: Tensor, sources: Sequence[Tensor], compute: Callable[..., T], *args: Hashable) -> T:
        """``compute(*args)``, or its last result.

        Args:
            x: what the result is used with.
            sources: all parameters that the result depends on, beside the arguments and the dtype and device of x.
        """
        if not _may_keep(x, sources):
            return compute(*args)
        key = (args, x.dtype, x.device)
        entry = self.entry
        if entry is None or not entry.holds(key, sources):
            with torch.inference_mode(False), torch.no_grad():  # so that it can be used outside inference mode, too
                entry = self.entry = _Entry(key, compute(*args), [_Source(source) for source in sources])
        return entry.result


class _Source:
    """A parameter as it is now."""

    def __init__(self, parameter: Tensor) -> None:
        self.content = parameter.detach()  # shares the memory, which thus cannot be given to another tensor
        self.version = parameter._version  # counts what is written in place

    def is_still(self, parameter: Tensor) -> bool:
        return parameter._version == self.version and parameter.is_set_to(self.content)


@dataclass(frozen=True)
class _Entry:
    key: Hashable
    result: Any
    sources: list[_Source]

    def holds(self, key: Hashable, sources: Sequence[Tensor]) -> bool:
        return (
            key == self.key
            and len(sources) == len(self.sources)
            and all(kept.is_still(source) for kept, source in zip(self.sources, sources, strict=True))
        )


def _may_keep(x: Tensor, sources: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(x) is not Tensor:  # a stand-in that traces or only knows its shape
        return False
    # Anything but an ordinary parameter, such as the tensors of torch.func, may differ without a trace from the last.
    if not all(type(source) is nn.Parameter and not source.is_inference() for source in sources):
        return False
    return not (torch.is_grad_enabled() and any(source.requires_grad for source in sources))
