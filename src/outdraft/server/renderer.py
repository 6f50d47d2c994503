"""Renders conversations in processes that can be killed.

Here: a few of them, a wall-clock limit, and a fresh process in place of a killed one. Not here: the
rendering (render_worker.py).
"""

import asyncio
import contextlib
import socket
import sys
from pathlib import Path
from typing import Any

from outdraft.server.errors import ApiError, bad_request
from outdraft.server.wire import pack, receive_async

N_PROCESSES = 2
START_S = 60.0


class _Child:
    """One process; started at its first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process: asyncio.subprocess.Process | None = None
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "outdraft.server.render_worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        self.reader, self.writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self.writer.write(pack({"path": str(self.path)}))
        async with asyncio.timeout(START_S):
            if await receive_async(self.reader) is None:
                raise ApiError(500, "the chat template of this model cannot be loaded")

    async def ask(self, message: dict[str, Any]) -> dict[str, Any] | None:
        assert self.reader is not None and self.writer is not None
        self.writer.write(pack(message))
        return await receive_async(self.reader)

    @property
    def runs(self) -> bool:
        """Whether it can be asked."""
        return self.process is not None and self.process.returncode is None

    async def kill(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self.process = self.reader = self.writer = None


class Renderer:
    """The chat template of the model in `path`."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self.limit_s = limit_s
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._starting: asyncio.Task[None] | None = None
        self._working: set[asyncio.Task[str]] = set()
        self._children = [_Child(path) for _ in range(N_PROCESSES)]
        for child in self._children:
            self._idle.put_nowait(child)

    def start(self) -> None:
        """Start the processes already, for the first who ask."""
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        children = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for child in children:
            with contextlib.suppress(ApiError, OSError, TimeoutError):  # tried again when asked
                await child.start()
            self._idle.put_nowait(child)

    async def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Raises:
            ApiError: the template refuses it, or took too long.
        """
        message = {
            "messages": messages,
            "tools": tools,
            "options": options or {},
            "add_generation_prompt": add_generation_prompt,
        }
        # A caller that leaves must not cost a process: its answer is read all the same.
        work = asyncio.create_task(self._rendered(message))
        self._working.add(work)
        work.add_done_callback(self._worked)
        return await asyncio.shield(work)

    def _worked(self, work: asyncio.Task[str]) -> None:
        self._working.discard(work)
        if not work.cancelled():
            work.exception()  # seen, if nobody waits for it any more

    async def _rendered(self, message: dict[str, Any]) -> str:
        child = await self._idle.get()
        try:
            if not child.runs:
                await child.start()
            async with asyncio.timeout(self.limit_s):
                answer = await child.ask(message)
        except TimeoutError:
            await asyncio.shield(child.kill())
            raise bad_request("the chat template took too long for these messages") from None
        except BaseException:  # an answer that nobody read would be the next one's
            await asyncio.shield(child.kill())
            raise
        finally:
            self._idle.put_nowait(child)
        if answer is None:
            await child.kill()
            raise ApiError(400, "the chat template failed on these messages")
        if "error" in answer:
            raise bad_request(f"{answer['error']}: {answer['hint']}", "messages")
        text: str = answer["text"]
        return text

    async def close(self) -> None:
        """End the processes."""
        if self._starting is not None:
            self._starting.cancel()
        for work in self._working:
            work.cancel()
        for child in self._children:
            await child.kill()
