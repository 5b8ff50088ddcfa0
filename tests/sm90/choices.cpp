// Which kernel of the sm_90a engine a call takes, all terms present and all tensors contiguous: reads lines
// "groups rows context width out bfloat16" and answers each with "out_tile cluster split blocks", or with why none does.
#include <cstdint>
#include <cstdio>

#include "../../csrc/cuda/interaction_sm90.h"
#include "../../csrc/cuda/plan.h"

namespace sm90 = mi_kernels::cuda::sm90;
using mi_kernels::DType;
using mi_kernels::Operand;

int main() {
  constexpr mi_kernels::cuda::Machine kHopper{90, 132, 227 << 10};
  alignas(256) static char memory[256];  // only its address is looked at
  long long g, b, i, j, o;
  int bfloat16;
  while (std::scanf("%lld %lld %lld %lld %lld %d", &g, &b, &i, &j, &o, &bfloat16) == 6) {
    const mi_kernels::Problem p{g, b, i, j, o};
    if (!mi_kernels::cuda::prefers_sm90(p, bfloat16 ? DType::bf16 : DType::f16, true, kHopper) || !sm90::fits_int(p)) {
      std::puts("the plan prefers another engine");
      continue;
    }
    const Operand x{memory, b * j, j, 1}, z{memory, b * i, i, 1}, w{memory, o * i * j, 0, 0}, u{memory, o * i, i, 1};
    const Operand v{memory, o * j, j, 1}, c{memory, o, 1, 0};
    const sm90::ForwardOperands f = sm90::forward_operands(p, x, z, w, u, v, c, memory);
    if (const char* why = sm90::refusal(f)) {
      std::puts(why);
      continue;
    }
    const sm90::ForwardChoice choice = sm90::choose_forward(f.problem, bfloat16, kHopper.processors);
    std::printf("%d %d %d %d\n", choice.out_tile, choice.cluster, choice.split, choice.blocks);
  }
}
