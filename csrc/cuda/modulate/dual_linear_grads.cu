#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"
#include "cuda/modulate/dual_linear_grads.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kModulateThreads) dual_linear_grads_kernel(const DualLinearGradsParams params) {
  dual_linear_grads_block<Simt, T>(params);
}

}  // namespace

void launch_dual_linear_grads(const DeviceStream& stream, DType dtype, const DualLinearGradsParams& params) {
  for_dtype(dtype, [&](auto t) {
    launch("dual_linear_grads", stream, dual_linear_grads_kernel<decltype(t)>, grid_of(params.blocks), kModulateThreads,
           0, params);
  });
}

}  // namespace mi_kernels::cuda
