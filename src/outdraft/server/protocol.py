"""Limits on connections, below ASGI: size of the headers, time to send them, how many at once.

uvicorn's httptools protocol with three counters, and its writes gathered. Not here: limits of
bodies (guard.py).
"""

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from outdraft.server.guard import VISIT, Visit
from outdraft.server.limits import Limits
from outdraft.server.sse import ABORT_KEY

_ANSWERS = {
    431: b"HTTP/1.1 431 Request Header Fields Too Large",
    408: b"HTTP/1.1 408 Request Timeout",
    503: b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1",
}


_CLOSE = b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


HELD_BYTES = 1 << 16


class Gathered:
    """A transport whose writes of one turn of the event loop go out as one.

    The end of an answer is several writes, and each would wake its reader. Never more than
    HELD_BYTES are held, so that a transport that is full says so in time.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self._n_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """See asyncio.WriteTransport."""
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        self._n_bytes += len(data)
        if self._n_bytes > HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            data = b"".join(self._held)
            self._held, self._n_bytes = [], 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def close(self) -> None:
        """See asyncio.Transport: what was written before goes out."""
        self.flush()
        self._transport.close()


def limited_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The protocol class for these limits; uvicorn makes one object a connection."""

    class LimitedProtocol(HttpToolsProtocol):
        header_size, in_headers = 0, True
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(Gathered(transport, self.loop))  # type: ignore[arg-type]
            if len(self.connections) > limits.connections:
                self.refuse(503)
            else:
                self.deadline = self.loop.call_later(limits.header_s, self.refuse, 408)

        def connection_lost(self, exc: Exception | None) -> None:
            self.disarm()
            _note_loss(self.cycle)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.in_headers:
                if self.deadline is None:
                    self.deadline = self.loop.call_later(limits.header_s, self.refuse, 408)
                self.header_size += len(data)
                # what follows the headers in the same piece is a body, at most one read long
                if self.header_size > limits.header_bytes + len(data):
                    self.refuse(431)
                    return
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope[ABORT_KEY] = self.transport.abort  # type: ignore[literal-required]

        def on_headers_complete(self) -> None:
            self.disarm()
            self.in_headers = False
            size = len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers)
            if size > limits.header_bytes:
                self.refuse(431)
                raise ValueError("headers too large")
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self.in_headers, self.header_size = True, 0
            super().on_message_complete()

        def disarm(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
            self.deadline = None

        def refuse(self, status: int) -> None:
            if not self.transport.is_closing():
                self.transport.write(_ANSWERS[status] + _CLOSE)
                self.transport.close()

    return LimitedProtocol


def _note_loss(cycle: Any) -> None:
    """The connection of a request has closed, or of none."""
    visit = None if cycle is None else cycle.scope.get(VISIT)
    if isinstance(visit, Visit):
        visit.left_at = time.monotonic()
