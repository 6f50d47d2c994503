"""Operations recorded as a CUDA graph (ops/record.py says what recording is)."""

from typing import Any

import torch


class GraphProgram:
    """One CUDA graph. Graphs of one `pool` share memory and so must not run at the same time."""

    def __init__(self, pool: Any) -> None:
        """Begin to capture what the current stream's owner launches."""
        self.depth = 0
        self.graph = torch.cuda.CUDAGraph()
        self._capture = torch.cuda.graph(self.graph, pool=pool)

    def enter(self) -> None:
        """Begin, unless another part of the same recording has."""
        if self.depth == 0:
            self._capture.__enter__()
        self.depth += 1

    def leave(self) -> None:
        """End with the part that began first."""
        self.depth -= 1
        if self.depth == 0:
            self._capture.__exit__(None, None, None)

    def replay(self) -> None:
        """Launch the graph; what it writes is there when the stream gets to it."""
        self.graph.replay()
