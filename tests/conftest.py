"""What every test shares."""

import logging
import signal
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Take Ctrl-C, which some tests send, also where the shell has started this process in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` where there is none, and what must be asked for unless it is."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("multinode") and "multinode" not in item.config.getoption("markexpr"):
        pytest.skip("needs root: make test-multinode")
    if item.get_closest_marker("ecosystem") and "ecosystem" not in item.config.getoption("markexpr"):
        pytest.skip("needs more libraries: make test-ecosystem")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a command line, called in a test, has set up for itself."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that it ends as it was
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    torch.use_deterministic_algorithms(False)
