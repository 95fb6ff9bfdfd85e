"""Send small bodies that claim large sizes: each is refused, and the service hardly grows."""

from __future__ import annotations

import gzip
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import numpy as np
import proving
import pytest
from PIL import Image
from scans import dicom_slice, nifti, written

from vessa.client import AnnotatorClient
from vessa.codec import MEDIA_TYPE

GROWTH = 192 * proving.MEGABYTE  # bodies have at most 8 MiB here, the decoded image 16 million pixels
SIZE = (48, 64)


@pytest.fixture(scope="module")
def bank(victim: Any) -> str:
    """A bank for requests; first-time allocations are done."""
    mask = np.zeros(SIZE, np.uint8)
    mask[8:20, 8:20] = 1
    with AnnotatorClient(victim.url, victim.api_key) as client:
        client.add_templates("bombs", [mask * 100], [mask], {1: "square"}, ["p"])
        client.segment([mask], bank="bombs")
    return "bombs"


def picture(array: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, *extra: bytes, pixels: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    middle = b"".join(extra) + chunk(b"IDAT", pixels or zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IEND", b"")


def tiff(height: int, width: int) -> bytes:
    data = bytearray(picture(np.zeros((4, 4), np.uint8), "TIFF"))
    count = struct.unpack_from("<H", data, start := struct.unpack_from("<I", data, 4)[0])[0]
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag = struct.unpack_from("<H", data, place)[0]
        if tag in (256, 257):
            struct.pack_into("<HII", data, place + 2, 4, 1, width if tag == 256 else height)
    return bytes(data)


def endless_tiff() -> bytes:
    """Return a TIFF with frames in a circle: the last one points to the first."""
    file = io.BytesIO()
    first, second = (Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (1, 2))
    first.save(file, "TIFF", save_all=True, append_images=[second])
    data = bytearray(file.getvalue())
    start = struct.unpack_from("<I", data, 4)[0]
    link = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    second_start = struct.unpack_from("<I", data, link)[0]
    link = second_start + 2 + 12 * struct.unpack_from("<H", data, second_start)[0]
    struct.pack_into("<I", data, link, start)
    return bytes(data)


def jpeg_of_many_scans(count: int) -> bytes:
    """Return a progressive JPEG with many scans over its 16 million pixels."""
    data = picture(np.zeros((4096, 4096), np.uint8), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def dicom(**values: Any) -> bytes:
    return written(dicom_slice(np.zeros((4, 4)), **values))


LARGE, FEW = bytes(64 << 20), zlib.compress(bytes(20))
BOMBS = {
    "PNG of 30000 x 30000": (png(30000, 30000), "too_large"),
    "PNG of 2 thousand million a side": (png(2**31 - 1, 2**31 - 1), "too_large"),
    "PNG of 3 x 16777216": (png(3, 1 << 24, pixels=zlib.compress(bytes(3 * ((1 << 24) + 1)))), "too_large"),
    "PNG of 12000 x 3": (picture(np.zeros((12000, 3), np.uint8)), "too_large"),
    "PNG of 12000 x 1": (picture(np.zeros((12000, 1), np.uint8)), "invalid_image"),
    "PNG with 64 MiB of pixels for 4 x 4": (png(4, 4, pixels=zlib.compress(LARGE)), None),
    "PNG with 64 MiB of text": (
        png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(LARGE)), pixels=FEW), "invalid_image"
    ),
    "PNG with 64 MiB of profile": (
        png(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(LARGE)), pixels=FEW), "invalid_image"
    ),
    "TIFF of 60000 x 60000": (tiff(60000, 60000), "too_large"),
    "TIFF without end": (endless_tiff(), "invalid_image"),
    "JPEG of 1000 scans": (jpeg_of_many_scans(1000), "invalid_image"),
    "DICOM of 60000 x 60000": (dicom(Rows=60000, Columns=60000), "too_large"),
    "DICOM of 2 thousand million frames": (dicom(NumberOfFrames=2_000_000_000), "invalid_image"),
}  # fmt: skip


def code(answer: httpx.Response) -> str | None:
    """Return the error's code, None for an answer; fail on a fault of the service."""
    assert answer.status_code < 500, answer.text
    return None if answer.is_success else answer.json()["error"]["code"]


@pytest.fixture
def http(victim: Any) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {victim.api_key}"}
    with httpx.Client(base_url=victim.url, headers=headers, timeout=120) as client:
        yield client


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_bomb_does_not_go_off(victim: Any, http: Any, bank: str, name: str) -> None:
    data, expected = BOMBS[name]
    proving.tried["bombs"] += 2
    with proving.grows_at_most(GROWTH, victim.process.pid):
        files = {"image": ("i", data)}
        assert code(http.post("/segment", files=files, data={"bank": bank})) == expected
        mask = {"mask": ("m", picture(np.ones((4, 4), np.uint8)))}
        about = {"bank": "bombs-2", "classes": '{"1": "x"}', "group": "p"}
        refused = code(http.post("/templates", files=files | mask, data=about))
        assert (refused is None) == (expected is None)
    assert http.get("/readyz").status_code == 200


def claimed(shape: Iterable[int]) -> bytes:
    """Return a safetensors body whose header claims images of a shape, followed by only a few bytes."""
    shape = list(shape)
    size = int(np.prod([float(side) for side in shape]))
    header = json.dumps({"images": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(100)


def test_a_safetensors_bomb_does_not_go_off(victim: Any, http: Any) -> None:
    many = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(15000)})
    bodies = [
        claimed((1, 1 << 30, 1 << 30)),
        claimed((1 << 40, 1, 1)),
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 1 << 20) + b"[" * (1 << 20),
        struct.pack("<Q", len(many)) + many.encode(),
        struct.pack("<Q", 1 << 19) + (b'{"__metadata__":{"a":"' + b"x" * (1 << 19))[: 1 << 19],
    ]
    with proving.grows_at_most(GROWTH, victim.process.pid):
        for path in ("/segment", "/templates", "/banks/b/suggest"):
            for body in bodies:
                proving.tried["bombs"] += 1
                answer = http.post(path, content=body, headers={"Content-Type": MEDIA_TYPE})
                assert code(answer) == "malformed_body"


def test_a_volume_bomb_does_not_go_off(victim: Any, http: Any, bank: str) -> None:
    small = bytearray(nifti(np.zeros((4, 4, 4), np.uint8), np.eye(4)))
    struct.pack_into("<hhh", small, 42, 30000, 30000, 30000)
    volumes = [
        (bytes(small), "too_large"),
        (gzip.compress(bytes(small[:352]) + LARGE), "too_large"),
        (gzip.compress(nifti(np.zeros((4, 4, 4), np.uint8), np.eye(4)) + LARGE), None),
        (gzip.compress(gzip.compress(LARGE)), "invalid_image"),
        (dicom(NumberOfFrames=2_000_000_000), "too_large"),
    ]
    with proving.grows_at_most(GROWTH, victim.process.pid):
        for data, expected in volumes:
            proving.tried["bombs"] += 1
            assert code(http.post("/jobs", files={"image": ("i", data)}, data={"bank": bank})) == expected


def test_zeros_that_inflate_to_a_volume_are_read_beside_the_service(
    victim: Any, http: Any, bank: str
) -> None:
    """60 MiB of zeros are 60 kB. A child process inflates them; the service maps its array without a copy.

    The kernel counts mapped pages: 4 bytes a voxel of the child's array, 1 of the slices that go to disk.
    """
    voxels = 256 * 256 * 480
    head = bytearray(nifti(np.zeros((4, 4, 4), np.int16), np.eye(4))[:352])
    struct.pack_into("<hhh", head, 42, 256, 256, 480)
    data = gzip.compress(bytes(head) + bytes(voxels * 2))
    assert len(data) < 100_000
    proving.tried["bombs"] += 2
    with proving.grows_at_most(6 * voxels, victim.process.pid):
        answer = http.post("/jobs", files={"image": ("i", data)}, data={"bank": bank})
        assert code(answer) in (None, "too_large")
        if answer.is_success:
            assert http.delete(f"/jobs/{answer.json()['id']}").status_code == 204
        assert (
            code(http.post("/segment", files={"image": ("i", data)}, data={"bank": bank})) == "invalid_image"
        )
    assert http.get("/readyz").status_code == 200


def test_the_upload_of_a_job_goes_to_disk(annotator: Any) -> None:
    proving.tried["bombs"] += 1
    size = 64 * proving.MEGABYTE
    headers = {"Authorization": f"Bearer {annotator.api_key}"}
    with (
        httpx.Client(base_url=annotator.url, headers=headers, timeout=240) as client,
        proving.grows_at_most(size * 3 // 4, annotator.process.pid),
    ):
        answer = client.post("/jobs", files={"image": ("i", b"no volume" + bytes(size))}, data={"bank": "b"})
        assert code(answer) in ("unknown_bank", "invalid_image")


def test_a_form_and_prompts_that_grow_when_they_are_read_are_refused(
    victim: Any, http: Any, bank: str
) -> None:
    image = {"image": ("i", picture(np.zeros(SIZE, np.uint8)))}
    deep, long = "[" * 900_000, "[" + "[0,0]," * 170_000 + "[0,0]]"
    fields = [{"boxes": deep}, {"points": f'{{"square": {long}}}', "point_labels": '{"square": [1]}'}]
    fields += [
        {"classes": json.dumps(["x" * 100] * 9000)},
        {"points": "1" * 1_000_000},
        {"seed": "9" * 100_000},
    ]
    with proving.grows_at_most(GROWTH, victim.process.pid):
        for field in fields:
            proving.tried["bombs"] += 1
            answer = http.post("/segment", files=image, data={"bank": bank} | field)
            assert code(answer) in {"invalid_request", "invalid_prompt", "unknown_class"}
        parts = {f"f{i}": ("f", b"") for i in range(50_000)}
        assert code(http.post("/segment", files=parts)) == "malformed_body"


def send(service: Any, head: str, parts: Iterable[bytes] = (), seconds: float = 60) -> bytes:
    """Send a request until it is refused; return the answer, or nothing when the connection was closed."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        try:
            connection.sendall(head.encode())
            for part in parts:
                connection.sendall(part)
        except OSError:
            pass
        try:
            return connection.recv(1 << 16)
        except OSError:
            return b""


BLOCK = b"a" * 60000
HEAD = "GET /livez HTTP/1.1\r\nHost: x\r\n"
UPLOAD = f"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA_TYPE}\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("head", "block", "status"),
    [
        (HEAD, b"X: " + BLOCK + b"\r\n", b"400"),
        (HEAD + "X: ", BLOCK, b"400"),
        ("GET /livez?", BLOCK, b"400"),
        (UPLOAD + "\r\n", b"ea60\r\n" + BLOCK + b"\r\n", b"401"),
        (UPLOAD + "Authorization: Bearer {key}\r\n\r\n", b"ea60\r\n" + BLOCK + b"\r\n", b"413"),
    ],
    ids=["headers", "a header", "an address", "a body without a key", "a body"],
)  # fmt: skip
def test_a_request_without_end_is_cut_off(victim: Any, head: str, block: bytes, status: bytes) -> None:
    proving.tried["bombs"] += 1
    with proving.grows_at_most(64 * proving.MEGABYTE, victim.process.pid):
        answer = send(victim, head.replace("{key}", victim.api_key), (block for _ in range(5000)))
    assert answer[9:12] in {status, b""}  # nothing: it hung up while more came
    assert httpx.get(f"{victim.url}/livez").status_code == 200


@pytest.mark.parametrize("head", ["", "GET /livez HTTP/1.1\r\nHost"])
def test_a_request_that_does_not_come_is_hung_up_on(victim: Any, head: str) -> None:
    proving.tried["slow requests"] += 1
    host, port = victim.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1) == b""  # after 2 s here; without a bound this would raise TimeoutError
