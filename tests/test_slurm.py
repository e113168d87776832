"""The batch file for SLURM, run by stand-ins for SLURM's commands, and SLURM without torchrun."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_run
from tiny_run import log_of

ROOT = Path(__file__).resolve().parents[1]
BATCH_FILE = ROOT / "slurm" / "train.sbatch"
(TASK,) = re.findall(r"^srun bash -c '(.*)'", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
EPOCHS = 25
SECONDS = 300  # until a run is given up

# Two tasks on one machine, to which the signal is passed on; the exit code is the largest of theirs.
SRUN = """#!/bin/bash
for task in 0 1; do
    SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while wait "$task"; status=$?; kill -0 "$task" 2> /dev/null; do :; done
    ((status > code)) && code=$status
done
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost; echo localhost ;;
    requeue) echo "requeued $2" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit jobs from; SLURM's commands and variables are set."""
    commands = tmp_path / "commands"
    commands.mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    torchrun = python.replace('"$@"', '-m torch.distributed.run "$@"')
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python, "torchrun": torchrun}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    job = {"JOB_ID": os.getpid(), "JOB_NAME": "digits", "JOB_NODELIST": "node[0-1]", "JOB_NUM_NODES": 2}
    for name, value in {**job, "GPUS_ON_NODE": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    return tmp_path


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    data = tiny_run.make_images(tmp_path / "images")
    (tmp_path / "tiny.yaml").write_text(tiny_run.RECIPE + f"data-path: {data}\n")
    return ["--recipe", str(tmp_path / "tiny.yaml"), "--batch-size", "6", "--device", "cpu", "--epochs", str(EPOCHS)]


@pytest.fixture
def submit(cluster: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    jobs: list[subprocess.Popen[str]] = []

    def start(*command: object) -> subprocess.Popen[str]:
        words = [str(word) for word in command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        jobs.append(subprocess.Popen(words, cwd=cluster, **pipes, text=True, start_new_session=True))  # type: ignore[call-overload]
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)  # which torchrun passes on
            job.communicate()


def wait_for_epoch(folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not (folder / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_job_whose_time_is_up_saves_and_queues_again_and_then_goes_on(
    cluster: Path, submit: Callable[..., subprocess.Popen[str]], flags: list[str]
) -> None:
    folder = cluster / "runs" / "digits"
    job = submit("bash", BATCH_FILE, *flags)
    wait_for_epoch(folder)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 1, out
    assert re.search(r"main.py: interrupted by SIGUSR1 in epoch \d+, after update \d of 4; last checkpoint: runs/", out)
    assert f"requeued {os.getpid()}" in out.splitlines()
    epochs = len(log_of(folder))
    assert 1 <= epochs < EPOCHS

    job = submit("bash", BATCH_FILE, *flags)
    out, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, out
    assert f"continues from runs/digits/checkpoint.pth, after epoch {epochs} and" in out
    assert "requeued" not in out
    assert "2 processes on cpu" in out
    assert len(log_of(folder)) == EPOCHS


def test_without_torchrun_the_code_of_the_run_is_that_of_the_job(
    cluster: Path, submit: Callable[..., subprocess.Popen[str]], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    folder = cluster / "runs" / "digits"
    command = ("srun", "bash", "-c", TASK, "main.py", *flags, "--output_dir", folder, "--auto-resume")
    job = submit(*command)
    wait_for_epoch(folder)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 138, out
    assert "2 processes on cpu" in out
