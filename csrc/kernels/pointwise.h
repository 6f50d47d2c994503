// Kernels that treat elements or rows one by one: gates, embeddings, copies, soft-cap.
#pragma once

#include "core/args.h"
#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

// Calls body(row, first column, columns left) for this worker's vectors of a [rows, k] matrix.
template <class Body>
static inline void each_vector(int64_t rows, int64_t k, const Worker& worker, Body body) {
  const int64_t per_row = (k + 15) / 16;
  const Range items = share(rows * per_row, worker);
  int64_t row = items.begin / per_row, column = items.begin % per_row * 16;
  for (int64_t item = items.begin; item < items.end; ++item) {
    body(row, column, k - column);
    column += 16;
    if (column >= k) {
      column = 0;
      ++row;
    }
  }
}

static void gated(const GatedArgs& a, const Worker& worker) {
  each_vector(a.rows, a.k, worker, [&](int64_t row, int64_t i, int64_t n) {
    const F gate = load_at(a.gate, row, i, n);
    const F open = a.activation == Activation::silu      ? silu(gate)
                   : a.activation == Activation::sigmoid ? sigmoid(gate)
                   : a.activation == Activation::relu    ? maximum(gate, zero())
                                                         : gelu_tanh(gate);
    store_at(a.out, row, i, mul(open, load_at(a.up, row, i, n)), n);
  });
}

static void copy_rows(const CopyRowsArgs& a, const Worker& worker) {
  each_vector(a.rows, a.k, worker, [&](int64_t row, int64_t i, int64_t n) {
    store_at(a.out, row, i, load_at(a.x, a.row ? a.row[row] : row, i, n), n);
  });
}

static void softcap(const SoftcapArgs& a, const Worker& worker) {
  const F cap = set1(a.cap), inverse = set1(1.0f / a.cap);
  each_vector(a.rows, a.n, worker, [&](int64_t row, int64_t i, int64_t n) {
    const F x = mul(load_at(a.x, row, i, n), inverse);
    store_at(a.x, row, i, mul(hyperbolic_tangent(x), cap), n);
  });
}

static void combine(const CombineArgs& a, const Worker& worker) {
  each_vector(a.rows, a.k, worker, [&](int64_t row, int64_t i, int64_t n) {
    F total = zero();
    for (int64_t e = row * a.count; e < (row + 1) * a.count; ++e)
      total = fma(set1(a.weights[e]), load_at(a.x, e, i, n), total);
    store_at(a.out, row, i, total, n);
  });
}

static void read_all(const ReadArgs& a, const Worker& worker) {
  const Range lines = share(a.bytes / 128, worker);
  I first = set1_i(0), second = first;
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    const auto* p = reinterpret_cast<const int32_t*>(a.data + line * 128);
    __builtin_prefetch(a.data + line * 128 + 2048, 0, 2);
    __builtin_prefetch(a.data + line * 128 + 2112, 0, 2);
    first = add_i(first, load_i(p));
    second = add_i(second, load_i(p + 16));
  }
  a.sums[worker.index] = sum_i(add_i(first, second));
}

// Element k of output row `row`, out of its packed place.
static inline float unpacked(const Weight& w, int64_t row, int64_t k) {
  const int64_t panel = row / kPanel, lane = row % kPanel;
  const uint8_t* data = w.data + panel * panel_bytes(w);
  if (w.format == Format::bf16) {
    uint16_t half;
    __builtin_memcpy(&half, data + (k / 2 * kPanel + lane) * 4 + k % 2 * 2, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  if (w.format == Format::w8) return static_cast<int8_t>(data[(k / 4 * kPanel + lane) * 4 + k % 4]);
  const uint8_t byte = data[(k / 8 * kPanel + lane) * 4 + k % 4];
  return static_cast<float>(k % 8 < 4 ? byte & 15 : byte >> 4);
}

// Scale and zero-point of row `row` for input k.
static inline void scale_of(const Weight& w, int64_t row, int64_t k, float& scale, float& zero) {
  scale = 1.0f;
  zero = 0.0f;
  if (w.format == Format::w8) scale = static_cast<const float*>(w.scales)[row];
  if (w.format != Format::w4) return;
  const int64_t groups = (w.k + w.group - 1) / w.group;
  const int64_t group = (row / kPanel * groups + k / w.group) * kPanel;
  float scales[16];
  store(scales, load_f16(static_cast<const uint16_t*>(w.scales) + group));
  scale = scales[row % kPanel];
  zero = w.zeros ? static_cast<const uint8_t*>(w.zeros)[group + row % kPanel] : 8.0f;
}

static void embed(const EmbedArgs& a, const Worker& worker) {
  const Weight& w = a.weight;
  each_vector(a.rows, w.k, worker, [&](int64_t row, int64_t i, int64_t n) {
    const int64_t token = a.token[row];
    float scale, zero_point, lanes[16] = {};
    scale_of(w, token, i, scale, zero_point);  // groups are multiples of 32
    for (int64_t j = 0; j < least(n, 16); ++j)
      lanes[j] = (unpacked(w, token, i + j) - zero_point) * scale;
    store_at(a.out, row, i, mul(load(lanes), set1(a.scale)), n);
  });
}

}  // namespace outdraft::OUTDRAFT_ISA
