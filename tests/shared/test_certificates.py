"""Secure connections: one's own authority is trusted, and each fault is named with what to do."""

import datetime
import http.server
import ipaddress
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vessa.certificates import SETTING
from vessa.client import AnnotatorClient
from vessa.errors import Unreachable

TODAY = datetime.datetime.now(datetime.UTC)


class Answering(http.server.BaseHTTPRequestHandler):
    """An annotator that is ready."""

    def do_GET(self):
        """Answer every request with an empty 200."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Stay silent."""


def certificate(folder, address="127.0.0.1", days=1):
    """Write a self-signed certificate and its key into one PEM file. days: until it expires."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "annotator")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(TODAY - datetime.timedelta(days=9))
        .not_valid_after(TODAY + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{address}-{days}.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """An environment without an authority of its own."""
    monkeypatch.delenv(SETTING, raising=False)


@pytest.fixture
def serve():
    """Run a server, with TLS where a certificate is given; returns its port."""
    servers = []

    def start(pem=None):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        server.handle_error = lambda *_: None  # a refused handshake is what the tests are about
        if pem is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ready(port):
    with AnnotatorClient(f"https://127.0.0.1:{port}", "key", attempts=1) as client:
        return client.ready()


def message_of(port):
    with (
        AnnotatorClient(f"https://127.0.0.1:{port}", "key", attempts=1) as client,
        pytest.raises(Unreachable) as caught,
    ):
        client.info()
    return caught.value.message


def test_a_self_signed_certificate_is_named_and_its_advice_works(serve, tmp_path, monkeypatch):
    pem = certificate(tmp_path)
    port = serve(pem)
    said = message_of(port)
    assert f"no secure connection to the annotator at https://127.0.0.1:{port}" in said
    assert f"not trusted: set {SETTING} to your certificate authority's PEM file" in said
    monkeypatch.setenv(SETTING, str(pem))
    assert ready(port)


def test_another_authority_is_named(serve, tmp_path, monkeypatch):
    port = serve(certificate(tmp_path))
    other = certificate(tmp_path, days=2)
    monkeypatch.setenv(SETTING, str(other))
    assert f"not trusted ({SETTING} is {other})" in message_of(port)


def test_a_certificate_for_another_address_is_no_question_of_trust(serve, tmp_path, monkeypatch):
    pem = certificate(tmp_path, address="10.1.2.3")
    monkeypatch.setenv(SETTING, str(pem))
    said = message_of(serve(pem))
    assert "its certificate is for another name" in said
    assert "127.0.0.1" in said


def test_an_expired_certificate_is_named(serve, tmp_path, monkeypatch):
    pem = certificate(tmp_path, days=-1)
    monkeypatch.setenv(SETTING, str(pem))
    assert "certificate is not valid today (certificate has expired)" in message_of(serve(pem))


def test_https_to_a_server_without_tls_is_named(serve):
    assert "it answers without TLS: use http:// in place of https://" in message_of(serve())


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_without_certificates_is_one_line(content, tmp_path, monkeypatch):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(SETTING, str(path))
    with pytest.raises(Unreachable, match="cannot be read as certificates in PEM format"):
        AnnotatorClient("https://annotator.example", "key")
    AnnotatorClient("http://annotator.example", "key").close()
