"""Memory for what recorded calls return: all programs of some operations use the same bytes.

Programs run one at a time and their results are read before the next one runs, so a recording for
every number of rows need not have memory of its own.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64
BLOCK_BYTES = 1 << 22


class Arena:
    """Blocks of bytes, handed out from the front after each `rewind`; they stay where they are."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block = 0
        self._used = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.numel() for block in self._blocks)

    def rewind(self) -> None:
        """Begin from the front: what was handed out is shared with what comes now."""
        self._block = self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined contents that overlaps no other since the last `rewind`."""
        n_bytes = -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        while self._block < len(self._blocks):
            block = self._blocks[self._block]
            if self._used + n_bytes <= block.numel():
                own = block[self._used : self._used + prod(shape) * dtype.itemsize]
                self._used += n_bytes
                return own.view(dtype).view(*shape)
            self._block, self._used = self._block + 1, 0
        self._blocks.append(torch.empty(max(n_bytes, BLOCK_BYTES), dtype=torch.uint8))
        return self.take(shape, dtype)
