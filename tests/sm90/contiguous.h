// Calls of the dense forward pass on 132 multiprocessors, all terms present and all tensors contiguous, as a test names
// them on standard input: lines "groups rows context width out bfloat16".
#pragma once

#include <cstdio>

#include "cuda/host/plan.h"
#include "cuda/host/sm90_args.h"

constexpr mi_kernels::cuda::DeviceProperties kHopper{90, 132};

struct ContiguousCall {
  mi_kernels::ProblemSize problem;
  bool bfloat16;
  mi_kernels::DType dtype() const { return bfloat16 ? mi_kernels::DType::bf16 : mi_kernels::DType::f16; }
};

inline bool read_call(ContiguousCall& call) {
  long long g, b, i, j, o;
  int bfloat16;
  if (std::scanf("%lld %lld %lld %lld %lld %d", &g, &b, &i, &j, &o, &bfloat16) != 6) return false;
  call = {{g, b, i, j, o}, bfloat16 != 0};
  return true;
}

// Only addresses of their tensors are looked at.
inline mi_kernels::cuda::sm90::ForwardOperands operands_of(const mi_kernels::ProblemSize& p) {
  alignas(256) static char memory[256];
  const int64_t b = p.rows, i = p.context, j = p.width, o = p.out;
  return mi_kernels::cuda::sm90::forward_operands(p, {memory, b * j, j, 1}, {memory, b * i, i, 1},
                                                  {memory, o * i * j, 0, 0}, {memory, o * i, i, 1},
                                                  {memory, o * j, j, 1}, {memory, o, 1, 0}, memory);
}
