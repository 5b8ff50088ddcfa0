// Which kernel of the sm_90a engine each call takes, as "tile_n cluster splits blocks", or why none does.
#include "contiguous.h"

namespace sm90 = mi_kernels::cuda::sm90;

// A W along its outputs is copied from some rows on; those of groups that share it count together.
bool copies_where_it_pays() {
  mi_kernels::cuda::WeightLayout layout;
  layout.k_major = false;
  layout.n_major = true;
  const auto preferred = [&](int64_t groups, int64_t rows) {
    return mi_kernels::cuda::prefers_sm90({groups, rows, 16, 64, 512}, mi_kernels::DType::bf16, &layout, kHopper);
  };
  const bool own = !preferred(1, 719) && preferred(1, 720) && !preferred(3, 240);
  layout.shared = true;
  return own && preferred(3, 240) && !preferred(3, 239);
}

int main() {
  if (!copies_where_it_pays()) return 1;
  ContiguousCall call;
  while (read_call(call)) {
    const bool preferred = mi_kernels::cuda::prefers_sm90(call.problem, call.dtype(), &kContiguous, kHopper);
    if (!preferred || !sm90::fits_int(call.problem)) {
      std::puts("the plan prefers another engine");
      continue;
    }
    const sm90::ForwardArgs args = args_of(call.problem);
    if (const char* why = sm90::why_not(args)) {
      std::puts(why);
      continue;
    }
    const sm90::KernelConfig config = sm90::choose_config(args.shape, call.bfloat16, kHopper.sm_count);
    std::printf("%d %d %d %d\n", config.tile_n, config.cluster, config.splits, config.blocks);
  }
}
