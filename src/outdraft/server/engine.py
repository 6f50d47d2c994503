"""The server's end of the engine: its process is started, watched and spoken to from here.

`submit` gives a `Stream`, whose batches are awaited; closing it aborts the request. When the
process dies, every stream gets an error at once and a new process is started, with a growing pause.
Not here: what the process does (worker.py), requests in the terms of HTTP (jobs.py).
"""

import asyncio
import contextlib
import enum
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from outdraft.config import EngineConfig
from outdraft.errors import ModelError, OutdraftError
from outdraft.request import SamplingParams
from outdraft.server.errors import ApiError
from outdraft.server.wire import Frames, pack, params_to_json

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
STEADY_S = 15.0
"""A process that lived so long is restarted with the first pause again."""
STALLED_S = 120.0
IDLE_S = 2.0


class State(enum.StrEnum):
    """How the engine is."""

    LOADING = "loading"
    READY = "ok"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Batch:
    """What a request got: rows `[token, text, drafted, logprobs?, n_drafts?]`, and its end.

    `prompt`: before all of them, by itself, log-probabilities of the prompt where asked for.
    """

    index: int
    rows: list[list[Any]]
    end: dict[str, Any] | None
    prompt: list[list[Any] | None] | None = None


class EngineGone(Exception):
    """The engine's process died under a request."""


@dataclass(slots=True)
class Mailbox:
    """Where batches arrive. Whoever waits gets all that came meanwhile."""

    items: list[Batch | Exception] = field(default_factory=list)
    waiter: asyncio.Future[None] | None = None

    def put(self, item: Batch | Exception) -> None:
        """Deliver."""
        self.items.append(item)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def take(self) -> list[Batch]:
        """The batches that came, at least one.

        Raises:
            EngineGone: the engine died.
        """
        while not self.items:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        items, self.items = self.items, []
        batches = []
        for item in items:
            if isinstance(item, Exception):
                raise item
            batches.append(item)
        return batches


@dataclass(slots=True)
class Stream:
    """One request in the engine. `index` tells the n completions of one prompt apart."""

    name: str
    index: int
    mailbox: Mailbox
    accepted: asyncio.Future[None]
    ended: bool = False


class Engine:
    """Starts the engine's process and keeps it going."""

    def __init__(
        self, model: str, config: EngineConfig, note: Callable[[str], None] = lambda text: None
    ) -> None:
        self.model = model
        self.config = config
        self.state = State.LOADING
        self.info: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self.n_restarts = 0
        self.pid = 0
        self.load_error: OutdraftError | None = None
        self.note = note
        self.changed = asyncio.Event()
        self._names = itertools.count()
        self._streams: dict[str, Stream] = {}
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._writer: asyncio.WriteTransport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard_at = 0.0

    def start(self) -> None:
        """Begin; `state` tells how far it is."""
        self._task = asyncio.create_task(self._keep_going(), name="engine")

    async def loaded(self) -> None:
        """Wait until the model is loaded.

        Raises:
            OutdraftError: it cannot be.
        """
        while self.state in (State.LOADING, State.RESTARTING):
            self.changed.clear()
            await self.changed.wait()
        if self.load_error is not None:
            raise self.load_error

    async def stop(self) -> None:
        """End the process; streams that are left get an error."""
        self._enter(State.STOPPED)
        if self._writer is not None:
            self._writer.close()
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), 3)
            except TimeoutError:
                process.kill()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._lose_all(EngineGone("the server has stopped"))

    def snapshot(self) -> dict[str, Any]:
        """What the engine last said of itself. It says nothing while it is idle."""
        old = time.monotonic() - self._heard_at > IDLE_S
        if old and not self.stats.get("running"):
            return {**self.stats, "tok_s": 0.0}
        return self.stats

    @property
    def stalled(self) -> bool:
        """Whether there is work and nothing was heard for long."""
        return bool(self._streams) and time.monotonic() - self._heard_at > STALLED_S

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        mailbox: Mailbox,
        *,
        index: int = 0,
        salt: str = "",
        draft_n_max: int | None = None,
        detail: bool = False,
        store: bool = True,
    ) -> Stream:
        """Send a request. Await `accepted` of the stream: then it is in the engine's queue.

        That raises ApiError when the engine refuses the request, EngineGone when it died.

        Args:
            mailbox: where its batches go; several requests may share one.
            detail: tell the number of drafts of each block, too.
            store: False keeps nothing of it to learn from.

        Raises:
            ApiError: there is no engine at the moment.
        """
        self.require_ready()
        name = f"s{next(self._names)}"
        stream = Stream(name, index, mailbox, asyncio.get_running_loop().create_future())
        self._streams[name] = stream
        if len(self._streams) == 1:
            self._heard_at = time.monotonic()
        self._send(
            {
                "op": "add",
                "id": name,
                "prompt": prompt,
                "params": params_to_json(params),
                "grammar": bool(params.grammar_options),
                "salt": salt,
                "draft_n_max": draft_n_max,
                "detail": detail,
                "store": store,
            }
        )
        return stream

    def close(self, stream: Stream, left_at: float | None = None) -> None:
        """Nobody reads a stream any more: abort its request, unless it has ended.

        `left_at` is when its client's connection closed (time.monotonic), if that is why.
        """
        if self._streams.pop(stream.name, None) is not None and not stream.ended:
            self._send({"op": "abort", "id": stream.name, "left": left_at})
        stream.ended = True
        if not stream.accepted.cancel() and not stream.accepted.cancelled():
            stream.accepted.exception()  # seen, whoever else looks

    async def embed(self, inputs: list[tuple[int, ...]], pooling: str) -> list[list[float]]:
        """Embeddings of token sequences.

        Raises:
            ApiError, EngineGone: as `submit`.
        """
        self.require_ready()
        name = f"e{next(self._names)}"
        answer: asyncio.Future[list[list[float]]] = asyncio.get_running_loop().create_future()
        self._answers[name] = answer
        self._send({"op": "embed", "id": name, "inputs": inputs, "pooling": pooling})
        try:
            return await answer
        finally:
            self._answers.pop(name, None)
            if answer.cancelled():  # the client has left
                self._send({"op": "abort", "id": name, "left": None})

    def require_ready(self) -> None:
        """Raises ApiError (503) while there is no engine to ask."""
        if self.state is not State.READY:
            raise ApiError(
                503, f"the engine is not ready: {self.state}", "engine_not_ready", retry_after_s=2
            )

    async def _keep_going(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            started = time.monotonic()
            await self._one_life()
            if self.state is State.STOPPED:
                return
            died_loading = self.state is not State.READY
            if died_loading and self.n_restarts == 0:
                self.load_error = self.load_error or ModelError(
                    "the engine's process ended while it loaded the model", "see what it printed"
                )
                self._enter(State.FAILED)
                return
            self._enter(State.RESTARTING)
            self._lose_all(EngineGone("the engine's process has died and is being restarted"))
            self.n_restarts += 1
            if time.monotonic() - started > STEADY_S:
                pause_s = FIRST_PAUSE_S
            self.note(f"the engine's process died; it is started again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _one_life(self) -> None:
        """Start the process and listen until it ends."""
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "outdraft.server.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else None,
                start_new_session=True,  # Ctrl-C in the terminal is for the server alone
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        loop = asyncio.get_running_loop()
        writer, frames = await loop.create_connection(lambda: Frames(self._hear), sock=ours)
        self._writer = writer
        self._send({"op": "load", "model": self.model, "config": asdict(self.config)})
        try:
            await frames.ended
        finally:
            self._writer = None
            writer.close()
            if self._process.returncode is None:
                if self.state is not State.STOPPED:
                    with contextlib.suppress(ProcessLookupError):
                        self._process.kill()
                await self._process.wait()

    def drop_answers(self, error: Exception) -> None:
        """Who waits for embeddings gets an error."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)

    def _hear(self, message: dict[str, Any]) -> None:
        self._heard_at = time.monotonic()
        match message["op"]:
            case "prompt":
                if (stream := self._streams.get(message["id"])) is not None:
                    batch = Batch(stream.index, [], None, message["logprobs"])
                    stream.mailbox.put(batch)
            case "tokens":
                for name, rows, end in message["batches"]:
                    stream = self._streams.get(name)
                    if stream is None:
                        continue
                    if end is not None:
                        stream.ended = True
                        del self._streams[name]
                    stream.mailbox.put(Batch(stream.index, rows, end))
            case "stats":
                self.stats = message
            case "accepted":
                stream = self._streams.get(message["id"])
                if stream is not None and not stream.accepted.done():
                    stream.accepted.set_result(None)
            case "refused":
                self._refused(message)
            case "embedding":
                answer = self._answers.get(message["id"])
                if answer is not None and not answer.done():
                    answer.set_result(message["vectors"])
            case "loaded":
                self.info = message["info"]
                self._enter(State.READY)

    def _refused(self, message: dict[str, Any]) -> None:
        if not message["id"]:  # the model cannot be loaded
            self.load_error = ModelError(message["message"], message["hint"])
            return
        stream = self._streams.pop(message["id"], None)
        answer = self._answers.get(message["id"]) if stream is None else stream.accepted
        if stream is not None:
            stream.ended = True
        if answer is None or answer.done():
            return
        if message["kind"] == "QueueFull":
            error = ApiError(503, "too many requests wait", "queue_full", retry_after_s=1)
        elif message["known"]:
            error = ApiError(400, f"{message['message']}: {message['hint']}")
        else:
            self.note(f"a request failed: {message['kind']}: {message['message']}")
            error = ApiError(500, "the engine could not prepare this request")
        answer.set_exception(error)

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(pack(message))

    def _enter(self, state: State) -> None:
        self.state = state
        self.changed.set()

    def _lose_all(self, error: Exception) -> None:
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.ended = True
            if stream.accepted.done():
                stream.mailbox.put(error)
            else:
                stream.accepted.set_exception(error)
        self.drop_answers(error)
        self.stats = {**self.stats, "running": 0, "waiting": 0}


def _has_fileno(stream: Any) -> bool:
    try:
        return bool(os.fstat(stream.fileno()))
    except (OSError, ValueError, AttributeError):
        return False
