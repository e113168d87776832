"""What the README shows works as it stands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import compare
import similarity_visualize
from comparison.plan import make_plan
from lape_vit import encodings
from lape_vit.encodings import ENCODINGS, all_options
from lape_vit.similarity import position_views
from tests.models import images, tiny
from training.options import build_parser

README = (Path(__file__).parents[1] / "README.md").read_text()
PLUGIN, ENCODING, REGISTRY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in SHELL.splitlines() if ".py" in line]


def test_the_plugin_runs() -> None:
    namespace: dict[str, Any] = {}
    exec(PLUGIN, namespace)
    assert namespace["logits"].shape == (1, 1000)
    assert (namespace["model"].pe, namespace["model"].join_type) == ("learnable", "LaPE")


def test_the_added_encoding_works_alone_and_in_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    exec(ENCODING, namespace)
    (added,) = (value for name, value in namespace.items() if f"class {name}(" in ENCODING)
    last, line = REGISTRY.splitlines()[1:]
    assert f"{last}\n    )" in Path(encodings.__file__).read_text()  # the line above the new one is the registry's last
    assert line.strip() == f"{added.__name__},"
    monkeypatch.setitem(ENCODINGS, added.name, added)
    pixels = images(1)
    without = tiny("learnable", "LaPE")(pixels)
    (option,) = added.options()
    logits = [tiny(f"learnable+{added.name}", "LaPE", **{option: value})(pixels) for value in (0.0, 1.0)]
    assert torch.allclose(logits[0], without)
    assert not torch.allclose(logits[1], without)


def test_the_added_encoding_gets_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    exec(ENCODING, namespace)
    (added,) = (value for name, value in namespace.items() if f"class {name}(" in ENCODING)
    monkeypatch.setitem(ENCODINGS, added.name, added)
    views = {view.name: view for view in position_views(tiny(f"learnable+{added.name}", "LaPE", img_size=(24, 40)))}
    assert list(views) == ["similarity", "bias", "bias_offsets"]
    assert views["bias_offsets"].values[0][0, 2, 4] == 0  # its logits fall with the distance
    assert views["bias_offsets"].values[0][0, 2 - 2, 4 + 3] == pytest.approx(-0.1 * 13**0.5)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    program, arguments = re.fullmatch(r"(?:python|torchrun \S+) (\w+\.py) (.*)", command).groups()  # type: ignore[union-attr]
    if program == "main.py":
        assert build_parser(all_options()).read(shlex.split(arguments))
    elif program == "compare.py":
        assert make_plan(*compare.read_options(shlex.split(arguments))).runs
    else:
        assert program == "similarity_visualize.py"
        assert similarity_visualize.build_parser().parse_args(shlex.split(arguments))
