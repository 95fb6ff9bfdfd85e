"""Write files atomically: a name holds its old bytes or all of the new ones, also after a power cut.

The new bytes go to a fresh name in the same folder, are flushed to the disk and renamed over the old file.
Readers need no lock. Of two writers of one name, the last rename wins. A killed writer leaves its fresh file
behind; the owner of the folder removes it with `remove_leftovers`.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".part"


@contextmanager
def replacing(path: Path, mode: int = 0o666, *, sync: bool = True) -> Iterator[Path]:
    """Yield a fresh path to write to; rename it to `path` when the block ends without an error.

    The fresh path exists and is empty, with the mode of the new file. An error inside removes it and leaves
    `path` as it was.
    mode: permission bits of the new file, less the process's umask; sync: wait for the disk, two syncs of
    about 5 ms each. Without it a power cut may leave a damaged file, a kill may not: for files that carry a
    checksum and can be made again.
    """
    # Random, not the process id: two containers that share the folder may both be process 1.
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    try:
        yield fresh
        if sync:
            _sync(fresh, os.O_RDONLY)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    if sync:
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def write_bytes(path: Path, data: bytes, mode: int = 0o666, *, sync: bool = True) -> None:
    """Write bytes to a file atomically; see `replacing` for mode and sync."""
    with replacing(path, mode, sync=sync) as fresh:
        fresh.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write text to a file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def remove_leftovers(folder: Path) -> int:
    """Remove what killed writers left in a folder and the folders below it; returns how many files.

    Call it only while nobody else writes there: it would remove the files that are being written.
    """
    leftovers = list(folder.rglob(f".*{_SUFFIX}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
