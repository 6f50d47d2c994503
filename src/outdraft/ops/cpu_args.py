"""What the compiled CPU kernels are given besides tensors: pages, visible keys, angles, programs.

Not here: the operations (ops/cpu.py), weights (ops/packed.py).

Shapes: T rows, G key/value heads, D head dimension, P pages, S slots in a page, B sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.packed import dtype_code


class Program:
    """Recorded kernel calls of a step, replayed with one parallel region.

    Recording runs nothing; the tensors that recorded operations return are filled by each `replay`,
    from what the tensors they were given hold at that time.
    """

    def __init__(self) -> None:
        """An empty program."""
        self.core = _core.Program()
        self.tensors: list[object] = []

    def replay(self) -> None:
        """Run all recorded calls."""
        self.core.replay()

    def __len__(self) -> int:
        """Number of kernel calls."""
        return len(self.core)


@dataclass(frozen=True, slots=True)
class KvPages:
    """Keys and values of a layer, each [P, G, S, D] fp32, bf16, or int8 with scales [P, G, S]."""

    k_PGSD: Tensor
    v_PGSD: Tensor
    k_scales_PGS: Tensor | None = None
    v_scales_PGS: Tensor | None = None

    def core(self) -> _core.KvPages:
        """As the compiled core takes it."""
        k, v = self.k_PGSD, self.v_PGSD
        assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape and k.dtype == v.dtype
        assert (self.k_scales_PGS is not None) == (k.dtype == torch.int8)
        return _core.KvPages(
            k.data_ptr(),
            v.data_ptr(),
            0 if self.k_scales_PGS is None else self.k_scales_PGS.data_ptr(),
            0 if self.v_scales_PGS is None else self.v_scales_PGS.data_ptr(),
            dtype_code(k.dtype),
            k.shape[1],
            k.shape[3],
        )


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Which keys each row sees; all int32.

    Row t sees key positions `lo_T[t]..hi_T[t]`, both included, of sequence `sequence_T[t]`; rows of
    a sequence lie together. Position p of sequence b is in slot p % 64 of page
    `table_BP[b, p // 64 - first_page_B[b]]`.
    """

    table_BP: Tensor
    first_page_B: Tensor
    sequence_T: Tensor
    lo_T: Tensor
    hi_T: Tensor


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin of the angles, fp32 [positions, D / 2], and the position of each row, int32."""

    cos: Tensor
    sin: Tensor
    position_T: Tensor


@dataclass(frozen=True, slots=True)
class PageSlots:
    """Where each row's key or value goes: int32 page and slot; a negative page is not written."""

    page_T: Tensor
    slot_T: Tensor
