"""Test what operators observe: metrics, JSON logs, traces from the client, loading progress."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vessa.client import AsyncAnnotatorClient
from vessa.errors import InvalidConfig
from vessa_server.observability import metrics, trace_export
from vessa_server.observability.logs import JsonFormatter, log_to_stderr
from vessa_server.settings import Settings

IMAGE = np.full((1, 48, 64), 90, np.uint8)


@pytest.fixture(scope="module")
def provider() -> TracerProvider:
    """The one tracer provider that a process may set."""
    found = TracerProvider()
    trace.set_tracer_provider(found)
    return found


@pytest.fixture
def spans(provider: TracerProvider) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter
    exporter.shutdown()


def metrics_of(server: Any) -> dict[str, float]:
    lines = server.http.get("/metrics").text.splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")
    }


def test_metrics_tell_stages_memory_and_errors_by_code(server: Any, bank: str) -> None:
    server.seed(bank)
    before = metrics_of(server)
    assert server.segment({"images": IMAGE ^ 1}, bank=bank).status_code == 200  # not seen before
    assert server.segment({"images": IMAGE}, bank="nothing").status_code == 404
    assert server.segment({}, bank=bank, image_ids='["sha256:0"]').status_code == 200  # its item failed
    after = metrics_of(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    for stage in ("encode", "retrieve", "fuse"):
        assert grown(f'vessa_stage_seconds_total{{stage="{stage}"}}') > 0
    assert grown('vessa_errors_total{code="unknown_bank"}') == 1
    assert grown('vessa_errors_total{code="unknown_image"}') == 1
    assert after['vessa_bytes{where="features"}'] > 0
    assert grown("vessa_batch_items_count") >= 1
    assert "vessa_queue_depth" in after
    assert (
        'vessa_image_features_total{held="yes"}' in after or 'vessa_image_features_total{held="no"}' in after
    )


def test_a_trace_that_begins_at_the_client_goes_on_in_the_service(
    server: Any, bank: str, spans: InMemorySpanExporter
) -> None:
    server.seed(bank)
    spans.clear()

    async def ask() -> Any:
        transport = httpx.ASGITransport(server.app)
        async with AsyncAnnotatorClient("http://test", server.settings.key, transport=transport) as client:
            return await client.segment(list(IMAGE), bank=bank)

    with trace.get_tracer("trainer").start_as_current_span("step") as step:
        assert asyncio.run(ask())[0].error is None
        wanted = step.get_span_context()
    found = {span.name: span for span in spans.get_finished_spans()}
    request, device = found["POST /segment"], found["device"]
    assert request.context.trace_id == device.context.trace_id == wanted.trace_id
    assert request.parent is not None
    assert request.parent.span_id == wanted.span_id
    assert request.kind is trace.SpanKind.SERVER
    assert device.attributes == {"images": 1}


def test_a_request_without_a_trace_begins_its_own(server: Any, spans: InMemorySpanExporter) -> None:
    server.http.get("/info", headers={"traceparent": "nonsense"})
    (request,) = [span for span in spans.get_finished_spans() if span.name == "GET /info"]
    assert request.parent is None


def test_export_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidConfig, match=r"vessa-server\[otel\]"):
        trace_export.export_traces()


def test_a_log_line_is_one_json_object_with_its_request() -> None:
    record = logging.LogRecord("vessa", logging.ERROR, "", 0, "line\n%s", ("two",), None)
    record.request, record.key = "r1", "alice"
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"], line["request"], line["key"]) == (
        "line\ntwo",
        "error",
        "r1",
        "alice",
    )
    assert "ValueError: why" in line["exception"]


def test_a_request_id_is_taken_if_plain_and_is_in_the_answer_and_the_error(server: Any) -> None:
    answer = server.http.get("/banks/none", headers={"X-Request-ID": "from.the-caller_1"})
    assert answer.headers["X-Request-ID"] == "from.the-caller_1"
    assert answer.json()["error"]["request_id"] == "from.the-caller_1"
    for bad in ("", "a b", "x" * 65, "é", "a\tb"):
        given = server.http.get("/banks/none", headers={"X-Request-ID": bad.encode()})
        assert metrics.REQUEST_ID.fullmatch(given.headers["X-Request-ID"])
        assert given.headers["X-Request-ID"] == given.json()["error"]["request_id"] != bad


def test_readyz_tells_how_far_loading_is(server_of: Any) -> None:
    go_on = threading.Event()

    def slow(settings: Settings, banks: Any) -> Any:
        go_on.wait(60)
        raise InvalidConfig("enough")

    server = server_of(Settings(insecure=True), wait=False, worker_factory=slow)
    try:
        for _ in range(200):
            error = server.http.get("/readyz").json()["error"]
            if "loading weights" in error["message"]:
                break
        assert error["code"] == "not_ready"
        assert "loading weights 'nano'" in error["message"]
    finally:
        go_on.set()


@pytest.mark.parametrize("form", ["json", "text"])
def test_log_lines_and_tracebacks_hold_no_password(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    log_to_stderr(Settings(log_format=form))
    try:
        raise OSError("cannot connect to redis://vessa:s3cret@redis:6379/0")
    except OSError:
        logging.getLogger("x").exception("Redis failed at %s", "redis://vessa:s3cret@redis:6379/0")
    written = capsys.readouterr().err
    assert "s3cret" not in written
    assert written.count("redis://***@redis:6379/0") >= 2


def test_messages_and_warnings_of_file_readers_are_withheld(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    log_to_stderr(Settings())
    logging.getLogger("highdicom.base").error("Invalid PN value %r", "DOE^JANE")
    warnings.showwarning(UserWarning("DOE^JANE"), UserWarning, "/lib/pydicom/valuerep.py", 12)
    written = capsys.readouterr().err
    assert "DOE" not in written
    assert "a message of highdicom is withheld" in written
    assert "UserWarning raised at valuerep.py:12" in written


def test_addresses_of_fetched_images_and_configured_secrets_stay_out_of_the_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name in ("httpx", "httpcore"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    log_to_stderr(Settings(labelstudio_token="token-of-label-studio", log_level="debug"))
    logging.getLogger("httpx").info("HTTP Request: GET http://labels/data/DOE_JANE.png")
    logging.getLogger("httpcore.http11").debug("target=/data/DOE_JANE.png")
    logging.getLogger("x").error("header Token token-of-label-studio")
    written = capsys.readouterr().err
    assert "DOE_JANE" not in written
    assert "token-of-label-studio" not in written
    assert "header Token ***" in written


def test_the_access_log_names_key_bank_and_address(
    server: Any, bank: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.seed(bank)
    with caplog.at_level(logging.INFO, "vessa_server.access"):
        server.http.get(f"/banks/{bank}")
        server.http.get("/banks/none", headers={"Authorization": "Bearer wrong"})
    records = [record for record in caplog.records if record.name == "vessa_server.access"]
    lines = [line for record in records if " GET " in (line := record.getMessage())]
    assert "testclient GET /banks/{bank} 200 in " in lines[0]
    assert lines[0].endswith(f"bank {bank}")
    assert " 401 in " in lines[1]
