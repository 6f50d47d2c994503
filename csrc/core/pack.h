// Packing weight rows into the layout that the linear kernels read, quantising them on the way.
//
// Layout, per panel of 16 output rows (the last one padded with rows of zeros):
//   bf16: [k / 2][16 rows][2 inputs] bf16
//   w8:   [k / 4][16 rows][4 inputs] int8 in -127..127, an fp32 scale and an int32 sum per row
//   w4:   [k / 8][16 rows][4 bytes], low nibble of byte i = input 8j + i, high = input 8j + 4 + i;
//         weight = (nibble - zero-point) * scale, an fp16 scale and a uint8 zero-point (8 when none
//         are stored) per row and group of 32, 64 or 128 inputs
// All buffers are zero before the first row comes. Rows may come in any order, some at a time; the
// rows of a block of experts are numbered block * round_up(n, 16) + row.
#pragma once

#include "core/types.h"

namespace outdraft {

// The layout above, for files of packed weights: a new name for every change of what packing
// writes. All instruction sets read the same layout.
constexpr const char* kPackedLayout = "panels of 16, 1";

// Rows [first, first + n) of a weight.
struct RowRange {
  int64_t first;
  int64_t n;
};

// fp32 or bf16 rows; w.format decides what becomes of them. `candidates` scales per row (w8) or
// group (w4) are tried and the one with the least squared error is taken; 1 takes the widest.
void pack_floats(const Weight& w, const Matrix& rows, const RowRange& range, int candidates);

// Rows that are quantised already: int8 with a scale each.
void pack_w8(const Weight& w, const int8_t* rows, int64_t stride, const float* scales,
             const RowRange& range);

// Rows of nibbles 0..15, one a byte, with scales and (or null) zero-points [n, groups].
void pack_w4(const Weight& w, const uint8_t* rows, int64_t stride, const float* scales,
             const uint8_t* zeros, const RowRange& range);

}  // namespace outdraft
