"""The references of ``references/`` equal the published code's numbers, kept in ``golden2/``."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.references import (
    alibi,
    augmentation,
    cpb,
    factorized,
    fourier,
    irpe,
    joins,
    lookhere,
    pape,
    peg,
    rope_dinov3,
    rope_golden,
    vit,
)
from tests.references.common import Array, softmax

GOLDEN = Path(__file__).parent / "golden2"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))
Entry = dict[str, Any]


class Arrays(dict[str, Array]):
    """The arrays of one case, which remember which of them were read."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz") as file:
            super().__init__({key: file[key] for key in file.files})
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Array:
        self.read.add(key)
        return super().__getitem__(key)

    def state(self) -> dict[str, Array]:
        return {key.removeprefix("state/"): self[key] for key in self if key.startswith("state/")}


def of_rope_dinov3(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    grid = tuple(entry["grid"])
    options = {"theta": entry["options"]["base"], "normalize": entry["options"]["normalise"]}
    q, k = rope_dinov3.rotate(arrays["q"], arrays["k"], grid, entry["prefix"], **options)
    angles = rope_dinov3.angles(grid, entry["head_dim"], **options)
    return {"q_out": q, "k_out": k, "angles_sin": np.sin(angles), "angles_cos": np.cos(angles)}


def of_rope_golden(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    grid, options = tuple(entry["grid"]), entry["options"]
    ends = options["min_frequency"], options["max_frequency"]
    sizes = entry["heads"], entry["head_dim"]
    phi = rope_golden.golden_ratio_as_published()
    q, k = rope_golden.rotate(
        arrays["q"], arrays["k"], grid, entry["prefix"], *ends, kind=options["positions"], phi=phi
    )
    return {
        "q_out": q,
        "k_out": k,
        "frequencies": rope_golden.frequencies(*sizes, *ends, phi),
        "frequencies_exact": rope_golden.frequencies(*sizes, *ends),
        **{f"positions/{kind}": rope_golden.positions(grid, kind) for kind in ("index", "centred", "ends")},
    }


def of_alibi(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    return {"bias": alibi.bias(tuple(entry["grid"]), entry["heads"])}


def of_lookhere(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    layers = [
        lookhere.bias(
            tuple(entry["grid"]),
            entry["heads"],
            layer,
            entry["depth"],
            entry["options"]["view"],
            entry["prefix"],
            entry["options"]["global_slope"],
        )
        for layer in entry["layers"]
    ]
    return {"bias": np.stack(layers)}


def of_cpb(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    grid, trained_grid, mode = tuple(entry["run_grid"]), tuple(entry["grid"]), entry["options"]["mode"]
    state = arrays.state()
    return {
        "bias": cpb.bias(
            grid,
            state["fc1.weight"],
            state["fc1.bias"],
            state["fc2.weight"],
            state.get("fc2.bias"),
            mode,
            trained_grid,
            entry["prefix"],
        ),
        "coordinates": cpb.coordinates(grid, mode, trained_grid),
    }


def of_irpe(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    grid, prefix = tuple(entry["grid"]), entry["prefix"]
    return {"buckets": irpe_buckets, "terms": irpe_terms, "attention": irpe_attention}[entry["kind"]](
        arrays, grid, prefix
    )


def irpe_buckets(arrays: Arrays, grid: irpe.Grid, prefix: int) -> dict[str, Any]:
    return {"buckets": irpe.buckets(grid, prefix)}


def irpe_terms(arrays: Arrays, grid: irpe.Grid, prefix: int) -> dict[str, Any]:
    buckets = irpe.buckets(grid, prefix)
    attention = np.apply_along_axis(softmax, -1, arrays["attention_logits"])
    terms = {
        "buckets": buckets,
        "term_k": irpe.key_term(arrays["q"], arrays["table_k"][0].T, buckets),
        "term_q": irpe.query_term(arrays["k"], arrays["table_q"][0].T, buckets),
        "value_term": irpe.value_term(attention, arrays["table_v"][0], buckets),
    }
    return {key: terms[key] for key in terms if key in arrays}


def irpe_attention(arrays: Arrays, grid: irpe.Grid, prefix: int) -> dict[str, Any]:
    state, x = arrays.state(), arrays["x"]
    width = x.shape[-1]
    d = state["rpe_k.lookup_table_weight"].shape[1]
    qkv = vit.linear(x, state, "qkv").reshape(*x.shape[:2], 3, width // d, d).transpose(2, 0, 3, 1, 4)
    tables = {
        f"table_{side}": state[f"rpe_{side}.lookup_table_weight"][0]
        for side in "kqv"
        if f"rpe_{side}.lookup_table_weight" in state
    }
    tables = {side: table if side == "table_v" else table.T for side, table in tables.items()}
    gathered = irpe.attention(*qkv, grid, prefix, **tables)
    return {"y": vit.linear(gathered.transpose(0, 2, 1, 3).reshape(x.shape), state, "proj")}


def of_peg(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    return {"module": peg_module, "model": peg_model}[entry["kind"]](entry, arrays)


def peg_module(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    y = peg.generate(arrays["x"], arrays["weight"], arrays["bias"], tuple(entry["grid"]), entry["prefix"])
    return {"y": y}


def peg_model(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    grid, model, state = tuple(entry["grid"]), entry["model"], arrays.state()
    prefix = model.get("class_token", True) + model.get("reg_tokens", 0)
    weight, bias = arrays["peg/weight"], arrays["peg/bias"]

    def generate(x: Array) -> Array:
        return peg.generate(x[None], weight, bias, grid, prefix)[0]

    rows = [vit.logits(image, state, model["num_heads"], after_block={0: generate}) for image in arrays["input"]]
    return {"logits": np.stack(rows)}


def of_factorized(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    axes = arrays["pos_embed_y"][0], arrays["pos_embed_x"][0]
    return {
        "table": factorized.table(*axes, tuple(entry["grid"]), entry["prefix"])[None],
        "resized": factorized.table(*axes, tuple(entry["other_grid"]), entry["prefix"])[None],
    }


def of_join(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    state = arrays.state()
    numbers = sorted(int(key.split(".")[1]) for key in state if key.startswith("pe_norms") and key.endswith("weight"))
    norms = [(state[f"pe_norms.{number}.weight"], state[f"pe_norms.{number}.bias"]) for number in numbers]
    terms = {"PVG": joins.pvg, "MPVG": joins.mpvg}[entry["name"]](state["pos_embed"][0], norms)
    heads = entry["model"]["num_heads"]
    return {"logits": np.stack([vit.logits(image, state, heads, terms) for image in arrays["input"]])}


def of_pape(entry: Entry, arrays: Arrays) -> dict[str, Any]:
    heads, parabolas = entry["heads"], entry["options"]["parabolas"]
    state, tokens, q, k = arrays.state(), arrays["tokens"], arrays["q"], arrays["k"]
    directions = state["position.weight"].reshape(heads, parabolas, 2)
    weight_a, weight_b = state["ab.weight"].reshape(2, heads, parabolas, tokens.shape[2])
    x, y = arrays["positions"][0].T  # of the class token, too, which has a place there and none here
    term = pape.bias(tokens, directions, weight_a, -weight_b, tuple(entry["grid"]), x=x, y=y)
    return {"logits": q @ np.swapaxes(k, -1, -2) / math.sqrt(entry["head_dim"]) + term}


FAMILIES: dict[str, Callable[[Entry, Arrays], dict[str, Any]]] = {
    name.removeprefix("of_"): function for name, function in list(globals().items()) if name.startswith("of_")
}
"""From a case to what the reference makes of its inputs, by the names of the arrays that it must equal."""

OTHERS = {"grad_input"}
"""Arrays that models are compared with, not references."""


def test_the_index_describes_every_file_and_every_family_has_a_reference() -> None:
    assert set(INDEX) == {path.stem for path in GOLDEN.glob("*.npz")}
    assert {entry["family"] for entry in INDEX.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", INDEX)
def test_reference_equals_published_code(name: str) -> None:
    entry, arrays = INDEX[name], Arrays(name)
    results = FAMILIES[entry["family"]](entry, arrays)
    assert arrays.keys() == arrays.read | results.keys() | (arrays.keys() & OTHERS), name
    assert not arrays.read & results.keys()
    for key, result in results.items():
        expected = dict.__getitem__(arrays, key)
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=0, atol=entry["tolerance"], err_msg=key)


GRID, PREFIX, HEADS, HEAD_DIM = (3, 4), 2, 2, 8


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def fourier_table(**places: Any) -> Array:
    parameters = noise(6, 2), noise(5, 12, seed=1), noise(5, seed=2), noise(7, 5, seed=3), noise(7, seed=4)
    return fourier.table(GRID, *parameters, PREFIX, **places)


def pape_bias(order: list[int] | None = None, **places: Any) -> Array:
    tokens, weights = noise(2, PREFIX + 12, 16), noise(2, HEADS, 3, 16, seed=1)
    tokens = tokens if order is None else tokens[:, order]
    return pape.bias(tokens, noise(HEADS, 3, 2, seed=2), *weights, GRID, PREFIX, **places)


ROWS: dict[str, Callable[..., Array]] = {
    "rope_dinov3": lambda **places: rope_dinov3.angles(GRID, HEAD_DIM, **places),
    "rope_golden": lambda **places: rope_golden.positions(GRID, **places),
    "augmentation": lambda **places: np.array(augmentation.augmented(GRID, (0.1, 0.2), (0.9, 1.1), **places)).T,
    "factorized": lambda **places: factorized.table(noise(3, 5), noise(4, 5, seed=1), GRID, **places),
    "fourier": lambda **places: fourier_table(**places)[PREFIX:],
}
"""Reference: its result with a row per patch."""

PAIRS: dict[str, Callable[..., Array]] = {
    "alibi": lambda **places: alibi.bias(GRID, HEADS, PREFIX, **places),
    "lookhere": lambda **places: lookhere.bias(GRID, 6, 1, 4, 45, PREFIX, **places),
    "cpb": lambda **places: cpb.bias(
        GRID, noise(5, 2), noise(5, seed=1), noise(HEADS, 5, seed=2), prefix=PREFIX, **places
    ),
    "irpe": lambda **places: irpe.buckets(GRID, PREFIX, **places),
}
"""Reference: its result with a row per query and a column per key."""

X, Y = np.arange(12.0) % 4, np.arange(12) // 4 + 0.0
ORDER = np.random.default_rng(0).permutation(12)
TOKENS = [*range(PREFIX), *(PREFIX + ORDER)]


@pytest.mark.parametrize("name", ROWS)
def test_rows_follow_the_places(name: str) -> None:
    np.testing.assert_array_equal(ROWS[name](x=X, y=Y), ROWS[name]())
    np.testing.assert_array_equal(ROWS[name](x=X[ORDER], y=Y[ORDER]), ROWS[name]()[ORDER])


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_follow_the_places_and_read_only_offsets(name: str) -> None:
    np.testing.assert_array_equal(PAIRS[name](x=X, y=Y), PAIRS[name]())
    np.testing.assert_array_equal(PAIRS[name](x=X[ORDER], y=Y[ORDER]), PAIRS[name]()[..., TOKENS, :][..., TOKENS])
    np.testing.assert_array_equal(PAIRS[name](x=X + 0.25, y=Y - 1.5), PAIRS[name]())


def test_pape_follows_the_places_and_reads_only_offsets() -> None:
    np.testing.assert_array_equal(pape_bias(TOKENS, x=X[ORDER], y=Y[ORDER]), pape_bias()[..., TOKENS, :][..., TOKENS])
    np.testing.assert_array_equal(pape_bias(x=X + 0.25, y=Y - 1.5), pape_bias())
    assert not pape_bias()[..., :PREFIX].any()
    assert not pape_bias()[..., :PREFIX, :].any()


@pytest.mark.parametrize(("normalize", "height", "width"), [("separate", 3, 4), ("max", 4, 4), ("min", 3, 3)])
def test_augmented_places_turn_by_dinov3s_augmented_coordinates(normalize: str, height: int, width: int) -> None:
    x, y = augmentation.augmented(GRID, (0.2, -0.3), (0.8, 1.3), 1.1, normalize)
    v = (2 * (Y + 0.5) / height - 1 + 0.2) * 0.8 * 1.1
    u = (2 * (X + 0.5) / width - 1 - 0.3) * 1.3 * 1.1
    expected = np.stack([2 * math.pi * place / period for place in (v, u) for period in (1, 10)], axis=1)
    angles = rope_dinov3.angles(GRID, HEAD_DIM, 100.0, normalize, x, y)
    np.testing.assert_allclose(angles, expected, rtol=0, atol=1e-12)


def test_fourier_is_the_papers_formula_in_matrices() -> None:
    w_r, w1, b1, w2, b2 = (
        torch.from_numpy(noise(*shape, seed=seed)) for seed, shape in enumerate([(6, 2), (5, 12), (5,), (7, 5), (7,)])
    )
    p = torch.from_numpy(np.stack([(X + 0.5) / 4, (Y + 0.5) / 3], axis=1))
    r = torch.cat([torch.cos(p @ w_r.T), torch.sin(p @ w_r.T)], dim=1) / math.sqrt(12)
    expected = F.linear(F.gelu(F.linear(r, w1, b1)), w2, b2)
    np.testing.assert_allclose(fourier_table()[PREFIX:], expected.numpy(), rtol=0, atol=1e-12)
    assert not fourier_table()[:PREFIX].any()
