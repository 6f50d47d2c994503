#include "core/program.h"

namespace outdraft {

void Program::replay() const {
  const auto region = [](const void* context, const Worker& worker, Barrier& barrier) {
    const std::vector<Call>& calls = *static_cast<const std::vector<Call>*>(context);
    for (std::size_t i = 0; i < calls.size(); ++i) {
      const bool serial = calls[i].serial;
      if (serial && worker.index == 0) calls[i].run({0, 1, worker.scratch, worker.shared});
      if (!serial) calls[i].run(worker);
      const bool last = i + 1 == calls.size();
      if (!last && !(serial && calls[i + 1].serial)) barrier.wait();
    }
  };
  pool().run(region, &calls_);
}

}  // namespace outdraft
