"""What a server must survive: clients that leave, too many of them, its engine's death, its end.

`small` takes on 8 requests and runs 4, so that it is easily full. Long forms run under `prove`;
the soak takes OUTDRAFT_SOAK_SECONDS, 600 if not given.
"""

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress

import httpx
import psutil
import pytest

from tests.server.live import Live, live_server, run, wait_ready

LONG = {"prompt": "def f(x):\n", "max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def small() -> Iterator[Live]:
    with live_server("--max-in-flight", "8", "--parallel", "4", "--drain-seconds", "1") as server:
        yield server


def raw_post(port: int, path: str, body: dict[str, object]) -> socket.socket:
    """A connection on which a request was sent; nothing is read yet."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def kill_connections(live: Live, n: int, seed: int) -> None:
    """Connections closed at random points of their life, up to four at a time."""
    rng = random.Random(seed)
    for _ in range(0, n, 4):
        socks = []
        for _ in range(4):
            body = {**LONG, "prompt": f"# {rng.random()}\ndef f(x):\n" * rng.randrange(1, 30)}
            body["stream"] = rng.random() < 0.7
            socks.append(raw_post(live.port, "/v1/completions", body))
        for sock in socks:
            with closing(sock):
                sock.settimeout(rng.choice([0.001, 0.05, 0.3]))
                with suppress(TimeoutError):
                    for _ in range(rng.randrange(0, 20)):
                        sock.recv(rng.choice([10, 400, 4000]))
                if rng.random() < 0.5:  # a reset instead of an orderly end
                    sock.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                    )
        stats = live.wait_idle(5)
        assert stats["pages"]["used"] == 0


def kill_and_count(live: Live, n: int, seed: int) -> None:
    """Every request that a closed connection leaves is out of the engine before its next step."""
    before = live.wait_idle()
    kill_connections(live, n, seed)
    after = live.wait_idle()
    free = after["pages"]["free"] + after["pages"]["cached"]
    assert free == sum(before["pages"].values())
    grown = {k: v - before["aborts"][k] for k, v in after["aborts"].items()}
    print(f"{after['steps'] - before['steps']} steps: {grown}")
    assert grown["n"] >= n / 4, "too few were in progress to show anything"
    assert grown["left"] == grown["n"], "every one of them knows when its connection closed"
    assert grown["late_steps"] == 0
    assert live.metric("outdraft_abort_late_steps_total") == 0
    assert live.output().count('"left":true') >= grown["n"] / 2  # their lines in the log
    assert live.metric("outdraft_engine_restarts_total") == 0


def test_a_closed_connection_frees_its_slot_before_the_next_step(small: Live) -> None:
    kill_and_count(small, 20, seed=1)


@pytest.mark.prove
def test_200_connections_killed_at_random_points(small: Live) -> None:
    kill_and_count(small, 200, seed=2)


def test_embeddings_end_with_their_connection(small: Live) -> None:
    """Texts are embedded one behind each step: of many, most are left undone."""
    before = small.wait_idle()["steps"]
    with closing(raw_post(small.port, "/v1/embeddings", {"input": [[7] * 1500] * 64})):
        while small.metric("outdraft_requests_in_flight") == 0:
            pass
    assert small.post("/v1/embeddings", {"input": "the next one"}).status_code == 200
    assert small.wait_idle()["steps"] - before < 60


def test_embeddings_have_places_like_completions(small: Live) -> None:
    async def flood_embeddings() -> list[int]:
        async with httpx.AsyncClient(base_url=small.url, timeout=120, trust_env=False) as client:
            body = {"input": [[7] * 300]}
            posts = [client.post("/v1/embeddings", json=body) for _ in range(32)]
            return [r.status_code for r in await asyncio.gather(*posts)]

    statuses = Counter(run(flood_embeddings()))
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200] >= 6
    assert statuses[429] > 0
    small.wait_idle()


async def flood(url: str, n: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=n)
    async with httpx.AsyncClient(
        base_url=url, timeout=120, limits=limits, trust_env=False
    ) as client:

        async def one(i: int) -> None:
            body = {"prompt": f"# {i}\ndef f(", "max_tokens": 24, "stream": i % 2 == 0}
            response = await client.post("/v1/completions", json=body)
            statuses[response.status_code] += 1
            if response.status_code != 200:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["code"] in ("queue_full", "too_many_requests")

        await asyncio.gather(*(one(i) for i in range(n)))
    return statuses


def test_overload_answers_only_200_429_503(small: Live) -> None:
    """16 times what is taken on, from one client: its share is 6 of 8, so the rest gets 429."""
    statuses = run(flood(small.url, 128))
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200] >= 6
    assert statuses[429] > 0
    small.wait_idle()


def kill_engine(live: Live, times: int, within_s: float = 60.0) -> None:
    for i in range(times):
        before = live.metric("outdraft_engine_restarts_total")
        with closing(raw_post(live.port, "/v1/completions", LONG)) as sock:
            sock.settimeout(20)
            seen = sock.recv(4000)
            while b"data: " not in seen:
                seen += sock.recv(4000)
            victim = live.worker()
            victim.kill()
            killed_at = time.monotonic()
            tail = b""
            while b"[DONE]" not in tail:
                piece = sock.recv(65536)
                assert piece, f"closed without a last event: {tail[-300:]!r}"
                tail = tail[-2000:] + piece
            assert time.monotonic() - killed_at < within_s
            assert b"engine_gone" in tail
        health = live.get("/health")
        restarted = live.metric("outdraft_engine_restarts_total") > before
        assert health.status_code == 503 or restarted
        wait_ready(live, 60)
        assert live.metric("outdraft_engine_restarts_total") == before + 1
        answer = live.post("/v1/completions", {"prompt": f"# {i}\n", "max_tokens": 4})
        assert answer.status_code == 200
        live.wait_idle()


def test_the_engine_killed_is_started_again(small: Live) -> None:
    kill_engine(small, 2)


@pytest.mark.prove
def test_the_engine_killed_20_times_recovers_20_times(small: Live) -> None:
    kill_engine(small, 20, within_s=1.0)


def test_sigterm_gives_every_stream_its_last_event() -> None:
    """A short request ends by itself, a long one is cut with an event, and the exit is clean."""
    with live_server("--drain-seconds", "1.5") as live:
        tails: dict[int, str] = {}

        def read(tokens: int) -> None:
            body = {**LONG, "max_tokens": tokens}
            tails[tokens] = live.post("/v1/completions", body).text[-600:]

        threads = [threading.Thread(target=read, args=(n,)) for n in (12, 4000)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while not live.stats()["running"] and 12 not in tails:
            assert time.monotonic() < deadline
        time.sleep(0.1)
        live.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        assert live.process.wait(20) == 0, live.output()
        assert tails[12].endswith("data: [DONE]\n\n")
        assert "shutting down" not in tails[12]
        assert "shutting down" in tails[4000] or '"length"' in tails[4000]
        assert tails[4000].endswith("data: [DONE]\n\n")
        assert not psutil.pid_exists(live.process.pid) or live.process.poll() == 0


@pytest.mark.prove
def test_soak(small: Live) -> None:
    """Memory, descriptors and pages stay flat under a mixture of requests and aborts."""
    seconds = float(os.environ.get("OUTDRAFT_SOAK_SECONDS", "600"))
    rng = random.Random(3)
    server, marks = psutil.Process(small.process.pid), []
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        run(flood(small.url, 12))
        kill_connections(small, 4, seed=rng.randrange(2**30))
        small.post("/v1/embeddings", {"input": f"text {rng.random()}"})
        stats = small.wait_idle()
        marks.append(
            (
                server.memory_info().rss / 2**20,
                small.worker().memory_info().rss / 2**20,
                server.num_fds(),
                small.worker().num_fds(),
                sum(stats["pages"].values()),
            )
        )
    third = len(marks) // 3
    early, late = marks[third : 2 * third], marks[2 * third :]
    assert third >= 1, "longer, please"
    for name, slack, column in (("server MiB", 16, 0), ("engine MiB", 32, 1)):
        growth = max(m[column] for m in late) - max(m[column] for m in early)
        assert growth < slack, f"{name} grew by {growth:.1f}"
    assert max(m[2] for m in late) <= max(m[2] for m in early) + 2
    assert max(m[3] for m in late) <= max(m[3] for m in early) + 2
    assert len({m[4] for m in marks}) == 1
