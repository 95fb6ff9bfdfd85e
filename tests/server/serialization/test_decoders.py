"""Every decoder on damaged and on arbitrary input: a result or an error of ours, within bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import proving
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scans import dicom_multiframe, dicom_slice, nifti, phantom, written

from vessa.codec import decode, encode
from vessa.errors import VessaError
from vessa.volumes import Bounds, read_volume
from vessa_server.serialization.fields import read_classes, read_per_class, read_strings
from vessa_server.serialization.image_files import decode_image, decode_mask
from vessa_server.serialization.job_request import JOB_FIELDS, read_job
from vessa_server.serialization.multipart import Form, FormStream
from vessa_server.serialization.prompt_arrays import PromptArrays
from vessa_server.serialization.request_parser import SEGMENT_FIELDS, SEGMENT_TENSORS
from vessa_server.serialization.responses import JSON, PNG, choose_type
from vessa_server.serialization.suggest_request import read_candidates
from vessa_server.settings import Settings

GROWTH = 256 * proving.MEGABYTE
PIXELS = 10_000
SMALL = Bounds(voxels=PIXELS, pixels=1_000, slices=8)
CLASSES = {1: "a", 2: "b"}
FORM = "multipart/form-data; boundary=x"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's and Pillow's, about odd values


def picture(kind: str, *shape: int, dtype: Any = np.uint8, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def part(name: str, value: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)


def form(**fields: bytes) -> bytes:
    return b"".join(part(name, value) for name, value in fields.items()) + b"--x--\r\n"


def compressed() -> bytes:
    file = dicom_slice(np.zeros((16, 16)))
    file.compress("1.2.840.10008.1.2.5")  # RLE
    return written(file)


def read_form(data: bytes) -> None:
    read = Form(FORM, data, SEGMENT_FIELDS)
    read.file("image"), read.text("bank", "default"), read.json("boxes")


def read_job_form(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stream = FormStream(
            FORM, JOB_FIELDS, many="image", max_parts=4 + len(JOB_FIELDS), folder=Path(folder)
        )
        for start in range(0, len(data), 50):
            stream.feed(data[start : start + 50])
        read_job(stream.finish())


NIFTI = nifti(phantom(), np.eye(4))
TENSORS = {"images": np.zeros((2, 8, 9), np.uint8), "boxes": np.zeros((2, 2, 4), np.float32)}
DECODERS: dict[str, tuple[Callable[[bytes], Any], list[bytes]]] = {
    "PNG": (
        lambda data: decode_image(data, PIXELS),
        [picture("PNG", 20, 24), picture("PNG", 20, 24, 3), picture("PNG", 20, 24, dtype=np.uint16)],
    ),
    "JPEG": (
        lambda data: decode_image(data, PIXELS),
        [picture("JPEG", 20, 24), picture("JPEG", 20, 24, 3, progressive=True)],
    ),
    "TIFF": (
        lambda data: decode_image(data, PIXELS),
        [picture("TIFF", 20, 24), picture("TIFF", 20, 24, dtype=np.float32)]
        + [picture("TIFF", 20, 24, 3, compression=c) for c in ("jpeg", "tiff_lzw", "tiff_deflate")],
    ),
    "mask": (lambda data: decode_mask(data, (20, 24), PIXELS), [picture("PNG", 20, 24)]),
    "NIfTI": (lambda data: read_volume([data], SMALL), [NIFTI, gzip.compress(NIFTI)]),
    "DICOM": (
        lambda data: decode_image(data, PIXELS),
        [written(dicom_slice(np.zeros((12, 10)))), compressed(), written(dicom_multiframe(phantom()))],
    ),
    "safetensors": (
        lambda data: decode(data, SEGMENT_TENSORS, max_bytes=1 << 20),
        [encode(TENSORS, {"bank": "b", "classes": '["a"]'})],
    ),
    "candidates": (
        lambda data: read_candidates(data, Settings(api_key="k" * 20, max_pixels=PIXELS)),
        [encode({"images": TENSORS["images"]}, {"count": "1", "groups": '["p", null]'})],
    ),
    "form": (read_form, [form(image=b"i", bank=b"b", boxes=b'{"a": [1, 2, 3, 4]}')]),
    "job": (read_job_form, [form(image=NIFTI[:400], classes=b'["a"]', axis=b"axial")]),
}  # fmt: skip
EDGES = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"-1", b"1e309", b"\xff\xda", b"["]


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """A file of one of the seeds with some places overwritten, some bytes put in or left out, or cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 5))):
        # most decisions are made by what stands at the beginning
        reach = draw(st.sampled_from([64, 512, len(data)]))
        at = draw(st.integers(0, min(reach, len(data))))
        value = draw(st.sampled_from(EDGES) | st.binary(min_size=1, max_size=8))
        data[at : at + draw(st.sampled_from([len(value), 0, 16]))] = value
    return bytes(data[: draw(st.sampled_from([len(data), None])) or draw(st.integers(0, len(data)))])


@pytest.mark.parametrize("name", DECODERS)
def test_damage_is_refused_by_an_error_of_ours(name: str) -> None:
    read, seeds = DECODERS[name]
    for seed in seeds:
        with contextlib.suppress(VessaError):  # a file of several frames is one that is refused
            read(seed)

    @proving.settings(150)
    @given(damaged(seeds) | st.binary(max_size=400))
    def check(data: bytes) -> None:
        proving.tried[name] += 1
        with contextlib.suppress(VessaError):
            read(data)

    with proving.grows_at_most(GROWTH):
        check()


NUMBERS = (
    st.floats(-70, 70) | st.integers(-3, 70) | st.sampled_from([1e999, -1e999, float("nan"), 1e38, 2**70])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)
POINTS = st.lists(st.lists(NUMBERS, min_size=2, max_size=2), max_size=4)
BOXES = st.lists(NUMBERS, min_size=4, max_size=4)


def drawn(one: Any) -> Any:
    """Prompts by class name or in the order of the classes, or anything else."""
    return st.dictionaries(st.sampled_from("ab"), one) | st.lists(one, min_size=2, max_size=2) | VALUES


@proving.settings(150)
@given(drawn(BOXES), drawn(POINTS), drawn(st.lists(st.sampled_from([0, 1, -1, 2]), max_size=4)))
def test_json_prompts_become_prompts_within_the_image_or_an_error_of_ours(
    boxes: Any, points: Any, labels: Any
) -> None:
    proving.tried["JSON prompts"] += 1
    texts = [json.loads(json.dumps(value)) for value in (boxes, points, labels)]
    try:
        prompts = PromptArrays(
            read_per_class(texts[0], CLASSES, "boxes", np.float32, (4,)),
            read_per_class(texts[1], CLASSES, "points", np.float32, (None, 2), 64),
            read_per_class(texts[2], CLASSES, "point_labels", np.int8, (None,), 64),
        )
        prompts.check_shapes(1, 2, 64)
        item = prompts.item(0, (48, 64), ("a", "b"))
    except VessaError:
        return
    if item["boxes"] is not None:
        assert ((item["boxes"] == -1).all(-1) | ((item["boxes"] >= 0) & (item["boxes"] <= 64)).all(-1)).all()
    if item["points"] is not None:
        assert ((item["points"] >= 0) & (item["points"] <= 64)).all()


@proving.settings(100)
@given(VALUES, st.text(max_size=40))
def test_json_names_classes_and_the_accept_header(value: Any, text: str) -> None:
    proving.tried["JSON fields"] += 1
    with contextlib.suppress(VessaError):
        assert all(1 <= key <= 254 for key in read_classes(value))
    with contextlib.suppress(VessaError):
        assert all(isinstance(name, str) for name in read_strings(value, "classes", None))
    with contextlib.suppress(VessaError):
        assert choose_type(text, [JSON, PNG]) in {JSON, PNG}
