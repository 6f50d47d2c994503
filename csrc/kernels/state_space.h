// Mamba 2 layers: recurrence and gated group norm, row after row, so that a row's bits do not depend
// on how rows are grouped into calls; and experts chosen by sigmoids.
#pragma once

#include <cmath>
#include <cstring>

#include "core/recurrent_args.h"
#include "kernels/choose.h"
#include "kernels/norms.h"
#include "kernels/recurrent.h"

namespace outdraft::OUTDRAFT_ISA {

constexpr int kScanBlocks = 4;  // of 16 columns, which go through the state side by side

// One row of one head over `blocks` times 16 columns of the state: `to` may be `from`, and a `from`
// of null is zeros. Each column is by itself, so its bits do not depend on the blocks.
template <int blocks>
static inline void scan_columns(const ScanArgs& a, int64_t row, int64_t column, const float* from,
                                float* to, const float* in, const float* out, float step, F kept,
                                F skip) {
  F x[blocks], moved[blocks], y[blocks];
  for (int j = 0; j < blocks; ++j) {
    x[j] = load_at(a.x, row, column + 16 * j, 16);
    moved[j] = mul(x[j], set1(step));
    y[j] = zero();
  }
  for (int64_t i = 0; i < a.n_state; ++i) {
    const F b = set1(in[i]), c = set1(out[i]);
    for (int j = 0; j < blocks; ++j) {
      const int64_t place = i * a.dim + 16 * j;
      const F before = from ? mul(kept, load(from + place)) : zero();
      const F now = fma(b, moved[j], before);
      store(to + place, now);
      y[j] = fma(c, now, y[j]);
    }
  }
  for (int j = 0; j < blocks; ++j)
    store_at(a.out, row, column + 16 * j, fma(skip, x[j], y[j]), 16);
}

static inline void scan_row(const ScanArgs& a, int64_t row, int64_t head, const float* from,
                            float* to, float* in, float* out) {
  const int64_t group = head / (a.n_heads / a.n_groups);
  const int64_t leads_in = static_cast<int64_t>(a.n_heads) * a.dim + group * a.n_state;
  const int64_t leads_out = leads_in + static_cast<int64_t>(a.n_groups) * a.n_state;
  for (int64_t i = 0; i < a.n_state; i += 16) {
    store(in + i, load_at(a.x, row, leads_in + i, 16));
    store(out + i, load_at(a.x, row, leads_out + i, 16));
  }
  float step = softplus(element(a.dt, row, head) + a.bias[head]);
  step = step < a.least_step ? a.least_step : step > a.most_step ? a.most_step : step;
  const F kept = set1(std::exp(step * a.decay[head])), skip = set1(a.skip[head]);
  const int64_t first = head * a.dim;
  int64_t j = 0;
  for (; j + 16 * kScanBlocks <= a.dim; j += 16 * kScanBlocks)
    scan_columns<kScanBlocks>(a, row, first + j, from ? from + j : nullptr, to + j, in, out, step,
                              kept, skip);
  for (; j < a.dim; j += 16)
    scan_columns<1>(a, row, first + j, from ? from + j : nullptr, to + j, in, out, step, kept,
                    skip);
}

// A row's state is computed into the place where it is kept, or into the scratch if it is not.
static void scan(const ScanArgs& a, const Worker& worker) {
  const int64_t size = static_cast<int64_t>(a.n_state) * a.dim;
  auto* spare = reinterpret_cast<float*>(worker.scratch);
  float *in = spare + size, *out = in + a.n_state;
  const Range heads = share(a.n_heads, worker);
  for (int64_t head = heads.begin; head < heads.end; ++head) {
    const float* state = nullptr;
    for (int64_t t = 0; t < a.rows.rows; ++t) {
      if (begins(a.rows, t)) {
        const int64_t from = a.rows.read[t];
        state = from < 0 ? nullptr : a.state + (from * a.n_heads + head) * size;
      }
      const int64_t kept = a.rows.write[t];
      float* next = kept < 0 ? spare : a.state + (kept * a.n_heads + head) * size;
      scan_row(a, t, head, state, next, in, out);
      state = next;
    }
  }
}

static void group_norm(const GroupNormArgs& a, const Worker& worker) {
  auto* y = reinterpret_cast<float*>(worker.scratch);
  const Range groups = share(static_cast<int64_t>(a.rows) * a.n_groups, worker);
  for (int64_t item = groups.begin; item < groups.end; ++item) {
    const int64_t row = item / a.n_groups, first = item % a.n_groups * a.dim;
    for (int64_t i = 0; i < a.dim; i += 16) {
      const F open = silu(load_at(a.gate, row, first + i, 16));
      store(y + i, mul(load_at(a.x, row, first + i, 16), open));
    }
    const F inverse = set1(inverse_rms(y, a.dim, a.eps));
    for (int64_t i = 0; i < a.dim; i += 16)
      store_at(a.out, row, first + i, mul(mul(load(y + i), inverse), load(a.weight + first + i)),
               16);
  }
}

// Experts outside of the best groups get -inf. `sums` and `order` have room for n_groups.
static inline void hide_groups(const SigmoidTopArgs& a, float* choice, float* sums,
                               int32_t* order) {
  const int32_t size = a.n / a.n_groups;
  for (int32_t g = 0; g < a.n_groups; ++g) {
    int32_t best[2];
    largest_few(choice + g * size, size, 2, best);
    sums[g] = choice[g * size + best[0]] + choice[g * size + best[1]];
  }
  largest_few(sums, a.n_groups, a.n_groups, order);
  for (int32_t place = a.top_groups; place < a.n_groups; ++place)
    for (int32_t i = 0; i < size; ++i) choice[order[place] * size + i] = -__builtin_inff();
}

static void sigmoid_top(const SigmoidTopArgs& a, const Worker& worker) {
  auto* open = reinterpret_cast<float*>(worker.scratch);
  float *choice = open + a.n, *sums = choice + a.n;
  auto* order = reinterpret_cast<int32_t*>(sums + a.n);
  const Range rows = share(a.rows, worker);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < a.n; i += 16) {
      const int n = static_cast<int>(least(a.n - i, 16));
      const F y = sigmoid(load_at(a.x, row, i, n));
      store_n(open + i, y, n);
      store_n(choice + i, add(y, load_n(a.bias + i, n)), n);
    }
    if (a.n_groups > 1) hide_groups(a, choice, sums, order);
    int32_t* ids = a.ids + row * a.count;
    float* weights = a.weights + row * a.count;
    largest_few(choice, a.n, a.count, ids);
    float total = 1e-20f;
    for (int32_t i = 0; i < a.count; ++i) total += open[ids[i]];
    for (int32_t i = 0; i < a.count; ++i)
      weights[i] = (a.normalise ? open[ids[i]] / total : open[ids[i]]) * a.scale;
  }
}

}  // namespace outdraft::OUTDRAFT_ISA
