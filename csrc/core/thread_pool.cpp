#include "core/thread_pool.h"

#include <cstring>
#include <new>
#include <stdexcept>

namespace outdraft {
namespace {

// Some 100 to 500 microseconds, by CPU: longer than Python takes between two passes.
constexpr int kSpins = 20000;
constexpr std::align_val_t kCacheLine{64};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` is no longer `old`.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

void Barrier::wait() {
  if (n_ == 1) return;
  const uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  } else {
    wait_for_change(round_, round);
  }
}

void ThreadPool::AlignedDelete::operator()(std::byte* p) const {
  ::operator delete[](p, kCacheLine);
}

ThreadPool::ThreadPool(int n_threads) : barrier_(n_threads) {
  if (n_threads < 1) throw std::invalid_argument("a thread pool needs at least one thread");
  for (int i = 0; i < n_threads; ++i)
    scratch_.emplace_back(static_cast<std::byte*>(::operator new[](kScratchBytes, kCacheLine)));
  shared_.reset(static_cast<std::byte*>(::operator new[](kSharedBytes, kCacheLine)));
  std::memset(shared_.get(), 0, kCounterBytes);
  for (int i = 1; i < n_threads; ++i) threads_.emplace_back(&ThreadPool::work, this, i);
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(Body body, const void* context) {
  const std::lock_guard lock(region_);
  body_ = body;
  context_ = context;
  if (!threads_.empty()) {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }
  body(context, worker(0), barrier_);
  barrier_.wait();
}

void ThreadPool::work(int index) {
  uint32_t seen = 0;
  for (;;) {
    wait_for_change(round_, seen);
    ++seen;
    if (stop_.load(std::memory_order_relaxed)) return;
    body_(context_, worker(index), barrier_);
    barrier_.wait();
  }
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
