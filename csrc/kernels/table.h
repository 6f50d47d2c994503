// The kernel table of the instruction set that this translation unit is compiled for.
#pragma once

#include "core/kernel_table.h"
#include "kernels/attention.h"
#include "kernels/choose.h"
#include "kernels/heads.h"
#include "kernels/linear.h"
#include "kernels/norms.h"
#include "kernels/pointwise.h"
#include "kernels/prepare.h"
#ifdef OUTDRAFT_TILES
#include "kernels/prepare_tiles.h"
#include "kernels/tiles_w4.h"
#endif
#include "kernels/recurrent.h"
#include "kernels/state_space.h"

namespace outdraft::OUTDRAFT_ISA {

const KernelTable& table() {
  static constexpr KernelTable all = {
#ifdef OUTDRAFT_TILES
      .tiles_w4 = true,
      .prepare = prepare_or_tiles,
      .linear = linear_or_tiles,
#else
      .tiles_w4 = false,
      .prepare = prepare,
      .linear = linear,
#endif
      .expert_linear = expert_linear,
      .attention = attention,
      .norm = norm,
      .head_norm = head_norm,
      .gated = gated,
      .embed = embed,
      .copy_rows = copy_rows,
      .softcap = softcap,
      .argmax = argmax,
      .scatter_blocks = scatter_blocks,
      .top = top,
      .group_pairs = group_pairs,
      .combine = combine,
      .short_conv = short_conv,
      .delta_rule = delta_rule,
      .gated_norm = gated_norm,
      .scan = scan,
      .group_norm = group_norm,
      .sigmoid_top = sigmoid_top,
      .read_all = read_all,
  };
  return all;
}

}  // namespace outdraft::OUTDRAFT_ISA
