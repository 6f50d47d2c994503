"""Memory of what recorded calls hand to one another.

Here: giving out pieces while a program is recorded and taking them back as soon as nothing can
read them any more. Calls of a program run in the order in which they were recorded, so a piece
whose tensor is gone when a later call is recorded may hold that call's result. All programs of an
arena use the same memory: what one of them leaves there lasts until another is replayed.
"""

import math
import weakref
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

ALIGN = 128  # two cache lines: those next to each other are fetched together
FIRST_BYTES = 1 << 20


@dataclass(slots=True)
class Chunk:
    """One allocation; `free` are pieces (first byte, bytes) in order, never two side by side."""

    memory: "np.ndarray[tuple[int], np.dtype[np.uint8]]"
    free: list[tuple[int, int]] = field(default_factory=list)

    def take(self, n_bytes: int) -> int | None:
        """Where the first free piece of that size begins, which is no longer free."""
        for i, (first, size) in enumerate(self.free):
            if size >= n_bytes:
                self.free[i : i + 1] = [(first + n_bytes, size - n_bytes)][: size > n_bytes]
                return first
        return None

    def give(self, first: int, n_bytes: int) -> None:
        """Take a piece back."""
        self.free = sorted([*self.free, (first, n_bytes)])
        joined = self.free[:1]
        for begin, size in self.free[1:]:
            last, before = joined[-1]
            if last + before == begin:
                joined[-1] = (last, before + size)
            else:
                joined.append((begin, size))
        self.free = joined


class Arena:
    """See the module docstring."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self._round = 0

    @property
    def n_bytes(self) -> int:
        """All memory of the arena."""
        return sum(chunk.memory.size for chunk in self.chunks)

    def start(self) -> None:
        """A new program is recorded: all memory is free for it."""
        self._round += 1
        for chunk in self.chunks:
            start = -chunk.memory.ctypes.data % ALIGN
            chunk.free = [(start, chunk.memory.size - start)]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose memory is free again once it and all views of it are gone."""
        size = math.prod(shape) * dtype.itemsize
        n_bytes = max(ALIGN, -(-size // ALIGN) * ALIGN)
        chunk, first = self._take(n_bytes)
        piece = chunk.memory[first : first + n_bytes]
        weakref.finalize(piece, self._give, self._round, chunk, first, n_bytes).atexit = False
        return torch.from_numpy(piece)[:size].view(dtype).view(shape)

    def holds(self, x: Tensor) -> bool:
        """Whether the memory of a tensor is the arena's."""
        return any(
            0 <= x.data_ptr() - chunk.memory.ctypes.data < chunk.memory.size
            for chunk in self.chunks
        )

    def _take(self, n_bytes: int) -> tuple[Chunk, int]:
        for chunk in self.chunks:
            first = chunk.take(n_bytes)
            if first is not None:
                return chunk, first
        # Twice as much as the last: programs that were recorded before keep what they have.
        size = max([FIRST_BYTES, n_bytes, *(2 * chunk.memory.size for chunk in self.chunks)])
        chunk = Chunk(np.empty(size + ALIGN, dtype=np.uint8))
        start = -chunk.memory.ctypes.data % ALIGN
        chunk.free = [(start, size)]
        self.chunks.append(chunk)
        first = chunk.take(n_bytes)
        assert first is not None
        return chunk, first

    def _give(self, started: int, chunk: Chunk, first: int, n_bytes: int) -> None:
        if started == self._round:
            chunk.give(first, n_bytes)
