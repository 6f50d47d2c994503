// Linear layers for many rows on AMX tiles: 16 rows times a panel of 16 outputs at a time.
//
// Only the whole numbers inside a group (w4) or a row (w8) are summed by tiles, which is exact; the
// fp32 operations are those of linear.h in the same order. So a row gets the same bits here, there,
// and from whatever number of rows.
#pragma once

#include "kernels/linear.h"

namespace outdraft::OUTDRAFT_ISA {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;   // of a tile's row

struct alignas(64) TileShape {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0-3 are sums, 4 and 5 rows of activations of `inputs` bytes, 6 and 7 weights.
  explicit TileShape(int64_t inputs) {
    for (int t = 0; t < 8; ++t) {
      row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? inputs : kTileBytes);
      rows[t] = static_cast<uint8_t>(t >= 6 ? inputs / 4 : kTileRows);
    }
  }
};

static inline int64_t group_count(const Weight& w) { return (w.k + w.group - 1) / w.group; }

// The compiler does not know which memory the tile instructions read and write.
static inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Fetches where rows first..end of a panel's results go. Nothing else asks for these lines: they lie
// a whole row of outputs apart, and a store to each would wait for memory.
static inline void ask_for_results(const LinearArgs& a, int64_t panel, int64_t first,
                                   int64_t end) {
  const int64_t column = panel % panels_per_block(a.weight) * kPanel;
  for (int64_t row = first; row < end; ++row) __builtin_prefetch(at(a.y, row, column), 1, 2);
}

struct TileSums {
  alignas(64) int32_t at[2][2][kTileRows][kPanel];  // [block of rows][panel]
};

template <int A, int P>
static inline void store_sums(TileSums& sums) {
  _tile_stored(0, sums.at[0][0], kTileBytes);
  if constexpr (P > 1) _tile_stored(1, sums.at[0][1], kTileBytes);
  if constexpr (A > 1) _tile_stored(2, sums.at[1][0], kTileBytes);
  if constexpr (A > 1 && P > 1) _tile_stored(3, sums.at[1][1], kTileBytes);
  memory_barrier();
}

static inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

struct W8Tiles {
  using Few = W8;
  static constexpr int64_t kInputs = 64;

  // sums += rows x[0..16 A) times one tile of each of P panels.
  template <int A, int P>
  static inline void step(const uint8_t* x, int64_t stride, const uint8_t* const* tiles) {
    _tile_loadd(4, x, stride);
    if constexpr (A > 1) _tile_loadd(5, x + kTileRows * stride, stride);
    _tile_loadd(6, tiles[0], kTileBytes);
    _tile_dpbusd(0, 4, 6);
    if constexpr (A > 1) _tile_dpbusd(2, 5, 6);
    if constexpr (P > 1) {
      _tile_loadd(7, tiles[1], kTileBytes);
      _tile_dpbusd(1, 4, 7);
      if constexpr (A > 1) _tile_dpbusd(3, 5, 7);
    }
  }

  template <int A, int P>
  static inline void block(const LinearArgs& a, int64_t panel, int64_t first,
                           const uint8_t (*tails)[1024]) {
    const Weight& w = a.weight;
    const PreparedLayout layout = prepared_layout(w.format, w.k, w.group);
    const uint8_t* x = a.x + first * layout.stride;
    TileSums sums;
    for (int p = 0; p < P; ++p) ask_for_results(a, panel + p, first, first + A * kTileRows);
    zero_sums();
    int64_t k = 0;
    for (; k + kInputs <= round_up(w.k, 4); k += kInputs) {
      const uint8_t* tiles[P];
      for (int p = 0; p < P; ++p) tiles[p] = w.data + (panel + p) * panel_bytes(w) + k * kPanel;
      step<A, P>(x + k, layout.stride, tiles);
    }
    if (k < w.k) {
      const uint8_t* tiles[2] = {tails[0], tails[1]};
      step<A, P>(x + k, layout.stride, tiles);
    }
    store_sums<A, P>(sums);
    for (int p = 0; p < P; ++p) {
      const F scales = load(static_cast<const float*>(w.scales) + (panel + p) * kPanel);
      const I all = load_i(static_cast<const int32_t*>(w.zeros) + (panel + p) * kPanel);
      const I offset = mul_i(all, set1_i(kActivationOffset));
      const int64_t column = (panel + p) % panels_per_block(w) * kPanel;
      for (int64_t r = 0; r < A * kTileRows; ++r) {
        const float scale = *reinterpret_cast<const float*>(x + r * layout.stride + layout.scales);
        const I sum = load_i(sums.at[r / kTileRows][p][r % kTileRows]);
        store_at(a.y, first + r, column,
                 mul(to_float(sub_i(sum, offset)), mul(scales, set1(scale))), w.n - column);
      }
    }
  }

  static inline void begin(const LinearArgs&, int64_t, int64_t, const Worker&) {}

  // Rows first..end, a multiple of 16 of them, times one or two panels.
  static inline void panels(const LinearArgs& a, int64_t first_panel, int64_t n, int64_t first,
                            int64_t end, const Worker&) {
    if (n == 2) return some_panels<2>(a, first_panel, first, end);
    some_panels<1>(a, first_panel, first, end);
  }

  template <int P>
  static inline void some_panels(const LinearArgs& a, int64_t panel, int64_t first, int64_t end) {
    // Inputs beyond the last whole tile, with zeros behind: what lies behind them in memory is
    // another panel.
    const Weight& w = a.weight;
    const int64_t whole = round_up(w.k, 4) / kInputs * kInputs;
    alignas(64) uint8_t tails[2][1024] = {};
    for (int p = 0; p < P; ++p)
      __builtin_memcpy(tails[p], w.data + (panel + p) * panel_bytes(w) + whole * kPanel,
                       (round_up(w.k, 4) - whole) * kPanel);
    memory_barrier();
    for (; first + 2 * kTileRows <= end; first += 2 * kTileRows) block<2, P>(a, panel, first, tails);
    if (first < end) block<1, P>(a, panel, first, tails);
  }
};

// One panel at a time, so that the fp32 sums of 16 rows stay in registers for a stretch of groups.
template <bool kZeros>
struct W4Tiles {
  using Few = W4<kZeros>;
  static constexpr int64_t kInputs = 32;
  static constexpr int64_t kStretch = 256;  // inputs: a whole number of groups

  struct Stretch {
    alignas(64) uint8_t tiles[kStretch * kPanel];  // 64 bytes for 4 inputs
    alignas(64) float scales[kStretch / kInputs][kPanel];
    alignas(64) int32_t sums[2][kTileRows][kPanel];
  };

  // n groups of a panel as signed bytes less their zero-points.
  static inline void unpack(const Weight& w, int64_t panel, int64_t group, int64_t n,
                            Stretch& out) {
    const int64_t first = (panel * group_count(w) + group) * kPanel;
    const uint8_t* weights = w.data + first * w.group / 2;
    uint8_t* tile = out.tiles;
    for (int64_t g = 0; g < n; ++g) {
      const int64_t at = first + g * kPanel;
      store(out.scales[g], load_f16(static_cast<const uint16_t*>(w.scales) + at));
      const I zero = kZeros ? mul_i(load_u8(static_cast<const uint8_t*>(w.zeros) + at),
                                    set1_i(0x01010101))
                            : set1_i(0x08080808);
      for (int64_t j = 0; j < w.group; j += 8, weights += 64, tile += 128) {
        prefetch<Ahead::far>(weights);
        const B bytes = load_bytes(weights);
        _mm512_store_si512(tile, _mm512_sub_epi8(low_nibbles(bytes).v, zero.v));
        _mm512_store_si512(tile + 64, _mm512_sub_epi8(high_nibbles(bytes).v, zero.v));
      }
    }
    memory_barrier();
  }

  // Tile 0 = the products of a group.
  static inline void multiply(const uint8_t* x, int64_t stride, int64_t group,
                              const uint8_t* tile) {
    _tile_zero(0);
    for (int64_t j = 0; j < group; j += kInputs) {
      _tile_loadd(4, x + j, stride);
      _tile_loadd(6, tile + j * kPanel, kTileBytes);
      _tile_dpbssd(0, 4, 6);
    }
  }

  // totals += n groups of 16 rows; `row_scales` are [group][16].
  static inline void block(const uint8_t* x, int64_t stride, int64_t group, int64_t n,
                           const float* row_scales, Stretch& stretch, float (*totals)[kPanel]) {
    const auto start = [&](int64_t g) {
      multiply(x + g * group, stride, group, stretch.tiles + g * group * kPanel);
    };
    F total[kTileRows];
    for (int r = 0; r < kTileRows; ++r) total[r] = load(totals[r]);
    start(0);
    _tile_stored(0, stretch.sums[0], kTileBytes);
    if (n > 1) start(1);
    memory_barrier();
    for (int64_t g = 0; g < n; ++g) {
      // While the sums of this group are added, the next one's go to memory, which they are ready
      // for, and tiles work on the one after it.
      if (g + 1 < n) _tile_stored(0, stretch.sums[(g + 1) % 2], kTileBytes);
      if (g + 2 < n) start(g + 2);
      memory_barrier();
      const F scales = load(stretch.scales[g]);
      const int32_t(*sums)[kPanel] = stretch.sums[g % 2];
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r)
        total[r] = fma(to_float(load_i(sums[r])), mul(scales, set1(row_scales[g * kTileRows + r])),
                       total[r]);
    }
    for (int r = 0; r < kTileRows; ++r) store(totals[r], total[r]);
  }

  // The rows' scales as [block of 16 rows][group][16], in the worker's scratch.
  static inline void begin(const LinearArgs& a, int64_t first, int64_t end, const Worker& worker) {
    const PreparedLayout layout = prepared_layout(Format::w4, a.weight.k, a.weight.group);
    const int64_t groups = group_count(a.weight);
    auto* out = reinterpret_cast<float*>(worker.scratch);
    for (int64_t row = first; row < end; row += kTileRows, out += groups * kTileRows)
      for (int64_t r = 0; r < kTileRows; ++r) {
        const uint8_t* x = a.x + (row + r) * layout.stride + layout.scales;
        const auto* scales = reinterpret_cast<const float*>(x);
        for (int64_t g = 0; g < groups; ++g) out[g * kTileRows + r] = scales[g];
      }
  }

  static inline void panel(const LinearArgs& a, int64_t panel, int64_t first, int64_t end,
                           const float* row_scales) {
    const Weight& w = a.weight;
    const int64_t stride = prepared_layout(Format::w4, w.k, w.group).stride;
    const int64_t groups = group_count(w), most = kStretch / w.group;
    alignas(64) float totals[kRowChunk][kPanel];
    for (int64_t row = 0; row < end - first; ++row) store(totals[row], zero());
    Stretch stretch;
    for (int64_t group = 0; group < groups; group += most) {
      const int64_t n = least(most, groups - group);
      unpack(w, panel, group, n, stretch);
      if (group + n == groups) ask_for_results(a, panel, first, end);
      for (int64_t row = first; row < end; row += kTileRows)
        block(a.x + row * stride + group * w.group, stride, w.group, n,
              row_scales + (row - first) * groups + group * kTileRows, stretch,
              totals + (row - first));
    }
    const int64_t column = panel % panels_per_block(w) * kPanel;
    for (int64_t row = first; row < end; ++row)
      store_at(a.y, row, column, load(totals[row - first]), w.n - column);
  }

  static inline void panels(const LinearArgs& a, int64_t first_panel, int64_t n, int64_t first,
                            int64_t end, const Worker& worker) {
    for (int64_t p = first_panel; p < first_panel + n; ++p)
      panel(a, p, first, end, reinterpret_cast<const float*>(worker.scratch));
  }
};

// Rows beyond the last sixteen of a chunk, as in linear.h.
template <class Kernel>
static inline void few_rows(const LinearArgs& a, int64_t panel, int64_t first, int64_t end) {
  const int64_t stride = prepared_layout(a.weight.format, a.weight.k, a.weight.group).stride;
  for (; first < end; first += kRowBlock) {
    RowBlock rows;
    const int64_t count = least(kRowBlock, end - first);
    for (int64_t r = 0; r < count; ++r) {
      rows.x[r] = a.x + (first + r) * stride;
      rows.out[r] = first + r;
    }
    panel_times_block<Kernel>(a.weight, panel, count, rows, a.y);
  }
}

// Rows by sixteen on tiles, two panels at a time.
template <class Tiles>
static void tile_format(const LinearArgs& a, const Worker& worker) {
  const TileShape shape(Tiles::kInputs);
  memory_barrier();
  _tile_loadconfig(&shape);
  const Range mine = share(panel_count(a.weight), worker);
  for (int64_t chunk = 0; chunk < a.rows; chunk += kRowChunk) {
    const int64_t end = least(chunk + kRowChunk, a.rows);
    const int64_t whole = chunk + (end - chunk) / kTileRows * kTileRows;
    Tiles::begin(a, chunk, whole, worker);
    for (int64_t panel = mine.begin; panel < mine.end; panel += 2) {
      const int64_t n = least(2, mine.end - panel);
      if (chunk < whole) Tiles::panels(a, panel, n, chunk, whole, worker);
      for (int64_t p = panel; p < panel + n; ++p)
        few_rows<typename Tiles::Few>(a, p, whole, end);
    }
  }
  _tile_release();
}

}  // namespace outdraft::OUTDRAFT_ISA
