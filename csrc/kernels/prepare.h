// Activations into the form that the linear kernels read (PreparedLayout in core/types.h).
//
// Each row, and in w4 each group of a row, gets its own scale, so that no row sees its neighbours.
#pragma once

#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

// Quantises x[begin, end) to whole numbers in -127..127, written at out[begin, padded_end) as bytes
// with `offset` added. Returns the scale; `sum` gets the sum of the whole numbers.
static inline float quantise(const std::byte* x, DType dtype, int64_t begin, int64_t end,
                             int64_t padded_end, int offset, int8_t* out, int32_t& sum) {
  const int64_t size = element_bytes(dtype);
  F widest = zero();
  for (int64_t i = begin; i < end; i += 16)
    widest = maximum(widest, absolute(load_row(x + i * size, dtype, end - i)));
  const float limit = highest(widest);
  const F inverse = set1(limit > 0.0f ? 127.0f / limit : 0.0f);
  I total = set1_i(0);
  for (int64_t i = begin; i < padded_end; i += 16) {
    const F lanes = i < end ? load_row(x + i * size, dtype, end - i) : zero();
    const I q = nearest(mul(lanes, inverse));
    total = add_i(total, q);
    store_i8(out + i, q);
    // An offset of 128 flips the top bit of each byte.
    for (int64_t j = i; j < i + 16; ++j) out[j] ^= static_cast<int8_t>(offset);
  }
  sum = sum_i(total);
  return limit / 127.0f;
}

static inline void prepare_floats(const PrepareArgs& a, int64_t row, float* out) {
  const int64_t padded = round_up(a.k, 64);
  for (int64_t i = 0; i < padded; i += 16)
    store(out + i, i < a.k ? load_at(a.x, row, i, a.k - i) : zero());
}

static inline void prepare_groups(const PrepareArgs& a, int64_t row, uint8_t* out) {
  const PreparedLayout layout = prepared_layout(a.format, a.k, a.group);
  auto* scales = reinterpret_cast<float*>(out + layout.scales);
  auto* sums = reinterpret_cast<int32_t*>(out + layout.sums);
  for (int64_t g = 0, begin = 0; begin < a.k; ++g, begin += a.group) {
    int32_t sum;
    scales[g] = quantise(at(a.x, row, 0), a.x.dtype, begin, least(begin + a.group, a.k),
                         begin + a.group, 0, reinterpret_cast<int8_t*>(out), sum);
    sums[g] = -sum;
  }
}

static void prepare(const PrepareArgs& a, const Worker& worker) {
  const PreparedLayout layout = prepared_layout(a.format, a.k, a.group);
  const Range rows = share(a.rows, worker);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* out = a.out + row * layout.stride;
    if (a.format == Format::bf16) {
      prepare_floats(a, row, reinterpret_cast<float*>(out));
    } else if (a.format == Format::w4) {
      prepare_groups(a, row, out);
    } else {
      int32_t sum;
      const float scale = quantise(at(a.x, row, 0), a.x.dtype, 0, a.k, round_up(a.k, 64),
                                   kActivationOffset, reinterpret_cast<int8_t*>(out), sum);
      *reinterpret_cast<float*>(out + layout.scales) = scale;
    }
  }
}

}  // namespace outdraft::OUTDRAFT_ISA
