#include "core/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(OUTDRAFT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace outdraft {
namespace {

struct Candidate {
  const char* name;
  const char* needs;
  bool supported;
  const KernelTable* table;
};

#if defined(OUTDRAFT_AMX)
// The system keeps tile registers only for processes that have asked for them.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<Candidate> candidates() {
  std::vector<Candidate> all;
#ifdef OUTDRAFT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#ifdef OUTDRAFT_AMX
  static const bool amx = avx512 && __builtin_cpu_supports("amx-tile") &&
                          __builtin_cpu_supports("amx-int8") &&
                          __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  all.push_back({"avx512-amx", "AVX-512 with VNNI and AMX", amx, &avx512_amx::table()});
#endif
  all.push_back({"avx512", "AVX-512 F, BW, DQ, VL and VNNI", avx512, &avx512::table()});
#ifdef OUTDRAFT_AVX_VNNI
  all.push_back({"avx2-vnni", "AVX2, FMA, F16C and AVX-VNNI",
                 avx2 && __builtin_cpu_supports("avxvnni"), &avx2_vnni::table()});
#endif
  all.push_back({"avx2", "AVX2, FMA and F16C", avx2, &avx2::table()});
#endif
  all.push_back({"portable", "nothing", true, &portable::table()});
  return all;
}

const Candidate& best() {
  static const Candidate chosen = [] {
    for (const Candidate& c : candidates())
      if (c.supported) return c;
    throw std::logic_error("the portable kernels are always there");
  }();
  return chosen;
}

std::atomic<const Candidate*> forced{nullptr};

const Candidate& current() {
  const Candidate* choice = forced.load(std::memory_order_acquire);
  return choice ? *choice : best();
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates())
    if (c.supported) names.emplace_back(c.name);
  return names;
}

const KernelTable& kernels() { return *current().table; }

std::string current_isa() { return current().name; }

void set_isa(const std::string& name) {
  static const std::vector<Candidate> all = candidates();
  for (const Candidate& c : all) {
    if (name == c.name && c.supported) {
      forced.store(&c, std::memory_order_release);
      return;
    }
  }
  throw std::invalid_argument("this CPU or this build has no instruction set named " + name);
}

std::string isa_report() {
  const Candidate& running = current();
  std::string text = std::string("runs on ") + running.name;
  if (&running != &best() && running.table != best().table)
    return text + ", as asked; the best this CPU has is " + best().name;
  text += ", the best this CPU has";
  for (const Candidate& c : candidates()) {
    if (c.supported) break;
    text += std::string("; ") + c.name + " needs " + c.needs;
  }
  return text;
}

}  // namespace outdraft
