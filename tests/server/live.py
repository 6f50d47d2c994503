"""A real server process for tests: started on a free port, asked over HTTP, ended by SIGTERM.

Not a test itself. `Live` is what the fixtures give.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
import psutil

T = TypeVar("T")
START_S = 90.0
ROOT = Path(__file__).parents[2]


@dataclass
class Live:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]
    log: BinaryIO
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=60, trust_env=False, **options
        )

    def get(self, path: str) -> Any:
        with self.client() as client:
            return client.get(path)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/outdraft/stats").json()
        return found

    def worker(self) -> psutil.Process:
        """The engine's process."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "outdraft.server.worker" in child.cmdline():
                    return child
        raise AssertionError("no engine")

    def output(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def wait_idle(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Stats once nothing is in the engine and all pages are free or cached."""
        deadline = time.monotonic() + timeout_s
        while True:
            stats = self.stats()
            gauge = self.metric("outdraft_requests_in_flight")
            if stats["running"] == stats["waiting"] == stats["pages"]["used"] == gauge == 0:
                return stats
            assert time.monotonic() < deadline, f"still busy: {stats}"
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")


def run(work: Coroutine[Any, Any, T]) -> T:
    """In a thread of its own: the browser's tests leave a loop running in the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def live_server(
    *options: str,
    model: str = "demo",
    key: str | None = None,
    wait: bool = True,
    port: int | None = None,
) -> Iterator[Live]:
    """Starts `outdraft serve`, ready when the body of the `with` begins."""
    port = port or free_port()
    keyed = ("--api-key", key) if key else ()
    command = [sys.executable, "-m", "outdraft", "serve", model, "--port", str(port)]
    command += ["--threads", "1", *keyed, *options]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            command, stderr=log, stdout=log, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        live = Live(port, process, log, key)  # type: ignore[arg-type]
        try:
            if wait:
                wait_ready(live)
            yield live
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def wait_ready(live: Live, timeout_s: float = START_S) -> None:
    """Until /health says ok."""
    deadline = time.monotonic() + timeout_s
    while True:
        assert live.process.poll() is None, live.output()
        assert time.monotonic() < deadline, live.output()
        with suppress(httpx.TransportError):
            if live.get("/health").status_code == 200:
                return
        time.sleep(0.1)
