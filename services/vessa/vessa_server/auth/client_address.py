"""Find the client's address behind gateways, and check the Host header of a service without keys."""

import socket
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any

from vessa_server.settings import LOOPBACK

Networks = Sequence[IPv4Network | IPv6Network]


def client_address(scope: Mapping[str, Any], trusted: Networks) -> str:
    """Return the client's address: the peer's, or what trusted gateways say in X-Forwarded-For.

    The header is read from its end: each trusted gateway added the address that it saw, and everything
    before the first untrusted address is the client's own invention.
    """
    peer = scope.get("client")
    address = str(peer[0]) if peer else "unknown"
    forwarded = [
        part.strip()
        for name, value in scope.get("headers", ())
        if name == b"x-forwarded-for"
        for part in value.decode("latin-1").split(",")
    ]
    while forwarded and _is_trusted(address, trusted):
        said = forwarded.pop()
        if not _is_address(said):
            break
        address = said
    return address


def is_served_host(header: str | None, bound: str) -> bool:
    """Return whether a Host header names an address that a service bound to `bound` listens on.

    A page of another site can make a browser send requests here under its own host name (DNS rebinding),
    but never under an IP address or `localhost`.
    """
    host = _host_of(header or "")
    if bound in LOOPBACK:
        return host in LOOPBACK or (_is_address(host) and ip_address(host).is_loopback)
    own = {bound.lower(), "localhost", socket.gethostname().lower()}
    if host in own:
        return True
    unspecified = _is_address(bound) and ip_address(bound).is_unspecified
    return bool(unspecified and _is_address(host))


def _host_of(header: str) -> str:
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0] if header.count(":") <= 1 else header


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_trusted(address: str, trusted: Networks) -> bool:
    return _is_address(address) and any(ip_address(address) in network for network in trusted)
