// Python bindings of the plain structs, of packing and of the memory that it fills.
#include "core/pack.h"

#include <nanobind/ndarray.h>

#include "bind/bind.h"
#include "core/args.h"
#include "core/memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace outdraft {
namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

Bytes zeros(std::size_t bytes) {
  auto* piece = new Piece(take_memory(bytes));
  const nb::capsule owner(piece, [](void* p) noexcept { delete static_cast<Piece*>(p); });
  return Bytes(piece->data, {bytes}, owner);
}

void bind_structs(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def(
          "__init__",
          [](Matrix* self, uintptr_t data, int64_t stride, int dtype) {
            new (self) Matrix{pointer<void>(data), stride, static_cast<DType>(dtype)};
          },
          "data"_a, "stride"_a, "dtype"_a);
  nb::class_<Weight>(m, "Weight")
      .def(
          "__init__",
          [](Weight* self, int format, int n, int k, int group, int n_blocks, uintptr_t data,
             uintptr_t scales, uintptr_t zeros) {
            new (self) Weight{static_cast<Format>(format),
                              n,
                              k,
                              group,
                              n_blocks,
                              pointer<const uint8_t>(data),
                              pointer<const void>(scales),
                              pointer<const void>(zeros)};
          },
          "format"_a, "n"_a, "k"_a, "group"_a, "n_blocks"_a, "data"_a, "scales"_a, "zeros"_a)
      .def_prop_ro("data_bytes", [](const Weight& w) { return panel_count(w) * panel_bytes(w); });
  nb::class_<KvPages>(m, "KvPages")
      .def(
          "__init__",
          [](KvPages* self, uintptr_t k, uintptr_t v, uintptr_t k_scales, uintptr_t v_scales,
             int dtype, int n_kv_heads, int head_dim) {
            new (self) KvPages{pointer<void>(k),
                               pointer<void>(v),
                               pointer<float>(k_scales),
                               pointer<float>(v_scales),
                               static_cast<DType>(dtype),
                               n_kv_heads,
                               head_dim};
          },
          "k"_a, "v"_a, "k_scales"_a, "v_scales"_a, "dtype"_a, "n_kv_heads"_a, "head_dim"_a);
}

}  // namespace

void bind_packing(nb::module_& m) {
  bind_structs(m);
  m.def("packed_layout", [] { return kPackedLayout; });
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "pack_floats",
      [](const Weight& w, const Matrix& rows, int64_t first, int64_t n, int candidates) {
        pack_floats(w, rows, {first, n}, candidates);
      },
      "weight"_a, "rows"_a, "first"_a, "n"_a, "candidates"_a, release());
  m.def(
      "pack_w8",
      [](const Weight& w, uintptr_t rows, int64_t stride, uintptr_t scales, int64_t first,
         int64_t n) {
        pack_w8(w, pointer<const int8_t>(rows), stride, pointer<const float>(scales), {first, n});
      },
      "weight"_a, "rows"_a, "stride"_a, "scales"_a, "first"_a, "n"_a, release());
  m.def(
      "pack_w4",
      [](const Weight& w, uintptr_t rows, int64_t stride, uintptr_t scales, uintptr_t zeros,
         int64_t first, int64_t n) {
        pack_w4(w, pointer<const uint8_t>(rows), stride, pointer<const float>(scales),
                pointer<const uint8_t>(zeros), {first, n});
      },
      "weight"_a, "rows"_a, "stride"_a, "scales"_a, "zeros"_a, "first"_a, "n"_a, release());
  m.def("zeros", &zeros, "bytes"_a);
}

}  // namespace outdraft
