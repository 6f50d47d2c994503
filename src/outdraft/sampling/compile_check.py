"""Whether a grammar compiles in time, found out where it may fail in any way.

A grammar from a stranger can keep the compiler busy for minutes or overflow its stack, which no
limit of the library prevents (`{"multipleOf": 1000003}`, a chain of 3,000 rules). So each new one
is compiled in a process of its own first, which ends when it has computed for too long: seconds of
a core, not of the clock, since a busy machine must not refuse what an idle one takes. Here: that
process's life. Not here: what it does (compile_worker.py), what is compiled for use (grammar.py).
"""

import contextlib
import json
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from outdraft.errors import QueueFull, SamplingError

CPU_S = 3.0
"""Of computing. The kernel counts whole seconds, so up to one more."""
WALL_S = 30.0
"""On the clock: for a process that is stuck, and as long as one waits for those before it."""
START_S = 120.0

MEMORY_BYTES = 8 * 2**30
"""Of addresses, most of which are never touched."""

HINT = "check it, or make it simpler and smaller"


class CompileCheck:
    """One process that tries grammars, one at a time; started when first needed and when it died.

    Args:
        tokenizer_json, vocab, eos_ids: as for `Grammars`.
        limits: keyword arguments of `llguidance.LLParserLimits`.
        cpu_s: seconds of a core that a grammar may take.
        wall_s: seconds on the clock that it may take.
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab: int,
        eos_ids: list[int],
        limits: dict[str, Any],
        cpu_s: float = CPU_S,
        wall_s: float = WALL_S,
    ) -> None:
        self.cpu_s = cpu_s
        self.wall_s = wall_s
        self._setup = {
            "tokenizer": tokenizer_json,
            "vocab": vocab,
            "eos_ids": eos_ids,
            "limits": limits,
            "memory_bytes": MEMORY_BYTES,
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def check(self, source: str) -> None:
        """Compile a grammar in the other process. Any thread may call; it waits its turn.

        Raises:
            SamplingError: it is not valid, takes too long, or ends the compiler.
            QueueFull: other grammars keep the process busy.
        """
        if not self._lock.acquire(timeout=self.wall_s):
            raise QueueFull("other grammars are being compiled", "try again later")
        try:
            error = _ask(self._started(), [source, self.cpu_s], self.wall_s)
        except SamplingError:
            self._kill()
            raise
        finally:
            self._lock.release()
        if error is not None:
            raise refused(error)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            path = Path(__file__).with_name("compile_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(path)],  # -P: its directory is not imported from
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            weakref.finalize(self, _end, self._process)
            if (error := _ask(self._process, self._setup, START_S)) is not None:
                raise refused(error)
        return self._process

    def _kill(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None


def refused(error: str) -> SamplingError:
    """The compiler's message as an error of the request."""
    text = error.replace("<non-verbose/>", "").strip()[:500]
    return SamplingError(f"the grammar cannot be followed: {text}", HINT)


def _ask(process: "subprocess.Popen[str]", message: Any, seconds: float) -> str | None:
    """Send a line and wait for the line that answers it."""
    assert process.stdin is not None and process.stdout is not None
    until = time.monotonic() + seconds
    crashed = SamplingError("the grammar cannot be followed: it ends the compiler", HINT)
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except OSError as error:
        raise crashed from error
    too_long = SamplingError("the grammar takes too long to compile", HINT)
    ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
    if not ready:
        raise too_long
    line = process.stdout.readline()
    if not line:
        if process.wait() == -signal.SIGXCPU:
            raise too_long
        raise crashed
    answer: str | None = json.loads(line)
    return answer


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # what was to be flushed has no reader
            pipe.close()
