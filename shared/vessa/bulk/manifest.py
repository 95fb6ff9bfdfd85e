"""The manifest of a bulk annotation: one JSON line per file, by which a killed job resumes.

A kill can cut off the last line; it is removed when the manifest is opened again. In memory a finished file
takes 16 bytes, however long its path is, so that millions of files fit.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vessa import atomic_write
from vessa.errors import InvalidConfig, InvalidRequest

_DIGEST = np.dtype("S16")


def _digest(file: str) -> bytes:
    # numpy drops zero bytes at the end of a string, so digests must not contain any.
    return hashlib.blake2b(os.fsencode(file), digest_size=16).digest().replace(b"\0", b"\1")


class Manifest:
    """The lines of one output folder. One process at a time may open it; use it from one thread.

    Only its owner may read the file (mode 0600), because it names patients' files and folders.
    settings: options that all lines share (bank, classes, ...); stored in the first line and compared when
    the manifest is opened again
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        valid: Callable[[dict[str, Any]], bool] = lambda record: True,
    ) -> None:
        """Open or create the manifest, and remove the lines that are not valid any more.

        valid: called with each line of a file; its file is annotated again when it returns False
        Raises InvalidConfig when another process has it open or when its settings differ.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _open(path.parent / f".{path.name}.lock")
        self._file: BinaryIO | None = None
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidConfig(
                    f"another process writes to {path.parent}: wait for it, or choose another --out"
                ) from error
            if path.exists():
                _drop(path, dict(settings), valid)
            self._file = _open(path)
            self._done = self._read(path, dict(settings))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._done)

    def close(self) -> None:
        """Write buffered lines and release the lock."""
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def missing(self, files: Sequence[str]) -> list[str]:
        """Return the files that had no line when the manifest was opened."""
        if not len(self._done):
            return list(files)
        asked = np.array([_digest(file) for file in files], _DIGEST)
        places = np.searchsorted(self._done, asked).clip(max=len(self._done) - 1)
        return [file for file, found in zip(files, self._done[places] == asked, strict=True) if not found]

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write one line per file; they survive a kill of this process."""
        assert self._file is not None
        self._file.write(b"".join(_line(record) for record in records))
        self._file.flush()

    def _read(self, path: Path, settings: dict[str, Any]) -> "np.ndarray[Any, np.dtype[np.bytes_]]":
        assert self._file is not None
        digests, end = bytearray(), 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break  # cut off by a kill
            record = _record(path, number, line)
            if number:
                digests += _digest(record["file"])
            else:
                _check_settings(path, record, settings)
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self.add([{"settings": settings}])
        return np.sort(np.frombuffer(bytes(digests), _DIGEST))


def _check_settings(path: Path, record: Mapping[str, Any], settings: dict[str, Any]) -> None:
    if record != {"settings": settings}:
        raise InvalidConfig(
            f"{path} has other settings: {record.get('settings')} there, {settings} here; "
            "use the same options to resume, or choose another --out"
        )


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        record: dict[str, Any] = json.loads(line)
        if isinstance(record, dict) and isinstance(
            record.get("file" if number else "settings"), str if number else dict
        ):
            return record
    raise InvalidRequest(f"line {number + 1} of {path} is not a manifest line: choose another --out")


def _open(path: Path) -> BinaryIO:
    """Open a file for reading and writing that only its owner may read; create it when it is missing."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(handle, 0o600)  # an older version may have written it for others to read
    return os.fdopen(handle, "r+b")


def _drop(path: Path, settings: dict[str, Any], valid: Callable[[dict[str, Any]], bool]) -> None:
    """Write the manifest again without the lines that are not valid; leave it alone when all are."""
    with path.open("rb") as old:
        dropped = set()
        for number, line in enumerate(old):
            if not line.endswith(b"\n"):
                break  # cut off by a kill
            record = _record(path, number, line)
            if number == 0:
                _check_settings(path, record, settings)
            elif not valid(record):
                dropped.add(number)
        if not dropped:
            return
        old.seek(0)
        with atomic_write.replacing(path, 0o600) as fresh, fresh.open("wb") as new:
            new.writelines(line for number, line in enumerate(old) if number not in dropped)
