"""Triton kernels of norms: of rows with what is added to them, and of heads with their rotation.

A program has one row or one head. Not here: launching (ops.py, fused.py).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from outdraft.ops.cuda.linears import begin


@triton.jit
def gains(w, k, mask, HAS_W: tl.constexpr):
    """Weights of a norm, or ones."""
    if HAS_W:
        return tl.load(w + k, mask=mask, other=0.0)
    return tl.full(k.shape, 1.0, tl.float32)


@triton.jit
def unit(v, K, eps):
    """v without its size: v / sqrt(mean(v^2) + eps)."""
    return v * (1.0 / tl.sqrt(tl.sum(v * v, 0) / K + eps))


@triton.jit
def norm_kernel(x, residual, w, w_next, w_2, w_3, y, normed, normed_2, normed_3, K, eps, scale,
                ADD: tl.constexpr, HAS_W: tl.constexpr, HAS_NEXT: tl.constexpr,
                MORE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """rms_norm(x, w); with ADD also y = (residual + that) * scale, and y's norm.

    With MORE y's norm has two further weights, and as many outputs.
    """
    begin(PDL)
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    mask = k < K
    v = tl.load(x + row * K + k, mask=mask, other=0.0).to(tl.float32)
    # All that is read is asked for before the first sum: no other work hides what a read takes.
    gain = gains(w, k, mask, HAS_W)
    if ADD:
        r = tl.load(residual + row * K + k, mask=mask, other=0.0).to(tl.float32)
        gain_next = gains(w_next, k, mask, HAS_NEXT)
    if MORE:
        gain_2, gain_3 = gains(w_2, k, mask, True), gains(w_3, k, mask, True)
    v = unit(v, K, eps) * gain
    if ADD:
        v = (r + v) * scale
        tl.store(y + row * K + k, v, mask=mask)
        v = unit(v, K, eps)
        if MORE:
            tl.store(normed_2 + row * K + k, v * gain_2, mask=mask)
            tl.store(normed_3 + row * K + k, v * gain_3, mask=mask)
        v = v * gain_next
    tl.store(normed + row * K + k, v, mask=mask)


@triton.jit
def mixture_kernel(pairs, weights, dense, residual, w_pairs, w_dense, w, w_next, y, normed, K, eps,
                   scale, A: tl.constexpr, HAS_NEXT: tl.constexpr, BLOCK: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """A row's experts summed in the order of its ids and normed, plus the normed dense part; then
    as norm_kernel with ADD."""
    begin(PDL)
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    mask = k < K
    d = tl.load(dense + row * K + k, mask=mask, other=0.0)
    r = tl.load(residual + row * K + k, mask=mask, other=0.0)
    gain, gain_next = gains(w, k, mask, True), gains(w_next, k, mask, HAS_NEXT)
    gain_dense, gain_pairs = gains(w_dense, k, mask, True), gains(w_pairs, k, mask, True)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        at = (row * A + a).to(tl.int64) * K + k
        total += tl.load(pairs + at, mask=mask, other=0.0) * tl.load(weights + row * A + a)
    v = unit(total, K, eps) * gain_pairs + unit(d, K, eps) * gain_dense
    v = (r + unit(v, K, eps) * gain) * scale
    tl.store(y + row * K + k, v, mask=mask)
    tl.store(normed + row * K + k, unit(v, K, eps) * gain_next, mask=mask)


@triton.jit
def turned(x, w, cos, sin, position, t, eps, D: tl.constexpr, NORM: tl.constexpr,
           HAS_W: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """Both halves of a head, normed and rotated."""
    i = tl.arange(0, D // 2)
    a = tl.load(x + i).to(tl.float32)
    b = tl.load(x + D // 2 + i).to(tl.float32)
    if NORM:
        r = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
        a, b = a * r, b * r
    if HAS_W:
        a = a * tl.load(w + i)
        b = b * tl.load(w + D // 2 + i)
    if ROPE:
        at = tl.load(position + t).to(tl.int64) * (D // 2) + i
        c, s = tl.load(cos + at), tl.load(sin + at)
        a, b = a * c - b * s, b * c + a * s
    return a, b


@triton.jit
def place(page, slot, t, g, P_STRIDE, S_STRIDE, D: tl.constexpr):
    """Where head g of row t goes in pages [P, G, S, D]."""
    where = tl.load(page + t).to(tl.int64) * P_STRIDE + g * S_STRIDE
    return where + tl.load(slot + t).to(tl.int64) * D


@triton.jit
def head_kernel(x, w, cos, sin, position, page, slot, out, t_stride, G, P_STRIDE, S_STRIDE, eps,
                D: tl.constexpr, NORM: tl.constexpr, HAS_W: tl.constexpr, ROPE: tl.constexpr,
                PAGED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Norm and rotation of one head; into pages [P, G, S, D] when PAGED."""
    begin(PDL)
    t = tl.program_id(0)
    g = tl.program_id(1)
    i = tl.arange(0, D // 2)
    a, b = turned(x + t * t_stride + g * D, w, cos, sin, position, t, eps, D, NORM, HAS_W, ROPE)
    if PAGED:
        where = place(page, slot, t, g, P_STRIDE, S_STRIDE, D)
    else:
        where = (t * G + g).to(tl.int64) * D
    tl.store(out + where + i, a)
    tl.store(out + where + D // 2 + i, b)


@triton.jit
def heads_kernel(q, k, v, q_w, k_w, v_w, q_cos, q_sin, k_cos, k_sin, position, page, slot, out,
                 keys, values, t_stride, H, G, P_STRIDE, S_STRIDE, q_eps, k_eps, v_eps,
                 D: tl.constexpr, Q_NORM: tl.constexpr, Q_HAS_W: tl.constexpr,
                 Q_ROPE: tl.constexpr, K_NORM: tl.constexpr, K_HAS_W: tl.constexpr,
                 K_ROPE: tl.constexpr, V_NORM: tl.constexpr, V_HAS_W: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """As head_kernel for one of a row's queries, keys and values; the latter into their pages."""
    begin(PDL)
    t = tl.program_id(0)
    g = tl.program_id(1)
    i = tl.arange(0, D // 2)
    if g < H:
        a, b = turned(q + t * t_stride + g * D, q_w, q_cos, q_sin, position, t, q_eps, D, Q_NORM,
                      Q_HAS_W, Q_ROPE)  # fmt: skip
        to = out + (t * H + g).to(tl.int64) * D + i
        tl.store(to, a)
        tl.store(to + D // 2, b)
    elif g < H + G:
        g -= H
        a, b = turned(k + t * t_stride + g * D, k_w, k_cos, k_sin, position, t, k_eps, D, K_NORM,
                      K_HAS_W, K_ROPE)  # fmt: skip
        to = keys + place(page, slot, t, g, P_STRIDE, S_STRIDE, D) + i
        tl.store(to, a)
        tl.store(to + D // 2, b)
    else:
        g -= H + G
        a, b = turned(v + t * t_stride + g * D, v_w, k_cos, k_sin, position, t, v_eps, D, V_NORM,
                      V_HAS_W, False)  # fmt: skip
        to = values + place(page, slot, t, g, P_STRIDE, S_STRIDE, D) + i
        tl.store(to, a)
        tl.store(to + D // 2, b)
