"""Compute a viewer's mask: slices with prompts, then the bank's labels of the slices between them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vessa.errors import VessaError
from vessa_server.serialization.prompt_arrays import PromptArrays
from vessa_server.serialization.request_parser import Reader, SegmentRequest
from vessa_server.types import SegmentResult
from vessa_server.viewers.growth import Growth
from vessa_server.viewers.interactions import Bool, prompts_of
from vessa_server.viewers.target import Place, Target

Annotate = Callable[[SegmentRequest], Awaitable[list[SegmentResult]]]
_TOGETHER = 8  # slices in one request to the worker
_AHEAD = 4  # slices that are labelled together in front of each end of a mask


class Painter:
    """Draw the targets of one caller.

    annotate: counts the images of a request against the key's limits, computes them, raises the first error
    group: the volume's own patient, whose templates are not used; None where nobody says
    """

    def __init__(self, reader: Reader, bank: str, annotate: Annotate, group: str | None = None) -> None:
        self._reader, self._bank, self._annotate, self._group = reader, bank, annotate, group

    async def paint(self, target: Target, seconds: float) -> tuple[Bool, bool]:
        """Return the mask and whether it is complete; it is not when it takes longer than `seconds`."""
        until = time.monotonic() + seconds
        for place, number, drawings in target.undrawn():
            if time.monotonic() > until:
                return Growth(target).mask(), False
            image = target.stack.image(*place)
            known = target.known(place)
            most = self._reader.settings.limits.max_points
            prompts, excluded = prompts_of(drawings, target.stack.size(place[0]), known, most)
            if target.class_id is None:
                target.class_id = await self._class_of(image, prompts)
            mask = await self._prompted(image, target.class_id, prompts)
            target.drawn[place] = number, mask & ~excluded
        growth = Growth(target)
        while missing := await asyncio.to_thread(growth.missing, _AHEAD):
            if time.monotonic() > until:
                return growth.mask(), False
            await self.label(target, missing)
        return growth.mask(), True

    async def label(self, target: Target, places: Sequence[Place]) -> None:
        """Have the bank label slices without prompts, some of one axis at a time."""
        for axis in range(3):
            same = [place for place in places if place[0] == axis]
            for start in range(0, len(same), _TOGETHER):
                await self._label(target, same[start : start + _TOGETHER])

    async def _label(self, target: Target, places: Sequence[Place]) -> None:
        images = np.stack([target.stack.image(*place) for place in places])
        read = partial(self._reader.segment_slices, self._bank, None, images, self._group)
        answers = await self._annotate(await asyncio.to_thread(read))
        target.labels |= {place: answer.labels for place, answer in zip(places, answers, strict=True)}

    async def _prompted(self, image: NDArray[np.uint8], class_id: int, prompts: PromptArrays) -> Bool:
        name = self._reader.banks.get(self._bank).classes[class_id]
        read = partial(self._reader.segment_prompted, image, self._bank, [name], prompts, self._group)
        (answer,) = await self._annotate(await asyncio.to_thread(read))
        mask: Bool = answer.labels == class_id
        return mask

    async def _class_of(self, image: NDArray[np.uint8], prompts: PromptArrays) -> int:
        """Return the class that prompts mean: the one they find when all classes have them.

        It is the class under most of what is drawn inside, else the one that the model is surest of.
        """
        classes = self._reader.banks.get(self._bank).classes
        if len(classes) == 1:
            return next(iter(classes))
        repeated = {n: None if a is None else np.repeat(a, len(classes), 1) for n, a in vars(prompts).items()}
        read = partial(
            self._reader.segment_prompted, image, self._bank, None, PromptArrays(**repeated), self._group
        )
        (answer,) = await self._annotate(await asyncio.to_thread(read))
        under = answer.labels[_inside(prompts, answer.labels.shape)]
        counts = np.bincount(under[under > 0], minlength=256)
        if counts.any():
            return int(counts.argmax())
        best = max(answer.scores, key=lambda name: answer.scores[name])
        return next(key for key, name in classes.items() if name == best)


def _inside(prompts: PromptArrays, size: tuple[int, ...]) -> Bool:
    """Return where prompts say that the structure is, bool (H, W)."""
    found = np.zeros(size, bool)
    if prompts.mask_logits is not None:
        found |= prompts.mask_logits[0, 0] > 0
    if prompts.points is not None and prompts.point_labels is not None:
        columns, rows = prompts.points[0, 0, prompts.point_labels[0, 0] == 1].astype(int).T
        found[rows, columns] = True
    if prompts.boxes is not None and not found.any():
        left, top, right, bottom = prompts.boxes[0, 0].astype(int)
        found[top:bottom, left:right] = True
    return found


def raise_errors(answers: list[SegmentResult | VessaError]) -> list[SegmentResult]:
    """Return the results. Raises the first error among them."""
    for answer in answers:
        if isinstance(answer, VessaError):
            raise answer
    return [answer for answer in answers if isinstance(answer, SegmentResult)]
