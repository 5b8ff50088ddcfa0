// Which kernel of the sm_90a engine each call takes: "out_tile cluster split blocks", or why none does.
#include "contiguous.h"

namespace sm90 = mi_kernels::cuda::sm90;

int main() {
  ContiguousCall call;
  while (read_call(call)) {
    if (!mi_kernels::cuda::prefers_sm90(call.problem, call.dtype(), true, kHopper) || !sm90::fits_int(call.problem)) {
      std::puts("the plan prefers another engine");
      continue;
    }
    const sm90::ForwardOperands f = operands_of(call.problem);
    if (const char* why = sm90::refusal(f)) {
      std::puts(why);
      continue;
    }
    const sm90::ForwardChoice choice = sm90::choose_forward(f.problem, call.bfloat16, kHopper.sm_count);
    std::printf("%d %d %d %d\n", choice.out_tile, choice.cluster, choice.split, choice.blocks);
  }
}
