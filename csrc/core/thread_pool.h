// A small pool of threads that run the stages of a region one after another.
//
// The work of a stage is cut into numbered pieces. A thread takes the pieces meant for it and then
// those that others have not begun, so a stage is done whether or not the other threads get a
// processor: only a piece that somebody has begun is waited for. Results cannot depend on which
// thread computes a piece.
//
// The caller is thread 0. Idle threads spin for some microseconds, because the next region usually
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

// Stages 0..n_stages - 1. `piece` is called once for every index below worker.count, possibly by
// several threads at once, and all of a stage have returned before the next one begins. A serial
// stage has a single piece.
struct Region {
  const void* context = nullptr;
  int n_stages = 0;
  bool (*serial)(const void* context, int stage) = nullptr;
  void (*piece)(const void* context, int stage, const Worker& worker) = nullptr;
};

// What tests do to the threads of a pool.
enum class Disturbance : int {
  none = 0,
  absent = 1,  // those beside the caller take nothing
  late = 2,    // all sleep before and after some pieces
};

class ThreadPool {
 public:
  static constexpr int kPieces = 4;  // of a stage for each thread: enough for an even share

  // n_threads >= 1, the caller included. Throws std::invalid_argument otherwise.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return n_threads_; }
  int pieces() const { return n_threads_ == 1 ? 1 : n_threads_ * kPieces; }

  // Returns when all stages are done. Regions from several threads run one after the other.
  void run(const Region& region);

  void disturb(Disturbance kind) { disturbance_.store(kind, std::memory_order_relaxed); }

 private:
  struct AlignedDelete {
    void operator()(std::byte* p) const;
  };
  using Scratch = std::unique_ptr<std::byte[], AlignedDelete>;

  // Twice the number of the current stage, counted over all regions, plus 1 while it is worked on.
  using State = uint64_t;

  // The stage of which one thread's pieces were last taken, times 256, plus how many of them.
  struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};
  };

  void work(int thread);
  bool work_on(State state, int thread);
  bool take(State state, Share& share, int& piece);
  void run_piece(State state, int index, int thread);
  void open(int stage, int thread);
  bool wait_for_change(State old, int spins);
  bool disturbed(Disturbance kind) const {
    return disturbance_.load(std::memory_order_relaxed) == kind;
  }

  const int n_threads_;
  std::vector<Scratch> scratch_;  // of each thread
  Scratch shared_;
  std::unique_ptr<Share[]> shares_;
  std::mutex one_region_;
  Region region_;       // for who has taken a piece of it: nobody else knows that it lasts
  uint64_t first_ = 0;  // number of the region's stage 0
  std::atomic<Disturbance> disturbance_{Disturbance::none};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<State> state_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> left_{0};  // pieces of the stage that are not done
  std::vector<std::thread> threads_;
};

// The pool that all kernels run on: one thread until set_threads is called.
ThreadPool& pool();
void set_threads(int n_threads);

}  // namespace outdraft
