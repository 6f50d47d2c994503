// The Python module: instruction set, threads, programs. Kernels are bound in kernels.cpp, packing
// in packing.cpp. Pointers arrive as integers; the Python layer above checks shapes and types.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "core/isa.h"
#include "core/program.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_core, m) {
  m.doc() = "CPU kernels of outdraft. Use outdraft.ops.cpu, which checks what it passes.";
  m.def("available_isas", &outdraft::available_isas);
  m.def("current_isa", &outdraft::current_isa);
  m.def("set_isa", &outdraft::set_isa, "name"_a);
  m.def("isa_report", &outdraft::isa_report);
  m.def("set_threads", &outdraft::set_threads, "n_threads"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("threads", [] { return outdraft::pool().size(); });
  m.def(
      "disturb_threads",
      [](int kind) { outdraft::pool().disturb(static_cast<outdraft::Disturbance>(kind)); },
      "kind"_a);
  nb::class_<outdraft::Program>(m, "Program")
      .def(nb::init<>())
      .def("__len__", &outdraft::Program::size)
      .def("resize", &outdraft::Program::resize, "n"_a, "of"_a)
      .def("replay", &outdraft::Program::replay, nb::call_guard<nb::gil_scoped_release>());
  outdraft::bind_packing(m);
  outdraft::bind_kernels(m);
  outdraft::bind_recurrent(m);
}
