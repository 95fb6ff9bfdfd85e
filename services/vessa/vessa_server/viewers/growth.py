"""Continue a mask from the slices with prompts through the volume.

A slice without prompts has what the bank's templates say about it: of its parts of the class, those that
touch the structure in the slice before. The mask ends where none does, and at the next slice with prompts.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from vessa_server.viewers.interactions import Bool
from vessa_server.viewers.target import Place, Target

_TOUCH = 2  # px that a structure may move between two slices


@dataclass(eq=False)
class _Front:
    """Hold how far the mask came. index: the next slice; before: the mask in the slice before it."""

    axis: int
    index: int
    step: int
    before: Bool


class Growth:
    """Grow the mask of a target once, as slices become known. Not to be shared between threads."""

    def __init__(self, target: Target) -> None:
        """Begin at the slices with prompts, or end there where the target does not continue."""
        self._target, self._anchors = target, target.anchors()
        label = target.label
        self._mask: Bool = np.zeros(target.stack.shape, bool) if label is None else label.copy()
        fronts = [
            _Front(axis, index + step, step, mask)
            for (axis, index), mask in self._anchors.items()
            for step in (-1, 1)
        ]
        self._fronts = fronts if target.through else []

    def missing(self, ahead: int) -> list[Place]:
        """Go on as far as slices are known; return those that the bank must label next.

        ahead: slices in front of each end of the mask, so that they can be labelled together
        """
        self._fronts = [front for front in self._fronts if self._advance(front)]
        found: list[Place] = []
        for front in self._fronts:
            for distance in range(ahead):
                place = front.axis, front.index + distance * front.step
                if not self._open(place):
                    break
                if place not in self._target.labels and place not in found:
                    found.append(place)
        return found

    def mask(self) -> Bool:
        """Return the mask as far as it has grown."""
        for place, part in self._anchors.items():
            view_of(self._mask, place)[...] = part
        return self._mask

    def _advance(self, front: _Front) -> bool:
        """Move a front; returns whether it waits for a slice that is not labelled yet."""
        while front.before.any() and self._open(place := (front.axis, front.index)):
            if place not in self._target.labels:
                return True
            front.before = _touching(self._target.labels[place] == self._target.class_id, front.before)
            view_of(self._mask, place)[...] = front.before
            front.index += front.step
        return False

    def _open(self, place: Place) -> bool:
        """Return whether a slice is in the volume and neither prompts nor the viewer's label decide it."""
        inside = 0 <= place[1] < self._target.stack.shape[place[0]]
        return inside and place not in self._anchors and self._target.known(place) is None


def view_of(array: Bool, place: Place) -> Bool:
    """Return the view of a slice; writing to it writes the volume."""
    selection: list[int | slice] = [slice(None)] * 3
    selection[place[0]] = place[1]
    view: Bool = array[tuple(selection)]
    return view


def _touching(candidates: Bool, before: Bool) -> Bool:
    """Return the connected parts that touch the structure in the slice before."""
    parts, count = ndimage.label(candidates)
    keep = np.zeros(count + 1, bool)
    keep[np.unique(parts[ndimage.binary_dilation(before, iterations=_TOUCH)])] = True
    keep[0] = False
    return keep[parts]
