"""Triton kernels whose sums run in an order that no other row of the call can change.

A linear multiplies blocks of 16 padded rows: tile sizes and the split of K are the weight's, never
the call's. Attention splits a row's keys every `SPLIT_KEYS` positions from the page of its first
key and merges the parts in order. Not here: allocation and launching (ops.py).
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows"])
def linear_kernel(x, w, scales, out, n_rows, N, K, x_stride, TILES: tl.constexpr,
                  SCALED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """One [16, BN] tile of one part of K; `out` is [SPLIT, rows, N]."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    rows = tl.program_id(2) * 16 + tl.arange(0, 16)
    ks = tl.arange(0, BK)
    acc = tl.zeros((16, BN), tl.float32)
    for tile in range(TILES):
        k = (part * TILES + tile) * BK + ks
        x_tile = tl.load(x + rows[:, None] * x_stride + k[None, :],
                         mask=(rows[:, None] < n_rows) & (k[None, :] < K), other=0.0)  # fmt: skip
        w_tile = tl.load(w + cols[:, None].to(tl.int64) * K + k[None, :],
                         mask=(cols[:, None] < N) & (k[None, :] < K), other=0.0)  # fmt: skip
        acc = tl.dot(x_tile.to(tl.bfloat16).to(DOT), w_tile.to(DOT).T, acc)
    if SCALED:
        acc = acc * tl.load(scales + cols, mask=cols < N, other=0.0)[None, :]
    at = (part * n_rows + rows[:, None]).to(tl.int64) * N + cols[None, :]
    tl.store(out + at, acc, mask=(rows[:, None] < n_rows) & (cols[None, :] < N))


@triton.jit(do_not_specialize=["n"])
def merge_kernel(parts, out, n, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Parts of a linear, added in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + at, mask=at < n, other=0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + part * n + at, mask=at < n, other=0.0)
    tl.store(out + at, total, mask=at < n)


@triton.jit
def expert_kernel(x, w, ids, out, N, K: tl.constexpr, A: tl.constexpr, PER_PAIR: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Row of a pair times its own block of the weight [E, N, K]; `out` is [pairs, N]."""
    pair = tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    row = pair if PER_PAIR else pair // A
    base = w + tl.load(ids + pair).to(tl.int64) * N * K
    acc = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        k = start + ks
        x_k = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        tile = tl.load(base + cols[:, None] * K + k[None, :],
                       mask=(cols[:, None] < N) & (k[None, :] < K), other=0.0)  # fmt: skip
        acc += tile.to(tl.float32) * x_k[None, :]
    tl.store(out + pair * N + cols, tl.sum(acc, 1), mask=cols < N)


@triton.jit
def combine_kernel(y, weights, out, K, A: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a row's experts in the order of its ids."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        y_k = tl.load(y + (row * A + a) * K + k, mask=k < K, other=0.0)
        total += y_k * tl.load(weights + row * A + a)
    tl.store(out + row * K + k, total, mask=k < K)


@triton.jit
def route_kernel(scores, per_expert, ids, weights, E, A: tl.constexpr, SCALED: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """The A largest of a row, the lowest id of equals, softmax weights that sum to one."""
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
def norm_kernel(x, residual, w, w_next, y, normed, K, eps, scale, ADD: tl.constexpr,
                HAS_W: tl.constexpr, HAS_NEXT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """rms_norm(x, w); with ADD also y = (residual + that) * scale, and y's norm."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    mask = k < K
    v = tl.load(x + row * K + k, mask=mask, other=0.0).to(tl.float32)
    v = v * (1.0 / tl.sqrt(tl.sum(v * v, 0) / K + eps))
    if HAS_W:
        v = v * tl.load(w + k, mask=mask, other=0.0)
    if ADD:
        v = (tl.load(residual + row * K + k, mask=mask, other=0.0).to(tl.float32) + v) * scale
        tl.store(y + row * K + k, v, mask=mask)
        v = v * (1.0 / tl.sqrt(tl.sum(v * v, 0) / K + eps))
        if HAS_NEXT:
            v = v * tl.load(w_next + k, mask=mask, other=0.0)
    tl.store(normed + row * K + k, v, mask=mask)


@triton.jit
def head_kernel(x, w, cos, sin, position, page, slot, out, t_stride, G, P_STRIDE, S_STRIDE, eps,
                D: tl.constexpr, HAS_W: tl.constexpr, ROPE: tl.constexpr,
                PAGED: tl.constexpr):  # fmt: skip
    """Norm and rotation of one head; into pages [P, G, S, D] when PAGED."""
    t = tl.program_id(0)
    g = tl.program_id(1)
    i = tl.arange(0, D // 2)
    a = tl.load(x + t * t_stride + g * D + i).to(tl.float32)
    b = tl.load(x + t * t_stride + g * D + D // 2 + i).to(tl.float32)
    r = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
    a, b = a * r, b * r
    if HAS_W:
        a = a * tl.load(w + i)
        b = b * tl.load(w + D // 2 + i)
    if ROPE:
        at = tl.load(position + t).to(tl.int64) * (D // 2) + i
        c, s = tl.load(cos + at), tl.load(sin + at)
        a, b = a * c - b * s, b * c + a * s
    if PAGED:
        where = tl.load(page + t).to(tl.int64) * P_STRIDE + g * S_STRIDE
        where += tl.load(slot + t).to(tl.int64) * D
    else:
        where = (t * G + g).to(tl.int64) * D
    tl.store(out + where + i, a)
    tl.store(out + where + D // 2 + i, b)


@triton.jit
def gated_kernel(gate, up, out, g_stride, u_stride, K, BLOCK: tl.constexpr):
    """gelu_tanh(gate) * up."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * g_stride + k, mask=k < K, other=0.0).to(tl.float32)
    u = tl.load(up + row * u_stride + k, mask=k < K, other=0.0).to(tl.float32)
    z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)
    tl.store(out + row * K + k, 0.5 * g * (1.0 + tanh) * u, mask=k < K)


@triton.jit(do_not_specialize=["width", "n_splits"])
def attention_kernel(q, keys, values, table, first_page, sequence, lo_T, hi_T, part, stats, scale,
                     width, n_splits, G, D: tl.constexpr, GROUP: tl.constexpr,
                     GP: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
                     SPLIT_KEYS: tl.constexpr):  # fmt: skip
    """One row, one key/value head, one part of its keys: unnormalised sums, maxima, totals."""
    t = tl.program_id(0)
    g = tl.program_id(1)
    split = tl.program_id(2)
    h = tl.arange(0, GP)
    d = tl.arange(0, D)
    n_heads = G * GROUP
    head = g * GROUP + h
    real = h < GROUP
    q_HD = tl.load(q + (t * n_heads + head[:, None]) * D + d[None, :],
                   mask=real[:, None], other=0.0).to(keys.dtype.element_ty)  # fmt: skip
    b = tl.load(sequence + t)
    lo, hi = tl.load(lo_T + t), tl.load(hi_T + t)
    first = tl.load(first_page + b)
    start = lo // SLOTS * SLOTS + split * SPLIT_KEYS
    top = tl.full((GP,), -1e30, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, D), tl.float32)
    base = start
    while base < tl.minimum(start + SPLIT_KEYS, hi + 1):
        p = base + tl.arange(0, TILE)
        page = tl.load(table + b * width + base // SLOTS - first).to(tl.int64)
        at = ((page * G + g) * SLOTS + p % SLOTS)[:, None] * D + d[None, :]
        k_PD = tl.load(keys + at)
        s = tl.dot(q_HD, k_PD.T) * scale
        s = tl.where(((p >= lo) & (p <= hi))[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        w = tl.exp(s - new[:, None])
        fade = tl.exp(top - new)
        total = total * fade + tl.sum(w, 1)
        v_PD = tl.load(values + at)
        acc = tl.dot(w.to(v_PD.dtype), v_PD, acc * fade[:, None])
        top = new
        base += TILE
    row = ((t * n_splits + split) * n_heads + head).to(tl.int64)
    tl.store(part + row[:, None] * D + d[None, :], acc, mask=real[:, None])
    tl.store(stats + row * 2, top, mask=real)
    tl.store(stats + row * 2 + 1, total, mask=real)


@triton.jit(do_not_specialize=["n_splits"])
def attention_merge_kernel(part, stats, lo_T, hi_T, out, n_splits, H, D: tl.constexpr,
                           SLOTS: tl.constexpr, SPLIT_KEYS: tl.constexpr):  # fmt: skip
    """Parts of a row's head in order; parts behind its last key are not read."""
    t = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, D)
    used = tl.load(hi_T + t) + 1 - tl.load(lo_T + t) // SLOTS * SLOTS
    n_used = (used + SPLIT_KEYS - 1) // SPLIT_KEYS
    top = -1e30
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    split = 0
    while split < n_used:
        row = ((t * n_splits + split) * H + h).to(tl.int64)
        own = tl.load(stats + row * 2)
        new = tl.maximum(top, own)
        a, b = tl.exp(top - new), tl.exp(own - new)
        acc = acc * a + tl.load(part + row * D + d) * b
        total = total * a + tl.load(stats + row * 2 + 1) * b
        top = new
        split += 1
    tl.store(out + (t * H + h).to(tl.int64) * D + d, acc / total)
