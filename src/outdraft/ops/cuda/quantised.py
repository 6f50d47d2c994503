"""Triton kernels of products with 8- and 4-bit weights.

Weights are the left side of a product on tensor cores, 8 or 16 rows the right one: a lane gets the
words of its own outputs straight from where they were packed, and turns them into bf16 in a few
instructions. What is taken off the codes is one product of a constant with the same inputs, and
scales multiply the sums of their 32 inputs. Not here: packing (weights.py).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from outdraft.ops.cuda.linears import finish, release, wait


@triton.jit
def nibbles(q, ASM: tl.constexpr, DOT: tl.constexpr):
    """Four planes of 4-bit numbers plus 128 from 16-bit words, lowest bits first.

    In the assembler two words at a time: a nibble in the mantissa of 128 is 128 + nibble in bf16.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
            }""",
            "=&r,=&r,=&r,=&r,r", [q],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    u = q.to(tl.int32) & 0xFFFF
    return (((u & 15) + 128).to(DOT), (((u >> 4) & 15) + 128).to(DOT),
            (((u >> 8) & 15) + 128).to(DOT), (((u >> 12) & 15) + 128).to(DOT))  # fmt: skip


@triton.jit
def octets(q, ASM: tl.constexpr, DOT: tl.constexpr):
    """Two planes of 8-bit numbers less 128 from 16-bit words; exact.

    The low seven bits in the mantissa of 128 are 128 + those; the eighth, turned over, makes -256
    of -128 in the lowest bit of the exponent.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, a, b;
            lop3.b32 a, $2, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 b, $2, 0x00800080, 0xc380c380, 0x6a;
            add.rn.bf16x2 $0, a, b;
            shr.u32 t, $2, 8;
            lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 b, t, 0x00800080, 0xc380c380, 0x6a;
            add.rn.bf16x2 $1, a, b;
            }""",
            "=&r,=&r,r", [q], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    u = q.to(tl.int32) & 0xFFFF
    return ((u & 255) - 128).to(DOT), (((u >> 8) & 255) - 128).to(DOT)


@triton.jit
def plane(x, rows, k, n_rows, K, x_stride, DOT: tl.constexpr):
    """Inputs [W, R] at columns k; zeros beyond the rows and inputs there are."""
    mask = (rows[None, :] < n_rows) & (k[:, None] < K)
    return tl.load(x + rows[None, :] * x_stride + k[:, None], mask=mask, other=0.0).to(
        tl.bfloat16
    ).to(DOT)  # fmt: skip


@triton.jit
def low(s):
    """The first of two bf16 in 32 bits."""
    return (s << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(s):
    """The second of two bf16 in 32 bits."""
    return (s & -65536).to(tl.float32, bitcast=True)


@triton.jit
def place(w, cols, N, n_blocks, W: tl.constexpr):
    """Where the first tile of each output begins."""
    tile = tl.minimum(cols // 64, (N - 1) // 64).to(tl.int64)
    return w + tile * n_blocks * (64 * W) + cols % 64 * W


@triton.jit
def four_bits(acc, base, s, block, x0, x1, x2, x3, j, less, s_stride, ASM: tl.constexpr,
              DOT: tl.constexpr):  # fmt: skip
    """A tile of 128 inputs of 4-bit weights added to acc."""
    q0, q1, q2, q3 = nibbles(tl.load(base[:, None] + block * 2048 + j[None, :]), ASM, DOT)
    s += block * 2 * s_stride
    s01, s23 = tl.load(s), tl.load(s + s_stride)
    acc += tl.dot(q0, x0, tl.dot(less, x0)) * low(s01)[:, None]
    acc += tl.dot(q1, x1, tl.dot(less, x1)) * high(s01)[:, None]
    acc += tl.dot(q2, x2, tl.dot(less, x2)) * low(s23)[:, None]
    acc += tl.dot(q3, x3, tl.dot(less, x3)) * high(s23)[:, None]
    return acc


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def packed_kernel(x, w, scales, other, parts, out, tickets, n_rows, n_tiles, N, K, n_blocks,
                  s_stride, x_stride, o_stride, BITS: tl.constexpr, SPLIT: tl.constexpr,
                  BN: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr,
                  STAGES: tl.constexpr, TILES: tl.constexpr,
                  ASM: tl.constexpr, PDL: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """One [BN, R] tile of outputs and rows of one part of K, 128 inputs at a time.

    `w` is int16 [N / 64, n_blocks, 64, W]; word j of a row holds inputs j, j + W, …. `scales` of
    4 bits is int32 [2 * n_blocks, s_stride], two bf16 of 32 inputs each; of 8 bits it is fp32 [N]
    and multiplies the sum. GATE as in `linear_kernel`: N counts both halves of a pair.
    """
    W: tl.constexpr = 8 * BITS
    rows = tl.program_id(0) * R + tl.arange(0, R)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    n_out = N // 2 if GATE == 1 else N
    first = tl.program_id(2) * n_tiles
    j = tl.arange(0, W)
    base = place(w, cols, N, n_blocks, W)
    base_up = place(w, cols + n_out, N, n_blocks, W) if GATE == 1 else base
    less = tl.full((BN, W), -136.0, DOT)
    wait(PDL)
    acc = tl.zeros((BN, R), tl.float32)
    up = acc
    for tile in tl.range(0, TILES if TILES > 0 else n_tiles, num_stages=STAGES):
        block = first + tile
        there = tl.minimum(block, n_blocks - 1).to(tl.int64)
        k = block * 128 + j
        x0 = plane(x, rows, k, n_rows, K, x_stride, DOT)
        x1 = plane(x, rows, k + W, n_rows, K, x_stride, DOT)
        if BITS == 4:
            x2 = plane(x, rows, k + 64, n_rows, K, x_stride, DOT)
            x3 = plane(x, rows, k + 96, n_rows, K, x_stride, DOT)
            acc = four_bits(acc, base, scales + cols, there, x0, x1, x2, x3, j, less, s_stride,
                            ASM, DOT)  # fmt: skip
            if GATE == 1:
                up = four_bits(up, base_up, scales + n_out + cols, there, x0, x1, x2, x3, j, less,
                               s_stride, ASM, DOT)  # fmt: skip
        else:
            q0, q1 = octets(tl.load(base[:, None] + there * (64 * W) + j[None, :]), ASM, DOT)
            acc = tl.dot(q1, x1, tl.dot(q0, x0, acc))
            if GATE == 1:
                q0, q1 = octets(tl.load(base_up[:, None] + there * (64 * W) + j[None, :]), ASM, DOT)
                up = tl.dot(q1, x1, tl.dot(q0, x0, up))
    release(PDL)
    if BITS == 8:
        acc = acc * tl.load(scales + cols, mask=cols < n_out, other=0.0)[:, None]
        if GATE == 1:
            up = up * tl.load(scales + n_out + cols, mask=cols < n_out, other=0.0)[:, None]
    mask = (rows[None, :] < n_rows) & (cols[:, None] < n_out)
    finish(acc, up, rows[None, :].to(tl.int64), cols[:, None], mask, other, parts, out, tickets,
           n_rows, N, n_out, o_stride, SPLIT, GATE, SILU)  # fmt: skip
