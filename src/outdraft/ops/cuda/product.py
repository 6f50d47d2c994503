"""Launching a product with a weight; the kernels are in linears.py, how it is cut in cuts.py.

Shapes: T rows, N outputs, K inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from outdraft.ops.cuda import linears
from outdraft.ops.cuda.cuts import Cut
from outdraft.ops.cuda.weights import CudaWeight


def launch(
    x_TK: Tensor,
    weight: CudaWeight,
    out: Tensor,
    cut: Cut,
    tickets_of: dict[int, Tensor],
    dot: tl.dtype,
    options: dict[str, Any],
) -> None:
    """x W^T into `out` [T, N].

    Args:
        tickets_of: int32 zeros by their number, which a split of K counts in and leaves zero.
        dot: type of a product's inputs.
        options: what every kernel is told.
    """
    on_card = x_TK.device.type != "cpu"
    t, n, k = x_TK.shape[0], weight.n, weight.k
    parts = tickets = out
    grid = (triton.cdiv(t, 16), triton.cdiv(n, cut.tile_n), cut.split)
    if cut.split > 1:
        parts = torch.empty(cut.split, t, n, device=x_TK.device)
        size = triton.next_power_of_2(grid[0] * grid[1])
        if size not in tickets_of:
            tickets_of[size] = torch.zeros(size, device=x_TK.device, dtype=torch.int32)
        tickets = tickets_of[size]
    if cut.slices > 1:
        assert weight.bits == 16 and cut.split == 1
        n_tiles = triton.cdiv(triton.cdiv(k, cut.tile_k), cut.slices)
        linears.sliced_kernel[grid[:2]](
            x_TK, weight.data, out, t, n_tiles, n, k, x_TK.stride(0), SLICES=cut.slices,
            BN=cut.tile_n, BK=cut.tile_k, DOT=dot,
            TILES=0 if on_card else n_tiles, num_warps=cut.slices,
            num_stages=cut.stages, **options,
        )  # fmt: skip
        return
    tile_k = cut.tile_k if weight.bits == 16 else 128
    n_tiles = triton.cdiv(triton.cdiv(k, tile_k), cut.split)
    shared = {"SPLIT": cut.split, "BN": cut.tile_n, "num_warps": cut.warps,
              "num_stages": cut.stages, "DOT": dot,
              "TILES": 0 if on_card else n_tiles, **options}  # fmt: skip
    if weight.bits == 16:
        even = n % cut.tile_n == 0 and n_tiles * cut.split * tile_k == k
        linears.linear_kernel[grid](
            x_TK, weight.data, parts, out, tickets, t, n_tiles, n, k, x_TK.stride(0),
            BK=tile_k, EVEN=even, **shared,
        )  # fmt: skip
        return
    assert weight.scales is not None and cut.tile_n in (64, 128)
    linears.packed_kernel[grid](
        x_TK, weight.data, weight.scales, parts, out, tickets, t, n_tiles, n, k,
        weight.k_tiles, weight.scales.stride(0), x_TK.stride(0), BITS=weight.bits,
        ASM=on_card, **shared,
    )  # fmt: skip
