"""Send valid and invalid requests of the OpenAPI document: each answer is declared there."""

from __future__ import annotations

import io
from typing import Any

import httpx
import numpy as np
import proving
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from vessa.client import AnnotatorClient
from vessa.codec import MEDIA_TYPE, encode
from vessa_server.app import create_app
from vessa_server.settings import Settings

EXAMPLES = 25
VIEWERS = "nninteractive,monailabel,labelstudio"
DOCUMENT = create_app(Settings(api_key="k" * 20, serve_viewers=VIEWERS)).openapi()


def can_be_wrong(about: dict[str, Any]) -> bool:
    """Return whether an operation takes anything except free text."""
    schemas = [parameter["schema"] for parameter in about.get("parameters", ())]
    return "requestBody" in about or any(schema.keys() - {"type", "title"} for schema in schemas)


OPERATIONS = [
    (path, method, mode)
    for path, methods in DOCUMENT["paths"].items()
    if not path.startswith("/nninteractive/{bank}/{name}/")  # the same functions with a class in the address
    for method, about in methods.items()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if mode is GenerationMode.POSITIVE or can_be_wrong(about)
]
# These refuse for what the document cannot say: what is in a file, or a limit of this service's settings.
REFUSING = {(p, m) for p, m, _ in OPERATIONS if "requestBody" in DOCUMENT["paths"][p][m]}
REFUSING.add(("/banks/{bank}/adapt", "post"))
# Bodies and headers of viewers' protocols are defined elsewhere, and the document does not repeat them.
# Without a session the answer is 410, whatever else is wrong.
OF_VIEWERS = {(p, m) for p, m, _ in OPERATIONS if p.split("/")[1] in VIEWERS.split(",")}
BANK = "proving"


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 20), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def tensors(**arrays: Any) -> bytes:
    return encode(arrays, {"bank": BANK, "classes": '{"1": "x"}', "groups": '["p"]'})


FILES = [picture(1), picture(200), picture(1)[:40], b"", b"no picture"]
BODIES = [
    tensors(images=np.zeros((1, 16, 20), np.uint8)),
    tensors(images=np.zeros((1, 16, 20), np.uint8), masks=np.ones((1, 16, 20), np.uint8)),
    encode({"images": np.zeros((2, 16, 20, 3), np.uint8)}, {"bank": BANK}),
    encode({"images": np.zeros((2, 16, 20, 3), np.uint8)}, {"count": "1"}),
    b"",
    b"\xff" * 9,
]
schemathesis.openapi.format("binary", st.sampled_from(FILES) | st.binary(max_size=200))
schemathesis.openapi.media_type(MEDIA_TYPE, st.sampled_from(BODIES) | st.binary(max_size=200))


@schemathesis.serializer(MEDIA_TYPE)
def as_it_is(context: Any, value: Any) -> Any:
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.fixture(scope="module")
def schema(victim: Any) -> Any:
    """The OpenAPI document of the service, with its address."""
    headers = {"Authorization": f"Bearer {victim.api_key}"}
    served = httpx.get(f"{victim.url}/openapi.json", headers=headers).json()
    assert served == DOCUMENT
    loaded = schemathesis.openapi.from_dict(served)
    loaded.config.update(base_url=victim.url, headers=headers)
    return loaded


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_every_answer_is_declared(schema: Any, victim: Any, path: str, method: str, mode: Any) -> None:
    operation = schema[path][method]
    authorized = {"Authorization": f"Bearer {victim.api_key}"}
    unchecked = [positive_data_acceptance] if (path, method) in REFUSING | OF_VIEWERS else []
    unchecked += [negative_data_rejection] if (path, method) in OF_VIEWERS else []

    # with a bank that is there, good requests get further than to "unknown bank"
    there = {"bank": BANK} if "{bank}" in path and mode is GenerationMode.POSITIVE else None
    with AnnotatorClient(victim.url, victim.api_key) as client:
        client.add_templates(
            BANK, [np.zeros((16, 20), np.uint8)], [np.eye(16, 20, dtype=np.uint8)], {1: "x"}, ["p"]
        )

    @proving.settings(EXAMPLES // 3 if (path, method) in OF_VIEWERS else EXAMPLES)
    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=there))
    def check(case: Any) -> None:
        proving.tried["OpenAPI"] += 1
        case.call_and_validate(headers=authorized, excluded_checks=unchecked)

    check()
