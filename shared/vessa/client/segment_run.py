"""The state of one `segment` call: requests to send, received annotations, items to send again.

Both clients use it. It does no input or output itself and is not thread-safe.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vessa.client import endpoints
from vessa.client.endpoints import Call
from vessa.client.types import Annotation, Image, SegmentOptions
from vessa.codec import image_digest
from vessa.errors import BadResponse, InvalidRequest, Retryable, UnknownImage

Progress = Callable[[int, int], None]  # (finished items, all items)

_LONGEST_WAIT = 10.0  # s


class SegmentRun:
    """Rounds of requests until every item has its annotation.

    images, image_ids: give one of them
    by_id: send the ids of the images first, and pixels only for ids that the service does not know
    attempts: how often an item with a Retryable error is sent, at most
    Raises what `endpoints.segment` raises, before anything is sent.
    """

    def __init__(
        self,
        images: Sequence[Image] | None,
        bank: str,
        image_ids: Sequence[str] | None,
        by_id: bool,
        attempts: int,
        progress: Progress | None,
        options: SegmentOptions,
    ) -> None:
        if by_id and images is None:
            raise InvalidRequest("by_id needs the images: pixels are sent for ids that the service lacks")
        self._images, self._bank, self._ids, self._options = images, bank, image_ids, options
        self._attempts, self._progress = attempts, progress
        count, calls = endpoints.segment(images, bank=bank, image_ids=image_ids, **options)
        self._answers: list[Annotation | None] = [None] * count
        self._round = self._failures = 0
        self._first: Iterator[Call[list[Annotation]]] = calls
        self._sent_by_id: set[int] = set()  # items whose pixels were not sent yet
        if by_id and images is not None:
            self._sent_by_id = set(range(count))
            self._first = self._by_id(images)

    def wait(self, initial: float) -> float:
        """Return the seconds to wait before this round, doubled with each round after failures."""
        return min(initial * 2 ** (self._failures - 1), _LONGEST_WAIT) if self._failures else 0.0

    def calls(self) -> Iterator[Call[list[Annotation]]] | None:
        """Return the requests of the next round, None when every item is finished."""
        self._round += 1
        if self._round == 1:
            return self._first
        unknown = [i for i in sorted(self._sent_by_id) if _unknown(self._answers[i])]
        failed = [i for i, a in enumerate(self._answers) if _failed_for_now(a)]
        if failed:
            self._failures += 1
        again = sorted(unknown + (failed if self._failures < self._attempts else []))
        self._sent_by_id -= set(again)
        return self._some(again, self._images, self._ids) if again else None

    def receive(self, call: Call[list[Annotation]], annotations: list[Annotation]) -> None:
        """Record the annotations of one request."""
        if len(annotations) != len(call.rows):
            raise BadResponse(f"the annotator returned {len(annotations)} items for {len(call.rows)}")
        for row, annotation in zip(call.rows, annotations, strict=True):
            if annotation.error is not None:
                annotation.error.item = row
            self._answers[row] = annotation
        if self._progress is not None:
            done = sum(a is not None and not self._pending(i, a) for i, a in enumerate(self._answers))
            self._progress(done, len(self._answers))

    def annotations(self) -> list[Annotation]:
        """Return all annotations in the order of the images."""
        return [a for a in self._answers if a is not None]

    def _by_id(self, images: Sequence[Image]) -> Iterator[Call[list[Annotation]]]:
        """Build requests by id, separately for each image size: a request has images of one size."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            by_size.setdefault(image.shape[:2], []).append(row)
        ids = [image_digest(image) for image in images]
        for rows in by_size.values():
            yield from self._some(rows, None, ids)

    def _some(
        self, rows: Sequence[int], images: Sequence[Image] | None, ids: Sequence[str] | None
    ) -> Iterator[Call[list[Annotation]]]:
        options = self._options.copy()
        if (groups := options.get("groups")) is not None:
            options["groups"] = [groups[row] for row in rows]
        if (prompts := options.get("prompts")) is not None:
            options["prompts"] = [prompts[row] for row in rows]
        _, calls = endpoints.segment(
            None if images is None else [images[row] for row in rows],
            bank=self._bank,
            image_ids=None if ids is None else [ids[row] for row in rows],
            **options,
        )
        return (replace(call, rows=tuple(rows[row] for row in call.rows)) for call in calls)

    def _pending(self, row: int, annotation: Annotation) -> bool:
        again = _failed_for_now(annotation) and self._failures + 1 < self._attempts
        return again or (row in self._sent_by_id and _unknown(annotation))


def _unknown(annotation: Annotation | None) -> bool:
    return annotation is not None and isinstance(annotation.error, UnknownImage)


def _failed_for_now(annotation: Annotation | None) -> bool:
    error = None if annotation is None else annotation.error
    return error is not None and isinstance(error, Retryable)
