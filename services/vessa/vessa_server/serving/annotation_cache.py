"""Cache annotations with their provenance, for GET /annotations/{id}. No HTTP here.

Annotations are stored in memory only, because they show patients, and without their confidence, which would
take several times the space.
"""

import hashlib
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.codec import array_digest
from vessa.errors import UnknownAnnotation, VessaError
from vessa.schemas import Provenance
from vessa_server.auth.keys import Caller, Role
from vessa_server.byte_cache import ByteCache
from vessa_server.serialization.request_parser import SegmentRequest
from vessa_server.types import Answer, SegmentItem, SegmentResult, public_id

_OVERHEAD = 1024  # bytes of an entry besides its content, a generous estimate


@dataclass(frozen=True)
class _Entry:
    """A stored annotation.

    provenance: `Provenance` as JSON; packed: compressed labels; owners: names of the keys that received it
    """

    provenance: bytes
    packed: bytes
    owners: frozenset[str]

    @property
    def nbytes(self) -> int:
        return len(self.provenance) + len(self.packed) + _OVERHEAD


class AnnotationCache:
    """Holds the latest annotations, up to `budget` bytes. Methods may be called from any thread.

    model: digest of the weights; labels_version: version of pre- and post-processing
    """

    def __init__(self, budget: int, model: str, labels_version: str) -> None:
        self.model, self.labels_version = model, labels_version
        self._cache = ByteCache(budget)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all stored annotations."""
        return self._cache.nbytes

    def store(
        self, request: SegmentRequest, results: Sequence[SegmentResult | VessaError], caller: Caller
    ) -> list[Answer | VessaError]:
        """Store each result with its provenance for the caller; errors are returned unchanged."""
        answers: list[Answer | VessaError] = []
        for item, result in zip(request.items, results, strict=True):
            if isinstance(result, VessaError):
                answers.append(result)
                continue
            assert not isinstance(item, VessaError)  # its result would be the same error
            provenance = self.provenance(request, item, result)
            identity = self._put(provenance.model_dump_json().encode(), result.labels, caller.name)
            answers.append(
                Answer(identity, provenance, result.labels, result.confidence, result.probabilities)
            )
        return answers

    def get(self, identity: str, caller: Caller) -> Answer:
        """Return a stored annotation. Keys see what they received, admins see all.

        Raises UnknownAnnotation when it has been evicted, or belongs to another key.
        """
        with self._lock:
            entry: _Entry | None = self._cache.get(identity)
        if entry is None or not (caller.name in entry.owners or caller.role is Role.admin):
            raise unknown_annotation(identity)
        provenance = Provenance.model_validate_json(entry.provenance)
        labels = np.frombuffer(zlib.decompress(entry.packed), np.uint8)
        return Answer(identity, provenance, labels.reshape(provenance.height, provenance.width))

    def _put(self, provenance: bytes, labels: NDArray[np.uint8], owner: str) -> str:
        """Store labels (H, W) and return their id; an equal annotation gets one more owner."""
        data = np.ascontiguousarray(labels).data
        identity = hashlib.sha256(provenance + b"\n" + data).hexdigest()
        packed = zlib.compress(data, 1)
        with self._lock:
            known: _Entry | None = self._cache.get(identity)
            owners = frozenset({owner}) if known is None else known.owners | {owner}
            self._cache.put(identity, _Entry(provenance, packed, owners))
        return identity

    def erase(self, group: str, banks: Sequence[str]) -> int:
        """Drop the annotations of a patient and those made with templates of banks; return how many."""
        with self._lock:
            gone = [key for key, entry in list(self._cache) if _names(entry, group, banks)]
            for key in gone:
                self._cache.drop(key)
        return len(gone)

    def provenance(self, request: SegmentRequest, item: SegmentItem, result: SegmentResult) -> Provenance:
        """Describe how one result was made: image, bank, weights, classes, prompts, templates."""
        height, width = result.labels.shape
        return Provenance(
            image_id=public_id(result.image_id),
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
            cleaning=result.cleaning,
            absence_threshold=result.absence_threshold,
            absent=list(result.absent),
            islands=result.islands,
            **_prompts(item),
        )


def unknown_annotation(identity: str) -> UnknownAnnotation:
    """Return the error for an annotation that was evicted, or belongs to other keys."""
    return UnknownAnnotation(
        f"Annotation {identity[:80]!r} is not in the cache, which holds the latest VESSA_ANNOTATION_BYTES. "
        "Segment the image again."
    )


def _names(entry: Any, group: str, banks: Sequence[str]) -> bool:
    made = Provenance.model_validate_json(entry.provenance)
    used = (use.group for uses in made.templates.values() for use in uses)
    return made.group == group or made.bank in banks or group in used


def _prompts(item: SegmentItem) -> dict[str, Any]:
    """Return the fields boxes, points and mask_logits of `Provenance`."""
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
