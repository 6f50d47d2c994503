// Kernel calls, run at once or recorded and replayed as one parallel region.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/thread_pool.h"

namespace outdraft {

// A kernel with its arguments. A serial call has too little work to share: whoever finishes the call
// before it does it alone.
struct Call {
  static constexpr std::size_t kArgsBytes = 320;

  using Invoke = void (*)(const void* kernel, const std::byte* args, const Worker& worker);

  Invoke invoke;
  const void* kernel;
  bool serial;
  alignas(16) std::byte args[kArgsBytes];

  template <class Args>
  static Call make(void (*kernel)(const Args&, const Worker&), const Args& args, bool serial) {
    static_assert(sizeof(Args) <= kArgsBytes && std::is_trivially_copyable_v<Args>);
    Call call{[](const void* k, const std::byte* a, const Worker& worker) {
                reinterpret_cast<void (*)(const Args&, const Worker&)>(const_cast<void*>(k))(
                    *reinterpret_cast<const Args*>(a), worker);
              },
              reinterpret_cast<const void*>(kernel),
              serial,
              {}};
    std::memcpy(call.args, &args, sizeof(Args));
    return call;
  }

  void run(const Worker& worker) const { invoke(kernel, args, worker); }
};

// The calls of a step in order. Pointers in them stay valid for as long as it is replayed: the
// Python side keeps the tensors.
class Program {
 public:
  void add(const Call& call) { calls_.push_back(call); }
  std::size_t size() const { return calls_.size(); }
  void replay() const;

 private:
  std::vector<Call> calls_;
};

}  // namespace outdraft
