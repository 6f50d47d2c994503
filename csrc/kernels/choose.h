// Choosing: the largest value of a row, the largest few, and which expert gets which rows.
//
// Comparisons are exact, so no order of work can change a result; ties go to the smaller id.
#pragma once

#include "core/args.h"
#include "kernels/heads.h"
#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

struct Best {
  float value;
  int32_t id;
};

static inline bool better(float value, int32_t id, const Best& best) {
  return value > best.value || (value == best.value && id < best.id);
}

static inline Best largest_in_order(const float* x, int64_t n) {
  int32_t lane_ids[16];
  for (int32_t i = 0; i < 16; ++i) lane_ids[i] = i;
  I id = load_i(lane_ids), best_id = id;
  F best = set1(-__builtin_inff());
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    keep_greater(load(x + i), id, best, best_id);
    id = add_i(id, set1_i(16));
  }
  float values[16];
  store(values, best);
  store_i(lane_ids, best_id);
  Best all = {values[0], lane_ids[0]};
  for (int lane = 1; lane < 16; ++lane)
    if (better(values[lane], lane_ids[lane], all)) all = {values[lane], lane_ids[lane]};
  for (; i < n; ++i)
    if (better(x[i], static_cast<int32_t>(i), all)) all = {x[i], static_cast<int32_t>(i)};
  return all;
}

static inline Best largest_with_ids(const ArgmaxArgs& a, int64_t row, const float* x) {
  Best best = {-__builtin_inff(), INT32_MAX};
  for (int64_t begin = 0; begin < a.n; begin += a.block) {
    const int64_t block =
        a.chosen ? a.chosen[row * (a.n / a.block) + begin / a.block] : begin / a.block;
    const int32_t* ids = a.ids + block * a.block;
    for (int64_t i = 0; i < a.block; ++i)
      if (ids[i] >= 0 && better(x[begin + i], ids[i], best)) best = {x[begin + i], ids[i]};
  }
  return best;
}

static void argmax(const ArgmaxArgs& a, const Worker& worker) {
  const Range rows = share(a.rows, worker);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const auto* x = reinterpret_cast<const float*>(at(a.x, row, 0));
    const Best best = a.ids ? largest_with_ids(a, row, x) : largest_in_order(x, a.n);
    a.out[row] = best.id;
    if (a.probability) a.probability[row] = probability_of_largest(x, a.n, best.value);
  }
}

// Softmax over all scores, of the chosen only, made to sum to one: what is left of the softmax's
// own sum cancels, so only the chosen are needed.
static inline void chosen_weights(const TopArgs& a, const float* scores, const int32_t* ids,
                                  float* weights) {
  float total = 0.0f;
  for (int32_t i = 0; i < a.count; ++i) {
    float all[16];
    store(all, exponential(set1(scores[ids[i]] - scores[ids[0]])));
    weights[i] = all[0];
    total += weights[i];
  }
  for (int32_t i = 0; i < a.count; ++i) {
    weights[i] /= total;
    if (a.per_expert) weights[i] *= a.per_expert[ids[i]];
  }
}

// The `count` largest of n numbers into ids, largest first, the smaller index first among equals.
static inline void largest_few(const float* x, int32_t n, int32_t count, int32_t* ids) {
  int32_t found = 0;
  for (int32_t i = 0; i < n; ++i) {
    if (found == count && !(x[i] > x[ids[found - 1]])) continue;
    int32_t place = found < count ? found++ : found - 1;
    for (; place > 0 && x[i] > x[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = i;
  }
}

static void top(const TopArgs& a, const Worker& worker) {
  const Range rows = share(a.rows, worker);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const auto* x = reinterpret_cast<const float*>(at(a.x, row, 0));
    int32_t* ids = a.ids + row * a.count;
    largest_few(x, a.n, a.count, ids);
    if (a.weights) chosen_weights(a, x, ids, a.weights + row * a.count);
  }
}

static void group_pairs(const GroupPairsArgs& a, const Worker&) {
  // A counting sort whose counts live in `start`; experts without pairs are squeezed out at the
  // end.
  int32_t* start = a.groups.start;
  for (int32_t e = 0; e <= a.n_experts; ++e) start[e] = 0;
  for (int32_t p = 0; p < a.pairs; ++p) ++start[a.ids[p]];
  int32_t begin = 0;
  for (int32_t e = 0; e < a.n_experts; ++e) {
    begin += start[e];
    start[e] = begin;  // end of expert e; moves down to its begin below
  }
  for (int32_t p = a.pairs - 1; p >= 0; --p) a.groups.pair[--start[a.ids[p]]] = p;
  start[a.n_experts] = a.pairs;
  int32_t hit = 0;
  for (int32_t e = 0; e < a.n_experts; ++e) {
    if (start[e] == start[e + 1]) continue;
    a.groups.expert[hit] = e;
    start[hit++] = start[e];
  }
  start[hit] = a.pairs;
  *a.groups.n_hit = hit;
}

}  // namespace outdraft::OUTDRAFT_ISA
