"""A process that keeps freed memory asks the system for none that it has had before."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from runtime.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        held = [np.ones(600_000, np.uint8) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
print(new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_used_again() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True).stdout)
        for what in ("keep", "return")
    )
    assert kept < 100 < returned
