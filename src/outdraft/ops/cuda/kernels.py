"""Triton kernels whose sums run in an order that no other row of the call can change.

A linear multiplies blocks of 16 padded rows: tile sizes and the split of K are the weight's, never
the call's. Attention splits a row's keys every `SPLIT_KEYS` positions from the page of its first
key and merges the parts in order. Not here: allocation and launching (ops.py).
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _finish(acc, rows, cols, parts, out, tickets, n_rows, N, SPLIT: tl.constexpr):
    """A tile into `out`; of several parts the last to arrive adds all of them in order."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < N)
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    if SPLIT == 1:
        tl.store(out + at, acc, mask=mask)
    else:
        size = n_rows.to(tl.int64) * N
        tl.store(parts + tl.program_id(1) * size + at, acc, mask=mask)
        tl.debug_barrier()
        ticket = tickets + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.load(parts + at, mask=mask, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLIT):
                total += tl.load(parts + part * size + at, mask=mask, other=0.0,
                                 cache_modifier=".cg")  # fmt: skip
            tl.store(out + at, total, mask=mask)
            tl.store(ticket, 0)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def linear_kernel(x, w, scales, parts, out, tickets, n_rows, n_tiles, N, K, x_stride,
                  SCALED: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  EVEN: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """One [16, BN] tile of one part of K; EVEN: tiles cover N and K exactly.

    TILES is n_tiles for Triton's interpreter, which has no loops of a run-time length, else 0.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(2) * 16 + tl.arange(0, 16)
    first = tl.program_id(1) * n_tiles * BK
    ks = tl.arange(0, BK)
    acc = tl.zeros((16, BN), tl.float32)
    for tile in range(TILES if TILES > 0 else n_tiles):
        k = first + tile * BK + ks
        at = cols[:, None].to(tl.int64) * K + k[None, :]
        if EVEN:
            x_tile = tl.load(x + rows[:, None] * x_stride + k[None, :],
                             mask=rows[:, None] < n_rows, other=0.0)  # fmt: skip
            w_tile = tl.load(w + at, eviction_policy="evict_first")
        else:
            x_tile = tl.load(x + rows[:, None] * x_stride + k[None, :],
                             mask=(rows[:, None] < n_rows) & (k[None, :] < K),
                             other=0.0)  # fmt: skip
            w_tile = tl.load(w + at, mask=(cols[:, None] < N) & (k[None, :] < K), other=0.0)
        acc = tl.dot(x_tile.to(tl.bfloat16).to(DOT), w_tile.to(DOT).T, acc)
    if SCALED:
        acc = acc * tl.load(scales + cols, mask=cols < N, other=0.0)[None, :]
    _finish(acc, rows, cols, parts, out, tickets, n_rows, N, SPLIT)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def linear4_kernel(x, w, scales, parts, out, tickets, n_rows, n_tiles, N, K, x_stride,
                   SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   TILES: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """As linear_kernel, of 4-bit weights: byte j holds k = 64 (j // 32) + j % 32 and k + 32.

    BK bytes a tile; `scales` [N, K / 32], of a bf16 product of scale and value.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(2) * 16 + tl.arange(0, 16)
    first = tl.program_id(1) * n_tiles * BK
    acc = tl.zeros((16, BN), tl.float32)
    for tile in range(TILES if TILES > 0 else n_tiles):
        start = first + tile * BK
        j = start + tl.arange(0, BK)
        k = j // 32 * 64 + j % 32
        x_mask = (rows[:, None] < n_rows) & (k[None, :] < K)
        x_at = x + rows[:, None] * x_stride + k[None, :]
        x_low = tl.load(x_at, mask=x_mask, other=0.0).to(tl.bfloat16)
        x_high = tl.load(x_at + 32, mask=x_mask, other=0.0).to(tl.bfloat16)
        mask = (cols[:, None] < N) & (j[None, :] < K // 2)
        q = tl.load(w + cols[:, None].to(tl.int64) * (K // 2) + j[None, :], mask=mask, other=0)
        g = start // 32 + tl.arange(0, BK // 32)
        s_at = scales + cols[:, None].to(tl.int64) * (K // 32) + 2 * g[None, :]
        s_mask = (cols[:, None] < N) & (g[None, :] < K // 64)
        s_low = tl.load(s_at, mask=s_mask, other=0.0)
        s_high = tl.load(s_at + 1, mask=s_mask, other=0.0)
        low = ((q & 15).to(tl.int8) - 8).to(DOT)
        high = ((q >> 4).to(tl.int8) - 8).to(DOT)
        wide: tl.constexpr = (BN, BK // 32, 32)
        low = low * tl.broadcast_to(s_low.to(DOT)[:, :, None], wide).reshape(BN, BK)
        high = high * tl.broadcast_to(s_high.to(DOT)[:, :, None], wide).reshape(BN, BK)
        acc = tl.dot(x_low.to(DOT), low.to(DOT).T, acc)
        acc = tl.dot(x_high.to(DOT), high.to(DOT).T, acc)
    _finish(acc, rows, cols, parts, out, tickets, n_rows, N, SPLIT)


@triton.jit(do_not_specialize=["n_pairs"])
def expert_kernel(x, w, ids, out, n_pairs, N, K: tl.constexpr, A: tl.constexpr,
                  PER_PAIR: tl.constexpr, PAIRS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """Rows of pairs times their own block of the weight [E, N, K]; `out` is [pairs, N].

    Every sixteenth pair of a block leads: its program reads the block's weights once for itself
    and the up to 15 pairs of the block behind it. A row's sum runs over K alone.
    """
    lead = tl.program_id(1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    q = tl.arange(0, PAIRS)
    block = tl.load(ids + lead)
    same = (tl.load(ids + q, mask=q < n_pairs, other=-1) == block).to(tl.int32)
    before = tl.sum(tl.where(q < lead, same, 0), 0)
    if before % 16 == 0:
        rank = tl.cumsum(same, 0) - 1 - before
        i = tl.arange(0, 16)
        hit = (same[None, :] > 0) & (rank[None, :] == i[:, None])
        pairs = tl.max(tl.where(hit, q[None, :], -1), 1)
        real = pairs >= 0
        rows = pairs if PER_PAIR else pairs // A
        base = w + block.to(tl.int64) * N * K
        acc = tl.zeros((16, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            x_tile = tl.load(x + rows[:, None] * K + k[None, :],
                             mask=real[:, None] & (k[None, :] < K), other=0.0)  # fmt: skip
            tile = tl.load(base + cols[:, None] * K + k[None, :],
                           mask=(cols[:, None] < N) & (k[None, :] < K), other=0.0)  # fmt: skip
            acc = tl.dot(x_tile.to(tl.bfloat16).to(DOT), tile.to(DOT).T, acc)
        tl.store(out + pairs[:, None] * N + cols[None, :], acc,
                 mask=real[:, None] & (cols[None, :] < N))  # fmt: skip


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
