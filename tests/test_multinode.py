"""Two hosts that train together, one of which is killed: `make test-multinode`, which needs root and iproute2.

A host is a network namespace with an address of its own. A cable links the two; they share the disk and nothing else.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import assert_same_run, load, log_of

from runtime.distributed import UNSHARED_STORE

ROOT = Path(__file__).resolve().parents[1]
CABLE, PORT = "cable", 29400
EPOCHS = 18
SECONDS = 180  # until a test is given up

ENVIRONMENT = {"OMP_NUM_THREADS": "1", UNSHARED_STORE: "1"}

pytestmark = pytest.mark.multinode


def ip(*words: object) -> str:
    return subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True).stdout


class Host:
    """A network namespace, and the processes in it; it appends what they say to `log`."""

    def __init__(self, number: int, log: Path) -> None:
        self.name = f"lape-{os.getpid()}-{number}"
        self.address = f"10.255.77.{number + 1}"
        self.log = log
        self.started: list[subprocess.Popen[str]] = []
        ip("netns", "add", self.name)

    def start(self, *command: object) -> subprocess.Popen[str]:
        environment = {**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": CABLE}
        words = ["ip", "netns", "exec", self.name, *map(str, command)]
        with self.log.open("a") as file:
            process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True)
        self.started.append(process)
        return process

    def cut_off(self) -> None:
        """Nothing goes out or comes in any more, as if the power had gone: nobody is told that a connection ends."""
        ip("-n", self.name, "link", "set", CABLE, "down")

    def connect(self) -> None:
        ip("-n", self.name, "link", "set", CABLE, "up")

    def kill(self) -> None:
        """SIGKILL to all that runs here."""
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)
        for process in self.started:
            process.wait()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    made: list[Host] = []
    try:
        if problem := make_hosts(made, tmp_path):
            pytest.fail(f"two hosts need root and the ip of iproute2: {problem}", pytrace=False)
        yield made
    finally:
        for host in made:
            host.kill()
            ip("netns", "delete", host.name)


def make_hosts(made: list[Host], folder: Path) -> str:
    """Append two hosts, linked by a cable, to `made`; what is wrong, if they cannot be made."""
    try:
        for number in range(2):
            made.append(Host(number, folder / f"host{number}.log"))
        one, other = (("name", CABLE, "netns", host.name) for host in made)
        ip("link", "add", *one, "type", "veth", "peer", *other)
        for host in made:
            ip("-n", host.name, "address", "add", f"{host.address}/30", "dev", CABLE)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.connect()
    except FileNotFoundError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return error.stderr.strip()
    return ""


@pytest.fixture
def flags(tmp_path: Path) -> list[object]:
    """The options of a run, but for its folder."""
    data = tiny_run.make_images(tmp_path / "images")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    options = ["--recipe", recipe, "--epochs", EPOCHS, "--batch-size", 6, "--device", "cpu", "--join-type", "LaPE"]
    return [*options, "--mixup", 0.8, "--drop-path", 0.2, "--auto-resume", "--checkpoint-steps", 3]


def torchrun(*flags: object) -> list[object]:
    return [sys.executable, "-m", "torch.distributed.run", *flags, ROOT / "main.py"]


def start(host: Host, meeting: Host, nodes: str, *flags: object) -> subprocess.Popen[str]:
    """Let a host take its part in the run."""
    meeting_point = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meeting.address}:{PORT}", "--rdzv-id", "run")
    is_host = int(host is meeting)  # torchrun asks for the machine's name, which all namespaces share
    patience = ("--rdzv-conf", f"is_host={is_host},keep_alive_interval=1,last_call_timeout=2", "--max-restarts", 3)
    here = ("--nnodes", nodes, "--nproc-per-node", 1, "--local-addr", host.address)
    return host.start(*torchrun(*here, *meeting_point, *patience), *flags)


def wait_for_middle(folder: Path, hosts: list[Host]) -> None:
    """Until there is a checkpoint of the middle of an epoch, a third of the run being done."""

    def is_there() -> bool:
        path = folder / "checkpoint.pth"
        return path.exists() and (checkpoint := load(path))["epoch"] >= EPOCHS // 3 and step_of(checkpoint) > 0

    wait_until(is_there, hosts)


def wait_until(is_so: Callable[[], bool], hosts: list[Host]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, told(hosts)
        time.sleep(0.02)


def step_of(checkpoint: dict[str, Any]) -> int:
    return checkpoint["progress"]["counts"]["step"]


def told(hosts: list[Host]) -> str:
    return "\n".join(f"== {host.name}\n{host.log.read_text()}" for host in hosts)


@pytest.mark.parametrize("victim", [0, 1], ids=["first", "second"])
def test_a_run_whose_host_is_killed_and_comes_back_equals_one_on_a_single_machine(
    victim: int, tmp_path: Path, flags: list[object], hosts: list[Host]
) -> None:
    on_one = torchrun("--standalone", "--nproc-per-node", 2)
    command = [*map(str, on_one), *map(str, flags), "--output_dir", str(tmp_path / "one")]
    subprocess.run(command, check=True, timeout=SECONDS, env={**os.environ, **ENVIRONMENT})

    folder = tmp_path / "two"
    flags = [*flags, "--output_dir", folder]
    running = [start(host, hosts[0], "2", *flags) for host in hosts]
    wait_for_middle(folder, hosts)
    hosts[victim].kill()
    if victim == 0:  # where the hosts met
        assert running[1].wait(SECONDS) != 0, told(hosts)
    for number in range(victim, 2):
        running[number] = start(hosts[number], hosts[0], "2", *flags)
    assert [process.wait(SECONDS) for process in running] == [0, 0], told(hosts)
    (epoch,) = re.findall(r"continues from \S+, after epoch (\d+) and \d updates", hosts[0].log.read_text())
    assert EPOCHS // 3 <= int(epoch) < EPOCHS
    assert_same_run(folder, tmp_path / "one")


def test_a_host_that_loses_its_power_is_noticed_and_comes_back(
    tmp_path: Path, flags: list[object], hosts: list[Host]
) -> None:
    flags = [*flags, "--output_dir", tmp_path / "run", "--init-timeout", 15]
    staying, _ = (start(host, hosts[0], "2", *flags) for host in hosts)
    wait_for_middle(tmp_path / "run", hosts)
    hosts[1].cut_off()
    hosts[1].kill()
    wait_until(lambda: "exitcode: 1" in hosts[0].log.read_text(), hosts)  # its process gave up, after --init-timeout
    hosts[1].connect()
    coming_back = start(hosts[1], hosts[0], "2", *flags)
    assert [staying.wait(SECONDS), coming_back.wait(SECONDS)] == [0, 0], told(hosts)
    assert len(log_of(tmp_path / "run")) == EPOCHS


def test_an_elastic_run_goes_on_without_the_host_that_is_killed(
    tmp_path: Path, flags: list[object], hosts: list[Host]
) -> None:
    running = [start(host, hosts[0], "1:2", *flags, "--output_dir", tmp_path / "run") for host in hosts]
    wait_for_middle(tmp_path / "run", hosts)
    hosts[1].kill()
    assert running[0].wait(SECONDS) == 0, told(hosts)
    said = hosts[0].log.read_text()
    assert [words for words in ("2 processes on cpu", "1 process on cpu") if words not in said] == []
    assert [row["epoch"] for row in log_of(tmp_path / "run")] == list(range(1, EPOCHS + 1))
