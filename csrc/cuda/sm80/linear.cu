#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/linear.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) linear_kernel(const LinearParams<T> params) {
  linear_block<Sm80, MatrixMma<Sm80, T>>(params);
}

}  // namespace

template <class T>
void launch_linear(const DeviceStream& stream, const LinearParams<T>& params) {
  launch("interaction_input_grads", stream, linear_kernel<T>, grid_of(params.grid.blocks()), kEngineThreads,
         engine_shared_bytes<MatrixMma<Sm80, T>>(), params);
}
#define MI_INSTANCE(T) template void launch_linear<T>(const DeviceStream&, const LinearParams<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
