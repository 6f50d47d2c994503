"""Tokens per second through HTTP beside those of the engine alone, on the same requests.

Here: an HTTP client for as many streams as wanted, and figures. It keeps its connections, as SDKs
do, and reads every event and its text; it is a small one, so that the machine's time is the
server's. Not here: starting a server, the options and the table (cli/bench_serve.py).
"""

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import httptools
import orjson

from outdraft.bench.throughput import Asked
from outdraft.errors import OutdraftError

ENGINE, HTTP = "engine", "http"
READ_BYTES = 1 << 16
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class ServeRun:
    """All requests once: where, how many at a time, tokens written per second of it all."""

    where: str
    streams: int
    round: int
    tok_s: float


class Connection:
    """One connection with one request at a time: its answer's status, text and tokens."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        )
        self.index = -1
        self._begin()

    def _begin(self) -> None:
        self.texts: list[str] = []
        self.n_tokens = 0
        self.whole = self._said_done = False
        self._rest = b""
        self._parser = httptools.HttpResponseParser(self)

    def ask(self, index: int, asked: Asked) -> None:
        """Send a streamed, greedy request; `index` is for who reads the answer."""
        self._begin()
        self.index = index
        body = orjson.dumps(
            {
                "prompt": asked.prompt,
                "max_tokens": asked.max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        self.socket.sendall(f"{self._head}{len(body)}\r\n\r\n".encode() + body)

    def read(self) -> bool:
        """Read what came; whether the answer is whole.

        Raises:
            OutdraftError: the server answered with something else.
        """
        data = self.socket.recv(READ_BYTES)
        self._parser.feed_data(data)
        if not data or (self.whole and not self._said_done):
            said = (self._rest or data)[:200]
            raise OutdraftError(f"the server answered {said!r}", "see what it printed")
        return self.whole

    def on_body(self, body: bytes) -> None:
        """See httptools: a piece of the body."""
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                self._said_done = True
            elif event.startswith(b"data: "):
                self._hear(orjson.loads(event[6:]))

    def _hear(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise OutdraftError(f"the server answered {chunk}", "see what it printed")
        self.texts += [choice["text"] for choice in chunk["choices"]]
        usage = chunk.get("usage")
        if usage is not None:
            self.n_tokens = usage["completion_tokens"]

    def on_message_complete(self) -> None:
        """See httptools: the end of the answer."""
        self.whole = True


def ask_all(port: int, requests: Sequence[Asked], streams: int) -> tuple[float, int, list[str]]:
    """Seconds, tokens and texts of a closed loop of so many streams over all requests.

    Raises:
        OutdraftError: the server answered with something else, or not at all.
    """
    waiting = list(enumerate(requests))[::-1]
    texts = [""] * len(requests)
    n_tokens = 0
    started = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for _ in range(min(streams, len(requests))):
            connection = Connection(port)
            connection.ask(*waiting.pop())
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        while selector.get_map():
            ready = selector.select(PATIENCE_S)
            if not ready:
                raise OutdraftError("the server does not answer", "see what it printed")
            for key, _ in ready:
                connection = key.data
                if not connection.read():
                    continue
                n_tokens += connection.n_tokens
                texts[connection.index] = "".join(connection.texts)
                if waiting:
                    connection.ask(*waiting.pop())
                else:
                    selector.unregister(connection.socket)
                    connection.socket.close()
    return time.perf_counter() - started, n_tokens, texts


def summarise(runs: Sequence[ServeRun]) -> list[dict[str, Any]]:
    """By number of streams: medians, and the median of the ratios of each round."""
    rows = []
    for streams in sorted({r.streams for r in runs}):
        own = [r for r in runs if r.streams == streams]
        by_round = {
            where: {r.round: r.tok_s for r in own if r.where == where} for where in (ENGINE, HTTP)
        }
        ratios = [by_round[HTTP][i] / by_round[ENGINE][i] for i in by_round[ENGINE]]
        rows.append(
            {
                "streams": streams,
                "engine_tok_s": median(by_round[ENGINE].values()),
                "http_tok_s": median(by_round[HTTP].values()),
                "ratio": median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return rows
