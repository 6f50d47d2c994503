// Python bindings of the kernels of recurrent layers; see kernels.cpp.
#include "bind/bind.h"
#include "core/isa.h"
#include "core/recurrent_args.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace outdraft {
namespace {

StateRows state_rows(Addr sequence, Addr read, Addr write, int rows) {
  return {pointer<const int32_t>(sequence), pointer<const int32_t>(read),
          pointer<const int32_t>(write), rows};
}

void short_conv(Program* program, const Matrix& x, const Matrix& out, Addr weight, Addr state,
                Addr sequence, Addr read, Addr write, int rows, int channels, int width) {
  const ConvArgs args{x,
                      out,
                      pointer<const float>(weight),
                      pointer<float>(state),
                      state_rows(sequence, read, write, rows),
                      channels,
                      width};
  submit(program, kernels().short_conv, args, false);
}

void delta_rule(Program* program, const Matrix& qkv, const Matrix& a, const Matrix& b,
                const Matrix& out, Addr decay, Addr bias, Addr state, Addr sequence, Addr read,
                Addr write, int rows, int n_k_heads, int n_v_heads, int k_dim, int v_dim) {
  const DeltaArgs args{qkv,
                       a,
                       b,
                       out,
                       pointer<const float>(decay),
                       pointer<const float>(bias),
                       pointer<float>(state),
                       state_rows(sequence, read, write, rows),
                       n_k_heads,
                       n_v_heads,
                       k_dim,
                       v_dim};
  submit(program, kernels().delta_rule, args, false);
}

void gated_norm(Program* program, const Matrix& x, const Matrix& gate, const Matrix& out,
                Addr weight, float eps, int rows, int n_heads, int dim) {
  const GatedNormArgs args{x, gate, out, pointer<const float>(weight), eps, rows, n_heads, dim};
  submit(program, kernels().gated_norm, args, false);
}

}  // namespace

void bind_recurrent(nb::module_& m) {
  const auto program = nb::arg("program").none();
  m.def("short_conv", &short_conv, program, "x"_a, "out"_a, "weight"_a, "state"_a, "sequence"_a,
        "read"_a, "write"_a, "rows"_a, "channels"_a, "width"_a);
  m.def("delta_rule", &delta_rule, program, "qkv"_a, "a"_a, "b"_a, "out"_a, "decay"_a, "bias"_a,
        "state"_a, "sequence"_a, "read"_a, "write"_a, "rows"_a, "n_k_heads"_a, "n_v_heads"_a,
        "k_dim"_a, "v_dim"_a);
  m.def("gated_norm", &gated_norm, program, "x"_a, "gate"_a, "out"_a, "weight"_a, "eps"_a,
        "rows"_a, "n_heads"_a, "dim"_a);
}

}  // namespace outdraft
