"""Prompts on their way out: one row of each tensor an image."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vessa.client.types import Floats, Prompts
from vessa.errors import InvalidPrompt

_LARGEST_LOGIT = 6e4  # float16 ends at 65504
_PROMPT_TYPES = {
    "boxes": np.float32,
    "points": np.float32,
    "point_labels": np.int8,
    "mask_logits": np.float16,
    "mask_present": np.uint8,
}


def _given(prompts: Prompts | None) -> Iterator[tuple[str, Floats]]:
    for name in _PROMPT_TYPES if prompts is not None else ():
        value = getattr(prompts, name)
        if value is not None:
            yield name, np.asarray(value)


def check_prompts(prompts: Sequence[Prompts | None]) -> None:
    """Refuse what would become other numbers on the wire; all else the service checks."""
    for row, one in enumerate(prompts):
        for name, value in _given(one):
            if value.dtype.kind not in "biuf":
                raise InvalidPrompt(f"{name} of image {row}: expected numbers, got {value.dtype}", item=row)
            if name == "point_labels" and not np.isin(value, (-1, 0, 1)).all():
                raise InvalidPrompt(f"point_labels of image {row}: expected 1, 0 or -1", item=row)


def prompt_shape(prompts: Prompts | None) -> tuple[Any, ...]:
    """What must be equal for two items' prompts to share a tensor."""
    return tuple((name, value.shape) for name, value in _given(prompts))


def prompt_bytes(prompts: Prompts | None) -> int:
    """Bytes that an item's prompts take on the wire."""
    return sum(value.size * np.dtype(_PROMPT_TYPES[name]).itemsize for name, value in _given(prompts))


def prompt_tensors(prompts: Sequence[Prompts | None]) -> dict[str, Floats]:
    """Stack the prompts of several images, which have the same `prompt_shape`, by their names on the wire."""
    columns: dict[str, list[Floats]] = {}
    for one in prompts:
        for name, value in _given(one):
            fits = np.clip(value, -_LARGEST_LOGIT, _LARGEST_LOGIT) if name == "mask_logits" else value
            columns.setdefault(name, []).append(fits.astype(_PROMPT_TYPES[name]))
    return {name: np.stack(column) for name, column in columns.items()}
