"""The wire for tensors: safetensors, with every declared size checked before anything is allocated.

safetensors is a JSON header that states each tensor's dtype, shape and place, then the raw bytes.
No pickle, no compression, so nothing can grow on decoding; arrays come out as views of the body.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from vessa.errors import MalformedBody, TooLarge

MEDIA_TYPE = "application/vnd.safetensors"
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
_MAX_RANK = 6
_MAX_SIDE = 1 << 31


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor may be.

    dtypes: safetensors names (U8, I8, F16, F32); shapes: allowed shapes, None for any length
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether one of the allowed shapes fits."""
        return any(
            len(shape) == len(allowed)
            and all(a is None or a == s for a, s in zip(allowed, shape, strict=True))
            for allowed in self.shapes
        )


def image_digest(image: np.ndarray[Any, Any]) -> str:
    """Return the image id `sha256:<hex>` of uint8 (H, W) or (H, W, 3) pixels.

    Raises ValueError for anything else: its bytes would have an id that the service never gives.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"expected uint8 (H, W) or (H, W, 3), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    channels = 1 if image.ndim == 2 else image.shape[2]
    digest = hashlib.sha256(b"%d,%d,%d\n" % (height, width, channels))
    digest.update(np.ascontiguousarray(image).data)
    return f"sha256:{digest.hexdigest()}"


def array_digest(array: np.ndarray[Any, Any]) -> str:
    """Return `sha256:<hex>` of an array's type, shape and values: how provenance names mask logits."""
    digest = hashlib.sha256(f"{array.dtype.name},{','.join(map(str, array.shape))}\n".encode())
    digest.update(np.ascontiguousarray(array).data)
    return f"sha256:{digest.hexdigest()}"


def encode(tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]) -> bytes:
    """Encode arrays and string metadata as one safetensors body."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(arrays, dict(metadata))


def decode(
    body: bytes, expected: Mapping[str, TensorSpec], *, max_bytes: int, max_header_bytes: int = 1 << 20
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Decode a safetensors body into read-only views and its metadata.

    expected: the tensors that may occur. Raises TooLarge over `max_bytes`, MalformedBody for
    anything that is not exactly what the header declares or `expected` allows.
    """
    if len(body) > max_bytes:
        raise TooLarge(
            f"the body has {len(body)} bytes; at most {max_bytes} are taken: send fewer images at once"
        )
    header, start = read_header(body, max_header_bytes)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedBody("the header's __metadata__ must map strings to strings")
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name not in expected:
            raise MalformedBody(f"unknown tensor '{name[:60]}'; expected {sorted(expected)}")
        dtype, shape, begin, end = _entry(name, entry, expected[name], len(body) - start)
        spans.append((begin, end))
        tensors[name] = np.frombuffer(body, dtype, math.prod(shape), start + begin).reshape(shape)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise MalformedBody("tensors overlap or leave a gap between them")
        position = end
    if start + position != len(body):
        raise MalformedBody(f"the header declares {position} bytes of tensors, {len(body) - start} came")
    return tensors, metadata


def read_header(body: bytes, max_header_bytes: int = 1 << 20) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors body and where its tensors begin; MalformedBody."""
    if len(body) < 8:
        raise MalformedBody(
            f"a safetensors body begins with 8 bytes of header length; {len(body)} bytes came"
        )
    length = int.from_bytes(body[:8], "little")
    if length > min(max_header_bytes, len(body) - 8):
        raise MalformedBody(
            f"the header claims {length} bytes; {len(body) - 8} came and at most {max_header_bytes} are taken"
        )
    try:
        header = json.loads(body[8 : 8 + length].decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise MalformedBody("the header is not JSON") from error
    if not isinstance(header, dict):
        raise MalformedBody("the header must be a JSON object")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that occurs twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedBody("the header names something twice")
    return found


def _entry(
    name: str, entry: Any, spec: TensorSpec, available: int
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Check one tensor's declaration against its spec and the bytes that came."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise MalformedBody(f"tensor '{name}' needs dtype, shape and data_offsets") from error
    sizes = all(type(n) is int and 0 <= n < _MAX_SIDE for n in shape)
    offsets = all(type(n) is int and 0 <= n <= available for n in (begin, end))
    if len(shape) > _MAX_RANK or not sizes or not offsets:
        raise MalformedBody(f"tensor '{name}' declares sizes or offsets that are not in its body")
    if dtype_name not in spec.dtypes or dtype_name not in _DTYPES:
        raise MalformedBody(
            f"tensor '{name}' has dtype {str(dtype_name)[:20]}; expected {' or '.join(spec.dtypes)}"
        )
    if not spec.allows(shape):
        wanted = " or ".join(str(s).replace("None", "n") for s in spec.shapes)
        raise MalformedBody(f"tensor '{name}' has shape {shape}; expected {wanted}")
    dtype = _DTYPES[dtype_name]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise MalformedBody(f"tensor '{name}' of shape {shape} does not fill its {end - begin} bytes")
    return dtype, shape, begin, end
