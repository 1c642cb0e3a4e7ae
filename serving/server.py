# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run the application, up to an end that lets those who wait have their answers."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from .app import build_app
from .service import Service


class Server(uvicorn.Server):
    """Serve until a signal comes; then take no more, answer all that was taken, and end.

    A second signal ends it at once.

    Args:
        announce: called once it listens, and takes signals.
    """

    def __init__(self, service: Service, announce: Callable[[], None] | None = None):
        self.service, self.announce = service, announce
        config = uvicorn.Config(
            build_app(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
        )
        super().__init__(config)
        self.draining: asyncio.Task | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.service.worker.start()
        await super().serve(sockets)
        self.service.waiting.close()
        await asyncio.to_thread(self.service.worker.join)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.announce is not None:
            self.announce()

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
