"""`vessa watch` goes on after a power cut, a damaged series and one that takes too long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from vessa.bulk.watch import Journal, Rule, Watcher
from vessa.errors import DeadlineExceeded, InvalidConfig, InvalidImage, NotReady, VessaError
from vessa.volumes.dicomweb import Archive, ArchiveSeries

pytest.importorskip("dicomweb_client", reason="the extra `dicomweb` is not installed")
SLOW, NEXT = (ArchiveSeries("1.2", uid, "MR", "cine", "4") for uid in ("1.2.1", "1.2.2"))


class Shelf:
    """An archive of two series that records what it is given; one of them meets an error."""

    def __init__(self, error: VessaError) -> None:
        self.error, self.stored = error, list[bytes]()

    def series_since(self, date: str) -> list[ArchiveSeries]:
        return [SLOW, NEXT]

    def retrieve(self, study: str, series: str, folder: Path) -> int:
        if series == SLOW.uid:
            raise self.error
        return 1

    def store(self, data: bytes) -> str:
        self.stored.append(data)
        return f"1.2.9.{len(self.stored)}"


class Annotator:
    """An annotator that answers every series."""

    def segment_volume(self, *_: Any, **__: Any) -> bytes:
        return b"seg"


def watcher_of(error: VessaError, path: Path) -> tuple[Shelf, Watcher]:
    """A watcher of that archive, which takes every series."""
    shelf = Shelf(error)
    archive: Any = shelf
    client: Any = Annotator()
    return shelf, Watcher(
        archive, client, Rule(), Journal(path), "bank", None, "20260101", settled=False, say=lambda _: None
    )


@pytest.mark.parametrize("error", [DeadlineExceeded("too long"), InvalidImage("damaged")])
def test_one_series_that_fails_holds_up_no_other(error: VessaError, tmp_path: Path) -> None:
    shelf, watcher = watcher_of(error, tmp_path / "journal")
    assert [line["outcome"] for line in watcher.round()] == ["failed", "stored"]
    assert shelf.stored == [b"seg"]


def test_a_service_that_must_be_waited_for_fails_no_series(tmp_path: Path) -> None:
    _, watcher = watcher_of(NotReady("loading"), tmp_path / "journal")
    with pytest.raises(NotReady):
        list(watcher.round())
    assert not (tmp_path / "journal").exists()


def test_an_unfinished_last_line_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path).write(SLOW, "stored", stored="1.2.9")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"time": "2026')
    journal = Journal(path)
    assert (journal.cut, journal.open(SLOW), journal.open(NEXT)) == (True, False, True)
    journal.write(NEXT, "stored")
    assert [json.loads(line)["series"] for line in path.read_text().splitlines()] == [SLOW.uid, NEXT.uid]
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(InvalidConfig, match="Line 1 of the journal"):
        Journal(path)


@pytest.fixture
def broken() -> Iterator[str]:
    """An archive whose answers are no DICOM, and quote a patient."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"--x\r\nContent-Type: application/dicom\r\n\r\nDOE^JANE\r\n--x--\r\n"
            self.send_response(200)
            self.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary=x')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/dicom-web"
    server.shutdown()
    server.server_close()


def test_a_damaged_answer_of_an_archive_is_an_error_without_its_words(broken: str, tmp_path: Path) -> None:
    with Archive(broken) as archive, pytest.raises(InvalidImage, match="cannot be read") as caught:
        archive.retrieve("1.2", "1.2.1", tmp_path / "series")
    assert "DOE" not in str(caught.value)


def test_credentials_in_the_address_of_an_archive_are_redacted() -> None:
    with Archive("http://user:s3cret@127.0.0.1:1/x") as archive, pytest.raises(VessaError) as caught:
        archive.only_series("1")
    assert "s3cret" not in str(caught.value)
