"""The documents of Label Studio's ML backend: label configurations, prompts in percent, brush regions."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidPrompt, InvalidRequest, TooLarge, UnknownClass
from vessa_server.serialization.fields import read_name
from vessa_server.viewers import brush

_LONGEST_CONFIG = 256 * 1024
_SAVED = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED")
MAX_REGIONS = 256  # brush regions of one annotation


@dataclass(frozen=True)
class LabelConfig:
    """Hold what a project's label configuration says.

    key: of the task's data that holds the image; brush, image: names of the BrushLabels and Image tags
    labels: values of the brush's labels
    """

    key: str
    brush: str
    image: str
    labels: tuple[str, ...]


def read_config(text: Any) -> LabelConfig:
    """Read a label configuration. Raises InvalidRequest when it has no image or no brush."""
    if not isinstance(text, str) or len(text) > _LONGEST_CONFIG:
        raise InvalidRequest(f"label_config must be XML of at most {_LONGEST_CONFIG} characters.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        raise InvalidRequest("label_config is no valid XML.") from None
    image, brush_tag = root.find(".//Image"), root.find(".//BrushLabels")
    if image is None or brush_tag is None:
        raise InvalidRequest("label_config needs an Image and BrushLabels for it.")
    return LabelConfig(
        image.get("value", "").removeprefix("$"),
        brush_tag.get("name", ""),
        brush_tag.get("toName", ""),
        tuple(label.get("value", "") for label in brush_tag.iter("Label")),
    )


def common_classes(config: LabelConfig, classes: Mapping[int, str]) -> list[str]:
    """Return the labels of a project that the bank can draw. Raises UnknownClass when there is none."""
    names = [name for name in classes.values() if name in config.labels]
    if not names:
        raise UnknownClass(
            f"The project's labels {list(config.labels)[:20]} name no class of the bank: "
            f"{sorted(classes.values())}."
        )
    return names


def smart_prompts(
    context: Any, size: tuple[int, int], names: list[str]
) -> tuple[list[str], dict[str, dict[str, list[Any]]]]:
    """Return the class that a person prompts, as a list of one, and its prompts as a form has them.

    context: `params.context` of POST /predict; size: (H, W) px. Raises InvalidPrompt, UnknownClass.
    """
    regions = context.get("result") if isinstance(context, dict) else None
    if not isinstance(regions, list) or not regions:
        raise InvalidPrompt("The context needs a list `result` of keypoints or rectangles.")
    found = [_region(region, size) for region in regions]
    label = found[-1][0]
    if label not in names:
        raise UnknownClass(f"The bank and the project share no class {label[:80]!r}; they share {names}.")
    points = [(place, inside) for name, place, _, inside in found if name == label and place]
    boxes = [box for name, _, box, _ in found if name == label and box]
    drawn: dict[str, dict[str, list[Any]]] = {}
    if points:
        drawn["points"] = {label: [place for place, _ in points]}
        drawn["point_labels"] = {label: [inside for _, inside in points]}
    if boxes:
        low, high = np.min(boxes, 0), np.max(boxes, 0)
        drawn["boxes"] = {label: [*low[:2].tolist(), *high[2:].tolist()]}
    return [label], drawn


def regions(
    config: LabelConfig, labels: NDArray[np.uint8], classes: Mapping[int, str], scores: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a label map as brush regions, one of each class that is present."""
    height, width = labels.shape
    return [
        {
            "from_name": config.brush,
            "to_name": config.image,
            "type": "brushlabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": round(scores.get(name, 0.0), 4),
            "value": {"format": "rle", "rle": brush.encode(labels == class_id), "brushlabels": [name]},
        }
        for class_id, name in classes.items()
        if (labels == class_id).any()
    ]


def is_saved(event: Mapping[str, Any]) -> bool:
    """Return whether a webhook's event says that a person saved an annotation."""
    return event.get("action") in _SAVED


def drawn_mask(
    results: Any, size: tuple[int, int], classes: Mapping[int, str], max_pixels: int
) -> tuple[NDArray[np.uint8], dict[int, str], int]:
    """Return the mask of an annotation's brush regions, its classes, and how many other regions it has.

    size: (H, W) of the image. A label that the bank lacks gets the next free id. Raises InvalidRequest.
    """
    mask, ids, others = np.zeros(size, np.uint8), {name: key for key, name in classes.items()}, 0
    results = results if isinstance(results, list) else []
    if len(results) > MAX_REGIONS:
        raise TooLarge(f"An annotation has {len(results)} regions, the limit is {MAX_REGIONS}. Merge some.")
    for region in results:
        if not isinstance(region, dict) or region.get("type") != "brushlabels":
            others += 1
            continue
        try:
            name, rle = read_name(region["value"]["brushlabels"][0], "a label"), region["value"]["rle"]
            given = int(region["original_height"]), int(region["original_width"])
        except (KeyError, TypeError, ValueError, IndexError):
            raise InvalidRequest("A brush region lacks its label, its rle or its size.") from None
        if given != size:
            raise InvalidRequest(f"A brush region has the size {given}, its image {size}.")
        class_id = ids.setdefault(name, max(ids.values(), default=0) + 1)
        if class_id > 254:
            raise InvalidRequest("A bank has at most 254 classes. Rename or merge labels.")
        mask[brush.decode(rle, *size, max_pixels)] = class_id
    names = {key: name for name, key in ids.items()}
    return mask, {int(v): names[int(v)] for v in np.unique(mask) if v}, others


def _region(
    region: Any, size: tuple[int, int]
) -> tuple[str, tuple[float, float] | None, tuple[float, ...] | None, int]:
    """Return label, point or box in px, and 1 for inside or 0 for outside."""
    height, width = size
    try:
        kind, value = str(region["type"]), region["value"]
        label = str(value[kind][0])
        x, y = float(value["x"]) * width / 100, float(value["y"]) * height / 100
        inside = int(bool(region.get("is_positive", 1)))
        if kind == "keypointlabels":
            return label, (min(x, width), min(y, height)), None, inside
        if kind == "rectanglelabels":
            right = min(x + float(value["width"]) * width / 100, width)
            bottom = min(y + float(value["height"]) * height / 100, height)
            return label, None, (x, y, right, bottom), inside
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise InvalidPrompt("A smart region lacks its label or its place in percent.") from None
    raise InvalidPrompt(f"Smart regions are keypointlabels and rectanglelabels, got {kind[:40]!r}.")
