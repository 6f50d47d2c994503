"""Triton kernels of products with weights, whose sums run in an order no other row can change.

A linear multiplies blocks of 16 padded rows: tiles and the split of K are the weight's, never the
call's. Kernels are launched before their predecessor is done and wait for it themselves
(programmatic dependent launch). Small kernels let the next one come at once, those of products when
their sums are done: what waits must not take the room of what works. Not here: the other kernels
(kernels.py), how weights are packed (weights.py).
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
def finish(acc, rows, cols, parts, out, tickets, n_rows, N, SPLIT: tl.constexpr):
    """A tile into `out`; of several parts the last to arrive adds all of them in order."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < N)
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    if SPLIT == 1:
        tl.store(out + at, acc, mask=mask)
    else:
        size = n_rows.to(tl.int64) * N
        tl.store(parts + tl.program_id(2) * size + at, acc, mask=mask)
        tl.debug_barrier()
        ticket = tickets + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.load(parts + at, mask=mask, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLIT):
                total += tl.load(parts + part * size + at, mask=mask, other=0.0,
                                 cache_modifier=".cg")  # fmt: skip
            tl.store(out + at, total, mask=mask)
            tl.store(ticket, 0)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def linear_kernel(x, w, parts, out, tickets, n_rows, n_tiles, N, K, x_stride,
                  SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
                  TILES: tl.constexpr, PDL: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """One [16, BN] tile of one part of K of a bf16 weight; EVEN: tiles cover N and K exactly.

    TILES is n_tiles for Triton's interpreter, which has no loops of a run-time length, else 0.
    """
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * n_tiles * BK
    ks = tl.arange(0, BK)
    wait(PDL)
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
    release(PDL)
    finish(acc, rows, cols, parts, out, tickets, n_rows, N, SPLIT)


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
def nibbles(q, s01, s23, ASM: tl.constexpr, DOT: tl.constexpr):
    """Four planes of 4-bit numbers less 8 from 16-bit words, lowest bits first, times bf16 scales.

    `s01` and `s23` hold the scales of two planes each. The product is rounded to bf16. In the
    assembler two words at a time: a nibble in the mantissa of 128 is 128 + nibble in bf16.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, one, less;
            mov.b32 one, 0x3f803f80;
            mov.b32 less, 0xc308c308;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, $0, one, less;
            fma.rn.bf16x2 $1, $1, one, less;
            fma.rn.bf16x2 $2, $2, one, less;
            fma.rn.bf16x2 $3, $3, one, less;
            prmt.b32 t, $5, $5, 0x1010;
            mul.rn.bf16x2 $0, $0, t;
            prmt.b32 t, $5, $5, 0x3232;
            mul.rn.bf16x2 $1, $1, t;
            prmt.b32 t, $7, $7, 0x1010;
            mul.rn.bf16x2 $2, $2, t;
            prmt.b32 t, $7, $7, 0x3232;
            mul.rn.bf16x2 $3, $3, t;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r", [q, s01, s23],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    u = q.to(tl.int32) & 0xFFFF
    q0 = ((u & 15) - 8).to(tl.float32) * (s01 << 16).to(tl.float32, bitcast=True)
    q1 = (((u >> 4) & 15) - 8).to(tl.float32) * (s01 >> 16 << 16).to(tl.float32, bitcast=True)
    q2 = (((u >> 8) & 15) - 8).to(tl.float32) * (s23 << 16).to(tl.float32, bitcast=True)
    q3 = (((u >> 12) & 15) - 8).to(tl.float32) * (s23 >> 16 << 16).to(tl.float32, bitcast=True)
    return (q0.to(tl.bfloat16).to(DOT), q1.to(tl.bfloat16).to(DOT),
            q2.to(tl.bfloat16).to(DOT), q3.to(tl.bfloat16).to(DOT))  # fmt: skip


@triton.jit
def octets(q, ASM: tl.constexpr, DOT: tl.constexpr):
    """Two planes of 8-bit numbers less 128 from 16-bit words; exact.

    The high nibble h in the mantissa of 128, times 16 less 2304, is 16 h - 256; added to 128 and
    the low one that is the number less 128.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, a, b, one, sixteen, less;
            mov.b32 one, 0x3f803f80;
            mov.b32 sixteen, 0x41804180;
            mov.b32 less, 0xc510c510;
            lop3.b32 a, $2, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $2, 4;
            lop3.b32 b, t, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 b, b, sixteen, less;
            fma.rn.bf16x2 $0, a, one, b;
            shr.u32 t, $2, 8;
            lop3.b32 a, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $2, 12;
            lop3.b32 b, t, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 b, b, sixteen, less;
            fma.rn.bf16x2 $1, a, one, b;
            }""",
            "=&r,=&r,r", [q], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    u = q.to(tl.int32) & 0xFFFF
    return ((u & 255) - 128).to(DOT), (((u >> 8) & 255) - 128).to(DOT)


@triton.jit
def plane(x, rows, k, n_rows, K, x_stride, DOT: tl.constexpr):
    """Inputs [16, W] at columns k; zeros beyond the rows and inputs there are."""
    mask = (rows[:, None] < n_rows) & (k[None, :] < K)
    return tl.load(x + rows[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(
        tl.bfloat16
    ).to(DOT)  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def packed_kernel(x, w, scales, parts, out, tickets, n_rows, n_tiles, N, K, n_blocks, s_stride,
                  x_stride, BITS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
                  TILES: tl.constexpr, ASM: tl.constexpr,
                  PDL: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """As linear_kernel, of 4- or 8-bit weights, 128 inputs a tile.

    `w` is int16 [N / 64, n_blocks, 64, W]; word j of a row holds inputs j, j + W, …. `scales` of
    4 bits is int32 [2 * n_blocks, s_stride], two bf16 of 32 inputs each; of 8 bits it is fp32 [N]
    and multiplies the sum.
    """
    W: tl.constexpr = 8 * BITS
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * n_tiles
    j = tl.arange(0, W)
    base = (
        w + tl.minimum(cols // 64, (N - 1) // 64).to(tl.int64) * n_blocks * (64 * W) + cols % 64 * W
    )
    wait(PDL)
    acc = tl.zeros((16, BN), tl.float32)
    for tile in range(TILES if TILES > 0 else n_tiles):
        block = first + tile
        there = tl.minimum(block, n_blocks - 1).to(tl.int64)
        q = tl.load(base[:, None] + there * (64 * W) + j[None, :])
        k = block * 128 + j
        if BITS == 4:
            s = scales + there * 2 * s_stride + cols
            s01, s23 = tl.load(s)[:, None], tl.load(s + s_stride)[:, None]
            q0, q1, q2, q3 = nibbles(q, s01, s23, ASM, DOT)
            acc = tl.dot(plane(x, rows, k, n_rows, K, x_stride, DOT), q0.T, acc)
            acc = tl.dot(plane(x, rows, k + 32, n_rows, K, x_stride, DOT), q1.T, acc)
            acc = tl.dot(plane(x, rows, k + 64, n_rows, K, x_stride, DOT), q2.T, acc)
            acc = tl.dot(plane(x, rows, k + 96, n_rows, K, x_stride, DOT), q3.T, acc)
        else:
            q0, q1 = octets(q, ASM, DOT)
            acc = tl.dot(plane(x, rows, k, n_rows, K, x_stride, DOT), q0.T, acc)
            acc = tl.dot(plane(x, rows, k + 64, n_rows, K, x_stride, DOT), q1.T, acc)
    release(PDL)
    if BITS == 8:
        acc = acc * tl.load(scales + cols, mask=cols < N, other=0.0)[None, :]
    finish(acc, rows, cols, parts, out, tickets, n_rows, N, SPLIT)


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
                  PDL: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Rows of pairs times their own block of the weight [E, N, K]; `out` is [pairs, N].

    Every sixteenth pair of a block leads: its program reads the block's weights once for itself
    and the up to 15 pairs of the block behind it. A row's sum runs over K alone.
    """
    wait(PDL)
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
        release(PDL)
        tl.store(out + pairs[:, None] * N + cols[None, :], acc,
                 mask=real[:, None] & (cols[None, :] < N))  # fmt: skip
