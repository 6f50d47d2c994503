"""Cases of the kernels beside linear: attention over cold keys, norms.

Shapes: T rows, H query heads, G key/value heads, D head dimension, P pages, S slots.
"""

from collections.abc import Iterator, Sequence

import torch

from outdraft.bench.hardware import cold_bytes
from outdraft.bench.kernels import OURS, Case
from outdraft.bench.stopwatch import clock
from outdraft.cache.kv import empty_pages, n_bytes
from outdraft.ops.base import PAGE_SLOTS, AttentionRows, KvPages
from outdraft.ops.cpu import CpuOps
from outdraft.ops.record import recording

HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 8, 1, 512, 4096
"""A full-attention layer of Gemma 4 E2B."""
NORM_WIDTH, NORM_CALLS = 2560, 64
EPS = 1e-6
MOST_ROWS = 8


def row_cases(rows: Sequence[int]) -> Iterator[Case]:
    """Attention and norms for each number of few rows; `k` of attention is the number of keys."""
    ops, rows = CpuOps(), [count for count in rows if count <= MOST_ROWS]
    pages = [random_pages() for _ in range(-(-cold_bytes() // n_bytes(random_pages())))]
    for count in rows:
        yield attention_case(ops, pages, count)
    for count in rows:
        yield norm_case(ops, count)


def random_pages() -> KvPages:
    """Keys and values of the whole context, bf16."""
    shape = (CONTEXT // PAGE_SLOTS, KV_HEADS, PAGE_SLOTS, HEAD_DIM)
    pages = empty_pages(*shape[:2], HEAD_DIM, torch.bfloat16)
    for store in (pages.k_PGSD, pages.v_PGSD):
        store.copy_(torch.randn(shape))
    return pages


def attention_case(ops: CpuOps, pages: Sequence[KvPages], count: int) -> Case:
    """The newest `count` rows of a sequence as long as the context, causally."""
    table_BP = torch.arange(CONTEXT // PAGE_SLOTS, dtype=torch.int32)[None]
    zeros_T = torch.zeros(count, dtype=torch.int32)
    hi_T = torch.arange(CONTEXT - count, CONTEXT, dtype=torch.int32)
    rows = AttentionRows(table_BP, torch.zeros(1, dtype=torch.int32), zeros_T, zeros_T, hi_T)
    q_THD = torch.randn(count, HEADS, HEAD_DIM)
    with recording(ops) as program:
        for store in pages:
            ops.attention(q_THD, store, rows, HEAD_DIM**-0.5)

    def seconds() -> float:
        return clock(program.replay) / len(pages)

    n, size = HEADS * HEAD_DIM, n_bytes(pages[0])
    return Case(OURS, "attention bf16", count, n, CONTEXT, size, seconds)


def norm_case(ops: CpuOps, count: int) -> Case:
    """`add_norm`, the norm between layers; its rows are in the cache, as in a model."""
    x_TK, weight_K = torch.randn(count, NORM_WIDTH), torch.ones(NORM_WIDTH)
    with recording(ops) as program:
        for _ in range(NORM_CALLS):
            ops.add_norm(x_TK, x_TK, weight_K, EPS, next_weight=weight_K)

    def seconds() -> float:
        return clock(program.replay) / NORM_CALLS

    size = 4 * x_TK.numel() * x_TK.element_size()  # two are read and two written
    return Case(OURS, "norm", count, NORM_WIDTH, NORM_WIDTH, size, seconds)
