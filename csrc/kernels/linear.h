// Linear layers over packed weights: one panel of 16 outputs times a block of rows at a time.
//
// Weights are read once for all rows of a block. A row's result cannot depend on the others: inside
// a group the sum is an exact integer, and the fp32 adds over groups (or, for bf16, over inputs)
// are in the order of the inputs, one accumulator per row.
#pragma once

#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

// Rows whose activations stay in the second-level cache while all panels go by.
constexpr int64_t kRowChunk = 128;

// Asks for weights ahead of their use; hardware prefetchers alone leave a third of the bandwidth.
// With few rows the loads themselves are the limit and the first-level cache is the place to fetch
// to; with more, arithmetic takes as long as memory, and only a long lead hides one behind the
// other. Not multiples of 4096: those would fall on the cache sets in use. kFirst below: the panel
// has not been read by an earlier block of rows.
enum class Ahead { near, far, none };

static constexpr Ahead lead(bool first, int rows, int many_rows) {
  if (!first) return Ahead::none;
  return rows >= many_rows ? Ahead::far : Ahead::near;
}

template <Ahead kAhead>
static inline void prefetch(const uint8_t* p) {
  if constexpr (kAhead == Ahead::near) __builtin_prefetch(p + 2112, 0, 3);
  if constexpr (kAhead == Ahead::far) __builtin_prefetch(p + 4160, 0, 2);
}

static inline int32_t four_bytes(const uint8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return x;
}

struct Bf16 {
  // Weights [k / 2][16 outputs][2 inputs]; two accumulators a row, even and odd inputs.
  template <int R, bool kFirst>
  static inline void dot(const Weight& w, int64_t panel, const uint8_t* const* x, F* y) {
    const uint8_t* weights = w.data + panel * panel_bytes(w);
    F even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = zero();
    for (int64_t k = 0; k < w.k; k += 2, weights += 64) {
      prefetch<lead(kFirst, R, 2)>(weights);
      const B pairs = load_bytes(weights);
      const F first = first_of_pairs(pairs), second = second_of_pairs(pairs);
      for (int r = 0; r < R; ++r) {
        const auto* row = reinterpret_cast<const float*>(x[r]);
        even[r] = fma(first, set1(row[k]), even[r]);
        odd[r] = fma(second, set1(row[k + 1]), odd[r]);
      }
    }
    for (int r = 0; r < R; ++r) y[r] = add(even[r], odd[r]);
  }
};

struct W8 {
  // Weights [k / 4][16 outputs][4 inputs] int8.
  template <int R, bool kFirst>
  static inline void dot(const Weight& w, int64_t panel, const uint8_t* const* x, F* y) {
    const uint8_t* weights = w.data + panel * panel_bytes(w);
    const int64_t scale_at = prepared_layout(Format::w8, w.k, 0).scales;
    // With few rows, more sums in flight hide the latency; whole numbers add up in any order.
    constexpr int kChains = R <= 2 ? 4 : R == 3 ? 2 : 1;
    I acc[kChains * R];
    for (I& sum : acc) sum = set1_i(0);
    int64_t k = 0;
    for (; k + 4 * kChains <= w.k; k += 4 * kChains) {
      for (int c = 0; c < kChains; ++c, weights += 64) {
        prefetch<lead(kFirst, R, 3)>(weights);
        const B bytes = load_bytes(weights);
        for (int r = 0; r < R; ++r)
          acc[c * R + r] = dot_w8(acc[c * R + r], bytes, four_bytes(x[r] + k + 4 * c));
      }
    }
    for (; k < w.k; k += 4, weights += 64)
      for (int r = 0; r < R; ++r)
        acc[r] = dot_w8(acc[r], load_bytes(weights), four_bytes(x[r] + k));
    for (int c = 1; c < kChains; ++c)
      for (int r = 0; r < R; ++r) acc[r] = add_i(acc[r], acc[c * R + r]);
    const F scales = load(static_cast<const float*>(w.scales) + panel * kPanel);
    const I sums = load_i(static_cast<const int32_t*>(w.zeros) + panel * kPanel);
    const I offset = mul_i(sums, set1_i(kActivationOffset));
    for (int r = 0; r < R; ++r) {
      const float scale = *reinterpret_cast<const float*>(x[r] + scale_at);
      y[r] = mul(to_float(sub_i(acc[r], offset)), mul(scales, set1(scale)));
    }
  }
};

// kZeros: zero-points are stored; else every zero-point is 8.
template <bool kZeros>
struct W4 {
  // Weights [k / 8][16 outputs][4 bytes]: low nibbles are inputs 8j..8j+3, high ones 8j+4..8j+7.
  template <int R, bool kFirst>
  static inline void dot(const Weight& w, int64_t panel, const uint8_t* const* x, F* y) {
    const PreparedLayout layout = prepared_layout(Format::w4, w.k, w.group);
    const int64_t groups = (w.k + w.group - 1) / w.group;
    const uint8_t* weights = w.data + panel * panel_bytes(w);
    const auto* scales = static_cast<const uint16_t*>(w.scales) + panel * groups * kPanel;
    const auto* zeros =
        static_cast<const uint8_t*>(w.zeros) + (kZeros ? panel * groups * kPanel : 0);
    F total[R];
    for (int r = 0; r < R; ++r) total[r] = zero();
    for (int64_t g = 0; g < groups; ++g) {
      const I zero_points = kZeros ? load_u8(zeros + g * kPanel) : set1_i(8);
      I acc[R];
      for (int r = 0; r < R; ++r)
        acc[r] = mul_i(zero_points, set1_i(four_bytes(x[r] + layout.sums + 4 * g)));
      for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 32) {
        for (int64_t j = k; j < k + 32; j += 8, weights += 64) {
          prefetch<lead(kFirst, R, 2)>(weights);
          const B bytes = load_bytes(weights);
          const B low = low_nibbles(bytes), high = high_nibbles(bytes);
          for (int r = 0; r < R; ++r) acc[r] = dot_w4(acc[r], low, four_bytes(x[r] + j));
          for (int r = 0; r < R; ++r) acc[r] = dot_w4(acc[r], high, four_bytes(x[r] + j + 4));
        }
      }
      const F scale = load_f16(scales + g * kPanel);
      for (int r = 0; r < R; ++r) {
        const float row_scale = reinterpret_cast<const float*>(x[r] + layout.scales)[g];
        total[r] = fma(to_float(acc[r]), mul(scale, set1(row_scale)), total[r]);
      }
    }
    for (int r = 0; r < R; ++r) y[r] = total[r];
  }
};

// Prepared rows, and where their results go: row r's to y row `out[r]`.
struct RowBlock {
  const uint8_t* x[kRowBlock];
  int64_t out[kRowBlock];
};

template <class Kernel, int R, bool kFirst = true>
static void panel_times_rows(const Weight& w, int64_t panel, const RowBlock& rows,
                             const Matrix& y) {
  F out[R];
  Kernel::template dot<R, kFirst>(w, panel, rows.x, out);
  const int64_t column = panel % panels_per_block(w) * kPanel;
  for (int r = 0; r < R; ++r) store_at(y, rows.out[r], column, out[r], w.n - column);
}

template <class Kernel>
static inline void panel_times_block(const Weight& w, int64_t panel, int64_t n,
                                     const RowBlock& rows, const Matrix& y) {
  switch (n) {
    case 1:
      return panel_times_rows<Kernel, 1>(w, panel, rows, y);
    case 2:
      return panel_times_rows<Kernel, 2>(w, panel, rows, y);
    case 3:
      return panel_times_rows<Kernel, 3>(w, panel, rows, y);
    case 4:
      return panel_times_rows<Kernel, 4>(w, panel, rows, y);
  }
  if constexpr (kRowBlock == 8) {
    switch (n) {
      case 5:
        return panel_times_rows<Kernel, 5>(w, panel, rows, y);
      case 6:
        return panel_times_rows<Kernel, 6>(w, panel, rows, y);
      case 7:
        return panel_times_rows<Kernel, 7>(w, panel, rows, y);
      case 8:
        return panel_times_rows<Kernel, 8>(w, panel, rows, y);
    }
  }
}

template <class Kernel>
static void linear_format(const LinearArgs& a, const Worker& worker) {
  const Weight& w = a.weight;
  const int64_t stride = prepared_layout(w.format, w.k, w.group).stride;
  const Range panels = share(panel_count(w), worker);
  for (int64_t chunk = 0; chunk < a.rows; chunk += kRowChunk) {
    const int64_t end = least(chunk + kRowChunk, a.rows);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t first = chunk; first < end; first += kRowBlock) {
        const int64_t n = least(kRowBlock, end - first);
        RowBlock rows;
        for (int64_t r = 0; r < n; ++r) {
          rows.x[r] = a.x + (first + r) * stride;
          rows.out[r] = first + r;
        }
        if (n == kRowBlock && first > chunk)  // the panel is in the cache already
          panel_times_rows<Kernel, kRowBlock, false>(w, panel, rows, a.y);
        else
          panel_times_block<Kernel>(w, panel, n, rows, a.y);
      }
    }
  }
}

static void linear(const LinearArgs& a, const Worker& worker) {
  switch (a.weight.format) {
    case Format::bf16:
      return linear_format<Bf16>(a, worker);
    case Format::w8:
      return linear_format<W8>(a, worker);
    case Format::w4:
      return a.weight.zeros ? linear_format<W4<true>>(a, worker)
                            : linear_format<W4<false>>(a, worker);
  }
}

template <class Kernel>
static void expert_format(const ExpertLinearArgs& a, const Worker& worker) {
  const Weight& w = a.weight;
  const int64_t stride = prepared_layout(w.format, w.k, w.group).stride;
  const int64_t per_block = panels_per_block(w);
  const Range items = share(*a.groups.n_hit * per_block, worker);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t hit = item / per_block;
    const int64_t panel = a.groups.expert[hit] * per_block + item % per_block;
    for (int64_t p = a.groups.start[hit]; p < a.groups.start[hit + 1]; p += kRowBlock) {
      const int64_t n = least(kRowBlock, a.groups.start[hit + 1] - p);
      RowBlock rows;
      for (int64_t r = 0; r < n; ++r) {
        rows.out[r] = a.groups.pair[p + r];
        rows.x[r] = a.x + rows.out[r] / a.pairs_per_input * stride;
      }
      panel_times_block<Kernel>(w, panel, n, rows, a.y);
    }
  }
}

static void expert_linear(const ExpertLinearArgs& a, const Worker& worker) {
  switch (a.weight.format) {
    case Format::bf16:
      return expert_format<Bf16>(a, worker);
    case Format::w8:
      return expert_format<W8>(a, worker);
    case Format::w4:
      return a.weight.zeros ? expert_format<W4<true>>(a, worker)
                            : expert_format<W4<false>>(a, worker);
  }
}

}  // namespace outdraft::OUTDRAFT_ISA
