"""The C library's memory allocator, told to keep what it gets."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h
_KEPT = 256 << 20  # bytes


def keep_freed_memory() -> None:
    """Let freed memory be used again instead of going back to the kernel; nothing where it is not glibc.

    torch frees and asks for the same few megabytes in every layer; each time the kernel would clear the pages
    anew. This process then holds up to 256 MiB more than it uses. Called before there are other threads, they
    share one arena too: a thread's own gives its memory back whatever was said.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_TOP_PAD, _KEPT // 8)
        mallopt(_ARENA_MAX, 1)
