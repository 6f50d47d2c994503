"""The memory of recurrent layers: states of a fixed size, several for each sequence.

Here: the tensors, and the numbers of a call. Not here: which state is whose (states.py), what the
states are made of (ops/), keys and values (memory.py).

Shapes: S states, C channels and W width of the convolution, H heads, K and V dimensions of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outdraft.cache.states import StateBooks


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


class RecurrentMemory:
    """States of all recurrent layers of a model; one number stands for a state of each layer."""

    def __init__(
        self,
        layers: Mapping[int, RecurrentLayer],
        books: StateBooks,
        device: torch.device | None = None,
    ) -> None:
        """`layers` by index."""
        self.books = books
        self.state_bytes = sum(layer.n_bytes for layer in layers.values())
        total = books.pool.n_pages
        self.layers = {
            index: States(
                torch.zeros(total, layer.width - 1, layer.channels, device=device),
                torch.zeros(total, layer.n_heads, layer.k_dim, layer.v_dim, device=device),
            )
            for index, layer in layers.items()
        }

    @property
    def n_bytes(self) -> int:
        """Bytes of all states."""
        return self.books.pool.n_pages * self.state_bytes

    def numbers(
        self, sequence: str, length: int, n_rows: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """`StateRows.read_T` and `write_T` of its next n rows."""
        read, writes = self.books.numbers(sequence, length, n_rows)
        write_T = np.full(n_rows, -1, np.int32)
        for row, state in writes:
            write_T[row] = state
        return np.full(n_rows, read, np.int32), write_T
