// What the kernels are given: matrices, packed weights, the worker that runs, argument structs of
// the linear layers. Nothing here depends on an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace outdraft {

enum class DType : int32_t { f32 = 0, bf16 = 1, i8 = 2 };

// Rows of numbers; `stride` is in elements.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::f32;
};

enum class Format : int32_t { bf16 = 0, w8 = 1, w4 = 2 };

constexpr int kPanel = 16;  // output rows that lie interleaved in one stream of packed weights

// A weight matrix [n, k], or `n_blocks` of them (experts), packed by core/pack.h.
struct Weight {
  Format format = Format::bf16;
  int32_t n = 0;      // output rows of one block
  int32_t k = 0;      // inputs
  int32_t group = 0;  // inputs that share a scale (w4)
  int32_t n_blocks = 1;
  const uint8_t* data = nullptr;
  const void* scales = nullptr;  // w8: fp32 a row; w4: fp16 [panel][group][16]
  const void* zeros = nullptr;   // w8: int32 sum of each row; w4: uint8 zero-points or null (8)
};

// Functions of this header are static: were they shared, the linker could keep the copy that was
// compiled for AVX-512 for every CPU.

static constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

static inline int64_t panels_per_block(const Weight& w) { return round_up(w.n, kPanel) / kPanel; }
static inline int64_t panel_count(const Weight& w) { return panels_per_block(w) * w.n_blocks; }

// Bytes of one packed panel.
static inline int64_t panel_bytes(const Weight& w) {
  switch (w.format) {
    case Format::bf16:
      return round_up(w.k, 2) * kPanel * 2;
    case Format::w8:
      return round_up(w.k, 4) * kPanel;
    case Format::w4:
      return round_up(w.k, w.group) * kPanel / 2;
  }
  return 0;
}

// Activations are brought into the form that a format's kernel reads ("prepared") once per layer:
//   bf16: fp32 [k]
//   w8:   bytes [k], then one fp32 scale
//   w4:   int8 [k], then an fp32 scale per group, then minus the sum of the bytes per group (int32)
// with k padded by zeros. The stride is an odd number of cache lines: with a power of two, the rows
// of a block would all map to the same set of the first-level cache.
struct PreparedLayout {
  int64_t scales = 0;  // byte offset
  int64_t sums = 0;    // byte offset
  int64_t stride = 0;  // bytes from row to row
};

static inline PreparedLayout prepared_layout(Format format, int32_t k, int32_t group) {
  const int64_t groups = format == Format::w4 ? (k + group - 1) / group : 1;
  const int64_t padded = round_up(k, format == Format::w4 ? round_up(group, 64) : 64);
  PreparedLayout layout;
  layout.scales = padded * (format == Format::bf16 ? 4 : 1);
  layout.sums = layout.scales + groups * 4;
  layout.stride = round_up(layout.sums + groups * 4, 128) + 64;
  return layout;
}

constexpr int kTileBlock = 16;  // rows of one tile

// Many rows for a 4-bit weight that go by tiles are prepared in blocks of sixteen, which begin behind
// the place of all rows in the form above. A block: for every 32 inputs, groups padded with zeros, a
// tile of [16 rows][32] whole numbers as bf16; then fp32 scales [group][16 rows].
struct TiledRows {
  int64_t scales;  // byte offset
  int64_t block_bytes;

  TiledRows(int32_t k, int32_t group) {
    const int64_t groups = (k + group - 1) / group;
    scales = groups * group * kTileBlock * 2;
    block_bytes = scales + groups * kTileBlock * 4;
  }
};

// Blocks of a call with so many rows. Fewer than kLeastTiled do not pay for unpacking weights to
// bf16; a last block that is not full pays from kLeastOfBlock rows on.
constexpr int64_t kLeastTiled = 128, kLeastOfBlock = 4;

static inline int64_t tiled_blocks(int64_t rows) {
  if (rows < kLeastTiled) return 0;
  return rows / kTileBlock + (rows % kTileBlock >= kLeastOfBlock ? 1 : 0);
}

static inline int64_t tiled_bytes(const Weight& w, int64_t rows) {
  return tiled_blocks(rows) * TiledRows(w.k, w.group).block_bytes;
}

template <class Byte>
static inline Byte* tiled_rows(Byte* prepared, const PreparedLayout& layout, int64_t rows) {
  return prepared + rows * layout.stride;
}

// One piece of a kernel call, and what the thread that computes it may use meanwhile. A kernel must
// not wait for another piece of its call: that may not have begun.
struct Worker {
  int index = 0;
  int count = 1;                 // pieces of the call
  std::byte* scratch = nullptr;  // kScratchBytes of its own, aligned to a cache line
  std::byte* shared = nullptr;   // kSharedBytes of all pieces; each kernel may overwrite it, but
                                 // leaves zeros in the first kCounterBytes, as it finds them
};

constexpr int64_t kScratchBytes = 512 * 1024;
constexpr int64_t kSharedBytes = 4 * 1024 * 1024;
constexpr int64_t kCounterBytes = 4096;

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
};

// This piece's contiguous share of n items.
static inline Range share(int64_t n, const Worker& worker) {
  return {n * worker.index / worker.count, n * (worker.index + 1) / worker.count};
}

struct PrepareArgs {
  Format format;
  int32_t k;
  int32_t group;
  int32_t rows;
  Matrix x;
  uint8_t* out;
  bool tiled;  // for a linear that reads blocks of rows as tiles
};

struct LinearArgs {
  Weight weight;
  const uint8_t* x;  // prepared rows
  Matrix y;
  int32_t rows;
};

// The (row, expert) pairs of a step sorted by expert; written by the `group_pairs` kernel.
// Pair p = row * experts_per_row + slot.
struct PairGroups {
  int32_t* n_hit = nullptr;   // [1] experts with at least one pair
  int32_t* expert = nullptr;  // [n_hit] ascending
  int32_t* start = nullptr;   // [n_hit + 1] first index into `pair`
  int32_t* pair = nullptr;    // [pairs], ascending within an expert
};

// y[p] = weight[expert of pair p] * x[p / pairs_per_input].
struct ExpertLinearArgs {
  Weight weight;
  const uint8_t* x;
  Matrix y;
  PairGroups groups;
  int32_t pairs_per_input;
};

}  // namespace outdraft
