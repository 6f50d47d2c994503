// A small pool of threads that run one parallel region at a time.
//
// The caller is worker 0. Idle workers spin for some microseconds, because the next region usually
// follows at once, and then sleep in the kernel.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/types.h"

namespace outdraft {

// Lets n threads wait for each other, any number of times.
class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait();

 private:
  const int n_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

class ThreadPool {
 public:
  // A region's body; `barrier` is for all workers of the region.
  using Body = void (*)(const void* context, const Worker& worker, Barrier& barrier);

  // n_threads >= 1, the caller included. Throws std::invalid_argument otherwise.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(scratch_.size()); }

  // Runs body once on every worker and returns when all are done. Regions from several threads run
  // one after the other.
  void run(Body body, const void* context);

 private:
  struct AlignedDelete {
    void operator()(std::byte* p) const;
  };
  using Scratch = std::unique_ptr<std::byte[], AlignedDelete>;

  Worker worker(int index) const {
    return {index, size(), scratch_[index].get(), shared_.get()};
  }
  void work(int index);

  std::vector<Scratch> scratch_;
  Scratch shared_;
  Barrier barrier_;
  std::mutex region_;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

// The pool that all kernels run on: one thread until set_threads is called.
ThreadPool& pool();
void set_threads(int n_threads);

}  // namespace outdraft
