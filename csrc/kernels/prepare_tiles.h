// Activations of prompts for the kernels that read blocks of sixteen rows as tiles (TiledRows in
// core/types.h).
//
// The numbers of prepare.h in another place, sixteen rows at a time.
#pragma once

#include "kernels/prepare.h"

namespace outdraft::OUTDRAFT_ISA {

constexpr int64_t kRowStretch = 256;  // inputs: a whole number of groups

// Lane r gets the largest lane of x[r].
static inline __m512 highest_of_each(const __m512 (&x)[16]) {
  __m512 y[8], z[4];  // 128-bit lanes: rows i i i+8 i+8, then i i+8 i+4 i+12
  for (int i = 0; i < 8; ++i)
    y[i] = _mm512_max_ps(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44),
                         _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
  for (int i = 0; i < 4; ++i)
    z[i] = _mm512_max_ps(_mm512_shuffle_f32x4(y[i], y[i + 4], 0x88),
                         _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd));
  const __m512 a = _mm512_max_ps(_mm512_unpacklo_ps(z[0], z[2]), _mm512_unpackhi_ps(z[0], z[2]));
  const __m512 b = _mm512_max_ps(_mm512_unpacklo_ps(z[1], z[3]), _mm512_unpackhi_ps(z[1], z[3]));
  const __m512 all = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  return _mm512_shuffle_f32x4(all, all, 0xd8);
}

// Whole numbers of sixteen inputs as fp32, within the bytes that other kernels have them in.
static inline __m512 whole(__m512 x, __m512 inverse) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
  const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-128);
  return _mm512_cvtepi32_ps(_mm512_min_epi32(_mm512_max_epi32(q, least), most));
}

// `n` inputs of sixteen rows, a whole number of groups, as tiles with scales.
static inline void tile_groups_of_rows(const float (*x)[kRowStretch], int64_t n, int64_t group,
                                       uint16_t* tiles, float* scales) {
  // The upper halves of 32 floats.
  const __m512i upper = _mm512_add_epi16(
      _mm512_slli_epi16(_mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17,
                                         16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                        1),
      _mm512_set1_epi16(1));
  for (int64_t begin = 0; begin < n; begin += group, scales += kTileBlock) {
    __m512 widest[16];
    for (int r = 0; r < 16; ++r) {
      widest[r] = _mm512_setzero_ps();
      for (int64_t i = begin; i < begin + group; i += 16)
        widest[r] = _mm512_max_ps(widest[r], _mm512_abs_ps(_mm512_load_ps(x[r] + i)));
    }
    const __m512 limit = highest_of_each(widest), most = _mm512_set1_ps(127.0f);
    const __mmask16 some = _mm512_cmp_ps_mask(limit, _mm512_setzero_ps(), _CMP_GT_OQ);
    alignas(64) float inverse[16];
    _mm512_store_ps(inverse, _mm512_maskz_div_ps(some, most, limit));
    _mm512_storeu_ps(scales, _mm512_div_ps(limit, most));
    for (int64_t i = begin; i < begin + group; i += 32)
      for (int r = 0; r < 16; ++r, tiles += 32) {
        const __m512 factor = _mm512_set1_ps(inverse[r]);
        const __m512 low = whole(_mm512_load_ps(x[r] + i), factor);
        const __m512 high = whole(_mm512_load_ps(x[r] + i + 16), factor);
        _mm512_storeu_si512(tiles, _mm512_permutex2var_epi16(_mm512_castps_si512(low), upper,
                                                             _mm512_castps_si512(high)));
      }
  }
}

// Rows 16 * block on, of which there may be fewer than sixteen; zeros stand for the others.
static inline void prepare_block(const PrepareArgs& a, int64_t block, uint8_t* out) {
  const TiledRows layout(a.k, a.group);
  const int64_t groups = (a.k + a.group - 1) / a.group, first = block * kTileBlock;
  const int64_t rows = least(kTileBlock, a.rows - first);
  alignas(64) float x[kTileBlock][kRowStretch];
  for (int64_t r = rows; r < kTileBlock; ++r)
    for (float& value : x[r]) value = 0.0f;
  for (int64_t begin = 0; begin < groups * a.group; begin += kRowStretch) {
    const int64_t n = least(kRowStretch, groups * a.group - begin);
    for (int64_t r = 0; r < rows; ++r) {
      const std::byte* row = at(a.x, first + r, begin);
      const int64_t size = element_bytes(a.x.dtype), valid = a.k - begin;
      for (int64_t i = 0; i < n; i += 16)
        store(x[r] + i, i < valid ? load_row(row + i * size, a.x.dtype, valid - i) : zero());
    }
    tile_groups_of_rows(x, n, a.group, reinterpret_cast<uint16_t*>(out) + begin * kTileBlock,
                        reinterpret_cast<float*>(out + layout.scales) +
                            begin / a.group * kTileBlock);
  }
}

static void prepare_or_tiles(const PrepareArgs& a, const Worker& worker) {
  const int64_t blocks = a.tiled ? tiled_blocks(a.rows) : 0;
  if (blocks == 0) return prepare(a, worker);
  const PreparedLayout plain = prepared_layout(a.format, a.k, a.group);
  uint8_t* out = tiled_rows(a.out, plain, a.rows);
  const Range mine = share(blocks, worker);
  for (int64_t block = mine.begin; block < mine.end; ++block)
    prepare_block(a, block, out + block * TiledRows(a.k, a.group).block_bytes);
  if (worker.index + 1 == worker.count)
    for (int64_t row = blocks * kTileBlock; row < a.rows; ++row) {
      uint8_t* last = a.out + row * plain.stride;
      if (a.x.dtype == DType::f32)
        prepare_groups<DType::f32>(a, row, last);
      else
        prepare_groups<DType::bf16>(a, row, last);
    }
}

}  // namespace outdraft::OUTDRAFT_ISA
