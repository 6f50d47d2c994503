// RMS norms: of whole rows, with the residual around them, and of heads, with rotary positions.
#pragma once

#include "core/args.h"
#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

// 1 / sqrt(mean(x^2) + eps) of k numbers; the adds are in the order of the lanes.
static inline float inverse_rms(const float* x, int64_t k, float eps) {
  F squares = zero();
  for (int64_t i = 0; i < k; i += 16) {
    const F lanes = k - i >= 16 ? load(x + i) : load_n(x + i, static_cast<int>(k - i));
    squares = fma(lanes, lanes, squares);
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(k) + eps);
}

static inline F load_floats(const float* x, int64_t n) {
  return n >= 16 ? load(x) : load_n(x, static_cast<int>(n));
}

static inline void norm_row(const NormArgs& a, int64_t row, float* y) {
  for (int64_t i = 0; i < a.k; i += 16) store(y + i, load_at(a.x, row, i, a.k - i));
  const float inverse = a.plain ? 1.0f : inverse_rms(y, a.k, a.eps);
  for (int64_t i = 0; i < a.k; i += 16) {
    F lanes = load(y + i);
    if (!a.plain) {
      lanes = mul(lanes, set1(inverse));
      if (a.weight) lanes = mul(lanes, load_floats(a.weight + i, a.k - i));
    }
    if (a.residual.data) lanes = add(load_at(a.residual, row, i, a.k - i), lanes);
    lanes = mul(lanes, set1(a.scale));
    store(y + i, lanes);
    if (a.out.data) store_at(a.out, row, i, lanes, a.k - i);
  }
  if (!a.next_out.data) return;
  const float next = inverse_rms(y, a.k, a.eps);
  for (int64_t i = 0; i < a.k; i += 16) {
    F lanes = mul(load(y + i), set1(next));
    if (a.next_weight) lanes = mul(lanes, load_floats(a.next_weight + i, a.k - i));
    store_at(a.next_out, row, i, lanes, a.k - i);
  }
}

static void norm(const NormArgs& a, const Worker& worker) {
  const Range rows = share(a.rows, worker);
  for (int64_t row = rows.begin; row < rows.end; ++row)
    norm_row(a, row, reinterpret_cast<float*>(worker.scratch));
}

static inline void rotate(const HeadNormArgs& a, int64_t row, float* y) {
  const int64_t half = a.dim / 2;
  const float* cos = a.cos + a.position[row] * half;
  const float* sin = a.sin + a.position[row] * half;
  for (int64_t i = 0; i < half; i += 16) {
    const F first = load(y + i), second = load(y + half + i);
    const F c = load(cos + i), s = load(sin + i);
    store(y + i, sub(mul(first, c), mul(second, s)));
    store(y + half + i, fma(first, s, mul(second, c)));
  }
}

// One int8 vector and its scale into a page.
static inline void store_quantised(const float* y, int64_t dim, int8_t* out, float* scale) {
  F widest = zero();
  for (int64_t i = 0; i < dim; i += 16) widest = maximum(widest, absolute(load(y + i)));
  const float limit = highest(widest);
  const F inverse = set1(limit > 0.0f ? 127.0f / limit : 0.0f);
  for (int64_t i = 0; i < dim; i += 16) store_i8(out + i, nearest(mul(load(y + i), inverse)));
  *scale = limit / 127.0f;
}

static inline void store_in_page(const HeadNormArgs& a, int64_t row, int64_t head, const float* y) {
  if (a.page[row] < 0) return;
  const int64_t slot =
      (static_cast<int64_t>(a.page[row]) * a.n_heads + head) * kPageSlots + a.slot[row];
  auto* out = static_cast<std::byte*>(a.pages) + slot * a.dim * element_bytes(a.page_dtype);
  if (a.page_dtype == DType::i8)
    return store_quantised(y, a.dim, reinterpret_cast<int8_t*>(out), a.page_scales + slot);
  for (int64_t i = 0; i < a.dim; i += 16)
    store_row(out + i * element_bytes(a.page_dtype), a.page_dtype, load(y + i), 16);
}

static void head_norm(const HeadNormArgs& a, const Worker& worker) {
  auto* y = reinterpret_cast<float*>(worker.scratch);
  const Range heads = share(static_cast<int64_t>(a.rows) * a.n_heads, worker);
  for (int64_t item = heads.begin; item < heads.end; ++item) {
    const int64_t row = item / a.n_heads, head = item % a.n_heads;
    for (int64_t i = 0; i < a.dim; i += 16) store(y + i, load_at(a.x, row, head * a.dim + i, 16));
    if (a.eps >= 0.0f) {
      const float inverse = inverse_rms(y, a.dim, a.eps);
      for (int64_t i = 0; i < a.dim; i += 16) {
        const F lanes = mul(load(y + i), set1(inverse));
        store(y + i, a.weight ? mul(lanes, load(a.weight + i)) : lanes);
      }
    }
    if (a.cos) rotate(a, row, y);
    if (!a.out.data) {
      store_in_page(a, row, head, y);
      continue;
    }
    for (int64_t i = 0; i < a.dim; i += 16) store_at(a.out, row, head * a.dim + i, load(y + i), 16);
  }
}

}  // namespace outdraft::OUTDRAFT_ISA
