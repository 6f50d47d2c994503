"""Triton kernels of products with weights, whose sums run in an order no other row can change.

A linear multiplies blocks of 16 padded rows: tiles and the split of K are the weight's, never the
call's. Kernels are launched before their predecessor is done and wait for it themselves
(programmatic dependent launch). Small kernels let the next one come at once, those of products when
their sums are done: what waits must not take the room of what works. Not here: the other kernels
(kernels.py), those of 8- and 4-bit weights (quantised.py), how weights are packed (weights.py).
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def begin(PDL: tl.constexpr):
    """The next kernel may be launched; what the last one wrote may be read."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait(PDL: tl.constexpr):
    """What the last kernel wrote may be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel may be launched: there is room for it as programs of this one end."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def activate(g, SILU: tl.constexpr):
    """gelu_tanh or silu."""
    if SILU:
        return g / (1.0 + tl.exp(-g))
    z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)
    return 0.5 * g * (1.0 + tanh)


@triton.jit
def emit(acc, up, row, col, mask, other, out, n_out, o_stride, GATE: tl.constexpr,
         SILU: tl.constexpr):  # fmt: skip
    """Sums into `out`; gated by the second half or by `other` if GATE is 1 or 2."""
    if GATE == 1:
        acc = activate(acc, SILU) * up
    if GATE == 2:
        gate = activate(acc, SILU)
        acc = gate * tl.load(other + row * o_stride + col, mask=mask, other=0.0)
    tl.store(out + row * n_out + col, acc, mask=mask)


@triton.jit
def finish(acc, up, row, col, mask, other, parts, out, tickets, n_rows, N, n_out, o_stride,
           SPLIT: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """A tile into `out`; of several parts the last to arrive adds all of them in order."""
    if SPLIT == 1:
        emit(acc, up, row, col, mask, other, out, n_out, o_stride, GATE, SILU)
    else:
        at, size = row * N + col, n_rows.to(tl.int64) * N
        own = parts + tl.program_id(2) * size + at
        tl.store(own, acc, mask=mask)
        if GATE == 1:
            tl.store(own + n_out, up, mask=mask)
        tl.debug_barrier()
        ticket = tickets + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.load(parts + at, mask=mask, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLIT):
                total += tl.load(parts + part * size + at, mask=mask, other=0.0,
                                 cache_modifier=".cg")  # fmt: skip
            both = total
            if GATE == 1:
                at += n_out
                both = tl.load(parts + at, mask=mask, other=0.0, cache_modifier=".cg")
                for part in tl.static_range(1, SPLIT):
                    both += tl.load(parts + part * size + at, mask=mask, other=0.0,
                                    cache_modifier=".cg")  # fmt: skip
            emit(total, both, row, col, mask, other, out, n_out, o_stride, GATE, SILU)
            tl.store(ticket, 0)


@triton.jit
def weight_tile(w, cols, k, N, K, EVEN: tl.constexpr):
    """[BN, BK] of a bf16 weight; zeros beyond it."""
    at = cols[:, None].to(tl.int64) * K + k[None, :]
    if EVEN:
        return tl.load(w + at, eviction_policy="evict_first")
    return tl.load(w + at, mask=(cols[:, None] < N) & (k[None, :] < K), other=0.0)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def linear_kernel(x, w, other, parts, out, tickets, n_rows, n_tiles, N, K, x_stride, o_stride,
                  SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
                  GATE: tl.constexpr, SILU: tl.constexpr, TILES: tl.constexpr,
                  PDL: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """One [16, BN] tile of one part of K of a bf16 weight; EVEN: tiles cover N and K exactly.

    With GATE 1 the second half of the N outputs is gated by the first, with GATE 2 `other` is by
    all of them: so is `out`.
    TILES is n_tiles for Triton's interpreter, which has no loops of a run-time length, else 0.
    """
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    n_out = N // 2 if GATE == 1 else N
    first = tl.program_id(2) * n_tiles * BK
    ks = tl.arange(0, BK)
    wait(PDL)
    acc = tl.zeros((16, BN), tl.float32)
    up = acc
    for tile in range(TILES if TILES > 0 else n_tiles):
        k = first + tile * BK + ks
        mask = rows[:, None] < n_rows
        if not EVEN:
            mask &= k[None, :] < K
        x_tile = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        x_tile = x_tile.to(tl.bfloat16).to(DOT)
        acc = tl.dot(x_tile, weight_tile(w, cols, k, n_out, K, EVEN).to(DOT).T, acc)
        if GATE == 1:
            w_up = weight_tile(w + n_out.to(tl.int64) * K, cols, k, n_out, K, EVEN)
            up = tl.dot(x_tile, w_up.to(DOT).T, up)
    release(PDL)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_out)
    finish(acc, up, rows[:, None].to(tl.int64), cols[None, :], mask, other, parts, out, tickets,
           n_rows, N, n_out, o_stride, SPLIT, GATE, SILU)  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def sliced_kernel(x, w, out, n_rows, n_tiles, N, K, x_stride, SLICES: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
                  PDL: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """As linear_kernel, for few outputs: each warp sums a part of K, and the parts add in order."""
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, SLICES)[:, None] * (n_tiles * BK) + tl.arange(0, BK)[None, :]
    at = tl.minimum(cols, N - 1).to(tl.int64) * K
    wait(PDL)
    acc = tl.zeros((SLICES, 16, BN), tl.float32)
    for tile in range(TILES if TILES > 0 else n_tiles):
        k = ks + tile * BK
        x_tile = tl.load(x + rows[None, :, None] * x_stride + k[:, None, :],
                         mask=(rows[None, :, None] < n_rows) & (k[:, None, :] < K),
                         other=0.0)  # fmt: skip
        w_tile = tl.load(w + at[None, :, None] + k[:, None, :], mask=k[:, None, :] < K, other=0.0)
        acc = tl.dot(x_tile.to(tl.bfloat16).to(DOT), w_tile.to(DOT).permute(0, 2, 1), acc)
    release(PDL)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < N)
    tl.store(out + rows[:, None].to(tl.int64) * N + cols[None, :], tl.sum(acc, 0), mask=mask)


@triton.jit
def embed_kernel(w, scales, token, out, scale, K, n_blocks, s_stride, BITS: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Row `token[t]` of a weight times scale, fp32."""
    begin(PDL)
    t = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < K
    n = tl.load(token + t).to(tl.int64)
    if BITS == 16:
        v = tl.load(w + n * K + k, mask=mask, other=0.0).to(tl.float32)
    else:
        W: tl.constexpr = 8 * BITS
        row = (n // 64 * n_blocks + k // 128) * (64 * W) + n % 64 * W
        word = tl.load(w + row + k % 128 % W, mask=mask, other=0).to(tl.int32) & 0xFFFF
        u = (word >> (k % 128 // W * BITS)) & ((1 << BITS) - 1)
        v = (u - (1 << (BITS - 1))).to(tl.float32)
        if BITS == 4:
            two = tl.load(scales + (k // 64) * s_stride + n, mask=mask, other=0)
            s = tl.where(k // 32 % 2 == 0, two << 16, two >> 16 << 16)
            v *= s.to(tl.float32, bitcast=True)
            v = v.to(tl.bfloat16).to(tl.float32)
        else:
            v *= tl.load(scales + n)
    tl.store(out + t * K + k, v * scale, mask=mask)


@triton.jit(do_not_specialize=["n_pairs"])
def expert_kernel(x, w, ids, out, n_pairs, N, K: tl.constexpr, A: tl.constexpr,
                  PER_PAIR: tl.constexpr, PAIRS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  GATE: tl.constexpr, SILU: tl.constexpr, PDL: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """Rows of pairs times their own block of the weight [E, N, K]; `out` is [pairs, N].

    With GATE 1 the second half of the N outputs is gated by the first, and `out` has N / 2.
    Every sixteenth pair of a block leads: its program reads the block's weights once for itself
    and the up to 15 pairs of the block behind it. A row's sum runs over K alone.
    """
    wait(PDL)
    lead = tl.program_id(1)
    n_out = N // 2 if GATE == 1 else N
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
        up = acc
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            x_tile = tl.load(x + rows[:, None] * K + k[None, :],
                             mask=real[:, None] & (k[None, :] < K), other=0.0)  # fmt: skip
            x_tile = x_tile.to(tl.bfloat16).to(DOT)
            acc = tl.dot(x_tile, weight_tile(base, cols, k, n_out, K, False).to(DOT).T, acc)
            if GATE == 1:
                w_up = weight_tile(base + n_out * K, cols, k, n_out, K, False)
                up = tl.dot(x_tile, w_up.to(DOT).T, up)
        release(PDL)
        if GATE == 1:
            acc = activate(acc, SILU) * up
        tl.store(out + pairs[:, None] * n_out + cols[None, :], acc,
                 mask=real[:, None] & (cols[None, :] < n_out))  # fmt: skip
