"""Messages between processes: whole at any split, and an end that is none is no message."""

import asyncio
import itertools
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outdraft.server.protocol import HELD_BYTES, Gathered
from outdraft.server.wire import MAX_FRAME_BYTES, Frames, pack, receive, receive_async
from tests.server.live import run

T = TypeVar("T")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
MESSAGES = st.lists(st.dictionaries(st.text(max_size=8), VALUES, max_size=5), max_size=6)
Message = dict[str, Any]


def some_messages(rng: random.Random) -> list[Message]:
    """A few, of ragged sizes, the empty one among them."""
    texts = [rng.choice(["", "aé", "\U0001f600", "x" * 300]) for _ in range(3)]
    return [{}, {"op": "tokens", "rows": [rng.random(), None]}, *({"t": t} for t in texts)]


def in_loop(work: Callable[[], T]) -> T:
    """`work` within an event loop."""

    async def working() -> T:
        return work()

    return run(working())


def heard_in(pieces: list[bytes]) -> list[Message]:
    """What a receiver of these pieces hears."""

    def work() -> list[Message]:
        heard: list[Message] = []
        frames = Frames(heard.append)
        for piece in pieces:
            frames.data_received(piece)
        frames.connection_lost(None)
        assert frames.ended.done()
        return heard

    return in_loop(work)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places) if a < b]


def test_frames_at_every_split() -> None:
    messages = some_messages(random.Random())
    data = b"".join(map(pack, messages))
    for cut in range(len(data) + 1):
        assert heard_in(split(data, [cut])) == messages, cut


def test_frames_byte_by_byte() -> None:
    messages = some_messages(random.Random())
    data = b"".join(map(pack, messages))
    assert heard_in([data[i : i + 1] for i in range(len(data))]) == messages


@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 2**16), max_size=12))
@settings(max_examples=120, deadline=None)
def test_frames_at_random_splits(messages: list[Message], cuts: list[int]) -> None:
    data = b"".join(map(pack, messages))
    assert heard_in(split(data, cuts)) == messages


@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 2**16), max_size=4), lost=st.integers(1))
@settings(max_examples=100, deadline=None)
def test_a_truncated_frame_is_no_message(
    messages: list[Message], cuts: list[int], lost: int
) -> None:
    """The stream ends early: what was whole is heard, and nothing else."""
    data = b"".join(map(pack, messages))
    data = data[: len(data) - lost % (len(data) + 1)]
    n_whole, end = 0, 0
    for message in messages:
        end += len(pack(message))
        n_whole += end <= len(data)
    assert heard_in(split(data, cuts)) == messages[:n_whole]


@pytest.mark.parametrize("cut", range(5))
def test_an_oversized_frame_is_refused_by_its_head(cut: int) -> None:
    """Before any of it is kept; what came before it was heard."""
    data = pack({"a": 1}) + struct.pack("!I", MAX_FRAME_BYTES + 1)
    first = len(data) - cut

    def work() -> None:
        heard: list[Message] = []
        frames = Frames(heard.append)
        with pytest.raises(ValueError, match="bytes"):
            frames.data_received(data[:first])
            frames.data_received(data[first:] + b"x")
        assert heard == [{"a": 1}]

    in_loop(work)


def test_a_frame_that_is_not_json_ends_the_connection() -> None:
    def work() -> None:
        frames = Frames(lambda message: None)
        with pytest.raises(orjson.JSONDecodeError):
            frames.data_received(struct.pack("!I", 3) + b"{x}")

    in_loop(work)


@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 2**16), max_size=5), lost=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_the_blocking_and_the_awaited_end_hear_the_same(
    messages: list[Message], cuts: list[int], lost: int
) -> None:
    data = b"".join(map(pack, messages))
    data = data[: max(0, len(data) - lost)]
    pieces = split(data, cuts)

    def blocking() -> list[Message]:
        ours, theirs = socket.socketpair()

        def send() -> None:
            with ours:
                for piece in pieces:
                    ours.sendall(piece)

        thread = threading.Thread(target=send)
        thread.start()
        with theirs:
            heard = list(iter(lambda: receive(theirs), None))
        thread.join()
        return [m for m in heard if m is not None]

    async def awaited() -> list[Message]:
        reader = asyncio.StreamReader()
        for piece in pieces:
            reader.feed_data(piece)
        reader.feed_eof()
        heard = []
        while (message := await receive_async(reader)) is not None:
            heard.append(message)
        return heard

    assert blocking() == run(awaited()) == heard_in(pieces)


class Sink:
    """A transport that notes what it is given."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


@given(
    turns=st.lists(st.lists(st.integers(0, HELD_BYTES // 3), max_size=8), max_size=5),
    seed=st.integers(0, 2**32),
)
@example(turns=[[HELD_BYTES // 3] * 8, [1]], seed=0)
@settings(max_examples=60, deadline=None)
def test_gathered_writes_are_the_same_bytes(turns: list[list[int]], seed: int) -> None:
    """In order, one write a turn, and never more held than HELD_BYTES."""
    rng = random.Random(seed)
    data = [[rng.randbytes(size) for size in turn] for turn in turns]

    async def work() -> None:
        sink = Sink()
        gathered = Gathered(sink, asyncio.get_running_loop())
        for turn in data:
            n_before, held = len(sink.writes), 0
            for piece in turn:
                gathered.write(piece)
                held += len(piece)
                written = sum(map(len, sink.writes[n_before:]))
                assert held - written <= HELD_BYTES
            await asyncio.sleep(0)
            if sum(map(len, turn)) <= HELD_BYTES:
                assert len(sink.writes) - n_before == bool(turn)
            assert b"".join(sink.writes[n_before:]) == b"".join(turn)
        assert b"".join(sink.writes) == b"".join(b"".join(turn) for turn in data)

    run(work())


def test_gathered_bytes_go_out_before_the_end() -> None:
    async def work() -> None:
        sink = Sink()
        gathered = Gathered(sink, asyncio.get_running_loop())
        gathered.write(b"a")
        gathered.write(b"b")
        assert sink.writes == []
        gathered.close()
        assert sink.closed
        assert sink.writes == [b"ab"]
        gathered.write(b"c")  # behind the end: dropped, like asyncio's own
        await asyncio.sleep(0)
        assert sink.writes == [b"ab"]

    run(work())


def test_what_a_connection_that_broke_still_holds_is_dropped() -> None:
    async def work() -> None:
        sink = Sink()
        gathered = Gathered(sink, asyncio.get_running_loop())
        gathered.write(b"a")
        sink.closed = True
        await asyncio.sleep(0)
        assert sink.writes == []

    run(work())
