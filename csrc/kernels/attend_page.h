// Attention of a few query heads over one page of keys and values, in fp32 lanes.
#pragma once

#include "core/args.h"
#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

constexpr int kHeadBlock = 4;  // query heads of one row whose scores are computed together
constexpr float kHidden = -3.0e38f;
constexpr int64_t kPartPages = 4;  // of a part of the context
constexpr int64_t kPartSlots = kPartPages * kPageSlots;

// Query heads first..first + n - 1 of one row, all reading the same keys, with their state so far.
struct HeadState {
  int64_t row;
  int64_t first;
  int64_t n;
  float highest[kHeadBlock];  // running maximum of the scores
  float total[kHeadBlock];    // sum of exp(score - highest)
  float* q;                   // [n, dim], scaled
  float* mixed;               // [n, dim]: sum of exp(score - highest) * value
};

// One page of one key/value head.
struct PageView {
  const std::byte* k;
  const std::byte* v;
  const float* k_scales;
  const float* v_scales;
};

static inline F load_key(const std::byte* p, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return load(reinterpret_cast<const float*>(p));
    case DType::bf16:
      return load_bf16(reinterpret_cast<const uint16_t*>(p));
    case DType::i8:
      return load_i8(reinterpret_cast<const int8_t*>(p));
  }
  return zero();
}

// scores[r][slot] = q_r . k_slot for slots first..last; the last four are computed with repeats.
template <int R, DType kType>
static inline void page_scores(const HeadState& s, const PageView& page, int64_t dim, int first,
                               int last, float (&scores)[R][kPageSlots]) {
  const int64_t size = element_bytes(kType);
  for (int slot = first; slot <= last; slot += 4) {
    const std::byte* keys[4];
    for (int i = 0; i < 4; ++i) keys[i] = page.k + least(slot + i, last) * dim * size;
    F acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) acc[r][i] = zero();
    for (int64_t d = 0; d < dim; d += 16) {
      F key[4];
      for (int i = 0; i < 4; ++i) key[i] = load_key(keys[i] + d * size, kType);
      for (int r = 0; r < R; ++r) {
        const F q = load(s.q + r * dim + d);
        for (int i = 0; i < 4; ++i) acc[r][i] = fma(q, key[i], acc[r][i]);
      }
    }
    float four[4];
    for (int r = 0; r < R; ++r) {
      sum4(acc[r], four);
      for (int i = 0; i < 4 && slot + i <= last; ++i) scores[r][slot + i] = four[i];
    }
  }
}

// Turns a head's scores into exp(score - highest) and brings its state up to date; returns the
// factor that earlier sums are to be multiplied with.
static inline float page_weights(HeadState& s, int r, const PageView& page, int first, int last,
                                 float* scores) {
  F lanes[kPageSlots / 16];
  F widest = set1(s.highest[r]);
  for (int v = 0; v < kPageSlots / 16; ++v) {
    F x = load(scores + 16 * v);
    if (page.k_scales) x = mul(x, load(page.k_scales + 16 * v));
    const int low = first > 16 * v ? first - 16 * v : 0;
    const int high = last < 16 * v + 15 ? last - 16 * v : 15;
    lanes[v] = low <= high ? keep_lanes(x, low, high, set1(kHidden)) : set1(kHidden);
    widest = maximum(widest, lanes[v]);
  }
  const float highest_now = highest(widest);
  F total = zero();
  for (int v = 0; v < kPageSlots / 16; ++v) {
    const int low = first > 16 * v ? first - 16 * v : 0;
    const int high = last < 16 * v + 15 ? last - 16 * v : 15;
    F weight = exponential(sub(lanes[v], set1(highest_now)));
    weight = low <= high ? keep_lanes(weight, low, high, zero()) : zero();
    total = add(total, weight);
    if (page.v_scales) weight = mul(weight, load(page.v_scales + 16 * v));
    store(scores + 16 * v, weight);
  }
  float all[16];
  store(all, exponential(set1(s.highest[r] - highest_now)));
  s.highest[r] = highest_now;
  s.total[r] = s.total[r] * all[0] + sum(total);
  return all[0];
}

// mixed_r = mixed_r * factor_r + sum over slots of weight_r[slot] * v_slot, for 16 V dimensions.
template <int R, int V, DType kType>
static inline void mix_columns(const HeadState& s, const PageView& page, int64_t dim, int64_t d,
                               int first, int last, const float (&weights)[R][kPageSlots],
                               const float* factors) {
  const int64_t size = element_bytes(kType);
  F acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      acc[r][v] = mul(load(s.mixed + r * dim + d + 16 * v), set1(factors[r]));
  for (int slot = first; slot <= last; ++slot) {
    const std::byte* value = page.v + (slot * dim + d) * size;
    F lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = load_key(value + 16 * v * size, kType);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = fma(set1(weights[r][slot]), lanes[v], acc[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(s.mixed + r * dim + d + 16 * v, acc[r][v]);
}

template <int R, DType kType>
static void attend_page(HeadState& s, const PageView& page, int64_t dim, int first, int last) {
  float scores[R][kPageSlots] = {};
  float factors[R];
  page_scores<R, kType>(s, page, dim, first, last, scores);
  for (int r = 0; r < R; ++r) factors[r] = page_weights(s, r, page, first, last, scores[r]);
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64)
    mix_columns<R, 4, kType>(s, page, dim, d, first, last, scores, factors);
  for (; d < dim; d += 16) mix_columns<R, 1, kType>(s, page, dim, d, first, last, scores, factors);
}

template <DType kType>
static void attend_page_heads(HeadState& s, const PageView& page, int64_t dim, int first,
                              int last) {
  switch (s.n) {
    case 1:
      return attend_page<1, kType>(s, page, dim, first, last);
    case 2:
      return attend_page<2, kType>(s, page, dim, first, last);
    case 3:
      return attend_page<3, kType>(s, page, dim, first, last);
    case 4:
      return attend_page<4, kType>(s, page, dim, first, last);
  }
}

static void attend_any(DType dtype, HeadState& s, const PageView& page, int64_t dim, int first,
                       int last) {
  switch (dtype) {
    case DType::f32:
      return attend_page_heads<DType::f32>(s, page, dim, first, last);
    case DType::bf16:
      return attend_page_heads<DType::bf16>(s, page, dim, first, last);
    case DType::i8:
      return attend_page_heads<DType::i8>(s, page, dim, first, last);
  }
}

static PageView page_view(const KvPages& kv, int64_t page, int64_t head) {
  const int64_t slots = (page * kv.n_kv_heads + head) * kPageSlots;
  const int64_t bytes = slots * kv.head_dim * element_bytes(kv.dtype);
  const bool scaled = kv.dtype == DType::i8;
  return {static_cast<const std::byte*>(kv.k) + bytes, static_cast<const std::byte*>(kv.v) + bytes,
          scaled ? kv.k_scales + slots : nullptr, scaled ? kv.v_scales + slots : nullptr};
}

}  // namespace outdraft::OUTDRAFT_ISA
