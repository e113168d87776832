"""The dropout of our small models is torch's, with cheaper random numbers on a CPU."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models_lape  # noqa: F401  (registers the models)
from lape_vit.dropout import LEVELS, Dropout

SHAPE = (50, 40, 101)  # no multiple of the four elements that share a draw


def seeded(dropout: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return dropout(x)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.95])
def test_each_element_is_dropped_with_probability_p_and_the_others_are_scaled(p):
    x = torch.full(SHAPE, 2.0, requires_grad=True)
    out = seeded(Dropout(p), x)
    out.sum().backward()
    exact = round(p * LEVELS) / LEVELS
    assert abs(exact - p) <= 2**-17
    dropped = out == 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped.float().mean() - p) < 5 * deviation
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 2 / (1 - exact)))
    torch.testing.assert_close(x.grad, out.detach() / 2)


def test_elements_are_dropped_independently():
    dropped = (seeded(Dropout(0.3), torch.ones(400_000)) == 0).float() - 0.3
    for distance in (1, 2, 3, 4, 5, 8):  # four share a draw
        assert abs((dropped[distance:] * dropped[:-distance]).mean() / 0.21) < 5 / 400_000**0.5


def test_what_is_dropped_depends_on_torchs_generator_alone():
    x = torch.ones(SHAPE)
    first = seeded(Dropout(0.1), x)
    assert torch.equal(seeded(Dropout(0.1), x), first)
    assert not torch.equal(seeded(Dropout(0.1), x, seed=1), first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(seeded(Dropout(0.1), x), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("p", "training", "inplace"), [(0.1, False, False), (0.0, True, False), (1.0, True, False), (0.1, True, True)]
)
def test_elsewhere_it_is_torchs_own_and_draws_what_torch_draws(p, training, inplace):
    ours, torchs = (kind(p, inplace).train(training) for kind in (Dropout, nn.Dropout))
    assert torch.equal(seeded(ours, torch.ones(SHAPE)), seeded(torchs, torch.ones(SHAPE)))
    assert repr(ours) == repr(torchs)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_compiled_and_traced_models_have_torchs_own():
    x = torch.ones(SHAPE)
    expected = seeded(nn.Dropout(0.1), x)
    assert not torch.equal(seeded(Dropout(0.1), x), expected)
    assert torch.equal(seeded(torch.compile(Dropout(0.1), backend="eager", fullgraph=True), x), expected)
    traced = torch.jit.trace(Dropout(0.1), x, check_trace=False)
    assert "aten::dropout" in str(traced.graph)
    assert "functional.dropout(" in torch.fx.symbolic_trace(Dropout(0.1)).code
    assert "aten::dropout" in str(torch.export.export(Dropout(0.1), (x,)).graph).replace(".", "::")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_stays(dtype):
    assert seeded(Dropout(0.1), torch.ones(SHAPE, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["vit_compact_patch4_32", "vit_lite_7_patch4_32", "cct_7_3x1_32"])
def test_small_models_drop_by_it_everywhere_and_keep_their_state_dict(name):
    model = timm.create_model(
        name, pe="learnable", drop_rate=0.1, proj_drop_rate=0.1, pos_drop_rate=0.1, attn_drop_rate=0.1
    )
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {Dropout}
    assert not any("drop" in key for key in model.state_dict())


def test_a_model_without_dropout_draws_nothing():
    model = timm.create_model("vit_compact_patch4_32", proj_drop_rate=0.0, pos_drop_rate=0.0).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    F.cross_entropy(model(torch.randn(2, 3, 32, 32, generator=torch.Generator())), torch.tensor([0, 1])).backward()
    assert torch.equal(torch.get_rng_state(), before)
