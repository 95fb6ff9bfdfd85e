"""Asking what to annotate next: the service looks at all candidates, then ranks them by their ids."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from pydantic import TypeAdapter

from vessa.client.endpoints import Call, batches, binary, check_images, check_list, quoted, reads
from vessa.client.types import Image
from vessa.codec import image_digest
from vessa.errors import BadResponse, InvalidRequest, UnknownImage
from vessa.schemas import Suggestions

Progress = Callable[[int, int], None]  # (candidates that were looked at, all)

_ROUNDS = 3  # of sending what the service does not know; what it looked at it keeps for a while


class SuggestRun:
    """What is sent for one call of `suggest`; both clients drive it, it does no input or output itself.

    Images are read one by one for their ids, and those that the service does not know again when they are
    sent. Raises InvalidImage, InvalidRequest before anything is sent.
    """

    def __init__(
        self,
        bank: str,
        images: Sequence[Image],
        groups: Sequence[str | None] | None,
        count: int,
        progress: Progress | None,
    ) -> None:
        check_list(groups, "groups")
        self._path = f"/banks/{quoted(bank)}/suggest"
        self._images, self._progress = images, progress
        self._groups = [None] * len(images) if groups is None else list(groups)
        if not len(images) or count < 1 or len(self._groups) != len(images):
            raise InvalidRequest(
                f"expected at least one image, a group of each and a count of 1 or more, got {len(images)} "
                f"images, {len(self._groups)} groups and {count}"
            )
        self._count = min(count, len(images))
        self._rounds = self._done = 0
        self._ids: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        for row in range(len(images)):
            check_images([image := images[row]], row)
            self._ids.append(image_digest(image))
            self._shapes.append(image.shape)

    def ranking(self) -> Call[Suggestions]:
        """Ask for the ranking; where the service does not know all images it tells which."""
        metadata = {"image_ids": _compact(self._ids), "groups": _compact(self._groups)}
        return self._call({}, {**metadata, "count": str(self._count)}, range(len(self._ids)))

    def looks(self, answer: Suggestions) -> Iterator[Call[Suggestions]]:
        """Send the images that the service does not know; UnknownImage when it forgets them again."""
        self._rounds += 1
        if self._rounds > _ROUNDS:
            raise UnknownImage(
                f"the service forgets candidates as fast as it looks at them: {len(answer.unknown)} of "
                f"{len(self._ids)} are unknown after {_ROUNDS} rounds; suggest from fewer at once"
            )
        row_of = {identity: row for row, identity in reversed(list(enumerate(self._ids)))}
        if not row_of.keys() >= set(answer.unknown):
            raise BadResponse("the annotator asks for images that it was not told of")
        rows = [row_of[identity] for identity in dict.fromkeys(answer.unknown)]
        self._done = len(self._ids) - len(rows)
        sizes = [int(np.prod(self._shapes[row])) for row in rows]
        for part in batches((self._shapes[row] for row in rows), sizes):
            some = [rows[place] for place in part]
            tensors = {"images": np.stack([self._images[row] for row in some])}
            yield self._call(tensors, {"groups": _compact([self._groups[row] for row in some])}, some)

    def receive(self, call: Call[Suggestions]) -> None:
        """Note that the service has looked at some images."""
        self._done += len(call.rows)
        if self._progress is not None:
            self._progress(self._done, len(self._ids))

    def _call(
        self, tensors: Mapping[str, Image], metadata: Mapping[str, str], rows: Sequence[int]
    ) -> Call[Suggestions]:
        return binary(self._path, tensors, metadata, reads(TypeAdapter(Suggestions)), rows)


def _compact(values: Sequence[str | None]) -> str:
    return json.dumps(values, separators=(",", ":"))
