#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/dual_linear.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) dual_linear_kernel(const DualLinearParams<T> params) {
  dual_linear_block<Sm80, MatrixMma<Sm80, T, true>>(params);
}

}  // namespace

template <class T>
void launch_dual_linear(const DeviceStream& stream, const DualLinearParams<T>& params) {
  launch("dual_linear", stream, dual_linear_kernel<T>, grid_of(params.grid.blocks()), kEngineThreads,
         dual_linear_shared_bytes<MatrixMma<Sm80, T, true>>(params.epilogue.ranks), params);
}
#define MI_INSTANCE(T) template void launch_dual_linear<T>(const DeviceStream&, const DualLinearParams<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
