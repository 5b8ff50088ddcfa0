// The dense forward pass on the sm_90a engine, if a call is one for it.
#pragma once

#include <string>

#include "common/dtypes.h"
#include "common/problem_size.h"
#include "cuda/host/device_stream.h"
#include "cuda/host/operands.h"

namespace mi_kernels::cuda {

// Runs it and returns true if the plan prefers the engine, this build has it and the tensors are aligned as TMA
// requires. y [groups, rows, out] is contiguous and not empty.
bool run_forward_sm90(const DeviceStream& stream, const Tensor& like, DType dtype, const DenseOperands& a,
                      const TensorRef& bias, void* y);

// Its plan with the `terms` of cuda_interaction_plan; empty if the mma engine takes the call.
std::string forward_plan_sm90(const ProblemSize& p, DType dtype, int64_t terms, const WeightLayout& layout,
                              const DeviceProperties& device);

}  // namespace mi_kernels::cuda
