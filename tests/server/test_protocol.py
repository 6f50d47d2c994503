"""Limits of connections and slow clients, without an engine: the protocol around a tiny app."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from outdraft.server.limits import Limits
from outdraft.server.protocol import limited_protocol
from outdraft.server.sse import EventStream
from tests.server.live import free_port

closed: list[str] = []
LIMITS = Limits(header_bytes=4096, header_s=0.4, connections=8)


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
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"fine"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    config = uvicorn.Config(
        app, port=port, http=limited_protocol(LIMITS), lifespan="off", log_level="error", ws="none"
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
