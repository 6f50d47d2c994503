"""Triton kernels beside the products (linears.py); no other row can change the order of a sum.

Attention takes a row's keys page by page and merges the parts in order. Not here: allocation and
launching (ops.py, attention.py), norms and rotations (norms.py).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from outdraft.ops.cuda.linears import activate, begin


@triton.jit
def combine_kernel(y, weights, out, K, A: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Sum of a row's experts in the order of its ids."""
    begin(PDL)
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        y_k = tl.load(y + (row * A + a) * K + k, mask=k < K, other=0.0)
        total += y_k * tl.load(weights + row * A + a)
    tl.store(out + row * K + k, total, mask=k < K)


@triton.jit
def route_kernel(scores, per_expert, ids, weights, E, A: tl.constexpr, SCALED: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The A largest of a row, the lowest id of equals, softmax weights that sum to one."""
    begin(PDL)
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    s = tl.load(scores + row * E + e, mask=e < E, other=float("-inf"))
    top = tl.max(s, 0)
    total = 0.0
    rest = s
    for _a in tl.static_range(A):
        best = tl.max(rest, 0)
        total += tl.exp(best - top)
        rest = tl.where(e == tl.min(tl.where(rest == best, e, BLOCK), 0), float("-inf"), rest)
    for a in tl.static_range(A):
        best = tl.max(s, 0)
        at = tl.min(tl.where(s == best, e, BLOCK), 0)
        weight = tl.exp(best - top) / total
        if SCALED:
            weight *= tl.load(per_expert + at)
        tl.store(ids + row * A + a, at)
        tl.store(weights + row * A + a, weight)
        s = tl.where(e == at, float("-inf"), s)


@triton.jit
def gated_kernel(gate, up, out, g_stride, u_stride, K, SILU: tl.constexpr, SIGMOID: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """gelu_tanh(gate) * up, or silu or sigmoid of the gate."""
    begin(PDL)
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * g_stride + k, mask=k < K, other=0.0).to(tl.float32)
    u = tl.load(up + row * u_stride + k, mask=k < K, other=0.0).to(tl.float32)
    v = 1.0 / (1.0 + tl.exp(-g)) if SIGMOID else activate(g, SILU)
    tl.store(out + row * K + k, v * u, mask=k < K)


@triton.jit(do_not_specialize=["n_rows", "width", "n_splits"])
def attention_kernel(q, keys, values, table, first_page, sequence, lo_T, hi_T, part, stats, scale,
                     n_rows, width, n_splits, G, D: tl.constexpr, GROUP: tl.constexpr,
                     GP: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
                     PDL: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """One page of one key/value head for a few rows: unnormalised sums, maxima, totals.

    Rows of a sequence whose last keys follow one another and have the same quotient by R go
    together: the program of the first reads the page once for all of them, those of the others
    end at once. Each row has its own line of every product.
    """
    begin(PDL)
    R: tl.constexpr = GP // GROUP
    t = tl.program_id(0)
    g = tl.program_id(1)
    b, hi = tl.load(sequence + t), tl.load(hi_T + t)
    before = tl.maximum(t - 1, 0)
    # All that says which page it is is asked for at once: one read waits for another here.
    m = tl.arange(0, GP)
    r = m // GROUP
    row = tl.minimum(t + r, n_rows - 1)
    b_M, hi_M, lo_M = tl.load(sequence + row), tl.load(hi_T + row), tl.load(lo_T + row)
    follows = (tl.load(sequence + before) == b) & (tl.load(hi_T + before) + 1 == hi)
    base = tl.load(first_page + b)
    if (t == 0) | (follows == 0) | (hi % R == 0):
        real = (r < R) & (t + r < n_rows) & (b_M == b)
        real &= (hi_M == hi + r) & (hi_M // R == hi // R)
        page = tl.min(tl.where(real, lo_M, 2147483647), 0) // SLOTS + tl.program_id(2)
        start = page * SLOTS
        if start <= tl.max(tl.where(real, hi_M, -1), 0):
            d = tl.arange(0, D)
            n_heads = G * GROUP
            head = g * GROUP + m % GROUP
            at_page = tl.load(table + b * width + page - base).to(tl.int64)
            at_q = (row * n_heads + head)[:, None].to(tl.int64) * D + d[None, :]
            q_MD = tl.load(q + at_q, mask=real[:, None], other=0.0)
            q_MD = q_MD.to(keys.dtype.element_ty).to(DOT)
            top = tl.full((GP,), -1e30, tl.float32)
            total = tl.zeros((GP,), tl.float32)
            acc = tl.zeros((GP, D), tl.float32)
            for tile in tl.static_range(SLOTS // TILE):
                slot = tile * TILE + tl.arange(0, TILE)
                p = start + slot
                at = ((at_page * G + g) * SLOTS + slot)[:, None] * D + d[None, :]
                k_PD = tl.load(keys + at).to(DOT)
                v_PD = tl.load(values + at)
                s = tl.dot(q_MD, k_PD.T) * scale
                seen = (p[None, :] >= lo_M[:, None]) & (p[None, :] <= hi_M[:, None])
                s = tl.where(seen, s, float("-inf"))
                new = tl.maximum(top, tl.max(s, 1))
                w = tl.exp(s - new[:, None])
                fade = tl.exp(top - new)
                total = total * fade + tl.sum(w, 1)
                acc = tl.dot(w.to(v_PD.dtype).to(DOT), v_PD.to(DOT), acc * fade[:, None])
                top = new
            split = page - lo_M // SLOTS
            stored = real & (split >= 0) & (start <= hi_M)
            at_part = ((row * n_splits + split) * n_heads + head).to(tl.int64)
            tl.store(part + at_part[:, None] * D + d[None, :], acc, mask=stored[:, None])
            tl.store(stats + at_part * 2, top, mask=stored)
            tl.store(stats + at_part * 2 + 1, total, mask=stored)


@triton.jit(do_not_specialize=["n_splits"])
def attention_merge_kernel(part, stats, lo_T, hi_T, out, n_splits, H, D: tl.constexpr,
                           BD: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
                           PDL: tl.constexpr):  # fmt: skip
    """Parts of a row's head, PARTS at a time in order; parts behind its last key are not read."""
    begin(PDL)
    t = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    n_used = tl.load(hi_T + t) // SLOTS - tl.load(lo_T + t) // SLOTS + 1
    top = -1e30
    total = 0.0
    acc = tl.zeros((BD,), tl.float32)
    base = 0
    while base < n_used:
        i = base + tl.arange(0, PARTS)
        row = ((t * n_splits + i) * H + h).to(tl.int64)
        own = tl.load(stats + row * 2, mask=i < n_used, other=-1e30)
        sums = tl.load(stats + row * 2 + 1, mask=i < n_used, other=0.0)
        parts = tl.load(part + row[:, None] * D + d[None, :], mask=(i < n_used)[:, None], other=0.0)
        new = tl.maximum(top, tl.max(own, 0))
        fade, w = tl.exp(top - new), tl.where(i < n_used, tl.exp(own - new), 0.0)
        acc = acc * fade + tl.sum(parts * w[:, None], 0)
        total = total * fade + tl.sum(sums * w, 0)
        top = new
        base += PARTS
    tl.store(out + (t * H + h).to(tl.int64) * D + d, acc / total)


@triton.jit
def add_kernel(x, residual, out, scale, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """(residual + x) * scale."""
    begin(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(residual + i, mask=mask, other=0.0) + tl.load(x + i, mask=mask, other=0.0)
    tl.store(out + i, v * scale, mask=mask)


@triton.jit
def concat_kernel(a, b, out, a_stride, b_stride, K, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Columns of a, then columns of b."""
    begin(PDL)
    t = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(a + t * a_stride + i, mask=i < K, other=0.0).to(tl.float32)
    other = tl.load(b + t * b_stride + i - K, mask=(i >= K) & (i < K + N), other=0.0)
    v = tl.where(i < K, own, other.to(tl.float32))
    tl.store(out + t * (K + N) + i, v, mask=i < K + N)


@triton.jit
def softcap_kernel(logits, cap, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """tanh(x / cap) * cap in place; near zero a series, where the quotient would cancel."""
    begin(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + i, mask=i < n, other=0.0) / cap
    far = 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)
    s = z * z
    near = z * (1.0 - s * (0.33333333 - s * (0.13333333 - s * 0.05396825)))
    tl.store(logits + i, tl.where(tl.abs(z) < 0.1, near, far) * cap, mask=i < n)


@triton.jit
def best_kernel(logits, value, index, mass, V, n_parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Largest of one part of a row, its lowest place, and the sum of exp of all less it.

    What is no number counts as infinite.
    """
    begin(PDL)
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(logits + t * V + i, mask=i < V, other=float("-inf"))
    v = tl.where(v != v, float("inf"), v)  # noqa: PLR0124
    top = tl.max(v, 0)
    tl.store(value + t * n_parts + part, top)
    tl.store(index + t * n_parts + part, tl.min(tl.where(v == top, i, 2147483647), 0))
    tl.store(mass + t * n_parts + part, tl.sum(tl.exp(v - tl.maximum(top, -1e30)), 0))


@triton.jit
def best_merge_kernel(value, index, mass, out, sure, n_parts, PARTS: tl.constexpr,
                      FINITE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The lowest place of a row's largest, and what softmax gives it; FINITE: -1 of others."""
    begin(PDL)
    t = tl.program_id(0)
    i = tl.arange(0, PARTS)
    v = tl.load(value + t * n_parts + i, mask=i < n_parts, other=float("-inf"))
    at = tl.load(index + t * n_parts + i, mask=i < n_parts, other=2147483647)
    sums = tl.load(mass + t * n_parts + i, mask=i < n_parts, other=0.0)
    top = tl.max(v, 0)
    best = tl.min(tl.where(v == top, at, 2147483647), 0)
    if FINITE:
        best = tl.where(tl.abs(top) < float("inf"), best, -1)
    tl.store(out + t, best)
    tl.store(sure + t, 1.0 / tl.sum(sums * tl.exp(v - top), 0))


@triton.jit
def top_kernel(scores, out, E, A: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Ids of the A largest of a row, the lowest of equals first: each counts those before it."""
    begin(PDL)
    t = tl.program_id(0)
    own = tl.program_id(1) * 64 + tl.arange(0, 64)
    e = tl.arange(0, BLOCK)
    s_own = tl.load(scores + t * E + own, mask=own < E, other=float("-inf"))[:, None]
    s = tl.load(scores + t * E + e, mask=e < E, other=float("-inf"))[None, :]
    ahead = (s > s_own) | ((s == s_own) & (e[None, :] < own[:, None]))
    place = tl.sum((ahead & (e < E)[None, :]).to(tl.int32), 1)
    tl.store(out + t * A + place, own, mask=(own < E) & (place < A))


@triton.jit
def best_of_blocks_kernel(scores, ids, chosen, out, sure, N, A: tl.constexpr, BLOCK: tl.constexpr,
                          PDL: tl.constexpr):  # fmt: skip
    """The lowest id of a row's largest score over its A blocks, and what softmax gives it."""
    begin(PDL)
    t = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < A * N
    v = tl.load(scores + t * A * N + i, mask=mask, other=float("-inf"))
    v = tl.where(v != v, float("inf"), v)  # noqa: PLR0124
    block = tl.load(chosen + t * A + i // N, mask=mask, other=0)
    token = tl.load(ids + block * N + i % N, mask=mask, other=2147483647)
    top = tl.max(v, 0)
    tl.store(out + t, tl.min(tl.where(v == top, token, 2147483647), 0))
    tl.store(sure + t, 1.0 / tl.sum(tl.exp(v - top), 0))


@triton.jit(do_not_specialize=["n_drafts"])
def accept_kernel(token, best, hidden, windows, numbers, carried, n_drafts, H, h_stride, n_groups,
                  ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """A round's numbers and hidden state, moved on by the drafts that stay (`Fuses.accept`)."""
    begin(PDL)
    i = tl.arange(0, ROWS)
    drafted = tl.load(token + 1 + i, mask=i < n_drafts, other=0)
    stays = (i < n_drafts) & (drafted == tl.load(best + i, mask=i < n_drafts, other=-1))
    n = tl.min(tl.where(stays, ROWS, i), 0)
    n = tl.minimum(n, n_drafts)
    h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(carried + h, tl.load(hidden + n * h_stride + h, mask=h < H), mask=h < H)
    if tl.program_id(0) == 0:
        hi = tl.load(numbers + 3) + n
        g = tl.arange(0, GROUPS)
        window = tl.load(windows + g, mask=g < n_groups, other=0)
        lo = tl.where(window > 0, tl.maximum(hi - window + 1, 0), 0)
        tl.store(numbers + 4 + g, lo, mask=g < n_groups)
        tl.store(numbers, tl.maximum(tl.load(best + n), 0))
        tl.store(numbers + 1, tl.load(numbers + 1) + n)
        tl.store(numbers + 3, hi)
