"""Encode and decode tensors as safetensors; check every declared size before allocation.

A safetensors body is a JSON header with dtype, shape and offsets of each tensor, then the raw bytes. It has
neither pickle nor compression, so decoding cannot expand it. Decoded arrays are views of the body.
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
    """Describe the allowed types and shapes of a tensor.

    dtypes: safetensors names (U8, I8, F16, F32)
    shapes: allowed shapes, None for any length
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Return whether a shape is allowed."""
        return any(
            len(shape) == len(allowed)
            and all(a is None or a == s for a, s in zip(allowed, shape, strict=True))
            for allowed in self.shapes
        )


def image_digest(image: np.ndarray[Any, Any]) -> str:
    """Return the image id `sha256:<hex>` of uint8 (H, W) or (H, W, 3) pixels.

    Raises ValueError for other arrays: the service never returns the id of their bytes.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"expected uint8 (H, W) or (H, W, 3), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    channels = 1 if image.ndim == 2 else image.shape[2]
    digest = hashlib.sha256(b"%d,%d,%d\n" % (height, width, channels))
    digest.update(np.ascontiguousarray(image).data)
    return f"sha256:{digest.hexdigest()}"


def array_digest(array: np.ndarray[Any, Any]) -> str:
    """Return `sha256:<hex>` of the type, shape and values of an array. Provenance names mask logits by it."""
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

    expected: allowed tensors by name
    Raises TooLarge over `max_bytes`, and MalformedBody for a body that differs from its header or from
    `expected`.
    """
    if len(body) > max_bytes:
        raise TooLarge(
            f"The body has {len(body)} bytes, the limit is {max_bytes}. Send fewer images per request."
        )
    header, start = read_header(body, max_header_bytes)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedBody("__metadata__ of the header must map strings to strings.")
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name not in expected:
            raise MalformedBody(f"Unknown tensor '{name[:60]}'. Expected {sorted(expected)}.")
        dtype, shape, begin, end = _entry(name, entry, expected[name], len(body) - start)
        spans.append((begin, end))
        tensors[name] = np.frombuffer(body, dtype, math.prod(shape), start + begin).reshape(shape)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise MalformedBody("The tensors overlap, or there is a gap between them.")
        position = end
    if start + position != len(body):
        raise MalformedBody(
            f"The header declares {position} bytes of tensors, but the body has {len(body) - start}."
        )
    return tensors, metadata


def read_header(body: bytes, max_header_bytes: int = 1 << 20) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors body and the offset of its tensors. Raises MalformedBody."""
    if len(body) < 8:
        raise MalformedBody(
            f"A safetensors body begins with 8 bytes of header length, got {len(body)} bytes."
        )
    length = int.from_bytes(body[:8], "little")
    if length > min(max_header_bytes, len(body) - 8):
        raise MalformedBody(
            f"The header claims {length} bytes; the body has {len(body) - 8}, the limit is {max_header_bytes}"
        )
    try:
        header = json.loads(body[8 : 8 + length].decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise MalformedBody("The header is not JSON.") from error
    if not isinstance(header, dict):
        raise MalformedBody("The header must be a JSON object.")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate names, since readers differ in which one they use."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedBody("The header has a duplicate name.")
    return found


def _entry(
    name: str, entry: Any, spec: TensorSpec, available: int
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Check the declaration of one tensor against its spec and the available bytes."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise MalformedBody(f"Tensor '{name}' needs dtype, shape and data_offsets.") from error
    sizes = all(type(n) is int and 0 <= n < _MAX_SIDE for n in shape)
    offsets = all(type(n) is int and 0 <= n <= available for n in (begin, end))
    if len(shape) > _MAX_RANK or not sizes or not offsets:
        raise MalformedBody(f"Tensor '{name}' declares sizes or offsets outside of its body.")
    if dtype_name not in spec.dtypes or dtype_name not in _DTYPES:
        raise MalformedBody(
            f"Tensor '{name}' has dtype {str(dtype_name)[:20]}. Expected {' or '.join(spec.dtypes)}."
        )
    if not spec.allows(shape):
        wanted = " or ".join(str(s).replace("None", "n") for s in spec.shapes)
        raise MalformedBody(f"Tensor '{name}' has shape {shape}. Expected {wanted}.")
    dtype = _DTYPES[dtype_name]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise MalformedBody(f"Tensor '{name}' of shape {shape} does not fit its {end - begin} bytes.")
    return dtype, shape, begin, end
