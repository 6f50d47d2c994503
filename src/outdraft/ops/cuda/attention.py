"""Launching attention; its kernels are in kernels.py.

Shapes: T rows, H query heads, G key/value heads, D head dimension, S slots in a page.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from outdraft.ops.base import PAGE_SLOTS, AttentionRows, KvPages
from outdraft.ops.cuda import kernels

MERGED = 16  # parts that are merged at once
PART_BYTES = 64 << 20  # partial sums that are held at once
WARPS = 8  # for heads above 128
TILES = (64, 32)  # keys of a product, of heads up to 256 and above
MIN_LINES = 16  # of a product on a tensor core


def attend(
    q_THD: Tensor,
    kv: KvPages,
    rows: AttentionRows,
    scale: float,
    dot: tl.dtype,
    launch: dict[str, Any],
) -> Tensor:
    """`Ops.attention`, bf16 [T, H, D].

    Args:
        dot: type of a product's inputs.
        launch: what every kernel is told.
    """
    (t, h, d), n_splits = q_THD.shape, rows.table_BP.shape[1]
    out = torch.empty(t, h, d, device=q_THD.device, dtype=torch.bfloat16)
    step = max(1, PART_BYTES // (4 * n_splits * h * d))
    for first in range(0, t, step):
        some = slice(first, first + step)
        _attend(q_THD[some], kv, rows, some, out[some], scale, dot, launch)
    return out


def _attend(
    q_THD: Tensor,
    kv: KvPages,
    rows: AttentionRows,
    some: slice,
    out: Tensor,
    scale: float,
    dot: tl.dtype,
    launch: dict[str, Any],
) -> None:
    t, h, d = q_THD.shape
    g, n_splits = kv.k_PGSD.shape[1], rows.table_BP.shape[1]
    part = torch.empty(t, n_splits, h, d, device=q_THD.device)
    stats = torch.empty(t, n_splits, h, 2, device=q_THD.device)
    lo_T, hi_T = rows.lo_T[some], rows.hi_T[some]
    kernels.attention_kernel[(t, g, n_splits)](
        q_THD, kv.k_PGSD, kv.v_PGSD, rows.table_BP, rows.first_page_B, rows.sequence_T[some],
        lo_T, hi_T, part, stats, scale, t, n_splits, n_splits, g, D=d, GROUP=h // g,
        GP=max(MIN_LINES, triton.next_power_of_2(h // g)), SLOTS=PAGE_SLOTS,
        TILE=TILES[d > 256], DOT=dot, num_warps=WARPS if d > 128 else 4, **launch,
    )  # fmt: skip
    kernels.attention_merge_kernel[(t, h, triton.cdiv(d, 128))](
        part, stats, lo_T, hi_T, out, n_splits, h, D=d, BD=min(d, 128), SLOTS=PAGE_SLOTS,
        PARTS=MERGED, **launch,
    )  # fmt: skip
