// Python bindings of the kernels of recurrent layers, and of routing by sigmoids; see kernels.cpp.
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

void short_conv(Program* program, const Matrix& x, const Matrix& out, Addr weight, Addr bias,
                Addr state, Addr sequence, Addr read, Addr write, int rows, int channels,
                int width) {
  const ConvArgs args{x,
                      out,
                      pointer<const float>(weight),
                      pointer<const float>(bias),
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

void scan(Program* program, const Matrix& x, const Matrix& dt, const Matrix& out, Addr decay,
          Addr bias, Addr skip, float least_step, float most_step, Addr state, Addr sequence,
          Addr read, Addr write, int rows, int n_heads, int n_groups, int n_state, int dim) {
  const ScanArgs args{x,
                      dt,
                      out,
                      pointer<const float>(decay),
                      pointer<const float>(bias),
                      pointer<const float>(skip),
                      least_step,
                      most_step,
                      pointer<float>(state),
                      state_rows(sequence, read, write, rows),
                      n_heads,
                      n_groups,
                      n_state,
                      dim};
  submit(program, kernels().scan, args, false);
}

void group_norm(Program* program, const Matrix& x, const Matrix& gate, const Matrix& out,
                Addr weight, float eps, int rows, int n_groups, int dim) {
  const GroupNormArgs args{x, gate, out, pointer<const float>(weight), eps, rows, n_groups, dim};
  submit(program, kernels().group_norm, args, false);
}

void sigmoid_top(Program* program, const Matrix& x, Addr bias, Addr ids, Addr weights, float scale,
                 bool normalise, int count, int n_groups, int top_groups, int rows, int n) {
  const SigmoidTopArgs args{x,
                            pointer<const float>(bias),
                            pointer<int32_t>(ids),
                            pointer<float>(weights),
                            scale,
                            normalise,
                            count,
                            n_groups,
                            top_groups,
                            rows,
                            n};
  submit(program, kernels().sigmoid_top, args, true);
}

}  // namespace

void bind_recurrent(nb::module_& m) {
  const auto program = nb::arg("program").none();
  m.def("short_conv", &short_conv, program, "x"_a, "out"_a, "weight"_a, "bias"_a, "state"_a,
        "sequence"_a, "read"_a, "write"_a, "rows"_a, "channels"_a, "width"_a);
  m.def("delta_rule", &delta_rule, program, "qkv"_a, "a"_a, "b"_a, "out"_a, "decay"_a, "bias"_a,
        "state"_a, "sequence"_a, "read"_a, "write"_a, "rows"_a, "n_k_heads"_a, "n_v_heads"_a,
        "k_dim"_a, "v_dim"_a);
  m.def("gated_norm", &gated_norm, program, "x"_a, "gate"_a, "out"_a, "weight"_a, "eps"_a,
        "rows"_a, "n_heads"_a, "dim"_a);
  m.def("scan", &scan, program, "x"_a, "dt"_a, "out"_a, "decay"_a, "bias"_a, "skip"_a,
        "least_step"_a, "most_step"_a, "state"_a, "sequence"_a, "read"_a, "write"_a, "rows"_a,
        "n_heads"_a, "n_groups"_a, "n_state"_a, "dim"_a);
  m.def("group_norm", &group_norm, program, "x"_a, "gate"_a, "out"_a, "weight"_a, "eps"_a,
        "rows"_a, "n_groups"_a, "dim"_a);
  m.def("sigmoid_top", &sigmoid_top, program, "x"_a, "bias"_a, "ids"_a, "weights"_a, "scale"_a,
        "normalise"_a, "count"_a, "n_groups"_a, "top_groups"_a, "rows"_a, "n"_a);
}

}  // namespace outdraft
