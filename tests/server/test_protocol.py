"""Limits of connections and slow clients, without an engine: the protocol around a tiny app."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import cast

import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outdraft.server.app import _post
from outdraft.server.limits import Limits
from outdraft.server.protocol import limited_protocol
from outdraft.server.service import Service
from outdraft.server.sse import Awaited, EventStream
from tests.server.live import free_port

closed: list[str] = []
turns_until_closed: list[int] = []
LIMITS = Limits(header_bytes=4096, header_s=0.4, connections=8)


class Counting(limited_protocol(LIMITS)):  # type: ignore[misc]
    """Counts the turns of its event loop since a connection was lost."""

    turns = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self.count(0)
        super().connection_lost(exc)

    @classmethod
    def count(cls, turn: int) -> None:
        cls.turns = turn
        if turn < 100:
            asyncio.get_running_loop().call_soon(cls.count, turn + 1)


def note_close() -> None:
    turns_until_closed.append(Counting.turns)


async def never() -> AsyncIterator[bytes]:
    """A stream with nothing to send: nothing is written that could fail."""
    await asyncio.Event().wait()
    yield b""


async def slow_front(request: Request, service: Service) -> Response:
    """A front whose request is still being prepared."""
    try:
        await asyncio.Event().wait()
    finally:
        note_close()
    return Response()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    async def events() -> AsyncIterator[bytes]:
        for i in range(100_000):
            yield b"data: " + b"x" * 50_000 + str(i).encode() + b"\n\n"
            await asyncio.sleep(0)

    if scope["path"] == "/flood":
        await EventStream(events(), lambda: closed.append("flood"), send_s=0.5)(
            scope, receive, send
        )
        return
    if scope["path"] == "/stream":
        await EventStream(never(), note_close, send_s=60)(scope, receive, send)
        return
    if scope["path"] == "/whole":
        await Awaited(asyncio.Event().wait, note_close)(scope, receive, send)
        return
    if scope["path"] == "/preparing":
        with suppress(ClientDisconnect):
            await _post(slow_front, cast(Service, None))(Request(scope, receive))
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"fine"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    config = uvicorn.Config(
        app, port=port, http=Counting, lifespan="off", log_level="error", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join(10)


def talk(port: int, data: bytes, timeout_s: float = 5) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
        sock.sendall(data)
        return sock.recv(65536)


def test_a_request_within_the_limits(port: int) -> None:
    assert b"200 OK" in talk(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nX: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(800)) + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["one long", "many", "path"],
)
def test_headers_that_are_too_large(port: int, data: bytes) -> None:
    assert b" 431 " in talk(port, data)


def test_headers_without_an_end(port: int) -> None:
    """Sent piece by piece, so that no single read is large."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        answer = b""
        for _ in range(400):
            try:
                sock.sendall(b"X-Y: " + b"z" * 500 + b"\r\n")
            except OSError:
                break
        try:
            answer = sock.recv(1000)
        except OSError:
            answer = b""
        assert answer == b"" or b" 431 " in answer or b" 408 " in answer


def test_headers_that_never_come(port: int) -> None:
    assert b" 408 " in talk(port, b"GET / HT", timeout_s=30)


def test_too_many_connections(port: int) -> None:
    socks = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(12)]
    try:
        answers = []
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                answers.append(sock.recv(1000))
            except OSError:
                answers.append(b"")
        assert sum(b"200 OK" in a for a in answers) >= 6
        assert any(b" 503 " in a or a == b"" for a in answers)
    finally:
        for sock in socks:
            sock.close()


def test_a_client_that_does_not_read_is_cut_off(port: int) -> None:
    closed.clear()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(400):
            time.sleep(0.05)
            if closed:
                return
    raise AssertionError("the stream is still held")


@pytest.mark.parametrize("path", ["/stream", "/whole", "/preparing"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_closed_connection_is_heard_at_once(port: int, path: str, reset: bool) -> None:
    """Within a few turns of the event loop, without a write that fails or a look at a clock."""
    turns_until_closed.clear()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        time.sleep(0.1)
        assert not turns_until_closed
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01" + b"\0" * 3 + b"\0" * 4)
    deadline = time.monotonic() + 20
    while not turns_until_closed:
        assert time.monotonic() < deadline, "it was not heard"
        time.sleep(0.01)
    assert turns_until_closed[0] <= 8
