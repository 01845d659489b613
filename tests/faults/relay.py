"""A relay of TCP connections that can be turned to another place in a moment, as a service that fails over.

Covers plain TCP on the loopback. Knows nothing of what it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any


class Relay:
    """Listens on the loopback and carries each connection to `target` (tcp://host:port). A context manager."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        self._server: asyncio.Server = self._do(asyncio.start_server(self._carry, "127.0.0.1", 0))
        return self

    def __exit__(self, *error: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def turn_to(self, target: str) -> None:
        """Cut every connection; the next ones go to this place."""
        self._target = target
        self._do(self._cut())

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _end(self) -> None:
        self._server.close()
        await self._cut()
        if carrying := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(carrying, timeout=5)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.removeprefix("tcp://").rpartition(":")
        self._open.add(writer)
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection(host, int(port))
            self._open.add(back)
            await asyncio.gather(_pump(reader, back), _pump(there, writer))
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """From one to the other until either ends; then the other is told."""
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()
