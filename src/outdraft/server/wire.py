"""Messages between the server and its child processes: length-prefixed JSON over a socket.

A frame is four bytes, big-endian, with the length of what follows, and one JSON object. Here: both
ends of it, for threads and for asyncio, and sampling parameters as JSON. Not here: which messages
there are (worker.py, renderer.py).
"""

import asyncio
import math
import socket
import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import orjson

from outdraft.request import SamplingParams

MAX_FRAME_BYTES = 256 * 1024 * 1024
_HEAD = struct.Struct("!I")
_DEFAULTS = SamplingParams()
_LISTS = ("stop", "stop_token_ids", "show_token_ids", "bad_words")


def pack(message: dict[str, Any]) -> bytes:
    """One frame.

    Raises:
        ValueError: it is larger than any may be, as for all who receive one.
    """
    body = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    _check(len(body))
    return _HEAD.pack(len(body)) + body


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message of a blocking socket; None at its end."""
    head = _exactly(sock, _HEAD.size)
    if head is None:
        return None
    (size,) = _HEAD.unpack(head)
    _check(size)
    body = _exactly(sock, size)
    return None if body is None else orjson.loads(body)


class Frames(asyncio.Protocol):
    """Calls `hear` with each message, straight from the event loop, without a task between.

    What `hear` raises ends the connection. `ended` is done when it is over.
    """

    def __init__(self, hear: Callable[[dict[str, Any]], None]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hear = hear
        self._held = bytearray()  # the beginning of a message
        self._wanted = 0  # bytes that it needs

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return
            data = bytes(self._held)
            self._held.clear()
        at, view = 0, memoryview(data)
        self._wanted = _HEAD.size
        while len(data) - at >= _HEAD.size:
            (size,) = _HEAD.unpack_from(data, at)
            _check(size)
            begin = at + _HEAD.size
            if len(data) < begin + size:
                self._wanted = _HEAD.size + size
                break
            at = begin + size
            self._hear(orjson.loads(view[begin:at]))
        if at < len(data):
            self._held += view[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if not self.ended.done():
            self.ended.set_result(None)


async def receive_async(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message of a stream; None at its end."""
    try:
        (size,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        _check(size)
        message: dict[str, Any] = orjson.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    """What of the parameters is not the default; -inf, which JSON lacks, is a word."""
    given = {
        f.name: getattr(params, f.name)
        for f in fields(params)
        if getattr(params, f.name) != getattr(_DEFAULTS, f.name)
    }
    if "logit_bias" in given:
        given["logit_bias"] = [
            [token, "-inf" if bias == -math.inf else bias] for token, bias in params.bias_pairs
        ]
    return given


def params_from_json(given: dict[str, Any]) -> SamplingParams:
    """The parameters that `params_to_json` wrote.

    Raises:
        SamplingError: a value is not possible.
    """
    values = dict(given)
    for name in _LISTS:
        if name in values:
            values[name] = tuple(values[name])
    if "logit_bias" in values:
        values["logit_bias"] = tuple((t, float(bias)) for t, bias in values["logit_bias"])
    return SamplingParams(**values)


def _check(size: int) -> None:
    if size > MAX_FRAME_BYTES:  # the limits keep messages far below it
        raise ValueError(f"a message of {size} bytes")


def _exactly(sock: socket.socket, n: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < n:
        try:
            piece = sock.recv(min(n - len(pieces), 1 << 20))
        except OSError:
            return None
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)
