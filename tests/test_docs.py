"""The commands of the README and of `docs/` are understood, and their arithmetic is right."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_recipes import PARSER, resolve
from torch.distributed.run import get_args_parser

import compare
import diagnose
import predict
import similarity_visualize
from benchmarks import options
from comparison.plan import make_plan
from training.optimisation import images_per_update, learning_rate
from training.options import Options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = r"(main\.py|train\.sbatch|compare\.py|diagnose\.py|predict\.py|similarity_visualize\.py|benchmarks\.\w+)"


def commands(page: Path) -> list[str]:
    """The lines of shell that train or measure, continued lines joined, with their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(PROGRAM, line)]


def test_the_map_shows_every_folder_and_every_file_of_the_root() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = {path.partition("/")[0] + "/" * ("/" in path) for path in listed} or {path.name for path in ROOT.iterdir()}
    text = (ROOT / "docs" / "architecture.md").read_text()
    shown = {name for name in names if not name.startswith(".") or name == ".pre-commit-config.yaml"}
    assert [name for name in sorted(shown) if f"`{name}`" not in text] == []


def test_every_module_that_the_map_names_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    assert [path for path in paths if not any(ROOT.glob(f"**/{path}"))] == []


ALL = [command for page in PAGES for command in commands(page)]
TOLD = [command for command in ALL if "images per update" in command]


over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@over_pages
def test_the_links_of_every_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(((?!https)[^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_shows_every_page_and_the_readme_too() -> None:
    index, readme = (ROOT / "docs" / "index.md").read_text(), (ROOT / "README.md").read_text()
    names = {page.name for page in PAGES} - {"README.md", "index.md"}
    assert [name for name in sorted(names) if f"({name})" not in index or f"(docs/{name})" not in readme] == []


@over_pages
def test_every_page_fits_120_columns_but_for_tables_and_links(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert [
        line for line in lines if len(line) > 120 and not line.startswith(("|", "![")) and " " in line.strip()
    ] == []


def test_the_readme_fits_150_lines_of_120_columns() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_understood(command: str) -> None:
    program, arguments = re.fullmatch(f".*{PROGRAM}(.*)", command).groups()  # type: ignore[union-attr]
    given = shlex.split(arguments, comments=True)
    if program.startswith("benchmarks."):
        assert getattr(options, f"{program.removeprefix('benchmarks.')}_parser")().parse_args(given)
    elif program == "compare.py":
        assert make_plan(*compare.read_options(given)).runs
    elif program == "diagnose.py":
        assert diagnose.read_options(given)
    elif program == "similarity_visualize.py":
        assert similarity_visualize.read_options(given)
    elif program == "predict.py":
        assert predict.build_parser().parse_args(given[: given.index(">")] if ">" in given else given)
    else:
        assert PARSER.read(given)


@pytest.mark.parametrize("command", TOLD)
def test_the_images_per_update_and_the_learning_rate_are_those_of_the_command(command: str) -> None:
    command, told = command.split("#")
    options = Options.of(resolve(command))
    images, rate = re.fullmatch(r" (\d+) images per update, learning rate (\S+)", told).groups()  # type: ignore[union-attr]
    per_update = images_per_update(options.data, options.optimisation, number_of_processes(command))
    assert per_update == int(images)
    assert f"{learning_rate(options.optimisation, per_update):g}" == rate


def number_of_processes(command: str) -> int:
    program, *arguments = shlex.split(command)
    if program != "torchrun":
        return 1
    launch = get_args_parser().parse_args(arguments)
    assert launch.training_script == "main.py"
    return int(launch.nnodes.split(":")[-1]) * int(launch.nproc_per_node)
