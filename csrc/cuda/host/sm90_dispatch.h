// The dense forward pass on the sm_90a engine, for tensors.
#pragma once

#include <string>

#include "common/dtypes.h"
#include "common/problem_size.h"
#include "common/tensor_ref.h"
#include "cuda/host/device_stream.h"

namespace mi_kernels::cuda {

// Runs it if the plan prefers this engine, this build has it and the tensors are aligned as the copy engine wants them;
// returns whether it did. y [groups, rows, out] is contiguous and not empty.
bool run_forward_sm90(const DeviceStream& stream, const ProblemSize& p, DType dtype, const TensorRef& x,
                      const TensorRef& z, const TensorRef& weight, const TensorRef& weight_z, const TensorRef& weight_x,
                      const TensorRef& bias, void* y);

// What it would do with contiguous tensors, as in cuda_interaction_plan, or nothing if the mma engine takes the params.
// `terms` has a bit for each of W, U and V.
std::string describe_forward_sm90(const ProblemSize& p, DType dtype, int64_t terms, const DeviceProperties& device);

}  // namespace mi_kernels::cuda
