"""The first second of a command: `--help` and what is wrong with a command line need no torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lape_vit import encodings
from lape_vit.joins import JOINS
from training import catalogue

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("torch", "timm", "torchvision", "matplotlib", "sklearn")
FILES = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(FILES)
    if '__name__ == "__main__"' in path.read_text()
]
PAIRS = ("--pe", "learnable", "--output-dir", "nowhere")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs a command of the project where libraries that take seconds cannot be imported."""
    for name in SLOW:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is imported')")

    def run_without(command: str, *argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        words = [sys.executable, "-m", command, *argv]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run_without


def test_the_command_line_offers_what_the_registries_hold() -> None:
    assert list(catalogue.encoding_options().items()) == list(encodings.all_options().items())
    assert catalogue.encodings_by_family() == encodings.by_family()
    assert catalogue.join_names() == list(JOINS)


@pytest.fixture
def encoding_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a tree of encodings in which one file says what it is given."""

    def write(text: str) -> None:
        base = "class Encoding: pass\nclass Attention(Encoding):\n    def __init__(self, spec, *, sharp=2): pass\n"
        (tmp_path / "base.py").write_text(base)
        (tmp_path / "__init__.py").write_text('FILES = ("own",)\nFAMILIES: dict = {"attention": Attention}\n')
        (tmp_path / "own.py").write_text(text)
        monkeypatch.setattr(catalogue, "ENCODINGS", tmp_path)
        catalogue.all_classes.cache_clear()

    yield write
    catalogue.all_classes.cache_clear()


def test_options_may_be_inherited_or_defined_anew(encoding_file: Callable[[str], None]) -> None:
    encoding_file(
        "from base import Attention\n"
        "class Half(Attention):\n    '''of no name of its own'''\n"
        "class One(Half):\n    name = 'one'\n"
        "class Two(One):\n    name: str = 'two'\n    def __init__(self, spec, *, wide=-0.5, kind: str = 'a'): pass\n"
        "class Other:\n    name = 'no encoding'\n"
    )
    assert catalogue.encoding_options() == {"sharp": (int, ["one"]), "wide": (float, ["two"]), "kind": (str, ["two"])}
    assert catalogue.encodings_by_family() == "attention (one, two)"


@pytest.mark.parametrize("argument", ["wide", "wide=WIDTH"])
def test_an_option_without_a_literal_default_is_refused(encoding_file: Callable[[str], None], argument: str) -> None:
    encoding_file(f"class One(Attention):\n    name = 'one'\n    def __init__(self, spec, *, {argument}): pass\n")
    with pytest.raises(TypeError, match="option 'wide' of One needs a default: a literal"):
        catalogue.encoding_options()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(run: Callable[..., "subprocess.CompletedProcess[str]"], command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        *(
            (command, ("--wrong-flag",), "--wrong-flag")
            for command in COMMANDS
            if command not in ("compare", "predict")
        ),
        ("main", ("--epochs", "x"), "main.py: error: argument --epochs: expected a whole number"),
        ("main", ("--epochs",), "main.py: error: argument --epochs: expected one argument"),
        ("main", ("--cpb-hidden", "x"), "main.py: error: argument --cpb-hidden: expected a whole number"),
        ("main", ("--eval",), "main.py: error: --eval needs --resume FILE"),
        ("main", ("--recipe", "nothing"), "main.py: error: no recipe "),
        ("predict", ("nothing.pth", "image.png"), "predict.py: error: no checkpoint file nothing.pth"),
        ("predict", ("--wrong-flag",), "predict.py: error: the following arguments are required: CHECKPOINT"),
        ("compare", ("--pe", "rope"), "compare.py: error: the following arguments are required: --output-dir"),
        ("compare", (*PAIRS, "--wrong-flag"), "compare.py: error: unknown option --wrong-flag"),
        ("compare", (*PAIRS, "--epochs", "x"), "compare.py: error: argument --epochs: expected a whole number"),
        ("compare", (*PAIRS, "--seed", "1"), "compare.py: error: --seed is for a single run"),
        ("similarity_visualize", ("--token", "x"), "similarity_visualize.py: error: argument --token: expected two"),
        ("similarity_visualize", ("--compare", "a"), "similarity_visualize.py: error: --compare takes two"),
    ],
)
def test_a_wrong_command_line_is_refused_without_torch(
    run: Callable[..., "subprocess.CompletedProcess[str]"], command: str, argv: tuple[str, ...], message: str
) -> None:
    done = run(command, *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]
    assert "import" not in done.stderr


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("main", ()),
        ("compare", PAIRS),
        ("similarity_visualize", ()),
        ("predict", ("README.md", "README.md")),
        ("benchmarks.models", ()),
    ],
)
def test_a_command_says_what_it_loads_before_it_does(
    run: Callable[..., "subprocess.CompletedProcess[str]"], command: str, argv: tuple[str, ...]
) -> None:
    done = run(command, *argv)
    assert done.stderr.splitlines()[0].startswith("loading torch")
    assert "is imported" in done.stderr


def test_the_first_of_several_processes_answers_for_all(run: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    first, second = (run("main", "--epochs", "x", RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank) for rank in "01")
    assert first.stderr.startswith("main.py: error: ")
    assert "loading" not in second.stderr
    assert "is imported" in second.stderr
