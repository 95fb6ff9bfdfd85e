"""Proxies of the environment: never used for this machine, and named where they fail."""

import http.server
import threading

import pytest

from vessa.client import AnnotatorClient
from vessa.client.proxies import is_loopback, proxy_of
from vessa.errors import BadResponse, Unreachable

VARIABLES = (
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """An environment without proxies."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A proxy that refuses everything and counts what it is asked."""

    asked: list[str] = []

    def do_GET(self):
        """Refuse."""
        self.asked.append(self.path)
        self.send_response(403)
        self.end_headers()

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def proxy(monkeypatch):
    """Address of a running proxy, in the environment."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Refusing.asked.clear()
    url = f"http://user:s3cret-word@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("http_proxy", url)
    yield url
    server.shutdown()
    server.server_close()


def test_this_machine_is_reached_directly(proxy, port):
    with (
        AnnotatorClient(f"http://127.0.0.1:{port}", "key", attempts=1) as client,
        pytest.raises(Unreachable) as caught,
    ):
        client.info()
    assert Refusing.asked == []
    assert "proxy" not in caught.value.message


def test_a_proxy_that_answers_is_named_with_the_way_round_it(proxy):
    with (
        AnnotatorClient("http://annotator.example:8700", "key", attempts=1) as client,
        pytest.raises(BadResponse) as caught,
    ):
        client.info()
    assert Refusing.asked
    assert "through the proxy http://***@127.0.0.1" in caught.value.message
    assert "NO_PROXY=annotator.example" in caught.value.message
    assert "s3cret-word" not in caught.value.message


def test_a_socks_proxy_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1080")
    monkeypatch.setattr("vessa.client.proxies.find_spec", lambda _: None)
    with pytest.raises(
        Unreachable, match=r"speaks SOCKS.*pip install 'httpx\[socks\]'.*NO_PROXY=annotator.example"
    ):
        AnnotatorClient("http://annotator.example:8700", "key")
    AnnotatorClient("http://127.0.0.1:8700", "key").close()


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:1", True),
        ("http://[::1]:1", True),
        ("http://127.9.9.9", True),
        ("http://10.0.0.1", False),
    ],
)
def test_loopback_is_recognised(url, here):
    assert is_loopback(url) == here


def test_no_proxy_is_honoured(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert proxy_of("http://annotator.example") == "http://proxy.example:3128"
    monkeypatch.setenv("no_proxy", "annotator.example")
    assert proxy_of("http://annotator.example") is None
