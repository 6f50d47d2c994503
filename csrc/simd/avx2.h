// Sixteen fp32 or int32 lanes as two halves on AVX2 + FMA + F16C, with AVX-VNNI where compiled in.
//
// Same functions as simd/avx512.h, which documents them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace outdraft::OUTDRAFT_ISA {

constexpr int kRowBlock = 4;
#ifdef __AVXVNNI__
constexpr int kActivationOffset = 128;
#else
constexpr int kActivationOffset = 0;
#endif

struct F {
  __m256 v[2];
};
struct I {
  __m256i v[2];
};
struct B {
  __m256i v[2];
};

static inline F zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline F set1(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
static inline F load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
static inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.v[0]);
  _mm256_storeu_ps(p + 8, x.v[1]);
}
static inline F load_n(const float* p, int n) {
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
static inline void store_n(float* p, F x, int n) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

static inline F add(F a, F b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
static inline F sub(F a, F b) {
  return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
}
static inline F mul(F a, F b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
static inline F div(F a, F b) {
  return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
}
static inline F fma(F a, F b, F c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
static inline F maximum(F a, F b) {
  return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}};
}
static inline F minimum(F a, F b) {
  return {{_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}};
}
static inline F absolute(F a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {{_mm256_andnot_ps(sign, a.v[0]), _mm256_andnot_ps(sign, a.v[1])}};
}
static inline float sum(F a) {
  const __m256 h = _mm256_add_ps(a.v[0], a.v[1]);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline void sum4(const F (&a)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
}
static inline float highest(F a) {
  const __m256 h = _mm256_max_ps(a.v[0], a.v[1]);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

static inline __m256i half_i(const void* p, int i) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
}
static inline I set1_i(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
static inline I load_i(const int32_t* p) { return {{half_i(p, 0), half_i(p, 1)}}; }
static inline void store_i(int32_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, x.v[1]);
}
static inline __m128i eight_bytes(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
static inline I load_u8(const uint8_t* p) {
  return {{_mm256_cvtepu8_epi32(eight_bytes(p)), _mm256_cvtepu8_epi32(eight_bytes(p + 8))}};
}
static inline I add_i(I a, I b) {
  return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
}
static inline I sub_i(I a, I b) {
  return {{_mm256_sub_epi32(a.v[0], b.v[0]), _mm256_sub_epi32(a.v[1], b.v[1])}};
}
static inline I mul_i(I a, I b) {
  return {{_mm256_mullo_epi32(a.v[0], b.v[0]), _mm256_mullo_epi32(a.v[1], b.v[1])}};
}
static inline I nearest(F a) { return {{_mm256_cvtps_epi32(a.v[0]), _mm256_cvtps_epi32(a.v[1])}}; }
static inline F to_float(I a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
static inline int32_t sum_i(I a) {
  int32_t lanes[16], total = 0;
  store_i(lanes, a);
  for (int32_t lane : lanes) total += lane;
  return total;
}
static inline void store_i8(int8_t* p, I a) {
  // Packing works within 128-bit lanes; the permutation puts the quarters back in order.
  __m256i words = _mm256_packs_epi32(a.v[0], a.v[1]);
  words = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
static inline F power_of_two(I n) {
  F out;
  for (int i = 0; i < 2; ++i)
    out.v[i] = _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(n.v[i], _mm256_set1_epi32(127)), 23));
  return out;
}

static inline F keep_lanes(F x, int first, int last, F other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  F out;
  for (int i = 0; i < 2; ++i) {
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first - 8 * i), lane);
    const __m256i above = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(last - 8 * i));
    const __m256 hidden = _mm256_castsi256_ps(_mm256_or_si256(below, above));
    out.v[i] = _mm256_blendv_ps(x.v[i], other.v[i], hidden);
  }
  return out;
}
static inline void keep_greater(F x, I id, F& best, I& best_id) {
  for (int i = 0; i < 2; ++i) {
    const __m256 mask = _mm256_cmp_ps(x.v[i], best.v[i], _CMP_GT_OQ);
    best.v[i] = _mm256_blendv_ps(best.v[i], x.v[i], mask);
    best_id.v[i] = _mm256_blendv_epi8(best_id.v[i], id.v[i], _mm256_castps_si256(mask));
  }
}

static inline F load_bf16(const uint16_t* p) {
  F out;
  for (int i = 0; i < 2; ++i) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
    out.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  return out;
}
static inline void store_bf16(uint16_t* p, F x) {
  __m256i high[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_castps_si256(x.v[i]);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    high[i] = _mm256_srli_epi32(up, 16);
  }
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(high[0], high[1]), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
static inline F load_f16(const uint16_t* p) {
  return {{_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
           _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1))}};
}
static inline F load_i8(const int8_t* p) {
  return to_float(
      {{_mm256_cvtepi8_epi32(eight_bytes(p)), _mm256_cvtepi8_epi32(eight_bytes(p + 8))}});
}

static inline B load_bytes(const void* p) { return {{half_i(p, 0), half_i(p, 1)}}; }
static inline F first_of_pairs(B x) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x.v[0], 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(x.v[1], 16))}};
}
static inline F second_of_pairs(B x) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {{_mm256_castsi256_ps(_mm256_and_si256(x.v[0], mask)),
           _mm256_castsi256_ps(_mm256_and_si256(x.v[1], mask))}};
}
static inline B low_nibbles(B x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(x.v[0], mask), _mm256_and_si256(x.v[1], mask)}};
}
static inline B high_nibbles(B x) {
  return low_nibbles({{_mm256_srli_epi16(x.v[0], 4), _mm256_srli_epi16(x.v[1], 4)}});
}

#ifdef __AVXVNNI__
static inline __m256i dot_bytes(__m256i acc, __m256i unsigned_bytes, __m256i signed_bytes) {
  return _mm256_dpbusd_avx_epi32(acc, unsigned_bytes, signed_bytes);
}
#else
// The 16-bit sums of vpmaddubsw saturate: callers keep |u| <= 127, so that 2 * 127 * 127 fits.
static inline __m256i dot_bytes(__m256i acc, __m256i unsigned_bytes, __m256i signed_bytes) {
  const __m256i words = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
#endif

static inline I dot_w4(I acc, B weights, int32_t activations) {
  const __m256i x = _mm256_set1_epi32(activations);
  return {{dot_bytes(acc.v[0], weights.v[0], x), dot_bytes(acc.v[1], weights.v[1], x)}};
}
static inline I dot_w8(I acc, B weights, int32_t activations) {
  const __m256i x = _mm256_set1_epi32(activations);
#ifdef __AVXVNNI__
  return {{dot_bytes(acc.v[0], x, weights.v[0]), dot_bytes(acc.v[1], x, weights.v[1])}};
#else
  const __m256i size = _mm256_abs_epi8(x);  // w * x = (w * sign x) * |x|, both within +-127
  return {{dot_bytes(acc.v[0], size, _mm256_sign_epi8(weights.v[0], x)),
           dot_bytes(acc.v[1], size, _mm256_sign_epi8(weights.v[1], x))}};
#endif
}

}  // namespace outdraft::OUTDRAFT_ISA
