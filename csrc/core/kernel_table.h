// The kernels of one instruction set, as a table of functions.
#pragma once

#include "core/args.h"
#include "core/recurrent_args.h"
#include "core/types.h"

namespace outdraft {

template <class Args>
using Kernel = void (*)(const Args&, const Worker&);

struct KernelTable {
  bool tiles_w4;  // `linear` reads many rows for a 4-bit weight as tiles
  Kernel<PrepareArgs> prepare;
  Kernel<LinearArgs> linear;
  Kernel<ExpertLinearArgs> expert_linear;
  Kernel<AttentionArgs> attention;
  Kernel<NormArgs> norm;
  Kernel<HeadNormArgs> head_norm;
  Kernel<GatedArgs> gated;
  Kernel<EmbedArgs> embed;
  Kernel<CopyRowsArgs> copy_rows;
  Kernel<SoftcapArgs> softcap;
  Kernel<ArgmaxArgs> argmax;
  Kernel<ScatterArgs> scatter_blocks;
  Kernel<TopArgs> top;
  Kernel<GroupPairsArgs> group_pairs;
  Kernel<CombineArgs> combine;
  Kernel<ConvArgs> short_conv;
  Kernel<DeltaArgs> delta_rule;
  Kernel<GatedNormArgs> gated_norm;
  Kernel<ScanArgs> scan;
  Kernel<GroupNormArgs> group_norm;
  Kernel<SigmoidTopArgs> sigmoid_top;
  Kernel<ReadArgs> read_all;
};

namespace portable {
const KernelTable& table();
}
#ifdef OUTDRAFT_X86
namespace avx2 {
const KernelTable& table();
}
namespace avx2_vnni {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
namespace avx512_amx {
const KernelTable& table();
}
#endif

}  // namespace outdraft
