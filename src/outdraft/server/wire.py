"""Messages between the server and its child processes: length-prefixed JSON over a socket.

A frame is four bytes, big-endian, with the length of what follows, and one JSON object. Here: both
ends of it, for threads and for asyncio, and sampling parameters as JSON. Not here: which messages
there are (worker.py, renderer.py).
"""

import asyncio
import math
import socket
import struct
from dataclasses import fields
from typing import Any

import orjson

from outdraft.request import SamplingParams

MAX_FRAME_BYTES = 256 * 1024 * 1024
_HEAD = struct.Struct("!I")
_DEFAULTS = SamplingParams()
_LISTS = ("stop", "stop_token_ids", "show_token_ids", "bad_words")


def pack(message: dict[str, Any]) -> bytes:
    """One frame."""
    body = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    assert len(body) <= MAX_FRAME_BYTES, "the limits keep messages smaller than this"
    return _HEAD.pack(len(body)) + body


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message of a blocking socket; None at its end."""
    head = _exactly(sock, _HEAD.size)
    if head is None:
        return None
    (size,) = _HEAD.unpack(head)
    assert size <= MAX_FRAME_BYTES
    body = _exactly(sock, size)
    return None if body is None else orjson.loads(body)


async def receive_async(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message of a stream; None at its end."""
    try:
        (size,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        assert size <= MAX_FRAME_BYTES
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
