"""Launching a product with a weight; the kernels are in linears.py, how it is cut in cuts.py.

Shapes: T rows, N outputs, K inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from outdraft.ops.cuda import linears, quantised
from outdraft.ops.cuda.cuts import Cut
from outdraft.ops.cuda.weights import CudaWeight

FEW_ROWS = 8


@dataclass(frozen=True, slots=True)
class Gate:
    """What becomes of the sums (see `linear_kernel`): gated by `other`, or by their second half."""

    other: Tensor | None = None
    silu: bool = False


def launch(
    x_TK: Tensor,
    weight: CudaWeight,
    out: Tensor,
    cut: Cut,
    tickets_of: dict[int, Tensor],
    dot: tl.dtype,
    options: dict[str, Any],
    gate: Gate | None = None,
) -> None:
    """x W^T into `out` [T, N], or gated [T, N / 2] or [T, N].

    Args:
        tickets_of: int32 zeros by their number, which a split of K counts in and leaves zero.
        dot: type of a product's inputs; options: what every kernel is told.
    """
    on_card = x_TK.device.type != "cpu"
    t, n, k = x_TK.shape[0], weight.n, weight.k
    pair = gate is not None and gate.other is None
    n_out, tile_n = (n // 2, cut.tile_n // 2) if pair else (n, cut.tile_n)
    few = weight.bits != 16 and t <= FEW_ROWS and on_card  # one size of product on a CPU
    grid = (triton.cdiv(t, FEW_ROWS if few else 16), triton.cdiv(n_out, tile_n), cut.split)
    parts = tickets = out
    if cut.split > 1:
        parts = torch.empty(cut.split, t, n, device=x_TK.device)
        size = triton.next_power_of_2(grid[0] * grid[1])
        if size not in tickets_of:
            tickets_of[size] = torch.zeros(size, device=x_TK.device, dtype=torch.int32)
        tickets = tickets_of[size]
    if cut.slices > 1 and gate is None:
        assert weight.bits == 16 and cut.split == 1
        n_tiles = triton.cdiv(triton.cdiv(k, cut.tile_k), cut.slices)
        linears.sliced_kernel[grid[:2]](
            x_TK, weight.data, out, t, n_tiles, n, k, x_TK.stride(0), SLICES=cut.slices,
            BN=cut.tile_n, BK=cut.tile_k, DOT=dot,
            TILES=0 if on_card else n_tiles, num_warps=cut.slices,
            num_stages=cut.stages, **options,
        )  # fmt: skip
        return
    other = out if gate is None or gate.other is None else gate.other
    tile_k = cut.tile_k if weight.bits == 16 else 128
    n_tiles = triton.cdiv(triton.cdiv(k, tile_k), cut.split)
    shared = {"SPLIT": cut.split, "BN": tile_n, "num_warps": cut.warps, "DOT": dot,
              "GATE": 0 if gate is None else 1 if pair else 2,
              "SILU": gate is not None and gate.silu,
              "TILES": 0 if on_card else n_tiles, **options}  # fmt: skip
    if weight.bits == 16:
        even = not n_out % tile_n and n_tiles * cut.split * tile_k == k
        linears.linear_kernel[grid](
            x_TK, weight.data, other, parts, out, tickets, t, n_tiles, n, k, x_TK.stride(0),
            other.stride(0), BK=tile_k, EVEN=even, num_stages=cut.stages, **shared,
        )  # fmt: skip
        return
    assert weight.scales is not None
    quantised.packed_kernel[grid](
        x_TK, weight.data, weight.scales, other, parts, out, tickets, t, n_tiles, n, k,
        weight.k_tiles, weight.scales.stride(0), x_TK.stride(0), other.stride(0),
        BITS=weight.bits, R=FEW_ROWS if few else 16, STAGES=cut.stages,
        ASM=on_card, **shared,
    )  # fmt: skip
