"""Answers with what made them, kept for a while so that they can be asked for again. No HTTP here.

They are kept in memory alone, for they show patients, and without their confidence, which takes several
times the place.
"""

import hashlib
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vessa.codec import array_digest
from vessa.errors import UnknownAnnotation, VessaError
from vessa.schemas import Provenance
from vessa_server.auth.keys import Caller, Role
from vessa_server.byte_cache import ByteCache
from vessa_server.types import Answer

if TYPE_CHECKING:
    from vessa_server.serialization.request_parser import SegmentRequest
    from vessa_server.types import SegmentItem, SegmentResult

_OVERHEAD = 1024  # bytes of an entry besides what it holds, generously


@dataclass(frozen=True)
class _Kept:
    """made: Provenance as JSON; packed: labels, compressed; owners: names of the keys that were answered."""

    made: bytes
    packed: bytes
    owners: frozenset[str]

    @property
    def nbytes(self) -> int:
        return len(self.made) + len(self.packed) + _OVERHEAD


class Annotations:
    """The latest answers, up to `budget` bytes of them. Safe to share between threads.

    model: digest of the weights; labels_version: of pre- and post-processing
    """

    def __init__(self, budget: int, model: str, labels_version: str) -> None:
        self.model, self.labels_version = model, labels_version
        self._held = ByteCache(budget)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._held.nbytes

    def answer(
        self, request: "SegmentRequest", results: "Sequence[SegmentResult | VessaError]", caller: Caller
    ) -> list[Answer | VessaError]:
        """Say of each result what made it, and keep it for the caller."""
        answers: list[Answer | VessaError] = []
        for item, result in zip(request.items, results, strict=True):
            if isinstance(result, VessaError):
                answers.append(result)
                continue
            assert not isinstance(item, VessaError)  # its result would be the same error
            made = self.made(request, item, result)
            identity = self._keep(made.model_dump_json().encode(), result.labels, caller.name)
            answers.append(Answer(identity, made, result.labels, result.confidence, result.probabilities))
        return answers

    def get(self, identity: str, caller: Caller) -> Answer:
        """Return what is kept; UnknownAnnotation when it is gone, or was for another key. Admins see all."""
        with self._lock:
            kept: _Kept | None = self._held.get(identity)
        if kept is None or not (caller.name in kept.owners or caller.role is Role.admin):
            raise UnknownAnnotation(
                f"no annotation {identity[:80]!r} is kept; the latest are, up to VESSA_ANNOTATION_BYTES: "
                "segment the image again"
            )
        made = Provenance.model_validate_json(kept.made)
        labels = np.frombuffer(zlib.decompress(kept.packed), np.uint8).reshape(made.height, made.width)
        return Answer(identity, made, labels)

    def _keep(self, made: bytes, labels: NDArray[np.uint8], owner: str) -> str:
        data = np.ascontiguousarray(labels).data
        identity = hashlib.sha256(made + b"\n" + data).hexdigest()
        packed = zlib.compress(data, 1)
        with self._lock:
            known: _Kept | None = self._held.get(identity)
            owners = frozenset({owner}) if known is None else known.owners | {owner}
            self._held.put(identity, _Kept(made, packed, owners))
        return identity

    def made(self, request: "SegmentRequest", item: "SegmentItem", result: "SegmentResult") -> Provenance:
        """Say what made one result."""
        height, width = result.labels.shape
        return Provenance(
            image_id=result.image_id,
            height=height,
            width=width,
            bank=request.bank.name,
            bank_version=result.bank_version,
            bank_digest=result.bank_digest,
            model=self.model,
            adaptation=result.adaptation,
            labels_version=self.labels_version,
            classes=dict(zip(result.class_ids, result.class_names, strict=True)),
            group=item.group,
            template_choice=item.template_choice,
            seed=request.seed,
            templates=result.templates,
            scores=result.scores,
            **_prompts(item),
        )


def _prompts(item: "SegmentItem") -> dict[str, Any]:
    """Return the fields boxes, points and mask_logits of Provenance."""
    boxes: dict[str, list[float]] = {}
    points: dict[str, list[tuple[float, float, int]]] = {}
    logits: dict[str, str] = {}
    for k, name in enumerate(item.classes):
        if item.boxes is not None and (item.boxes[k] != -1).any():
            boxes[name] = item.boxes[k].tolist()
        if item.points is not None and item.point_labels is not None:
            pairs = zip(item.points[k].tolist(), item.point_labels[k].tolist(), strict=True)
            if given := [(x, y, label) for (x, y), label in pairs if label != -1]:
                points[name] = given
        if item.mask_logits is not None and (item.mask_present is None or item.mask_present[k]):
            logits[name] = array_digest(item.mask_logits[k])
    return {"boxes": boxes, "points": points, "mask_logits": logits}
