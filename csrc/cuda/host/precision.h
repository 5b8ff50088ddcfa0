// The dtype that products are computed in.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/registration.h"
#include "cuda/host/plan.h"

namespace mi_kernels::cuda {

// float32 becomes tf32 if torch's settings allow it. They are not part of the stable ABI, so the operation that
// mi_kernels/ops/precision.py registers is asked.
inline DType product_dtype(DType dtype) {
  if (dtype != DType::f32) return dtype;
  StableIValue answer[1];
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(MI_OPERATION("tf32_allowed"), "", answer, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(answer[0]) ? DType::tf32 : dtype;
}
inline DType product_dtype(const Tensor& x, const char* op) {
  return product_dtype(dtype_of(x.scalar_type(), op, "x"));
}
// The same for calls that small-batch kernels may take, which have no tf32.
inline DType product_dtype(const Tensor& x, const ProblemSize& p, const char* op) {
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  return use_small_batch(p, dtype) ? dtype : product_dtype(dtype);
}

// The GPU of a plan query.
inline void check_gpu(const char* op, int64_t arch, int64_t processors) {
  STD_TORCH_CHECK(arch > 0 && arch < 1000, op, ": arch: expected 10 major + minor, as in 90, got ", arch);
  STD_TORCH_CHECK(processors > 0 && processors < 65536, op, ": processors: expected 1 to 65535, got ", processors);
}

}  // namespace mi_kernels::cuda
