"""What the annotator remembers, oldest forgotten first.

An image's features serve every later request on it; what its templates and the language model said
of it serves every later request that only brings other prompts. A template's memory, and what the language
model has read of it, serve every later image.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from vessa_server.inference.zoom import Found
from vessa_server.model.geometry import Square, Window
from vessa_server.model.segmenter import ImageFeatures

_WINDOWS = 4  # closer looks kept of an image: prompts that wander do not fill the memory


@dataclass(frozen=True)
class Attended:
    """One class in one image, up to the prompts: embedding (1, C, h, w), h_seg (1, C) or None."""

    embedding: Tensor
    h_seg: Tensor | None


@dataclass
class Seen:
    """A square of an image as the network saw it.

    image: uint8 (H, W[, 3]); pixels: (1, 3, S, S) in [0, 1]; vector: for the retrieval (D,);
    found: what first looks have found, by what they depend on; closer: by window, closer looks at parts of
    the image
    """

    image: np.ndarray
    square: Square
    pixels: Tensor
    features: ImageFeatures
    vector: np.ndarray
    attended: dict[Hashable, Attended] = field(default_factory=dict)
    found: dict[Hashable, Found] = field(default_factory=dict)
    closer: "OrderedDict[Window, Seen]" = field(default_factory=OrderedDict)

    def keep_closer(self, window: Window, seen: "Seen") -> None:
        """Keep a closer look; the oldest of too many goes."""
        self.closer[window] = seen
        if len(self.closer) > _WINDOWS:
            self.closer.popitem(last=False)

    def forget_attended(self) -> None:
        """Keep what does not depend on any template."""
        self.attended.clear()
        self.found.clear()
        for seen in self.closer.values():
            seen.forget_attended()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        tensors = [self.pixels, self.features.embedding, self.features.fine, self.features.finer]
        for state in self.attended.values():
            tensors += [state.embedding] if state.h_seg is None else [state.embedding, state.h_seg]
        closer = sum(seen.nbytes - seen.image.nbytes for seen in self.closer.values())
        return self.image.nbytes + closer + sum(t.nbytes for t in tensors)
