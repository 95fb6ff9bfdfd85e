"""Hold disk space back, so that deleting and revoking work on a full disk."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

RESERVE_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}


class DiskReserve:
    """Keep a file of real blocks beside what it protects; give it up for a write that frees space."""

    def __init__(self, path: Path, size: int = RESERVE_BYTES) -> None:
        """Name the file. size: bytes that are held back."""
        self.path, self.size = path, size

    def fill(self) -> None:
        """Allocate the space if it is not held. Says so in the log when the disk has no room for it."""
        try:
            if self.path.exists() and self.path.stat().st_size >= self.size:
                return
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(handle, 0, self.size)
            finally:
                os.close(handle)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            log.warning("no space could be held back for deletions: %s", os.strerror(error.errno or 0))

    def spend(self, action: Callable[[], None]) -> None:
        """Run an action that frees space; on a full disk, release the reserve and run it again.

        The action must be safe to run twice.
        """
        try:
            action()
        except OSError as error:
            if error.errno not in _FULL or not self.path.exists():
                raise
            log.warning("the disk is full: the held-back space is used for a deletion")
            self.path.unlink(missing_ok=True)
            action()
        self.fill()
