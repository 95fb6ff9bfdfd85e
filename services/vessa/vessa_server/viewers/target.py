"""Keep the structure that a person draws in a viewer: interactions in their order, and masks by slice."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vessa.errors import LimitReached, ShapeMismatch
from vessa_server.viewers.interactions import Bool, Drawing
from vessa_server.viewers.stack import Stack

Place = tuple[int, int]  # axis and index of a slice
MAX_STEPS = 256


@dataclass(frozen=True, eq=False)
class Step:
    """Hold one interaction: drawings, or a label of the whole volume that replaces what was before."""

    drawings: Sequence[Drawing] = ()
    label: Bool | None = None


@dataclass(eq=False)
class Target:
    """Hold the state of one structure in one volume. Not to be shared between threads.

    class_id: None until it is known; through: whether the mask continues through other slices
    mask: bool, what the viewer has; labels: class ids of slices, by the bank without prompts
    drawn: masks of slices with prompts, each with the number of the step that it is of
    """

    stack: Stack
    class_id: int | None = None
    through: bool = True
    mask: Bool = field(init=False)
    labels: dict[Place, NDArray[np.uint8]] = field(default_factory=dict)
    drawn: dict[Place, tuple[int, Bool]] = field(default_factory=dict)
    _steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mask = np.zeros(self.stack.shape, bool)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, with a mask in work."""
        steps = sum(d.nbytes for s in self._steps for d in s.drawings)
        steps += sum(s.label.nbytes for s in self._steps if s.label is not None)
        slices = sum(a.nbytes for a in self.labels.values()) + sum(m.nbytes for _, m in self.drawn.values())
        return self.stack.pixels.nbytes + 2 * self.mask.nbytes + steps + slices

    def add(self, step: Step) -> None:
        """Add an interaction. Raises LimitReached, ShapeMismatch for a label of another volume."""
        if len(self._steps) >= MAX_STEPS:
            raise LimitReached(f"A structure has at most {MAX_STEPS} interactions. Reset them, or undo some.")
        if step.label is not None and step.label.shape != self.mask.shape:
            raise ShapeMismatch(f"The label has the shape {step.label.shape}, the image {self.mask.shape}.")
        self._steps.append(step)

    def undo(self) -> bool:
        """Drop the newest interaction; returns False when there is none."""
        if not self._steps:
            return False
        self._steps.pop()
        # The next step gets the same number, so that slices of the dropped one must be drawn again.
        self.drawn = {p: (n, m) for p, (n, m) in self.drawn.items() if n <= len(self._steps)}
        return True

    def reset(self, class_id: int | None) -> None:
        """Begin another structure; what the bank says about the slices stays."""
        self._steps.clear()
        self.drawn.clear()
        self.class_id = class_id
        self.mask = np.zeros(self.stack.shape, bool)

    @property
    def label(self) -> Bool | None:
        """The newest label that the viewer gave, None without any."""
        return next((s.label for s in reversed(self._steps) if s.label is not None), None)

    def prompts(self) -> dict[Place, tuple[int, list[Drawing]]]:
        """Return the drawings since the newest label, by slice, each with the number of its newest step."""
        first = max((i for i, s in enumerate(self._steps) if s.label is not None), default=0)
        found: dict[Place, tuple[int, list[Drawing]]] = {}
        for number, step in enumerate(self._steps[first:], first + 1):
            for one in step.drawings:
                _, before = found.get((one.axis, one.index), (0, []))
                found[one.axis, one.index] = number, [*before, one]
        return found

    def undrawn(self) -> list[tuple[Place, int, list[Drawing]]]:
        """Return the slices whose mask is not that of their newest prompts."""
        return [
            (place, number, drawings)
            for place, (number, drawings) in self.prompts().items()
            if place not in self.drawn or self.drawn[place][0] != number
        ]

    def anchors(self) -> dict[Place, Bool]:
        """Return the masks of the slices that prompts decide, as far as they are drawn."""
        return {place: self.drawn[place][1] for place in self.prompts() if place in self.drawn}

    def known(self, place: Place) -> Bool | None:
        """Return the label's part in a slice, None where it is empty."""
        label = self.label
        if label is None:
            return None
        part: Bool = label.take([place[1]], place[0]).squeeze(place[0])
        return part if part.any() else None


def changed_box(old: Bool, new: Bool) -> list[list[int]] | None:
    """Return the bounds (low, high) along each axis of what differs, None when nothing does."""
    differs = old != new
    found = []
    for axis in range(3):
        places = np.flatnonzero(differs.any(axis=tuple(a for a in range(3) if a != axis)))
        if not places.size:
            return None
        found.append([int(places[0]), int(places[-1]) + 1])
    return found
