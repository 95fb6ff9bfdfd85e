"""Read and write the brush masks of Label Studio: thi.ng's rle-pack over RGBA bytes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidRequest, TooLarge

_SIZES = (3, 4, 8, 16)  # bits of a run's length, as Label Studio writes them
_WORD = 8
MAX_RUNS = 1 << 18  # each takes a few microseconds; a smooth outline crosses a row a few times
_HEAD = 32 + 5 + 4 * 4


def encode(mask: NDArray[np.bool_]) -> list[int]:
    """Return a mask (H, W) as the bytes of `value.rle`."""
    flat = mask.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    starts, ends = np.r_[0, edges], np.r_[edges, flat.size]
    bits = [f"{4 * flat.size:032b}{_WORD - 1:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    for value, length in zip(flat[starts], 4 * (ends - starts), strict=True):
        word = "11111111" if value else "00000000"
        rest = int(length)
        while rest:
            run = min(rest, 1 << _SIZES[-1])
            kind = next(k for k, size in enumerate(_SIZES) if run <= 1 << size)
            bits.append(f"1{kind:02b}{run - 1:0{_SIZES[kind]}b}{word}")
            rest -= run
    joined = np.frombuffer("".join(bits).encode(), np.uint8) - ord("0")
    packed: list[int] = np.packbits(joined).tolist()
    return packed


def decode(rle: Sequence[int], height: int, width: int, max_pixels: int) -> NDArray[np.bool_]:
    """Return the mask (H, W) of `value.rle`. Raises InvalidRequest, TooLarge for one of too many runs."""
    if height < 1 or width < 1 or height * width > max_pixels:
        raise TooLarge(f"A brush mask has 1 to {max_pixels} pixels, got {height} x {width}.")
    wrong = InvalidRequest("A brush mask's rle is damaged or of another size than its image.")
    try:
        bits = np.unpackbits(np.array(rle, np.uint8))
    except (ValueError, TypeError, OverflowError):
        raise wrong from None
    count = 4 * height * width
    if bits.size < _HEAD or _number(bits[:32]) != count or _number(bits[32:37]) != _WORD - 1:
        raise wrong
    sizes = [_number(bits[37 + 4 * i : 41 + 4 * i]) + 1 for i in range(4)]
    out, place, at, runs = np.zeros(count, np.uint8), 0, _HEAD, 0
    while place < count:
        if at + 3 > bits.size:
            raise wrong
        runs += 1
        if runs > MAX_RUNS:
            raise TooLarge(f"A brush mask has more than {MAX_RUNS} runs, the limit. Draw smoother outlines.")
        size = sizes[_number(bits[at + 1 : at + 3])]
        length = _number(bits[at + 3 : at + 3 + size]) + 1
        words = 1 if bits[at] else length
        at += 3 + size
        values = np.packbits(bits[at : at + _WORD * words])
        if len(values) < words or place + length > count:
            raise wrong
        out[place : place + length] = values
        place, at = place + length, at + _WORD * words
    return out.reshape(height, width, 4)[..., 3] > 0


def _number(bits: NDArray[np.uint8]) -> int:
    value = 0
    for bit in bits.tolist():
        value = 2 * value + bit
    return value
