// Arguments of every kernel but the linear layers (core/types.h). Plain values: a recorded program
// copies them. Index arrays are read when the kernel runs, so a replay sees what they hold then.
#pragma once

#include "core/types.h"

namespace outdraft {

constexpr int kPageSlots = 64;  // key/value positions of a page; attention sums page by page

// Storage of one layer's keys and values: [pages, n_kv_heads, kPageSlots, head_dim].
struct KvPages {
  void* k = nullptr;
  void* v = nullptr;
  float* k_scales = nullptr;  // [pages, n_kv_heads, kPageSlots] when dtype is i8
  float* v_scales = nullptr;
  DType dtype = DType::f32;
  int32_t n_kv_heads = 0;
  int32_t head_dim = 0;  // a multiple of 16
};

// Softmax attention of row t over key positions lo[t]..hi[t] (both included, hi >= lo) of its
// sequence, all of which have been written. Key position p lies in slot p % kPageSlots of page
// table[sequence[t]][p / kPageSlots - first_page[sequence[t]]].
struct AttentionArgs {
  Matrix q;    // [rows, n_heads * head_dim]
  Matrix out;  // the same shape
  KvPages kv;
  const int32_t* table;
  int64_t table_stride;
  const int32_t* first_page;
  const int32_t* sequence;
  const int32_t* lo;
  const int32_t* hi;
  int32_t rows;
  int32_t n_heads;
  float scale;  // of the scores
};

// y = (residual + weight * x / sqrt(mean(x^2) + eps)) * scale; then, if next_weight or next_out is
// set, next = next_weight * y / sqrt(mean(y^2) + eps).
struct NormArgs {
  Matrix x;
  Matrix residual;           // data null: none
  Matrix out;                // data null: y is not stored
  Matrix next_out;           // data null: no second norm
  const float* weight;       // null: ones
  const float* next_weight;  // null: ones
  float eps;
  float scale;
  bool plain;  // leave the first norm out: y = (residual + x) * scale
  int32_t rows;
  int32_t k;  // at most kMaxNormWidth
};

constexpr int64_t kMaxNormWidth = kScratchBytes / 4;

// RMS norm over each head of a row (eps < 0: none), then rotation of pairs (i, i + dim / 2); written to `out`, or
// into pages of keys or values.
struct HeadNormArgs {
  Matrix x;             // [rows, n_heads * dim]
  Matrix out;           // the same shape; data null: write to pages
  void* pages;          // [pages, n_heads, kPageSlots, dim] of page_dtype
  float* page_scales;   // [pages, n_heads, kPageSlots] for i8
  const int32_t* page;  // [rows] page that row t is written to; negative: the row is not written
  const int32_t* slot;  // [rows]
  const float* weight;  // null: ones
  const float* cos;     // [positions, dim / 2]; null: no rotation
  const float* sin;
  const int32_t* position;  // [rows] row of cos and sin
  float eps;
  DType page_dtype;
  int32_t rows;
  int32_t n_heads;
  int32_t dim;  // a multiple of 16, of 32 with rotation
};

enum class Activation : int32_t { gelu_tanh = 0, silu = 1, sigmoid = 2, relu = 3 };

struct GatedArgs {  // out = activation(gate) * up
  Matrix gate;
  Matrix up;
  Matrix out;
  Activation activation;
  int32_t rows;
  int32_t k;
};

struct EmbedArgs {  // out[t] = weight[token[t]] * scale
  Weight weight;
  const int32_t* token;
  Matrix out;
  float scale;
  int32_t rows;
};

struct CopyRowsArgs {  // out[t] = x[row[t]], or x[t] when `row` is null; converts between types
  Matrix x;
  const int32_t* row;
  Matrix out;
  int32_t rows;
  int32_t k;
};

struct SoftcapArgs {  // x = tanh(x / cap) * cap in place, fp32
  Matrix x;
  float cap;
  int32_t rows;
  int32_t n;
};

// The id of the largest value of each row, the smallest id among equals. Value i has id i, or with
// `ids`, whose negative entries are padding and never win, ids[i]. With `chosen` too, values come
// in blocks, and block b of row t belongs to block chosen[t][b] of `ids` (a head of which only the
// likeliest clusters are computed).
// probability (may be null): what softmax over the values of the row gives the largest; ids then
// have no padding.
struct ArgmaxArgs {
  Matrix x;  // fp32
  const int32_t* ids;
  const int32_t* chosen;
  int32_t block;
  int32_t* out;
  float* probability;
  int32_t rows;
  int32_t n;
};

// out[t][id] = the value of x that belongs to it, -inf where there is none. Row t of x has the
// values of `count` blocks, in order: block chosen[t][c] has the ids at ids[chosen[t][c] * block].
struct ScatterArgs {
  Matrix x;  // fp32 [rows, count * block]
  const int32_t* ids;
  const int32_t* chosen;  // [rows, count]
  int32_t block;
  int32_t count;
  Matrix out;  // fp32 [rows, n]
  int32_t rows;
  int32_t n;
};

// The `count` largest of n scores of each row, largest first, the smaller index first among equals.
// weights (may be null): softmax over all n, restricted to the chosen, made to sum to one, times
// per_expert[index] if given.
struct TopArgs {
  Matrix x;        // fp32
  int32_t* ids;    // [rows, count]
  float* weights;  // [rows, count]
  const float* per_expert;
  int32_t count;
  int32_t rows;
  int32_t n;
};

struct GroupPairsArgs {
  const int32_t* ids;  // [pairs] expert of each pair, 0 <= id < n_experts
  PairGroups groups;   // start has n_experts + 1 elements, expert n_experts
  int32_t pairs;
  int32_t n_experts;
};

struct CombineArgs {  // out[t] = sum over a, in order, of weights[t][a] * x[t * count + a]
  Matrix x;
  const float* weights;
  Matrix out;
  int32_t count;
  int32_t rows;
  int32_t k;
};

struct ReadArgs {  // nothing but loads: what a memory-bound kernel could reach at most
  const uint8_t* data;
  int64_t bytes;
  int32_t* sums;  // [worker.count], so that the loads are not optimised away
};

}  // namespace outdraft
