"""Parse POST /banks/{bank}/suggest: candidates as pixels, or as ids of images sent before."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from vessa.codec import decode, image_digest
from vessa.errors import InvalidRequest, MalformedBody, TooLarge
from vessa_server.serialization.fields import check_known, json_metadata, read_strings
from vessa_server.serialization.request_parser import SEGMENT_TENSORS
from vessa_server.settings import Settings

TENSORS = {"images": SEGMENT_TENSORS["images"]}
MAX_HEADER_BYTES = 4 << 20  # the ids and patients of all candidates are in it


@dataclass(frozen=True)
class Candidates:
    """Hold unlabeled images.

    images: uint8 (B, H, W[, 3]), None when the request has only ids
    count: number of suggestions to return
    """

    ids: tuple[str, ...]
    images: NDArray[Any] | None
    groups: tuple[str | None, ...]
    count: int

    @property
    def units(self) -> list[str]:
        """Return the unit of annotation of each image: its patient, or itself without a patient."""
        return [group or identity for group, identity in zip(self.groups, self.ids, strict=True)]


def read_candidates(body: bytes, settings: Settings) -> Candidates:
    """Parse a safetensors body: the tensor images or the metadata image_ids; metadata groups and count."""
    tensors, metadata = decode(
        body, TENSORS, max_bytes=settings.limits.max_body_bytes, max_header_bytes=MAX_HEADER_BYTES
    )
    check_known(metadata, {"image_ids", "groups", "count"})
    images = tensors.get("images")
    if (images is None) == ("image_ids" not in metadata):
        raise MalformedBody(
            "The body needs either the tensor images or the metadata image_ids, and not both."
        )
    if images is None:
        ids = tuple(read_strings(json_metadata(metadata, "image_ids"), "image_ids", None))
        most = settings.limits.max_candidates
    else:
        ids = tuple(image_digest(image) for image in images)
        most = settings.limits.max_items
    if not ids or len(ids) > most:
        raise TooLarge(f"A request takes 1 to {most} candidates, got {len(ids)}.")
    groups: list[str | None] = [None] * len(ids)
    if "groups" in metadata:
        groups = read_strings(json_metadata(metadata, "groups"), "groups", len(ids), optional=True)
    count = metadata.get("count", "1")
    if not (count.isascii() and count.isdigit() and 1 <= int(count[:6]) <= len(ids) and len(count) <= 6):
        raise InvalidRequest(
            f"`count` must be 1 to the number of candidates, {len(ids)}, got {count[:20]!r}."
        )
    return Candidates(ids, images, tuple(groups), int(count))
