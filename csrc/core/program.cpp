#include "core/program.h"

namespace outdraft {

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
