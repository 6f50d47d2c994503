// Runs regions on thread pools of all kinds under ThreadSanitizer (`make test-tsan`).
//
// Stages hand plain memory to one another, so that a stage which begins before all of the one before
// is seen to have ended is reported as a race. Exits with 1 where a sum is wrong.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "core/kernel_table.h"
#include "core/program.h"
#include "core/thread_pool.h"

namespace {

using namespace outdraft;

constexpr int kStages = 7, kItems = 96;

// Stage s makes rows[s + 1] of rows[s]; every third stage is serial.
struct Chain {
  std::vector<std::vector<int>> rows{kStages + 1, std::vector<int>(kItems, 1)};
};

void add_up(const void* context, int stage, const Worker& worker) {
  auto& rows = const_cast<Chain*>(static_cast<const Chain*>(context))->rows;
  const Range mine = share(kItems, worker);
  std::memset(worker.scratch, stage, 64);  // of the thread alone
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    int sum = 0;
    for (int x : rows[stage]) sum = (sum + x) % 1000;
    rows[stage + 1][i] = sum + static_cast<int>(i);
  }
}

bool is_serial(const void*, int stage) { return stage % 3 == 2; }

std::vector<int> expected() {
  Chain chain;
  ThreadPool one(1);
  one.run({&chain, kStages, is_serial, add_up});
  return chain.rows[kStages];
}

bool chains_agree(int n_threads, Disturbance kind, int n_callers, int repeats) {
  const std::vector<int> right = expected();
  ThreadPool pool(n_threads);
  pool.disturb(kind);
  std::vector<int> wrong(n_callers);
  std::vector<std::thread> callers;
  for (int c = 0; c < n_callers; ++c)
    callers.emplace_back([&, c] {
      for (int i = 0; i < repeats; ++i) {
        Chain chain;
        pool.run({&chain, kStages, is_serial, add_up});
        wrong[c] += chain.rows[kStages] != right;
        // Longer than threads spin, now and then, so that they are asleep.
        if (i % 16 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (int w : wrong)
    if (w) return false;
  return true;
}

// Two linear layers, one upon the other, by the portable kernels on the shared pool.
bool layers_agree(Format format) {
  constexpr int kN = 64, kRows = 5;
  Weight w{format, kN, kN, 32};
  std::vector<uint8_t> data(panel_bytes(w) * panel_count(w), 0x11), extra(kN * 64, 0);
  w.data = data.data();
  w.scales = w.zeros = extra.data();
  if (format == Format::w4) w.zeros = nullptr;
  const PreparedLayout layout = prepared_layout(format, kN, 32);
  std::vector<float> first[2];
  for (int n_threads : {1, 3}) {
    set_threads(n_threads);
    pool().disturb(n_threads > 1 ? Disturbance::late : Disturbance::none);
    std::vector<float> x(kRows * kN, 0.5f), y(kRows * kN), z(kRows * kN);
    std::vector<uint8_t> prepared(kRows * layout.stride + 64);
    auto* rows = prepared.data() + (64 - reinterpret_cast<uintptr_t>(prepared.data()) % 64);
    const KernelTable& kernels = portable::table();
    Program program;
    for (auto [from, to] : {std::pair{&x, &y}, std::pair{&y, &z}}) {
      const Matrix in{from->data(), kN, DType::f32}, out{to->data(), kN, DType::f32};
      program.add(Call::make(kernels.prepare,
                             PrepareArgs{format, kN, 32, kRows, in, rows, false}, false));
      program.add(Call::make(kernels.linear, LinearArgs{w, rows, out, kRows}, false));
    }
    for (int i = 0; i < 8; ++i) program.replay();
    first[n_threads > 1] = z;
  }
  set_threads(1);
  return first[0] == first[1];
}

}  // namespace

int main() {
  bool good = true;
  for (int n_threads : {1, 2, 3, 5})
    for (Disturbance kind : {Disturbance::none, Disturbance::absent, Disturbance::late})
      for (int n_callers : {1, 3}) {
        const int repeats = kind == Disturbance::late ? 20 : 150;
        const bool ok = chains_agree(n_threads, kind, n_callers, repeats);
        if (!ok) std::printf("wrong sums: %d threads, kind %d, %d callers\n", n_threads,
                             static_cast<int>(kind), n_callers);
        good = good && ok;
      }
  for (outdraft::Format format : {Format::bf16, Format::w8, Format::w4})
    if (!layers_agree(format)) {
      std::printf("format %d: other bits with three threads\n", static_cast<int>(format));
      good = false;
    }
  std::printf(good ? "thread pool: all sums right\n" : "thread pool: FAILED\n");
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
