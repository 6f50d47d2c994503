"""Another library's kernels, timed in a process of their own: the child's side.

The child answers one JSON line on its stdout for each on its stdin, and does nothing in between:
before it answers, it waits until the library's threads sleep, so that none of them spins while
another backend is measured. What libraries print goes to stderr. Not here: the libraries
(…_kernels.py beside this file), the parent's side (kernel_peers.py).

Shapes: T rows, N outputs, K inputs.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from outdraft.bench.kernels import n_calls, rows_agree
from outdraft.bench.stopwatch import settle


class Loaded(Protocol):
    """Some copies of a weight [N, K], as the library stores it."""

    n_bytes: int
    """Of one copy, scales and all."""
    n_copies: int

    def linear(self, x_TK: Tensor) -> Tensor:
        """The first copy times fp32 rows."""
        ...

    def bind(self, x_TK: Tensor, n_calls: int) -> Callable[[], None]:
        """What multiplies fp32 rows, in the type that the library takes, by so many copies."""
        ...


@dataclass(frozen=True, slots=True)
class PeerKernel:
    """A kernel of a library: `load(n, k, n_bytes)` makes copies of so many bytes together."""

    name: str
    bits: int
    load: Callable[[int, int, int], Loaded]


class Server:
    """Answers requests about the kernels of one library."""

    def __init__(self, kernels: Sequence[PeerKernel], version: str) -> None:
        """For these kernels."""
        self.kernels = {kernel.name: kernel for kernel in kernels}
        self.version = version
        self.loaded: dict[str, tuple[int, Loaded]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; see the methods for what is in both."""
        do: dict[str, Callable[..., dict[str, Any]]] = {
            "kernels": self.list,
            "prepare": self.prepare,
            "agree": self.agree,
            "time": self.time,
        }
        with torch.inference_mode():
            answer = do[request.pop("do")](**request)
        settle()
        return answer

    def list(self) -> dict[str, Any]:
        """The kernels' names and bits a weight, and the library's version."""
        kernels = [{"name": kernel.name, "bits": kernel.bits} for kernel in self.kernels.values()]
        return {"kernels": kernels, "version": self.version}

    def prepare(self, kernel: str, n: int, k: int, n_bytes: int) -> dict[str, Any]:
        """Make copies of a weight; those of before go. Returns the bytes of one."""
        self.loaded.pop(kernel, None)
        loaded = self.kernels[kernel].load(n, k, n_bytes)
        self.loaded[kernel] = k, loaded
        return {"n_bytes": loaded.n_bytes}

    def agree(self, kernel: str) -> dict[str, Any]:
        """Whether the kernel is row-invariant."""
        k, loaded = self.loaded[kernel]
        return {"agree": rows_agree(loaded.linear, k)}

    def time(self, kernel: str, rows: int) -> dict[str, Any]:
        """Seconds of a number of calls with so many rows."""
        k, loaded = self.loaded[kernel]
        count = n_calls(loaded.n_copies, rows)
        run = loaded.bind(torch.randn(rows, k), count)
        start = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - start, "calls": count}


def serve(server: Server, requests: Iterable[str], write: Callable[[str], object]) -> None:
    """Answer line by line until there are no more."""
    for line in requests:
        write(json.dumps(server.answer(json.loads(line))) + "\n")


def main(module: str, threads: int) -> None:
    """Serve the kernels of a module on this process's stdin and stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints is no answer
    torch.set_num_threads(threads)
    peer = importlib.import_module(module)
    serve(Server(peer.kernels(threads), peer.version()), sys.stdin, answers.write)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
