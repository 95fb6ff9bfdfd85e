"""Decide whether requests go through a proxy of the environment, and name it in errors."""

import ipaddress
from importlib.util import find_spec
from urllib.request import getproxies, proxy_bypass

import httpx

from vessa.errors import Unreachable
from vessa.redaction import redact


def is_loopback(url: str) -> bool:
    """Tell whether an address is this machine: such requests never go through a proxy."""
    host = httpx.URL(url).host
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_of(url: str) -> str | None:
    """Return the proxy that requests to an address go through, without its password; None for none."""
    parsed = httpx.URL(url)
    if is_loopback(url) or proxy_bypass(parsed.host):
        return None
    proxies = getproxies()
    found = proxies.get(parsed.scheme) or proxies.get("all")
    return redact(found) if found else None


def require_usable_proxy(url: str) -> None:
    """Raise Unreachable for a SOCKS proxy whose package is missing."""
    proxy = proxy_of(url)
    if proxy is not None and proxy.lower().startswith("socks") and find_spec("socksio") is None:
        raise Unreachable(
            f"the proxy {proxy} of the environment speaks SOCKS, which needs a package: pip install "
            "'httpx[socks]', "
            f"or set NO_PROXY={httpx.URL(url).host} to reach the annotator directly"
        )


def advice(url: str) -> str:
    """Return the part of an error that names the proxy in use; an empty text for none."""
    proxy = proxy_of(url)
    if proxy is None:
        return ""
    return (
        f". Requests go through the proxy {proxy} of the environment; set NO_PROXY={httpx.URL(url).host} to "
        "reach the "
        "annotator directly"
    )
