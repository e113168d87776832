"""How a process keeps memory."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process use freed memory again, up to 1 GiB in one piece, and not return it to the system.

    Linux clears every page that a process gets, which for arrays as large as an image can take longer than to fill
    them. Without effect where the C library is not glibc.
    """
    if platform.system() != "Linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(threshold, 1 << 30)
