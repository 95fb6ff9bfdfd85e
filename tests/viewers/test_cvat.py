"""CVAT's own driver of automatic annotation with our functions. Only its server is replaced: by a list."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vessa.metrics import dice

pytestmark = pytest.mark.viewer
driver = pytest.importorskip("cvat_sdk.auto_annotation.driver", reason="no cvat-sdk")


@pytest.fixture
def function_of(viewers: Any, heart: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a function of the module as cvat-cli does: `function_of(click=...)`."""
    from vessa import cvat

    monkeypatch.setenv("VESSA_API_KEY", viewers.api_key)
    made = []

    def make(**given: str) -> Any:
        made.append(cvat.create(bank=heart, url=viewers.url, **given))
        return made[-1]

    yield make
    for function in made:  # CVAT's processes end with their function
        function.client.close()


def test_cvat_uploads_the_masks_of_a_task(
    function_of: Any, phantoms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cvat_sdk import models
    from cvat_sdk.masks import decode_mask

    phantom = phantoms[-1]
    labels = [
        models.Label(id=10 * key, name=name, type="mask", attributes=[], sublabels=[])
        for key, name in phantom.classes.items()
    ]
    images = [Image.fromarray(image) for image in phantom.image[2:4]]
    samples = [
        SimpleNamespace(
            frame_name=f"{i}.png", frame_index=i, media=SimpleNamespace(load_image=lambda image=image: image)
        )
        for i, image in enumerate(images)
    ]
    dataset = SimpleNamespace(labels=labels, samples=samples)
    monkeypatch.setattr(driver, "TaskDataset", lambda *_, **__: dataset)
    uploads: list[Any] = []
    api = SimpleNamespace(
        update_annotations=lambda _, labeled_data_request: uploads.append(labeled_data_request)
    )
    client = SimpleNamespace(logger=logging.getLogger("cvat"), tasks=SimpleNamespace(api=api))
    driver.annotate_task(client, 1, function_of(), clear_existing=True)
    (sent,) = uploads
    drawn = {(shape.frame, shape.label_id): shape.points for shape in sent.shapes}
    assert {frame for frame, _ in drawn} == {0, 1}
    scores = []
    for (frame, label), points in drawn.items():
        mask = decode_mask(points, image_width=128, image_height=128)
        scores.append(dice(mask, phantom.labels[2 + frame] == label // 10))
    assert np.median([score for score in scores if score is not None]) > 0.5


def test_a_click_draws_its_class(function_of: Any, phantoms: Any) -> None:
    from cvat_sdk.auto_annotation import InteractionFunctionSpec
    from cvat_sdk.masks import decode_mask

    phantom = phantoms[-1]
    labels = phantom.labels[3]
    class_id = int(np.bincount(labels[labels > 0]).argmax())
    function = function_of(click=phantom.classes[class_id])
    assert isinstance(function.spec, InteractionFunctionSpec)
    rows, columns = np.nonzero(labels == class_id)
    box = ((float(columns.min()), float(rows.min())), (float(columns.max() + 1), float(rows.max() + 1)))
    prompts = SimpleNamespace(pos_points=[], neg_points=[(2.0, 2.0)], bounding_box=box)
    pixels = function.preprocess_image(None, Image.fromarray(phantom.image[3]))
    (shape,) = function.detect(None, pixels, prompts)
    mask = decode_mask(shape.points, image_width=128, image_height=128)
    assert (dice(mask, labels == class_id) or 0.0) > 0.5
