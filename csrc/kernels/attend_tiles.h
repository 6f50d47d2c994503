// Attention of query heads over a part of the context on AMX tiles, for keys and values in bf16.
//
// Keys and values are read as they lie in their pages. Queries and weights are fp32; each is split
// into the sum of two bf16 numbers (off by at most 2^-16 of it), whose products with keys and
// values are exact. The order of a sum depends on absolute positions only, as in attend_page.h. Keys and
// values that a row does not see take no part, whatever they hold.
#pragma once

#include "kernels/attend_page.h"

namespace outdraft::OUTDRAFT_ISA {

constexpr int64_t kTileSlots = 16;  // keys or values of a tile
constexpr int64_t kTileDims = 32;   // dimensions of a tile of keys or values
constexpr int64_t kTileWords = 256;
constexpr int64_t kPartTiles = kPartSlots / kTileSlots;

static inline bool on_tiles(const KvPages& kv) {
  return kv.dtype == DType::bf16 && kv.head_dim % kTileDims == 0 && kv.head_dim <= 1024;
}

// Memory of one worker for up to `n` blocks.
struct TileScratch {
  uint32_t* queries;  // [pair of blocks][dim / 32][16 pairs of dimensions][16 columns]
  float* scores;      // [block][kHeadBlock][kPartSlots]
  uint32_t* weights;  // [kPartTiles][16][16]
  uint16_t* values;   // [2][kTileSlots][dim]: those that a row sees, and zeros

  static int64_t block_bytes(int64_t dim) {
    return dim / kTileDims * kTileWords * 2 + kHeadBlock * kPartSlots * 4;
  }
  static int64_t shared_bytes(int64_t dim) {
    return kPartTiles * kTileWords * 4 + 2 * kTileSlots * dim * 2 + block_bytes(dim);
  }

  TileScratch(std::byte* memory, int64_t n, int64_t dim) {
    weights = reinterpret_cast<uint32_t*>(memory);
    values = reinterpret_cast<uint16_t*>(weights + kPartTiles * kTileWords);
    scores = reinterpret_cast<float*>(values + 2 * kTileSlots * dim);
    queries = reinterpret_cast<uint32_t*>(scores + n * kHeadBlock * kPartSlots);
  }
};

struct alignas(64) AttendShape {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not know which memory the tile instructions read and write.
static inline void tile_fence() { asm volatile("" ::: "memory"); }

static inline void begin_tiles() {
  static constexpr AttendShape shape;
  tile_fence();
  _tile_loadconfig(&shape);
}

// x as the sum of two bf16 numbers, each in the upper half of its lane.
static inline void split(__m512 x, __m512i& high, __m512i& low) {
  const auto rounded = [](__m512 y) {
    const __m512i half_up = _mm512_add_epi32(_mm512_castps_si512(y), _mm512_set1_epi32(0x8000));
    return _mm512_and_si512(half_up, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  };
  high = rounded(x);
  low = rounded(_mm512_sub_ps(x, _mm512_castsi512_ps(high)));
}

// In each 128-bit lane, rows to columns.
static inline void transpose(__m512 (&x)[4]) {
  const __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
  const __m512 c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
  x[0] = _mm512_shuffle_ps(a, c, 0x44);
  x[1] = _mm512_shuffle_ps(a, c, 0xee);
  x[2] = _mm512_shuffle_ps(b, d, 0x44);
  x[3] = _mm512_shuffle_ps(b, d, 0xee);
}

// Columns 0-3 of 16 rows of a tile from its four heads.
static inline void store_columns(__m512 (&heads)[4], uint32_t* out) {
  transpose(heads);
  for (int i = 0; i < 4; ++i) {
    auto* row = reinterpret_cast<float*>(out + i * 16);
    _mm_storeu_ps(row, _mm512_castps512_ps128(heads[i]));
    _mm_storeu_ps(row + 64, _mm512_extractf32x4_ps(heads[i], 1));
    _mm_storeu_ps(row + 128, _mm512_extractf32x4_ps(heads[i], 2));
    _mm_storeu_ps(row + 192, _mm512_extractf32x4_ps(heads[i], 3));
  }
}

// Block b's queries into its eight columns of a pair's tiles: high parts, then low parts.
static inline void pack_queries(const HeadState& s, int64_t b, int64_t dim,
                                const TileScratch& scratch) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  uint32_t* out = scratch.queries + b / 2 * (dim / kTileDims * kTileWords) + b % 2 * 8;
  for (int64_t d = 0; d < dim; d += kTileDims, out += kTileWords) {
    __m512 highs[4] = {}, lows[4] = {};
    for (int64_t r = 0; r < s.n; ++r) {
      const float* q = s.q + r * dim + d;
      const __m512 x = _mm512_loadu_ps(q), y = _mm512_loadu_ps(q + 16);
      __m512i first, first_low, second, second_low;
      split(_mm512_permutex2var_ps(x, even, y), first, first_low);
      split(_mm512_permutex2var_ps(x, odd, y), second, second_low);
      highs[r] = _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(first, 16), second));
      lows[r] = _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(first_low, 16), second_low));
    }
    store_columns(highs, out);
    store_columns(lows, out + 4);
  }
}

// Asks for lines of a page of keys or values, two dimensions' tiles of 64 slots at a time: pages lie
// anywhere, and hardware prefetchers learn of one when half of it has been waited for.
static inline void ask_for_lines(const std::byte* page, int64_t first, int64_t n) {
  if (!page) return;
  for (int64_t i = first; i < first + n; ++i) __builtin_prefetch(page + i * 64, 0, 3);
}

// Scores of the 64 keys of a page, [slot][column]. Meanwhile asks for two other pages, or null.
static inline void score_page(const std::byte* keys, int64_t dim, const uint32_t* queries,
                              const std::byte* values, const std::byte* next,
                              float (*sums)[kTileSlots][16]) {
  const int64_t stride = dim * 2, group = kTileSlots * stride;
  int64_t line = 0;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < dim; d += kTileDims, keys += kTileDims * 2, queries += kTileWords) {
    _tile_loadd(6, queries, 64);
    _tile_loadd(4, keys, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, keys + group, stride);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, keys + 2 * group, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, keys + 3 * group, stride);
    _tile_dpbf16ps(3, 5, 6);
    ask_for_lines(values, line, kPageSlots);
    ask_for_lines(next, line, kPageSlots);
    line += kPageSlots;
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  tile_fence();
}

// Four floats of each of four slots, four apart.
static inline __m512 four_slots(const float* x) {
  __m512 lanes = _mm512_castps128_ps512(_mm_loadu_ps(x));
  lanes = _mm512_insertf32x4(lanes, _mm_loadu_ps(x + 64), 1);
  lanes = _mm512_insertf32x4(lanes, _mm_loadu_ps(x + 128), 2);
  return _mm512_insertf32x4(lanes, _mm_loadu_ps(x + 192), 3);
}

// Sixteen slots of a block, columns `at`.. of score_page's, into its scores.
static inline void take_scores(const float (*sums)[16], int64_t at, float* scores) {
  __m512 x[4];
  for (int i = 0; i < 4; ++i)
    x[i] = _mm512_add_ps(four_slots(sums[i] + at), four_slots(sums[i] + at + 4));
  transpose(x);
  for (int r = 0; r < kHeadBlock; ++r) _mm512_storeu_ps(scores + r * kPartSlots, x[r]);
}

// Scores of slots first..last of a head to weights exp(score - highest), as four rows of tiles:
// the high part for even and for odd dimensions, and the low part likewise.
static inline void weigh(HeadState& s, int64_t r, float* scores, int first, int last,
                         uint32_t* tiles) {
  const int begin = first / 16, end = last / 16;
  const auto visible = [&](F x, int v, float other) {
    if (v != begin && v != end) return x;
    return keep_lanes(x, v == begin ? first % 16 : 0, v == end ? last % 16 : 15, set1(other));
  };
  F widest = set1(kHidden);
  for (int v = begin; v <= end; ++v)
    widest = maximum(widest, visible(load(scores + 16 * v), v, kHidden));
  s.highest[r] = highest(widest);
  const F top = set1(s.highest[r]);
  F total = zero();
  for (int v = begin; v <= end; ++v) {
    const F weight = visible(exponential(sub(load(scores + 16 * v), top)), v, 0.0f);
    total = add(total, weight);
    __m512i high, low;
    split(weight.v, high, low);
    uint32_t* out = tiles + v * kTileWords + r * 64;
    _mm512_storeu_si512(out, _mm512_srli_epi32(high, 16));
    _mm512_storeu_si512(out + 16, high);
    _mm512_storeu_si512(out + 32, _mm512_srli_epi32(low, 16));
    _mm512_storeu_si512(out + 48, low);
  }
  s.total[r] = sum(total);
}

// Values of sixteen slots, of which first..last are kept and the others are zeros.
static inline const std::byte* only_visible(const std::byte* values, int64_t dim, int first,
                                            int last, uint16_t* out) {
  const auto* from = reinterpret_cast<const uint16_t*>(values);
  for (int64_t slot = 0; slot < kTileSlots; ++slot)
    for (int64_t d = 0; d < dim; d += kTileDims) {
      const bool seen = first <= slot && slot <= last;
      _mm512_storeu_si512(out + slot * dim + d, seen ? _mm512_loadu_si512(from + slot * dim + d)
                                                     : _mm512_setzero_si512());
    }
  return reinterpret_cast<const std::byte*>(out);
}

// The rows of one head in the tiles of sums, to 32 dimensions of its own.
static inline void take_mixed(const float (*sums)[16], float* out) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 even = _mm512_add_ps(_mm512_loadu_ps(sums[0]), _mm512_loadu_ps(sums[2]));
  const __m512 odd = _mm512_add_ps(_mm512_loadu_ps(sums[1]), _mm512_loadu_ps(sums[3]));
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, high, odd));
}

// Weighted sums of the values of tiles begin..end, 32 W dimensions at a time. With few dimensions
// even and odd tiles have sums of their own, since one sum has to wait for itself.
template <int W>
static inline void mix(HeadState& s, const std::byte* const* values, int64_t dim, int begin,
                       int end, const uint32_t* weights) {
  constexpr int kChains = W < 4 ? 2 : 1;
  alignas(64) float sums[4][16][16];
  for (int64_t d = 0; d < dim; d += W * kTileDims) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int v = begin; v <= end; ++v) {
      const std::byte* p = values[v] + d * 2;
      _tile_loadd(4, weights + v * kTileWords, 64);
      _tile_loadd(6, p, dim * 2);
      if (W == 4) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, p + 64, dim * 2);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, p + 128, dim * 2);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, p + 192, dim * 2);
        _tile_dpbf16ps(3, 4, 7);
      } else if (v % 2) {
        _tile_dpbf16ps(2, 4, 6);
        if (W == 2) {
          _tile_loadd(7, p + 64, dim * 2);
          _tile_dpbf16ps(3, 4, 7);
        }
      } else {
        _tile_dpbf16ps(0, 4, 6);
        if (W == 2) {
          _tile_loadd(7, p + 64, dim * 2);
          _tile_dpbf16ps(1, 4, 7);
        }
      }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    tile_fence();
    for (int64_t r = 0; r < s.n; ++r)
      for (int w = 0; w < W; ++w) {
        float(*own)[16] = sums[w] + 4 * r;
        if (kChains == 2)
          for (int i = 0; i < 4; ++i)
            _mm512_storeu_ps(own[i], _mm512_add_ps(_mm512_loadu_ps(own[i]),
                                                   _mm512_loadu_ps(sums[w + 2][4 * r + i])));
        take_mixed(own, s.mixed + r * dim + d + w * kTileDims);
      }
  }
}

// Pages of a part, of one key/value head; those that nobody sees may be missing.
struct PartPages {
  const std::byte* k[kPartPages];
  const std::byte* v[kPartPages];
};

// One block's sums over the slots that it sees, from its scores.
static inline void weigh_and_mix(HeadState& s, const PartPages& pages, int64_t dim, int first,
                                 int last, float* scores, const TileScratch& scratch) {
  for (int64_t r = 0; r < s.n; ++r)
    weigh(s, r, scores + r * kPartSlots, first, last, scratch.weights);
  const std::byte* values[kPartTiles];
  const int begin = first / 16, end = last / 16;
  for (int v = begin; v <= end; ++v) {
    const std::byte* own = pages.v[v / 4] + v % 4 * kTileSlots * dim * 2;
    const int low = v == begin ? first % 16 : 0, high = v == end ? last % 16 : 15;
    const bool whole = low == 0 && high == 15;
    uint16_t* copy = scratch.values + (v == begin ? 0 : kTileSlots * dim);
    values[v] = whole ? own : only_visible(own, dim, low, high, copy);
  }
  tile_fence();
  if (dim % 128 == 0) return mix<4>(s, values, dim, begin, end, scratch.weights);
  if (dim % 64 == 0) return mix<2>(s, values, dim, begin, end, scratch.weights);
  mix<1>(s, values, dim, begin, end, scratch.weights);
}

// Leaves in each of n blocks that sees some of a part's keys its sums over them. `lo` and `hi` are
// the first and last slot of the part that a block sees; it sees none if hi < lo.
static void attend_part_on_tiles(HeadState* blocks, int64_t n, const int* lo, const int* hi,
                                 const PartPages& pages, int64_t dim, const TileScratch& scratch) {
  alignas(64) float sums[kPageSlots / kTileSlots][kTileSlots][16];
  tile_fence();
  for (int64_t page = 0; page < kPartPages; ++page) {
    const int first = static_cast<int>(page * kPageSlots), last = first + kPageSlots - 1;
    for (int64_t b = 0; b < n; b += 2) {
      const auto sees = [&](int64_t i) { return i < n && lo[i] <= last && hi[i] >= first; };
      if (!sees(b) && !sees(b + 1)) continue;
      const std::byte* next = page + 1 < kPartPages ? pages.k[page + 1] : nullptr;
      score_page(pages.k[page], dim, scratch.queries + b / 2 * (dim / kTileDims * kTileWords),
                 b == 0 ? pages.v[page] : nullptr, b == 0 ? next : nullptr, sums);
      for (int64_t i = b; i < b + 2; ++i)
        for (int64_t g = 0; g < kPageSlots / kTileSlots && sees(i); ++g)
          take_scores(sums[g], i % 2 * 8,
                      scratch.scores + i * kHeadBlock * kPartSlots + first + g * kTileSlots);
    }
  }
  for (int64_t b = 0; b < n; ++b)
    if (lo[b] <= hi[b])
      weigh_and_mix(blocks[b], pages, dim, lo[b], hi[b],
                    scratch.scores + b * kHeadBlock * kPartSlots, scratch);
}

}  // namespace outdraft::OUTDRAFT_ISA
