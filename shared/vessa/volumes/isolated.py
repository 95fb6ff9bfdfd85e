"""Read files in child processes with bounds on memory, time and output.

Decoders of compressed data are written in C, and headers may claim anything. What they do to a child process
(a crash, gigabytes, minutes) ends with the child, and its caller gets an error. Children stay alive between
files, at most `_CHILDREN` at once, `_SHARE` of them for one owner (`share_by`); functions here may be called
from any thread.
"""

import atexit
import contextlib
import json
import math
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from vessa.errors import InvalidImage, TooLarge, error_from
from vessa.volumes.grid import Bounds, Source, VoiTable, Volume

VOLUME_S = 120.0  # longest time for a volume
PICTURE_S = 30.0  # longest time for a picture
_CHILDREN = 3
_SHARE = 2
_USES = 200  # files after which a child is replaced
_MAX_REPLY = 64 << 20  # bytes of a reply without its voxels
_START_S = 60.0


def read_volume(
    sources: Sequence[Source], bounds: Bounds, *, one_frame: bool = False, seconds: float = VOLUME_S
) -> Volume:
    """Read the files of one volume in a child process; see `vessa.volumes.read_volume`.

    one_frame: refuse a DICOM file of several frames; seconds: longest time. Raises InvalidImage also where
    a decoder crashes, TooLarge where it takes too long or too much memory.
    """
    limits = [bounds.voxels, bounds.pixels, bounds.slices]
    memory = (1 << 30) + 12 * bounds.voxels
    request = {"work": "volume", "bounds": limits, "memory": memory, "seconds": seconds}
    request["one_frame"] = one_frame
    reply, blobs, array = _call(request, sources, seconds)
    headers = [_dataset(blobs[i]) for i in range(reply["headers"])]
    table = reply["table"]
    return Volume(
        array,
        np.asarray(reply["affine"], np.float64).reshape(4, 4),
        _pair(reply["window"]),
        bool(reply["inverted"]),
        tuple(headers),
        tuple(int(n) for n in reply["frames"]),
        padding=None if reply["padding"] is None else np.asarray(reply["padding"], np.float32),
        table=None if table is None else VoiTable(float(table[0]), np.asarray(table[1], np.uint8)),
        measured=_pair(reply["measured"]),
        nifti_header=bytes.fromhex(reply["nifti_header"]),
        notes=tuple(str(note) for note in reply["notes"]),
    )


def decode_picture(
    data: bytes, max_pixels: int, what: str, notes: list[str]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode a picture in a child process; see `vessa.images.decode_picture`."""
    memory = (1 << 30) + 32 * max_pixels
    request = {
        "work": "picture",
        "max_pixels": max_pixels,
        "what": what,
        "memory": memory,
        "seconds": PICTURE_S,
    }
    reply, _, array = _call(request, [data], PICTURE_S)
    notes += [str(note) for note in reply["notes"]]
    return np.array(array)


def unpack_bytes(data: bytes, most: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Unpack an array of the nnInteractive protocol in a child process; see `packed_array.unpack_bytes`."""
    memory = (1 << 30) + 32 * most
    request = {"work": "packed", "most": most, "memory": memory, "seconds": VOLUME_S}
    return _call(request, [data], VOLUME_S)[2]


def _pair(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def _dataset(data: bytes) -> pydicom.Dataset:
    import io

    return pydicom.dcmread(io.BytesIO(data), force=True)


def send(channel: socket.socket, message: dict[str, Any], blobs: Sequence[bytes], handles: list[int]) -> None:
    """Send a message, its blobs and file handles."""
    body = json.dumps({**message, "sizes": [len(blob) for blob in blobs]}).encode()
    socket.send_fds(channel, [struct.pack("<Q", len(body))], handles)
    channel.sendall(body)
    for blob in blobs:
        channel.sendall(blob)


def receive(channel: socket.socket, most: int) -> tuple[dict[str, Any], list[bytes], list[int]]:
    """Receive what `send` sent; EOFError when the other end is gone, ValueError over `most` bytes."""
    head, handles, _, _ = socket.recv_fds(channel, 8, 1)
    head += _exactly(channel, 8 - len(head)) if head else b""
    if len(head) < 8:
        raise EOFError
    try:
        (size,) = struct.unpack("<Q", head)
        if size > most:
            raise ValueError(f"a message of {size} bytes; at most {most} are taken")
        message = json.loads(_exactly(channel, size))
        sizes = [int(n) for n in message["sizes"]]
        if min(sizes, default=0) < 0 or sum(sizes) > most:
            raise ValueError(f"blobs of {sum(sizes)} bytes; at most {most} are taken")
        return message, [_exactly(channel, n) for n in sizes], list(handles)
    except BaseException:
        for handle in handles:
            os.close(handle)
        raise


def _exactly(channel: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = channel.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(data)


class _Child:
    """One child process and the channel to it. Used by one thread at a time."""

    def __init__(self) -> None:
        self.channel, other = socket.socketpair()
        search = os.pathsep.join(place for place in sys.path if place)
        limits = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vessa.volumes.isolated_child", str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries' words would quote the file
                env={**os.environ, **limits, "PYTHONPATH": search},
            )
        self.channel.settimeout(_START_S)
        receive(self.channel, _MAX_REPLY)  # it is ready
        self.uses = 0

    def close(self) -> None:
        """End the process."""
        self.channel.close()
        self.process.kill()
        self.process.wait()


_idle: list[_Child] = []
_lock = threading.Lock()
_places = threading.Condition()
_held: Counter[str] = Counter()
_owner: Callable[[], str] = str  # one owner, without a name


def share_by(owner: Callable[[], str]) -> None:
    """Name the owner of each call, so that slow files of one owner do not hold up those of all others.

    owner: returns the name of the calling thread's owner
    """
    global _owner
    _owner = owner


@contextlib.contextmanager
def _place() -> Iterator[None]:
    """Wait for a place among the children, of which an owner has a share."""
    owner = _owner()
    with _places:
        _places.wait_for(lambda: _held.total() < _CHILDREN and _held[owner] < _SHARE)
        _held[owner] += 1
    try:
        yield
    finally:
        with _places:
            _held[owner] -= 1
            _places.notify_all()


@contextlib.contextmanager
def _child() -> Iterator[_Child]:
    """Lend a child; one that failed is not used again."""
    with _place():
        with _lock:
            child = _idle.pop() if _idle else None
        if child is not None and child.process.poll() is not None:
            child.close()
            child = None
        child = child or _Child()
        try:
            yield child
        except BaseException:
            child.close()
            raise
        child.uses += 1
        if child.uses >= _USES:
            child.close()
            return
        with _lock:
            _idle.append(child)


def close_children() -> None:
    """End all idle children; the next call starts new ones."""
    with _lock:
        children, _idle[:] = list(_idle), []
    for child in children:
        child.close()


atexit.register(close_children)
os.register_at_fork(after_in_child=_idle.clear)


def _call(
    request: dict[str, Any], sources: Sequence[Source], seconds: float
) -> tuple[dict[str, Any], list[bytes], np.ndarray[Any, Any]]:
    """Have a child do some work; returns its reply, blobs and array, or raises its error."""
    paths = [str(one.resolve()) if isinstance(one, Path) else None for one in sources]
    blobs = [one for one in sources if isinstance(one, bytes)]
    failure: Exception
    try:
        with _child() as child:
            child.channel.settimeout(seconds)
            send(child.channel, {**request, "paths": paths}, blobs, [])
            reply, found, handles = receive(child.channel, _MAX_REPLY)
    except TimeoutError:
        failure = TooLarge(f"reading the file took longer than {seconds:g} s and was stopped")
    except (EOFError, OSError, ValueError, KeyError):
        failure = InvalidImage(
            "the file is damaged: its decoder crashed or ran out of memory. Export it again, or convert it"
        )
    else:
        if "error" in reply:
            raise error_from(str(reply["error"][0]), str(reply["error"][1]))
        return reply, found, _mapped(reply, handles[0])
    raise failure from None


def _mapped(reply: dict[str, Any], handle: int) -> np.ndarray[Any, Any]:
    """Map the array that a child wrote, copying nothing."""
    try:
        shape, dtype = tuple(int(n) for n in reply["shape"]), np.dtype(str(reply["dtype"]))
        size = math.prod(shape) * dtype.itemsize
        if dtype not in (np.float32, np.uint8) or os.fstat(handle).st_size < size:
            raise InvalidImage("the file is damaged: its decoder gave back another size than it stated")
        memory = mmap.mmap(handle, size, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape, order="F")
