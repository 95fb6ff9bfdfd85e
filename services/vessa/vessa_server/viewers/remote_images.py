"""Fetch the images that Label Studio names: from its own address alone, bounded in bytes and time."""

import base64
import binascii
from urllib.parse import urljoin, urlsplit

import httpx

from vessa.errors import InvalidConfig, InvalidImage, InvalidRequest, TooLarge
from vessa_server.settings import Viewers

_FETCH_S = 20.0


async def fetch(address: str, settings: Viewers, most: int) -> bytes:
    """Return the bytes of an image: a data: URL, or a path or URL of the Label Studio of the settings.

    Redirects are not followed: they could lead to any host that this service reaches. Raises InvalidRequest
    for another host, InvalidConfig without a Label Studio, InvalidImage, TooLarge over `most` bytes.
    """
    if address.startswith("data:"):
        return _inline(address, most)
    origin = settings.labelstudio_url.rstrip("/")
    if not origin:
        raise InvalidConfig("Images of Label Studio need VESSA_LABELSTUDIO_URL=http://host:port.")
    url = urljoin(f"{origin}/", address)
    if (urlsplit(url).scheme, urlsplit(url).netloc) != (urlsplit(origin).scheme, urlsplit(origin).netloc):
        raise InvalidRequest(
            "The image lies on another host than VESSA_LABELSTUDIO_URL. Upload it to Label Studio, or have "
            "Label Studio serve it as a local file."
        )
    token = settings.labelstudio_token.get_secret_value()
    headers = {"Authorization": f"Token {token}"} if token else {}
    try:
        async with (
            httpx.AsyncClient(timeout=_FETCH_S, follow_redirects=False, trust_env=False) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise InvalidImage(
                    f"Label Studio answered its image with HTTP {response.status_code}. Check "
                    "VESSA_LABELSTUDIO_TOKEN and the storage of the project."
                )
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > most:
                    raise TooLarge(f"The image has more than {most} bytes, the limit.")
            return bytes(data)
    except (httpx.HTTPError, httpx.InvalidURL):
        raise InvalidImage("Label Studio did not answer its image. Check VESSA_LABELSTUDIO_URL.") from None


def _inline(address: str, most: int) -> bytes:
    head, _, encoded = address.partition(",")
    if not head.endswith(";base64") or len(encoded) > 4 * most // 3 + 4:
        raise InvalidImage("A data: URL of an image must be base64, within the limit of a request body.")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise InvalidImage("The data: URL of an image is damaged.") from None
