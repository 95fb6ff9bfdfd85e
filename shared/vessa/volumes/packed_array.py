"""Read and write the packed arrays of the nnInteractive protocol.

A packed array has a header (magic, version, codec, dtype, shape) and chunks that Blosc2 compressed. The
header is checked before anything is allocated. Only `vessa.volumes.isolated_child` unpacks arrays of others.
"""

import importlib.util
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from vessa.errors import InvalidConfig, MalformedBody, TooLarge
from vessa.intensities import robust_range, scale_to_bytes

_MAGIC, _VERSION = b"NNIA", 1
_ZSTD = 1
_CODECS = (_ZSTD, 2)  # 2 is LZ4; a chunk names its own codec, so the header's is only checked
_CHUNK = 1 << 30  # bytes of a chunk at most
_DTYPES = {"bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"}

Array = np.ndarray[Any, Any]


def pack(array: Array) -> bytes:
    """Return an array packed with Zstandard."""
    blosc2 = _library()
    array = np.ascontiguousarray(array)
    name = array.dtype.name.encode()
    head = struct.pack(f"<4sBBBB{len(name)}s", _MAGIC, _VERSION, _ZSTD, array.ndim, len(name), name)
    raw = array.data.cast("B")
    chunks = [raw[start : start + _CHUNK] for start in range(0, raw.nbytes, _CHUNK)]
    parts = [head, struct.pack(f"<{array.ndim}qI", *array.shape, len(chunks))]
    for chunk in chunks:
        # The size of an element must be named: Blosc2 cannot read its own frame of zeros of another size.
        packed = blosc2.compress2(
            chunk, typesize=array.itemsize, codec=blosc2.Codec.ZSTD, clevel=3, filters=[], nthreads=1
        )
        parts += [struct.pack("<QQ", chunk.nbytes, len(packed)), packed]
    return b"".join(parts)


def packed_shape(data: bytes) -> tuple[int, ...]:
    """Return the shape that a packed array declares. Raises MalformedBody."""
    return _header(data)[1]


def unpack_bytes(data: bytes, most: int, allocate: Callable[[tuple[int, ...], Any], Array]) -> Array:
    """Return a packed array as uint8 of its shape. Raises MalformedBody, TooLarge, InvalidImage.

    most: elements at most. A mask (three axes) becomes 0 and 1. An image has the shape (C, X, Y, Z): uint8
    stays as it is, other numbers are scaled so that their `robust_range` becomes 0 to 255.
    """
    blosc2 = _library()
    dtype, shape, offset = _header(data)
    count = math.prod(shape)
    if count > most:
        raise TooLarge(f"The array has {count} elements, the limit is {most}. Crop or downsample the volume.")
    values, view = np.empty(count, dtype), memoryview(data)
    raw, written = values.view(np.uint8), 0
    try:
        (chunks,) = struct.unpack_from("<I", data, offset)
        offset += 4
        for _ in range(chunks):
            size, packed = struct.unpack_from("<QQ", data, offset)
            chunk = view[offset + 16 : offset + 16 + packed]
            # The destination of a chunk must fit: Blosc2 does not check it.
            if written + size > raw.nbytes or blosc2.get_cbuffer_sizes(chunk)[0] != size:
                raise ValueError("a chunk has another size than it states")
            blosc2.decompress2(chunk, dst=raw[written : written + size], nthreads=1)
            written, offset = written + size, offset + 16 + packed
    except (ValueError, RuntimeError, TypeError, struct.error):
        raise MalformedBody("The packed array is damaged. Send it again.") from None
    if written != raw.nbytes:
        raise MalformedBody(f"The packed array is cut off: {written} of {raw.nbytes} bytes came.")
    return _as_bytes(values.reshape(shape), allocate(shape, np.uint8))


def _header(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return dtype, shape and the place of the chunks."""
    try:
        magic, version, codec, axes, length = struct.unpack_from("<4sBBBB", data)
        name = data[8 : 8 + length].decode("ascii")
        shape = struct.unpack_from(f"<{axes}q", data, 8 + length)
    except (struct.error, UnicodeDecodeError):
        raise MalformedBody("The packed array's header is cut off. Send it again.") from None
    if magic != _MAGIC or version != _VERSION or codec not in _CODECS:
        raise MalformedBody("The body is no packed array of version 1 of the nnInteractive protocol.")
    if name not in _DTYPES or axes not in (3, 4) or min(shape) < 1:
        raise MalformedBody(f"A packed array has 3 or 4 axes of numbers, got {name[:20]!r} {shape[:8]}.")
    return np.dtype(name), tuple(int(n) for n in shape), 8 + length + 8 * axes


def _as_bytes(values: Array, out: Array) -> Array:
    if values.ndim == 3:
        np.not_equal(values, 0, out=out, casting="unsafe")
    elif values.dtype == np.uint8:
        out[...] = values
    else:
        low, high = robust_range(values)
        for channel in range(len(values)):
            for place in range(values.shape[1]):  # a whole volume as float64 would take eight times its bytes
                out[channel, place] = scale_to_bytes(values[channel, place], low, high)
    return out


def check_library() -> None:
    """Raise InvalidConfig without Blosc2, before anybody sends an array."""
    if importlib.util.find_spec("blosc2") is None:
        raise InvalidConfig("nnInteractive needs Blosc2. Install it: pip install 'vessa-server[viewers]'.")


def _library() -> Any:
    check_library()
    import blosc2  # takes its time, and few need it

    return blosc2
