"""Answers that are watched: a client that leaves, or does not read, ends its request.

`EventStream` is server-sent events, `Awaited` a single JSON body. Both run beside a look at the
connection: when it closes, the work is cancelled at once and its `close` called. Not here: what the
events say (the fronts).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outdraft.server.errors import ApiError, body, is_anthropic

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
TICK_S = 1.0
KEEP_ALIVE_S = 15.0
ABORT_KEY = "outdraft.abort"
"""In the scope: cuts the connection (protocol.py puts it there)."""


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: bytes of whole events; raising ApiError ends the stream with an error event.
        close: called when it is over, however it ended.
        send_s: how long a client may leave the stream unread.
        last: what follows an error event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        *,
        send_s: float,
        last: bytes = DONE,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        for name, value in (headers or {}).items():
            self.headers[name] = value
        self.events = events
        self.close = close
        self.send_s = send_s
        self.last = last
        self._sending_since: float | None = None
        self._sent_at = 0.0
        self._given_up = False
        self._timer: asyncio.TimerHandle | None = None
        self._comments: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await unless_left(self._timed(scope, send), receive)
        finally:
            self.close()

    async def _timed(self, scope: Scope, send: Send) -> None:
        """Produce, and look every second at whether the client reads."""
        task = asyncio.current_task()
        assert task is not None
        self._sent_at = asyncio.get_running_loop().time()
        self._look_again(task, send)
        try:
            await self._produce(scope, send)
        except asyncio.CancelledError:
            if not self._given_up or task.uncancel() > 0:
                raise
            cut = scope.get(ABORT_KEY)
            if cut is not None:
                cut()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for comment in self._comments:
                comment.cancel()

    def _look_again(self, task: asyncio.Task[Any], send: Send) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._look, task, send)

    def _look(self, task: asyncio.Task[Any], send: Send) -> None:
        """Give up on a client that has not read for too long; keep a quiet connection open."""
        self._look_again(task, send)
        now, since = asyncio.get_running_loop().time(), self._sending_since
        if since is not None and now - since > self.send_s:
            self._given_up = True
            task.cancel()
        elif since is None and now - self._sent_at > KEEP_ALIVE_S:
            self._sent_at = now
            comment = asyncio.ensure_future(_send_comment(send))
            self._comments.add(comment)
            comment.add_done_callback(self._comments.discard)

    async def _produce(self, scope: Scope, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        try:
            async for data in self.events:
                await self._send(send, data)
        except ApiError as error:
            shape = body(error, anthropic=is_anthropic(scope["path"]))
            name = "error" if is_anthropic(scope["path"]) else None
            await self._send(send, event(shape, name) + self.last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._sending_since = loop.time()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending_since, self._sent_at = None, loop.time()


class Awaited(Response):
    """A JSON body that takes a while: nothing is sent until it is there, or has failed."""

    media_type = "application/json"

    def __init__(
        self,
        work: Callable[[], Awaitable[Any]],
        close: Callable[[], None],
        *,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers=headers)
        self.work = work
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await unless_left(self._produce(scope, receive, send), receive)
        finally:
            self.close()

    async def _produce(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k: v for k, v in self.headers.items() if k != "content-length"}
        try:
            answer = json_response(await self.work(), headers=headers)
        except ApiError as error:
            answer = error_response(error, scope)
        await answer(scope, receive, send)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON by orjson."""
    return Response(orjson.dumps(data), status, headers, "application/json")


def error_response(error: ApiError, scope: Scope) -> Response:
    """An error in the shape of its route."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    visit = scope.get("outdraft.visit")
    shape = body(
        error,
        anthropic=is_anthropic(scope["path"]),
        request_id="" if visit is None else visit.id,
    )
    return json_response(shape, error.status, headers)


async def _send_comment(send: Send) -> None:
    await send({"type": "http.response.body", "body": b": \n\n", "more_body": True})


async def _left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(work: Awaitable[T], receive: Receive) -> T | None:
    """Await `work`; it is cancelled when the client leaves before it is done. None if it was."""
    task = asyncio.current_task()
    assert task is not None
    left, gone = asyncio.ensure_future(_left(receive)), False

    def leave(ended: asyncio.Future[None]) -> None:
        nonlocal gone
        gone = True
        if not ended.cancelled():
            ended.exception()  # however it ended, nobody is there
        task.cancel()

    left.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or task.uncancel() > 0:
            raise
        return None
    finally:
        left.remove_done_callback(leave)
        left.cancel()
