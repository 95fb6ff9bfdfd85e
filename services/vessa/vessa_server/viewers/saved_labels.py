"""Turn a label volume that a person saved in a viewer into templates: a few of its slices."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidImage, InvalidRequest, ShapeMismatch
from vessa.volumes import Volume
from vessa_server.serialization.fields import read_name
from vessa_server.types import TemplateItem
from vessa_server.viewers.stack import Stack

TEMPLATES = 6  # slices of one volume that become templates, besides the largest of each class
_SHIFT = 0.1  # of a voxel that corners of image and label may differ
_MOST = 65535  # the largest value of a label volume


def label_values(label_info: Any, classes: Mapping[int, str]) -> dict[int, str]:
    """Return {value: class name} of a saved label. Raises InvalidRequest.

    label_info: [{"name": "ventricle", "idx": 1}, ...]; without it the values are the bank's class ids
    """
    if label_info is None:
        return dict(classes)
    try:
        pairs = [(int(one["idx"]), read_name(one["name"], "a label's name")) for one in label_info]
    except (TypeError, KeyError, ValueError):
        raise InvalidRequest('label_info must be a list such as [{"name": "ventricle", "idx": 1}].') from None
    wrong = [value for value, _ in pairs if not 0 < value <= _MOST]
    if wrong:
        raise InvalidRequest(f"A label's idx must be 1 to {_MOST}, got {wrong[0]}.")
    return dict(pairs)


def class_ids(names: Mapping[int, str], classes: Mapping[int, str]) -> dict[int, int]:
    """Return {value: class id}; a name that the bank lacks gets the next free id. Raises InvalidRequest."""
    ids = {name: key for key, name in classes.items()}
    for name in names.values():
        if name not in ids:
            ids[name] = max(ids.values(), default=0) + 1
    if max(ids.values(), default=0) > 254:
        raise InvalidRequest("A bank has at most 254 classes. Rename or merge labels.")
    return {value: ids[name] for value, name in names.items()}


def labels_on_grid(label: Volume, image: Volume) -> NDArray[np.int64]:
    """Return a label volume as whole numbers (K, J, I). Raises ShapeMismatch on another grid."""
    corners = np.array([[0, 0, 0, 1], [*image.shape, 1]]).T
    shift = np.abs((label.affine - image.affine) @ corners).max()
    if label.shape != image.shape or shift > _SHIFT * min(image.spacing):
        raise ShapeMismatch(
            f"The label {label.shape} lies on another grid than its image {image.shape}. Export it on the "
            "image's grid."
        )
    values = np.rint(label.voxels)
    if not np.isfinite(values).all() or np.abs(values - label.voxels).max(initial=0) > 1e-3:
        raise InvalidImage("The label volume must hold whole numbers.")
    return values.astype(np.int64).swapaxes(0, 2)


def template_items(
    stack: Stack, labels: NDArray[np.int64], names: Mapping[int, str], ids: Mapping[int, int], group: str
) -> list[TemplateItem]:
    """Return the slices that become templates: the largest of each class, and some evenly between.

    labels: values of the stack's shape; names, ids: class name and class id by value. Raises InvalidRequest
    for a value without a name, InvalidImage for an empty label.
    """
    unknown = sorted({int(v) for v in np.unique(labels) if v} - set(names))
    if unknown:
        raise InvalidRequest(f"The label holds the values {unknown}, which label_info does not name.")
    table = np.zeros(max(names, default=0) + 1, np.uint8)
    for value, class_id in ids.items():
        table[value] = class_id
    masks = np.moveaxis(table[labels], stack.axis, 0)
    areas = {value: (masks == value).sum((1, 2)) for value in sorted(set(ids.values()))}
    labelled = np.flatnonzero(sum(areas.values()))
    if not labelled.size:
        raise InvalidImage("The label is empty. Draw at least one structure before you save it.")
    chosen = {int(area.argmax()) for area in areas.values() if area.any()}
    chosen |= {int(labelled[i]) for i in np.linspace(0, len(labelled) - 1, TEMPLATES).astype(int)}
    by_id = {class_id: names[value] for value, class_id in ids.items()}
    return [
        TemplateItem(
            stack.image(stack.axis, index),
            np.ascontiguousarray(masks[index]),
            {int(v): by_id[int(v)] for v in np.unique(masks[index]) if v},
            group,
        )
        for index in sorted(chosen)
    ]
