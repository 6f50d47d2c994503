// Sixteen fp32 or int32 lanes in plain C++, for every other CPU; compilers turn most of it into
// whatever vectors there are.
//
// Same functions as simd/avx512.h, which documents them.
#pragma once

#include <cstdint>

namespace outdraft::OUTDRAFT_ISA {

constexpr int kRowBlock = 4;
constexpr int kActivationOffset = 0;

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct B {
  uint8_t v[64];
};

template <class Op>
static inline F lanes(Op op) {
  F out;
  for (int i = 0; i < 16; ++i) out.v[i] = op(i);
  return out;
}
template <class Op>
static inline I lanes_i(Op op) {
  I out;
  for (int i = 0; i < 16; ++i) out.v[i] = op(i);
  return out;
}
static inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

static inline F set1(float x) {
  return lanes([&](int) { return x; });
}
static inline F zero() { return set1(0.0f); }
static inline F load(const float* p) {
  return lanes([&](int i) { return p[i]; });
}
static inline void store_n(float* p, F x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
static inline void store(float* p, F x) { store_n(p, x, 16); }
static inline F load_n(const float* p, int n) {
  return lanes([&](int i) { return i < n ? p[i] : 0.0f; });
}

static inline F add(F a, F b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
static inline F sub(F a, F b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
static inline F mul(F a, F b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
static inline F div(F a, F b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
// Rounded twice: a fused multiply-add in software would cost more than it is worth.
static inline F fma(F a, F b, F c) {
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
static inline F maximum(F a, F b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F minimum(F a, F b) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F absolute(F a) {
  return lanes([&](int i) { return from_bits(to_bits(a.v[i]) & 0x7fffffff); });
}
static inline float sum(F a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
static inline void sum4(const F (&a)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
}
static inline float highest(F a) {
  float best = a.v[0];
  for (float x : a.v) best = x > best ? x : best;
  return best;
}

static inline I set1_i(int32_t x) {
  return lanes_i([&](int) { return x; });
}
static inline I load_i(const int32_t* p) {
  return lanes_i([&](int i) { return p[i]; });
}
static inline void store_i(int32_t* p, I x) {
  for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
static inline I load_u8(const uint8_t* p) {
  return lanes_i([&](int i) { return p[i]; });
}
static inline I add_i(I a, I b) {
  return lanes_i([&](int i) { return a.v[i] + b.v[i]; });
}
static inline I sub_i(I a, I b) {
  return lanes_i([&](int i) { return a.v[i] - b.v[i]; });
}
static inline I mul_i(I a, I b) {
  return lanes_i([&](int i) { return a.v[i] * b.v[i]; });
}
static inline I nearest(F a) {
  return lanes_i([&](int i) { return static_cast<int32_t>(__builtin_rintf(a.v[i])); });
}
static inline F to_float(I a) {
  return lanes([&](int i) { return static_cast<float>(a.v[i]); });
}
static inline int32_t sum_i(I a) {
  int32_t total = 0;
  for (int32_t x : a.v) total += x;
  return total;
}
static inline void store_i8(int8_t* p, I a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
static inline F power_of_two(I n) {
  return lanes([&](int i) { return from_bits(static_cast<uint32_t>(n.v[i] + 127) << 23); });
}
static inline F keep_lanes(F x, int first, int last, F other) {
  return lanes([&](int i) { return first <= i && i <= last ? x.v[i] : other.v[i]; });
}
static inline void keep_greater(F x, I id, F& best, I& best_id) {
  for (int i = 0; i < 16; ++i)
    if (x.v[i] > best.v[i]) {
      best.v[i] = x.v[i];
      best_id.v[i] = id.v[i];
    }
}

static inline F load_bf16(const uint16_t* p) {
  return lanes([&](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
}
static inline void store_bf16(uint16_t* p, F x) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = to_bits(x.v[i]);
    p[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  // Exponent and mantissa shifted into place, then 2^112 corrects the bias, subnormals included.
  const float size = from_bits(rest << 13) * 0x1p112f;
  return from_bits(sign | to_bits(rest >= 0x7c00 ? from_bits(0x7f800000) : size));
}
static inline F load_f16(const uint16_t* p) {
  return lanes([&](int i) { return half_to_float(p[i]); });
}
static inline F load_i8(const int8_t* p) {
  return lanes([&](int i) { return static_cast<float>(p[i]); });
}

static inline B load_bytes(const void* p) {
  B out;
  __builtin_memcpy(out.v, p, 64);
  return out;
}
static inline F first_of_pairs(B x) {
  uint16_t half[32];
  __builtin_memcpy(half, x.v, 64);
  return lanes([&](int i) { return from_bits(static_cast<uint32_t>(half[2 * i]) << 16); });
}
static inline F second_of_pairs(B x) {
  uint16_t half[32];
  __builtin_memcpy(half, x.v, 64);
  return lanes([&](int i) { return from_bits(static_cast<uint32_t>(half[2 * i + 1]) << 16); });
}
static inline B low_nibbles(B x) {
  for (uint8_t& byte : x.v) byte &= 15;
  return x;
}
static inline B high_nibbles(B x) {
  for (uint8_t& byte : x.v) byte >>= 4;
  return x;
}

template <class Weight>
static inline I dot_scalar(I acc, B weights, int32_t activations) {
  int8_t x[4];
  __builtin_memcpy(x, &activations, 4);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<Weight>(weights.v[4 * i + j]) * x[j];
  return acc;
}
static inline I dot_w4(I acc, B weights, int32_t activations) {
  return dot_scalar<uint8_t>(acc, weights, activations);
}
static inline I dot_w8(I acc, B weights, int32_t activations) {
  return dot_scalar<int8_t>(acc, weights, activations);
}

}  // namespace outdraft::OUTDRAFT_ISA
