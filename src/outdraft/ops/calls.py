"""What every kernel call needs: the program that it goes into, memory, and checks of its arguments.

Shapes: as in ops/kernels.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.packed import PackedLinear, matrix, no_matrix
from outdraft.ops.program import Program


@dataclass(slots=True, kw_only=True)
class Calls:
    """Calls run at once, or are recorded when `program` is set."""

    program: Program | None = None
    _prepared_rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        if self.program is None:
            return torch.empty(shape, dtype=dtype)
        return self.program.arena.empty(tuple(shape), dtype)

    def _target(self, *used: object) -> _core.Program | None:
        """The program to record into, which then keeps what the call uses."""
        if self.program is None:
            return None
        self.program.keep(used)
        return self.program.core

    def _prepared(self, weight: PackedLinear, n_rows: int) -> Tensor:
        """Memory for the prepared rows; calls that run at once share one, recorded ones do not."""
        n_bytes = _core.prepared_bytes(weight.core, n_rows)
        if self.program is not None:
            return self.empty((n_bytes,), torch.uint8)
        if self._prepared_rows.numel() < n_bytes:
            self._prepared_rows = torch.empty(n_bytes, dtype=torch.uint8)
        return self._prepared_rows


def check(x: Tensor, dtype: torch.dtype) -> None:
    assert x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def optional(x: Tensor | None) -> _core.Matrix:
    return no_matrix() if x is None else matrix(x)
