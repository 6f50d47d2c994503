"""Tokens per second through HTTP beside those of the engine alone, on the same requests.

Here: a client that does as little as possible, so that the machine's time is the server's, and
figures. Not here: starting a server, the options and the table (cli/bench_serve.py).
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from outdraft.bench.throughput import Asked
from outdraft.errors import OutdraftError

ENGINE, HTTP = "engine", "http"
READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ServeRun:
    """All requests once: where, how many at a time, tokens written per second of it all."""

    where: str
    streams: int
    round: int
    tok_s: float


async def stream(port: int, asked: Asked, *, keep: bool = False) -> tuple[int, str]:
    """One streamed, greedy completion: how many tokens, and with `keep` its text.

    Raises:
        OutdraftError: the server answered with something else.
    """
    body = {
        "prompt": list(asked.prompt),
        "max_tokens": asked.max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        pieces: list[bytes] = []
        while piece := await reader.read(READ_BYTES):
            pieces.append(piece)
            if not keep:
                pieces = pieces[-8:]
    finally:
        writer.close()
    raw = b"".join(pieces)
    at = raw.rfind(b'"completion_tokens":')
    if at < 0 or b"[DONE]" not in raw:
        raise OutdraftError(f"the server answered {raw[:200]!r}", "see what it printed")
    n_tokens = int(raw[at + 20 : at + 30].split(b",")[0])
    return n_tokens, text_of(raw) if keep else ""


def text_of(raw: bytes) -> str:
    """The text of a streamed completion, from all bytes of the answer."""
    body = raw.partition(b"\r\n\r\n")[2]
    events = b""
    while body:  # HTTP's chunks: a size in hex, then so many bytes
        size, _, rest = body.partition(b"\r\n")
        n = int(size, 16)
        events, body = events + rest[:n], rest[n + 2 :] if n else b""
    texts = []
    for line in events.split(b"\n\n"):
        if line.startswith(b"data: {"):
            texts += [c["text"] for c in json.loads(line[6:])["choices"]]
    return "".join(texts)


async def ask_all(
    port: int, requests: Sequence[Asked], streams: int, *, keep: bool = False
) -> tuple[float, int, list[str]]:
    """Seconds, tokens and texts of a closed loop of so many streams over all requests."""
    waiting = list(enumerate(requests))[::-1]
    texts = [""] * len(requests)
    n_tokens = 0

    async def one() -> None:
        nonlocal n_tokens
        while waiting:
            index, asked = waiting.pop()
            n, texts[index] = await stream(port, asked, keep=keep)
            n_tokens += n

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(streams)))
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
