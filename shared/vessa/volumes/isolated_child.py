"""The child process of `vessa.volumes.isolated`: read one file after another within the stated limits."""

import contextlib
import mmap
import os
import resource
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vessa.errors import InternalError, InvalidImage, TooLarge, VessaError
from vessa.images import decode_picture
from vessa.volumes.dicom.reader import frame_count
from vessa.volumes.files import read_here
from vessa.volumes.grid import Bounds, Source
from vessa.volumes.isolated import receive, send
from vessa.volumes.packed_array import unpack_bytes

_MAX_REQUEST = 8 << 30  # bytes; the parent has bounded its uploads


class _SharedArray:
    """Arrays in memory that the parent can map."""

    def __init__(self) -> None:
        self.handle = -1

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """Make one array; a later one replaces it."""
        self.close()
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if hasattr(os, "memfd_create"):
            self.handle = os.memfd_create("vessa-voxels")
        else:
            with tempfile.TemporaryFile() as file:
                self.handle = os.dup(file.fileno())
        os.truncate(self.handle, size)
        return np.frombuffer(mmap.mmap(self.handle, size), dtype).reshape(shape, order="F")

    def close(self) -> None:
        """Give the handle back."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1


def main(channel: socket.socket) -> None:
    """Answer requests until the parent is gone."""
    send(channel, {"ready": True}, [], [])
    while True:
        try:
            request, blobs, _ = receive(channel, _MAX_REQUEST)
        except (EOFError, OSError):
            return
        shared = _SharedArray()
        try:
            _limit(request["memory"], request["seconds"])
            reply, parts = _work(request, blobs, shared)
        except VessaError as error:
            reply, parts = _failed(shared, error.code, error.message), []
        except MemoryError:
            why = "the file needs more memory than is allowed for one file"
            reply, parts = _failed(shared, TooLarge.code, why), []
        except Exception:
            why = "reading the file failed in an unexpected way"
            reply, parts = _failed(shared, InternalError.code, why), []
        send(channel, reply, parts, [shared.handle] if shared.handle >= 0 else [])
        shared.close()


def _failed(shared: _SharedArray, code: str, message: str) -> dict[str, Any]:
    shared.close()
    return {"error": [code, message]}


def _limit(memory: int, seconds: float) -> None:
    """Allow so many more bytes of memory than there are now, and so many more seconds of computing."""
    with contextlib.suppress(ValueError, OSError):  # not every system knows every limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + memory, resource.RLIM_INFINITY))
    with contextlib.suppress(ValueError, OSError):
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + seconds) + 5
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _work(
    request: dict[str, Any], blobs: list[bytes], shared: _SharedArray
) -> tuple[dict[str, Any], list[bytes]]:
    rest = iter(blobs)
    sources: list[Source] = [Path(path) if path is not None else next(rest) for path in request["paths"]]
    if request["work"] == "picture":
        assert isinstance(sources[0], bytes)
        notes: list[str] = []
        pixels = decode_picture(sources[0], request["max_pixels"], request["what"], notes)
        shared.allocate(pixels.shape, np.uint8)[...] = pixels
        return {"shape": list(pixels.shape), "dtype": "uint8", "notes": notes}, []
    if request["work"] == "packed":
        assert isinstance(sources[0], bytes)
        array = unpack_bytes(sources[0], request["most"], shared.allocate)
        return {"shape": list(array.shape), "dtype": "uint8"}, []
    if request["one_frame"] and frame_count(sources[0]) > 1:
        raise InvalidImage("the DICOM file must hold one frame, got several; send it to POST /jobs")
    volume = read_here(sources, Bounds(*request["bounds"]), shared.allocate)
    measured = None if volume.color or volume.table else list(volume.shown)
    headers = [_written(header) for header in volume.headers]
    return {
        "shape": list(volume.voxels.shape),
        "dtype": volume.voxels.dtype.name,
        "affine": volume.affine.ravel().tolist(),
        "window": volume.window,
        "inverted": volume.inverted,
        "frames": list(volume.frames),
        "padding": None if volume.padding is None else volume.padding.tolist(),
        "table": None if volume.table is None else [volume.table.first, volume.table.shown.tolist()],
        "measured": measured,
        "nifti_header": volume.nifti_header.hex(),
        "notes": list(volume.notes),
        "headers": len(headers),
    }, headers


def _written(header: Any) -> bytes:
    import io

    data = io.BytesIO()
    header.save_as(data, implicit_vr=True, little_endian=True)
    return data.getvalue()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main(socket.socket(fileno=int(sys.argv[1])))
