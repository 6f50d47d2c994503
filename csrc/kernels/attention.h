// Softmax attention over paged keys and values, page by page with a running maximum.
//
// Pages and parts of the context start at multiples of kPageSlots and kPartSlots of the absolute
// key position. Each (row, head) has its own maximum, sum and accumulators for each part, and parts
// are added up in order: the order of its adds depends only on which keys it sees, not on who
// computes what. Heads that share keys are computed together, so that a page is read once.
#pragma once

#include "kernels/attend_page.h"
#ifdef OUTDRAFT_TILES
#include "kernels/attend_tiles.h"
#endif

namespace outdraft::OUTDRAFT_ISA {

constexpr int64_t kMaxBlocks = 16;  // blocks of heads that go through the pages together
constexpr int64_t kUnitsPerWorker = 4;  // enough for an even share

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

static inline int64_t state_bytes(int64_t dim) { return kStateArrays * kHeadBlock * dim * 4; }

// Most blocks of a unit.
static inline int64_t block_limit(const KvPages& kv) {
  int64_t room = kScratchBytes, each = state_bytes(kv.head_dim);
#ifdef OUTDRAFT_TILES
  if (on_tiles(kv)) {
    room -= TileScratch::shared_bytes(kv.head_dim);
    each += TileScratch::block_bytes(kv.head_dim);
  }
#endif
  return least(kMaxBlocks, room / each);
}

#ifdef OUTDRAFT_TILES
// Behind the states of all blocks.
static inline TileScratch tile_scratch(const AttentionArgs& a, const Worker& worker) {
  const int64_t dim = a.kv.head_dim, limit = block_limit(a.kv);
  return {worker.scratch + limit * state_bytes(dim), limit, dim};
}
#endif

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
#ifdef OUTDRAFT_TILES
    if (on_tiles(a.kv)) pack_queries(s, b, dim, tile_scratch(a, worker));
#endif
  }
}

#ifdef OUTDRAFT_TILES
static void attend_part_by_tiles(const AttentionArgs& a, const Unit& unit, HeadState* blocks,
                                 int64_t part, const Worker& worker) {
  const int32_t sequence = a.sequence[blocks[0].row];
  const int64_t base = part * kPartSlots;
  int lo[kMaxBlocks], hi[kMaxBlocks];
  int first = kPartSlots, last = -1;
  for (int64_t b = 0; b < unit.n; ++b) {
    lo[b] = static_cast<int>(most(a.lo[blocks[b].row] - base, 0));
    hi[b] = static_cast<int>(least(a.hi[blocks[b].row] - base, kPartSlots - 1));
    first = lo[b] < first ? lo[b] : first;
    last = hi[b] > last ? hi[b] : last;
  }
  PartPages pages{};
  for (int64_t i = first / kPageSlots; i * kPageSlots <= last; ++i) {
    const int64_t index = part * kPartPages + i - a.first_page[sequence];
    const PageView page = page_view(a.kv, a.table[sequence * a.table_stride + index], unit.kv_head);
    pages.k[i] = page.k;
    pages.v[i] = page.v;
  }
  attend_part_on_tiles(blocks, unit.n, lo, hi, pages, a.kv.head_dim, tile_scratch(a, worker));
}
#endif

// Leaves in each block that sees some of a part's keys its sums over them.
static void attend_part(const AttentionArgs& a, const Unit& unit, HeadState* blocks, int64_t part,
                        [[maybe_unused]] const Worker& worker) {
#ifdef OUTDRAFT_TILES
  if (on_tiles(a.kv)) return attend_part_by_tiles(a, unit, blocks, part, worker);
#endif
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
    attend_part(a, unit, blocks, part, worker);
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
  attend_part(a, unit, blocks, part, worker);
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
static void attend_all(const AttentionArgs& a, const Worker& worker) {
  const int64_t dim = a.kv.head_dim, limit = block_limit(a.kv);
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

static void attention(const AttentionArgs& a, const Worker& worker) {
#ifdef OUTDRAFT_TILES
  if (on_tiles(a.kv)) {
    begin_tiles();
    attend_all(a, worker);
    return _tile_release();
  }
#endif
  attend_all(a, worker);
}

}  // namespace outdraft::OUTDRAFT_ISA
