"""The engine for asyncio: it runs in a thread of its own, and requests stream from it.

Only messages cross: commands (add, abort, stop) go into a queue that the thread reads between
steps, and events come back to the event loop of who asked. So the engine itself needs no locks and
a loop never waits for a step. Here: `AsyncLLM`. Not here: what a step does (engine.py).
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import aclosing
from dataclasses import dataclass, field

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM, Completion, completion_of
from outdraft.engine.sequence import Sequence
from outdraft.engine.stats import EngineStats
from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams, TokenEvent


@dataclass(slots=True)
class _Mailbox:
    """Where one request's events go: batches in order, or the exception that ends them."""

    loop: asyncio.AbstractEventLoop
    arrived: asyncio.Queue[list[TokenEvent] | Exception] = field(default_factory=asyncio.Queue)

    def put(self, item: list[TokenEvent] | Exception) -> bool:
        """Called by the engine's thread; False if the loop has closed and nobody reads."""
        try:
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, item)
        except RuntimeError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Add:
    sequence: Sequence
    mailbox: _Mailbox


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class AsyncLLM:
    """An `LLM` whose requests are awaited. Its thread starts at once and ends with `aclose`.

    >>> async with AsyncLLM("demo") as llm:
    ...     async for event in llm.astream("def add(a, b):"):
    ...         print(event.text, end="")

    Args:
        model: what `LLM` takes, or an `LLM` that nobody else will step from now on.
        config: how to load and run it; only with a name.

    Raises:
        ModelError: the model, or a drafter that was asked for, cannot be used.
    """

    def __init__(self, model: str | LLM, config: EngineConfig | None = None) -> None:
        assert isinstance(model, str) or config is None, "the LLM has its config already"
        self.llm = LLM(model, config) if isinstance(model, str) else model
        self._commands: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}  # the thread's alone
        self._gate = threading.Lock()  # no command is put behind the thread's last look
        self._ended: OutdraftError | None = None
        self._thread = threading.Thread(target=self._serve, name="outdraft engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Abort what is in progress, whose streams get their last events, and end the thread."""
        self._post(_Stop())
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.llm.learning.close)

    async def astream(
        self,
        prompt: str | Seq[int],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request as they come; the last has a finish reason.

        Closing the iterator, or cancelling who waits for it, aborts the request before the next
        step. After a `break`, close it with `aclose()` or `contextlib.aclosing`.

        Raises:
            PromptError: the prompt cannot be run.
            SamplingError: the model cannot meet an option.
            QueueFull: too many requests wait.
            OutdraftError: the engine was closed or has failed.
        """
        sequence = await asyncio.to_thread(self.llm.prepare, prompt, params, cache_salt=cache_salt)
        async with aclosing(self._events(sequence)) as events:
            async for event in events:
                yield event

    async def agenerate(
        self,
        prompt: str | Seq[int],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
    ) -> Completion:
        """Run one request to its end; raises like `astream`."""
        sequence = await asyncio.to_thread(self.llm.prepare, prompt, params, cache_salt=cache_salt)
        text = [event.text async for event in self._events(sequence)]
        return completion_of(sequence, "".join(text))

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its stream gets the last event. Any thread may."""
        self._post(_Abort(request_id))

    def stats(self) -> EngineStats:
        """The engine as it is now, at most a step behind. Any thread may ask."""
        return self.llm.stats()

    async def _events(self, sequence: Sequence) -> AsyncGenerator[TokenEvent, None]:
        mailbox = _Mailbox(asyncio.get_running_loop())
        if not self._post(_Add(sequence, mailbox)):
            assert self._ended is not None
            raise self._ended
        ended = False
        try:
            while not ended:
                item = await mailbox.arrived.get()
                if isinstance(item, Exception):
                    ended = True
                    raise item
                ended = item[-1].finish_reason is not None
                for event in item:
                    yield event
        finally:
            if not ended:
                self._post(_Abort(sequence.id))

    def _post(self, command: _Add | _Abort | _Stop) -> bool:
        """Give the thread a command; False if it has ended."""
        with self._gate:
            if self._ended is not None:
                return False
            self._commands.put(command)
            return True

    def _serve(self) -> None:
        """The thread: commands, a step, events; until it is stopped or a step raises."""
        reason = OutdraftError("the engine was closed", "make a new one")
        try:
            while self._obey():
                self._deliver(self.llm.step())
            self._deliver([e for name in list(self._mailboxes) if (e := self.llm.abort(name))])
        except Exception as error:
            reason = OutdraftError(
                f"the engine has failed: {type(error).__name__}: {error}",
                "this is an error of outdraft; make a new engine",
            )
            reason.__cause__ = error
        with self._gate:
            self._ended = reason
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                command.mailbox.put(reason)
        for mailbox in self._mailboxes.values():
            mailbox.put(reason)
        self._mailboxes.clear()

    def _obey(self) -> bool:
        """Do what was asked meanwhile; waits while there is no work. False to stop."""
        while not (self._commands.empty() and self.llm.scheduler.busy):
            command = self._commands.get()
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Add):
                self._mailboxes[command.sequence.id] = command.mailbox
                try:
                    self.llm.scheduler.add(command.sequence)
                except OutdraftError as error:
                    self._mailboxes.pop(command.sequence.id).put(error)
            elif (event := self.llm.abort(command.request_id)) is not None:
                self._deliver([event])
        return True

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Events to their streams: of a step, all of a request at once."""
        batches: dict[str, list[TokenEvent]] = {}
        for event in events:
            batches.setdefault(event.request_id, []).append(event)
        for name, batch in batches.items():
            mailbox = self._mailboxes.get(name)
            if mailbox is None:
                continue
            there = mailbox.put(batch)
            if batch[-1].finish_reason is not None or not there:
                del self._mailboxes[name]
                self.llm.abort(name)
