// Activations into the form that the linear kernels read (PreparedLayout in core/types.h).
//
// Each row, and in w4 each group of a row, gets its own scale, so that no row sees its neighbours.
#pragma once

#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

// The largest magnitude of x[begin, end). Four maxima at once: one would wait for itself.
template <DType kType>
static inline float widest_of(const std::byte* x, int64_t begin, int64_t end) {
  const int64_t size = element_bytes(kType);
  F widest[4] = {zero(), zero(), zero(), zero()};
  int64_t i = begin;
  for (; i + 64 <= end; i += 64)
    for (int j = 0; j < 4; ++j)
      widest[j] = maximum(widest[j], absolute(load_row(x + (i + 16 * j) * size, kType, 16)));
  for (; i < end; i += 16)
    widest[0] = maximum(widest[0], absolute(load_row(x + i * size, kType, end - i)));
  return highest(maximum(maximum(widest[0], widest[1]), maximum(widest[2], widest[3])));
}

// An offset of 128 flips the top bit of each of 16 bytes.
static inline void flip_top_bits(int8_t* bytes) {
  uint64_t halves[2];
  __builtin_memcpy(halves, bytes, 16);
  for (uint64_t& half : halves) half ^= 0x8080808080808080u;
  __builtin_memcpy(bytes, halves, 16);
}

// Quantises x[begin, end) to whole numbers in -127..127, written at out[begin, padded_end) as bytes
// with kOffset added. Returns the scale; `sum` gets the sum of the whole numbers.
template <DType kType, int kOffset>
static inline float quantise(const std::byte* x, int64_t begin, int64_t end, int64_t padded_end,
                             int8_t* out, int32_t& sum) {
  static_assert(kOffset == 0 || kOffset == 128);
  const int64_t size = element_bytes(kType);
  const float limit = widest_of<kType>(x, begin, end);
  const F inverse = set1(limit > 0.0f ? 127.0f / limit : 0.0f);
  I total = set1_i(0);
  const auto put = [&](F lanes, int64_t i) {
    const I q = nearest(mul(lanes, inverse));
    total = add_i(total, q);
    store_i8(out + i, q);
    if constexpr (kOffset) flip_top_bits(out + i);
  };
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) put(load_row(x + i * size, kType, 16), i);
  for (; i < padded_end; i += 16)
    put(i < end ? load_row(x + i * size, kType, end - i) : zero(), i);
  sum = sum_i(total);
  return limit / 127.0f;
}

static inline void prepare_floats(const PrepareArgs& a, int64_t row, float* out) {
  const int64_t padded = round_up(a.k, 64);
  for (int64_t i = 0; i < padded; i += 16)
    store(out + i, i < a.k ? load_at(a.x, row, i, a.k - i) : zero());
}

template <DType kType>
static inline void prepare_groups(const PrepareArgs& a, int64_t row, uint8_t* out) {
  const PreparedLayout layout = prepared_layout(a.format, a.k, a.group);
  auto* scales = reinterpret_cast<float*>(out + layout.scales);
  auto* sums = reinterpret_cast<int32_t*>(out + layout.sums);
  for (int64_t g = 0, begin = 0; begin < a.k; ++g, begin += a.group) {
    int32_t sum;
    scales[g] = quantise<kType, 0>(at(a.x, row, 0), begin, least(begin + a.group, a.k),
                                   begin + a.group, reinterpret_cast<int8_t*>(out), sum);
    sums[g] = -sum;
  }
}

static inline void prepare_groups(const PrepareArgs& a, int64_t row, uint8_t* out) {
  a.x.dtype == DType::f32 ? prepare_groups<DType::f32>(a, row, out)
                          : prepare_groups<DType::bf16>(a, row, out);
}

template <DType kType>
static inline void prepare_row(const PrepareArgs& a, int64_t row, uint8_t* out) {
  int32_t sum;
  const float scale = quantise<kType, kActivationOffset>(
      at(a.x, row, 0), 0, a.k, round_up(a.k, 64), reinterpret_cast<int8_t*>(out), sum);
  *reinterpret_cast<float*>(out + prepared_layout(a.format, a.k, a.group).scales) = scale;
}

static void prepare(const PrepareArgs& a, const Worker& worker) {
  const int64_t stride = prepared_layout(a.format, a.k, a.group).stride;
  const Range rows = share(a.rows, worker);
  const bool f32 = a.x.dtype == DType::f32;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* out = a.out + row * stride;
    if (a.format == Format::bf16) {
      prepare_floats(a, row, reinterpret_cast<float*>(out));
    } else if (a.format == Format::w4) {
      prepare_groups(a, row, out);
    } else {
      f32 ? prepare_row<DType::f32>(a, row, out) : prepare_row<DType::bf16>(a, row, out);
    }
  }
}

}  // namespace outdraft::OUTDRAFT_ISA
