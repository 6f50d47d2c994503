// What a head is asked beside its largest score: how likely that one is, and scores of a few blocks
// of the vocabulary as scores of all of it.
#pragma once

#include "core/args.h"
#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

// What softmax gives the largest of n values, `limit`: 1 / sum(e^(x - limit)).
static inline float probability_of_largest(const float* x, int64_t n, float limit) {
  const F top = set1(limit);
  F total = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) total = add(total, exponential(sub(load(x + i), top)));
  if (const int rest = static_cast<int>(n - i); rest > 0)
    total = add(total,
                keep_lanes(exponential(sub(load_n(x + i, rest), top)), 0, rest - 1, zero()));
  return 1.0f / sum(total);
}

// Every worker has a range of the vocabulary: it writes nothing else, whatever the blocks hold.
static void scatter_blocks(const ScatterArgs& a, const Worker& worker) {
  const Range own = share(a.n, worker);
  const F nothing = set1(-__builtin_inff());
  for (int64_t row = 0; row < a.rows; ++row) {
    auto* out = reinterpret_cast<float*>(at(a.out, row, 0));
    int64_t i = own.begin;
    for (; i + 16 <= own.end; i += 16) store(out + i, nothing);
    store_n(out + i, nothing, static_cast<int>(own.end - i));
    const auto* x = reinterpret_cast<const float*>(at(a.x, row, 0));
    for (int64_t c = 0; c < a.count; ++c, x += a.block) {
      const int32_t* ids = a.ids + static_cast<int64_t>(a.chosen[row * a.count + c]) * a.block;
      for (int64_t j = 0; j < a.block; ++j)
        if (ids[j] >= own.begin && ids[j] < own.end) out[ids[j]] = x[j];
    }
  }
}

}  // namespace outdraft::OUTDRAFT_ISA
