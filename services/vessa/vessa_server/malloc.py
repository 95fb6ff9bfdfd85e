"""Tune the C library's allocator: freed memory stays with the process."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h
_KEPT = 256 << 20  # bytes


def keep_freed_memory() -> None:
    """Let freed memory be reused instead of returned to the kernel; does nothing without glibc.

    torch frees and allocates the same few megabytes in every layer; the kernel would clear the pages each
    time. The process then holds up to 256 MiB more than it uses. Call this before other threads start: they
    then share one arena. An arena of a thread's own returns its memory in spite of these options.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_TOP_PAD, _KEPT // 8)
        mallopt(_ARENA_MAX, 1)
