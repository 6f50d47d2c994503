// Recurrent layers: short convolution and gated delta rule, row after row, so that a row's bits do
// not depend on how rows are grouped into calls.
#pragma once

#include <cmath>
#include <cstring>

#include "core/recurrent_args.h"
#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

static inline bool begins(const StateRows& rows, int64_t t) {
  return t == 0 || rows.sequence[t] != rows.sequence[t - 1];
}

static void short_conv(const ConvArgs& a, const Worker& worker) {
  const Range blocks = share(a.channels / 16, worker);
  const int64_t kept = a.width - 1;
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t c = block * 16;
    F before[kMaxConvWidth];
    for (int64_t t = 0; t < a.rows.rows; ++t) {
      if (begins(a.rows, t)) {
        const int64_t from = a.rows.read[t];
        for (int64_t w = 0; w < kept; ++w)
          before[w] = from < 0 ? zero() : load(a.state + (from * kept + w) * a.channels + c);
      }
      const F x = load_at(a.x, t, c, 16);
      F y = mul(x, load(a.weight + kept * a.channels + c));
      if (a.bias) y = add(y, load(a.bias + c));
      for (int64_t w = 0; w < kept; ++w) y = fma(before[w], load(a.weight + w * a.channels + c), y);
      store_at(a.out, t, c, silu(y), 16);
      for (int64_t w = 0; w + 1 < kept; ++w) before[w] = before[w + 1];
      if (kept > 0) before[kept - 1] = x;
      if (const int64_t to = a.rows.write[t]; to >= 0)
        for (int64_t w = 0; w < kept; ++w)
          store(a.state + (to * kept + w) * a.channels + c, before[w]);
    }
  }
}

// n numbers of a row as a vector of length 1, times scale.
static inline void unit(const Matrix& m, int64_t row, int64_t column, int64_t n, float scale,
                        float* y) {
  F squares = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F x = load_at(m, row, column + i, 16);
    store(y + i, x);
    squares = fma(x, x, squares);
  }
  const F inverse = set1(scale / __builtin_sqrtf(sum(squares) + 1e-6f));
  for (int64_t i = 0; i < n; i += 16) store(y + i, mul(load(y + i), inverse));
}

static inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

static inline float element(const Matrix& m, int64_t row, int64_t column) {
  float x[16];
  store(x, load_at(m, row, column, 1));
  return x[0];
}

// One row of one head over a block of 16 value columns.
static inline void delta_columns(float* s, int64_t v_dim, int64_t k_dim, const float* q,
                                 const float* k, F value, F kept, F beta, F& out) {
  F seen = zero();
  for (int64_t i = 0; i < k_dim; ++i) seen = fma(set1(k[i]), load(s + i * v_dim), seen);
  const F change = mul(beta, sub(value, mul(kept, seen)));
  F y = zero();
  for (int64_t i = 0; i < k_dim; ++i) {
    const F now = fma(set1(k[i]), change, mul(kept, load(s + i * v_dim)));
    store(s + i * v_dim, now);
    y = fma(set1(q[i]), now, y);
  }
  out = y;
}

static void delta_rule(const DeltaArgs& a, const Worker& worker) {
  const int64_t size = static_cast<int64_t>(a.k_dim) * a.v_dim;
  auto* s = reinterpret_cast<float*>(worker.scratch);
  float *q = s + size, *k = q + a.k_dim;
  const int64_t keys = static_cast<int64_t>(a.n_k_heads) * a.k_dim;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.k_dim));
  const Range heads = share(a.n_v_heads, worker);
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    const int64_t shared = h / (a.n_v_heads / a.n_k_heads);
    for (int64_t t = 0; t < a.rows.rows; ++t) {
      if (begins(a.rows, t)) {
        const int64_t from = a.rows.read[t];
        if (from < 0)
          std::memset(s, 0, size * 4);
        else
          std::memcpy(s, a.state + (from * a.n_v_heads + h) * size, size * 4);
      }
      unit(a.qkv, t, shared * a.k_dim, a.k_dim, scale, q);
      unit(a.qkv, t, keys + shared * a.k_dim, a.k_dim, 1.0f, k);
      const F kept = set1(std::exp(a.decay[h] * softplus(element(a.a, t, h) + a.bias[h])));
      const F beta = sigmoid(set1(element(a.b, t, h)));
      for (int64_t j = 0; j < a.v_dim; j += 16) {
        F y;
        const F value = load_at(a.qkv, t, 2 * keys + h * a.v_dim + j, 16);
        delta_columns(s + j, a.v_dim, a.k_dim, q, k, value, kept, beta, y);
        store_at(a.out, t, h * a.v_dim + j, y, 16);
      }
      if (const int64_t to = a.rows.write[t]; to >= 0)
        std::memcpy(a.state + (to * a.n_v_heads + h) * size, s, size * 4);
    }
  }
}

static void gated_norm(const GatedNormArgs& a, const Worker& worker) {
  auto* y = reinterpret_cast<float*>(worker.scratch);
  const Range heads = share(static_cast<int64_t>(a.rows) * a.n_heads, worker);
  for (int64_t item = heads.begin; item < heads.end; ++item) {
    const int64_t row = item / a.n_heads, first = item % a.n_heads * a.dim;
    F squares = zero();
    for (int64_t i = 0; i < a.dim; i += 16) {
      const F x = load_at(a.x, row, first + i, 16);
      store(y + i, x);
      squares = fma(x, x, squares);
    }
    const F inverse = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.dim) + a.eps));
    for (int64_t i = 0; i < a.dim; i += 16) {
      const F normed = mul(mul(load(y + i), inverse), load(a.weight + i));
      const F open = silu(load_at(a.gate, row, first + i, 16));
      store_at(a.out, row, first + i, mul(normed, open), 16);
    }
  }
}

}  // namespace outdraft::OUTDRAFT_ISA
