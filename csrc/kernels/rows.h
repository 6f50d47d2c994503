// Loading and storing rows of any type as fp32 lanes, and the functions that several kernels need.
#pragma once

#include "core/types.h"

namespace outdraft::OUTDRAFT_ISA {

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t element_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1;
}

static inline std::byte* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<std::byte*>(m.data) + (row * m.stride + column) * element_bytes(m.dtype);
}

// Up to 16 elements as fp32, zeros beyond n.
static inline F load_row(const std::byte* p, DType dtype, int64_t n) {
  if (dtype == DType::f32) {
    const auto* x = reinterpret_cast<const float*>(p);
    return n >= 16 ? load(x) : load_n(x, static_cast<int>(n));
  }
  const auto* x = reinterpret_cast<const uint16_t*>(p);
  if (n >= 16) return load_bf16(x);
  uint16_t padded[16] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = x[i];
  return load_bf16(padded);
}

static inline F load_at(const Matrix& m, int64_t row, int64_t column, int64_t n) {
  return load_row(at(m, row, column), m.dtype, n);
}

static inline void store_row(std::byte* p, DType dtype, F x, int64_t n) {
  if (dtype == DType::f32) {
    auto* out = reinterpret_cast<float*>(p);
    if (n >= 16) return store(out, x);
    return store_n(out, x, static_cast<int>(n));
  }
  auto* out = reinterpret_cast<uint16_t*>(p);
  if (n >= 16) return store_bf16(out, x);
  uint16_t all[16];
  store_bf16(all, x);
  for (int64_t i = 0; i < n; ++i) out[i] = all[i];
}

static inline void store_at(const Matrix& m, int64_t row, int64_t column, F x, int64_t n) {
  store_row(at(m, row, column), m.dtype, x, n);
}

// e^x within 2 units in the last place for x in [-87, 88]; 0 is never reached, see callers.
// Cody-Waite reduction and a polynomial of degree 6 (Taylor's: the remainder is below 2^-24 on
// |r| <= ln(2) / 2).
static inline F exponential(F x) {
  x = minimum(maximum(x, set1(-87.0f)), set1(88.0f));
  const I n = nearest(mul(x, set1(1.44269504f)));
  F r = fma(to_float(n), set1(-0.693145752f), x);
  r = fma(to_float(n), set1(-1.42860677e-6f), r);
  F y = set1(1.0f / 720.0f);
  y = fma(y, r, set1(1.0f / 120.0f));
  y = fma(y, r, set1(1.0f / 24.0f));
  y = fma(y, r, set1(1.0f / 6.0f));
  y = fma(y, r, set1(0.5f));
  y = fma(y, r, set1(1.0f));
  y = fma(y, r, set1(1.0f));
  return mul(y, power_of_two(n));
}

static inline F sigmoid(F x) {
  return div(set1(1.0f), add(set1(1.0f), exponential(sub(zero(), x))));
}

// gelu_tanh(x) = x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
static inline F gelu_tanh(F x) {
  const F cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
  return mul(x, sigmoid(mul(cubic, set1(1.59576912f))));
}

static inline F silu(F x) { return mul(x, sigmoid(x)); }

// tanh(x) = 1 - 2 / (e^2x + 1); absolute error below 2e-7.
static inline F hyperbolic_tangent(F x) {
  const F e = exponential(add(x, x));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

}  // namespace outdraft::OUTDRAFT_ISA
