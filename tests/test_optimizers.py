"""Every optimizer of timm that runs on a CPU: stopped and resumed, it continues bit for bit, with the new options."""

import io
from typing import Any

import pytest
import timm
import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

import models_lape  # noqa: F401  registers the models
from training.optimisation import build_optimizer
from training.options import OptimisationOptions
from training.state import restore_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum' installed")

NEEDS_CUDA = ("bnb", "fused")
"""Beginnings of names from bitsandbytes and apex, which run on CUDA alone; `adahessian` needs second derivatives."""
CPU = [name for name in list_optimizers() if not (name.startswith(NEEDS_CUDA) or get_optimizer_info(name).second_order)]
BEFORE, AFTER = 8, 7  # lookahead's first two synchronisations lie on either side


def build(opt: str, **changes: Any) -> tuple[nn.Module, Optimizer]:
    """A tiny model and its optimizer, the same at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimisation = OptimisationOptions(**{"opt": opt, "lr": 0.01, "weight_decay": 0.05, **changes})
    return model, build_optimizer(optimisation, model, optimisation.lr)


def take_steps(model: nn.Module, optimizer: Optimizer, updates: range) -> None:
    for update in updates:
        torch.manual_seed(update)
        optimizer.zero_grad()
        model(torch.randn(7, 6)).square().mean().backward()
        optimizer.step()


def saved(content: Any) -> Any:
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_most_optimizers_run_on_a_cpu() -> None:
    assert len(CPU) > 0.8 * len(list_optimizers()) > 50


@pytest.mark.parametrize("opt", [prefix + name for prefix in ("", "lookahead_") for name in CPU])
def test_an_optimizer_that_is_stopped_and_resumed_equals_one_that_was_not(opt: str) -> None:
    whole, optimizer = build(opt)
    take_steps(whole, optimizer, range(BEFORE + AFTER))
    first, optimizer = build(opt)
    take_steps(first, optimizer, range(BEFORE))
    checkpoint = saved({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second, optimizer = build(opt)
    second.load_state_dict(checkpoint["model"])
    restore_optimizer(optimizer, checkpoint["optimizer"])
    take_steps(second, optimizer, range(BEFORE, BEFORE + AFTER))
    expected: dict[str, Tensor] = whole.state_dict()
    assert all(value.isfinite().all() for value in expected.values())
    for name, value in second.state_dict().items():
        assert torch.equal(value, expected[name]), name


CHANGES = {"lr": 0.5, "weight_decay": 0.3, "opt_eps": 3e-7, "opt_betas": [0.7, 0.8, 0.9], "momentum": 0.77}


@pytest.mark.parametrize("opt", CPU)
def test_options_that_were_changed_are_those_of_the_resumed_optimizer(opt: str) -> None:
    _, before = build(opt)
    for option, value in CHANGES.items():
        if option == "opt_betas" and len(getattr(before, "defaults", {}).get("betas") or (0, 0)) == 2:
            value = value[:2]
        _, expected = build(opt, **{option: value})
        _, resumed = build(opt, **{option: value})
        restore_optimizer(resumed, saved(before.state_dict()))
        for group, changed in zip(resumed.param_groups, expected.param_groups, strict=True):
            assert {**group, "params": []} == {**changed, "params": []}


def test_muon_leaves_every_parameter_of_positions_to_its_fallback() -> None:
    """A table of positions has the shape of a matrix, but it is none of a linear map."""
    model = timm.create_model("vit_compact_patch4_32", pe="learnable+relative+peg", join_type="LaPE", depth=1)
    optimizer = build_optimizer(OptimisationOptions(opt="muon"), model, 1e-3)
    of_fallback = {id(one) for group in optimizer.param_groups if group.get("use_fallback") for one in group["params"]}
    parameters = dict(model.named_parameters())
    spared = [name for name in model.no_weight_decay() if name in parameters]
    assert {"pos_embed", "blocks.0.attn.encoding.key_x"} <= {*spared}
    assert [name for name in spared if id(parameters[name]) not in of_fallback] == []
    assert id(parameters["blocks.0.mlp.fc1.weight"]) not in of_fallback
