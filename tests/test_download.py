"""Checkpoints from the web: whole and checked, or one line and nothing."""

import hashlib
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_run
import torch
from tiny_run import call, differences, load

from runtime.download import fetch
from training.checkpoint import load_checkpoint


class Web(NamedTuple):
    """A server, the folder that it serves, and the paths that it was asked for."""

    address: str
    folder: Path
    asked: list[str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads go."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-made certificate for 127.0.0.1, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", path, "-out", path], check=True, capture_output=True)
    return path


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificate: Path, hub: Path) -> Iterator[Web]:
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(0.5 * ("slow" in self.path))
            super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        yield Web(f"https://127.0.0.1:{server.server_port}", folder, asked)
        server.shutdown()


def publish(web: Web, content: bytes, name: str = "weights.pth", hashed: bool = False) -> tuple[str, str]:
    """The URL and the hash of a file that is served from now on, with its hash in its name if it is to be `hashed`."""
    digest = hashlib.sha256(content).hexdigest()
    if hashed:
        name = name.replace(".", f"-{digest[:8]}.")
    (web.folder / name).write_bytes(content)
    return f"{web.address}/{name}", digest


def files(folder: Path) -> set[str]:
    """All but the locks."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch, with its recipe."""
    folder = tmp_path_factory.mktemp("downloads")
    data = tiny_run.make_images(folder / "images", num_train=8, num_val=3)
    (folder / "tiny.yaml").write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    assert call("--recipe", folder / "tiny.yaml", "--epochs", 1, "--output_dir", folder / "run") == 0
    return folder


# ---- what is right


def test_a_file_with_its_hash_in_its_name_is_downloaded_once(web: Web, hub: Path) -> None:
    url, _ = publish(web, b"content", hashed=True)
    assert fetch(url).read_bytes() == fetch(url).read_bytes() == b"content"
    assert len(web.asked) == 1
    assert files(hub) == {Path(url).name}


@pytest.mark.parametrize("digits", [8, 64])
def test_a_hash_behind_the_url_is_enough_in_either_case(web: Web, hub: Path, digits: int) -> None:
    url, digest = publish(web, b"content")
    assert fetch(f"{url}#sha256={digest[:digits].upper()}").read_bytes() == b"content"
    assert web.asked == ["/weights.pth"]


def test_a_hash_behind_the_url_goes_before_digits_in_the_name(web: Web, hub: Path) -> None:
    url, digest = publish(web, b"content", "weights-20240131.pth")
    assert fetch(f"{url}#sha256={digest}").read_bytes() == b"content"


def test_files_of_one_name_do_not_take_each_others_place(web: Web, hub: Path) -> None:
    copies = []
    for content in (b"one", b"other"):
        url, digest = publish(web, content)
        copies.append(fetch(f"{url}#sha256={digest}"))
    assert [copy.read_bytes() for copy in copies] == [b"one", b"other"]


def test_a_copy_that_was_damaged_is_downloaded_anew(web: Web, hub: Path) -> None:
    url, _ = publish(web, b"content", hashed=True)
    fetch(url).write_bytes(b"conten")
    assert fetch(url).read_bytes() == b"content"
    assert len(web.asked) == 2


def test_of_several_at_once_one_downloads(web: Web, hub: Path) -> None:
    content = bytes(3_000_000)
    url, _ = publish(web, content, "slow.pth", hashed=True)
    with ThreadPoolExecutor(3) as threads:  # the lock is one of open files, so between threads as between processes
        copies = list(threads.map(fetch, [url] * 3))
    assert {copy.read_bytes() == content for copy in copies} == {True}
    assert len(web.asked) == 1


# ---- what is refused


def refuse_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address can be reached."""
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *args, **kwargs: pytest.fail("asked the network"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1/weights-0123abcd.pth", "give an https: URL"),
        ("file:///weights-0123abcd.pth", "give an https: URL"),
        ("s3://bucket/weights-0123abcd.pth", "give an https: URL"),
        ("https://127.0.0.1/weights.pth", "append #sha256=HASH"),
        ("https://127.0.0.1/weights-0123abc.pth", "append #sha256=HASH"),
        ("https://127.0.0.1/weights.pth#0123abcd", "append #sha256=HASH"),
        ("https://127.0.0.1/weights-0123abcd.pth#sha256=0123", "append #sha256=HASH"),
        ("https://127.0.0.1/weights-0123abcd.pth#md5=0123abcd", "append #sha256=HASH"),
        ("https://127.0.0.1/#sha256=0123abcd", "append #sha256=HASH"),
    ],
)
def test_what_is_not_https_or_has_no_hash_is_refused_before_anything_is_asked(
    url: str, words: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_all(monkeypatch)
    with pytest.raises(ValueError, match=words) as error:
        load_checkpoint(url)
    assert url in str(error.value)
    assert not hub.exists()


def test_a_wrong_hash_is_refused_and_leaves_nothing(web: Web, hub: Path) -> None:
    url, digest = publish(web, b"content", "weights-20240131.pth")
    with pytest.raises(ValueError, match="is refused: it is damaged, or not the file that was meant") as error:
        fetch(url)
    for word in (url, "20240131", digest, "#sha256=HASH"):
        assert word in str(error.value)
    assert files(hub) == set()


@pytest.mark.parametrize("kind", ["absent", "no network", "unknown certificate"])
def test_what_cannot_be_downloaded_is_told_and_leaves_nothing(
    kind: str, web: Web, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = publish(web, b"content", hashed=True)
    words = {"absent": "404", "no network": "refused", "unknown certificate": "CERTIFICATE_VERIFY_FAILED"}
    if kind == "absent":
        url = url.replace("weights", "others")
    elif kind == "no network":
        url = f"https://127.0.0.1:9/{Path(url).name}"
    else:
        monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(OSError, match=words[kind]) as error:
        fetch(url)
    assert f"{url} cannot be downloaded" in str(error.value)
    assert files(hub) == set()


# ---- in a run


@pytest.mark.parametrize("flag", ["--resume", "--finetune", "--teacher-path"])
def test_every_flag_of_a_checkpoint_takes_a_url_and_refuses_a_wrong_hash(
    flag: str, web: Web, hub: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = publish(web, (trained / "run" / "best_checkpoint.pth").read_bytes(), "best.pth", hashed=True)
    others = {
        "--resume": ("--eval",),
        "--finetune": ("--epochs", 1),
        "--teacher-path": (
            *("--model", "deit_tiny_distilled_patch16_224", "--distillation-type", "hard", "--epochs", 1),
            *("--teacher-model", "vit_compact_patch4_32", "--batch-size", 8),
        ),
    }
    command = ("--recipe", trained / "tiny.yaml", *others[flag], "--output_dir", tmp_path / "run")
    (web.folder / "best-0123abcd.pth").write_bytes(b"")
    assert call(*command, flag, f"{web.address}/best-0123abcd.pth") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "main.py: error: " in line
    assert f"{web.address}/best-0123abcd.pth is refused" in line
    assert not (tmp_path / "run").exists()
    assert call(*command, flag, url) == 0


def test_training_from_a_url_goes_on_in_a_folder_that_has_to_be_named(
    web: Web, hub: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = publish(web, (trained / "run" / "checkpoint.pth").read_bytes(), hashed=True)
    assert call("--resume", url, "--epochs", 2) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--resume {url} needs --output_dir DIR" in line
    assert web.asked == []
    assert call("--resume", url, "--epochs", 2, "--output_dir", tmp_path / "there") == 0
    shutil.copytree(trained / "run", tmp_path / "here")
    assert call("--resume", tmp_path / "here" / "checkpoint.pth", "--epochs", 2) == 0
    assert differences(load(tmp_path / "there" / "checkpoint.pth"), load(tmp_path / "here" / "checkpoint.pth")) == []
    assert call("--resume", url, "--output_dir", tmp_path / "there") == 2
    assert "holds a run already" in capsys.readouterr().err


def test_code_in_a_file_of_the_right_hash_is_not_run(web: Web, hub: Path, tmp_path: Path) -> None:
    torch.save({"model": Evil(tmp_path / "touched")}, tmp_path / "evil.pth")
    url, _ = publish(web, (tmp_path / "evil.pth").read_bytes(), hashed=True)
    with pytest.raises(ValueError, match="more than plain data"):
        load_checkpoint(url)
    assert not (tmp_path / "touched").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)
