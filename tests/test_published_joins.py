"""PVG and MPVG against numbers of another implementation, written from the paper's equations."""

from typing import Any

import numpy as np
import pytest
import timm
import torch

from tests.models import DEIT
from tests.test_references import INDEX, Arrays, of_join

STEP = 1e-5

JOINS = [name for name, entry in INDEX.items() if entry["family"] == "join"]


def with_input(name: str, pixels: Any) -> Arrays:
    """A case whose images are others."""
    arrays = Arrays(name)
    arrays["input"] = pixels
    return arrays


@pytest.mark.parametrize("name", JOINS)
def test_a_join_gives_the_logits_and_input_gradients_of_its_equations(name: str) -> None:
    entry, arrays = INDEX[name], Arrays(name)
    depth = entry["model"]["depth"]
    model = timm.create_model(DEIT, pe="learnable", join_type=entry["name"], **entry["model"]).double().eval()
    state = {key: torch.from_numpy(value) for key, value in arrays.state().items()}
    names = {f"pe_norms.{step}": f"join.norms.{step}" for step in range(1, depth)}
    names[f"pe_norms.{depth}"] = "join.output_norm"
    for theirs, ours in names.items():
        for key in [key for key in state if key.startswith(f"{theirs}.")]:
            state[key.replace(theirs, ours)] = state.pop(key)
    model.load_state_dict(state)
    pixels = torch.from_numpy(arrays["input"]).requires_grad_()
    logits = model(pixels)
    (grad_input,) = torch.autograd.grad(logits.square().sum(), pixels)
    expected = torch.from_numpy(arrays["logits"])
    torch.testing.assert_close(logits, expected, rtol=0, atol=entry["tolerance"])

    # The file has no gradients: they are held against differences of the reference, along directions at random.
    for seed in range(3):
        direction = np.random.default_rng(seed).standard_normal(arrays["input"].shape)
        ahead, back = (
            np.square(of_join(entry, with_input(name, arrays["input"] + step * direction))["logits"]).sum()
            for step in (STEP, -STEP)
        )
        along = float((grad_input.numpy() * direction).sum())
        np.testing.assert_allclose(along, (ahead - back) / (2 * STEP), rtol=1e-6)
