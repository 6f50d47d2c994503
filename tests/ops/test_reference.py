"""The reference operations against fp64, and their row-invariance, bit for bit.

Shapes: T rows, K inputs, N outputs, H heads, G key/value heads, D head dimension, P pages, S slots.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import PAGE_SLOTS, AttentionRows, KvPages, Rotary
from outdraft.ops.reference import ReferenceOps, rows_are_independent

OPS = ReferenceOps()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = range(1, 18)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_row_invariant(f: Callable[[Tensor], Tensor], x: Tensor, seed: int) -> None:
    """Every row of x gives the same bits alone, and anywhere among 1..16 random others."""
    whole = f(x)
    generator = torch.Generator().manual_seed(seed)
    for n_rows in ROWS:
        for row in (0, x.shape[0] // 2, x.shape[0] - 1):
            call = torch.randn((n_rows, *x.shape[1:]), generator=generator).to(x.dtype)
            at = int(torch.randint(n_rows, (1,), generator=generator))
            call[at] = x[row]
            assert torch.equal(f(call)[at], whole[row]), (n_rows, at)


def gated_halves(both: Tensor) -> Tensor:
    return OPS.gated(*both.chunk(2, dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k", [(96, 64), (130, 77), (512, 1536), (33, 352)])
def test_linear(n: int, k: int, dtype: torch.dtype) -> None:
    weight, x = randn(1, n, k, dtype=dtype), randn(2, 19, k, dtype=dtype)
    exact = x.double() @ weight.double().T
    error = (OPS.linear(x, weight).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert_row_invariant(lambda rows: OPS.linear(rows, weight), x, seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 77, 2112])
def test_rms_norm_and_gelu(width: int, dtype: torch.dtype) -> None:
    x, weight = randn(1, 19, width, dtype=dtype), randn(2, width, dtype=dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    eps = torch.finfo(dtype).eps
    assert (OPS.rms_norm(x, weight, 1e-6).double() - exact).abs().max() <= 8 * eps
    assert_row_invariant(lambda rows: OPS.rms_norm(rows, weight, 1e-6), x, seed=3)
    both = torch.cat((x, x.flip(0)), dim=-1)
    exact = F.gelu(wide, approximate="tanh") * wide.flip(0)
    assert (gated_halves(both).double() - exact).abs().max() <= 8 * eps * exact.abs().max()
    assert_row_invariant(gated_halves, both, seed=4)


def test_gelu_of_a_long_ragged_tensor_is_elementwise() -> None:
    # More elements than one thread takes, and no whole number of vectors: the leftovers of a plain
    # call get other bits.
    x = randn(1, 45, 1511)
    ones = torch.ones_like(x)
    pieces = [OPS.gated(piece, torch.ones(5)) for piece in x.reshape(-1, 5)[:400]]
    assert torch.equal(torch.stack(pieces).flatten(), OPS.gated(x, ones).flatten()[:2000])


def test_norm_rope_turns_pairs() -> None:
    x, weight = randn(1, 5, 3, 32), randn(2, 32)
    table = randn(3, 9, 16)
    position = torch.tensor([3, 0, 8, 4, 5], dtype=torch.int32)
    angle = table[position]
    got = OPS.norm_rope(x, weight, Rotary(table.cos(), table.sin(), position), 1e-6)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    pair = torch.complex(wide[..., :16], wide[..., 16:])
    turned = pair * torch.polar(torch.ones(5, 1, 16).double(), angle.double()[:, None])
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    assert (got.double() - exact).abs().max() < 1e-5


def rows_of(pages: list[int], first: int, lo: list[int], hi: list[int]) -> AttentionRows:
    """Rows of one sequence, whose table begins at page `first`."""
    numbers = ([pages], [first], [0] * len(lo), lo, hi)
    return AttentionRows(*(torch.tensor(x, dtype=torch.int32) for x in numbers))


def paged(seed: int, n_pages: int, n_kv: int, dim: int) -> tuple[Tensor, Tensor]:
    return randn(seed, n_pages, n_kv, PAGE_SLOTS, dim), randn(
        seed + 1, n_pages, n_kv, PAGE_SLOTS, dim
    )


def plain_attention(
    q_THD: Tensor, keys_NGD: Tensor, values_NGD: Tensor, lo: list[int], hi: list[int]
) -> Tensor:
    """fp64 attention over contiguous keys."""
    group = q_THD.shape[1] // keys_NGD.shape[1]
    out = []
    for t in range(q_THD.shape[0]):
        keys = keys_NGD[lo[t] : hi[t] + 1].double().repeat_interleave(group, dim=1)
        values = values_NGD[lo[t] : hi[t] + 1].double().repeat_interleave(group, dim=1)
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q_THD[t].double(), keys), dim=-1)
        out.append(torch.einsum("hn,nhd->hd", weights, values))
    return torch.stack(out)


def contiguous(pool_PGSD: Tensor, pages: list[int]) -> Tensor:
    return pool_PGSD[pages].permute(0, 2, 1, 3).flatten(0, 1)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads,n_kv,dim", [(4, 2, 16), (6, 1, 40), (8, 8, 32)])
def test_attention(heads: int, n_kv: int, dim: int, window: int | None) -> None:
    k, v = paged(1, 9, n_kv, dim)
    pages = [3, 7, 0, 5]
    n_rows, last = 21, 201
    hi = [last - n_rows + 1 + t for t in range(n_rows)]
    lo = [0 if window is None else max(0, p - window + 1) for p in hi]
    q = randn(3, n_rows, heads, dim) * dim**-0.5
    got = OPS.attention(q, KvPages(k, v), rows_of(pages, 0, lo, hi), 1.0)
    exact = plain_attention(q, contiguous(k, pages), contiguous(v, pages), lo, hi)
    assert (got.double() - exact).abs().max() < 2e-5
    # A row alone, with only the pages it needs, in other places of another pool.
    k2, v2 = paged(9, 6, n_kv, dim)
    for t in (0, 7, 20):
        first, end = lo[t] // PAGE_SLOTS, hi[t] // PAGE_SLOTS + 1
        moved = [4, 5, 0, 2][: end - first]
        k2[moved], v2[moved] = k[pages[first:end]], v[pages[first:end]]
        alone = OPS.attention(
            q[t : t + 1], KvPages(k2, v2), rows_of(moved, first, [lo[t]], [hi[t]]), 1.0
        )
        assert torch.equal(alone[0], got[t]), t


def test_attention_ignores_what_lies_above_the_visible_keys() -> None:
    k, v = paged(1, 3, 2, 16)
    rows = ([1, 2], 0, [0, 0], [69, 70])
    q = randn(2, 2, 4, 16)
    before = OPS.attention(q, KvPages(k, v), rows_of(*rows), 1.0)
    k[2, :, 7:], v[2, :, 7:] = 1e6, -1e6
    assert torch.equal(OPS.attention(q, KvPages(k, v), rows_of(*rows), 1.0), before)


def test_experts() -> None:
    x = randn(1, 11, 32)
    gate_up, down = randn(2, 6, 80, 32), randn(3, 6, 32, 40)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(11)])
    weights = torch.rand(11, 3)
    got = OPS.experts(x, gate_up, down, ids, weights)
    for t in range(11):
        exact = torch.zeros(32, dtype=torch.float64)
        for slot in range(3):
            expert = int(ids[t, slot])
            gate, up = (gate_up[expert].double() @ x[t].double()).chunk(2)
            inner = F.gelu(gate, approximate="tanh") * up
            exact += weights[t, slot].double() * (down[expert].double() @ inner)
        assert (got[t].double() - exact).abs().max() < 1e-4 * math.sqrt(exact.square().mean())
        alone = OPS.experts(x[t : t + 1], gate_up, down, ids[t : t + 1], weights[t : t + 1])
        assert torch.equal(alone[0], got[t])


def test_the_probe_finds_products_that_depend_on_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [randn(1, 96, 64), randn(2, 64, 96, dtype=torch.bfloat16)]
    assert rows_are_independent(weights)
    plain = F.linear

    def uneven(x: Tensor, weight: Tensor) -> Tensor:
        y = plain(x, weight)
        y[-1] = plain(x[-1:].flip(-1), weight.flip(-1))[0]  # another order of adds in the last slot
        return y

    monkeypatch.setattr(F, "linear", uneven)
    assert not rows_are_independent(weights)
