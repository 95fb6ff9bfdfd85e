"""Turn prompts into the tensors of a request, one row per image."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vessa.client.types import Floats, Prompts
from vessa.errors import InvalidPrompt

_LARGEST_LOGIT = 6e4  # the largest float16 is 65504
_PROMPT_TYPES = {
    "boxes": np.float32,
    "points": np.float32,
    "point_labels": np.int8,
    "mask_logits": np.float16,
    "mask_present": np.uint8,
}


def _present(prompts: Prompts | None) -> Iterator[tuple[str, Floats]]:
    for name in _PROMPT_TYPES if prompts is not None else ():
        value = getattr(prompts, name)
        if value is not None:
            yield name, np.asarray(value)


def check_prompts(prompts: Sequence[Prompts | None]) -> None:
    """Raise InvalidPrompt for values that the request's types cannot hold; the service checks the rest."""
    for row, one in enumerate(prompts):
        for name, value in _present(one):
            if value.dtype.kind not in "biuf":
                raise InvalidPrompt(f"{name} of image {row}: expected numbers, got {value.dtype}", item=row)
            if name == "point_labels" and not np.isin(value, (-1, 0, 1)).all():
                raise InvalidPrompt(f"point_labels of image {row}: expected 1, 0 or -1", item=row)


def prompt_shape(prompts: Prompts | None) -> tuple[Any, ...]:
    """Return a key that is equal for prompts whose arrays can be stacked."""
    return tuple((name, value.shape) for name, value in _present(prompts))


def prompt_bytes(prompts: Prompts | None) -> int:
    """Return the number of bytes that an item's prompts take in a request."""
    return sum(value.size * np.dtype(_PROMPT_TYPES[name]).itemsize for name, value in _present(prompts))


def prompt_tensors(prompts: Sequence[Prompts | None]) -> dict[str, Floats]:
    """Stack the prompts of images with equal `prompt_shape`; returns tensor name to (B, ...) array."""
    columns: dict[str, list[Floats]] = {}
    for one in prompts:
        for name, value in _present(one):
            fits = np.clip(value, -_LARGEST_LOGIT, _LARGEST_LOGIT) if name == "mask_logits" else value
            columns.setdefault(name, []).append(fits.astype(_PROMPT_TYPES[name]))
    return {name: np.stack(column) for name, column in columns.items()}
