"""Paged attention of the compiled core against fp64, and alone against in company."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.base import AttentionRows, KvPages, PageSlots, Rotary
from outdraft.ops.cpu import CpuOps

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


def tolerance(kv: KvPages) -> float:
    """Absolute. On tiles weights and queries are sums of two bf16 numbers, off by 2^-16 of it."""
    tiles = _core.current_isa() == "avx512-amx" and kv.k_PGSD.shape[3] % 32 == 0
    return 1e-5 if tiles and kv.k_PGSD.dtype == torch.bfloat16 else 2e-6


def take(rows: AttentionRows, index: Tensor) -> AttentionRows:
    return replace(
        rows, sequence_T=rows.sequence_T[index], lo_T=rows.lo_T[index], hi_T=rows.hi_T[index]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "dim", "window"),
    [
        (8, 1, 64, None),
        (8, 2, 64, 100),
        (16, 2, 128, None),
        (6, 2, 256, 70),
        (4, 2, 80, 70),
        (3, 3, 32, None),
        (10, 2, 512, 30),
        (6, 1, 16, 1),
    ],
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
    expected = reference(q, kv, rows, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=tolerance(kv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_heads", "dim"), [(10, 48), (10, 32), (4, 64), (8, 128)])
def test_a_row_does_not_see_its_neighbours(
    ops: CpuOps, dtype: torch.dtype, n_heads: int, dim: int, rng: torch.Generator
) -> None:
    kv = random_pages(6, 2, dim, dtype, rng)
    rows = random_rows(17, 6, 100, rng)
    q = torch.randn(17, n_heads, dim, generator=rng)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(("lo", "hi"), [(5, 9), (5, 40), (15, 63), (16, 16), (20, 47)])
def test_keys_that_are_not_seen_do_not_matter(
    ops: CpuOps, dtype: torch.dtype, dim: int, lo: int, hi: int, rng: torch.Generator
) -> None:
    kv = random_pages(4, 1, dim, dtype, rng)
    rows = random_rows(3, 4, 20, rng)
    rows = replace(rows, sequence_T=torch.zeros_like(rows.sequence_T))
    rows = replace(rows, lo_T=torch.full_like(rows.lo_T, lo), hi_T=torch.full_like(rows.hi_T, hi))
    q = torch.randn(3, 2, dim, generator=rng)
    expected = ops.attention(q, kv, rows, 1.0)
    for pool in (kv.k_PGSD, kv.v_PGSD):
        page = pool[int(rows.table_BP[0, 0])]
        page[:, :lo] = torch.nan
        page[:, hi + 1 :] = torch.nan
    assert torch.equal(ops.attention(q, kv, rows, 1.0), expected)


def test_a_broken_draft_stays_out_of_the_rows_before_it(ops: CpuOps, rng: torch.Generator) -> None:
    """Keys and values that only the last of several rows of a sequence sees are not finite."""
    kv = random_pages(4, 1, 64, torch.bfloat16, rng)
    rows = random_rows(5, 4, None, rng)
    rows = replace(rows, sequence_T=torch.zeros_like(rows.sequence_T))
    rows = replace(rows, lo_T=torch.zeros_like(rows.lo_T), hi_T=70 + torch.arange(5).int())
    q = torch.randn(5, 4, 64, generator=rng)
    expected = ops.attention(q, kv, rows, 1.0)
    for pool in (kv.k_PGSD, kv.v_PGSD):
        pool[int(rows.table_BP[0, 1]), :, 74 - SLOTS] = torch.inf
    assert torch.equal(ops.attention(q, kv, rows, 1.0)[:4], expected[:4])


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_heads", "n_kv", "window"), [(8, 1, None), (6, 2, 300), (5, 5, 700)])
def test_long_contexts_give_the_same_bits_however_they_are_shared(
    dtype: torch.dtype, n_heads: int, n_kv: int, window: int | None, rng: torch.Generator
) -> None:
    """Parts of the context are computed by different workers and added up in one order."""
    n_pages, dim, ops = 60, 32, CpuOps()
    kv = random_pages(n_pages, n_kv, dim, dtype, rng)
    rows = random_rows(11, n_pages, window, rng)
    q = torch.randn(11, n_heads, dim, generator=rng)
    _core.set_threads(1)
    alone = torch.cat(
        [ops.attention(q[t : t + 1], kv, take(rows, torch.tensor([t])), 0.2) for t in range(11)]
    )
    expected = reference(q, kv, rows, 0.2)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-4, atol=tolerance(kv))
    for threads in (2, 3, 1):
        _core.set_threads(threads)
        for n_rows in (1, 2, 4, 11):
            index = torch.randperm(11, generator=rng)[:n_rows].sort().values
            out = ops.attention(q[index], kv, take(rows, index), 0.2)
            assert torch.equal(out, alone[index]), (threads, n_rows)


@pytest.mark.parametrize("lo", [0, 1, 255, 256, 257])
@pytest.mark.parametrize("hi", [257, 511, 512, 513, 767])
def test_parts_begin_and_end_anywhere(lo: int, hi: int, rng: torch.Generator) -> None:
    kv = random_pages(12, 1, 16, torch.float32, rng)
    table = torch.randperm(12, generator=rng).int()[None]
    one = torch.zeros(1, dtype=torch.int32)
    rows = AttentionRows(table, one, one, one + lo, one + hi)
    q = torch.randn(1, 2, 16, generator=rng)
    for threads in (2, 1):
        _core.set_threads(threads)
        out = CpuOps().attention(q, kv, rows, 0.5)
        expected = reference(q, kv, rows, 0.5)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-6)


def test_many_rows_at_once_get_the_bits_of_few(rng: torch.Generator) -> None:
    """Enough rows that each worker takes whole rows instead of parts of the context."""
    kv = random_pages(40, 1, 16, torch.bfloat16, rng)
    rows = random_rows(150, 40, None, rng)
    q = torch.randn(150, 4, 16, generator=rng)
    _core.set_threads(2)
    many = CpuOps().attention(q, kv, rows, 0.5)
    for t in (0, 74, 75, 149):
        index = torch.tensor([t])
        assert torch.equal(CpuOps().attention(q[index], kv, take(rows, index), 0.5), many[index])
    _core.set_threads(1)
