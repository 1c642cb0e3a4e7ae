# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Addresses: who can reach one, by which names, and a socket there."""

import ipaddress
import socket

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""By which a server is called on its own machine."""
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses of all interfaces, and one where this machine finds them."""


def is_local(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_of(host: str) -> tuple[str, ...]:
    """Return by which names clients may call a server that only this machine reaches."""
    return LOCAL_NAMES if host in LOCAL_NAMES else (*LOCAL_NAMES, host)


def url_of(host: str, port: int) -> str:
    """Return where this machine finds a server."""
    shown = _ANYWHERE.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at this address that does not listen yet; port 0 takes a free one.

    Raises:
        ValueError: it is taken, or there is no such address here.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return _bound(found)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"The server cannot listen at {host}, port {port}: {reason}. Pass another --port, or 0 for a free one."
        ) from error


def _bound(found: tuple) -> socket.socket:
    """Return a socket for what `getaddrinfo` found.

    Raises:
        OSError: it cannot be bound.
    """
    made = socket.socket(*found[:3])
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(found[4])
    except OSError:
        made.close()
        raise
    return made
