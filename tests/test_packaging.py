"""What pip installs, and that the files which install things agree with one another."""

import shutil
import subprocess
import sys
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

import lape_vit

ROOT = Path(__file__).resolve().parents[1]


def requirements(name: str) -> dict[str, Requirement]:
    """Lower-case name: requirement, of one of the requirements files; the files that it includes left out."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    return {requirement.name.lower(): requirement for requirement in parsed}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds of the checkout: of a copy, since building writes beside the sources."""
    checkout, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    for folder in {path.parent for path in ROOT.glob("[!.]*/*.py")}:
        shutil.copytree(folder, checkout / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", target, checkout], check=True, cwd=checkout
    )
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_library_and_the_plugin_only(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lape_vit").rglob("*.py")}
    assert held == library | {"models_lape.py"}


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "import lape_vit, models_lape, timm\n"
        "timm.create_model('vit_compact_patch4_32', pe='learnable', join_type='LaPE')\n"
        "print(lape_vit.__file__, models_lape.__file__, sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(line.startswith(str(wheel)) for line in run.stdout.splitlines())


def test_the_wheel_states_version_python_and_needs(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("lape-vit", lape_vit.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    needs = list(map(Requirement, metadata.get_all("Requires-Dist", [])))
    always = {need.name: need for need in needs if need.marker is None}
    assert always == {name: requirements("requirements.txt")[name] for name in ("torch", "timm", "safetensors")}


def test_an_extra_asks_for_what_the_checkout_does(metadata: Message) -> None:
    known = {**requirements("requirements.txt"), **requirements("requirements-dev.txt")}
    needs = [need for need in map(Requirement, metadata.get_all("Requires-Dist", [])) if need.marker is not None]
    assert needs
    assert [need.name for need in needs if need.specifier != known[need.name].specifier] == []


def test_pre_commit_and_make_run_the_same_ruff() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"] if hook["entry"].startswith("ruff ")]
    assert len(hooks) == 2
    assert {*hooks[0]["additional_dependencies"], *hooks[1]["additional_dependencies"]} == {
        str(requirements("requirements-dev.txt")["ruff"])
    }


@pytest.mark.parametrize("name", ["README.md", "Makefile", "Dockerfile"])
def test_every_installation_is_the_same_line(name: str) -> None:
    assert "pip install -r requirements.txt" in (ROOT / name).read_text(encoding="utf-8")
