"""The documents of the MONAI Label protocol: what a server says about itself, requests and their answers."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidRequest, UnknownClass
from vessa.volumes import Volume
from vessa_server.template_bank.retrieval import Bank
from vessa_server.viewers import interactions
from vessa_server.viewers.stack import Stack
from vessa_server.viewers.target import Step, Target

STRATEGY = "vessa"
_KINDS = {"": "segmentation", "-slice": "deepgrow", "-volume": "deepgrow"}


@dataclass(eq=False)
class Image:
    """Hold one volume that a viewer uploaded.

    name: its id, the caller's own text; sent: the file as it came; grid: its geometry over uint8 pixels
    known: what the bank said about slices, of the bank's state `digest`; saved: whether labels were saved
    """

    name: str
    sent: bytes
    grid: Volume
    stack: Stack
    known: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict)
    digest: str = ""
    saved: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the file, the pixels and the slices' labels, with a mask in work."""
        pixels = self.stack.pixels.nbytes + 2 * int(np.prod(self.stack.shape))
        return len(self.sent) + pixels + sum(a.nbytes for a in self.known.values())

    def target(self, bank: Bank, class_id: int | None, *, through: bool) -> Target:
        """Return a target that shares what is known of the slices, as long as the bank is the same."""
        if self.digest != bank.digest:
            self.known, self.digest = {}, bank.digest
        return Target(self.stack, class_id, through, labels=self.known)


def info(bank: Bank, images: list[Image]) -> dict[str, Any]:
    """Return the answer to GET /info/: the bank as three models."""
    labels = list(bank.classes.values())
    about = {
        "": f"All classes of the template bank {bank.name}",
        "-slice": "Points: the class in one slice",
        "-volume": "Points or a box: the class through the volume",
    }
    models: dict[str, Any] = {
        f"{bank.name}{suffix}": {
            "type": kind,
            "description": about[suffix],
            "labels": labels,
            "dimension": 2 if suffix == "-slice" else 3,
            "config": {},
        }
        for suffix, kind in _KINDS.items()
    }
    return {
        "name": f"VESSA, bank {bank.name}",
        "description": "Segmentation by the templates of a bank",
        "version": "0.8.5",  # of the protocol
        "labels": labels,
        "models": models,
        "trainers": {},
        "strategies": {STRATEGY: {"description": "The volume that would add most to the bank"}},
        "scoring": {},
        "train_stats": {},
        "datastore": {"total": len(images), "completed": sum(image.saved for image in images)},
    }


def suffix_of(model: str, bank: str) -> str:
    """Return which of a bank's models is meant. Raises InvalidRequest."""
    suffix = model.removeprefix(bank) if model.startswith(bank) else "?"
    if suffix not in _KINDS:
        names = ", ".join(f"{bank}{one}" for one in _KINDS)
        raise InvalidRequest(f"There is no model {model[:80]!r}. This address has {names}.")
    return suffix


def drawings(params: Mapping[str, Any], stack: Stack) -> list[Step]:
    """Return the points and the box of a request. Raises InvalidPrompt, InvalidRequest without any."""
    steps = []
    for name, include in (("foreground", True), ("background", False)):
        for place in _list(params.get(name)):
            reverse = place[::-1] if isinstance(place, list) else place
            steps.append(Step([interactions.point(reverse, include, stack.axis, stack.shape)]))
    roi = _list(params.get("roi"))
    if len(roi) == 6:
        pairs = [[min(roi[i : i + 2]), max(roi[i : i + 2]) + 1] for i in (4, 2, 0)]
        steps.append(Step(interactions.box(pairs, True, stack.axis, stack.shape)))
    if not steps:
        raise InvalidRequest("Place a point inside the structure, or a box around it, first.")
    return steps


def class_of(params: Mapping[str, Any], bank: Bank) -> int:
    """Return the id of the class that a request names by its label. Raises UnknownClass."""
    label = params.get("label")
    for key, name in bank.classes.items():
        if name == label:
            return key
    raise UnknownClass(
        f"Bank {bank.name!r} has no class {str(label)[:80]!r}; it has {sorted(bank.classes.values())}."
    )


def present(labels: NDArray[np.uint8], classes: Mapping[int, str]) -> dict[str, int]:
    """Return {class name: value} of what a label map holds: 3D Slicer names its segments in this order."""
    return {classes[int(value)]: int(value) for value in np.unique(labels) if value}


def multipart(params: str, name: str, data: bytes) -> tuple[bytes, str]:
    """Return the body of an answer and its content type: a field `params` and a file `image`."""
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\n'
        f"Content-Type: application/json\r\n\r\n{params}\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return b"".join([head.encode(), data, f"\r\n--{boundary}--\r\n".encode()]), (
        f"multipart/form-data; boundary={boundary}"
    )


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest("foreground, background and roi must be lists.")
    return value
