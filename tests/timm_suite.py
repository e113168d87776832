"""A plugin of pytest that runs timm's own tests on our models.

``pytest -p tests.timm_suite --pair learnable LaPE FOLDER``: each model of ``NAMES`` that the tests create has the pair.
Tests of other models, and of what ours do not offer, are left out.
"""

import functools
from typing import Any

import pytest
import timm

import models_lape  # noqa: F401  registers the models

NAMES = {"test_vit", "test_vit3", "test_vit4", "deit_tiny_distilled_patch16_224", "vit_compact_patch4_32"}
"""Small models with a class token, registers, neither, two heads, and of our own."""
LEFT_OUT = {
    "test_model_forward_torchscript": "torch.jit.script is refused in one line",
    "test_model_load_pretrained": "needs the network",
    "test_model_features_pretrained": "needs the network",
    "test_model_inference": "needs the network",
}
DYNAMIC = {"test_vit", "test_vit4"}
"""They take images of any size; ours then cannot be traced by torch.fx, which cannot compare sizes."""
OF_INPUTS = NAMES | {"vit_tiny_patch16_224"}
"""Those of the tests of inputs, too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pair", nargs=2, metavar=("PE", "JOIN"))


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported, which ask timm for its names."""
    pe, join_type = config.getoption("--pair")
    create_model, list_models = timm.create_model, timm.list_models

    @functools.wraps(create_model)
    def create_ours(model_name: str, *args: Any, **kwargs: Any) -> Any:
        pair = {"pe": pe, "join_type": join_type} if model_name in OF_INPUTS else {}
        return create_model(model_name, *args, **{**pair, **kwargs})

    @functools.wraps(list_models)
    def list_ours(*args: Any, **kwargs: Any) -> list[str]:
        return [name for name in list_models(*args, **kwargs) if name.partition(".")[0] in NAMES]

    timm.create_model, timm.list_models = create_ours, list_ours


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if is_of_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def is_of_ours(item: Any) -> bool:
    """Whether a test is of one of our models, by its parameter or by the helper that makes its model."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = params.get("model_name")
    if item.originalname in LEFT_OUT or ("_fx" in item.originalname and name in DYNAMIC):
        return False
    if params.get("use_naflex") or params.get("reload_naflex"):  # another class of timm's
        return False
    if isinstance(name, str):
        return name.partition(".")[0] in OF_INPUTS
    return name is None and "_vit" in item.function.__code__.co_names
