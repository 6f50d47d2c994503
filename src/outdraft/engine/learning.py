"""Learning while serving, as the engine sees it: a process that computes only while it is idle.

The learner (train/learner.py) is stopped by a signal as soon as a step begins and goes on when
there has been nothing to do for a while, so that no step shares the processor with it; the engine's
own process never trains. One thread here speaks to it: texts one way, drafters that have passed the
learner's comparison the other. They are loaded while the engine is idle, piece by piece, and take
effect between two steps. Whatever becomes of the process, requests do not notice.

Here: when it runs, what goes over, exchanging drafters, restarts. Not here: what it learns.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outdraft.engine.replay import LearnStats, ReplayBuffer, served_text
from outdraft.engine.sequence import Sequence as Request
from outdraft.errors import OutdraftError
from outdraft.speculate.build import Renewal
from outdraft.weights.loading import Loading

READ_BYTES = 1 << 16
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
MOST_DEATHS = 6
"""So many without a finished comparison between them, and it is not started again."""
SHARED_MEMORY = Path("/dev/shm")


class _Closed(Exception):
    """The engine ends."""


class NotLearning:
    """Where nothing is learned: no process, no thread, no texts."""

    def pause(self) -> None:
        """Nothing runs."""

    def rest(self, *, busy: bool) -> None:
        """Nothing goes on."""

    def observe(self, request: Request) -> None:
        """Nothing is kept."""

    def stats(self) -> LearnStats | None:
        """There are none."""
        return None

    def close(self) -> None:
        """Nothing was begun."""


@dataclass(frozen=True, slots=True)
class Version:
    """A drafter: its number, its directory, and its network once it is loaded."""

    number: int
    path: Path
    network: Any = None


class Learning:
    """The engine's end of a learner. `pause`, `rest` and `observe` are the engine thread's."""

    def __init__(
        self,
        command: Sequence[str],
        order: dict[str, Any],
        renewal: Renewal,
        stock: Path,
        *,
        max_bytes: int,
        idle_s: float,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts a thread; the learner's process when there is something to learn.

        Args:
            command: of the learner; the descriptor of its socket is added.
            order: its first message: the model and how it is served.
            stock: directory of the drafter that is loaded.
            changed: called, in another thread, when `stats` has changed.
        """
        self.command, self.order, self.renewal = command, order, renewal
        self.idle_s, self.changed = idle_s, changed
        self.buffer = ReplayBuffer(max_bytes)
        self.live, self.previous = Version(0, stock), Version(0, stock)
        self.directory = _private_directory()
        self._stats = LearnStats()
        self._quiet = threading.Condition()
        self._busy = self._closed = self._running = False
        self._idle_at = time.monotonic()
        self._start_at = 0.0
        self._n_deaths = self._n_sent = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._incoming = b""
        self._outgoing = bytearray()
        self._pending: Version | None = None
        self._wake_in, self._wake_out = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="learning", daemon=True)
        self._thread.start()

    def begin_with(self, path: Path, network: Any) -> None:
        """Draft with a drafter that was learned before; called before the first step."""
        with self._quiet:
            old = self.renewal.exchange(network)
            self.previous, self.live = replace(self.live, network=old), Version(1, path, network)

    def pause(self) -> None:
        """A step begins: the learner stops. Returns when the signal is sent."""
        if self._busy:
            return
        with self._quiet:
            self._busy = True
            if self._running:
                self._running = False
                self._signal(signal.SIGSTOP)

    def rest(self, *, busy: bool) -> None:
        """A step has ended; unless the engine is `busy` there is nothing more to do."""
        if busy or not self._busy:
            return
        with self._quiet:
            self._busy = False
            self._idle_at = time.monotonic()
            self._quiet.notify_all()
        self._wake()

    def observe(self, request: Request) -> None:
        """A request has ended."""
        text = served_text(request, self.live.number)
        if text is not None:
            with self._quiet:
                self.buffer.add(text)

    def stats(self) -> LearnStats | None:
        """As it is now. Any thread may ask."""
        stats, buffer = self._stats, self.buffer
        state = stats.state
        if state == "learning" and not self._running:
            state = "paused"
        return replace(
            stats,
            state=state,
            version=self.live.number,
            n_texts=len(buffer.texts),
            n_tokens=buffer.n_tokens,
            n_bytes=buffer.n_bytes,
        )

    def close(self) -> None:
        """End the learner and the thread; what it has not finished is lost."""
        with self._quiet:
            if self._closed:
                return
            self._closed = True
            self._quiet.notify_all()
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_in.send(b"x")

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def _serve(self) -> None:
        """The thread."""
        try:
            while True:
                self._turn()
        except _Closed:
            pass
        except Exception as error:  # an error of this program costs learning, not serving
            self._stats.state, self._stats.last_error = "failed", f"{error!r}"
        finally:
            self._end_process()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _turn(self) -> None:
        """Start or go on if it is time, exchange drafters, then wait for what comes next."""
        with self._quiet:
            if self._closed:
                raise _Closed
            if self._pending is not None and not self._busy:
                self._exchange(self._pending)
                self._pending = None
            wait_s = self._go_on()
        if wait_s == 0 and self._process is None:
            self._start()
            with self._quiet:
                self._running = not self._busy
                if self._busy:
                    self._signal(signal.SIGSTOP)
            wait_s = None
        self._feed()
        for key, _ in self._selector.select(wait_s):
            if key.fileobj is self._wake_out:
                self._wake_out.recv(READ_BYTES)
            else:
                self._hear()

    def _go_on(self) -> float | None:
        """Let the learner run if the engine has been idle for long enough; else how long to wait.

        None is until something happens, 0 that it is time to start the process.
        """
        if self._busy or self._running or self._stats.state == "failed":
            return None
        if self._process is None and not self.buffer.n_added:
            return None
        now = time.monotonic()
        left_s = max(self._idle_at + self.idle_s, self._start_at) - now
        if left_s > 0:
            return left_s
        if self._process is None:
            return 0.0
        self._signal(signal.SIGCONT)
        self._running = True
        return None

    def _start(self) -> None:
        self._clean()
        ours, theirs = socket.socketpair()
        with theirs:
            # A group of its own in our session: were we to die while it is stopped, the kernel
            # would end it (SIGHUP and SIGCONT to a group without a parent in its session).
            self._process = subprocess.Popen(
                [*self.command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        ours.setblocking(False)
        self._socket, self._incoming, self._n_sent = ours, b"", 0
        self._selector.register(ours, selectors.EVENT_READ)
        drafters = {"live": str(self.live.path), "previous": str(self.previous.path)}
        numbers = {"number": self.live.number, "directory": str(self.directory)}
        self._outgoing = bytearray(_line({"op": "load", **self.order, **drafters, **numbers}))

    def _feed(self) -> None:
        """Send what it has not seen, as much as goes."""
        if self._socket is None:
            return
        with self._quiet:
            texts, self._n_sent = self.buffer.since(self._n_sent), self.buffer.n_added
        for text in texts:
            row = {"n_prompt": text.n_prompt, "version": text.version}
            self._outgoing += _line({"op": "text", "tokens": text.tokens.tolist(), **row})
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing[:READ_BYTES])]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        if self._selector.get_key(self._socket).events != events:
            self._selector.modify(self._socket, events)

    def _hear(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        if lines:
            self.changed()

    def _obey(self, message: dict[str, Any]) -> None:
        """What the learner says."""
        stats = self._stats
        match message["op"]:
            case "progress":
                stats.state = "learning" if message["busy"] else "waiting"
                stats.n_steps += message["steps"]
                stats.seconds += message["seconds"]
            case "compared":
                self._n_deaths = 0
                stats.n_candidates += 1
                stats.n_refused += not message["better"]
                stats.live, stats.candidate = message["live"], message["candidate"]
            case "candidate":
                self._load(Version(message["number"], Path(message["path"])))
            case "rollback":
                if self.previous.network is not None and self.previous is not self.live:
                    self._pending = self.previous
                else:
                    self._tell_live()

    def _load(self, version: Version) -> None:
        """Make a candidate ready, in pieces between which requests go first."""
        try:
            network = self.renewal.load(version.path, Loading(lambda *_: self._give_way()))
        except (OutdraftError, OSError) as error:
            self._stats.last_error = f"{error}"
            self._stats.n_refused += 1
            self._tell_live()
            return
        self._pending = replace(version, network=network)

    def _give_way(self) -> None:
        with self._quiet:
            self._quiet.wait_for(lambda: self._closed or not self._busy)
            if self._closed:
                raise _Closed

    def _exchange(self, version: Version) -> None:
        """Between two steps: the lock is held and the engine is idle."""
        old = self.renewal.exchange(version.network)
        if version is self.previous:
            self.live = self.previous
            self._stats.n_rollbacks += 1
        else:
            self.previous, self.live = replace(self.live, network=old), version
            self._stats.n_swaps += 1
        self._clean()
        self._tell_live()

    def _clean(self) -> None:
        """Remove drafters that are not in use any more, and what a learner left that died."""
        for path in self.directory.iterdir():
            if path not in (self.live.path, self.previous.path):
                shutil.rmtree(path, ignore_errors=True)

    def _tell_live(self) -> None:
        self._outgoing += _line({"op": "live", "number": self.live.number})

    def _lost(self) -> None:
        """The process has died. It is started again, later each time."""
        self._end_process()
        self._n_deaths += 1
        if self._n_deaths >= MOST_DEATHS:
            self._stats.state = "failed"
            return
        self._stats.state = "restarting"
        self._stats.n_restarts += 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (self._n_deaths - 1), LONGEST_PAUSE_S)
        self._start_at = time.monotonic() + pause_s

    def _end_process(self) -> None:
        with self._quiet:
            process, self._process, self._running = self._process, None, False
            self._pending = None  # the next learner would know nothing of it
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None
        self._outgoing.clear()
        if process is not None:
            process.kill()
            process.wait()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _private_directory() -> Path:
    """For drafters on their way: in memory where there is such a place."""
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="outdraft-learn-", dir=place))
