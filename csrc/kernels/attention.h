// Softmax attention over paged keys and values, page by page with a running maximum.
//
// Pages and parts of the context start at multiples of kPageSlots and kPartSlots of the absolute
// key position. Each (row, head) has its own maximum, sum and accumulators for each part, and parts
// are added up in order: the order of its adds depends only on which keys it sees, not on who
// computes what. Heads that share keys are computed together, so that a page is read once.
#pragma once

#include "core/args.h"
#include "kernels/rows.h"

namespace outdraft::OUTDRAFT_ISA {

constexpr int kHeadBlock = 4;       // query heads of one row whose scores are computed together
constexpr int64_t kMaxBlocks = 16;  // blocks of heads that go through the pages together
constexpr int64_t kPartPages = 4;
constexpr int64_t kPartSlots = kPartPages * kPageSlots;
constexpr int64_t kUnitsPerWorker = 4;  // enough for an even share
constexpr float kHidden = -3.0e38f;

// Query heads first..first + n - 1 of one row, all reading the same keys, with their state so far.
struct HeadState {
  int64_t row;
  int64_t first;
  int64_t n;
  float highest[kHeadBlock];  // running maximum of the scores
  float total[kHeadBlock];    // sum of exp(score - highest)
  float* q;                   // [n, dim], scaled
  float* mixed;               // [n, dim]: sum of exp(score - highest) * value
};

// One page of one key/value head.
struct PageView {
  const std::byte* k;
  const std::byte* v;
  const float* k_scales;
  const float* v_scales;
};

static inline F load_key(const std::byte* p, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return load(reinterpret_cast<const float*>(p));
    case DType::bf16:
      return load_bf16(reinterpret_cast<const uint16_t*>(p));
    case DType::i8:
      return load_i8(reinterpret_cast<const int8_t*>(p));
  }
  return zero();
}

// scores[r][slot] = q_r . k_slot for slots first..last; the last four are computed with repeats.
template <int R, DType kType>
static inline void page_scores(const HeadState& s, const PageView& page, int64_t dim, int first,
                               int last, float (&scores)[R][kPageSlots]) {
  const int64_t size = element_bytes(kType);
  for (int slot = first; slot <= last; slot += 4) {
    const std::byte* keys[4];
    for (int i = 0; i < 4; ++i) keys[i] = page.k + least(slot + i, last) * dim * size;
    F acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) acc[r][i] = zero();
    for (int64_t d = 0; d < dim; d += 16) {
      F key[4];
      for (int i = 0; i < 4; ++i) key[i] = load_key(keys[i] + d * size, kType);
      for (int r = 0; r < R; ++r) {
        const F q = load(s.q + r * dim + d);
        for (int i = 0; i < 4; ++i) acc[r][i] = fma(q, key[i], acc[r][i]);
      }
    }
    float four[4];
    for (int r = 0; r < R; ++r) {
      sum4(acc[r], four);
      for (int i = 0; i < 4 && slot + i <= last; ++i) scores[r][slot + i] = four[i];
    }
  }
}

// Turns a head's scores into exp(score - highest) and brings its state up to date; returns the
// factor that earlier sums are to be multiplied with.
static inline float page_weights(HeadState& s, int r, const PageView& page, int first, int last,
                                 float* scores) {
  F lanes[kPageSlots / 16];
  F widest = set1(s.highest[r]);
  for (int v = 0; v < kPageSlots / 16; ++v) {
    F x = load(scores + 16 * v);
    if (page.k_scales) x = mul(x, load(page.k_scales + 16 * v));
    const int low = first > 16 * v ? first - 16 * v : 0;
    const int high = last < 16 * v + 15 ? last - 16 * v : 15;
    lanes[v] = low <= high ? keep_lanes(x, low, high, set1(kHidden)) : set1(kHidden);
    widest = maximum(widest, lanes[v]);
  }
  const float highest_now = highest(widest);
  F total = zero();
  for (int v = 0; v < kPageSlots / 16; ++v) {
    const int low = first > 16 * v ? first - 16 * v : 0;
    const int high = last < 16 * v + 15 ? last - 16 * v : 15;
    F weight = exponential(sub(lanes[v], set1(highest_now)));
    weight = low <= high ? keep_lanes(weight, low, high, zero()) : zero();
    total = add(total, weight);
    if (page.v_scales) weight = mul(weight, load(page.v_scales + 16 * v));
    store(scores + 16 * v, weight);
  }
  float all[16];
  store(all, exponential(set1(s.highest[r] - highest_now)));
  s.highest[r] = highest_now;
  s.total[r] = s.total[r] * all[0] + sum(total);
  return all[0];
}

// mixed_r = mixed_r * factor_r + sum over slots of weight_r[slot] * v_slot, for 16 V dimensions.
template <int R, int V, DType kType>
static inline void mix_columns(const HeadState& s, const PageView& page, int64_t dim, int64_t d,
                               int first, int last, const float (&weights)[R][kPageSlots],
                               const float* factors) {
  const int64_t size = element_bytes(kType);
  F acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      acc[r][v] = mul(load(s.mixed + r * dim + d + 16 * v), set1(factors[r]));
  for (int slot = first; slot <= last; ++slot) {
    const std::byte* value = page.v + (slot * dim + d) * size;
    F lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = load_key(value + 16 * v * size, kType);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = fma(set1(weights[r][slot]), lanes[v], acc[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(s.mixed + r * dim + d + 16 * v, acc[r][v]);
}

template <int R, DType kType>
static void attend_page(HeadState& s, const PageView& page, int64_t dim, int first, int last) {
  float scores[R][kPageSlots] = {};
  float factors[R];
  page_scores<R, kType>(s, page, dim, first, last, scores);
  for (int r = 0; r < R; ++r) factors[r] = page_weights(s, r, page, first, last, scores[r]);
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64)
    mix_columns<R, 4, kType>(s, page, dim, d, first, last, scores, factors);
  for (; d < dim; d += 16) mix_columns<R, 1, kType>(s, page, dim, d, first, last, scores, factors);
}

template <DType kType>
static void attend_page_heads(HeadState& s, const PageView& page, int64_t dim, int first,
                              int last) {
  switch (s.n) {
    case 1:
      return attend_page<1, kType>(s, page, dim, first, last);
    case 2:
      return attend_page<2, kType>(s, page, dim, first, last);
    case 3:
      return attend_page<3, kType>(s, page, dim, first, last);
    case 4:
      return attend_page<4, kType>(s, page, dim, first, last);
  }
}

static void attend_any(DType dtype, HeadState& s, const PageView& page, int64_t dim, int first,
                       int last) {
  switch (dtype) {
    case DType::f32:
      return attend_page_heads<DType::f32>(s, page, dim, first, last);
    case DType::bf16:
      return attend_page_heads<DType::bf16>(s, page, dim, first, last);
    case DType::i8:
      return attend_page_heads<DType::i8>(s, page, dim, first, last);
  }
}

static PageView page_view(const KvPages& kv, int64_t page, int64_t head) {
  const int64_t slots = (page * kv.n_kv_heads + head) * kPageSlots;
  const int64_t bytes = slots * kv.head_dim * element_bytes(kv.dtype);
  const bool scaled = kv.dtype == DType::i8;
  return {static_cast<const std::byte*>(kv.k) + bytes, static_cast<const std::byte*>(kv.v) + bytes,
          scaled ? kv.k_scales + slots : nullptr, scaled ? kv.v_scales + slots : nullptr};
}

// Blocks begin..begin + n - 1 of a key/value head, counted row by row, all of one sequence, and the
// parts of the context that any of them sees.
struct Unit {
  int64_t kv_head;
  int64_t begin;
  int64_t n;
  int64_t first_part;
  int64_t last_part;
};

static inline int64_t blocks_per_row(const AttentionArgs& a) {
  return (a.n_heads / a.kv.n_kv_heads + kHeadBlock - 1) / kHeadBlock;
}

// Calls visit for all work in units of up to `limit` blocks.
template <class Visit>
static inline void each_unit(const AttentionArgs& a, int64_t limit, Visit visit) {
  const int64_t per_row = blocks_per_row(a), blocks = per_row * a.rows;
  for (int64_t kv_head = 0; kv_head < a.kv.n_kv_heads; ++kv_head) {
    for (int64_t begin = 0; begin < blocks;) {
      const int64_t first_row = begin / per_row;
      int64_t lo = a.lo[first_row], hi = a.hi[first_row], n = 0;
      for (; n < limit && begin + n < blocks; ++n) {
        const int64_t row = (begin + n) / per_row;
        if (a.sequence[row] != a.sequence[first_row]) break;
        lo = least(lo, a.lo[row]);
        hi = most(hi, a.hi[row]);
      }
      visit(Unit{kv_head, begin, n, lo / kPartSlots, hi / kPartSlots});
      begin += n;
    }
  }
}

// Sums over some keys: of exp(score - highest), and of that times the value.
struct Sums {
  float& highest;
  float& total;
  float* mixed;
};

// into += part. Parts are added in the order of their positions, wherever they were computed.
static inline void add_part(const Sums& into, const Sums& part, int64_t dim) {
  const float now = into.highest > part.highest ? into.highest : part.highest;
  float factors[16] = {into.highest - now, part.highest - now};
  store(factors, exponential(load(factors)));
  into.highest = now;
  into.total = into.total * factors[0] + part.total * factors[1];
  const F old = set1(factors[0]), added = set1(factors[1]);
  for (int64_t d = 0; d < dim; d += 16)
    store(into.mixed + d,
          fma(load(into.mixed + d), old, mul(load(part.mixed + d), added)));
}

static inline void clear(const Sums& s, int64_t dim) {
  s.highest = kHidden;
  s.total = 0.0f;
  for (int64_t d = 0; d < dim; d += 16) store(s.mixed + d, zero());
}

static inline void write_row(const AttentionArgs& a, const HeadState& s, int64_t r, const Sums& all) {
  const int64_t dim = a.kv.head_dim;
  for (int64_t d = 0; d < dim; d += 16)
    store_at(a.out, s.row, (s.first + r) * dim + d,
             div(load(all.mixed + d), set1(all.total)), 16);
}

static inline Sums part_sums(HeadState& s, int64_t r, int64_t dim) {
  return {s.highest[r], s.total[r], s.mixed + r * dim};
}

static inline bool sees(const AttentionArgs& a, int64_t row, int64_t part) {
  return a.lo[row] / kPartSlots <= part && part <= a.hi[row] / kPartSlots;
}

constexpr int64_t kStateArrays = 3;  // of a head in scratch: query, sums of a part, sums of all

static inline void take_blocks(const AttentionArgs& a, const Unit& unit, const Worker& worker,
                               HeadState* blocks) {
  const int64_t dim = a.kv.head_dim, group = a.n_heads / a.kv.n_kv_heads;
  const int64_t per_row = blocks_per_row(a);
  auto* scratch = reinterpret_cast<float*>(worker.scratch);
  for (int64_t b = 0; b < unit.n; ++b) {
    HeadState& s = blocks[b];
    s.row = (unit.begin + b) / per_row;
    const int64_t within = (unit.begin + b) % per_row * kHeadBlock;
    s.first = unit.kv_head * group + within;
    s.n = least(kHeadBlock, group - within);
    s.q = scratch + b * kStateArrays * kHeadBlock * dim;
    s.mixed = s.q + kHeadBlock * dim;
    for (int64_t i = 0; i < s.n * dim; i += 16) {
      const F q = load_at(a.q, s.row, s.first * dim + i, 16);
      store(s.q + i, mul(q, set1(a.scale)));
    }
  }
}

// Leaves in each block that sees some of a part's keys its sums over them.
static void attend_part(const AttentionArgs& a, const Unit& unit, HeadState* blocks,
                        int64_t part) {
  const int64_t dim = a.kv.head_dim;
  const int32_t sequence = a.sequence[blocks[0].row];
  int64_t lo = INT64_MAX, hi = -1;
  for (int64_t b = 0; b < unit.n; ++b) {
    for (int64_t r = 0; r < blocks[b].n; ++r) clear(part_sums(blocks[b], r, dim), dim);
    lo = least(lo, a.lo[blocks[b].row]);
    hi = most(hi, a.hi[blocks[b].row]);
  }
  const int64_t begin = most(part * kPartPages, lo / kPageSlots);
  const int64_t end = least((part + 1) * kPartPages - 1, hi / kPageSlots);
  for (int64_t index = begin; index <= end; ++index) {
    const int32_t id = a.table[sequence * a.table_stride + index - a.first_page[sequence]];
    const PageView page = page_view(a.kv, id, unit.kv_head);
    const int64_t base = index * kPageSlots;
    for (int64_t b = 0; b < unit.n; ++b) {
      const int64_t first = most(a.lo[blocks[b].row] - base, 0);
      const int64_t last = least(a.hi[blocks[b].row] - base, kPageSlots - 1);
      if (first <= last)
        attend_any(a.kv.dtype, blocks[b], page, dim, static_cast<int>(first),
                   static_cast<int>(last));
    }
  }
}

// One worker goes through all parts of a unit.
static void attend_whole(const AttentionArgs& a, const Unit& unit, const Worker& worker) {
  const int64_t dim = a.kv.head_dim;
  HeadState blocks[kMaxBlocks];
  float highest[kMaxBlocks][kHeadBlock], total[kMaxBlocks][kHeadBlock];
  take_blocks(a, unit, worker, blocks);
  const auto sums = [&](int64_t b, int64_t r) {
    return Sums{highest[b][r], total[b][r], blocks[b].mixed + (kHeadBlock + r) * dim};
  };
  for (int64_t b = 0; b < unit.n; ++b)
    for (int64_t r = 0; r < blocks[b].n; ++r) clear(sums(b, r), dim);
  for (int64_t part = unit.first_part; part <= unit.last_part; ++part) {
    attend_part(a, unit, blocks, part);
    for (int64_t b = 0; b < unit.n; ++b)
      for (int64_t r = 0; r < blocks[b].n; ++r)
        if (sees(a, blocks[b].row, part)) add_part(sums(b, r), part_sums(blocks[b], r, dim), dim);
  }
  for (int64_t b = 0; b < unit.n; ++b)
    for (int64_t r = 0; r < blocks[b].n; ++r) write_row(a, blocks[b], r, sums(b, r));
}

// Where workers leave the sums of single parts for whoever finishes a unit's last one.
struct PartStore {
  std::byte* shared;
  int64_t dim;

  int64_t floats() const { return 16 + dim; }  // of a head: highest, total, padding, sums

  Sums at(int64_t place, int64_t r) const {
    auto* p = reinterpret_cast<float*>(shared + kCounterBytes) + (place * kHeadBlock + r) * floats();
    return {p[0], p[1], p + 16};
  }
  int64_t room() const {
    return (kSharedBytes - kCounterBytes) / (kHeadBlock * floats() * 4);
  }
  int32_t* counter(int64_t unit) const { return reinterpret_cast<int32_t*>(shared) + unit; }
};

// One part of a unit; the worker that finishes last adds up all parts. `place` is the unit's first
// in the store.
static void attend_and_add(const AttentionArgs& a, const Unit& unit, int64_t part,
                           const PartStore& parts, int64_t place, int32_t* counter,
                           const Worker& worker) {
  const int64_t dim = a.kv.head_dim, n_parts = unit.last_part - unit.first_part + 1;
  HeadState blocks[kMaxBlocks];
  take_blocks(a, unit, worker, blocks);
  attend_part(a, unit, blocks, part);
  for (int64_t b = 0; b < unit.n; ++b)
    for (int64_t r = 0; r < blocks[b].n; ++r) {
      const Sums from = part_sums(blocks[b], r, dim);
      const Sums to = parts.at(place + b * n_parts + part - unit.first_part, r);
      to.highest = from.highest;
      to.total = from.total;
      for (int64_t d = 0; d < dim; d += 16) store(to.mixed + d, load(from.mixed + d));
    }
  if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) < n_parts) return;
  __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
  for (int64_t b = 0; b < unit.n; ++b)
    for (int64_t r = 0; r < blocks[b].n; ++r) {
      const Sums all = part_sums(blocks[b], r, dim);
      clear(all, dim);
      for (int64_t p = unit.first_part; p <= unit.last_part; ++p)
        if (sees(a, blocks[b].row, p))
          add_part(all, parts.at(place + b * n_parts + p - unit.first_part, r), dim);
      write_row(a, blocks[b], r, all);
    }
}

// With few units, workers share their parts; else each takes whole units. Both give the same bits.
static void attention(const AttentionArgs& a, const Worker& worker) {
  const int64_t dim = a.kv.head_dim;
  const int64_t limit = least(kMaxBlocks, kScratchBytes / (kStateArrays * kHeadBlock * dim * 4));
  const PartStore parts{worker.shared, dim};
  int64_t units = 0, places = 0;
  each_unit(a, limit, [&](const Unit& unit) {
    ++units;
    places += unit.n * (unit.last_part - unit.first_part + 1);
  });
  int64_t turn = 0;
  if (worker.count > 1 && units < kUnitsPerWorker * worker.count && places <= parts.room()) {
    int64_t index = 0, place = 0;
    each_unit(a, limit, [&](const Unit& unit) {
      for (int64_t part = unit.first_part; part <= unit.last_part; ++part)
        if (turn++ % worker.count == worker.index)
          attend_and_add(a, unit, part, parts, place, parts.counter(index), worker);
      ++index;
      place += unit.n * (unit.last_part - unit.first_part + 1);
    });
    return;
  }
  const int64_t fair = blocks_per_row(a) * a.rows * a.kv.n_kv_heads / worker.count;
  each_unit(a, least(limit, most(1, fair)), [&](const Unit& unit) {
    if (turn++ % worker.count == worker.index) attend_whole(a, unit, worker);
  });
}

}  // namespace outdraft::OUTDRAFT_ISA
