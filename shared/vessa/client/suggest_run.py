"""The state of one `suggest` call: the service computes features of candidates, then ranks them by id."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from pydantic import TypeAdapter

from vessa.client.endpoints import Call, batches, binary, check_images, check_list, quoted, reads
from vessa.client.types import Image
from vessa.codec import image_digest
from vessa.errors import BadResponse, InvalidRequest, UnknownImage
from vessa.schemas import Suggestions

Progress = Callable[[int, int], None]  # (candidates with features, all candidates)

_ROUNDS = 3  # of sending images; the service keeps their features in a cache of limited size


class SuggestRun:
    """Requests of one `suggest` call. Both clients use it; it does no input or output itself.

    Each image is read once for its id, and once more if the service does not have its features.
    Raises InvalidImage, InvalidRequest before anything is sent.
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
                f"expected at least one image, one group per image and a count of 1 or more, "
                f"got {len(images)} images, {len(self._groups)} groups and a count of {count}"
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
        """Build the request for the ranking; the service returns the ids whose features it lacks."""
        metadata = {"image_ids": _compact(self._ids), "groups": _compact(self._groups)}
        return self._call({}, {**metadata, "count": str(self._count)}, range(len(self._ids)))

    def feature_calls(self, answer: Suggestions) -> Iterator[Call[Suggestions]]:
        """Build requests with the images whose features the service lacks.

        Raises UnknownImage when features are still missing after _ROUNDS rounds.
        """
        self._rounds += 1
        if self._rounds > _ROUNDS:
            raise UnknownImage(
                f"the service's feature cache is too small: {len(answer.unknown)} of {len(self._ids)} "
                f"candidates are unknown after {_ROUNDS} rounds; rank fewer candidates at once"
            )
        row_of = {identity: row for row, identity in reversed(list(enumerate(self._ids)))}
        if not row_of.keys() >= set(answer.unknown):
            raise BadResponse("the annotator requested images that are no candidates of this call")
        rows = [row_of[identity] for identity in dict.fromkeys(answer.unknown)]
        self._done = len(self._ids) - len(rows)
        sizes = [int(np.prod(self._shapes[row])) for row in rows]
        for part in batches((self._shapes[row] for row in rows), sizes):
            some = [rows[place] for place in part]
            tensors = {"images": np.stack([self._images[row] for row in some])}
            yield self._call(tensors, {"groups": _compact([self._groups[row] for row in some])}, some)

    def receive(self, call: Call[Suggestions]) -> None:
        """Record that the service has the features of some images."""
        self._done += len(call.rows)
        if self._progress is not None:
            self._progress(self._done, len(self._ids))

    def _call(
        self, tensors: Mapping[str, Image], metadata: Mapping[str, str], rows: Sequence[int]
    ) -> Call[Suggestions]:
        return binary(self._path, tensors, metadata, reads(TypeAdapter(Suggestions)), rows)


def _compact(values: Sequence[str | None]) -> str:
    return json.dumps(values, separators=(",", ":"))
