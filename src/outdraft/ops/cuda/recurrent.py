"""Triton kernels of layers with a gated delta rule; rows run one after another in a program.

A program has some channels, or one head and some of its values, of one sequence: that of the row
with which the sequence begins; those of other rows end at once. So a row's bits depend on the rows
before it and on nothing else. Not here: launching (delta.py).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from outdraft.ops.cuda.linears import begin


@triton.jit
def starts(sequence, t):
    """Whether a sequence's rows begin with this one."""
    own = tl.load(sequence + t)
    return (t == 0) | (tl.load(sequence + tl.maximum(t - 1, 0)) != own)


@triton.jit
def rows_of(sequence, t, n_rows, MOST: tl.constexpr):
    """How many rows the sequence has whose first is t: those before the first of another."""
    i = tl.arange(0, MOST)
    own = tl.load(sequence + t)
    others = tl.load(sequence + t + i, mask=t + i < n_rows, other=-1) != own
    return tl.min(tl.where(others, i, MOST), 0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)); x itself where exp would be infinite."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit(do_not_specialize=["n_rows"])
def conv_kernel(x, w, bias, state, sequence, read, write, out, n_rows, x_stride, C,
                W: tl.constexpr, BIAS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """silu of a causal convolution of width W = 4 over a sequence's rows.

    ROWS is the number of rows for Triton's interpreter, which has no loops of a run-time length,
    else 0.
    """
    begin(PDL)
    t = tl.program_id(0)
    if starts(sequence, t):
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = c < C
        n = rows_of(sequence, t, n_rows, MOST)
        source = tl.load(read + t).to(tl.int64)
        there = c < tl.where(source >= 0, C, 0)
        before = state + tl.maximum(source, 0) * (W - 1) * C + c
        x0 = tl.load(before, mask=there, other=0.0)
        x1 = tl.load(before + C, mask=there, other=0.0)
        x2 = tl.load(before + 2 * C, mask=there, other=0.0)
        w0 = tl.load(w + c, mask=mask, other=0.0)
        w1 = tl.load(w + C + c, mask=mask, other=0.0)
        w2 = tl.load(w + 2 * C + c, mask=mask, other=0.0)
        w3 = tl.load(w + 3 * C + c, mask=mask, other=0.0)
        b = tl.zeros((BLOCK,), tl.float32)
        if BIAS:
            b = tl.load(bias + c, mask=mask, other=0.0)
        for i in range(ROWS if ROWS > 0 else n):
            row = tl.minimum(t + i, n_rows - 1).to(tl.int64)
            own = c < tl.where(i < n, C, 0)
            x3 = tl.load(x + row * x_stride + c, mask=own, other=0.0).to(tl.float32)
            y = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3 + b
            tl.store(out + row * C + c, y / (1.0 + tl.exp(-y)), mask=own)
            x0, x1, x2 = x1, x2, x3
            target = tl.load(write + row).to(tl.int64)
            kept = c < tl.where((i < n) & (target >= 0), C, 0)
            after = state + tl.maximum(target, 0) * (W - 1) * C + c
            tl.store(after, x0, mask=kept)
            tl.store(after + C, x1, mask=kept)
            tl.store(after + 2 * C, x2, mask=kept)


@triton.jit(do_not_specialize=["n_rows"])
def delta_kernel(qkv, a, b, decay, bias, state, sequence, read, write, out, n_rows, c_stride,
                 a_stride, b_stride, H, HK, scale, K: tl.constexpr, V: tl.constexpr,
                 BV: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """The gated delta rule of BV values of one head, over a sequence's rows; ROWS as above."""
    begin(PDL)
    t = tl.program_id(0)
    if starts(sequence, t):
        h = tl.program_id(1)
        n = rows_of(sequence, t, n_rows, MOST)
        k = tl.arange(0, K)
        v = tl.program_id(2) * BV + tl.arange(0, BV)
        at = h.to(tl.int64) * K * V + k[:, None] * V + v[None, :]
        size = H.to(tl.int64) * K * V
        source = tl.load(read + t).to(tl.int64)
        s = tl.load(state + tl.maximum(source, 0) * size + at)
        s = tl.where(source >= 0, s, 0.0)
        head = h // (H // HK)
        rate, shift = tl.load(decay + h), tl.load(bias + h)
        for i in range(ROWS if ROWS > 0 else n):
            row = tl.minimum(t + i, n_rows - 1).to(tl.int64)
            own = qkv + row * c_stride
            q_K = tl.load(own + head * K + k)
            k_K = tl.load(own + (HK + head) * K + k)
            v_V = tl.load(own + 2 * HK * K + h * V + v)
            q_K = q_K * (1.0 / tl.sqrt(tl.sum(q_K * q_K, 0) + 1e-6)) * scale
            k_K = k_K * (1.0 / tl.sqrt(tl.sum(k_K * k_K, 0) + 1e-6))
            decayed = tl.exp(rate * softplus(tl.load(a + row * a_stride + h) + shift))
            beta = 1.0 / (1.0 + tl.exp(-tl.load(b + row * b_stride + h)))
            s = s * decayed
            change = (v_V - tl.sum(s * k_K[:, None], 0)) * beta
            s += k_K[:, None] * change[None, :]
            y = tl.sum(s * q_K[:, None], 0)
            tl.store(out + (row * H + h) * V + v, y, mask=v < tl.where(i < n, V, 0))
            target = tl.load(write + row).to(tl.int64)
            where = state + tl.maximum(target, 0) * size + at
            kept = tl.where((i < n) & (target >= 0), K, 0)
            tl.store(where, s, mask=k[:, None] < kept)


@triton.jit
def gated_norm_kernel(x, gate, w, out, g_stride, H, eps, V: tl.constexpr, PDL: tl.constexpr):
    """RMS norm of one head times its weight times silu(gate)."""
    begin(PDL)
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    v = tl.arange(0, V)
    y = tl.load(x + (t * H + h) * V + v)
    g = tl.load(gate + t * g_stride + h * V + v).to(tl.float32)
    y = y * (1.0 / tl.sqrt(tl.sum(y * y, 0) / V + eps)) * tl.load(w + v)
    tl.store(out + (t * H + h) * V + v, y * (g / (1.0 + tl.exp(-g))))


@triton.jit
def gate_rows_kernel(x, gate, out, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """sigmoid(gate) of a row times the row."""
    begin(PDL)
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    open = 1.0 / (1.0 + tl.exp(-tl.load(gate + t)))
    tl.store(out + t * K + k, open * tl.load(x + t * K + k, mask=k < K, other=0.0), mask=k < K)
