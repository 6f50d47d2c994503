// Kernel calls, run at once or recorded and replayed as one parallel region.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/thread_pool.h"

namespace outdraft {

// The number among a kernel's arguments that grows with the rows of a pass; null if there is none.
template <class Args>
int32_t* row_count(Args& args) {
  if constexpr (requires { args.rows.rows; }) return &args.rows.rows;
  else if constexpr (requires { args.rows; }) return &args.rows;
  else if constexpr (requires { args.pairs; }) return &args.pairs;
  else return nullptr;
}

// A kernel with its arguments. A serial call has too little work to share: whoever finishes the call
// before it does it alone.
struct Call {
  static constexpr std::size_t kArgsBytes = 320;

  using Invoke = void (*)(const void* kernel, const std::byte* args, const Worker& worker);

  Invoke invoke;
  const void* kernel;
  bool serial;
  int32_t rows_at = -1;  // byte offset of the row count in `args`; negative: none
  int32_t rows = 0;      // what it was when the call was made
  alignas(16) std::byte args[kArgsBytes];

  template <class Args>
  static Call make(void (*kernel)(const Args&, const Worker&), Args args, bool serial) {
    static_assert(sizeof(Args) <= kArgsBytes && std::is_trivially_copyable_v<Args>);
    Call call{[](const void* k, const std::byte* a, const Worker& worker) {
                reinterpret_cast<void (*)(const Args&, const Worker&)>(const_cast<void*>(k))(
                    *reinterpret_cast<const Args*>(a), worker);
              },
              reinterpret_cast<const void*>(kernel),
              serial,
              -1,
              0,
              {}};
    if (const int32_t* rows = row_count(args)) {
      call.rows = *rows;
      call.rows_at = static_cast<int32_t>(reinterpret_cast<const std::byte*>(rows) -
                                          reinterpret_cast<const std::byte*>(&args));
    }
    std::memcpy(call.args, &args, sizeof(Args));
    return call;
  }

  void set_rows(int32_t n) {
    if (rows_at >= 0) std::memcpy(args + rows_at, &n, sizeof n);
  }

  void run(const Worker& worker) const { invoke(kernel, args, worker); }
};

// The calls of a step in order. Pointers in them stay valid for as long as it is replayed: the
// Python side keeps the tensors.
class Program {
 public:
  void add(const Call& call) { calls_.push_back(call); }
  std::size_t size() const { return calls_.size(); }
  // From now on the first n of each `of` rows that calls were recorded with; n <= of. Throws
  // std::invalid_argument if a call has rows that are no multiple of `of`.
  void resize(int n, int of);
  void replay() const;

 private:
  std::vector<Call> calls_;
};

}  // namespace outdraft
