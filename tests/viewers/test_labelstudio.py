"""Label Studio's own code reads our brush masks, and we read those that it writes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from vessa.metrics import dice
from vessa_server.viewers import brush

pytestmark = pytest.mark.viewer
CONFIG = """<View><Image name="image" value="$picture"/>
<BrushLabels name="brush" toName="image">{labels}</BrushLabels></View>"""


@pytest.fixture(scope="session")
def converter(load_module: Any) -> Any:
    """`label_studio_sdk.converter.brush`, from the file that `make test-viewers` takes from the SDK."""
    return load_module("VESSA_LABELSTUDIO_BRUSH", "SDK of Label Studio")


def test_its_converter_reads_and_writes_the_same_masks(converter: Any) -> None:
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((48, 65)) < density
        theirs = converter.decode_rle(brush.encode(mask)).reshape(48, 65, 4)[..., 3] > 0
        np.testing.assert_array_equal(theirs, mask)
        written = converter.mask2rle(mask.astype(np.uint8) * 255)
        np.testing.assert_array_equal(brush.decode(written, 48, 65, 10**6), mask)


def test_its_converter_turns_a_prediction_into_the_phantoms_mask(
    converter: Any, viewers: Any, heart: str, phantoms: Any, tmp_path: Path
) -> None:
    phantom = phantoms[-1]
    stream = io.BytesIO()
    Image.fromarray(phantom.image[3]).save(stream, "PNG")
    address = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    labels = "".join(f'<Label value="{name}"/>' for name in phantom.classes.values())
    task = {"id": 5, "data": {"picture": address}}
    answer = httpx.post(
        f"{viewers.url}/labelstudio/{heart}/predict",
        json={"tasks": [task], "label_config": CONFIG.format(labels=labels), "project": "1.2"},
        auth=("anyone", viewers.api_key),
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    prediction = answer.json()["results"][0]
    results = [{**one, "id": str(i)} for i, one in enumerate(prediction["result"])]
    layers = converter.decode_from_annotation("brush", [_as_export(one) for one in results])
    found = {name.split("-")[1]: layer > 0 for name, layer in layers.items()}
    scores = [
        dice(found[name], phantom.labels[3] == key) for key, name in phantom.classes.items() if name in found
    ]
    assert np.median([score for score in scores if score is not None]) > 0.5


def _as_export(region: dict[str, Any]) -> dict[str, Any]:
    """The region as an export of Label Studio has it, with the fields of its value beside the others."""
    return {**region, **region["value"]}
