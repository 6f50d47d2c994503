"""The memory of recurrent layers: states of a fixed size, several for each sequence.

A sequence owns a ring of states. It stands on one of them; a pass puts the state after each of its
last rows into the next ones and leaves that one as it was, so a pass can be repeated, and taking
back rejected drafts is to stand on another state: nothing is copied. With drafts of up to k tokens
a ring has k + 2 states. Not here: what the states are made of (ops/), keys and values (memory.py).

Shapes: S states, C channels and W width of the convolution, H heads, K and V dimensions of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """What one recurrent layer asks of the memory."""

    n_heads: int
    k_dim: int
    v_dim: int
    channels: int
    width: int

    @property
    def n_bytes(self) -> int:
        """Of one state, fp32."""
        inputs = (self.width - 1) * self.channels
        return 4 * (inputs + self.n_heads * self.k_dim * self.v_dim)


@dataclass(frozen=True, slots=True)
class States:
    """Of one layer, all sequences: fp32 inputs before [S, W - 1, C] and states [S, H, K, V]."""

    inputs_SWC: Tensor
    state_SHKV: Tensor


@dataclass(slots=True)
class _Ring:
    """Of one sequence: the state behind each of its last lengths."""

    behind: dict[int, int] = field(default_factory=dict)


class RecurrentMemory:
    """States of all recurrent layers of a model."""

    def __init__(
        self,
        layers: Mapping[int, RecurrentLayer],
        *,
        max_sequences: int,
        n_states: int,
        device: torch.device | None = None,
    ) -> None:
        """`layers` by index; `n_states` a sequence, at least 2."""
        assert n_states >= 2
        self.n_states = n_states
        self.max_sequences = max_sequences
        total = max_sequences * n_states
        self.layers = {
            index: States(
                torch.zeros(total, layer.width - 1, layer.channels, device=device),
                torch.zeros(total, layer.n_heads, layer.k_dim, layer.v_dim, device=device),
            )
            for index, layer in layers.items()
        }
        self._rings: dict[str, _Ring] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all states."""
        return 4 * sum(s.inputs_SWC.numel() + s.state_SHKV.numel() for s in self.layers.values())

    def open(self, sequence: str) -> None:
        """A sequence begins, with nothing before it."""
        self._rings[sequence] = _Ring()

    def close(self, sequence: str) -> None:
        """A sequence is forgotten."""
        del self._rings[sequence]

    def numbers(
        self, sequence: str, slot: int, length: int, n_rows: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """`StateRows.read_T` and `write_T` of its next n rows, by its `slot` in the pool."""
        assert slot < self.max_sequences, "more sequences than states were planned for"
        ring, first = self._rings[sequence], slot * self.n_states
        read = np.full(n_rows, first + ring.behind[length] if length > 0 else -1, np.int32)
        write = np.full(n_rows, -1, np.int32)
        for row, state in self._places(ring, length, n_rows):
            write[row] = first + state
        return read, write

    def advance(self, sequence: str, length: int, n_rows: int) -> None:
        """The next n rows behind `length` were run."""
        ring = self._rings[sequence]
        for row, state in self._places(ring, length, n_rows):
            ring.behind = {at: s for at, s in ring.behind.items() if s != state}
            ring.behind[length + row + 1] = state

    def rollback(self, sequence: str, length: int) -> None:
        """Only so many rows count; the state behind them is still there."""
        ring = self._rings[sequence]
        assert length == 0 or length in ring.behind, "more rows taken back than there are states"
        ring.behind = {at: s for at, s in ring.behind.items() if at <= length}

    def _places(self, ring: _Ring, length: int, n_rows: int) -> Sequence[tuple[int, int]]:
        """(row, state) of the rows whose states are kept: the last ones, not over the current."""
        current = ring.behind.get(length, -1)
        n_kept = min(n_rows, self.n_states - (1 if current >= 0 else 0))
        states = [(current + 1 + i) % self.n_states for i in range(n_kept)]
        return list(zip(range(n_rows - n_kept, n_rows), states, strict=True))
