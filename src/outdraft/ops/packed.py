"""Weights in the layout that the compiled CPU kernels read.

Here: their memory, filling it a range of rows at a time, and taking rows out again. Not here: the
kernels (ops/cpu.py), choosing a format for a model and files of packed weights (weights/).

Shapes: N output rows, K inputs, E blocks (experts), C groups of inputs that share a scale, B
output rows of a block rounded up to the 16 of a panel.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops import memory

Format = Literal["bf16", "w8", "w4"]

PANEL_ROWS = 16
GROUP_SIZES = (32, 64, 128)
MAX_INPUTS = 65536
"""int32 sums of products of bytes stay exact up to here."""

LAYOUT = _core.packed_layout()
"""Name of the layout that the kernels read: packed weights of another one are of no use."""

_FORMAT_CODES: dict[Format, int] = {"bf16": 0, "w8": 1, "w4": 2}
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def dtype_code(dtype: torch.dtype) -> int:
    """The core's number for a tensor type."""
    return _DTYPE_CODES[dtype]


def matrix(x: Tensor) -> _core.Matrix:
    """A tensor [rows, ...] whose rows are contiguous, as the core takes it."""
    assert x.device.type == "cpu" and x.dim() >= 2 and x[0].is_contiguous()
    return _core.Matrix(x.data_ptr(), x.stride(0), dtype_code(x.dtype))


def part_bytes(
    format: Format, n: int, k: int, *, group: int, n_blocks: int = 1, zero_points: bool = False
) -> tuple[int, int, int]:
    """Bytes of the data, the scales and the zeros of a packed weight; see `PackedLinear`."""
    rows = -(-n // PANEL_ROWS) * PANEL_ROWS * n_blocks
    if format == "w4":
        groups = -(-k // group)
        return rows * groups * group // 2, rows * groups * 2, rows * groups * zero_points
    if format == "w8":
        return rows * (-(-k // 4) * 4), rows * 4, rows * 4
    return rows * (-(-k // 2) * 4), 0, 0


def part_types(format: Format) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Element types of the same three."""
    scales = torch.float16 if format == "w4" else torch.float32
    return torch.uint8, scales, torch.int32 if format == "w8" else torch.uint8


def no_matrix() -> _core.Matrix:
    """An optional matrix left out."""
    return _core.Matrix(0, 0, 0)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [N, K], or E of them, packed.

    Attributes:
        format: `bf16`; `w8`, int8 with a scale a row; `w4`, nibbles with a scale a group.
        n: output rows of a block.
        k: inputs.
        group: inputs that share a scale (w4), else 0.
        n_blocks: number of weights (experts).
        data: uint8, the panels.
        scales: w8 fp32 [E * B]; w4 fp16, by panel; bf16 empty.
        zeros: w8 int32 row sums [E * B]; w4 uint8 zero-points, empty when all are 8.
    """

    format: Format
    n: int
    k: int
    group: int
    n_blocks: int
    data: Tensor
    scales: Tensor
    zeros: Tensor
    core: _core.Weight

    @classmethod
    def empty(
        cls,
        format: Format,
        n: int,
        k: int,
        *,
        group: int = 32,
        n_blocks: int = 1,
        zero_points: bool = False,
    ) -> "PackedLinear":
        """Weights that are all zero, to be filled by the `put_` methods.

        Args:
            zero_points: w4 only: keep a zero-point for each group instead of 8 for all.
        """
        assert n > 0 and 0 < k <= MAX_INPUTS and n_blocks > 0
        assert format != "w4" or group in GROUP_SIZES
        sizes = part_bytes(format, n, k, group=group, n_blocks=n_blocks, zero_points=zero_points)
        data, scales, zeros = (
            _zero_bytes(size).view(dtype)
            for size, dtype in zip(sizes, part_types(format), strict=True)
        )
        return cls.of_memory(
            format,
            n,
            k,
            data,
            scales,
            zeros,
            group=group if format == "w4" else 0,
            n_blocks=n_blocks,
        )

    @classmethod
    def of_memory(
        cls,
        format: Format,
        n: int,
        k: int,
        data: Tensor,
        scales: Tensor,
        zeros: Tensor,
        *,
        group: int,
        n_blocks: int = 1,
    ) -> "PackedLinear":
        """Packed weights that exist already, for example in a mapped file."""
        core = _core.Weight(
            _FORMAT_CODES[format],
            n,
            k,
            group,
            n_blocks,
            *(_address(t) for t in (data, scales, zeros)),
        )
        assert data.numel() == core.data_bytes
        return cls(format, n, k, group, n_blocks, data, scales, zeros, core)

    @classmethod
    def pack(
        cls, weight_NK: Tensor, format: Format, *, group: int = 32, candidates: int = 1
    ) -> "PackedLinear":
        """Pack a whole weight [N, K] or [E, N, K], fp32 or bf16; see `put_floats`."""
        weight_ENK = weight_NK if weight_NK.dim() == 3 else weight_NK[None]
        n_blocks, n, k = weight_ENK.shape
        packed = cls.empty(format, n, k, group=group, n_blocks=n_blocks)
        for block in range(n_blocks):
            packed.put_floats(weight_ENK[block], block=block, candidates=candidates)
        return packed

    @property
    def n_bytes(self) -> int:
        """Memory of all parts."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales, self.zeros))

    def put_floats(
        self, rows_NK: Tensor, *, first: int = 0, block: int = 0, candidates: int = 1
    ) -> None:
        """Fill rows `first` onwards of a block from fp32 or bf16 rows, quantising them.

        Args:
            candidates: scales tried for each row (w8) or group (w4), between the one that covers
                its widest value and 0.7 of that; the one with the least squared error is taken.
        """
        assert self.zeros.dtype != torch.uint8 or self.zeros.numel() == 0
        self._check(rows_NK, first)
        _core.pack_floats(
            self.core, matrix(rows_NK), self._row(first, block), rows_NK.shape[0], candidates
        )

    def put_w8(self, rows_NK: Tensor, scales_N: Tensor, *, first: int = 0, block: int = 0) -> None:
        """Fill rows from int8 rows, -127..127, with fp32 scales."""
        assert self.format == "w8" and rows_NK.dtype == torch.int8
        self._check(rows_NK, first)
        scales_N = scales_N.float().contiguous()
        assert scales_N.shape == rows_NK.shape[:1]
        _core.pack_w8(
            self.core,
            rows_NK.data_ptr(),
            rows_NK.stride(0),
            scales_N.data_ptr(),
            self._row(first, block),
            rows_NK.shape[0],
        )

    def put_w4(
        self,
        rows_NK: Tensor,
        scales_NC: Tensor,
        zeros_NC: Tensor | None = None,
        *,
        first: int = 0,
        block: int = 0,
    ) -> None:
        """Fill rows from uint8 rows, 0..15: weight = (row - zero-point) * scale.

        Scales are stored as fp16. `zeros_NC`, uint8, is given if and only if the weight keeps
        zero-points.
        """
        assert self.format == "w4" and rows_NK.dtype == torch.uint8
        assert (zeros_NC is not None) == (self.zeros.numel() > 0)
        self._check(rows_NK, first)
        scales_NC = scales_NC.float().contiguous()
        zeros_NC = None if zeros_NC is None else zeros_NC.to(torch.uint8).contiguous()
        assert scales_NC.shape == (rows_NK.shape[0], -(-self.k // self.group))
        _core.pack_w4(
            self.core,
            rows_NK.data_ptr(),
            rows_NK.stride(0),
            scales_NC.data_ptr(),
            0 if zeros_NC is None else zeros_NC.data_ptr(),
            self._row(first, block),
            rows_NK.shape[0],
        )

    def _row(self, first: int, block: int) -> int:
        assert 0 <= block < self.n_blocks
        return block * (-(-self.n // PANEL_ROWS) * PANEL_ROWS) + first

    def _check(self, rows_NK: Tensor, first: int) -> None:
        assert rows_NK.dim() == 2 and rows_NK.shape[1] == self.k and rows_NK.stride(1) == 1
        assert first >= 0 and first + rows_NK.shape[0] <= self.n


def _address(x: Tensor) -> int:
    return x.data_ptr() if x.numel() else 0


def _zero_bytes(n: int) -> Tensor:
    return memory.zeros([n], torch.uint8)
