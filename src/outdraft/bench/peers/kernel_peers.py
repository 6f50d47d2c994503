"""Other libraries' kernels as backends of `bench kernels`: the parent's side.

Each library runs in a process of its own (kernel_server.py) that works only while it is asked.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from outdraft.bench.kernels import Backend, Case
from outdraft.errors import OutdraftError


@dataclass(frozen=True, slots=True)
class Library:
    """What is needed to have a library as a peer: packages, and the module with its kernels."""

    packages: tuple[str, ...]
    module: str


LIBRARIES = {
    "torch": Library(("torch",), "outdraft.bench.peers.torch_kernels"),
    "onnxruntime": Library(("onnxruntime", "onnx"), "outdraft.bench.peers.onnxruntime_kernels"),
    "openvino": Library(("openvino",), "outdraft.bench.peers.openvino_kernels"),
}


def missing_packages(name: str) -> list[str]:
    """Packages of a library that are not installed."""
    return [p for p in LIBRARIES[name].packages if importlib.util.find_spec(p) is None]


def installed_peers() -> list[str]:
    """Libraries that can be measured here."""
    return [name for name in LIBRARIES if not missing_packages(name)]


class PeerProcess:
    """A library's process. Asking one that has ended raises `OutdraftError`."""

    def __init__(self, name: str, threads: int) -> None:
        """Start it with so many threads."""
        self.name = name
        command = [sys.executable, "-m", "outdraft.bench.peers.kernel_server"]
        self.process = subprocess.Popen(
            [*command, LIBRARIES[name].module, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise OutdraftError(
                f"the process with {self.name}'s kernels ended while asked to {do}",
                "its own message is above; leave it out with --peer, naming the others",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class PeerLinear(Backend):
    """One kernel of a library."""

    def __init__(self, process: PeerProcess, kernel: str, bits: int) -> None:
        """In this process."""
        self.process = process
        self.name, self.kernel, self.bits = process.name, kernel, bits
        self.size = (0, 0, 0)  # N, K, bytes

    def prepare(self, n: int, k: int, n_bytes: int) -> None:
        """See `Backend`."""
        answer = self.process.ask("prepare", kernel=self.kernel, n=n, k=k, n_bytes=n_bytes)
        self.size = n, k, answer["n_bytes"]

    def case(self, rows: int) -> Case:
        """See `Backend`."""
        n, k, n_bytes = self.size

        def seconds() -> float:
            answer = self.process.ask("time", kernel=self.kernel, rows=rows)
            return float(answer["seconds"]) / int(answer["calls"])

        return Case(self.name, self.kernel, rows, n, k, n_bytes, seconds)

    def row_invariant(self) -> bool:
        """See `Backend`."""
        return bool(self.process.ask("agree", kernel=self.kernel)["agree"])


@contextmanager
def peer_backends(
    names: Sequence[str], threads: int, report: Callable[[str, str], None]
) -> Iterator[list[Backend]]:
    """All kernels of these libraries, as long as it lasts.

    Args:
        report: told each library's name and version.

    Raises:
        OutdraftError: one of them is not installed.
    """
    for name in names:
        if missing := missing_packages(name):
            raise OutdraftError(
                f"{name} is not installed: {', '.join(missing)}", "pip install 'outdraft[peers]'"
            )
    with ExitStack() as stack:
        backends: list[Backend] = []
        for name in names:
            process = PeerProcess(name, threads)
            stack.callback(process.close)
            answer = process.ask("kernels")
            report(name, answer["version"])
            backends += [
                PeerLinear(process, entry["name"], entry["bits"]) for entry in answer["kernels"]
            ]
        yield backends
