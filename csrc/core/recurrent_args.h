// Arguments of the kernels of recurrent layers (gated delta rule, Mamba 2). As in args.h, index arrays are
// read when a kernel runs.
#pragma once

#include "core/types.h"

namespace outdraft {

// Where states come from and go to. Rows of a sequence lie together, in order. The first of them
// continues from state read[t] (negative: zeros), each other from the row before it. The state
// after row t is put into state write[t] unless that is negative; no row reads what another of the
// call writes.
struct StateRows {
  const int32_t* sequence;  // [rows]
  const int32_t* read;
  const int32_t* write;
  int32_t rows;
};

// out[t] = silu(bias + sum over w of weight[w] * x[t - width + 1 + w]), each channel by itself; the
// inputs before the call's are in `state`, [states, width - 1, channels], oldest first.
struct ConvArgs {
  Matrix x;             // [rows, channels]
  Matrix out;           // the same shape
  const float* weight;  // [width, channels]
  const float* bias;    // [channels], or null
  float* state;
  StateRows rows;
  int32_t channels;  // a multiple of 16
  int32_t width;     // at most kMaxConvWidth
};

constexpr int kMaxConvWidth = 8;

// The gated delta rule: with k and q of unit length, S <- exp(g) S; S <- S + k (beta (v - k S)); the
// output is q S / sqrt(k_dim). g = decay[h] * softplus(a + bias[h]), beta = sigmoid(b).
struct DeltaArgs {
  Matrix qkv;          // [rows, (2 n_k_heads k_dim) + n_v_heads v_dim]
  Matrix a;            // [rows, n_v_heads]
  Matrix b;            // [rows, n_v_heads]
  Matrix out;          // [rows, n_v_heads * v_dim]
  const float* decay;  // [n_v_heads], negative
  const float* bias;   // [n_v_heads]
  float* state;        // [states, n_v_heads, k_dim, v_dim]
  StateRows rows;
  int32_t n_k_heads;
  int32_t n_v_heads;  // a multiple of n_k_heads
  int32_t k_dim;      // multiples of 16, k_dim * v_dim + 2 k_dim floats fit into the scratch
  int32_t v_dim;
};

// Mamba 2: S <- exp(d decay[h]) S + b (d x), d = softplus(dt + bias[h]) within the limits; the output
// is c S + skip[h] x. Heads h of a group g = h / (n_heads / n_groups) share b and c.
struct ScanArgs {
  Matrix x;            // [rows, (n_heads * dim) + 2 * n_groups * n_state]: x, b, c
  Matrix dt;           // [rows, n_heads]
  Matrix out;          // [rows, n_heads * dim]
  const float* decay;  // [n_heads], negative
  const float* bias;   // [n_heads]
  const float* skip;   // [n_heads]
  float least_step;
  float most_step;
  float* state;  // [states, n_heads, n_state, dim]
  StateRows rows;
  int32_t n_heads;  // a multiple of n_groups
  int32_t n_groups;
  int32_t n_state;  // multiples of 16, n_state * dim + 2 n_state floats fit into the scratch
  int32_t dim;
};

// out = weight * y / sqrt(mean(y^2) + eps) over each group of dim numbers of y = x * silu(gate).
struct GroupNormArgs {
  Matrix x;             // [rows, n_groups * dim]
  Matrix gate;          // the same shape
  Matrix out;           // the same shape
  const float* weight;  // [n_groups * dim]
  float eps;
  int32_t rows;
  int32_t n_groups;
  int32_t dim;  // a multiple of 16, a group fits into the scratch
};

// The `count` best of n experts of each row by sigmoid(x) + bias, the best first, the smaller index
// first among equals, from the top_groups groups with the largest sum of their two best. Weights are
// sigmoid(x), made to sum to one if `normalise`, times scale.
struct SigmoidTopArgs {
  Matrix x;           // fp32 [rows, n]
  const float* bias;  // [n]
  int32_t* ids;       // [rows, count]
  float* weights;     // [rows, count]
  float scale;
  bool normalise;
  int32_t count;
  int32_t n_groups;  // divides n
  int32_t top_groups;
  int32_t rows;
  int32_t n;  // at most kMaxExperts
};

constexpr int32_t kMaxExperts = kScratchBytes / 16;

// out = weight * x / sqrt(mean(x^2) + eps) * silu(gate), over each head.
struct GatedNormArgs {
  Matrix x;     // [rows, n_heads * dim]
  Matrix gate;  // the same shape
  Matrix out;   // the same shape
  const float* weight;
  float eps;
  int32_t rows;
  int32_t n_heads;
  int32_t dim;  // a multiple of 16
};

}  // namespace outdraft
