"""Lock a run's folder, so that one process at a time trains there."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vessa.errors import InvalidConfig

_FILE = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, made where it is missing, until the block ends.

    The kernel releases the lock when the process dies, however it dies. Raises InvalidConfig when another
    process holds it, or when the folder cannot be written.
    """
    path = run / _FILE
    try:
        descriptor = _open_locked(path)
    except BlockingIOError:
        raise InvalidConfig(
            f"{run} is in use by another run ({_holder(path)}). Wait for it to end, or choose another --out"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise InvalidConfig(f"{run} is a file; a run needs a folder. Choose another --out") from None
    except OSError as error:
        raise InvalidConfig(f"cannot write to {run}: {error.strerror}. Choose another --out") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        _remove_if_empty(run)


def _open_locked(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before deletes its file: a lock on a deleted file would exclude nobody.
            if path.is_file() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "just started"
    except OSError:
        return "just ended"


def _remove_if_empty(run: Path) -> None:
    try:
        run.rmdir()
    except OSError:  # it holds a run
        return
