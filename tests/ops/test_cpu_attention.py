"""Paged attention of the compiled core against fp64, and alone against in company."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from outdraft.ops.cpu import CpuOps
from outdraft.ops.cpu_args import AttentionRows, KvPages, PageSlots, Rotary

SLOTS = 64
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def random_pages(
    n_pages: int, n_kv: int, dim: int, dtype: torch.dtype, rng: torch.Generator
) -> KvPages:
    shape = (n_pages, n_kv, SLOTS, dim)
    if dtype == torch.int8:
        k, v = (torch.randint(-127, 128, shape, generator=rng, dtype=dtype) for _ in range(2))
        scales = [(torch.rand(shape[:3], generator=rng) + 0.5) / 100 for _ in range(2)]
        return KvPages(k, v, *scales)
    k, v = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    return KvPages(k, v)


def random_rows(
    n_rows: int, n_pages: int, window: int | None, rng: torch.Generator
) -> AttentionRows:
    """Rows of two sequences at their ends, whose pages are mixed in memory."""
    per_sequence = n_pages // 2
    table = torch.randperm(n_pages, generator=rng)[: 2 * per_sequence].int().view(2, per_sequence)
    first_page = torch.tensor([0, 3], dtype=torch.int32)
    sequence = (torch.arange(n_rows) >= n_rows // 2).int()
    span = per_sequence * SLOTS
    last = torch.randint(span // 2, span, (n_rows,), generator=rng)
    lo = torch.zeros_like(last) if window is None else (last - window + 1).clamp_min(0)
    base = first_page[sequence] * SLOTS
    return AttentionRows(table, first_page, sequence, (lo + base).int(), (last + base).int())


def reference(q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
    out = torch.empty(q_THD.shape, dtype=torch.float64)
    n_heads, n_kv = q_THD.shape[1], kv.k_PGSD.shape[1]
    k, v = kv.k_PGSD.double(), kv.v_PGSD.double()
    if kv.k_scales_PGS is not None and kv.v_scales_PGS is not None:
        k, v = k * kv.k_scales_PGS.double()[..., None], v * kv.v_scales_PGS.double()[..., None]
    for t in range(q_THD.shape[0]):
        b = int(rows.sequence_T[t])
        first = int(rows.first_page_B[b]) * SLOTS
        pages = rows.table_BP[b].long()
        seen = slice(int(rows.lo_T[t]) - first, int(rows.hi_T[t]) - first + 1)
        for h in range(n_heads):
            keys = k[pages, h * n_kv // n_heads].flatten(0, 1)[seen]
            values = v[pages, h * n_kv // n_heads].flatten(0, 1)[seen]
            weights = torch.softmax(keys @ q_THD[t, h].double() * scale, dim=0)
            out[t, h] = weights @ values
    return out


def take(rows: AttentionRows, index: Tensor) -> AttentionRows:
    return replace(
        rows, sequence_T=rows.sequence_T[index], lo_T=rows.lo_T[index], hi_T=rows.hi_T[index]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "dim", "window"),
    [(8, 1, 64, None), (4, 2, 80, 70), (3, 3, 32, None), (10, 2, 512, 30), (6, 1, 16, 1)],
)
def test_equals_fp64(
    ops: CpuOps,
    dtype: torch.dtype,
    n_heads: int,
    n_kv: int,
    dim: int,
    window: int | None,
    rng: torch.Generator,
) -> None:
    kv = random_pages(8, n_kv, dim, dtype, rng)
    rows = random_rows(7, 8, window, rng)
    q = torch.randn(7, n_heads, dim, generator=rng)
    scale = dim**-0.5
    out = ops.attention(q, kv, rows, scale)
    torch.testing.assert_close(out.double(), reference(q, kv, rows, scale), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_see_its_neighbours(
    ops: CpuOps, dtype: torch.dtype, rng: torch.Generator
) -> None:
    kv = random_pages(6, 2, 48, dtype, rng)
    rows = random_rows(17, 6, 100, rng)
    q = torch.randn(17, 10, 48, generator=rng)
    alone = torch.cat(
        [ops.attention(q[t : t + 1], kv, take(rows, torch.tensor([t])), 0.3) for t in range(17)]
    )
    for n_rows in range(1, 18):
        index = torch.randperm(17, generator=rng)[:n_rows].sort().values
        assert torch.equal(ops.attention(q[index], kv, take(rows, index), 0.3), alone[index])


def test_large_scores_do_not_overflow(ops: CpuOps, rng: torch.Generator) -> None:
    kv = random_pages(4, 1, 32, torch.float32, rng)
    rows = random_rows(3, 4, None, rng)
    q = 1e4 * torch.randn(3, 2, 32, generator=rng)
    out = ops.attention(q, kv, rows, 1.0)
    torch.testing.assert_close(out.double(), reference(q, kv, rows, 1.0), rtol=1e-2, atol=1e-3)


def test_keys_that_are_not_seen_do_not_matter(ops: CpuOps, rng: torch.Generator) -> None:
    kv = random_pages(4, 1, 32, torch.float32, rng)
    rows = random_rows(3, 4, 20, rng)
    rows = replace(rows, sequence_T=torch.zeros_like(rows.sequence_T))
    rows = replace(rows, lo_T=torch.full_like(rows.lo_T, 5), hi_T=torch.full_like(rows.hi_T, 9))
    q = torch.randn(3, 2, 32, generator=rng)
    expected = ops.attention(q, kv, rows, 1.0)
    for pool in (kv.k_PGSD, kv.v_PGSD):
        page = pool[int(rows.table_BP[0, 0])]
        page[:, :5] = torch.nan
        page[:, 10:] = torch.nan
    assert torch.equal(ops.attention(q, kv, rows, 1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_written_where_attention_reads(
    ops: CpuOps, dtype: torch.dtype, rng: torch.Generator
) -> None:
    pages = torch.zeros(5, 2, SLOTS, 64, dtype=dtype)
    scales = torch.zeros(5, 2, SLOTS) if dtype == torch.int8 else None
    x = torch.randn(4, 2, 64, generator=rng)
    weight = torch.rand(64, generator=rng) + 0.5
    angles = torch.randn(9, 32, generator=rng)
    rotary = Rotary(angles.cos(), angles.sin(), torch.tensor([3, 8, 0, 1], dtype=torch.int32))
    page = torch.tensor([4, 0, -1, 2], dtype=torch.int32)
    slot = torch.tensor([63, 0, 1, 17], dtype=torch.int32)
    ops.write_heads(x, pages, scales, PageSlots(page, slot), weight, rotary, eps=1e-6)
    y = ops.norm_rope(x, weight, rotary, 1e-6)
    stored = pages.float() if scales is None else pages.float() * scales[..., None]
    tolerance = {torch.float32: 0.0, torch.bfloat16: 0.01, torch.int8: 0.02}[dtype]
    for t in (0, 1, 3):
        torch.testing.assert_close(
            stored[page[t], :, slot[t]], y[t], rtol=tolerance, atol=tolerance
        )
        stored[page[t], :, slot[t]] = 0
    assert (stored == 0).all()
