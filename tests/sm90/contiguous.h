// Calls of the dense forward pass with all terms and contiguous tensors on 132 multiprocessors, which a test passes on
// standard input: lines "groups rows context width out bfloat16".
#pragma once

#include <cstdio>

#include "cuda/host/plan.h"
#include "cuda/host/sm90_args.h"
#include "cuda/host/weight_layout.h"

constexpr mi_kernels::cuda::DeviceProperties kHopper{90, 132};

constexpr mi_kernels::cuda::WeightLayout kContiguous{};

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

// The data of the tensors is never read.
inline mi_kernels::cuda::sm90::ForwardArgs args_of(const mi_kernels::ProblemSize& p) {
  alignas(256) static char memory[256];
  const int64_t x = p.width, z = p.context, out = p.out;
  return mi_kernels::cuda::sm90::forward_args(p, {memory, p.rows * x, x, 1}, {memory, p.rows * z, z, 1},
                                              {memory, out * z * x, z * x, x, 1}, {memory, out * z, z, 1},
                                              {memory, out * x, x, 1}, {memory, out, 1, 0}, memory);
}
