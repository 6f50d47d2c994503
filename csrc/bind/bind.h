// What the parts of the Python module share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace outdraft {

void bind_packing(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);

// A pointer that Python passes as an integer; 0 is null.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace outdraft
