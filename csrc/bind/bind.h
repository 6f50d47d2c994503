// What the parts of the Python module share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>

#include "core/kernel_table.h"
#include "core/program.h"

namespace outdraft {

void bind_packing(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_recurrent(nanobind::module_& m);

using Addr = uintptr_t;

// A pointer that Python passes as an integer; 0 is null.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Run `calls` now or add them to `program`.
inline void submit(Program* program, std::initializer_list<Call> calls) {
  if (program) {
    for (const Call& call : calls) program->add(call);
    return;
  }
  Program once;
  for (const Call& call : calls) once.add(call);
  nanobind::gil_scoped_release release;
  once.replay();
}

template <class Args>
void submit(Program* program, Kernel<Args> kernel, const Args& args, bool serial) {
  submit(program, {Call::make(kernel, args, serial)});
}

}  // namespace outdraft
