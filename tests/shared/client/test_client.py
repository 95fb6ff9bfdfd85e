"""Both clients with faults of the network and of the service, on injected transports."""

from __future__ import annotations

import json
import time

import httpx
import numpy as np
import pytest
import stamina

from vessa.client import AnnotatorClient, AsyncAnnotatorClient
from vessa.client.transport import find_key
from vessa.errors import (
    ERRORS,
    BadResponse,
    InternalError,
    InvalidPrompt,
    NotReady,
    QueueFull,
    ShapeMismatch,
    Unauthorized,
    UnknownImage,
    Unreachable,
    VessaError,
)

BANK = {"name": "b", "version": 3, "templates": 1, "groups": ["p"], "classes": {"1": "liver"}}
INFO = {
    "version": "1", "preset": "nano", "model": "m", "device": "cpu", "limits": {}, "banks": [BANK],
    "labels_version": "1", "parts": ["language", "memory"], "trained_on": ["phantoms"],
}  # fmt: skip
TEMPLATE = {"id": "t", "bank": "b", "group": "p", "classes": {"1": "liver"}, "height": 2, "width": 3}


def image(value=0, size=(2, 3)):
    return np.full(size, value, np.uint8)


def failure(status, code, message="what was expected", item=None, **headers):
    body = {"error": {"code": code, "message": message, "item": item}}
    return httpx.Response(status, json=body, headers=headers)


def as_json(result):
    if isinstance(result, list):
        return [as_json(one) for one in result]
    return result and result.model_dump(mode="json", exclude_unset=True)


class Script:
    """Return one response after another, and the last one for ever; raise it if it is an exception."""

    def __init__(self, *answers):
        self.answers, self.requests = answers, []

    def __call__(self, request):
        self.requests.append(request)
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return answer(request)
        # A new response each time: the async client cannot read one that the sync client has read.
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


@pytest.mark.parametrize(
    ("method", "arguments", "answer", "request_line"),
    [
        ("info", (), INFO, "GET /info"),
        ("banks", (), [BANK], "GET /banks"),
        ("bank", ("b",), BANK, "GET /banks/b"),
        ("bank", ("../info",), BANK, "GET /banks/..%2Finfo"),
        ("templates", ("b c",), [TEMPLATE], "GET /templates?bank=b%20c"),
        ("delete_template", ("b", "t/../x"), None, "DELETE /templates/t%2F..%2Fx?bank=b"),
        ("delete_bank", ("b?x=1",), None, "DELETE /banks/b%3Fx%3D1"),
    ],
)
def test_each_method_sends_its_request_with_the_key(ask, method, arguments, answer, request_line):
    script = Script(httpx.Response(200, json=answer))
    result = ask(script, method, *arguments)
    (request,) = script.requests
    assert f"{request.method} {request.url.raw_path.decode().replace('+', '%20')}" == request_line
    assert request.headers["Authorization"] == "Bearer a-key-for-tests-0123456789"
    assert as_json(result) == answer


def test_ready_returns_a_bool_and_is_not_repeated(ask):
    for answer, ready in (
        (httpx.Response(200, json={}), True),
        (failure(503, "not_ready", **{"Retry-After": "1"}), False),
        (httpx.ConnectError("refused"), False),
        (httpx.Response(302), False),
    ):
        script = Script(answer)
        assert ask(script, "ready") is ready
        assert len(script.requests) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_request_that_is_safe_to_repeat_is_repeated(ask, status):
    script = Script(failure(status, "not_ready"), failure(status, "not_ready"), httpx.Response(200, json=[]))
    assert ask(script, "banks") == []
    assert len(script.requests) == 3


def test_a_body_is_the_same_at_each_attempt(ask, segmented):
    script = Script(failure(503, "not_ready"), segmented)
    assert ask(script, "segment", [image(7)], bank="b")[0].labels.max() == 7
    assert script.requests[0].content == script.requests[1].content


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500])
def test_a_permanent_error_is_not_repeated(ask, status):
    script = Script(failure(status, "internal"))
    with pytest.raises(InternalError, match="what was expected"):
        ask(script, "banks")
    assert len(script.requests) == 1


@pytest.mark.parametrize("method", ["delete_bank", "delete_template"])
@pytest.mark.parametrize(
    ("answer", "attempts"),
    [
        (failure(429, "queue_full"), 4),
        (httpx.ConnectError("refused"), 4),
        (httpx.ConnectTimeout("slow"), 4),
        (failure(503, "store_unavailable"), 1),
        (httpx.ReadError("reset"), 1),
        (httpx.RemoteProtocolError("closed"), 1),
    ],
)
def test_a_deletion_is_repeated_only_if_the_first_had_no_effect(ask, method, answer, attempts):
    script = Script(answer)
    with pytest.raises(VessaError):
        ask(script, method, *("b", "t")[: 1 + (method == "delete_template")])
    assert len(script.requests) == attempts


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("x"), httpx.ReadError("x"), httpx.RemoteProtocolError("x"), httpx.WriteError("x")],
)
def test_a_lost_connection_is_retried_and_then_unreachable(ask, error):
    script = Script(error)
    with pytest.raises(Unreachable, match=r"no response from .*//annotator.*vessa-server serve") as caught:
        ask(script, "banks", client={"attempts": 3})
    assert len(script.requests) == 3
    assert caught.value.__cause__ is error or caught.value.__cause__.__cause__ is error
    assert ask(Script(error, httpx.Response(200, json=[])), "banks") == []


@pytest.mark.parametrize("error", [httpx.ReadTimeout("x"), httpx.WriteTimeout("x"), httpx.PoolTimeout("x")])
def test_a_timeout_is_not_repeated(ask, error):
    script = Script(error)
    with pytest.raises(Unreachable, match=r"limit of 7 s .*fewer images"):
        ask(script, "banks", client={"timeout": 7})
    assert len(script.requests) == 1


def test_retry_after_is_waited_for(ask):
    script = Script(failure(429, "queue_full", **{"Retry-After": "0.3"}), httpx.Response(200, json=[]))
    with stamina.set_testing(False):
        start = time.monotonic()
        assert ask(script, "banks") == []
    assert 0.3 <= time.monotonic() - start < 3


def test_a_long_retry_after_is_raised_at_once(ask):
    script = Script(failure(429, "queue_full", **{"Retry-After": "3600", "X-Queue-Position": "17"}))
    with pytest.raises(QueueFull) as caught:
        ask(script, "banks")
    assert (caught.value.retry_after, caught.value.queue_position) == (3600, 17)
    assert len(script.requests) == 1


def test_the_last_attempt_raises_the_services_error(ask):
    script = Script(failure(503, "not_ready", "loading", **{"Retry-After": "1"}))
    with pytest.raises(NotReady, match="loading") as caught:
        ask(script, "banks", client={"attempts": 2})
    assert caught.value.retry_after == 1
    assert len(script.requests) == 2


@pytest.mark.parametrize("code", sorted(set(ERRORS) - {"unreachable", "bad_response"}))
def test_each_error_is_raised_as_its_own_class(ask, code):
    with pytest.raises(ERRORS[code], match="what was expected") as caught:
        ask(Script(failure(ERRORS[code].status, code)), "banks", client={"attempts": 1})
    assert type(caught.value) is ERRORS[code]


def test_an_error_of_a_newer_service_keeps_its_code(ask):
    with pytest.raises(InternalError, match="too_clever: what was expected"):
        ask(Script(failure(418, "too_clever")), "banks")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>a proxy's page</html>"),
        httpx.Response(200, json={"not": "a list"}),
        httpx.Response(200, content=b""),
        httpx.Response(404, text="nginx"),
        httpx.Response(500, json={"detail": "another program"}),
        httpx.Response(302, headers={"Location": "http://elsewhere"}),
        httpx.Response(502, text="bad gateway"),
        httpx.DecodingError("gzip"),
        httpx.TooManyRedirects("x"),
    ],
)
def test_responses_of_other_programs_are_bad_responses(ask, answer):
    with pytest.raises(BadResponse):
        ask(Script(answer), "banks")


def test_a_status_500_is_repeated_only_from_a_proxy(ask):
    answered = httpx.Response(200, json=[])
    assert ask(Script(httpx.Response(500, text="the actor died"), answered), "banks") == []
    script = Script(failure(500, "internal"), answered)
    with pytest.raises(InternalError):
        ask(script, "banks")
    assert len(script.requests) == 1


def test_item_numbers_are_those_of_the_callers_list(ask, segmented):
    images = [image(0), image(1, (5, 5)), image(2), image(3, (5, 5))]

    def second_of_its_request(request):
        tall = b"[2,5,5]" in request.content.replace(b" ", b"")
        return failure(422, "invalid_prompt", item=1) if tall else segmented(request)

    with pytest.raises(InvalidPrompt) as caught:
        ask(second_of_its_request, "segment", images, bank="b")
    assert caught.value.item == 3
    with pytest.raises(ShapeMismatch) as caught:
        ask(Script(failure(422, "shape_mismatch", item=99)), "segment", images, bank="b")
    assert caught.value.item == 99  # not an index of the request: left unchanged


def test_a_failed_item_has_its_error_and_the_others_have_none(ask, segmented):
    def one_fails(request):
        error = {"code": "unknown_image", "message": "send its pixels", "item": 1}
        items = [{"status": "ok", "image_id": str(i)} for i in range(3)]
        items[1] = {"status": "error", "image_id": "1", "error": error}
        return segmented(request, items=items)

    first, second, third = ask(one_fails, "segment", image_ids=["x", "y", "z"], bank="b")
    assert isinstance(second.error, UnknownImage)
    assert (second.error.item, second.labels, second.confidence) == (1, None, None)
    assert first.error is third.error is None
    assert first.labels.shape == third.labels.shape == (2, 3)


def test_many_images_become_several_requests_and_keep_their_order(ask, segmented, sent):
    images = [image(i, (2 + i % 2, 3)) for i in range(90)]
    script = Script(segmented)
    answers = ask(script, "segment", images, bank="b", groups=[f"p{i}" for i in range(90)])
    assert [int(a.labels.max()) for a in answers] == list(range(90))
    assert [a.labels.shape for a in answers] == [i.shape for i in images]
    counts = [len(sent(request)[0]["images"]) for request in script.requests]
    assert sorted(counts) == [13, 13, 32, 32]
    for request in script.requests:
        tensors, metadata = sent(request)
        assert metadata["groups"] == [f"p{i}" for i in tensors["images"][:, 0, 0]]


def test_many_templates_become_several_requests_and_keep_their_order(ask, sent):
    images = [image(i, (2 + i % 2, 3)) for i in range(40)]

    def add(request):
        tensors, metadata = sent(request)
        assert metadata["classes"] == {"1": "liver"}
        rows = zip(tensors["images"], metadata["groups"], strict=True)
        found = [{**TEMPLATE, "id": str(i[0, 0]), "group": g} for i, g in rows]
        return httpx.Response(201, content=json.dumps({"templates": found}))

    masks = [np.ones_like(i) for i in images]
    groups = [f"p{i}" for i in range(40)]
    infos = ask(add, "add_templates", "b", images, masks, {1: "liver"}, groups)
    assert [(t.id, t.group) for t in infos] == [(str(i), f"p{i}") for i in range(40)]
    none = Script(httpx.Response(201, json={"templates": []}))
    with pytest.raises(BadResponse, match="returned 0 items for 1"):
        ask(none, "add_templates", "b", images[:1], masks[:1], {1: "liver"}, groups[:1])


def test_empty_lists_send_nothing(ask):
    script = Script(httpx.Response(500))
    assert ask(script, "segment", [], bank="b") == []
    assert ask(script, "add_templates", "b", [], [], {1: "liver"}, []) == []
    assert script.requests == []


@pytest.mark.parametrize("client", [AnnotatorClient, AsyncAnnotatorClient])
def test_bad_arguments_of_a_client_are_named(client):
    for wrong in ({"timeout": 0}, {"attempts": 0}, {"wait_initial": -1}):
        with pytest.raises(ValueError, match="expected timeout > 0"):
            client("http://annotator", "k", **wrong)
    with pytest.raises(Unreachable, match="expected http://host:port"):
        client("http://host:port", "k")
    for key in ("schlüssel", "two\nlines"):
        with pytest.raises(Unauthorized, match="copy it again"):
            client("http://annotator", key)


@pytest.mark.parametrize("url", ["annotator:8700", "ftp://annotator", "/no/host"])
def test_an_address_without_http_is_named(url):
    with AnnotatorClient(url, "k") as client, pytest.raises(Unreachable, match="expected http://host:port"):
        client.banks()


def test_address_and_key_are_looked_up(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("VESSA_API_KEY", raising=False)
    monkeypatch.setenv("VESSA_URL", "http://elsewhere:1/")
    assert find_key() is None
    with AnnotatorClient() as client:
        assert client.url == "http://elsewhere:1"
        assert "Authorization" not in client._http.headers
    (tmp_path / "vessa").mkdir()
    (tmp_path / "vessa" / "api-key").write_text("from-the-file\n")
    assert find_key() == "from-the-file"
    monkeypatch.setenv("VESSA_API_KEY", "from-the-environment")
    assert find_key() == "from-the-environment"
    monkeypatch.delenv("VESSA_API_KEY")
    (tmp_path / "vessa" / "api-key").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Unauthorized, match="copy it again"):
        AnnotatorClient()
