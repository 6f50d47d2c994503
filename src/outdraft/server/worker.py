"""The engine's process: `python -m outdraft.server.worker FD`.

It holds the `LLM`. One thread steps it; another reads commands from the socket and prepares
requests, those with a grammar in a pool, so that a slow grammar holds up neither steps nor other
requests. Not here: the other end (engine.py), and what is counted for people (gauges.py).

Commands: `load` (first), `add`, `abort`, `embed`, `stop`. Reports: `loaded` or `refused` for the
load; `accepted` or `refused` for a request, then `prompt` with its log-probabilities,
if asked for, and `tokens` with what all requests got since the last such message; `embedding`;
`stats` twice a second while there is work, and once when it ends.
"""

import gc
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from outdraft.config import EngineConfig
from outdraft.engine.embed import Pooling, embed
from outdraft.engine.engine import LLM, completion_of
from outdraft.engine.learning import Learning
from outdraft.engine.sequence import Sequence, check_prompt
from outdraft.errors import OutdraftError
from outdraft.request import Logprobs, TokenEvent
from outdraft.server.gauges import Gauges, describe
from outdraft.server.wire import pack, params_from_json, receive

FLUSH_S = 0.016
"""Tokens of faster steps travel together, for as long as a screen shows a picture: every message
takes time of a core that computes."""
URGENT_S = 0.004
"""The same while a first or last token is held back: somebody waits for those."""
IDLE_REPORT_S = 0.05
KEPT_STARTS = 4096
"""Beginnings of steps that are remembered, to count those since a connection closed."""
STATS_S = 0.5
GRAMMAR_THREADS = 2


@dataclass(slots=True)
class _Live:
    """A request in progress: its name in the server, and what was last said about it."""

    name: str
    sequence: Sequence
    detail: bool
    n_drafted: int = 0
    began: bool = False
    prompt_told: bool = False


@dataclass(slots=True)
class _Embedding:
    """Texts of one request, and the vectors of those that are done."""

    name: str
    inputs: list[list[int]]
    pooling: Pooling
    vectors: list[list[float]] = field(default_factory=list)


class Worker:
    """Steps an engine and speaks for it. All but `read` runs in one thread."""

    def __init__(self, llm: LLM, sock: socket.socket) -> None:
        self.llm = llm
        self.sock = sock
        self.inbox: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self.live: dict[str, _Live] = {}  # by the engine's id
        self.by_name: dict[str, str] = {}
        self.gone: set[str] = set()  # aborted while being prepared
        self.preparing: set[str] = set()
        self.held: dict[str, list[list[Any]]] = {}
        self.urgent = False
        self.embeddings: deque[_Embedding] = deque()
        self.gauges = Gauges(llm)
        self.n_steps = 0  # that have begun
        self.step_starts: deque[float] = deque(maxlen=KEPT_STARTS)
        self._lock = threading.Lock()
        self._flushed_at = self._reported_at = 0.0
        self._pool = ThreadPoolExecutor(GRAMMAR_THREADS, "grammar")

    def read(self) -> None:
        """The reading thread: commands until the socket closes, which ends the process."""
        try:
            while (message := receive(self.sock)) is not None:
                self.hear(message)
        finally:
            self.inbox.put(lambda: False)

    def hear(self, message: dict[str, Any]) -> None:
        """One command; most become an order for the thread that steps."""
        match message["op"]:
            case "add" if message["grammar"]:
                with self._lock:
                    self.preparing.add(message["id"])
                self._pool.submit(self.prepare, message)
            case "add":
                self.prepare(message)
            case "abort":
                with self._lock:  # no step begins between this count and the order
                    abort = partial(self.abort, message["id"], message["left"], self.n_steps)
                    self.inbox.put(abort)
            case "embed":
                texts = _Embedding(message["id"], message["inputs"], message["pooling"])
                self.inbox.put(partial(self.queue, texts))

    def prepare(self, message: dict[str, Any]) -> None:
        """Make a request ready; what cannot be is refused. Any thread."""
        name = message["id"]
        try:
            sequence = self.llm.prepare(
                message["prompt"],
                params_from_json(message["params"]),
                cache_salt=message["salt"],
                draft_n_max=message["draft_n_max"],
                store=message["store"],
            )
        except Exception as error:
            self.inbox.put(partial(self.refuse, _refusal(name, error)))
        else:
            self.inbox.put(partial(self.add, _Live(name, sequence, message["detail"])))

    def run(self) -> None:
        """Steps and messages until the socket is closed."""
        while self.obey():
            self.collect(self.llm.step())
            if self.embeddings:
                self.embed(self.embeddings[0])
            now = time.monotonic()
            if now - self._flushed_at >= (URGENT_S if self.urgent else FLUSH_S):
                self.flush(now)
            if now - self._reported_at >= STATS_S:
                self.report(now)

    def obey(self) -> bool:
        """Do what was asked meanwhile; waits while there is no work. False to stop."""
        while not self._step_begins():
            if self.inbox.empty():  # idle
                self.flush(time.monotonic())
            if not self._next_order()():
                return False
        return True

    def _step_begins(self) -> bool:
        """Whether nothing else is asked for and there is work; then the step counts from now."""
        with self._lock:
            if not self.inbox.empty() or not (self.llm.scheduler.busy or self.embeddings):
                return False
            self.n_steps += 1
            self.step_starts.append(time.monotonic())
            return True

    def _next_order(self) -> Callable[[], bool]:
        """Waits for it; says how the engine is once nobody has asked for anything for a while."""
        with suppress(queue.Empty):
            return self.inbox.get(timeout=IDLE_REPORT_S)
        self.report(time.monotonic())
        return self.inbox.get()

    def refuse(self, refusal: dict[str, Any]) -> bool:
        """Pass on why a request cannot run."""
        self._settle(refusal["id"])
        self.send(refusal)
        return True

    def add(self, live: _Live) -> bool:
        """Queue a request, unless its caller has left."""
        if self._settle(live.name):
            return True
        try:
            self.llm.scheduler.add(live.sequence)
        except Exception as error:
            return self.refuse(_refusal(live.name, error))
        self.live[live.sequence.id] = live
        self.by_name[live.name] = live.sequence.id
        self.send({"op": "accepted", "id": live.name})
        return True

    def _settle(self, name: str) -> bool:
        """A request is no longer being prepared; whether it was aborted meanwhile."""
        with self._lock:
            self.preparing.discard(name)
            gone = name in self.gone
            self.gone.discard(name)
        return gone

    def abort(self, name: str, left_at: float | None, n_steps: int) -> bool:
        """End a request before the next step.

        Args:
            left_at: when its connection closed (time.monotonic), if that is why.
            n_steps: that had begun when the order arrived.
        """
        sequence_id = self.by_name.get(name)
        if sequence_id is None:
            with self._lock:
                if name in self.preparing:
                    self.gone.add(name)
            self.embeddings = deque(e for e in self.embeddings if e.name != name)
            return True
        event = self.llm.abort(sequence_id)
        if event is not None:
            self.collect([event])
            self.gauges.abort(self.n_steps - n_steps, left_at, self.step_starts)
        return True

    def queue(self, texts: _Embedding) -> bool:
        """Texts to embed, one behind each step."""
        self.embeddings.append(texts)
        return True

    def embed(self, texts: _Embedding) -> None:
        """The next text; the answer after the last one."""
        try:
            tokens = tuple(texts.inputs[len(texts.vectors)])
            check_prompt(tokens, self.llm.target.config.vocab_size, self.llm.ctx_size)
            chunk = self.llm.config.prefill_chunk
            self.llm.learning.pause()
            texts.vectors.append(embed(self.llm.runner, tokens, texts.pooling, chunk).tolist())
        except Exception as error:
            self.embeddings.popleft()
            self.send(_refusal(texts.name, error))
        else:
            if len(texts.vectors) == len(texts.inputs):
                self.embeddings.popleft()
                self.send({"op": "embedding", "id": texts.name, "vectors": texts.vectors})
        self.llm.learning.rest(busy=self.llm.scheduler.busy)

    def collect(self, events: list[TokenEvent]) -> None:
        """Hold events back for the next message."""
        self.gauges.count(events)
        for event in events:
            live = self.live.get(event.request_id)
            if live is None:
                continue
            row: list[Any] = [event.token, event.text, event.drafted]
            if event.logprobs is not None or live.detail:
                row.append(_logprobs(event.logprobs))
            if live.detail:
                row.append(self._drafts_of(live))
            self.held.setdefault(event.request_id, []).append(row)
            if event.finish_reason is not None or not live.began:
                self.urgent = live.began = True

    def _drafts_of(self, live: _Live) -> int:
        """Drafts of the block that an event came from: told with its first token."""
        n_drafted = live.sequence.stats.n_drafted
        n, live.n_drafted = n_drafted - live.n_drafted, n_drafted
        return n

    def flush(self, now: float) -> None:
        """Send what is held back; who has ended is forgotten."""
        self._flushed_at = now
        if not self.held:
            return
        batches = []
        for sequence_id, rows in self.held.items():
            live = self.live[sequence_id]
            self._tell_prompt(live)
            end = None
            if live.sequence.finish_reason is not None:
                end = self._end(live)
                del self.live[sequence_id], self.by_name[live.name]
            batches.append([live.name, rows, end])
        self.held, self.urgent = {}, False
        self.send({"op": "tokens", "batches": batches})

    def _tell_prompt(self, live: _Live) -> None:
        """Log-probabilities of the prompt go before its first token, once."""
        found = live.sequence.prompt_logprobs
        if (
            found
            and not live.prompt_told
            and len(found) == len(live.sequence.request.prompt_tokens)
        ):
            live.prompt_told = True
            rows = [_logprobs(one) for one in found]
            self.send({"op": "prompt", "id": live.name, "logprobs": rows})

    def _end(self, live: _Live) -> dict[str, Any]:
        sequence = live.sequence
        self.gauges.end(sequence)
        done = completion_of(sequence, "")
        end: dict[str, Any] = {
            "reason": sequence.finish_reason,
            "error": sequence.error,
            "timings": done.timings,
            "n_prompt": len(done.prompt_tokens),
            "n_cached": done.cached_tokens,
        }
        return end

    def report(self, now: float) -> None:
        """Say how the engine is."""
        self._reported_at = now
        self.flush(now)  # or who has just ended would count neither as running nor as ended
        self.send({"op": "stats", "steps": self.n_steps, **self.gauges.read(now)})

    def send(self, message: dict[str, Any]) -> None:
        """One message; the server has gone if it cannot be sent, and then so do we."""
        try:
            self.sock.sendall(pack(message))
        except OSError:
            raise SystemExit(0) from None


def _logprobs(given: Logprobs | None) -> list[Any] | None:
    return None if given is None else [given.token, given.rank, [list(t) for t in given.top]]


def _refusal(name: str, error: Exception) -> dict[str, Any]:
    known = isinstance(error, OutdraftError)
    return {
        "op": "refused",
        "id": name,
        "kind": type(error).__name__,
        "known": known,
        "message": error.message if isinstance(error, OutdraftError) else f"{error}",
        "hint": error.hint if isinstance(error, OutdraftError) else "",
    }


def main() -> None:
    """Load what the server asks for, then serve it until it goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer
    sock = socket.socket(fileno=int(sys.argv[1]))
    order = receive(sock)
    if order is None:
        return
    try:
        llm = LLM(order["model"], EngineConfig(**order["config"]))
    except Exception as error:
        sock.sendall(pack(_refusal("", error)))
        return
    for note in llm.loading.notes:
        print(note, file=sys.stderr)
    gc.collect()
    gc.freeze()  # or a full collection would look at all that was loaded, in the middle of a step
    worker = Worker(llm, sock)
    if isinstance(llm.learning, Learning):
        llm.learning.changed = lambda: worker.inbox.put(lambda: True)  # said when idle
    worker.send({"op": "loaded", "info": describe(llm)})
    threading.Thread(target=worker.read, name="commands", daemon=True).start()
    worker.run()


if __name__ == "__main__":
    main()
