"""Turn disk errors into StoreUnavailable and check permissions of files."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from vessa.errors import StoreUnavailable

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0


@contextlib.contextmanager
def disk(action: str) -> Iterator[None]:
    """Turn an OSError into StoreUnavailable that names the reason, but no path.

    action: what could not be done to the store, such as "read"
    """
    try:
        yield
    except OSError as error:
        log.exception("the store could not be %s", action)
        reason = os.strerror(error.errno) if error.errno else "input/output error"
        raise StoreUnavailable(
            f"The store could not be {action}: {reason}. Retry later; the log names the file.",
            retry_after=RETRY_AFTER_S,
        ) from error


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents with mode 0700; `mkdir(parents=True)` leaves parents open."""
    if folder.is_dir():
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def close_to_others(path: Path) -> None:
    """Remove the permissions of group and others from a file or folder, with a warning in the log."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        path.chmod(mode & 0o700)
        log.warning("%s was open to other users (mode %03o); its mode is %03o now", path, mode, mode & 0o700)


def warn_if_writable(path: Path) -> None:
    """Warn in the log when group or others can write a file that decides who has access."""
    if path.stat().st_mode & 0o022:
        log.warning("other users can write %s: they can give themselves access. Run chmod 600 on it", path)
