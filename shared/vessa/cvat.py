"""Functions of CVAT: all classes of a task's images, or one class by clicks, by the templates of a bank.

    cvat-cli task auto-annotate ID --function-module vessa.cvat -p bank=str:heart
    cvat-cli function create-native "ventricle by clicks" --function-module vessa.cvat \
        -p bank=str:heart -p click=str:ventricle

They run on the machine of whoever calls them, which needs the packages `cvat-cli` and `vessa`.
"""

from typing import Any

import numpy as np
import PIL.Image

from vessa.client import Annotation, AnnotatorClient, Prompts
from vessa.errors import BadResponse, InvalidConfig, InvalidRequest, UnknownClass

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def create(
    bank: str = "default", url: str | None = None, group: str | None = None, click: str = ""
) -> "MaskFunction | ClickFunction":
    """Return a function; CVAT calls this with the parameters `-p`.

    bank: template bank, whose classes are the labels
    url: address of the annotator; None takes VESSA_URL. Its key comes from VESSA_API_KEY, or the key file
    group: the patient of the images, whose templates are not used
    click: class to draw by clicks and boxes; empty: all classes, without clicks
    Raises UnknownBank, UnknownClass, Unreachable, and InvalidConfig without CVAT's library.
    """
    client = AnnotatorClient(url)
    return ClickFunction(client, bank, click, group) if click else MaskFunction(client, bank, group)


class MaskFunction:
    """Draw one mask of each class that an image shows. `spec` and `detect` are what CVAT asks for."""

    def __init__(self, client: AnnotatorClient, bank: str, group: str | None = None) -> None:
        """Ask for the bank's classes."""
        cvat = _library()
        self._cvat, self.client, self._bank, self._group = cvat, client, bank, group
        labels = [cvat.label_spec(name, key, type="mask") for key, name in client.bank(bank).classes.items()]
        self.spec = cvat.DetectionFunctionSpec(labels=labels)

    def detect(self, context: Any, image: PIL.Image.Image) -> list[Any]:
        """Return the masks of one image; those whose predicted IoU is below CVAT's threshold are left out."""
        if context.conv_mask_to_poly:
            raise InvalidRequest("VESSA draws masks. Leave out --conv-mask-to-poly.")
        found = self.client.segment_image(_pixels(image), bank=self._bank, group=self._group)
        labels, least = _labels(found), context.conf_threshold or 0.0
        return [
            self._cvat.mask(class_id, _encoded(labels == class_id))
            for class_id, name in found.classes.items()
            if (labels == class_id).any() and found.scores.get(name, 0.0) >= least
        ]


class ClickFunction:
    """Draw one class by clicks and a box. The members are what CVAT asks for."""

    def __init__(self, client: AnnotatorClient, bank: str, name: str, group: str | None = None) -> None:
        """Ask for the bank's classes.

        name: the class that is drawn
        """
        self._cvat, self.client, self._bank, self._group = _library(), client, bank, group
        classes = client.bank(bank).classes
        if name not in classes.values():
            raise UnknownClass(f"Bank {bank!r} has no class {name!r}; it has {sorted(classes.values())}.")
        self._name = name
        self.spec = self._cvat.InteractionFunctionSpec(
            min_pos_points=0, min_neg_points=0, min_bounding_boxes=0
        )

    def preprocess_image(self, context: Any, image: PIL.Image.Image) -> Pixels:
        """Return the pixels of an image."""
        return _pixels(image)

    def detect(self, context: Any, pixels: Pixels, prompts: Any) -> list[Any]:
        """Return the mask that the prompts ask for; none where the class is not found."""
        places = [*prompts.pos_points, *prompts.neg_points]
        box = prompts.bounding_box
        given = Prompts(
            boxes=None if box is None else np.array([[*box[0], *box[1]]], np.float32),
            points=np.array([places], np.float32) if places else None,
            point_labels=_point_labels(prompts) if places else None,
        )
        found = self.client.segment_image(
            pixels, bank=self._bank, classes=[self._name], group=self._group, prompts=given
        )
        mask = _labels(found) > 0
        if not mask.any():
            return []
        return [self._cvat.InteractionResultShape(type="mask", points=_encoded(mask))]


def _point_labels(prompts: Any) -> np.ndarray[Any, np.dtype[np.int8]]:
    return np.array([[1] * len(prompts.pos_points) + [0] * len(prompts.neg_points)], np.int8)


def _library() -> Any:
    try:
        import cvat_sdk.auto_annotation
    except ImportError:
        raise InvalidConfig(
            "This needs CVAT's own library: pip install cvat-cli 'cvat-sdk[masks]'."
        ) from None
    return cvat_sdk.auto_annotation


def _encoded(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> list[float]:
    from cvat_sdk.masks import encode_mask

    points: list[float] = encode_mask(mask)
    return points


def _pixels(image: PIL.Image.Image) -> Pixels:
    return np.asarray(image if image.mode == "L" else image.convert("RGB"))


def _labels(found: Annotation) -> Pixels:
    if found.labels is None:
        raise found.error or BadResponse("The annotator returned neither labels nor an error.")
    return found.labels
