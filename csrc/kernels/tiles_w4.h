// Linear layers of 4-bit weights for prompts on AMX tiles: many blocks of sixteen rows times two
// panels. With fewer rows, unpacking to bytes (tiles.h) is cheaper.
//
// A tile multiplies whole numbers that are written as bf16: all products of a group and all their
// sums are whole numbers below 2^24, so that the fp32 sums of the tile are exact in any order. What
// follows are the fp32 operations of linear.h in the same order, so a row gets the same bits here,
// there, and from whatever number of rows. Integer tiles would leave a conversion of each sum to the
// vector unit, of which half rests while tiles work, and which is the limit here.
#pragma once

#include <utility>

#include "kernels/tiles.h"

namespace outdraft::OUTDRAFT_ISA {

// The number of a tile is part of an instruction.
template <int T>
static inline void zero_tile() {
  if constexpr (T == 0) _tile_zero(0);
  if constexpr (T == 1) _tile_zero(1);
}
template <int T>
static inline void store_tile(float (*out)[kPanel]) {
  if constexpr (T == 0) _tile_stored(0, out, kTileBytes);
  if constexpr (T == 1) _tile_stored(1, out, kTileBytes);
}

constexpr int64_t kStretch = 4;  // tiles of inputs that go through all blocks together
constexpr int64_t kTileElements = 512;
constexpr int64_t kChunkBlocks = 8;  // of sixteen rows
constexpr int64_t kPassPanels = 8;   // whose results are written together
static_assert(kChunkBlocks * kTileRows * kPassPanels * kPanel * 4 <= kScratchBytes);

using Sixteen = float[kTileRows][kPanel];

// Weights of up to two panels.
struct Stretch {
  alignas(64) uint16_t tiles[2][kStretch][kTileElements];
  alignas(64) float scales[2][kStretch][kPanel];  // of groups
};

// Sixteen rows times a stretch. The sums of its groups go through memory.
struct Step {
  const uint16_t* x;        // a tile for 32 inputs
  const float* row_scales;  // [group][16 rows]
  const Stretch* weights;
  Sixteen* totals;            // [panel]
  Sixteen (*sums)[kStretch];  // [panel][group]
};

// A stretch of G groups of T tiles, times P panels. Panel p's sums are made in tile p.
template <int P, int G, int T>
struct Steps {
  // Begins the product of a group with panel p. What the tile of sums had before goes to memory:
  // the group before, or the last one of step `now`.
  template <int p>
  static inline void begin(const Step& next, const Step* now, int64_t g) {
    if (g > 0)
      store_tile<p>(next.sums[p][g - 1]);
    else if (now)
      store_tile<p>(now->sums[p][G - 1]);
    zero_tile<p>();
    for (int64_t tile = g * T; tile < g * T + T; ++tile) {
      const uint16_t* weights = next.weights->tiles[p][tile];
      if constexpr (p == 0) {
        _tile_loadd(6, weights, kTileBytes);
        _tile_loadd(4, next.x + tile * kTileElements, kTileBytes);
        _tile_dpbf16ps(0, 4, 6);
      } else {
        _tile_loadd(7, weights, kTileBytes);
        if (T > 1) _tile_loadd(4, next.x + tile * kTileElements, kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    memory_barrier();
  }

  static inline void first(const Step& next) {
    for (int64_t g = 0; g < G; ++g) {
      begin<0>(next, nullptr, g);
      if constexpr (P > 1) begin<1>(next, nullptr, g);
    }
  }

  static inline void store_last(const Step& now) {
    store_tile<0>(now.sums[0][G - 1]);
    if constexpr (P > 1) store_tile<1>(now.sums[1][G - 1]);
    memory_barrier();
  }

  static inline void add_group(const Step& now, int p, int64_t g, F (&total)[kTileRows]) {
    const F scales = load(now.weights->scales[p][g]);
    const float* row_scales = now.row_scales + g * kTileRows;
    const Sixteen& sums = now.sums[p][g];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
      total[r] = fma(load(sums[r]), mul(scales, set1(row_scales[r])), total[r]);
  }

  // Adds the sums of step `now` while tiles multiply those of step `next`, if there is one.
  template <bool kNext>
  static inline void add(const Step& now, const Step& next) {
    if constexpr (!kNext) store_last(now);
    int64_t begun = 0;  // groups, of both panels
    for (int p = 0; p < P; ++p) {
      F total[kTileRows];
      for (int r = 0; r < kTileRows; ++r) total[r] = load(now.totals[p][r]);
      if constexpr (P == 2 && G % 2 == 0) {
        for (int64_t g = 0; g < G; g += 2, ++begun) {
          if constexpr (kNext) begin<0>(next, &now, begun);
          add_group(now, p, g, total);
          if constexpr (kNext) begin<1>(next, &now, begun);
          add_group(now, p, g + 1, total);
        }
      } else {
        for (int64_t g = 0; g < G; ++g) {
          if constexpr (kNext && P == 1) begin<0>(next, &now, g);
          if constexpr (kNext && P == 2) {
            if (p == 0) {
              begin<0>(next, &now, g);
              begin<1>(next, &now, g);
            }
          }
          add_group(now, p, g, total);
        }
      }
      for (int r = 0; r < kTileRows; ++r) store(now.totals[p][r], total[r]);
    }
  }
};

template <bool kZeros>
struct W4ManyTiles {
  using Few = W4<kZeros>;

  // What a nibble stands for as bf16, by its lowest five bits.
  static inline __m512i values() {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
      const int value = kZeros ? (i < 16 ? i : i - 32) : (i & 15) - 8;
      const float x = static_cast<float>(value);
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      table[i] = static_cast<uint16_t>(bits >> 16);
    }
    return _mm512_load_si512(table);
  }

  // Bytes 0 and 1 (or 2 and 3) of each four as words.
  static inline __m512i pair_of_bytes(__m512i x, int first) {
    const __m128i from = _mm_add_epi8(
        _mm_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128),
        _mm_set1_epi16(static_cast<int16_t>(first)));
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(from));
  }

  // The scales of G groups of a panel from group `first` on, and one of their T G tiles.
  static inline void unpack_scales(const Weight& w, int64_t panel, int64_t first, int64_t n,
                                   float (*out)[kPanel]) {
    const int64_t at = (panel * group_count(w) + first) * kPanel;
    for (int64_t g = 0; g < n; ++g)
      store(out[g], load_f16(static_cast<const uint16_t*>(w.scales) + at + g * kPanel));
  }

  static inline void unpack_tile(const Weight& w, int64_t panel, int64_t tile, uint16_t* out) {
    const int64_t per_group = w.group / 32, group = panel * group_count(w) + tile / per_group;
    const uint8_t* from = w.data + (panel * group_count(w) * per_group + tile) * kTileElements / 2;
    const __m512i table = values();
    __m512i zero = _mm512_setzero_si512();
    if (kZeros) {
      const auto* zeros = static_cast<const uint8_t*>(w.zeros);
      zero = mul_i(load_u8(zeros + group * kPanel), set1_i(0x01010101)).v;
    }
    for (int j = 0; j < 4; ++j, from += 64, out += 128) {
      prefetch<Ahead::far>(from);
      const B bytes = load_bytes(from);
      __m512i low = bytes.v, high = bytes.v;
      if (kZeros) {
        low = _mm512_sub_epi8(low_nibbles(bytes).v, zero);
        high = _mm512_sub_epi8(high_nibbles(bytes).v, zero);
      }
      for (int half = 0; half < 2; ++half) {
        const __m512i even = pair_of_bytes(low, 2 * half);
        const __m512i odd = kZeros ? pair_of_bytes(high, 2 * half) : _mm512_srli_epi16(even, 4);
        _mm512_store_si512(out + 32 * half, _mm512_permutexvar_epi16(even, table));
        _mm512_store_si512(out + 32 * half + 64, _mm512_permutexvar_epi16(odd, table));
      }
    }
  }

  // Part `part` of `parts` of a stretch: P panels, tiles first..first + G T - 1.
  template <int P, int G, int T>
  static inline void unpack(const Weight& w, int64_t panel, int64_t first, int64_t part,
                            int64_t parts, Stretch& out) {
    if (part == 0)
      for (int p = 0; p < P; ++p) unpack_scales(w, panel + p, first / T, G, out.scales[p]);
    constexpr int64_t all = P * G * T;
    for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i)
      unpack_tile(w, panel + i % P, first + i / P, out.tiles[i % P][i / P]);
    memory_barrier();
  }

  // Adds to `totals` stretches of G groups of T tiles each, of inputs first..end - 1 (in tiles).
  template <int P, int G, int T>
  static void stretches(const LinearArgs& a, int64_t panel, const uint8_t* x, int64_t n,
                        int64_t first, int64_t end, Sixteen (*totals)[2]) {
    using All = Steps<P, G, T>;
    const TiledRows layout(a.weight.k, a.weight.group);
    alignas(64) float sums[2][2][kStretch][kTileRows][kPanel];
    Stretch weights[2];
    Step steps[2];
    int64_t i = 0;
    for (int64_t at = first; at < end; at += G * T) {
      // While a stretch is multiplied, the next one is unpacked bit by bit.
      Stretch& own = weights[i / n % 2];
      Stretch& later = weights[(i / n + 1) % 2];
      if (i == 0) unpack<P, G, T>(a.weight, panel, at, 0, 1, own);
      for (int64_t block = 0; block < n; ++block, ++i) {
        const uint8_t* rows = x + block * layout.block_bytes;
        Step& next = steps[i % 2];
        const auto* own_x = reinterpret_cast<const uint16_t*>(rows) + at * kTileElements;
        next = {own_x,
                reinterpret_cast<const float*>(rows + layout.scales) + at / T * kTileRows, &own,
                totals[block], sums[i % 2]};
        if (i == 0)
          All::first(next);
        else
          All::template add<true>(steps[(i + 1) % 2], next);
        // Behind the step before, which may still have read what was there.
        if (at + G * T < end) unpack<P, G, T>(a.weight, panel, at + G * T, block, n, later);
      }
    }
    if (i > 0) All::template add<false>(steps[(i + 1) % 2], steps[i % 2]);
  }

  // P panels from `panel` on times `n` blocks of sixteen rows from block `first` on, to
  // out [row][kPassPanels][16].
  template <int P, int T>
  static void panels(const LinearArgs& a, int64_t panel, int64_t first, int64_t n, float* out) {
    const Weight& w = a.weight;
    const int64_t tiles = group_count(w) * T, whole = tiles / kStretch * kStretch;
    const uint8_t* x = tiled_rows(a.x, prepared_layout(Format::w4, w.k, w.group), a.rows) +
                       first * TiledRows(w.k, w.group).block_bytes;
    alignas(64) Sixteen totals[kChunkBlocks][2];
    for (int64_t block = 0; block < n; ++block)
      for (auto& panel_totals : totals[block])
        for (auto& row : panel_totals) store(row, zero());
    stretches<P, kStretch / T, T>(a, panel, x, n, 0, whole, totals);
    if (T < kStretch && whole < tiles) stretches<P, 1, T>(a, panel, x, n, whole, tiles, totals);
    for (int64_t row = 0; row < n * kTileRows; ++row)
      for (int p = 0; p < P; ++p)
        store(out + (row * kPassPanels + p) * kPanel,
              load(totals[row / kTileRows][p][row % kTileRows]));
  }

  template <int P>
  static void panels(const LinearArgs& a, int64_t panel, int64_t first, int64_t n, float* out) {
    if (a.weight.group == 32) return panels<P, 1>(a, panel, first, n, out);
    if (a.weight.group == 64) return panels<P, 2>(a, panel, first, n, out);
    panels<P, 4>(a, panel, first, n, out);
  }
};

// Results of a pass, [row][panel][16], to rows of y. A row of y gets many lines at a time: rows lie
// in pages of their own, and each visit waits for memory.
static inline void write_pass(const LinearArgs& a, int64_t panel, int64_t n_panels, int64_t first,
                              int64_t rows, const float* results) {
  const int64_t per_block = panels_per_block(a.weight);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t p = 0; p < n_panels; ++p) {
      const int64_t column = (panel + p) % per_block * kPanel;
      store_at(a.y, first + row, column, load(results + (row * kPassPanels + p) * kPanel),
               a.weight.n - column);
    }
}

template <class Tiles>
static void many_tiles(const LinearArgs& a, const Worker& worker) {
  const TileShape shape(kTileBytes);
  memory_barrier();
  _tile_loadconfig(&shape);
  const int64_t panels = panel_count(a.weight), blocks = tiled_blocks(a.rows);
  const Range pairs = share((panels + 1) / 2, worker);
  const int64_t last = least(2 * pairs.end, panels);
  auto* results = reinterpret_cast<float*>(worker.scratch);
  for (int64_t block = 0; block < blocks; block += kChunkBlocks) {
    const int64_t n = least(kChunkBlocks, blocks - block), row = block * kTileRows;
    for (int64_t panel = 2 * pairs.begin; panel < last; panel += kPassPanels) {
      const int64_t count = least(kPassPanels, last - panel);
      for (int64_t p = 0; p < count; p += 2) {
        float* out = results + p * kPanel;
        if (p + 1 < count)
          Tiles::template panels<2>(a, panel + p, block, n, out);
        else
          Tiles::template panels<1>(a, panel + p, block, n, out);
      }
      write_pass(a, panel, count, row, least(n * kTileRows, a.rows - row), results);
    }
  }
  _tile_release();
  const int64_t rest = blocks * kTileRows;
  for (int64_t panel = 2 * pairs.begin; panel < last && rest < a.rows; ++panel)
    few_rows<typename Tiles::Few>(a, panel, rest, a.rows);
}

static void linear_or_tiles(const LinearArgs& a, const Worker& worker) {
  const Weight& w = a.weight;
  if (a.rows < kTileRows || w.format == Format::bf16) return linear(a, worker);
  if (w.format == Format::w8) return tile_format<W8Tiles>(a, worker);
  if (tiled_blocks(a.rows) > 0)
    return w.zeros ? many_tiles<W4ManyTiles<true>>(a, worker)
                   : many_tiles<W4ManyTiles<false>>(a, worker);
  if (kRowChunk * group_count(w) * 4 > kScratchBytes) return linear(a, worker);
  return w.zeros ? tile_format<W4Tiles<true>>(a, worker) : tile_format<W4Tiles<false>>(a, worker);
}

}  // namespace outdraft::OUTDRAFT_ISA
