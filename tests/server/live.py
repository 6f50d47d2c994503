"""A live server for tests: the real process on a free port."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Live:
    """A running `outdraft serve demo`."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End it without a chance to say goodbye, with the processes it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def launch(directory: Path, *options: str, port: int | None = None) -> Live:
    """Start a server and wait until it answers; its output goes to a file in `directory`."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "outdraft", "serve", "demo", "--port", str(port), *options]
    with (directory / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    live = Live(process, port)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, (directory / "server.log").read_text()
        try:
            with urllib.request.urlopen(live.url + "/health", timeout=2):
                return live
        except OSError:
            time.sleep(0.1)
    raise AssertionError((directory / "server.log").read_text())
