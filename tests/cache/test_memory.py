"""Pages and the memory of many sequences: nothing leaks, rollback is by length, windows slide."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outdraft.cache.attend import CausalAttend, CausalCall
from outdraft.cache.memory import KVLayer, Memory, Span
from outdraft.cache.pages import PagePool
from outdraft.errors import CapacityError
from outdraft.ops.base import PAGE_SLOTS, Heads, Ops, Rotary
from outdraft.ops.reference import ReferenceOps


class RawOps(ReferenceOps):
    """Stores keys and values as they come."""

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float
    ) -> Tensor:
        return x_THD


def bind(m: Memory, ops: Ops, sequence: str, n_rows: int) -> CausalAttend:
    """Attention for the next rows of a sequence, whose tokens do not matter here."""
    return CausalCall.prepare(m, ops, [Span(sequence, 0, n_rows)], [0] * n_rows).attend


def plain(x_THD: Tensor) -> Heads:
    """Queries as they are."""
    return Heads(x_THD, None, None, None)


def raw(x_TGD: Tensor) -> Heads:
    return Heads(x_TGD, None, None, 0.0)


FULL = KVLayer("full", 1, 8, None, 0)
SLIDING = KVLayer("sliding", 1, 8, 70, 1)


def memory(max_sequences: int = 2, max_tokens: int = 400) -> Memory:
    return Memory(
        [FULL, SLIDING],
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        max_rows=50,
        dtype=torch.float32,
    )


def free_pages(m: Memory) -> dict[str, int]:
    return {name: group.pool.n_free for name, group in m.groups.items()}


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 12))
def test_page_pool_keeps_its_books(sizes: list[int], n_pages: int) -> None:
    pool = PagePool(n_pages)
    held: list[list[int]] = []
    for size in sizes:
        if size > pool.n_free:
            with pytest.raises(CapacityError):
                pool.allocate(size)
            if held:
                pool.release(held.pop(0))
            continue
        held.append(pool.allocate(size))
        flat = [page for pages in held for page in pages]
        assert len(set(flat)) == len(flat) and len(flat) + pool.n_free == n_pages


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=30))
def test_any_walk_sees_its_own_rows_and_leaves_nothing(walk: list[tuple[int, int]]) -> None:
    """Advance and roll back at random: keys are those of the positions, pages come back."""
    m = memory()
    start = free_pages(m)
    m.open("a")
    ops = RawOps()
    for n_rows, n_back in walk:
        n_rows = min(n_rows, 400 - m.lengths["a"])
        if n_rows == 0:
            break
        m.reserve("a", n_rows)
        at = m.lengths["a"]
        bound = bind(m, ops, "a", n_rows)
        # Values carry their position; all keys are equal, so attention returns the mean of them.
        v = torch.arange(at, at + n_rows).float().view(-1, 1, 1).expand(-1, 1, 8)
        zeros = torch.zeros(n_rows, 1, 8)
        for layer, window in ((0, None), (1, 70)):
            got = bound(layer, plain(zeros), raw(zeros), raw(v))[:, 0, 0]
            for t in range(n_rows):
                first = 0 if window is None else max(0, at + t - window + 1)
                assert abs(float(got[t]) - (first + at + t) / 2) < 1e-2
        m.advance("a", n_rows)
        m.rollback("a", min(n_back, n_rows))
        m.trim("a")
        sliding = m.groups["sliding"].tables["a"]
        assert len(sliding.pages) * PAGE_SLOTS <= 70 + 50 + 2 * PAGE_SLOTS
    m.close("a")
    assert free_pages(m) == start


def test_a_full_memory_refuses_and_others_go_on() -> None:
    m = memory(max_sequences=1, max_tokens=128)
    m.open("a")
    m.reserve("a", 128)
    m.open("b")
    with pytest.raises(CapacityError, match="free"):
        m.reserve("b", 300)
    m.close("b")
    m.advance("a", 128)
    m.close("a")
    assert all(group.pool.n_free == group.pool.n_pages for group in m.groups.values())


def test_pages_are_clean_for_the_next_sequence() -> None:
    m = memory(max_sequences=1)
    ops = RawOps()
    bad = torch.full((3, 1, 8), float("inf"))
    m.open("a")
    m.reserve("a", 3)
    bind(m, ops, "a", 3)(0, plain(torch.ones(3, 1, 8)), raw(bad), raw(bad))
    m.advance("a", 3)
    m.close("a")
    m.open("b")
    m.reserve("b", 2)
    good = torch.ones(2, 1, 8)
    out = bind(m, ops, "b", 2)(0, plain(good), raw(good), raw(good))
    assert torch.equal(out, good)


def test_bytes() -> None:
    m = memory()
    assert m.bytes_per_token("full") == 2 * 8 * 4
    pages = sum(group.pool.n_pages for group in m.groups.values())
    assert m.n_bytes == pages * PAGE_SLOTS * 2 * 8 * 4
