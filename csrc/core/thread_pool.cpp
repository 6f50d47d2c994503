#include "core/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <ctime>
#include <new>
#include <stdexcept>

namespace outdraft {
namespace {

// Some 100 to 1000 microseconds, by CPU: longer than Python takes between two passes.
constexpr int kIdleSpins = 20000;
// Within a region others are late by a piece, unless they have lost their processor.
constexpr int kStageSpins = 2000;
constexpr std::align_val_t kCacheLine{64};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;

// Processor time of the calling thread; where that is not known, the time.
Clock::duration processor_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec t;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0)
    return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
#endif
  return Clock::now().time_since_epoch();
}

// When a thread keeps away because others wait for it while it does not get a processor, and for
// how long: the longer the more often that happens. While other programs fill the cores, one thread
// alone is faster than several that wait for each other.
class Absence {
 public:
  // The thread has slept: time until now is not lost.
  void restart() {
    since_ = Clock::now();
    worked_ = processor_time();
  }
  // Whether it has lost a good part of its time since the last call or restart.
  bool due() {
    const Clock::time_point since = since_;
    const Clock::duration worked = worked_;
    restart();
    const Clock::duration lost = (since_ - since) - (worked_ - worked);
    return lost > kMuch && 8 * lost > since_ - since;
  }
  void sleep() {
    const bool rare = Clock::now() - back_ > 16 * length_;
    length_ = rare ? kShortest : std::min(2 * length_, kLongest);
    std::this_thread::sleep_for(length_);
    back_ = Clock::now();
    restart();
  }

 private:
  using Milliseconds = std::chrono::milliseconds;
  static constexpr std::chrono::microseconds kMuch{500};
  static constexpr Milliseconds kShortest{1}, kLongest{128};
  Clock::time_point since_ = Clock::now();
  Clock::duration worked_ = processor_time();
  Milliseconds length_ = kShortest;
  Clock::time_point back_ = since_;
};

// For tests: sleeps at one piece in 16, by a hash of its number.
void be_late(uint64_t number) {
  if ((number * 0x9e3779b97f4a7c15u) >> 60 == 0)
    std::this_thread::sleep_for(std::chrono::microseconds(300));
}

bool working(uint64_t state) { return state & 1; }

}  // namespace

void ThreadPool::AlignedDelete::operator()(std::byte* p) const {
  ::operator delete[](p, kCacheLine);
}

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) {
  if (n_threads < 1) throw std::invalid_argument("a thread pool needs at least one thread");
  for (int i = 0; i < n_threads; ++i)
    scratch_.emplace_back(static_cast<std::byte*>(::operator new[](kScratchBytes, kCacheLine)));
  shared_.reset(static_cast<std::byte*>(::operator new[](kSharedBytes, kCacheLine)));
  std::memset(shared_.get(), 0, kCounterBytes);
  shares_ = std::make_unique<Share[]>(n_threads);
  for (int i = 1; i < n_threads; ++i) threads_.emplace_back(&ThreadPool::work, this, i);
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  state_.fetch_add(2);
  state_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const Region& region) {
  const std::lock_guard lock(one_region_);
  region_ = region;
  first_ = (state_.load(std::memory_order_relaxed) >> 1) + 1;
  if (n_threads_ == 1) {
    for (int stage = 0; stage < region.n_stages; ++stage)
      region.piece(region.context, stage, {0, 1, scratch_[0].get(), shared_.get()});
    return;
  }
  open(0, 0);
  for (;;) {
    const State state = state_.load(std::memory_order_acquire);
    if (!working(state)) return;
    work_on(state, 0);
    wait_for_change(state, kStageSpins);
  }
}

void ThreadPool::work(int thread) {
  Absence absence;
  State seen = 0;
  for (;;) {
    if (wait_for_change(seen, working(seen) ? kStageSpins : kIdleSpins)) absence.restart();
    if (stop_.load(std::memory_order_relaxed)) return;
    seen = state_.load(std::memory_order_acquire);
    if (!working(seen) || disturbed(Disturbance::absent)) continue;
    if (work_on(seen, thread) && absence.due()) absence.sleep();
  }
}

// Takes and runs pieces until none is left to take. Returns whether others had to wait so long for
// this thread's last piece that they went to sleep.
bool ThreadPool::work_on(State state, int thread) {
  int done = 0;
  for (int i = 0; i < n_threads_; ++i) {
    const int share = (thread + i) % n_threads_;
    for (int piece; take(state, shares_[share], piece); ++done)
      run_piece(state, share * kPieces + piece, thread);
  }
  // Without a piece of it, the stage may be over, and so may be the region.
  if (done == 0 || left_.fetch_sub(done, std::memory_order_acq_rel) > done) return false;
  const bool late = sleepers_.load() > 0;
  open(static_cast<int>((state >> 1) - first_) + 1, thread);
  return late;
}

bool ThreadPool::take(State state, Share& share, int& piece) {
  const uint64_t none = state >> 1 << 8;
  uint64_t now = share.taken.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t taken = now < none ? 0 : now - none;  // at least 256 once the stage is over
    if (taken >= kPieces) return false;
    if (share.taken.compare_exchange_weak(now, none + taken + 1, std::memory_order_acq_rel,
                                          std::memory_order_relaxed)) {
      piece = static_cast<int>(taken);
      return true;
    }
  }
}

void ThreadPool::run_piece(State state, int index, int thread) {
  const bool late = disturbed(Disturbance::late);
  if (late) be_late(state * 256 + index);
  region_.piece(region_.context, static_cast<int>((state >> 1) - first_),
                {index, pieces(), scratch_[thread].get(), shared_.get()});
  if (late) be_late(~(state * 256 + index));
}

// Runs serial stages from `stage` on and opens the next other one for all, or ends the region.
void ThreadPool::open(int stage, int thread) {
  const Worker alone{0, 1, scratch_[thread].get(), shared_.get()};
  for (; stage < region_.n_stages && region_.serial(region_.context, stage); ++stage)
    region_.piece(region_.context, stage, alone);
  const bool more = stage < region_.n_stages;
  left_.store(pieces(), std::memory_order_relaxed);
  state_.store((first_ + stage) << 1 | more);
  if (sleepers_.load() > 0) state_.notify_all();
}

// Returns whether it slept.
bool ThreadPool::wait_for_change(State old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (state_.load(std::memory_order_acquire) != old) return false;
    pause();
  }
  // Before the state is looked at again: who changes it looks for sleepers afterwards.
  sleepers_.fetch_add(1);
  state_.wait(old);
  sleepers_.fetch_sub(1);
  return true;
}

namespace {

std::mutex pool_lock;
std::unique_ptr<ThreadPool>& shared_pool() {
  // Never destroyed: joining threads while the process exits can hang.
  static auto* pool = new std::unique_ptr<ThreadPool>(std::make_unique<ThreadPool>(1));
  return *pool;
}

}  // namespace

ThreadPool& pool() {
  const std::lock_guard lock(pool_lock);
  return *shared_pool();
}

void set_threads(int n_threads) {
  const std::lock_guard lock(pool_lock);
  if (shared_pool()->size() != n_threads) shared_pool() = std::make_unique<ThreadPool>(n_threads);
}

}  // namespace outdraft
