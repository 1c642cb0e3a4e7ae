# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run the application: an address, and an end that lets those who wait have their answers."""

import asyncio
import ipaddress
import socket
from typing import Any

import uvicorn

from .app import build_app
from .service import Service

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""By which a server is called on its own machine."""


def is_local(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at this address; port 0 takes a free one.

    Raises:
        ValueError: it is taken, or there is no such address here.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1)
        except OSError:
            found.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"The server cannot listen at {host}, port {port}: {reason}. Pass another --port, or 0 for any that is free."
        ) from error
    return found


class Server(uvicorn.Server):
    """Serves until a signal comes; then it takes no more, answers all that it took, and ends. A second one ends at once.

    Args:
        access_log: whether each request is logged.
    """

    def __init__(self, service: Service, access_log: bool = False):
        self.service = service
        level = "info" if access_log else "critical"
        super().__init__(
            uvicorn.Config(
                build_app(service),
                log_level=level,
                access_log=access_log,
                lifespan="off",
                ws="none",
                server_header=False,
            )
        )
        self.draining: asyncio.Task | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.service.worker.start()
        await super().serve(sockets)
        self.service.waiting.close()
        await asyncio.to_thread(self.service.worker.join)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end; at a second signal, end at once."""
        if self.service.waiting.closed:
            self.service.waiting.cancel()
            self.force_exit = True
            self.should_exit = True
        else:
            self.end()

    def end(self) -> None:
        """Take no more, and end once all is answered. Any thread may call it."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self.service.waiting.close()
        self.draining = asyncio.get_running_loop().create_task(self._end_when_answered())

    async def _end_when_answered(self) -> None:
        await asyncio.to_thread(self.service.worker.join)
        self.should_exit = True
