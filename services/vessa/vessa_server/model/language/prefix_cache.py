"""Cache the language model's state before the target, and continue it for every new target.

Template and text come first in the conversation, so their keys and values are the same for all targets of a
template and class. A target then costs only its own tokens and those of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from vessa_server.model.language.vlm import LanguageModel


class CachedPrefix(Protocol):
    """The cached part of a conversation, up to its target."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


class StateReader(Protocol):
    """Source of the states at <SEG>: a language model in this process, or one that vLLM serves."""

    @property
    def hidden_size(self) -> int:
        """Width of a state."""

    def read_templates(
        self, overlays: Tensor, class_names: Sequence[str], instructions: Sequence[str]
    ) -> Sequence[CachedPrefix]:
        """Read N conversations up to the target image; overlays: (N, 3, S, S) float in [0, 1]."""

    def states_after(self, read: Sequence[Any], targets: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the states (N, hidden) float32 of N conversations that `read_templates` returned.

        targets: (M, 3, S, S) float in [0, 1]; rows: the target of each conversation
        """

    def check(self) -> None:
        """Raise LanguageUnavailable while the language model cannot be reached."""

    def close(self) -> None:
        """Release all resources. No other method may be called afterwards."""


@dataclass(frozen=True)
class InProcess:
    """Reads states from a language model in this process."""

    language: LanguageModel

    @property
    def hidden_size(self) -> int:
        """Width of a state."""
        return self.language.hidden_size

    def read_templates(
        self, overlays: Tensor, class_names: Sequence[str], instructions: Sequence[str]
    ) -> "list[Prefix]":
        """See `StateReader`."""
        return read_templates(self.language, overlays, class_names, instructions)

    def states_after(self, read: "Sequence[Prefix]", targets: Tensor, rows: Sequence[int]) -> Tensor:
        """See `StateReader`."""
        return states_after(self.language, read, targets, rows)

    def check(self) -> None:
        """Do nothing: a model in this process is always available."""

    def close(self) -> None:
        """Do nothing: the model ends with the process."""


@dataclass(frozen=True)
class Prefix:
    """A conversation up to its target image, and the tokens that follow.

    keys, values: (layers, heads, L, d); rest: token ids (S,) from the target image to <SEG>;
    positions: (3, S) of the rest, for the rotary embedding in time, height and width
    """

    keys: Tensor
    values: Tensor
    rest: Tensor
    positions: Tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.keys.nbytes + self.values.nbytes + self.rest.nbytes + self.positions.nbytes


def read_templates(
    language: LanguageModel, overlays: Tensor, class_names: Sequence[str], instructions: Sequence[str]
) -> list[Prefix]:
    """Read N conversations up to the target image.

    overlays: (N, 3, S, S) float in [0, 1]
    """
    model, image_id = language.model.model, language.model.config.image_token_id
    starts, rests, positions = [], [], []
    pixels, grid = language.pixels(overlays)
    two = grid[:1].expand(2, -1)  # template and target have the same size
    for instruction, name in zip(instructions, class_names, strict=True):
        tokens = torch.tensor(language.encode(instruction, name)[0])
        images = tokens == image_id
        places, _ = model.get_rope_index(tokens[None], images[None].int(), two)
        cut = int(torch.nonzero(images)[images.sum() // 2])  # the first token of the second image
        starts.append((tokens[:cut], places[:, 0, :cut]))
        rests.append(tokens[cut:])
        positions.append(places[:, 0, cut:])
    ids, there = _left_padded([tokens for tokens, _ in starts])
    places, _ = _left_padded([p for _, p in starts])
    device = overlays.device
    output = model(
        input_ids=ids.to(device),
        attention_mask=there.to(device),
        position_ids=places.transpose(0, 1).to(device),
        pixel_values=pixels,
        image_grid_thw=grid.to(device),
        use_cache=True,
    )
    layers = output.past_key_values.layers
    keys = torch.stack([layer.keys for layer in layers], 1)  # (N, layers, heads, L, d)
    values = torch.stack([layer.values for layer in layers], 1)
    prefixes = []
    for row, (tokens, _) in enumerate(starts):
        used = slice(ids.shape[1] - len(tokens), None)  # a copy, so that the batch can be freed
        own_keys, own_values = keys[row, :, :, used].clone(), values[row, :, :, used].clone()
        prefixes.append(Prefix(own_keys, own_values, rests[row].to(device), positions[row].to(device)))
    return prefixes


def states_after(
    language: LanguageModel, prefixes: Sequence[Prefix], targets: Tensor, rows: Sequence[int]
) -> Tensor:
    """Return the states at <SEG>, (N, hidden) float32, of N prefixes, each followed by a target.

    targets: (M, 3, S, S) float in [0, 1], each encoded once; rows: the target of each prefix
    """
    model, device = language.model.model, targets.device
    pixels, grid = language.pixels(targets)
    seen = model.get_image_features(pixels, grid.to(device), return_dict=True)
    seen.pooler_output = tuple(seen.pooler_output[row] for row in rows)
    seen.deepstack_features = [tuple(level[row] for row in rows) for level in seen.deepstack_features]
    ids, there = _left_padded([p.rest for p in prefixes])
    positions, _ = _left_padded([p.positions for p in prefixes])
    longest = max(p.keys.shape[2] for p in prefixes)
    before = torch.stack([_used(p.keys.shape[2], longest) for p in prefixes]).to(device)
    output = model(
        input_ids=ids,
        attention_mask=torch.cat([before, there], 1),
        # Positions are passed, because the model would reuse the rope deltas of its previous input.
        position_ids=positions.transpose(0, 1),
        past_key_values=_joined(prefixes, longest),
        mm_encoder_outputs={"image": seen},
    )
    states: Tensor = output.last_hidden_state[:, -1].float()
    return states


def _left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows (..., L) of different lengths, zeros first; also return their mask (N, longest) int64."""
    longest = max(row.shape[-1] for row in rows)
    padded = torch.stack([F.pad(row, (longest - row.shape[-1], 0)) for row in rows])
    return padded, torch.stack([_used(row.shape[-1], longest) for row in rows]).to(padded.device)


def _used(length: int, longest: int) -> Tensor:
    return (torch.arange(longest) >= longest - length).long()


def _joined(prefixes: Sequence[Prefix], longest: int) -> DynamicCache:
    """Build the cache of one pass; the prefixes are not changed."""

    def stacked(tensors: list[Tensor]) -> Tensor:  # (layers, N, heads, longest, d)
        return torch.stack([F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in tensors], 1)

    keys, values = stacked([p.keys for p in prefixes]), stacked([p.values for p in prefixes])
    return DynamicCache(list(zip(keys, values, strict=True)))
