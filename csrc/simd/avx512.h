// Sixteen fp32 or int32 lanes on AVX-512 (F, BW, DQ, VL, VNNI).
//
// Included by one translation unit per instruction set, in a namespace of its own: the linker can
// then never pick code compiled with these flags for another instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace outdraft::OUTDRAFT_ISA {

constexpr int kRowBlock = 8;  // rows whose accumulators fit the register file
constexpr int kActivationOffset =
    128;  // vpdpbusd wants unsigned activations when weights are signed

struct F {
  __m512 v;
};  // 16 floats
struct I {
  __m512i v;
};  // 16 int32
struct B {
  __m512i v;
};  // 64 bytes: 16 rows of 4 consecutive inputs

static inline F zero() { return {_mm512_setzero_ps()}; }
static inline F set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
static inline F load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
static inline void store_n(float* p, F x, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
}

static inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F maximum(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F minimum(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F absolute(F a) { return {_mm512_abs_ps(a.v)}; }
static inline float sum(F a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline float highest(F a) { return _mm512_reduce_max_ps(a.v); }

// Four sums at once, each with the adds of sum(): all four lanes are treated alike.
static inline void sum4(const F (&a)[4], float* out) {
  __m256 h[4];
  for (int i = 0; i < 4; ++i)
    h[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i].v), _mm512_extractf32x8_ps(a[i].v, 1));
  __m128 q[4];
  for (int i = 0; i < 4; ++i)
    q[i] = _mm_add_ps(_mm256_castps256_ps128(h[i]), _mm256_extractf128_ps(h[i], 1));
  __m128 lo = _mm_add_ps(_mm_movelh_ps(q[0], q[1]), _mm_movehl_ps(q[1], q[0]));
  __m128 hi = _mm_add_ps(_mm_movelh_ps(q[2], q[3]), _mm_movehl_ps(q[3], q[2]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(lo, hi, 0x88), _mm_shuffle_ps(lo, hi, 0xdd)));
}

static inline I set1_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline I load_i(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void store_i(int32_t* p, I x) { _mm512_storeu_si512(p, x.v); }
static inline I load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline I add_i(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I sub_i(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I mul_i(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
static inline I nearest(F a) { return {_mm512_cvtps_epi32(a.v)}; }
static inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline int32_t sum_i(I a) { return _mm512_reduce_add_epi32(a.v); }
static inline void store_i8(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}
static inline F power_of_two(I n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}

// Lanes first..last of x, `other` elsewhere.
static inline F keep_lanes(F x, int first, int last, F other) {
  const auto mask = static_cast<__mmask16>((2u << last) - (1u << first));
  return {_mm512_mask_mov_ps(other.v, mask, x.v)};
}

// Where x > best: best = x, best_id = id.
static inline void keep_greater(F x, I id, F& best, I& best_id) {
  const __mmask16 mask = _mm512_cmp_ps_mask(x.v, best.v, _CMP_GT_OQ);
  best.v = _mm512_mask_mov_ps(best.v, mask, x.v);
  best_id.v = _mm512_mask_mov_epi32(best_id.v, mask, id.v);
}

static inline F load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline void store_bf16(uint16_t* p, F x) {  // to nearest, ties to even; no NaN comes here
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
static inline F load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline F load_i8(const int8_t* p) {
  return to_float({_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))});
}

// 16 pairs of bf16: the first (low) or second (high) of each.
static inline B load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
static inline F first_of_pairs(B x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16))}; }
static inline F second_of_pairs(B x) {
  return {
      _mm512_castsi512_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

static inline B low_nibbles(B x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
static inline B high_nibbles(B x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}

// acc + weights (4-bit, unsigned) * 4 activations (signed bytes).
static inline I dot_w4(I acc, B weights, int32_t activations) {
  return {_mm512_dpbusd_epi32(acc.v, weights.v, _mm512_set1_epi32(activations))};
}
// acc + weights (signed bytes) * 4 activations (bytes with kActivationOffset added).
static inline I dot_w8(I acc, B weights, int32_t activations) {
  return {_mm512_dpbusd_epi32(acc.v, _mm512_set1_epi32(activations), weights.v)};
}

}  // namespace outdraft::OUTDRAFT_ISA
