"""Write files atomically and turn disk errors into StoreUnavailable."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from vessa.errors import StoreUnavailable

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0


@contextlib.contextmanager
def disk(action: str) -> Iterator[None]:
    """Turn an OSError into StoreUnavailable that says why, but not where."""
    try:
        yield
    except OSError as error:
        log.exception("the template store could not be %s", action)
        reason = os.strerror(error.errno) if error.errno else "input/output error"
        raise StoreUnavailable(
            f"the template store could not be {action}: {reason}", retry_after=RETRY_AFTER_S
        ) from error


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that its name holds the old bytes or all of the new ones, also after a power cut.

    mode: of the file, less the process's umask.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
