#include "core/program.h"

#include <stdexcept>

namespace outdraft {

void Program::resize(int n, int of) {
  if (n < 1 || n > of) throw std::invalid_argument("more rows than were recorded, or none");
  for (const Call& call : calls_)
    if (call.rows % of != 0) throw std::invalid_argument("a call with other rows");
  for (Call& call : calls_) call.set_rows(call.rows / of * n);
}

void Program::replay() const {
  Region region;
  region.context = calls_.data();
  region.n_stages = static_cast<int>(calls_.size());
  region.serial = [](const void* calls, int stage) {
    return static_cast<const Call*>(calls)[stage].serial;
  };
  region.piece = [](const void* calls, int stage, const Worker& worker) {
    static_cast<const Call*>(calls)[stage].run(worker);
  };
  pool().run(region);
}

}  // namespace outdraft
