// Python bindings of the kernels. Each function adds its calls to a program, or runs them at once
// when the program is None.

#include <vector>

#include "bind/bind.h"
#include "core/args.h"
#include "core/isa.h"
#include "core/program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace outdraft {
namespace {

// Below these, sharing the work costs more than it saves.
constexpr int64_t kSerialElements = 8192;
constexpr int64_t kSerialActivations = 1024;  // an exponential each

bool small(int64_t rows, int64_t k) { return rows == 1 || rows * k <= kSerialElements; }

bool tiled(const Weight& w) { return w.format == Format::w4 && kernels().tiles_w4; }

int64_t prepared_bytes(const Weight& w, int64_t rows) {
  const int64_t plain = rows * prepared_layout(w.format, w.k, w.group).stride;
  return tiled(w) ? plain + tiled_bytes(w, rows) : plain;
}

Call prepare_call(const Weight& w, const Matrix& x, Addr prepared, int rows, bool tiled = false) {
  const PrepareArgs args{w.format, w.k, w.group, rows, x, pointer<uint8_t>(prepared), tiled};
  return Call::make(kernels().prepare, args, small(rows, w.k));
}

void linear(Program* program, const Weight& w, const Matrix& x, Addr prepared, const Matrix& y,
            int rows) {
  const LinearArgs args{w, pointer<const uint8_t>(prepared), y, rows};
  submit(program, {prepare_call(w, x, prepared, rows, tiled(w)),
                   Call::make(kernels().linear, args, false)});
}

PairGroups pair_groups(Addr memory, int n_experts) {
  auto* p = pointer<int32_t>(memory);
  return {p, p + 1, p + 1 + n_experts, p + 2 + 2 * n_experts};
}

// int32 elements that `groups` of group_pairs and expert_linear points to.
int64_t pair_groups_size(int pairs, int n_experts) { return 2 + 2 * n_experts + pairs; }

void group_pairs(Program* program, Addr ids, Addr groups, int pairs, int n_experts) {
  const GroupPairsArgs args{pointer<const int32_t>(ids), pair_groups(groups, n_experts), pairs,
                            n_experts};
  submit(program, kernels().group_pairs, args, true);
}

void expert_linear(Program* program, const Weight& w, const Matrix& x, Addr prepared,
                   const Matrix& y, Addr groups, int rows, int pairs) {
  const ExpertLinearArgs args{w, pointer<const uint8_t>(prepared), y,
                              pair_groups(groups, w.n_blocks), pairs / rows};
  submit(program,
         {prepare_call(w, x, prepared, rows), Call::make(kernels().expert_linear, args, false)});
}

void attention(Program* program, const Matrix& q, const Matrix& out, const KvPages& kv, Addr table,
               int64_t table_stride, Addr first_page, Addr sequence, Addr lo, Addr hi, int rows,
               int n_heads, float scale) {
  const AttentionArgs args{q,
                           out,
                           kv,
                           pointer<const int32_t>(table),
                           table_stride,
                           pointer<const int32_t>(first_page),
                           pointer<const int32_t>(sequence),
                           pointer<const int32_t>(lo),
                           pointer<const int32_t>(hi),
                           rows,
                           n_heads,
                           scale};
  submit(program, kernels().attention, args, false);
}

void norm(Program* program, const Matrix& x, const Matrix& residual, const Matrix& out,
          const Matrix& next_out, Addr weight, Addr next_weight, float eps, float scale, bool plain,
          int rows, int k) {
  const NormArgs args{x,
                      residual,
                      out,
                      next_out,
                      pointer<const float>(weight),
                      pointer<const float>(next_weight),
                      eps,
                      scale,
                      plain,
                      rows,
                      k};
  submit(program, kernels().norm, args, small(rows, k));
}

void head_norm(Program* program, const Matrix& x, const Matrix& out, Addr pages, Addr page_scales,
               Addr page, Addr slot, Addr weight, Addr cos, Addr sin, Addr position, float eps,
               int page_dtype, int rows, int n_heads, int dim) {
  const HeadNormArgs args{x,
                          out,
                          pointer<void>(pages),
                          pointer<float>(page_scales),
                          pointer<const int32_t>(page),
                          pointer<const int32_t>(slot),
                          pointer<const float>(weight),
                          pointer<const float>(cos),
                          pointer<const float>(sin),
                          pointer<const int32_t>(position),
                          eps,
                          static_cast<DType>(page_dtype),
                          rows,
                          n_heads,
                          dim};
  submit(program, kernels().head_norm, args,
         static_cast<int64_t>(rows) * n_heads * dim <= kSerialElements);
}

void gated(Program* program, const Matrix& gate, const Matrix& up, const Matrix& out,
           int activation, int rows, int k) {
  const GatedArgs args{gate, up, out, static_cast<Activation>(activation), rows, k};
  submit(program, kernels().gated, args, static_cast<int64_t>(rows) * k <= kSerialActivations);
}

void embed(Program* program, const Weight& w, Addr token, const Matrix& out, float scale,
           int rows) {
  const EmbedArgs args{w, pointer<const int32_t>(token), out, scale, rows};
  submit(program, kernels().embed, args, static_cast<int64_t>(rows) * w.k <= kSerialActivations);
}

void copy_rows(Program* program, const Matrix& x, Addr row, const Matrix& out, int rows, int k) {
  const CopyRowsArgs args{x, pointer<const int32_t>(row), out, rows, k};
  submit(program, kernels().copy_rows, args, static_cast<int64_t>(rows) * k <= kSerialElements);
}

void softcap(Program* program, const Matrix& x, float cap, int rows, int n) {
  const SoftcapArgs args{x, cap, rows, n};
  submit(program, kernels().softcap, args, static_cast<int64_t>(rows) * n <= kSerialActivations);
}

void argmax(Program* program, const Matrix& x, Addr ids, Addr chosen, int block, Addr out,
            Addr probability, int rows, int n) {
  const ArgmaxArgs args{x,
                        pointer<const int32_t>(ids),
                        pointer<const int32_t>(chosen),
                        block,
                        pointer<int32_t>(out),
                        pointer<float>(probability),
                        rows,
                        n};
  submit(program, kernels().argmax, args, small(rows, n));
}

void scatter_blocks(Program* program, const Matrix& x, Addr ids, Addr chosen, int block, int count,
                    const Matrix& out, int rows, int n) {
  const ScatterArgs args{
      x,   pointer<const int32_t>(ids), pointer<const int32_t>(chosen), block, count,
      out, rows,                        n};
  submit(program, kernels().scatter_blocks, args,
         static_cast<int64_t>(rows) * n <= kSerialElements);
}

void top(Program* program, const Matrix& x, Addr ids, Addr weights, Addr per_expert, int count,
         int rows, int n) {
  const TopArgs args{x,
                     pointer<int32_t>(ids),
                     pointer<float>(weights),
                     pointer<const float>(per_expert),
                     count,
                     rows,
                     n};
  submit(program, kernels().top, args, true);
}

void combine(Program* program, const Matrix& x, Addr weights, const Matrix& out, int count,
             int rows, int k) {
  const CombineArgs args{x, pointer<const float>(weights), out, count, rows, k};
  submit(program, kernels().combine, args,
         static_cast<int64_t>(rows) * k * count <= kSerialElements);
}

void read_all(Addr data, int64_t bytes) {
  std::vector<int32_t> sums(pool().pieces());
  submit(nullptr, kernels().read_all, ReadArgs{pointer<const uint8_t>(data), bytes, sums.data()},
         false);
}

}  // namespace

void bind_kernels(nb::module_& m) {
  const auto program = nb::arg("program").none();
  m.def("prepared_bytes", &prepared_bytes, "weight"_a, "rows"_a);
  m.def("linear", &linear, program, "weight"_a, "x"_a, "prepared"_a, "y"_a, "rows"_a);
  m.def("pair_groups_size", &pair_groups_size, "pairs"_a, "n_experts"_a);
  m.def("group_pairs", &group_pairs, program, "ids"_a, "groups"_a, "pairs"_a, "n_experts"_a);
  m.def("expert_linear", &expert_linear, program, "weight"_a, "x"_a, "prepared"_a, "y"_a,
        "groups"_a, "rows"_a, "pairs"_a);
  m.def("attention", &attention, program, "q"_a, "out"_a, "kv"_a, "table"_a, "table_stride"_a,
        "first_page"_a, "sequence"_a, "lo"_a, "hi"_a, "rows"_a, "n_heads"_a, "scale"_a);
  m.def("norm", &norm, program, "x"_a, "residual"_a, "out"_a, "next_out"_a, "weight"_a,
        "next_weight"_a, "eps"_a, "scale"_a, "plain"_a, "rows"_a, "k"_a);
  m.def("head_norm", &head_norm, program, "x"_a, "out"_a, "pages"_a, "page_scales"_a, "page"_a,
        "slot"_a, "weight"_a, "cos"_a, "sin"_a, "position"_a, "eps"_a, "page_dtype"_a, "rows"_a,
        "n_heads"_a, "dim"_a);
  m.def("gated", &gated, program, "gate"_a, "up"_a, "out"_a, "activation"_a, "rows"_a, "k"_a);
  m.def("embed", &embed, program, "weight"_a, "token"_a, "out"_a, "scale"_a, "rows"_a);
  m.def("copy_rows", &copy_rows, program, "x"_a, "row"_a, "out"_a, "rows"_a, "k"_a);
  m.def("softcap", &softcap, program, "x"_a, "cap"_a, "rows"_a, "n"_a);
  m.def("argmax", &argmax, program, "x"_a, "ids"_a, "chosen"_a, "block"_a, "out"_a,
        "probability"_a, "rows"_a, "n"_a);
  m.def("scatter_blocks", &scatter_blocks, program, "x"_a, "ids"_a, "chosen"_a, "block"_a,
        "count"_a, "out"_a, "rows"_a, "n"_a);
  m.def("top", &top, program, "x"_a, "ids"_a, "weights"_a, "per_expert"_a, "count"_a, "rows"_a,
        "n"_a);
  m.def("combine", &combine, program, "x"_a, "weights"_a, "out"_a, "count"_a, "rows"_a, "k"_a);
  m.def("read_all", &read_all, "data"_a, "bytes"_a);
}

}  // namespace outdraft
