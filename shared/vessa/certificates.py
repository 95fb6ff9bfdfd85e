"""Trust one's own certificate authority, and say what is wrong with a secure connection."""

import os
import re
import ssl
from typing import Any

import httpx

from vessa.errors import Unreachable

SETTING = "SSL_CERT_FILE"  # as OpenSSL, curl and httpx name it


def verification(url: str) -> dict[str, Any]:
    """Return httpx's option that trusts the certificates in SSL_CERT_FILE, also on this machine.

    Empty where the variable is not set. Raises Unreachable when the file holds no certificates.
    """
    if httpx.URL(url).scheme != "https":
        # A context that trusts nobody: httpx would read the file, which an address without TLS does not need.
        return {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}
    path = os.environ.get(SETTING)
    if not path:
        return {}
    try:
        return {"verify": ssl.create_default_context(cafile=path)}
    except (OSError, ssl.SSLError) as error:
        raise Unreachable(
            f"{SETTING} is {path}, which cannot be read as certificates in PEM format. Set it to the file of "
            "your certificate authority, or unset it"
        ) from error


def tls_advice(error: BaseException) -> str | None:
    """Return what to do about a failed handshake; None for errors that are not of TLS."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = _reason(text)
        if "mismatch" in reason or "not valid for" in reason:
            return f"its certificate is for another name ({reason}): use the address that it names"
        if "expired" in reason or "not yet valid" in reason:
            return f"its certificate is not valid today ({reason}): renew it, or correct this machine's clock"
        own = os.environ.get(SETTING)
        used = f" ({SETTING} is {own})" if own else ""
        return f"its certificate is not trusted{used}: set {SETTING} to your certificate authority's PEM file"
    if "WRONG_VERSION_NUMBER" in text or "wrong version number" in text.lower():
        return "it answers without TLS: use http:// in place of https://"
    if "[SSL" in text:
        return f"the handshake failed ({_reason(text)}): check its certificate and the versions of TLS"
    return None


def _reason(text: str) -> str:
    """Return OpenSSL's words without its codes and file positions."""
    return re.sub(r"^\[.*?\]\s*|\s*\(_ssl\.c:\d+\)", "", text).removeprefix("certificate verify failed: ")
