"""Models that are built without memory for their weights and filled afterwards, as accelerate and torchtitan do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.models import COMPACT, create, disturb, images, over_pairs


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters alone are made on the meta device, as `accelerate.init_empty_weights` makes them by default."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_on_meta)
        yield


def assign(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(state_dict, assign=True)


def copy_into_empty(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else 0)  # whatever was in that memory
    model.load_state_dict(state_dict)


@pytest.mark.parametrize("context", [parameters_on_meta, lambda: torch.device("meta")], ids=["parameters", "all"])
@pytest.mark.parametrize("fill", [assign, copy_into_empty])
@over_pairs
def test_a_model_built_on_the_meta_device_and_filled_is_the_model(
    pe: str, join_type: str, fill: Callable[..., None], context: Callable[..., Iterator[None]]
) -> None:
    original = disturb(create(pe, join_type, COMPACT)).eval()
    with context():
        model = create(pe, join_type, COMPACT).eval()
    fill(model, original.state_dict())
    pixels = images().float()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert torch.equal(model(pixels), original(pixels))
