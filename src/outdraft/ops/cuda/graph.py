"""Operations recorded as CUDA graphs (ops/record.py says what recording is)."""

from typing import Any

import torch

SEGMENTS = (10,)
"""Products after which a new graph begins. Launching takes time by the number of kernels, and the
device begins when a launch is done: while it works on a short first graph the next is launched.
Most are launched while the device has other work, and each new graph costs it some microseconds."""


class GraphProgram:
    """A recorded call as graphs that run one after another.

    Graphs of one `pool` share memory and so must not run at the same time.
    """

    def __init__(self, pool: Any, device: torch.device) -> None:
        """Nothing recorded yet."""
        self.depth = 0
        self.n_products = 0
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = pool
        self._device = device
        self._stream: Any = None

    def enter(self) -> None:
        """Begin, unless another part of the same recording has."""
        if self.depth == 0:
            torch.cuda.synchronize(self._device)
            self._stream = torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
            self._stream.__enter__()
            self._begin()
        self.depth += 1

    def leave(self) -> None:
        """End with the part that began first."""
        self.depth -= 1
        if self.depth == 0:
            try:
                self.graphs[-1].capture_end()
            finally:
                self._stream.__exit__(None, None, None)

    def product(self) -> None:
        """A product is about to be recorded."""
        if self.n_products in SEGMENTS:
            self.graphs[-1].capture_end()
            self._begin()
        self.n_products += 1

    def replay(self) -> None:
        """Launch the graphs; what they write is there when the stream gets to it."""
        for graph in self.graphs:
            graph.replay()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        self.graphs.append(graph)
